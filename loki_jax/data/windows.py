"""Windows of consecutive frames with a reference frame, as Grain datasets of batches.

Order of operations (method, section 8):

    windows of the split -> draw start and reference (seed, epoch) -> shuffle (seed, epoch) -> repeat
    -> read and decode -> batch -> every process_count-th batch

Elements are computed when they are asked for, so a process reads its own batches only. Its part of a
global batch is a block of consecutive windows, in the order in which the mesh joins the parts: row i of
the global batch is the same window for any number of processes, and meets the same noise.

Everything up to the slicing works on indices alone. `MapDataset` makes element i a pure function of
(seed, i), so neither the number of worker processes nor the number of hosts changes which windows
form global batch k, and the state of an iterator is the number of batches taken.

A window that touches a record which cannot be read is replaced by another, again a function of the
seed and the window alone. The element names those records; `BatchIterator` reports and counts them in the
order of the batches, and stops when they are more than the stated share.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from loki_jax.data.reader import Dataset, RecordError, open_dataset, stack_frames
from loki_jax.data.schema import Batch, ClipInfo, DatasetError, Frame
from loki_jax.face.crop import crop_and_resize

# Draws in a row that may meet an unreadable record before reading is given up.
_MAX_DRAWS = 8


class Slot(NamedTuple):
    """Where in a clip a window may start: frames first_start .. last_start, both included."""

    clip: ClipInfo
    first_start: int
    last_start: int


class _Window(NamedTuple):
    clip: ClipInfo
    start: int
    reference: int


def window_slots(clips: Sequence[ClipInfo], window: int) -> list[Slot]:
    """The windows of one epoch: floor(length / window) for each clip, none for clips that are shorter.

    The possible starts of a clip are cut into as many equal parts as it has windows, and an epoch
    draws one start from each part: all of the clip is visited in each epoch, and any window of
    consecutive frames occurs in the long run.
    """
    slots = []
    for clip in clips:
        count, starts = clip.length // window, clip.length - window + 1
        bounds = [index * starts // count for index in range(count + 1)] if count else []
        slots += [Slot(clip, a, b - 1) for a, b in itertools.pairwise(bounds)]
    return slots


@dataclasses.dataclass(frozen=True)
class _DrawWindow(grain.transforms.RandomMap):
    """Slot -> window: start and reference frame drawn anew each epoch."""

    slots: Sequence[Slot]
    seed: int
    fixed_reference: bool = False

    def random_map(self, slot: Slot, rng: np.random.Generator) -> _Window:
        start = int(rng.integers(slot.first_start, slot.last_start + 1))
        if self.fixed_reference:
            # A function of the window alone (method, section 11, row 6: the `official` variant).
            rng = np.random.default_rng((self.seed, slot.clip.clip_index, start))
        return _Window(slot.clip, start, int(rng.integers(slot.clip.length)))

    def replacement(self, window: _Window, attempt: int) -> _Window:
        """The window used instead of an unreadable one: any of the split, the same every time."""
        rng = np.random.default_rng(
            (self.seed, window.clip.clip_index, window.start, window.reference, attempt)
        )
        return self.random_map(self.slots[int(rng.integers(len(self.slots)))], rng)


class _ReadWindow(grain.transforms.Map):
    """Window -> (`Batch` without the axis B, the unreadable records met on the way).

    The records are (_MAX_DRAWS,) int64, padded with -1. A cache of this process may keep decoded frames.
    """

    def __init__(
        self, dataset: Dataset, split: str, window: int, draw: _DrawWindow, image_size: int | None,
        cache_bytes: int,
    ):  # fmt: skip
        self._dataset, self._split, self._window, self._draw = dataset, split, window, draw
        self._image_size = image_size
        self._cache: dict[int, Frame] = {}
        self._cache_left = cache_bytes

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": {}}  # a worker process fills its own

    def map(self, window: _Window) -> tuple[Batch, np.ndarray]:
        unreadable = np.full(_MAX_DRAWS, -1, np.int64)
        for attempt in range(_MAX_DRAWS):
            try:
                return self._element(window), unreadable
            except RecordError as error:
                unreadable[attempt] = error.record
                window = self._draw.replacement(window, attempt)
        names = [self._dataset.record_name(self._split, int(record)) for record in dict.fromkeys(unreadable)]
        raise DatasetError(
            f"{self._dataset.path}: {_MAX_DRAWS} windows drawn in a row hold records that cannot be read: "
            f"{'; '.join(names)}. Copy the shards again from where they were made."
        )

    def _element(self, window: _Window) -> Batch:
        first, indices = window.clip.first_record, range(window.start, window.start + self._window)
        *frames, reference = self._read([first + index for index in (*indices, window.reference)])
        found = [(frame.clip_index, frame.frame_index) for frame in (*frames, reference)]
        if found != [(window.clip.clip_index, index) for index in (*indices, window.reference)]:
            raise DatasetError(
                f"{self._dataset.path}: clips.json does not fit the shards at clip {window.clip.clip_id!r}. "
                "Copy the whole dataset folder again."
            )
        stacked = stack_frames(frames)
        return Batch(
            coefficients=stacked.coefficients,
            reference_coefficients=reference.coefficients,
            camera=stacked.camera,
            crop=stacked.crop,
            confidence=stacked.confidence.astype(np.float32),
            clip_index=np.int32(window.clip.clip_index),
            frame_index=stacked.frame_index.astype(np.int32),
            reference_index=np.int32(window.reference),
            frames=stacked.image,
            reference=reference.image,
            latent_mean=stacked.latent_mean,
            latent_logvar=stacked.latent_logvar,
            reference_latent_mean=reference.latent_mean,
            reference_latent_logvar=reference.latent_logvar,
        )

    def _read(self, records: list[int]) -> list[Frame]:
        frames = {record: self._cache[record] for record in records if record in self._cache}
        missing = [record for record in dict.fromkeys(records) if record not in frames]
        if missing:
            read = self._dataset.read(self._split, missing, with_image=self._image_size is not None)
            for record, frame in zip(missing, map(self._resized, read), strict=True):
                frames[record] = frame
                # Frames are kept until the limit and never evicted: under uniform access that hits as
                # often as any replacement policy.
                size = sum(leaf.nbytes for leaf in jax.tree.leaves(frame) if isinstance(leaf, np.ndarray))
                if size <= self._cache_left:
                    self._cache_left -= size
                    self._cache[record] = frame
        return [frames[record] for record in records]

    def _resized(self, frame: Frame) -> Frame:
        if frame.image is None or len(frame.image) == self._image_size:
            return frame
        box = np.array([0, 0, len(frame.image), len(frame.image)])
        return frame._replace(image=crop_and_resize(frame.image, box, self._image_size))


@dataclasses.dataclass(frozen=True)
class Batches:
    """This process's batches, by random access: `batches[k]`, `len(batches)`; `iterate` reads ahead.

    Attributes:
      elements: Grain's dataset of pairs (batch, unreadable records met).
      dataset, split: where they come from.
      max_corrupt_share: share of the split's records that may be unreadable.
    """

    elements: grain.MapDataset
    dataset: Dataset
    split: str
    max_corrupt_share: float

    def __len__(self) -> int:
        return len(self.elements)

    def __getitem__(self, index: int) -> Batch:
        """Batch `index`, with other windows in place of unreadable ones; these are not counted here."""
        return self.elements[index][0]


@dataclasses.dataclass(frozen=True)
class _Source:
    """What both kinds of batches share; arguments and errors as for `make_dataset`."""

    path: str | os.PathLike
    split: str
    window: int
    batch: int
    process_index: int
    process_count: int
    with_images: bool
    image_size: int | None
    cache_bytes: int
    head_sha256: str | None
    max_corrupt_share: float

    def open(self) -> tuple[Dataset, list[Slot]]:
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index {self.process_index} is not one of {self.process_count} processes"
            )
        if self.batch <= 0 or self.batch % self.process_count:
            raise ValueError(
                f"the global batch of {self.batch} windows cannot be shared evenly by "
                f"{self.process_count} processes"
            )
        dataset = open_dataset(self.path, self.head_sha256)
        self._check_size(dataset)
        clips = dataset.clips_of(self.split)
        slots = window_slots(clips, self.window)
        if not slots:
            longest = max((clip.length for clip in clips), default=0)
            raise DatasetError(
                f"{dataset.path}: split {self.split!r} has {len(clips)} clips, the longest of {longest} "
                f"frames: none holds a window of {self.window}. Add longer clips or choose a shorter window "
                "(`config.window`)."
            )
        return dataset, slots

    def _check_size(self, dataset: Dataset) -> None:
        metadata, wanted = dataset.metadata, self.image_size or dataset.metadata.image_size
        if metadata.latent_shape is None and not self.with_images:
            raise DatasetError(
                f"{dataset.path}: holds no latents, only images. Read the images, or build it with latents."
            )
        if metadata.image_size < wanted or (
            metadata.latent_shape is not None and metadata.image_size != wanted
        ):
            what = "frames" if metadata.latent_shape is None else "latents of frames"
            raise DatasetError(
                f"{dataset.path}: holds {what} of {metadata.image_size} pixels, the config wants {wanted}. "
                f"Larger frames would be resized, smaller ones and latents cannot be. Rebuild with "
                f"`--size {wanted}` or set `--config.image_size={metadata.image_size}`."
            )

    def batches(self, dataset: Dataset, windows: grain.MapDataset, draw: _DrawWindow) -> Batches:
        size = (self.image_size or dataset.metadata.image_size) if self.with_images else None
        read = _ReadWindow(dataset, self.split, self.window, draw, size, self.cache_bytes)
        elements = windows.map(read).batch(self.batch // self.process_count, drop_remainder=True)
        share = elements.slice(slice(self.process_index, None, self.process_count))
        return Batches(share, dataset, self.split, self.max_corrupt_share)


def make_dataset(
    path: str | os.PathLike, window: int, batch: int, seed: int, process_index: int = 0,
    process_count: int = 1, *, split: str = "train", fixed_reference: bool = False, with_images: bool = True,
    image_size: int | None = None, cache_bytes: int = 0, head_sha256: str | None = None,
    max_corrupt_share: float = 0.0,
) -> Batches:  # fmt: skip
    """Endless training batches of the dataset at `path`.

    Element k is this process's part of global batch k: together the processes' parts hold the same
    windows whatever `process_count` is. An epoch is one pass over `window_slots`; batches run on
    over its end.

    Args:
      path: the folder that holds `dataset_info.json`.
      window: T, consecutive frames in a window.
      batch: windows in a global batch; a process gets batch / process_count of them.
      seed: fixes order, starts and references; 0 <= seed < 2^32.
      process_index, process_count: `jax.process_index()`, `jax.process_count()`.
      split: "train" or "validation".
      fixed_reference: the reference is a function of the window instead of drawn anew each epoch (the
        `official` variant).
      with_images: False leaves images undecoded where latents are all that is needed.
      image_size: side of the images in pixels; larger stored frames are reduced by an area filter. None: the
        stored size.
      cache_bytes: decoded frames kept in memory, per process; small datasets are then decoded once.
      head_sha256: hash of the head in use, compared with the dataset's.
      max_corrupt_share: share of the split's records that may be unreadable before `iterate` stops;
        each process counts the ones it meets.

    Raises:
      DatasetError: the dataset is damaged, has no such split, no clip of `window` frames, frames smaller than
        `image_size`, or latents of another size.
      ValueError: `batch` does not divide by `process_count`.
    """
    source = _Source(
        path, split, window, batch, process_index, process_count, with_images, image_size, cache_bytes,
        head_sha256, max_corrupt_share,
    )  # fmt: skip
    dataset, slots = source.open()
    draw = _DrawWindow(tuple(slots), seed, fixed_reference)
    windows = grain.MapDataset.source(slots).seed(seed).random_map(draw).shuffle().repeat()
    return source.batches(dataset, windows, draw)


def make_validation_dataset(
    path: str | os.PathLike, window: int, batch: int, seed: int = 0, process_index: int = 0,
    process_count: int = 1, *, split: str = "validation", with_images: bool = True,
    image_size: int | None = None, cache_bytes: int = 0, head_sha256: str | None = None,
    max_corrupt_share: float = 0.0,
) -> Batches:  # fmt: skip
    """One pass over a split, the same every time: every clip's windows from frame 0 on, without overlap.

    The first window of each clip comes before the second of any, so that few batches show many
    identities. The reference of a window is drawn once from the seed. All batches are full: the last one is
    filled up from the beginning. Arguments and errors as for `make_dataset`.
    """
    source = _Source(
        path, split, window, batch, process_index, process_count, with_images, image_size, cache_bytes,
        head_sha256, max_corrupt_share,
    )  # fmt: skip
    dataset, slots = source.open()
    clips = [clip for clip in dataset.clips_of(split) if clip.length >= window]
    windows = []
    for k in range(max(clip.length // window for clip in clips)):
        for clip in clips:
            if (k + 1) * window <= clip.length:
                rng = np.random.default_rng((seed, clip.clip_index, k))
                windows.append(_Window(clip, k * window, int(rng.integers(clip.length))))
    full = -(-len(windows) // batch) * batch
    repeated = grain.MapDataset.source([windows[i % len(windows)] for i in range(full)])
    return source.batches(dataset, repeated, _DrawWindow(tuple(slots), seed))
