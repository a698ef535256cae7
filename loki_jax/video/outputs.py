"""Where frames go, by the name of the output: a video, a GIF, picture files, a folder of them."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import av
import numpy as np
from av.filter import Graph
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from loki_jax.io import atomic_path
from loki_jax.video.files import MediaError
from loki_jax.video.writer import SYNTHETIC_TAG, VIDEO_SUFFIXES, VideoWriter, check_output, unwritable

_SUFFIXES = (*VIDEO_SUFFIXES, ".gif", ".png")
_NUMBER = re.compile(r"%0(\d+)d")


@runtime_checkable
class FrameWriter(Protocol):
    """Takes frames one by one; a context manager that leaves nothing behind after an exception."""

    def __enter__(self) -> FrameWriter: ...

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None: ...

    def write(self, frame: UInt8[np.ndarray, "H W 3"]) -> None: ...


def keeps_sound(path: str | os.PathLike) -> bool:
    """Whether an output of this name can have sound."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def check_frames_output(path: str | os.PathLike, inputs: Iterable[str | os.PathLike] = ()) -> None:
    """Check that frames can be written to `path` and that this replaces none of the inputs.

    Raises:
      MediaError: as `check_output`; a folder that is not empty; a pattern without place for the number.
    """
    path = Path(path)
    if path.suffix:
        if path.suffix.lower() == ".png" and "%" in _NUMBER.sub("", path.name, count=1):
            raise MediaError(f"{path}: unknown pattern. Name frames like frame_%05d.png.")
        check_output(path, inputs, _SUFFIXES)
        return
    if path.is_dir() and any(path.iterdir()):
        raise MediaError(f"{path}: is a folder with files in it. Name a new or empty folder, or a .mp4 file.")
    check_output(path.with_name(path.name + ".png"), (), _SUFFIXES)


def open_output(
    path: str | os.PathLike,
    fps: Fraction,
    *,
    audio_from: str | os.PathLike | None = None,
    audio_start: Fraction = Fraction(0),
) -> FrameWriter:
    """The writer for a name: .mp4, .m4v, .mov, .mkv (H.264), .webm (VP9), .gif, frame_%05d.png, one .png, or
    a folder, which gets 00000.png and so on.

    All are tagged as synthetic, and appear when they are whole. GIF and PNG have no sound.

    Raises:
      MediaError: as `check_frames_output`.
    """
    path = Path(path)
    check_frames_output(path)
    if path.suffix.lower() == ".gif":
        return GifWriter(path, fps)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return VideoWriter(path, fps, audio_from=audio_from, audio_start=audio_start)
    return PictureWriter(path)


class PictureWriter:
    """Writes frames as PNG: to a folder, to names by a pattern, or one frame to one file.

    They are written to a temporary folder. When the writer closes without error, the folder gets its name;
    files of a pattern are moved to theirs, one after another.
    """

    def __init__(self, path: Path):
        self._path, self._count = path, 0
        self._folder = path.suffix == ""
        self._pattern = "%05d.png" if self._folder else path.name
        self._stack = contextlib.ExitStack()
        if self._folder:
            self._partial = self._stack.enter_context(atomic_path(path))
            self._partial.mkdir()
        else:
            temporary = tempfile.TemporaryDirectory(
                dir=path.parent, prefix=f".{path.stem}.", suffix=".partial"
            )
            self._partial = Path(self._stack.enter_context(temporary))

    def __enter__(self) -> PictureWriter:
        return self

    def write(self, frame: UInt8[np.ndarray, "H W 3"]) -> None:
        """Append one frame."""
        if self._count == 1 and _NUMBER.search(self._pattern) is None:
            raise MediaError(
                f"{self._path}: one file for several frames. Name them like frame_%05d.png, or name a video."
            )
        tags = PngInfo()
        tags.add_text("comment", SYNTHETIC_TAG)
        name = _NUMBER.sub(lambda m: f"{self._count:0{int(m[1])}d}", self._pattern)
        try:
            Image.fromarray(np.asarray(frame)).save(self._partial / name, pnginfo=tags, compress_level=3)
        except OSError as error:
            raise unwritable(self._path, error) from error
        self._count += 1

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is not None:
            self._stack.__exit__(kind, *error)
            return
        try:
            with self._stack:
                if self._count == 0:
                    raise MediaError(f"{self._path}: no frame to write. Check the input: it gave none.")
                if not self._folder:
                    for file in sorted(self._partial.iterdir()):
                        os.replace(file, self._path.parent / file.name)
        except OSError as problem:
            raise unwritable(self._path, problem) from problem


class GifWriter:
    """Writes a GIF that repeats for ever, each frame with its own 256 colours. Memory: two frames.

    A GIF's clock has hundredths of a second.
    """

    def __init__(self, path: Path, fps: Fraction):
        self._path, self._fps, self._count = path, Fraction(fps), 0
        self._graph: Graph | None = None
        with contextlib.ExitStack() as stack:
            self._partial = stack.enter_context(atomic_path(path))
            try:
                self._container = av.open(str(self._partial), "w", options={"loop": "0"})
                self._stream = self._container.add_stream("gif", rate=self._fps)
            except (av.error.FFmpegError, OSError) as error:
                raise unwritable(path, error) from error
            self._stack = stack.pop_all()

    def __enter__(self) -> GifWriter:
        return self

    def write(self, frame: UInt8[np.ndarray, "H W 3"]) -> None:
        """Append one frame."""
        frame = np.ascontiguousarray(frame)
        if self._graph is None:
            self._start(*frame.shape[:2])
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = self._count, 1 / self._fps
        self._count += 1
        self._push(picture)

    def _start(self, height: int, width: int) -> None:
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "pal8"
        self._stream.codec_context.time_base = 1 / self._fps
        graph = Graph()
        buffer = graph.add_buffer(
            width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / self._fps
        )
        split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single")
        use, sink = graph.add("paletteuse", "new=1:dither=sierra2_4a"), graph.add("buffersink")
        buffer.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(palette, 1, 0)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()
        self._graph = graph

    def _push(self, picture: av.VideoFrame | None) -> None:
        assert self._graph is not None
        try:
            self._graph.push(picture)
            with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
                while isinstance(reduced := self._graph.pull(), av.VideoFrame):
                    self._container.mux(self._stream.encode(reduced))
        except OSError as error:
            raise unwritable(self._path, error) from error

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is not None:
            with contextlib.suppress(av.error.FFmpegError, OSError, ValueError):
                self._container.close()
            self._stack.__exit__(kind, *error)
            return
        try:
            with self._stack:
                if self._graph is None:
                    raise MediaError(f"{self._path}: no frame to write. Check the input: it gave none.")
                self._push(None)
                self._container.mux(self._stream.encode(None))
                self._container.close()
                _tag_gif(self._partial)
        except (av.error.FFmpegError, OSError) as problem:
            raise unwritable(self._path, problem) from problem


def _tag_gif(path: Path) -> None:
    """Put the synthetic tag into a GIF as a comment, which FFmpeg cannot write."""
    content = path.read_bytes()
    flags = content[10]
    start = 13 + (3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0)  # after the global colours
    tag = SYNTHETIC_TAG.encode("ascii")
    comment = b"\x21\xfe" + bytes([len(tag)]) + tag + b"\x00"
    path.write_bytes(content[:start] + comment + content[start:])
