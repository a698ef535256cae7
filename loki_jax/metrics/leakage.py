"""How much of the driver's looks an animation shows, where exact renders exist (docs/svp.md)."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8


def leakage(
    generated: UInt8[np.ndarray, "n h w 3"],
    truth: UInt8[np.ndarray, "n h w 3"],
    other: UInt8[np.ndarray, "n h w 3"],
) -> float:
    """The share a for which truth + a (other - truth) is nearest to the frames: 0 no leak, 1 all of it.

    Args:
      generated: the animation.
      truth: the render that it should equal.
      other: the same render with one thing of the driver's, such as colours or the shape of the face.

    Raises:
      ValueError: truth and other are equal, so that nothing can be told.
    """
    error, change = (x.astype(np.float64) - truth for x in (generated, other))
    power = np.square(change).sum()
    if power == 0:
        raise ValueError("the renders of reference and driver are equal")
    return float((error * change).sum() / power)
