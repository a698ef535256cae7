"""The audio of a driving clip in the videos made from it."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av

from loki_jax.video.files import MediaError, check_file

# Audio codecs that an MP4 file may hold as they are; others are encoded again as AAC.
_COPIED_AUDIO = ("aac", "mp3", "ac3", "alac")

_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)


class AudioTrack:
    """The audio of another file, muxed into `output` in step with its video.

    Time zero is the first picture of the source. Packets are copied where MP4 allows the codec and
    encoded again as AAC otherwise.
    """

    def __init__(self, source: Path, output: av.container.OutputContainer):
        check_file(source, "video")
        try:
            self._container = av.open(str(source))
            self._stream = self._container.streams.audio[0]
            videos = self._container.streams.video
            start = None
            if videos and videos[0].start_time is not None:
                start = videos[0].start_time * videos[0].time_base
            self._start = Fraction(start or 0)
            self._copied = self._stream.codec_context.name in _COPIED_AUDIO
            if self._copied:
                self._out = output.add_stream_from_template(self._stream)
            else:
                rate = self._stream.rate
                self._out = output.add_stream("aac", rate=rate if rate in _AAC_RATES else 48000)
                # Not the source's layout: raw audio may leave it unnamed, which the encoder refuses.
                self._out.layout = "mono" if self._stream.layout.nb_channels == 1 else "stereo"
            self._packets = self._copy() if self._copied else self._encode()
            self._next: tuple[Fraction, av.Packet] | None = None
        except (av.error.FFmpegError, OSError, IndexError, ValueError) as error:
            raise MediaError(
                f"{source}: its audio cannot be read ({error}). Write without audio (`--no-audio`)."
            ) from error
        self._output, self._source = output, source

    def _copy(self) -> Iterator[tuple[Fraction, av.Packet]]:
        base = self._stream.time_base
        shift = round(self._start / base)
        for packet in self._container.demux(self._stream):
            if packet.dts is None or packet.pts is None:
                continue
            if (packet.pts + (packet.duration or 0)) * base <= self._start:
                continue
            packet.pts -= shift
            packet.dts -= shift
            packet.stream = self._out
            yield packet.pts * base, packet

    def _encode(self) -> Iterator[tuple[Fraction, av.Packet]]:
        codec = self._out.codec_context
        resampler = av.AudioResampler(
            format=codec.format, layout=codec.layout, rate=codec.sample_rate, frame_size=1024
        )
        base = Fraction(1, codec.sample_rate)
        shift = round(self._start / base)

        def encoded(frame: av.AudioFrame | None) -> Iterator[tuple[Fraction, av.Packet]]:
            for packet in self._out.encode(frame):
                yield packet.pts * packet.time_base, packet

        for decoded in self._container.decode(self._stream):
            for frame in resampler.resample(decoded):
                if frame.pts is not None:
                    frame.pts -= shift
                    if frame.pts + frame.samples <= 0:
                        continue
                yield from encoded(frame)
        for frame in resampler.resample(None):
            if frame.pts is not None:
                frame.pts -= shift
            yield from encoded(frame)
        yield from encoded(None)

    def advance(self, until: Fraction) -> None:
        """Mux the packets that start before `until` seconds."""
        try:
            while True:
                if self._next is None:
                    self._next = next(self._packets, None)
                if self._next is None or self._next[0] >= until:
                    return
                self._output.mux(self._next[1])
                self._next = None
        except (av.error.FFmpegError, OSError) as error:
            raise MediaError(
                f"{self._source}: its audio is damaged ({error}). Write without audio (`--no-audio`)."
            ) from error

    def close(self) -> None:
        """Close the source."""
        self._container.close()
