"""What a clip's file holds, found out without decoding it."""

from __future__ import annotations

import dataclasses
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from loki_jax.video.reader import MediaError, VideoReader


@dataclasses.dataclass(frozen=True)
class ClipFacts:
    """Facts about the video track of a file.

    Attributes:
      width, height: of the stored picture, before rotation.
      fps: the exact frame rate; of variable-rate video the rate at which most of it runs.
      frames: number of pictures in the file.
      variable_rate: intervals between pictures differ by more than half a frame.
      codec, pixel_format: FFmpeg's names.
      seconds: from the first to the end of the last picture.
    """

    width: int
    height: int
    fps: Fraction
    frames: int
    variable_rate: bool
    codec: str
    pixel_format: str
    seconds: Fraction

    def as_json(self) -> dict[str, Any]:
        """Everything but the seconds."""
        facts = dataclasses.asdict(self) | {"fps": str(self.fps)}
        del facts["seconds"]
        return facts


def probe_clip(path: str | os.PathLike) -> ClipFacts:
    """Read the headers and the time stamps of a clip.

    Raises:
      MediaError: no such file, empty, not a video, no video track, damaged.
    """
    path = Path(path)
    with VideoReader(path) as reader:
        fps = reader.source_fps
    try:
        with av.open(str(path)) as container:
            covers = av.stream.Disposition.attached_pic
            stream = next(s for s in container.streams.video if not s.disposition & covers)
            codec, base = stream.codec_context, stream.time_base or 1 / fps
            # Decoding order differs from showing order.
            stamps = sorted(
                packet.pts for packet in container.demux(stream) if packet.pts is not None and packet.size
            )
            width, height = codec.width, codec.height
            names = codec.name, str(codec.pix_fmt)
    except (av.error.FFmpegError, OSError, StopIteration) as error:
        raise MediaError(
            f"{path}: damaged, its time stamps cannot be read ({error}). Copy or download it again."
        ) from error
    steps = [(b - a) * base * fps for a, b in zip(stamps, stamps[1:], strict=False)]
    variable = any(abs(step - 1) > Fraction(1, 2) for step in steps)
    seconds = (stamps[-1] - stamps[0]) * base + 1 / fps if stamps else 1 / fps
    return ClipFacts(width, height, fps, max(1, len(stamps)), variable, *names, Fraction(seconds))
