"""High dynamic range is tone-mapped as stated."""

from fractions import Fraction

import av
import numpy as np
import pytest

from loki_jax.video import read_video
from loki_jax.video.hdr import HLG, PQ, WHITE, compress, linear_pq, scene_hlg, tone_map


def pq_signal(light):
    """Inverse of ST 2084, light in candela a square metre."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    power = (np.asarray(light, float) / 10000) ** m1
    return ((c1 + c2 * power) / (1 + c3 * power)) ** m2


def srgb(light):
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def test_transfer_functions_have_their_published_values():
    # BT.2408: reference white is at 58 % of PQ and at 75 % of HLG.
    np.testing.assert_allclose(linear_pq(pq_signal([1.0, 203.0, 1000.0])) * WHITE, [1, 203, 1000], rtol=1e-4)
    assert abs(pq_signal(203.0) - 0.58) < 0.005
    np.testing.assert_allclose(scene_hlg(np.array([0.0, 0.5, 1.0])), [0, 1 / 12, 1], atol=1e-6)
    display = 1000 / WHITE * scene_hlg(np.array(0.75)) ** 1.2
    assert abs(display - 1) < 0.02


def test_greys_follow_the_curve_and_keep_their_order():
    light = np.array([0.0, 5, 20, 60, 100, 203, 500, 1000, 4000])
    signal = np.round(65535 * pq_signal(light)).astype(np.uint16)
    mapped = tone_map(np.repeat(signal[None, :, None], 3, axis=-1), PQ)[0].astype(float)
    assert (np.ptp(mapped, axis=-1) <= 1).all()  # grey stays grey
    np.testing.assert_allclose(mapped[:, 0], srgb(compress(light / WHITE)), atol=2.0)
    # Up to half of reference white nothing is changed; beyond, light is compressed and never clipped.
    np.testing.assert_allclose(mapped[:4, 0], srgb(light[:4] / WHITE), atol=2.0)
    assert (np.diff(mapped[:7, 0]) > 0).all() and mapped[-1, 0] >= 254


def test_hues_of_bright_colours_are_kept():
    # Orange of BT.709 at 600 candela: from BT.709 to BT.2020 by the inverse matrix.
    to_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
    light = 600 * np.linalg.inv(to_709) @ np.array([1.0, 0.5, 0.1])
    signal = np.round(65535 * pq_signal(light)).astype(np.uint16)
    red, green, blue = tone_map(signal[None, None], PQ)[0, 0] / 255.0
    linear = lambda v: ((v + 0.055) / 1.055) ** 2.4
    np.testing.assert_allclose(
        [linear(green) / linear(red), linear(blue) / linear(red)], [0.5, 0.1], atol=0.02
    )


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_ten_bit_files_are_read(tmp_path, transfer):
    path = tmp_path / "hdr.mkv"
    wide = np.full((48, 64, 3), int(65535 * (0.58 if transfer == PQ else 0.75)), np.uint16)
    wide[:, :32] //= 2
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p10le"
        codec = stream.codec_context
        codec.color_trc, codec.color_primaries, codec.colorspace = transfer, 9, 9
        picture = av.VideoFrame.from_ndarray(wide, format="rgb48le")
        container.mux(stream.encode(picture.reformat(format="yuv444p10le")))
        container.mux(stream.encode(None))
    frame = read_video(path).frames[0].astype(float)
    white = srgb(compress(np.ones(3)))
    np.testing.assert_allclose(frame[10, 60], white, atol=4)
    assert (frame[10, 5] < 0.6 * white).all() and read_video(path).fps == Fraction(25)
