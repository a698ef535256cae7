"""Frames after another video's codec and bit rate."""

from fractions import Fraction

import av
import numpy as np

from loki_jax.video import reencode, write_video

RATE = Fraction(25)


def moving_noise(frames=24, size=128, seed=0):
    """A smooth grey texture that drifts: what coding costs depends on the bit rate."""
    rng = np.random.default_rng(seed)
    texture = rng.normal(size=(size + frames, size + frames, 1))
    spectrum = np.fft.rfft2(texture, axes=(0, 1))
    across, down = np.fft.rfftfreq(size + frames)[None, :, None], np.fft.fftfreq(size + frames)[:, None, None]
    smooth = np.fft.irfft2(spectrum * np.exp(-80 * (across**2 + down**2)), (size + frames,) * 2, axes=(0, 1))
    picture = (127 + 60 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)
    return np.stack([np.repeat(picture[k : k + size, k : k + size], 3, -1) for k in range(frames)])


def recoded(frames, like):
    return np.stack(list(reencode(frames, RATE, like, like.with_name("coded.mkv"))))


def error(frames, coded):
    return np.abs(frames.astype(int) - coded).mean()


def test_a_lower_bit_rate_costs_more(tmp_path):
    frames = moving_noise()
    write_video(tmp_path / "good.mp4", frames, RATE, crf=10)
    write_video(tmp_path / "poor.mp4", frames, RATE, crf=45)
    good, poor = (recoded(frames, tmp_path / f"{name}.mp4") for name in ("good", "poor"))
    assert good.shape == poor.shape == frames.shape
    assert error(frames, good) < 3
    assert error(frames, poor) > 1.5 * error(frames, good)


def test_other_sizes_and_codecs(tmp_path):
    frames = moving_noise(frames=6, size=128)
    with av.open(str(tmp_path / "old.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height = stream.width = 128
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    coded = recoded(frames[:, :96, :64], tmp_path / "old.avi")
    assert coded.shape == (6, 96, 64, 3)
    assert error(frames[:, :96, :64], coded) < 12
