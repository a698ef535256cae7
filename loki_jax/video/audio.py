"""The audio of a driving clip, or of a file of sound, in the videos made from it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from fractions import Fraction
from numbers import Rational
from pathlib import Path

import av
from av.audio.stream import AudioStream
from av.filter import Graph

from loki_jax.video.files import InputWarning, MediaError, check_file
from loki_jax.video.reader import first_picture_time, seconds

# Audio codecs that a file may hold as they are; others are encoded again as AAC, in WebM as Opus.
_COPIED = {"webm": ("opus", "vorbis"), "mp4": ("aac", "mp3", "ac3", "alac")}
_ENCODER = {"webm": "libopus", "mp4": "aac"}

_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)


def has_audio(path: Path) -> bool:
    """Whether a file of video or sound has a track of sound.

    Raises:
      MediaError: no such file, empty, or neither.
    """
    check_file(path, "video or audio")
    try:
        with av.open(str(path)) as container:
            return len(container.streams.audio) > 0
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{path}: not a readable file of sound ({error}). Copy it again.") from error


def _time_zero(path: Path) -> Fraction:
    """When the first picture of a file is shown, in seconds of its clock; of sound alone its beginning."""
    covers = av.stream.Disposition.attached_pic
    with av.open(str(path)) as container:
        pictures = [video for video in container.streams.video if not video.disposition & covers]
    return first_picture_time(path) if pictures else Fraction(0)


class AudioTrack:
    """The audio of another file, muxed into `output` in step with its video.

    It is the source's default track. Time zero is `start` seconds after the first picture of the source, or
    after the beginning of a file of sound. Packets are copied where the output may hold the codec and encoded
    again as AAC, or Opus in WebM, otherwise; gaps become silence. Damage beyond the start costs the damaged
    sound, with a warning, and never the video.

    Raises:
      MediaError: the source has no audio track that can be read.
    """

    def __init__(self, source: Path, output: av.container.OutputContainer, start: Fraction = Fraction(0)):
        self._output, self._source = output, source
        self._start = _time_zero(source) + start
        kind = "webm" if "webm" in output.format.name else "mp4"
        try:
            self._container = av.open(str(source))
            stream = self._container.streams.best("audio")
            if not isinstance(stream, AudioStream) or stream.codec_context is None:
                raise ValueError("its codec is unknown")
            self._stream = stream
            if stream.codec_context.codec.canonical_name in _COPIED[kind]:
                self._out = output.add_stream_from_template(stream)
                self._packets = self._copied()
            else:
                kept = kind == "mp4" and stream.rate in _AAC_RATES
                out = output.add_stream(_ENCODER[kind], rate=stream.rate if kept else 48000)
                assert isinstance(out, AudioStream)
                self._out = out
                self._out.layout = "mono" if stream.layout.nb_channels == 1 else "stereo"
                self._packets = self._encoded()
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{source}: its audio cannot be read ({error}). Write without audio (`--no-audio`)."
            ) from error
        self._next: av.Packet | None = None

    def _copied(self) -> Iterator[av.Packet]:
        shift = _ticks(self._start, self._stream.time_base)
        for packet in self._container.demux(self._stream):
            packet.pts = packet.dts if packet.pts is None else packet.pts
            if packet.pts is None or packet.pts + (packet.duration or 0) <= shift:
                continue
            packet.dts = packet.pts = packet.pts - shift
            packet.stream = self._out
            yield packet

    def _decoded(self) -> Iterator[av.AudioFrame]:
        damaged = 0
        for packet in self._container.demux(self._stream):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                damaged += 1
        if damaged:
            warnings.warn(
                f"{self._source}: {damaged} damaged pieces of its audio are silent.",
                InputWarning,
                stacklevel=2,
            )

    def _encoded(self) -> Iterator[av.Packet]:
        graph = None
        for frame in self._decoded():
            if frame.pts is not None:
                frame.pts -= _ticks(self._start, frame.time_base)
            if graph is None:
                graph = self._resampler(frame)
            graph.push(frame)
            yield from self._drained(graph)
        if graph is not None:
            graph.push(None)
            yield from self._drained(graph)
            yield from self._out.encode(None)

    def _drained(self, graph: Graph) -> Iterator[av.Packet]:
        """What the filter has ready, encoded."""
        with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
            while isinstance(frame := graph.pull(), av.AudioFrame):
                yield from self._out.encode(frame)

    def _resampler(self, frame: av.AudioFrame) -> Graph:
        """A filter to the encoder's format that starts at time 0 and follows the time stamps."""
        codec, graph = self._out.codec_context, Graph()
        buffer = graph.add_abuffer(
            sample_rate=frame.sample_rate,
            format=frame.format.name,
            layout=frame.layout.name,
            time_base=frame.time_base,
        )
        # Silence for gaps of more than 20 ms, and before the first sample; what is before time 0 is cut.
        chain = [
            buffer,
            graph.add("aresample", f"{codec.sample_rate}:async=1:first_pts=0:min_hard_comp=0.02"),
            graph.add("aformat", f"sample_fmts={codec.format.name}:channel_layouts={codec.layout.name}"),
            graph.add("asetnsamples", f"n={codec.frame_size or 1024}:p=0"),
            graph.add("abuffersink"),
        ]
        graph.link_nodes(*chain).configure()
        return graph

    def advance(self, until: Fraction) -> None:
        """Mux the packets that start before `until` seconds."""
        try:
            while True:
                self._next = self._next or next(self._packets, None)
                if self._next is None or (seconds(self._next.pts, self._next.time_base) or 0) >= until:
                    return
                self._output.mux(self._next)
                self._next = None
        except (av.error.FFmpegError, OSError) as error:
            warnings.warn(
                f"{self._source}: its audio is damaged and ends early ({error}).", InputWarning, stacklevel=2
            )
            self._packets, self._next = iter(()), None

    def close(self) -> None:
        """Close the source."""
        self._container.close()


def _ticks(time: Fraction, time_base: Rational | None) -> int:
    """A time in seconds in units of a clock; 0 where the file names no clock."""
    return round(time / Fraction(time_base)) if time_base else 0
