"""Video and image files: every property is checked on files that PyAV or Pillow made for the test."""

import errno
import itertools
import os
import struct
import tempfile
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from loki_jax import video
from loki_jax.video import MediaError, VideoWriter, read_image, read_video, write_video

NTSC = Fraction(30000, 1001)
FILES = Path(__file__).parent / "files"


def numbered_frames(count, height=48, width=64):
    """Frames whose grey level tells their index, with a red top-left and a blue bottom-right corner."""
    for index in range(count):
        frame = np.full((height, width, 3), 40 + 3 * index, np.uint8)
        frame[: height // 4, : width // 4] = (220, 20, 20)
        frame[-(height // 4) :, -(width // 4) :] = (20, 20, 220)
        yield frame


def frame_number(frame):
    height, width = frame.shape[:2]
    centre = frame[height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4]
    return (float(centre.mean()) - 40) / 3


def make_driver(
    path, count=50, fps=NTSC, *, audio="aac", rate=44100, click=1.0, rotation=None, stamps=None, flips=None
):
    """A driver clip: numbered frames and a tone that starts `click` seconds in."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"crf": "10"}
        if rotation is not None:
            stream.set_display_rotation(rotation, **(flips or {}))
        stream.codec_context.time_base = Fraction(1, 90000) if stamps else 1 / fps
        if audio:
            sound = container.add_stream(audio, rate=rate)
            sound.layout = "mono"
        for index, image in enumerate(numbered_frames(count)):
            picture = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            picture.time_base = stream.codec_context.time_base
            picture.pts = round(stamps[index] * 90000) if stamps else index
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
        if audio:
            seconds = float(count / fps)
            time = np.arange(int(seconds * rate)) / rate
            wave = np.where(time >= click, 0.5 * np.sin(2 * np.pi * 440 * time), 0)
            resampler = av.AudioResampler(
                format=sound.codec_context.format, layout="mono", rate=rate, frame_size=1024
            )
            tone = av.AudioFrame.from_ndarray(
                (wave * 32767).astype(np.int16)[None], format="s16", layout="mono"
            )
            tone.sample_rate, tone.pts, tone.time_base = rate, 0, Fraction(1, rate)
            for part in [*resampler.resample(tone), *resampler.resample(None)]:
                container.mux(sound.encode(part))
            container.mux(sound.encode(None))
    return path


def decode_audio(path):
    """Mono float samples, with time zero at the first picture, and their rate."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        samples, start = [], None
        for frame in container.decode(stream):
            start = float(frame.pts * frame.time_base) if start is None else start
            samples.append(frame.to_ndarray().astype(np.float64).mean(0))
        wave = np.concatenate(samples)
        return wave / max(np.abs(wave).max(), 1e-9), stream.rate, start, stream.codec_context.name


@pytest.mark.parametrize(
    "fps", [NTSC, Fraction(25), Fraction(24000, 1001), Fraction(12000, 1001), Fraction(10)]
)
def test_frame_rate_and_frames_survive_exactly(tmp_path, fps):
    path = tmp_path / "clip.mp4"
    write_video(path, numbered_frames(40), fps)
    clip = read_video(path)
    assert clip.fps == fps and isinstance(clip.fps, Fraction)
    assert clip.frames.shape == (40, 48, 64, 3) and clip.frames.dtype == np.uint8
    np.testing.assert_allclose([frame_number(f) for f in clip.frames], range(40), atol=0.5)
    assert not clip.has_audio


def test_matroska_millisecond_clock_keeps_the_exact_rate(tmp_path):
    path = tmp_path / "clip.mkv"
    write_video(path, numbered_frames(40), NTSC)
    clip = read_video(path)
    assert clip.fps == NTSC
    np.testing.assert_allclose([frame_number(f) for f in clip.frames], range(40), atol=0.5)


@pytest.mark.parametrize("size", [(48, 64), (720, 64)])  # below and above where players switch matrices
def test_colours_survive(tmp_path, size):
    path = tmp_path / "clip.mp4"
    frame = next(iter(numbered_frames(1, *size)))
    write_video(path, [frame] * 3, Fraction(25))
    found = read_video(path).frames[0].astype(int)
    assert np.abs(found[2, 2] - (220, 20, 20)).max() <= 6
    assert np.abs(found[-3, -3] - (20, 20, 220)).max() <= 6


def test_untagged_sd_video_is_read_as_bt601(tmp_path):
    path = make_driver(tmp_path / "clip.mp4", 4, audio=None)
    corner = read_video(path).frames[0][2, 2].astype(int)
    assert np.abs(corner - (220, 20, 20)).max() <= 6


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_rotation_flag_is_applied(tmp_path, angle):
    path = make_driver(tmp_path / "clip.mp4", 3, audio=None, rotation=angle)
    clip = read_video(path)
    stored = next(iter(numbered_frames(1)))
    expected = np.rot90(stored, angle // 90)  # set_display_rotation counts counter-clockwise
    assert clip.frames.shape[1:] == expected.shape
    # Corner colours tell all four orientations apart.
    for corner in ((2, 2), (2, -3), (-3, 2), (-3, -3)):
        assert np.abs(clip.frames[0][corner].astype(int) - expected[corner]).max() < 20


@pytest.mark.parametrize("angle", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", ["hflip", "vflip"])
def test_mirror_flags_are_applied(tmp_path, angle, flip):
    path = make_driver(tmp_path / "clip.mp4", 3, audio=None, rotation=angle, flips={flip: True})
    turned = np.rot90(next(iter(numbered_frames(1))), angle // 90)
    expected = turned[:, ::-1] if flip == "hflip" else turned[::-1]
    found = read_video(path).frames[0]
    assert found.shape == expected.shape
    for corner in ((2, 2), (2, -3), (-3, 2), (-3, -3)):
        assert np.abs(found[corner].astype(int) - expected[corner]).max() < 20


def test_odd_sizes_are_read_as_they_are_and_written_with_one_more_line(tmp_path):
    path = tmp_path / "odd.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 35, 27, "bgr0"
        image = np.random.default_rng(0).integers(0, 256, (27, 35, 3), dtype=np.uint8)
        container.mux(
            stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="bgr0"))
        )
        container.mux(stream.encode(None))
    np.testing.assert_array_equal(read_video(path).frames[0], image)
    write_video(tmp_path / "even.mp4", read_video(path).frames, Fraction(25))
    assert read_video(tmp_path / "even.mp4").frames.shape[1:] == (28, 36, 3)


def test_ten_bit_video_is_reduced_to_eight(tmp_path):
    path = tmp_path / "ten.mkv"
    frame = next(iter(numbered_frames(1)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p10le"
        wide = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv444p10le")
        container.mux(stream.encode(wide))
        container.mux(stream.encode(None))
    assert np.abs(read_video(path).frames[0].astype(int) - frame).max() <= 3


def test_alpha_is_laid_over_white(tmp_path):
    path = tmp_path / "alpha.mov"
    rgba = np.zeros((48, 64, 4), np.uint8)
    rgba[:, :32] = (200, 0, 0, 255)
    rgba[:, 32:] = (0, 0, 0, 0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgba"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba")))
        container.mux(stream.encode(None))
    frame = read_video(path).frames[0]
    np.testing.assert_array_equal(frame[5, 5], (200, 0, 0))
    np.testing.assert_array_equal(frame[5, 60], (255, 255, 255))


def test_variable_rate_is_put_on_an_even_grid(tmp_path):
    # 30 frames at 50 a second, then 30 at 25: the second half takes twice as long.
    stamps = [Fraction(i, 50) for i in range(30)] + [Fraction(30, 50) + Fraction(i, 25) for i in range(30)]
    path = make_driver(tmp_path / "variable.mp4", 60, Fraction(25), audio=None, stamps=stamps)
    clip = read_video(path)
    shown = np.array([frame_number(f) for f in clip.frames])
    times = np.arange(len(shown)) / float(clip.fps)
    true_times = np.array([float(s) for s in stamps])
    drift = np.abs(true_times[np.clip(np.round(shown).astype(int), 0, 59)] - times)
    # Nearest frame: never further off than half of the longer frame interval.
    assert drift.max() <= 0.02 + 1e-3
    assert abs(len(shown) / float(clip.fps) - 1.8) <= 1.5 / float(clip.fps)


def test_a_pause_does_not_slow_the_motion_down(tmp_path):
    # 2.4 s of motion at 25 frames a second, a pause of 20 s, five more frames: 3 a second on average.
    times = [Fraction(i, 25) for i in range(60)] + [Fraction(112, 5) + Fraction(i, 25) for i in range(5)]
    for suffix in (".mp4", ".mkv"):
        clip = read_video(
            make_driver(tmp_path / f"pause{suffix}", 65, Fraction(25), audio=None, stamps=times)
        )
        assert clip.fps == 25 and len(clip.frames) == 565
        shown = [frame_number(frame) for frame in clip.frames]
        np.testing.assert_allclose(shown[:60], range(60), atol=0.5)
        np.testing.assert_allclose(shown[-5:], range(60, 65), atol=0.5)


def test_an_edit_list_hides_frames_of_a_whole_file(tmp_path):
    whole = FILES / "editlist_cut_0.5s.mp4"  # 75 frames, of which the first 13 are hidden
    assert read_video(whole).frames.shape == (62, 288, 360, 3)
    data = bytearray(whole.read_bytes())
    start = data.index(b"mdat")
    (tmp_path / "cut.mp4").write_bytes(data[: start + (len(data) - start) // 2])
    with pytest.raises(MediaError, match="truncated|damaged|not a readable"):
        read_video(tmp_path / "cut.mp4")


def test_max_frames_stops_early(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, numbered_frames(30), Fraction(25))
    assert len(read_video(path, max_frames=7).frames) == 7
    with pytest.raises(ValueError, match="max_frames"):
        read_video(path, max_frames=0)


@pytest.mark.parametrize(
    ("codec", "suffix", "rate"),
    [("aac", ".mp4", 44100), ("pcm_s16le", ".mkv", 44100), ("libopus", ".mkv", 48000)],
)
def test_audio_stays_in_time(tmp_path, codec, suffix, rate):
    driver = make_driver(tmp_path / f"driver{suffix}", 60, audio=codec, click=1.0, rate=rate)
    clip = read_video(driver)
    assert clip.has_audio
    out = tmp_path / "out.mp4"
    write_video(out, clip.frames, clip.fps, audio_from=driver)
    wave, rate, start, name = decode_audio(out)
    assert name == "aac"
    onset = start + np.argmax(np.abs(wave) > 0.2) / rate
    reference, rate, start, _ = decode_audio(driver)
    true_onset = start + np.argmax(np.abs(reference) > 0.2) / rate
    assert abs(true_onset - 1.0) < 0.03
    assert abs(onset - true_onset) < 0.03  # less than a frame
    assert read_video(out).fps == NTSC and len(read_video(out).frames) == 60


def onset(path):
    wave, rate, start, _ = decode_audio(path)
    return start + np.argmax(np.abs(wave) > 0.2) / rate


@pytest.mark.parametrize(
    ("codec", "suffix", "kept", "first"),
    [
        ("libopus", ".mkv", "aac", 0.3),
        ("pcm_s16le", ".mkv", "aac", 0.3),
        ("libmp3lame", ".mkv", "mp3", 0.3),
        ("libmp3lame", ".flv", "mp3", 0.3),
        ("aac", ".flv", "aac", 0.3),
        ("aac", ".ts", "aac", 0.3),
        ("libopus", ".mp4", "aac", 0),
        ("libopus", ".mkv", "aac", 0.007),
        ("libmp3lame", ".avi", "mp3", 0),  # AVI has no time stamps: every track starts at 0
    ],
)
def test_audio_is_timed_from_the_first_picture(tmp_path, codec, suffix, kept, first):
    rate = 44100 if suffix == ".flv" else 48000
    stamps = None if suffix == ".avi" else [Fraction(first) + Fraction(i, 25) for i in range(50)]
    driver = make_driver(
        tmp_path / f"driver{suffix}", 50, Fraction(25), audio=codec, rate=rate, click=1.0 + first,
        stamps=stamps,
    )  # fmt: skip
    out = tmp_path / "out.mp4"
    clip = read_video(driver)
    write_video(out, clip.frames, clip.fps, audio_from=driver)
    with av.open(str(out)) as container:
        assert container.streams.audio[0].codec_context.codec.canonical_name == kept
    assert abs(onset(out) - 1.0) < 0.04
    assert read_video(out).fps == 25 and len(read_video(out).frames) == 50


def test_the_default_audio_track_is_taken(tmp_path):
    driver = FILES / "twoaudio.mp4"  # a silent track first, then the default one with a beep at 1 s
    clip = read_video(driver)
    write_video(tmp_path / "out.mp4", clip.frames, clip.fps, audio_from=driver)
    assert abs(onset(tmp_path / "out.mp4") - 1.0) < 0.04


@pytest.mark.parametrize(("name", "kept"), [("webm_opus_beep_at_1s.webm", "aac"), ("avi_mp3.avi", "mp3")])
def test_audio_of_files_from_elsewhere(tmp_path, name, kept):
    """A WebM whose video starts after 0; an AVI with MP3, which FFmpeg's decoder calls by another name."""
    out = tmp_path / "out.mp4"
    clip = read_video(FILES / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_video(out, clip.frames, clip.fps, audio_from=FILES / name)
    with av.open(str(out)) as container:
        assert container.streams.audio[0].codec_context.codec.canonical_name == kept
    wave, rate, start, _ = decode_audio(out)
    assert len(wave) / rate + start == pytest.approx(len(clip.frames) / float(clip.fps), abs=0.1)
    if name.endswith(".webm"):
        assert abs(onset(out) - 0.996) < 0.04


def test_audio_of_a_later_part(tmp_path):
    driver = make_driver(tmp_path / "driver.mp4", 60, click=1.2)
    with VideoWriter(
        tmp_path / "out.mp4", NTSC, audio_from=driver, audio_start=Fraction(24) / NTSC
    ) as writer:
        for frame in itertools.islice(numbered_frames(60), 24, None):
            writer.write(frame)
    assert abs(onset(tmp_path / "out.mp4") - (1.2 - 24 / float(NTSC))) < 0.04


def test_damaged_audio_costs_a_warning_and_never_the_video(tmp_path):
    driver = make_driver(tmp_path / "driver.mkv", 60, audio="flac")
    data = bytearray(driver.read_bytes())
    with av.open(str(driver)) as container:
        packets = [p for p in container.demux(container.streams.audio[0]) if p.size]
    for packet in packets[10:14]:
        data[packet.pos + 16 : packet.pos + packet.size] = bytes(packet.size - 16)
    driver.write_bytes(data)
    out = tmp_path / "out.mp4"
    with pytest.warns(UserWarning, match="audio"):
        write_video(out, numbered_frames(60), NTSC, audio_from=driver)
    assert len(read_video(out).frames) == 60 and abs(onset(out) - 1.0) < 0.04


def test_audio_copied_without_loss_is_bit_identical(tmp_path):
    driver = make_driver(tmp_path / "driver.mp4", 40)
    write_video(tmp_path / "out.mp4", numbered_frames(40), NTSC, audio_from=driver)

    def packets(path):
        with av.open(str(path)) as container:
            return [bytes(p) for p in container.demux(container.streams.audio[0]) if p.size]

    source, copied = packets(driver), packets(tmp_path / "out.mp4")
    assert len(copied) >= len(source) - 2
    assert copied == source[: len(copied)] or copied == source[1 : len(copied) + 1]


def test_audio_ends_with_the_frames_and_can_be_left_out(tmp_path):
    driver = make_driver(tmp_path / "driver.mp4", 60)
    write_video(tmp_path / "short.mp4", numbered_frames(20), NTSC, audio_from=driver)
    wave, rate, *_ = decode_audio(tmp_path / "short.mp4")
    assert len(wave) / rate == pytest.approx(20 / float(NTSC), abs=0.05)
    write_video(tmp_path / "silent.mp4", numbered_frames(20), NTSC)
    assert not read_video(tmp_path / "silent.mp4").has_audio
    mute = make_driver(tmp_path / "mute.mp4", 5, audio=None)
    write_video(tmp_path / "from_mute.mp4", numbered_frames(5), NTSC, audio_from=mute)
    assert not read_video(tmp_path / "from_mute.mp4").has_audio


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_outputs_carry_the_synthetic_tag(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    write_video(path, numbered_frames(3), Fraction(25))
    with av.open(str(path)) as container:
        tags = {key.lower(): value for key, value in container.metadata.items()}
    assert tags["comment"] == "synthetic: generated by loki_jax" and tags["synthetic"] == "true"
    assert video.is_tagged_synthetic(path)
    write_video(path, numbered_frames(3), Fraction(25), synthetic=False)
    assert not video.is_tagged_synthetic(path)


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, numbered_frames(3), Fraction(25))
    before = path.read_bytes()

    def broken():
        yield from numbered_frames(2)
        raise RuntimeError("sampler failed")

    with pytest.raises(RuntimeError, match="sampler failed"):
        write_video(path, broken(), Fraction(25))
    assert path.read_bytes() == before
    with pytest.raises(MediaError, match="no frame to write"):
        write_video(tmp_path / "none.mp4", [], Fraction(25))
    with pytest.raises(ValueError, match="the first had"):
        write_video(tmp_path / "sizes.mp4", [*numbered_frames(1), *numbered_frames(1, 32, 32)], Fraction(25))
    with pytest.raises(MediaError, match="no such video"):
        write_video(tmp_path / "lost.mp4", numbered_frames(2), Fraction(25), audio_from=tmp_path / "gone.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_unusable_output_names_are_refused(tmp_path):
    with pytest.raises(MediaError, match=r"\.mp4"):
        write_video(tmp_path / "clip.avi", numbered_frames(1), Fraction(25))
    with pytest.raises(MediaError, match="does not exist"):
        write_video(tmp_path / "no" / "clip.mp4", numbered_frames(1), Fraction(25))


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(MediaError, match="cannot be written .*No space left"):
        with video.VideoWriter(tmp_path / "clip.mp4", Fraction(25)) as writer:
            for frame in numbered_frames(3):
                writer.write(frame)
            monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(MediaError, match="cannot be written .*No space left"):
        video.check_output(tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [64, 256])
def test_equal_frames_make_equal_files(tmp_path, width):
    noise = np.random.default_rng(0).integers(0, 256, (12, 8, width // 8, 3), dtype=np.uint8)
    frames = np.stack([Image.fromarray(f).resize((width, 64), Image.Resampling.BICUBIC) for f in noise])
    contents = set()
    for index in range(6):
        write_video(tmp_path / f"{index}.mp4", frames, Fraction(25))
        contents.add((tmp_path / f"{index}.mp4").read_bytes())
    assert len(contents) == 1


def test_unreadable_videos_give_one_clear_error(tmp_path):
    whole = make_driver(tmp_path / "whole.mkv", 50, audio=None)
    data = whole.read_bytes()
    cases = {
        "missing.mp4": (None, "no such video"),
        "empty.mp4": (b"", "empty"),
        "text.mp4": (b"this is not a video\n" * 100, "not a readable video"),
        "cut.mkv": (data[: len(data) // 2], "truncated|damaged"),
    }
    mp4 = make_driver(tmp_path / "whole.mp4", 50, audio=None).read_bytes()
    cases["cut.mp4"] = (mp4[: len(mp4) // 2], "truncated|not a readable")
    for name, (content, message) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(MediaError, match=message) as error:
            read_video(path)
        assert str(path) in str(error.value)
    with pytest.raises(MediaError, match="no such video"):
        read_video(tmp_path)


def test_truncated_streamable_mp4_is_noticed(tmp_path):
    # faststart puts the index first, so that the file still opens.
    write_video(tmp_path / "whole.mp4", numbered_frames(60), Fraction(25))
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(len(data) * 0.7)])
    with pytest.raises(MediaError, match="truncated|damaged"):
        read_video(tmp_path / "cut.mp4")


def test_audio_only_file_is_refused(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        stream.layout = "mono"
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        tone.sample_rate = 44100
        container.mux(stream.encode(tone))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match="no video track, only audio"):
        read_video(path)


def test_resampling_is_exact_and_nearest_in_time():
    np.testing.assert_array_equal(video.resample_indices(4, Fraction(25), Fraction(25)), range(4))
    np.testing.assert_array_equal(
        video.resample_indices(4, Fraction(25), Fraction(50)), [0, 1, 1, 2, 2, 3, 3, 3]
    )
    for fps in (NTSC, Fraction(30), Fraction(50), Fraction(24000, 1001), Fraction(12)):
        count = 301
        indices = video.resample_indices(count, fps, Fraction(25))
        assert abs(len(indices) / 25 - count / float(fps)) <= 1 / 25
        error = np.abs(indices / float(fps) - np.arange(len(indices)) / 25)
        assert error[:-2].max() <= 0.5 / float(fps) + 1e-9
    # An hour of 29.97: rounding must not drift.
    hour = video.resample_indices(107892, NTSC, Fraction(25))
    assert abs(hour[-2] / float(NTSC) - (len(hour) - 2) / 25) <= 0.5 / float(NTSC) + 1e-9
    clip = video.Video(
        np.arange(60, dtype=np.uint8)[:, None, None, None] + np.zeros((60, 2, 2, 3), np.uint8),
        Fraction(50),
        False,
        Path("x"),
    )
    half = video.resample_to_fps(clip, Fraction(25))
    assert half.fps == 25
    np.testing.assert_array_equal(half.frames[:, 0, 0, 0], np.arange(0, 60, 2))


def test_images_come_upright_and_as_rgb(tmp_path):
    base = next(iter(numbered_frames(1)))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    Image.fromarray(base).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(base, -1))

    Image.fromarray(base[..., 0]).save(tmp_path / "grey.png")
    grey = read_image(tmp_path / "grey.png")
    np.testing.assert_array_equal(grey, np.repeat(base[..., :1], 3, axis=-1))

    deep = (np.arange(48 * 64, dtype=np.uint16) * 21).reshape(48, 64)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png")[..., 1], np.round(deep * (255 / 65535)))

    rgba = np.dstack([base, np.full(base.shape[:2], 128, np.uint8)])
    rgba[:10, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    image = read_image(tmp_path / "alpha.png")
    assert (image[:10] == 255).all()
    np.testing.assert_allclose(image[20, 20], base[20, 20] * (128 / 255) + 255 * (127 / 255), atol=1)

    palette = Image.fromarray(base).convert("P")
    palette.save(tmp_path / "palette.gif")
    np.testing.assert_array_equal(read_image(tmp_path / "palette.gif"), np.asarray(palette.convert("RGB")))
    Image.fromarray(base).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "print.jpg").astype(int) - base).mean() < 4


def wide_gamut_profile():
    """An ICC profile (version 2, matrix and curves) with the primaries of Display P3 and a gamma of 2.2."""
    fixed = lambda *values: struct.pack(f">{len(values)}i", *(round(65536 * v) for v in values))
    xyz = lambda *values: b"XYZ \0\0\0\0" + fixed(*values)
    # Adapted to D50, as ICC wants them.
    columns = {b"rXYZ": (0.51512, 0.24120, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189),
               b"bXYZ": (0.15710, 0.06657, 0.78407), b"wtpt": (0.95045, 1.0, 1.08905)}  # fmt: skip
    tags = {name: xyz(*values) for name, values in columns.items()}
    tags |= {name: b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(2.2 * 256), 0)
             for name in (b"rTRC", b"gTRC", b"bTRC")}  # fmt: skip
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(79)
    tags[b"cprt"] = b"text\0\0\0\0none\0\0\0\0"
    offset, table, data = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", offset + len(data), len(content))
        data += content
    header = struct.pack(
        ">I4sI4s4s4s12s4s",
        offset + len(data),
        b"none",
        0x02400000,
        b"mntr",
        b"RGB ",
        b"XYZ ",
        bytes(12),
        b"acsp",
    )
    header = header.ljust(68, b"\0") + fixed(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + table + data


def test_colour_profiles_are_converted(tmp_path):
    # Display P3's (200, 100, 60) is more saturated in sRGB. Expected: P3 matrix to XYZ, inverse sRGB matrix
    # (IEC 61966-2-1), sRGB's transfer function; worked out below in float64.
    linear = (np.array([200, 100, 60]) / 255) ** 2.2
    p3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
    srgb_d50 = np.array(
        [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
    )
    light = np.linalg.solve(srgb_d50, p3 @ linear)
    expected = 255 * np.where(light > 0.0031308, 1.055 * np.abs(light) ** (1 / 2.4) - 0.055, 12.92 * light)
    colours = Image.new("RGB", (8, 8), (200, 100, 60))
    for name, picture in (("p3.png", colours), ("p3.webp", colours), ("alpha.png", colours.convert("RGBA"))):
        options = {"lossless": True} if name.endswith("webp") else {}
        picture.save(tmp_path / name, icc_profile=wide_gamut_profile(), **options)
        np.testing.assert_allclose(read_image(tmp_path / name)[3, 3], expected, atol=2)
    assert expected[0] > 206  # far from the stored number
    # sRGB itself, and a profile that cannot be read, leave the numbers alone.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"not a profile"):
        colours.save(tmp_path / "same.png", icc_profile=profile)
        np.testing.assert_array_equal(read_image(tmp_path / "same.png")[3, 3], (200, 100, 60))


def test_float_tiff_and_animations(tmp_path):
    ramp = np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(48, 64)
    for scale in (1, 255, 65535):
        Image.fromarray(ramp * scale).save(tmp_path / "float.tiff")
        grey = read_image(tmp_path / "float.tiff")[..., 0]
        np.testing.assert_allclose(grey, 255 * ramp, atol=0.51)
    steps = [Image.new("RGB", (64, 48), (level,) * 3) for level in (40, 120, 200)]
    for name in ("moving.webp", "moving.gif", "moving.png"):
        steps[0].save(tmp_path / name, save_all=True, append_images=steps[1:], duration=40)
        assert np.abs(read_image(tmp_path / name).astype(int) - 40).max() <= 2
    assert [int(frame[0, 0, 0]) for frame in read_video(tmp_path / "moving.gif").frames] == [40, 120, 200]
    try:
        frames = read_video(tmp_path / "moving.webp").frames
    except MediaError as error:  # FFmpeg before version 8 cannot decode it
        assert "WebP animation" in str(error)
    else:
        np.testing.assert_allclose([frame[0, 0, 0] for frame in frames], [40, 120, 200], atol=2)


def test_unreadable_images_give_one_clear_error(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        tmp_path / "whole.png"
    )
    data = (tmp_path / "whole.png").read_bytes()
    for name, content, message in (
        ("missing.png", None, "no such image"),
        ("empty.png", b"", "empty"),
        ("text.png", b"hello", "not a readable picture"),
        ("cut.png", data[: len(data) // 2], "truncated"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(MediaError, match=message) as error:
            read_image(path)
        assert str(path) in str(error.value)


def test_pixels_become_square_and_parts_are_read_at_any_rate(tmp_path):
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=50)
        stream.width, stream.height, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for index in range(100):
            image = np.full((48, 32, 3), 2 * index + 20, np.uint8)
            image[:, 16:] = 240
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))

    def shown(**part):
        with video.VideoReader(path, **part) as reader:
            frames = list(reader)
        assert all(frame.shape == (48, 64, 3) for frame in frames)
        return reader.fps, [round((float(frame[:, :16].mean()) - 20) / 2) for frame in frames], frames

    fps, numbers, frames = shown()
    assert fps == 50 and np.abs(np.subtract(numbers, range(100))).max() <= 1
    assert frames[0][:, 40:].min() > 220 and frames[0][:, :24].max() < 60  # twice as wide, not cut
    fps, numbers, _ = shown(fps=Fraction(25), start=Fraction(1, 2), stop=Fraction(3, 2))
    assert fps == 25 and len(numbers) == 25 and np.abs(np.subtract(numbers, range(25, 75, 2))).max() <= 1
    _, numbers, _ = shown(fps=Fraction(100), stop=Fraction(1, 10))
    assert len(numbers) == 10 and numbers[-1] - numbers[0] in (3, 4, 5)
    assert shown(start=Fraction(5))[1] == []
    with pytest.raises(ValueError, match="0 <= start < stop"):
        video.VideoReader(path, start=Fraction(2), stop=Fraction(1))
