"""Frames that are decoded when they are asked for: memory does not grow with the length of a clip.

A clip is a video file, a folder of pictures, an animated picture (GIF, WebP, PNG), or one picture.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Protocol, overload, runtime_checkable

import av
import numpy as np
from jaxtyping import Int, UInt8

from loki_jax.video.files import MediaError
from loki_jax.video.image import AnimatedPicture, is_animated, read_image
from loki_jax.video.reader import VideoReader, evenly

# Uncropped RGB frames: an array or any sequence of them.
Frames = Sequence[UInt8[np.ndarray, "_ _ 3"]] | UInt8[np.ndarray, "_ _ _ 3"]

# Decoded pictures that are kept, in bytes: they are decoded in pieces, since a tracker goes both ways.
_KEPT_BYTES = 192 * 2**20


PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
PICTURE_RATE = Fraction(25)  # of pictures that are given without a rate


@runtime_checkable
class RandomAccess(Protocol):
    """A clip whose frames can be had in any order.

    Attributes:
      fps: exact frame rate.
      has_audio: the clip has a track of sound.
    """

    fps: Fraction
    has_audio: bool

    def __len__(self) -> int: ...

    def frame(self, index: int) -> UInt8[np.ndarray, "H W 3"]: ...


class LazyFrames(Sequence[UInt8[np.ndarray, "H W 3"]]):
    """Frames (H, W, 3) of a clip, by random access; of a video as `VideoReader` gives them in order.

    The files are read through once when they are opened, which finds damage before any work and the time
    stamp of every frame. Slices and arrays of indices give other views of the same clip.

    Args:
      path: video; folder of pictures of one size, shown in the order of their names, 2 before 10; picture.
      fps, stop: as for `VideoReader`. Pictures without a rate are shown at 25 a second.

    Raises:
      MediaError: as `VideoReader`, on opening; a folder without pictures, or pictures of several sizes.
    """

    def __init__(self, path: str | os.PathLike, fps: Fraction | None = None, *, stop: Fraction | None = None):
        self._open(_open_clip(Path(path), fps, stop))

    @classmethod
    def of(cls, clip: RandomAccess) -> LazyFrames:
        """The frames of a clip that is no file."""
        frames = object.__new__(cls)
        frames._open(clip)
        return frames

    def _open(self, clip: RandomAccess) -> None:
        self._file = clip
        self._indices = np.arange(len(clip))
        self._change: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def fps(self) -> Fraction:
        """Exact frame rate of the whole file's frames."""
        return self._file.fps

    @property
    def has_audio(self) -> bool:
        """Whether the clip is a file with a track of sound."""
        return self._file.has_audio

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W 3"]: ...

    @overload
    def __getitem__(self, index: slice | Int[np.ndarray, " m"]) -> LazyFrames: ...

    def __getitem__(self, index):
        if isinstance(index, slice | np.ndarray):
            return self._view(self._indices[index], self._change)
        frame = self._file.frame(int(self._indices[index]))
        return frame if self._change is None else self._change(frame)

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> LazyFrames:
        """The frames changed by a function, such as a crop, each time they are asked for."""
        before = self._change
        return self._view(
            self._indices, function if before is None else lambda frame: function(before(frame))
        )

    def _view(self, indices: np.ndarray, change: Callable[[np.ndarray], np.ndarray] | None) -> LazyFrames:
        view = object.__new__(LazyFrames)
        view._file, view._indices, view._change = self._file, indices, change
        return view


def _open_clip(path: Path, fps: Fraction | None, stop: Fraction | None) -> RandomAccess:
    if path.is_dir():
        files = [p for p in path.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith(".")]
        if not files:
            raise MediaError(f"{path}: a folder without pictures. Give a video, or a folder of PNG or JPEG.")
        return _Pictures(sorted(files, key=_natural), fps, stop)
    if path.suffix.lower() not in PICTURES or not path.is_file():
        return _File(path, fps, stop)
    return _Animation(path, fps, stop) if is_animated(path) else _Pictures([path], fps, stop)


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key that sorts names with numbers by the numbers."""
    parts = re.findall(r"\d+|\D+", path.stem)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


class _Pictures:
    """Picture files as the frames of a clip."""

    has_audio = False

    def __init__(self, files: Sequence[Path], fps: Fraction | None, stop: Fraction | None):
        self.fps = PICTURE_RATE if fps is None else Fraction(fps)
        self._files = files if stop is None else files[: max(1, round(stop * self.fps))]
        self._shape: tuple[int, ...] | None = None
        for index in range(len(self._files)):
            self.frame(index)

    def __len__(self) -> int:
        return len(self._files)

    def frame(self, index: int) -> np.ndarray:
        image = read_image(self._files[index])
        self._shape = self._shape or image.shape
        if image.shape != self._shape:
            raise MediaError(
                f"{self._files[index]}: {image.shape[1]}x{image.shape[0]} pixels, the first picture of the "
                f"folder has {self._shape[1]}x{self._shape[0]}. Give pictures of one size."
            )
        return image


class _Animation:
    """An animated picture as a clip."""

    has_audio = False

    def __init__(self, path: Path, fps: Fraction | None, stop: Fraction | None):
        self._picture = AnimatedPicture(path)
        times, rate = self._picture.times, self._picture.rate
        self.fps = rate if fps is None else Fraction(fps)
        shown = [(time, index) for index, time in enumerate(times) if stop is None or time < stop]
        self._indices = list(evenly(shown, rate, self.fps))

    def __len__(self) -> int:
        return len(self._indices)

    def frame(self, index: int) -> np.ndarray:
        return self._picture.frame(self._indices[index])


class _File:
    """Random access to the pictures of a file.

    Attributes:
      fps: exact frame rate.
      has_audio: the file has a track of sound.
      stamps: what identifies each frame's picture in decoding: its time stamp, or, where the file has none,
        its number. Repeated where a picture is shown for several frames.
    """

    def __init__(self, path: str | os.PathLike, fps: Fraction | None, stop: Fraction | None):
        self._path = path
        with VideoReader(path, fps, stop=stop) as reader:
            self.fps, self.has_audio = reader.fps, reader.has_audio
            shown = [(number, picture.pts) for number, picture in reader.numbered_pictures()]
        self._timed = all(stamp is not None for _, stamp in shown)
        self.stamps = [stamp if self._timed and stamp is not None else number for number, stamp in shown]
        self._kept: dict[int, np.ndarray] = {}
        self._piece = 1  # frames decoded together; known with the first picture
        self._reader = VideoReader(path)
        self._decoding: Iterator[tuple[int, av.VideoFrame]] = self._reader.decode_from(None)
        self._next = 0  # the frame before which decoding stands

    def __len__(self) -> int:
        return len(self.stamps)

    def frame(self, index: int) -> np.ndarray:
        stamp = self.stamps[index]
        if stamp not in self._kept:
            self._decode(index // self._piece * self._piece)
            self._piece = max(1, _KEPT_BYTES // self._kept[self.stamps[index]].nbytes)
        return self._kept[stamp]

    def _decode(self, first: int) -> None:
        """Decode the piece that begins with frame `first`, and forget what was kept."""
        wanted = self.stamps[first : first + self._piece]
        self._kept = {stamp: self._kept[stamp] for stamp in wanted if stamp in self._kept}
        missing = set(wanted) - self._kept.keys()
        if first != self._next:
            self._start(wanted[0] if self._timed else None)
        try:
            # A container's index may lead behind the frame: then once more, from the beginning.
            if not self._take(missing):
                self._start(None)
                if not self._take(missing):
                    raise MediaError(f"{self._path}: changed while it was read. Start again.")
        except (av.error.FFmpegError, OSError) as error:
            raise MediaError(f"{self._path}: damaged ({error}). Copy or download it again.") from error
        self._next = first + len(wanted)

    def _start(self, stamp: int | None) -> None:
        self._reader.close()
        self._reader = VideoReader(self._path)
        self._decoding = self._reader.decode_from(stamp)

    def _take(self, missing: set[int]) -> bool:
        """Keep the missing pictures; False where decoding is past them."""
        while missing:
            number, picture = next(self._decoding, (0, None))
            if picture is None:
                return False
            stamp = picture.pts if self._timed and picture.pts is not None else number
            if stamp in missing:
                self._kept[stamp] = self._reader.to_rgb(picture)
                missing.discard(stamp)
            elif stamp > max(missing):
                return False
        return True
