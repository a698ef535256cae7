"""The crop of an animation: one box for the portrait and every retargeted frame (method, section 9)."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from loki_jax.face.asset import HeadAsset
from loki_jax.face.crop import crop_and_resize
from loki_jax.face.types import Coefficients
from loki_jax.fitting.clips import head_extent
from loki_jax.sources import Portrait
from loki_jax.video import InputWarning

# Side of an animation's crop over that of the portrait's own: in a wider one the face would have few pixels.
LARGEST_GROWTH = 1.6

_WORTH_SAYING = 0.01  # share of the head that is cut


def frame_animation(
    head: HeadAsset, portrait: Portrait, coefficients: Coefficients
) -> tuple[Portrait, Coefficients]:
    """A portrait in a crop that holds the head in all frames of its animation, and the frames' coefficients.

    The crop is the portrait's own where that is wide enough. Otherwise it grows, at most `LARGEST_GROWTH`
    times. Where that is not enough, the translation is eased: one share of it, the same for all frames, is
    used. A portrait without its whole picture keeps its crop. Warns (`InputWarning`) of what is still cut.

    Args:
      coefficients: of `retarget_clip`, fields (N, ...).
    """
    if portrait.picture is not None:
        portrait, coefficients = _reframe(head, portrait, portrait.picture, coefficients)
    low, high = head_extent(head, coefficients, portrait.camera)
    inside = np.minimum(high, portrait.crop[2:]) - np.maximum(low, portrait.crop[:2])
    cut = 1 - np.prod(np.maximum(inside, 0) / (high - low), axis=1)
    if cut.max() > _WORTH_SAYING:
        warnings.warn(
            f"{portrait.name}: up to {100 * cut.max():.0f} % of the head is outside the picture, in "
            f"{100 * np.mean(cut > _WORTH_SAYING):.0f} % of the frames. Use a driver that moves less.",
            InputWarning,
            stacklevel=2,
        )
    return portrait, coefficients


def _reframe(
    head: HeadAsset, portrait: Portrait, picture: np.ndarray, coefficients: Coefficients
) -> tuple[Portrait, Coefficients]:
    own, moved = np.asarray(portrait.coefficients.tra), np.asarray(coefficients.tra)
    largest = LARGEST_GROWTH * float(portrait.crop[2] - portrait.crop[0])

    def eased(share: float) -> Coefficients:
        return (
            coefficients if share == 1 else coefficients._replace(tra=own + np.float32(share) * (moved - own))
        )

    def needed(share: float) -> Float[np.ndarray, "4"]:
        """The smallest box that holds the portrait's crop and all frames."""
        low, high = head_extent(head, eased(share), portrait.camera)
        corners = np.minimum(portrait.crop[:2], low.min(0)), np.maximum(portrait.crop[2:], high.max(0))
        return np.concatenate(corners)

    share = _largest_share(lambda share: (needed(share)[2:] - needed(share)[:2]).max() <= largest)
    if share < 1:
        warnings.warn(
            f"{portrait.name}: {100 * share:.0f} % of the driver's translation is followed; more would take "
            "the head out of the picture.",
            InputWarning,
            stacklevel=3,
        )
    box = needed(share)
    side = min(float((box[2:] - box[:2]).max()), largest)
    # As little away from the portrait's own crop as the box allows.
    start = (portrait.crop[:2] + portrait.crop[2:] - side) / 2
    start = np.clip(start, np.minimum(box[:2], box[2:] - side), np.maximum(box[:2], box[2:] - side))
    crop = np.concatenate([start, start + side]).astype(portrait.crop.dtype)
    if (box != portrait.crop).any():
        portrait = portrait._replace(crop=crop, image=crop_and_resize(picture, crop, len(portrait.image)))
    return portrait, eased(share)


def _largest_share(fits: Callable[[float], bool]) -> float:
    """The largest share of a motion that fits, to 1/256, by halving; 0 where none does."""
    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
