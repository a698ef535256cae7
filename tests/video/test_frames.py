"""Frames by random access are those that reading in order gives, whatever the container."""

from fractions import Fraction

import numpy as np
import pytest

from loki_jax.video import LazyFrames, MediaError, VideoReader, frames, read_video, write_video
from tests.video.test_video import make_driver, numbered_frames


@pytest.fixture
def small_pieces(monkeypatch):
    """Few decoded pictures are kept, so that every jump decodes anew."""
    monkeypatch.setattr(frames, "_KEPT_BYTES", 5 * 64 * 48 * 3)


KINDS = {
    "MP4": ("clip.mp4", {}),
    "no audio": ("clip.mkv", {"audio": None}),
    "pauses": ("clip.mp4", {"stamps": [0, 1, 2, 3, 10, 11, 12, *range(20, 63)]}),
    "rotated": ("clip.mp4", {"rotation": 90}),
    "no time stamps": ("clip.h264", {"audio": None}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fps", [None, Fraction(12)])
def test_random_access_equals_reading_in_order(tmp_path, small_pieces, kind, fps):
    name, options = KINDS[kind]
    path = make_driver(tmp_path / name, 50, **options)
    with VideoReader(path, fps) as reader:
        expected = list(reader)
        rate = reader.fps
    lazy = LazyFrames(path, fps)
    assert len(lazy) == len(expected) and lazy.fps == rate
    order = [*range(len(lazy)), *reversed(range(len(lazy))), 7, 40 % len(lazy), 3]
    for index in order:
        np.testing.assert_array_equal(lazy[index], expected[index])
    part = lazy[4:20:3].map(lambda frame: frame[:8])
    assert len(part) == len(expected[4:20:3])
    np.testing.assert_array_equal(part[-1], expected[4:20:3][-1][:8])
    np.testing.assert_array_equal(part[np.array([2, 0])].map(np.flipud)[1], expected[4][:8][::-1])


def test_damage_is_found_on_opening(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, numbered_frames(30), Fraction(25))
    whole = read_video(path).frames
    np.testing.assert_array_equal(np.stack(list(LazyFrames(path))), whole)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match="clip.mp4"):
        LazyFrames(path)
    with pytest.raises(MediaError, match="no such video"):
        LazyFrames(tmp_path / "none.mp4")
