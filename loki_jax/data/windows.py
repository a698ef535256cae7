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
from loki_jax.data.schema import Batch, ClipInfo, DatasetError, DriverWindow, Frame
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
    driver: ClipInfo | None = None  # another person who performs the clip


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
class Pairs:
    """Who else performs a clip (`python -m data_prep.cross_pairs`).

    Attributes:
      drivers: clips by the name of the clip that they perform.
      share: of the windows that another person drives; the others drive themselves.
    """

    drivers: dict[str, list[ClipInfo]]
    share: float

    def draw(self, clip: ClipInfo, rng: np.random.Generator) -> ClipInfo:
        crossed, others = rng.random() < self.share, self.drivers[clip.clip_id]
        return others[int(rng.integers(len(others)))] if crossed else clip


def is_driver(clip: ClipInfo) -> bool:
    """Whether a clip is there to drive another one, and is never generated."""
    return "drives" in clip.extra


def find_pairs(dataset: Dataset, split: str, share: float) -> Pairs:
    """The pairs of a split.

    Raises:
      DatasetError: a clip has no driver, or one of another length.
    """
    clips = dataset.clips_of(split)
    drivers: dict[str, list[ClipInfo]] = {clip.clip_id: [] for clip in clips if not is_driver(clip)}
    lengths = {clip.clip_id: clip.length for clip in clips}
    for clip in filter(is_driver, clips):
        driven = clip.extra["drives"]
        if driven not in drivers or lengths[driven] != clip.length:
            raise DatasetError(
                f"{dataset.path}: clip {clip.clip_id!r} does not fit {driven!r}, which it drives."
            )
        drivers[driven].append(clip)
    if alone := [name for name, found in drivers.items() if not found]:
        raise DatasetError(
            f"{dataset.path}: {len(alone)} clips of split {split!r} have no driver, {alone[0]!r} among them. "
            "Make pairs with `python -m data_prep.cross_pairs`, or set --config.data.cross_share=0."
        )
    return Pairs(drivers, share)


@dataclasses.dataclass(frozen=True)
class _DrawWindow(grain.transforms.RandomMap):
    """Slot -> window: start and reference frame drawn anew each epoch."""

    slots: Sequence[Slot]
    seed: int
    fixed_reference: bool = False
    pairs: Pairs | None = None

    def random_map(self, slot: Slot, rng: np.random.Generator) -> _Window:
        start = int(rng.integers(slot.first_start, slot.last_start + 1))
        if self.fixed_reference:
            # A function of the window alone (method, section 11, row 6: the `official` variant).
            rng = np.random.default_rng((self.seed, slot.clip.clip_index, start))
        window = _Window(slot.clip, start, int(rng.integers(slot.clip.length)))
        return window if self.pairs is None else window._replace(driver=self.pairs.draw(slot.clip, rng))

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
        self, dataset: Dataset, split: str, window: int, draw: _DrawWindow, image_size: int,
        with_images: bool, cache_bytes: int,
    ):  # fmt: skip
        self._dataset, self._split, self._window, self._draw = dataset, split, window, draw
        self._image_size, self._with_images = image_size, with_images
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
        indices = [*range(window.start, window.start + self._window), window.reference]
        *frames, reference = self._frames(window.clip, indices)
        stacked = stack_frames(frames)
        driver = None
        if window.driver is not None:
            other = stack_frames(self._frames(window.driver, indices[:-1]))
            driver = DriverWindow(other.image, other.coefficients, other.camera, other.crop)
        return Batch(
            coefficients=stacked.coefficients,
            reference_coefficients=reference.coefficients,
            camera=stacked.camera,
            crop=stacked.crop,
            confidence=stacked.confidence,
            clip_index=np.array(window.clip.clip_index, np.int32),
            frame_index=np.array(indices[:-1], np.int32),
            reference_index=np.array(window.reference, np.int32),
            reference_camera=reference.camera,
            reference_crop=reference.crop,
            frames=stacked.image,
            reference=reference.image,
            latent_mean=stacked.latent_mean,
            latent_logvar=stacked.latent_logvar,
            reference_latent_mean=reference.latent_mean,
            reference_latent_logvar=reference.latent_logvar,
            driver=driver,
        )

    def _frames(self, clip: ClipInfo, indices: Sequence[int]) -> list[Frame]:
        frames = self._read([clip.records[index] for index in indices])
        found = [(frame.clip_index, frame.frame_index) for frame in frames]
        if found != [(clip.clip_index, index) for index in indices]:
            raise DatasetError(
                f"{self._dataset.path}: clips.json does not fit the shards at clip {clip.clip_id!r}. "
                "Copy the whole dataset folder again."
            )
        return frames

    def _read(self, records: list[int]) -> list[Frame]:
        frames = {record: self._cache[record] for record in records if record in self._cache}
        missing = [record for record in dict.fromkeys(records) if record not in frames]
        if missing:
            read = self._dataset.read(self._split, missing, self._with_images)
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


def make_dataset(
    path: str | os.PathLike,
    window: int,
    batch: int,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    *,
    split: str = "train",
    one_pass: bool = False,
    fixed_reference: bool = False,
    with_images: bool = True,
    image_size: int | None = None,
    cache_bytes: int = 0,
    head_sha256: str | None = None,
    max_corrupt_share: float = 0.0,
    cross_share: float = 0.0,
) -> Batches:
    """Batches of the dataset at `path`: endless and shuffled for training, or one pass for validation.

    Element k is this process's part of global batch k: together the processes' parts hold the same
    windows whatever `process_count` is. An epoch of training is one pass over `window_slots`; batches run on
    over its end.

    `one_pass` gives the same windows every time: those of each clip from frame 0 on, without overlap. The
    first window of each clip comes before the second of any, so that few batches show many identities. The
    reference of a window is drawn once from the seed. All batches are full: the last one is filled up from
    the beginning.

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
      cross_share: share of the windows that another person drives, who performs the same clip. Above 0 all
        windows have a `driver`; the others are their own drivers.

    Raises:
      DatasetError: the dataset is damaged, has no such split, no clip of `window` frames, frames smaller than
        `image_size`, latents of another size, or a clip that nobody else performs where that is asked for.
      ValueError: `batch` does not divide by `process_count`.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not one of {process_count} processes")
    if batch <= 0 or batch % process_count:
        raise ValueError(
            f"the global batch of {batch} windows cannot be shared evenly by {process_count} processes"
        )
    dataset = open_dataset(path, head_sha256)
    image_size = dataset.metadata.image_size if image_size is None else image_size
    _check_images(dataset, image_size, with_images)
    clips = [clip for clip in dataset.clips_of(split) if not is_driver(clip)]
    pairs = find_pairs(dataset, split, cross_share) if cross_share else None
    slots = window_slots(clips, window)
    if not slots:
        longest = max((clip.length for clip in clips), default=0)
        raise DatasetError(
            f"{dataset.path}: split {split!r} has {len(clips)} clips, the longest of {longest} frames: none "
            f"holds a window of {window}. Add longer clips or choose a shorter window (`config.window`)."
        )
    draw = _DrawWindow(tuple(slots), seed, fixed_reference, pairs)
    if one_pass:
        windows = _windows_in_order(clips, window, seed, pairs)
        full = -(-len(windows) // batch) * batch
        chosen = grain.MapDataset.source([windows[i % len(windows)] for i in range(full)])
    else:
        chosen = grain.MapDataset.source(slots).seed(seed).random_map(draw).shuffle().repeat()
    read = _ReadWindow(dataset, split, window, draw, image_size, with_images, cache_bytes)
    elements = chosen.map(read).batch(batch // process_count, drop_remainder=True)
    share = elements.slice(slice(process_index, None, process_count))
    return Batches(share, dataset, split, max_corrupt_share)


def _check_images(dataset: Dataset, wanted: int, with_images: bool) -> None:
    stored, latents = dataset.metadata.image_size, dataset.metadata.latent_shape is not None
    if not latents and not with_images:
        raise DatasetError(
            f"{dataset.path}: holds no latents, only images. Read the images, or build it with latents."
        )
    if stored < wanted or (latents and stored != wanted):
        raise DatasetError(
            f"{dataset.path}: holds {'latents of ' if latents else ''}frames of {stored} pixels, the config "
            f"wants {wanted}. Only larger frames can be resized, and no latents. Rebuild with "
            f"`--size {wanted}` or set `--config.image_size={stored}`."
        )


def _windows_in_order(
    clips: Sequence[ClipInfo], window: int, seed: int, pairs: Pairs | None
) -> list[_Window]:
    windows = []
    for k in range(max(clip.length for clip in clips) // window):
        for clip in clips:
            if (k + 1) * window <= clip.length:
                rng = np.random.default_rng((seed, clip.clip_index, k))
                drawn = _Window(clip, k * window, int(rng.integers(clip.length)))
                windows.append(drawn if pairs is None else drawn._replace(driver=pairs.draw(clip, rng)))
    return windows
