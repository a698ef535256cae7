"""The name of an output decides what is written; it appears whole or not at all."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from loki_jax.video import (
    LazyFrames,
    MediaError,
    check_frames_output,
    is_tagged_synthetic,
    keeps_sound,
    open_output,
    read_image,
    read_video,
    write_video,
)
from tests.video.test_video import NTSC, decode_audio, frame_number, make_driver, numbered_frames, onset


def write(path, frames, fps=Fraction(25), **sound):
    with open_output(path, fps, **sound) as writer:
        for frame in frames:
            writer.write(frame)


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv", "out.webm", "out.gif"])
def test_videos_and_animations(tmp_path, name):
    write(tmp_path / name, numbered_frames(25))
    clip = LazyFrames(tmp_path / name)
    assert len(clip) == 25 and clip.fps == 25
    np.testing.assert_allclose([frame_number(frame) for frame in clip], range(25), atol=1.0)
    assert np.abs(clip[3][2, 2].astype(int) - (220, 20, 20)).max() <= 12
    assert is_tagged_synthetic(tmp_path / name) and keeps_sound(tmp_path / name) == (name != "out.gif")


def test_webm_is_vp9_with_opus_in_time(tmp_path):
    driver = make_driver(tmp_path / "driver.mp4", 60, click=1.0)
    write(tmp_path / "out.webm", numbered_frames(60), NTSC, audio_from=driver)
    with av.open(str(tmp_path / "out.webm")) as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == "vp9"
    assert decode_audio(tmp_path / "out.webm")[3] in ("opus", "libopus")
    assert abs(onset(tmp_path / "out.webm") - 1.0) < 0.03
    assert read_video(tmp_path / "out.webm").fps == NTSC


def test_a_file_of_sound_starts_with_the_first_frame(tmp_path):
    path = tmp_path / "sound.wav"
    rate = 16000
    wave = (0.5 * 32767 * np.sin(np.arange(2 * rate))).astype(np.int16)
    wave[: rate // 2] = 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    write_video(tmp_path / "out.mp4", numbered_frames(50), Fraction(25), audio_from=path)
    assert abs(onset(tmp_path / "out.mp4") - 0.5) < 0.02


def test_a_gif_keeps_its_duration_at_any_rate(tmp_path):
    write(tmp_path / "out.gif", numbered_frames(60), NTSC)
    with Image.open(tmp_path / "out.gif") as picture:
        shown = []
        for index in range(picture.n_frames):
            picture.seek(index)
            shown.append(picture.info["duration"])
        assert picture.info.get("loop", 1) == 0
    assert abs(sum(shown) / 1000 - 60 / float(NTSC)) < 0.03


def test_picture_files(tmp_path):
    frames = list(numbered_frames(12))
    write(tmp_path / "folder", frames)
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "frame_%03d.png", frames)
    write(tmp_path / "one.png", frames[:1])
    for paths in (
        sorted((tmp_path / "folder").iterdir()),
        [tmp_path / "files" / f"frame_{i:03d}.png" for i in range(12)],
        [tmp_path / "one.png"],
    ):
        for path, frame in zip(paths, frames, strict=False):
            np.testing.assert_array_equal(read_image(path), frame)
            assert is_tagged_synthetic(path)
    assert len(list((tmp_path / "folder").iterdir())) == len(list((tmp_path / "files").iterdir())) == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == ["files", "folder", "one.png"]


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif", "out_%05d.png", "out.png", "out"])
def test_what_is_interrupted_leaves_nothing(tmp_path, name):
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), open_output(tmp_path / name, Fraction(25)) as writer:
            writer.write(next(iter(numbered_frames(1))))
            raise error
        assert not list(tmp_path.iterdir())
    with pytest.raises(MediaError, match="no frame to write"), open_output(tmp_path / name, Fraction(25)):
        pass
    assert not list(tmp_path.iterdir())


def test_unusable_names_are_refused_before_any_work(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "driver.gif").touch()
    cases = {
        "clip.avi": "unknown kind",
        "no/clip.webm": "does not exist",
        "no/folder": "does not exist",
        "full": "folder with files in it",
        "a_%d.png": "unknown pattern",
        "a_%05d_%05d.png": "unknown pattern",
        "driver.gif": "is the input",
    }
    for name, message in cases.items():
        with pytest.raises(MediaError, match=message) as error:
            check_frames_output(tmp_path / name, [tmp_path / "driver.gif"])
        assert str(tmp_path / name) in str(error.value)
    check_frames_output(tmp_path / "new")
    with pytest.raises(MediaError, match="one file for several frames"):
        write(tmp_path / "one.png", numbered_frames(2))
    assert not (tmp_path / "one.png").exists()
