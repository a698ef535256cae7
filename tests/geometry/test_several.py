"""Several faces of one picture: each part of it comes from its own face's animation."""

from fractions import Fraction

import numpy as np
import pytest

from loki_jax.face.types import Camera, Coefficients
from loki_jax.geometry.pipeline import GeometryPipeline
from loki_jax.geometry.several import animate_several
from loki_jax.pipeline import Window
from loki_jax.sources import DrivingClip, Portrait


class Painter(GeometryPipeline):
    """Its frames are one grey level, the number of the frame, brighter for the right face."""

    def __init__(self):
        pass

    def windows(self, portrait, clip):
        for start in range(0, len(clip.valid), 4):
            count = min(4, len(clip.valid) - start)
            level = start + np.arange(count) + (100 if portrait.name == "right" else 0)
            frames = np.broadcast_to(level.astype(np.uint8)[:, None, None, None], (count, 40, 80, 3))
            yield Window(frames, frames[:, :8, :8])


def portrait(name, crop):
    return Portrait(None, None, None, np.array(crop, np.float32), name, np.zeros((40, 80, 3), np.uint8))


def clip(length, fps=25):
    still = Coefficients(*(np.zeros((length, 3), np.float32) for _ in Coefficients._fields))
    camera = Camera(np.ones(4, np.float32), np.eye(4, dtype=np.float32))
    frames = np.zeros((length, 2, 2, 3), np.uint8)
    return DrivingClip(frames, still, camera, Fraction(fps), np.ones(length, bool), None, "clip")


def test_each_face_has_its_part_and_the_shorter_clip_waits():
    portraits = [portrait("left", [5, 5, 35, 35]), portrait("right", [45, 5, 75, 35])]
    windows = list(animate_several(Painter(), portraits, [clip(18), clip(5)]))
    frames = np.concatenate([window.frames for window in windows])
    assert frames.shape == (18, 40, 80, 3) and [len(w.frames) for w in windows] == [16, 2]
    np.testing.assert_array_equal(frames[:, 20, 15, 0], range(18))
    np.testing.assert_array_equal(frames[:, 20, 65, 0], [100, 101, 102, 103] + [104] * 14)
    border = frames[0, 20, 30:50, 0].astype(int)
    assert (np.diff(border) >= 0).all() and np.diff(border).max() < 30  # no seam


def test_faces_of_several_pictures_or_too_few_drivers_are_refused():
    one, other = portrait("left", [5, 5, 35, 35]), portrait("right", [45, 5, 75, 35])
    with pytest.raises(ValueError, match="one picture"):
        list(animate_several(Painter(), [one, other._replace(picture=None)], [clip(2), clip(2)]))
    with pytest.raises(ValueError, match="as many drivers"):
        list(animate_several(Painter(), [one, other], [clip(2)]))
