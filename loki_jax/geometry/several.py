"""Several faces of one picture, each animated by its own driver, in one video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from loki_jax.geometry.pipeline import GeometryPipeline
from loki_jax.pipeline import Window
from loki_jax.sources import DrivingClip, Portrait

_WINDOW = 16
_BLEND = 6.0  # how sharply one face's part of the picture passes into the next one's


def animate_several(
    pipeline: GeometryPipeline, portraits: Sequence[Portrait], clips: Sequence[DrivingClip], **options: Any
) -> Iterator[Window]:
    """The animation of all portraits, which are faces of one picture.

    Each face is animated alone, and each pixel comes from the animation of the face that it is nearest to, in
    sizes of the faces, with soft borders between. All clips run at the rate of the first one; where one ends,
    its last frame stays until the longest one ends.

    Args:
      options: of `GeometryPipeline.windows`.

    Yields:
      Windows; the maps are those of the first face.

    Raises:
      ValueError: the portraits are not of one picture, or their number is not that of the clips.
    """
    shapes = {None if p.picture is None else p.picture.shape for p in portraits}
    if len(shapes) > 1 or None in shapes or len(portraits) != len(clips):
        raise ValueError("several faces need one picture and as many drivers as faces")
    clips = [clip.at_rate(clips[0].fps) for clip in clips]
    length = max(len(clip.valid) for clip in clips)
    streams = [
        _frames(pipeline.windows(portrait, clip, **options), length)
        for portrait, clip in zip(portraits, clips, strict=True)
    ]
    shares: Float[np.ndarray, "k h w 1"] | None = None
    shown: list[np.ndarray] = []
    maps: list[np.ndarray] = []
    for number, faces in enumerate(zip(*streams, strict=True), 1):
        shares = _shares(portraits, faces[0][0].shape[:2]) if shares is None else shares
        mixed = sum(share * frame for share, (frame, _) in zip(shares, faces, strict=True))
        shown.append(np.rint(mixed).astype(np.uint8))
        maps.append(faces[0][1])
        if len(shown) == _WINDOW or number == length:
            yield Window(np.stack(shown), np.stack(maps))
            shown, maps = [], []


def _frames(
    windows: Iterator[Window], length: int
) -> Iterator[tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "s s 3"]]]:
    """Frames and maps of windows one by one; the last ones again until there are `length`."""
    count, last = 0, None
    for window in windows:
        for last in zip(window.frames, window.maps, strict=True):
            yield last
            count += 1
    assert last is not None
    for _ in range(count, length):
        yield last


def _shares(portraits: Sequence[Portrait], shape: tuple[int, int]) -> Float[np.ndarray, "k h w 1"]:
    """How much of each pixel is each face's; they sum to 1."""
    height, width = shape
    rows, columns = np.mgrid[:height, :width] + 0.5
    distances = []
    for portrait in portraits:
        assert portrait.picture is not None
        x0, y0, x1, y1 = np.asarray(portrait.crop) * (width / portrait.picture.shape[1])
        away = np.hypot(columns - (x0 + x1) / 2, rows - (y0 + y1) / 2)
        distances.append(away / ((x1 - x0) / 2))
    nearness = np.exp(-_BLEND * (np.array(distances) - np.min(distances, axis=0)))
    return (nearness / nearness.sum(0))[..., None].astype(np.float32)
