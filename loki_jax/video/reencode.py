"""What coding alone does to frames: they pass through the codec and bit rate of another video."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np
from jaxtyping import UInt8

from loki_jax.video.frames import LazyFrames
from loki_jax.video.writer import VideoWriter


def reencode(
    frames: Iterable[UInt8[np.ndarray, "H W 3"]],
    fps: Fraction,
    like: str | os.PathLike,
    path: str | os.PathLike,
) -> LazyFrames:
    """The frames as they come out of the codec of the video `like` at its bits per pixel.

    They are written to the Matroska file `path`, which must stay while its frames are used. Codecs that
    FFmpeg reads but cannot write are replaced by H.264. Odd sides become even.
    """
    coded = LazyFrames(like)
    with av.open(str(like)) as source:
        stream = source.streams.video[0]
        codec = stream.codec_context.codec.canonical_name
        seconds = float((source.duration or 0) / av.time_base) or len(coded) / float(coded.fps)
        rate = stream.bit_rate or 8 * os.path.getsize(like) / seconds
        pixels = stream.height * stream.width * float(stream.average_rate or fps)
    try:
        av.Codec(codec, "w")
    except ValueError:
        codec = "h264"
    frames = iter(frames)
    first = next(frames)
    bit_rate = max(1, round(rate / pixels * first.shape[0] * first.shape[1] * float(fps)))
    with VideoWriter(path, fps, codec=codec, bit_rate=bit_rate) as writer:
        for frame in itertools.chain([first], frames):
            writer.write(frame)
    return LazyFrames(path)
