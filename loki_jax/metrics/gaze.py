"""Gaze error: the angle between two directions of the eyes (docs/metrics.md)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy.spatial.transform import Rotation

from loki_jax.face.types import Coefficients

_AHEAD = np.array([0.0, 0.0, 1.0])  # out of the face, in the head's axes


def gaze_error(
    prediction: Coefficients, target: Coefficients, valid: Bool[np.ndarray, " n"] | None = None
) -> Float[np.ndarray, " n"]:
    """Angle between R(eyes) z of both in each common frame, degrees; lower is better.

    The eyes are those in the head, so that an error of the head's pose does not enter. Turns about the line
    of sight do not count.

    Args:
      prediction, target: fields (n, ...) and (m, ...).
      valid: frames that were tracked in both; None: all. Others are NaN.
    """
    count = min(len(prediction.eyes), len(target.eyes))
    one, other = (
        Rotation.from_rotvec(np.asarray(side.eyes, np.float64)[:count]).apply(_AHEAD)
        for side in (prediction, target)
    )
    # The arctangent keeps its digits near 0, where an arccosine loses half of them.
    sine = np.linalg.norm(np.cross(one, other), axis=1)
    angle = np.degrees(np.arctan2(sine, (one * other).sum(1)))
    return angle if valid is None else np.where(valid[:count], angle, np.nan)
