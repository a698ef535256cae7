"""Video files in: exact frame rates, and pictures as a person would see them.

Frames are (H, W, 3) uint8 RGB: rotation flags are applied, pixels are made square, alpha is laid over white,
wider bit depths are reduced to 8 bits, and high dynamic range is tone-mapped (`loki_jax.video.hdr`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from numbers import Rational
from pathlib import Path
from typing import TypeVar

import av
import numpy as np
from av.sidedata.sidedata import SideData
from av.video.reformatter import Colorspace, VideoReformatter
from jaxtyping import Int, UInt8

from loki_jax.video import hdr
from loki_jax.video.files import MediaError, check_file, over_white

Item = TypeVar("Item")

_STANDARD_RATES = tuple(
    Fraction(*rate)
    for rate in ((24000, 1001), (24, 1), (25, 1), (30000, 1001), (30, 1), (50, 1), (60000, 1001), (60, 1))
)

# FFmpeg's AVColorSpace numbers, as frames carry them, and swscale's names for the same matrices.
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}


@dataclasses.dataclass(frozen=True)
class Video:
    """A decoded video.

    Attributes:
      frames: N frames, evenly spaced in time.
      fps: exact frame rate.
      has_audio: the file has an audio track (give its path to `write_video` as `audio_from`).
      path: the file.
    """

    frames: UInt8[np.ndarray, "N H W 3"]
    fps: Fraction
    has_audio: bool
    path: Path


def seconds(count: int | None, time_base: Rational | None) -> Fraction | None:
    """A time stamp or duration of FFmpeg in seconds; None where the file states none.

    Newer PyAV has a type of its own for rational numbers.
    """
    return None if count is None or time_base is None else count * Fraction(time_base)


def _frame_rate(stream: av.VideoStream, path: Path) -> Fraction:
    stated = stream.average_rate or stream.guessed_rate or stream.base_rate
    if not stated or stated <= 0:
        raise MediaError(
            f"{path}: states no frame rate. Write it again with one (`ffmpeg -i IN -r 25 OUT.mp4`)."
        )
    rate = Fraction(stated)
    if stream.base_rate and abs(rate / stream.base_rate - 1) > Fraction(1, 20):
        return _nominal_rate(stream, path) or rate
    # Containers with coarse time stamps report averages such as 5994000/200001: take the standard
    # rate if the two differ by less than half a frame over the whole clip.
    nearest = _standard_rate(rate)
    frames_off = abs(nearest / rate - 1) * (stream.frames or 1000)
    return nearest if rate.denominator > 1001 and frames_off < Fraction(1, 2) else rate


def _standard_rate(rate: Fraction) -> Fraction:
    return min(_STANDARD_RATES, key=lambda standard: abs(standard - rate))


def _nominal_rate(stream: av.VideoStream, path: Path) -> Fraction | None:
    """The rate at which most of a variable-rate video runs: at its mean rate, a pause slows motion down."""
    with av.open(str(path)) as container:
        packets = container.demux(container.streams[stream.index])
        stamps = sorted(p.pts for p in packets if p.pts is not None and p.size)
    interval = np.median(np.diff(stamps)) if len(stamps) > 2 else 0
    if interval <= 0 or stream.time_base is None:
        return None
    rate = 1 / (Fraction(float(interval)) * stream.time_base)
    nearest = _standard_rate(rate)
    return nearest if abs(nearest / rate - 1) < Fraction(1, 50) else rate.limit_denominator(1001)


def _quarter_turns(frame: av.VideoFrame) -> tuple[int, bool]:
    """Counter-clockwise quarter turns, then whether to mirror left-right, that show `frame` upright."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV gives up on side data younger than itself (EXIF); the angle it knows
        return round(frame.rotation / 90) % 4, False
    if not isinstance(data, SideData):
        return 0, False
    matrix = np.frombuffer(bytes(data), np.int32)[:9].reshape(3, 3)[:2, :2].astype(np.float64)
    # Row-vector convention: a stored pixel (x, y), y down, is shown at (x, y) @ matrix.
    mirrored = np.linalg.det(matrix) < 0
    if mirrored:
        matrix = matrix @ np.diag([-1.0, 1.0])
    # np.rot90 by one turn takes (x, y) to (y, -x): the x axis goes to -y, which is up on screen.
    turns = round(np.arctan2(-matrix[0, 1], matrix[0, 0]) / (np.pi / 2)) % 4
    return int(turns), bool(mirrored)


def _square_width(stream: av.VideoStream) -> int | None:
    """Width in square pixels of a stream whose pixels are not square; None if they are or unstated."""
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    if not aspect or aspect <= 0 or aspect == 1:
        return None
    return max(1, round(stream.codec_context.width * Fraction(aspect)))


def evenly(frames: Iterable[tuple[Fraction | None, Item]], rate: Fraction, fps: Fraction) -> Iterator[Item]:
    """Put frames with time stamps in seconds on the grid k / fps, each grid point its nearest frame.

    `rate` is that of the frames: what frames without time stamps are spaced by, and how long the last
    one is shown.

    Constant-rate video passes unchanged; variable-rate video (phones, screen recordings) gets frames
    repeated or dropped, so that it stays in time with its audio. Memory: two frames.
    """
    first: Fraction | None = None
    previous: Item | None = None
    previous_at = Fraction(0)
    grid = 0
    for index, (time, frame) in enumerate(frames):
        if time is None:
            at = Fraction(index) * fps / rate  # no time stamps: frames are taken as evenly spaced
        else:
            first = time if first is None else first
            at = (time - first) * fps
        if previous is not None:
            # Grid points closer to the previous frame than to this one; a tie goes to this one. The
            # bound is half a frame and a bit: time stamps of coarse clocks jitter.
            while grid - previous_at < at - grid:
                yield previous
                grid += 1
        previous, previous_at = frame, at
    if previous is not None:
        # The last frame is shown for one of its intervals, and at least once.
        while grid < previous_at + fps / rate - Fraction(1, 2) or grid == 0:
            yield previous
            grid += 1


class VideoReader:
    """An open video: `fps`, `has_audio`, and iteration over frames (H, W, 3) uint8, once, in order.

    Use as a context manager. Memory does not grow with the length.

    Args:
      path: the file.
      fps: rate to read at, each time its nearest frame; None: the file's own, which is `source_fps`; of
        variable-rate video the rate at which most of it runs.
      start, stop: only the frames shown in [start, stop), in seconds from the first one; stop None: to
        the end. A stop beyond the end is no error.

    Raises:
      MediaError: on opening (no such file, empty, not a video, no video track) or
        while iterating (damaged or truncated data).
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: Fraction | None = None,
        *,
        start: Fraction = Fraction(0),
        stop: Fraction | None = None,
    ):
        if (fps is not None and fps <= 0) or start < 0 or (stop is not None and stop <= start):
            raise ValueError(f"fps {fps}, start {start}, stop {stop}: expected fps > 0 and 0 <= start < stop")
        self.path = Path(path)
        self._start, self._stop = Fraction(start), stop
        check_file(self.path, "video")
        try:
            self._container = av.open(str(self.path))
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{self.path}: not a readable video, or truncated ({error}). "
                "Copy it again, or convert it (`ffmpeg -i IN -c:v libx264 OUT.mp4`)."
            ) from error
        try:
            covers = av.stream.Disposition.attached_pic
            streams = [s for s in self._container.streams.video if not s.disposition & covers]
            if not streams:
                raise MediaError(
                    f"{self.path}: has no video track, only audio. Give a file that holds pictures."
                )
            self._stream = streams[0]
            if self._stream.codec_context is None:
                raise MediaError(
                    f"{self.path}: damaged, or of a kind that cannot be decoded: its video track names no "
                    "known codec. Copy it again, or convert it (`ffmpeg -i IN -c:v libx264 OUT.mp4`)."
                )
            self._stream.thread_type = "AUTO"
            self._width = _square_width(self._stream)
            self._turns: tuple[int, bool] | None = None  # known with the first picture
            self._reformatter = VideoReformatter()
            self.source_fps = _frame_rate(self._stream, self.path)
            self.fps = self.source_fps if fps is None else Fraction(fps)
            self.has_audio = len(self._container.streams.audio) > 0
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _missing_frames(self, count: int, end: Fraction | None) -> int:
        """How many frames the headers promise beyond the `count` decoded ones; `end` is when these end."""
        if self._stream.frames:
            if self._stream.frames > count and "mov" in self._container.format.name:
                # An edit list may hide frames that are there.
                with av.open(str(self.path), options={"ignore_editlist": "1"}) as whole:
                    packets = whole.demux(whole.streams[self._stream.index])
                    count = max(count, sum(packet.size > 0 for packet in packets))
            return self._stream.frames - count
        # Only a duration is known. Variable-rate video has fewer frames than that at its nominal rate, so
        # times are compared; some containers count from zero and some from the first frame.
        duration = seconds(self._stream.duration, self._stream.time_base)
        if duration is None and not self.has_audio:
            duration = seconds(self._container.duration, Fraction(1, av.time_base))
        if duration is None:
            return 0
        return int((duration - (count / self.source_fps if end is None else end)) * self.source_fps)

    def _decoded(self) -> Iterator[tuple[Fraction | None, av.VideoFrame]]:
        count = 0
        part = self._start > 0 or self._stop is not None
        origin = seconds(self._stream.start_time, self._stream.time_base) or Fraction(0)
        end: Fraction | None = None
        try:
            if self._start > 0:
                # To the key frame before it; the frames between are decoded and dropped.
                target = int((origin + self._start) / (self._stream.time_base or 1))
                self._container.seek(max(target, 0), stream=self._stream)
            half = 1 / (2 * self.source_fps)
            for frame in self._container.decode(self._stream):
                count += 1
                time = seconds(frame.pts, frame.time_base)
                at = Fraction(count - 1, 1) / self.source_fps if time is None else time - origin
                if part and at + half <= self._start:
                    continue
                if self._stop is not None and at + half > self._stop:
                    break
                if time is not None:
                    shown = seconds(frame.duration, frame.time_base) or Fraction(0)
                    end = max(end or Fraction(0), time + max(shown, 1 / self.source_fps))
                yield time, frame
        except (av.error.FFmpegError, OSError) as error:
            if count == 0 and self._container.format.name == "webp_pipe":
                raise MediaError(
                    f"{self.path}: a WebP animation cannot be decoded. Convert it to MP4 or GIF first."
                ) from error
            raise MediaError(
                f"{self.path}: damaged after {count} frames ({error}). Copy or download it again."
            ) from error
        if count == 0:
            raise MediaError(
                f"{self.path}: its video track holds no frames. Copy it again or give another file."
            )
        if part:
            return
        missing = self._missing_frames(count, end)
        if missing > max(2, count // 20):
            raise MediaError(
                f"{self.path}: truncated: {count} of {count + missing} frames can be read. "
                "Copy or download it again."
            )

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        return (self.to_rgb(picture) for _, picture in self.numbered_pictures())

    def numbered_pictures(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """The pictures that iteration converts, each with its number among those of the file."""
        decoded = ((time, (number, frame)) for number, (time, frame) in enumerate(self._decoded()))
        size = None
        for index, (number, frame) in enumerate(evenly(decoded, self.source_fps, self.fps)):
            size = size or (frame.width, frame.height)
            if size != (frame.width, frame.height):
                raise MediaError(
                    f"{self.path}: changes size from {size[0]}x{size[1]} to {frame.width}x{frame.height} at "
                    f"frame {index}. Convert it to one size first."
                )
            yield number, frame

    def decode_from(self, stamp: int | None) -> Iterator[tuple[int, av.VideoFrame]]:
        """Stored pictures, counted from 0: from the key frame before a time stamp, or from the start."""
        if stamp is not None:
            with contextlib.suppress(av.error.FFmpegError):  # some containers have no index
                self._container.seek(stamp, stream=self._stream)
        yield from enumerate(self._container.decode(self._stream))

    def to_rgb(self, picture: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
        """A picture of this file as a person would see it."""
        if self._turns is None:
            # Once a file: a frame that was asked for its side data refers to itself, and its memory is freed
            # no sooner than the garbage collector comes by.
            self._turns = _quarter_turns(picture)
        # Untagged video: BT.709 from 720 lines on, BT.601 below, as players assume.
        untagged = Colorspace.ITU709 if picture.height >= 720 else Colorspace.ITU601
        matrix = _MATRICES.get(int(picture.colorspace), untagged)
        has_alpha = any(component.is_alpha for component in picture.format.components)
        wide = int(picture.color_trc) in (hdr.PQ, hdr.HLG)
        kind = "rgb48le" if wide else "rgba" if has_alpha else "rgb24"
        # One converter a file: one made for each frame starts threads for each frame.
        image = self._reformatter.reformat(
            picture, self._width, picture.height, kind, src_colorspace=matrix
        ).to_ndarray()
        if wide:
            image = hdr.tone_map(image, int(picture.color_trc))
        elif has_alpha:
            image = over_white(image)
        turns, mirrored = self._turns
        image = np.rot90(image, turns)
        return np.ascontiguousarray(image[:, ::-1] if mirrored else image)


def first_picture_time(path: str | os.PathLike) -> Fraction:
    """When the first picture is shown, in seconds of the file's own clock; 0 where pictures have no times.

    Raises:
      MediaError: as `VideoReader`.
    """
    with VideoReader(path) as reader:
        time, _ = next(reader._decoded())
    return time or Fraction(0)


def read_video(path: str | os.PathLike, max_frames: int | None = None) -> Video:
    """Decode a video, or its first `max_frames` frames, into memory.

    Raises:
      MediaError: no such file, empty, truncated, damaged, or without pictures.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames is {max_frames}, expected at least 1")
    with VideoReader(path) as reader:
        frames = []
        for frame in reader:
            frames.append(frame)
            if len(frames) == max_frames:
                break
        return Video(np.stack(frames), reader.fps, reader.has_audio, reader.path)


def resample_indices(count: int, fps: Fraction, target: Fraction) -> Int[np.ndarray, " M"]:
    """Which of `count` frames at `fps` to show at each frame of rate `target`: the nearest in time.

    Exact rational arithmetic; the duration is kept to within one target frame, at least one frame.
    """
    if count < 1 or fps <= 0 or target <= 0:
        raise ValueError(f"cannot resample {count} frames from {fps} to {target} frames a second")
    ratio = Fraction(fps) / Fraction(target)
    length = max(1, round(count / ratio))
    # round half up, not to even: equal steps where the ratio is 1/2
    indices = [int(k * ratio + Fraction(1, 2)) for k in range(length)]
    return np.minimum(np.asarray(indices, np.int64), count - 1)


def resample_to_fps(video: Video, fps: Fraction) -> Video:
    """`video` at another frame rate: frames repeated or left out, never blended."""
    indices = resample_indices(len(video.frames), video.fps, fps)
    return dataclasses.replace(video, frames=video.frames[indices], fps=Fraction(fps))
