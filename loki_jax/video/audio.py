"""The audio of a driving clip in the videos made from it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.filter import Graph

from loki_jax.video.files import MediaError
from loki_jax.video.reader import first_picture_time

# Audio codecs that an MP4 file may hold as they are; others are encoded again as AAC.
_COPIED = ("aac", "mp3", "ac3", "alac")

_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)


class AudioTrack:
    """The audio of another file, muxed into `output` in step with its video.

    It is the source's default track. Time zero is the first picture of the source. Packets are copied where
    MP4 allows the codec and encoded again as AAC otherwise; gaps become silence. Damage beyond the start
    costs the damaged sound, with a warning, and never the video.

    Raises:
      MediaError: the source has no audio track that can be read.
    """

    def __init__(self, source: Path, output: av.container.OutputContainer):
        self._output, self._source = output, source
        self._start = first_picture_time(source)
        try:
            self._container = av.open(str(source))
            self._stream = self._container.streams.best("audio")
            if self._stream is None or self._stream.codec_context is None:
                raise ValueError("its codec is unknown")
            codec = self._stream.codec_context.codec.canonical_name
            if codec in _COPIED:
                self._out = output.add_stream_from_template(self._stream)
                self._packets = self._copied()
            else:
                rate = self._stream.rate
                self._out = output.add_stream("aac", rate=rate if rate in _AAC_RATES else 48000)
                self._out.layout = "mono" if self._stream.layout.nb_channels == 1 else "stereo"
                self._packets = self._encoded()
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{source}: its audio cannot be read ({error}). Write without audio (`--no-audio`)."
            ) from error
        self._next: av.Packet | None = None

    def _copied(self) -> Iterator[av.Packet]:
        shift = round(self._start / self._stream.time_base)
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
            warnings.warn(f"{self._source}: {damaged} damaged pieces of its audio are silent.", stacklevel=2)

    def _encoded(self) -> Iterator[av.Packet]:
        graph = None
        for frame in self._decoded():
            if frame.pts is not None:
                frame.pts -= round(self._start / frame.time_base)
            if graph is None:
                graph = self._resampler(frame)
            graph.push(frame)
            for resampled in _pull(graph):
                yield from self._out.encode(resampled)
        if graph is not None:
            graph.push(None)
            for resampled in _pull(graph):
                yield from self._out.encode(resampled)
            yield from self._out.encode(None)

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
            graph.add("asetnsamples", "n=1024:p=0"),
            graph.add("abuffersink"),
        ]
        graph.link_nodes(*chain).configure()
        return graph

    def advance(self, until: Fraction) -> None:
        """Mux the packets that start before `until` seconds."""
        try:
            while True:
                self._next = self._next or next(self._packets, None)
                if self._next is None or self._next.pts * self._next.time_base >= until:
                    return
                self._output.mux(self._next)
                self._next = None
        except (av.error.FFmpegError, OSError) as error:
            warnings.warn(f"{self._source}: its audio is damaged and ends early ({error}).", stacklevel=2)
            self._packets, self._next = iter(()), None

    def close(self) -> None:
        """Close the source."""
        self._container.close()


def _pull(graph: Graph) -> Iterator[av.AudioFrame]:
    while True:
        try:
            yield graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
