"""Trembling and flicker of a clip by itself: jitter and the warped difference (docs/metrics.md)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy.spatial.transform import Rotation

from loki_jax.fitting.points import OUTER_EYE_CORNERS

FLOW_SIZE = 256  # pixels of the frames that optical flow is found in

# Root of 1 + 9 + 9 + 1: the third difference of independent noise is so many times as large as the noise.
_GAIN = np.sqrt(20)


def jitter(
    track: Float[np.ndarray, "n d"], valid: Bool[np.ndarray, " n"] | None = None
) -> Float[np.ndarray, " n"]:
    """|x_t - 3 x_{t-1} + 3 x_{t-2} - x_{t-3}| / sqrt(20) of each frame, in the unit of `track`.

    Scaled so that independent noise gives the length of the noise. Motion at constant acceleration gives 0.
    Frames are those of one rate: compare clips of equal rates only. `root_mean_square` sums a clip up.

    Args:
      valid: frames that count; None: all.

    Returns:
      NaN for frames that with the three before are not all valid.
    """
    track = np.asarray(track, np.float64)
    return _of_four(np.linalg.norm(np.diff(track, n=3, axis=0), axis=1) / _GAIN, len(track), valid)


def rotation_jitter(
    rotations: Float[np.ndarray, "n 3"], valid: Bool[np.ndarray, " n"] | None = None
) -> Float[np.ndarray, " n"]:
    """`jitter` of rotation vectors (radians), in degrees: second differences of the turns between frames."""
    turns = Rotation.from_rotvec(np.asarray(rotations, np.float64))
    steps = (turns[1:] * turns[:-1].inv()).as_rotvec()
    angles = np.degrees(np.linalg.norm(np.diff(steps, n=2, axis=0), axis=1)) / _GAIN
    return _of_four(angles, len(rotations), valid)


def landmark_jitter(
    points: Float[np.ndarray, "n 478 _"], valid: Bool[np.ndarray, " n"] | None = None
) -> Float[np.ndarray, " n"]:
    """Mean `jitter` of the 478 landmarks in the picture, in % of the clip's median outer eye distance."""
    places = np.asarray(points, np.float64)[..., :2]
    left, right = OUTER_EYE_CORNERS
    counted = np.ones(len(places), bool) if valid is None else valid
    if not counted.any():
        return np.full(len(places), np.nan)
    width = np.median(np.linalg.norm(places[counted, left] - places[counted, right], axis=-1))
    lengths = np.linalg.norm(np.diff(places, n=3, axis=0), axis=-1).mean(1)
    return _of_four(100 * lengths / (_GAIN * width), len(places), valid)


def root_mean_square(values: Float[np.ndarray, " n"]) -> float | None:
    """Of the values that are not NaN; None without any."""
    values = values[np.isfinite(values)]
    return float(np.sqrt(np.square(values).mean())) if len(values) else None


def warped_differences(
    frames: Iterable[UInt8[np.ndarray, "h w 3"]], size: int = FLOW_SIZE
) -> Iterator[Float[np.ndarray, "size size"]]:
    """Difference of each frame from the one before, moved onto it by optical flow; grey levels of 255.

    Frames are resized to `size` pixels; the flow is Farnebäck's (2003), and the difference the mean of the
    absolute values over the channels. Pixels that come into view count, too. Needs OpenCV (extra `prep`).
    """
    import cv2

    y, x = np.mgrid[:size, :size].astype(np.float32)
    start = np.zeros((size, size, 2), np.float32)
    resized = (cv2.resize(frame, (size, size), interpolation=cv2.INTER_CUBIC) for frame in frames)
    shown = ((frame, cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)) for frame in resized)
    for (last, last_grey), (frame, grey) in itertools.pairwise(shown):
        flow = cv2.calcOpticalFlowFarneback(grey, last_grey, start, 0.5, 3, 21, 3, 5, 1.1, 0)
        moved = cv2.remap(
            last, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        yield np.abs(moved.astype(np.float64) - frame).mean(-1)


def flicker(
    frames: Iterable[UInt8[np.ndarray, "h w 3"]], size: int = FLOW_SIZE
) -> Float[np.ndarray, " n_minus_1"]:
    """Mean of `warped_differences` over the pixels, of each two consecutive frames; grey levels of 255."""
    return np.array([difference.mean() for difference in warped_differences(frames, size)], np.float64)


def _of_four(
    values: Float[np.ndarray, " m"], count: int, valid: Bool[np.ndarray, " n"] | None
) -> Float[np.ndarray, " n"]:
    """Values of the frames 3, 4, ... of `count`, with NaN where one of the four is not valid."""
    per_frame = np.full(count, np.nan)
    per_frame[3:] = values
    if valid is not None:
        gaps = np.flatnonzero(~np.asarray(valid, bool))
        for after in range(4):
            per_frame[gaps[gaps + after < count] + after] = np.nan
    return per_frame
