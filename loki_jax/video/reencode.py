"""What coding alone does to frames: they pass through the codec and bit rate of another video."""

from __future__ import annotations

import os
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8

from loki_jax.video.reader import read_video
from loki_jax.video.writer import VideoWriter


def reencode(
    frames: UInt8[np.ndarray, "N H W 3"], fps: Fraction, like: str | os.PathLike
) -> UInt8[np.ndarray, "N H2 W2 3"]:
    """The frames as they come out of the codec of the video `like` at its bits per pixel.

    Codecs that FFmpeg reads but cannot write are replaced by H.264. Odd sides become even.
    """
    with av.open(str(like)) as source:
        stream = source.streams.video[0]
        codec = stream.codec_context.codec.canonical_name
        seconds = float((source.duration or 0) / av.time_base) or len(frames) / float(fps)
        rate = stream.bit_rate or 8 * os.path.getsize(like) / seconds
        pixels = stream.height * stream.width * float(stream.average_rate or fps)
    try:
        av.Codec(codec, "w")
    except ValueError:
        codec = "h264"
    height, width = frames.shape[1:3]
    bit_rate = max(1, round(rate / pixels * height * width * float(fps)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coded.mkv"
        with VideoWriter(path, fps, codec=codec, bit_rate=bit_rate) as writer:
            for frame in frames:
                writer.write(frame)
        return read_video(path).frames
