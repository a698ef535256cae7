"""Frames by random access are those that reading in order gives, whatever the container."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from loki_jax.video import LazyFrames, MediaError, VideoReader, frames, read_video, write_video
from tests.video.test_video import frame_number, make_driver, numbered_frames


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


def test_a_folder_of_pictures_is_a_clip(tmp_path):
    frames = list(numbered_frames(12))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"f{index}.png")  # f10 comes after f9
    (folder / "notes.txt").write_text("no picture")
    clip = LazyFrames(folder)
    assert len(clip) == 12 and clip.fps == 25 and not clip.has_audio
    for found, frame in zip(clip[2:].map(lambda f: f[:8]), frames[2:], strict=True):
        np.testing.assert_array_equal(found, frame[:8])
    assert LazyFrames(folder, Fraction(30000, 1001)).fps == Fraction(30000, 1001)
    Image.fromarray(frames[0][:20]).save(folder / "f20.png")
    with pytest.raises(MediaError, match=r"f20\.png: 64x20 pixels.*64x48"):
        LazyFrames(folder)
    (folder / "f20.png").write_bytes(b"cut")
    with pytest.raises(MediaError, match=r"f20\.png: not a readable picture"):
        LazyFrames(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MediaError, match="folder without pictures"):
        LazyFrames(tmp_path / "empty")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_picture_is_a_clip_of_one_frame(tmp_path, suffix):
    frame = next(iter(numbered_frames(1)))
    Image.fromarray(frame).save(tmp_path / f"one{suffix}", quality=95)
    clip = LazyFrames(tmp_path / f"one{suffix}")
    assert len(clip) == 1 and np.abs(clip[0].astype(int) - frame).mean() < 4


@pytest.mark.parametrize("suffix", [".webp", ".png", ".gif"])
def test_animated_pictures_are_clips(tmp_path, suffix):
    frames = list(numbered_frames(10))
    pictures = [Image.fromarray(frame) for frame in frames]
    # The fifth one is shown for three times as long: every time has its nearest frame.
    shown = [40] * 4 + [120] + [40] * 5
    path = tmp_path / f"animated{suffix}"
    options = {"lossless": True} if suffix == ".webp" else {}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=shown, **options)
    clip = LazyFrames(path)
    assert clip.fps == 25 and len(clip) == 12
    numbers = [frame_number(clip[index]) for index in (11, 0, 4, 5, 6, 7, 3)]
    np.testing.assert_allclose(numbers, [9, 0, 4, 4, 5, 5, 3], atol=0.5)
    assert len(LazyFrames(path, Fraction(50))) == 24
    if suffix == ".webp":
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(MediaError, match="not a readable picture"):
            LazyFrames(path)
