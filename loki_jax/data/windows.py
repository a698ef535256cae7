"""The input pipeline: windows of consecutive frames with a reference frame, as Grain datasets.

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
seed and the window alone. The element says which records those were; `BatchIterator` names and counts
them in the order of the batches, and stops when they are more than the stated share.
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

from loki_jax.data.reader import Dataset, open_dataset
from loki_jax.data.schema import ClipInfo, DatasetError, Frame

Batch = dict[str, Any]

"""numpy arrays; B windows a process, T frames a window, S image size, (h, w, c) latent shape.

frames (B,T,S,S,3) uint8, reference (B,S,S,3) uint8          where the dataset has images
latent_mean, latent_logvar (B,T,h,w,c) bfloat16,
reference_latent_mean, reference_latent_logvar (B,h,w,c)     where it has latents
coefficients: Coefficients (B,T,...), reference_coefficients: Coefficients (B,...)
camera: Camera (B,T,...); crop (B,T,4); confidence (B,T)
clip_index (B,), frame_index (B,T), reference_index (B,)     int32; indices into the clip table and clip
"""

# Draws in a row that may meet an unreadable record before reading is given up.
_MAX_DRAWS = 8

# Key under which an element carries the unreadable records that it met: (_MAX_DRAWS,) int64, padded with -1.
UNREADABLE = "unreadable"

ADVICE = "Copy the shards again from where they were made."


class _Slot(NamedTuple):
    """Where in a clip a window may start: frames first_start .. last_start, both included."""

    clip: ClipInfo
    first_start: int
    last_start: int


class _Window(NamedTuple):
    clip: ClipInfo
    start: int
    reference: int


def window_slots(clips: Sequence[ClipInfo], window: int) -> list[_Slot]:
    """The windows of one epoch: floor(length / window) for each clip, none for clips that are shorter.

    The possible starts of a clip are cut into as many equal parts as it has windows, and an epoch
    draws one start from each part: all of the clip is visited in each epoch, and any window of
    consecutive frames occurs in the long run.
    """
    slots = []
    for clip in clips:
        count, starts = clip.length // window, clip.length - window + 1
        bounds = [index * starts // count for index in range(count + 1)] if count else []
        slots += [_Slot(clip, a, b - 1) for a, b in itertools.pairwise(bounds)]
    return slots


@dataclasses.dataclass(frozen=True)
class _DrawWindow(grain.transforms.RandomMap):
    """Slot -> window: start and reference frame drawn anew each epoch."""

    fixed_reference: bool
    seed: int

    def random_map(self, slot: _Slot, rng: np.random.Generator) -> _Window:
        start = int(rng.integers(slot.first_start, slot.last_start + 1))
        if self.fixed_reference:
            # A function of the window alone (method, section 11, row 6: the `official` variant).
            rng = np.random.default_rng((self.seed, slot.clip.clip_index, start))
        return _Window(slot.clip, start, int(rng.integers(slot.clip.length)))


@dataclasses.dataclass(frozen=True)
class _Redraw:
    """(window, attempt) -> the window that takes its place: any slot of the split, the same every time."""

    slots: Sequence[_Slot]
    draw: _DrawWindow

    def __call__(self, chosen: _Window, attempt: int) -> _Window:
        rng = np.random.default_rng(
            (self.draw.seed, chosen.clip.clip_index, chosen.start, chosen.reference, attempt)
        )
        return self.draw.random_map(self.slots[int(rng.integers(len(self.slots)))], rng)


class _Unreadable(Exception):
    """The first record of a window that cannot be read."""

    def __init__(self, record: int):
        super().__init__(record)
        self.record = record


class _ReadWindow(grain.transforms.Map):
    """Window -> one element of a batch, with an optional cache of decoded frames in this process."""

    def __init__(
        self, dataset: Dataset, split: str, window: int, cache_bytes: int, with_images: bool, redraw: _Redraw
    ):
        self._dataset, self._split, self._window = dataset, split, window
        self._with_images, self._redraw = with_images, redraw
        self._cache: dict[int, Frame] = {}
        self._cache_left = cache_bytes

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": {}}  # a worker process fills its own

    def _read(self, records: list[int]) -> list[Frame]:
        frames = {record: self._cache[record] for record in records if record in self._cache}
        missing = [record for record in dict.fromkeys(records) if record not in frames]
        if missing:
            # Frames are kept until the limit and never evicted: under uniform access that hits as
            # often as any replacement policy.
            for record, frame in zip(missing, self._read_files(missing), strict=True):
                frames[record] = frame
                size = sum(leaf.nbytes for leaf in jax.tree.leaves(frame) if isinstance(leaf, np.ndarray))
                if size <= self._cache_left:
                    self._cache_left -= size
                    self._cache[record] = frame
        return [frames[record] for record in records]

    def _read_files(self, records: list[int]) -> list[Frame]:
        try:
            return [
                _checked(frame, self._dataset)
                for frame in self._dataset.read(self._split, records, self._with_images)
            ]
        except DatasetError:
            # One by one, to find the first that is bad. A second failure is what makes it unreadable:
            # a busy network file system may refuse once.
            for record in records:
                if read_fault(self._dataset, self._split, record, self._with_images) is not None:
                    raise _Unreadable(record) from None
            return [
                _checked(frame, self._dataset)
                for frame in self._dataset.read(self._split, records, self._with_images)
            ]

    def map(self, chosen: _Window) -> dict[str, Any]:
        unreadable = np.full(_MAX_DRAWS, -1, np.int64)
        for attempt in range(_MAX_DRAWS):
            try:
                return self._element(chosen) | {UNREADABLE: unreadable}
            except _Unreadable as fault:
                unreadable[attempt] = fault.record
                chosen = self._redraw(chosen, attempt)
        names = [record_name(self._dataset, self._split, int(record)) for record in dict.fromkeys(unreadable)]
        raise DatasetError(
            f"{self._dataset.path}: {_MAX_DRAWS} windows drawn in a row hold records that cannot be read: "
            + "; ".join(names)
            + f". {ADVICE}"
        )

    def _element(self, chosen: _Window) -> dict[str, Any]:
        first = chosen.clip.first_record
        records = [first + chosen.start + offset for offset in range(self._window)]
        *frames, reference = self._read([*records, first + chosen.reference])
        found = [(frame.clip_index, frame.frame_index) for frame in (*frames, reference)]
        indices = [*range(chosen.start, chosen.start + self._window), chosen.reference]
        if found != [(chosen.clip.clip_index, index) for index in indices]:
            raise DatasetError(
                f"{self._dataset.path}: clips.json does not fit the shards at clip {chosen.clip.clip_id!r}. "
                "Copy the whole dataset folder again."
            )
        stacked: Frame = jax.tree.map(lambda *leaves: np.stack(leaves), *frames)
        element = {
            "coefficients": stacked.coefficients,
            "reference_coefficients": reference.coefficients,
            "camera": stacked.camera,
            "crop": stacked.crop,
            "confidence": stacked.confidence.astype(np.float32),
            "clip_index": np.int32(chosen.clip.clip_index),
            "frame_index": stacked.frame_index.astype(np.int32),
            "reference_index": np.int32(chosen.reference),
        }
        if reference.image is not None:
            element |= {"frames": stacked.image, "reference": reference.image}
        if reference.latent_mean is not None:
            element |= {
                "latent_mean": stacked.latent_mean,
                "latent_logvar": stacked.latent_logvar,
                "reference_latent_mean": reference.latent_mean,
                "reference_latent_logvar": reference.latent_logvar,
            }
        return element


def _checked(frame: Frame, dataset: Dataset) -> Frame:
    """`frame`, if its arrays have the sizes the metadata promises (a damaged picture may not)."""
    meta = dataset.metadata
    image = None if frame.image is None else frame.image.shape
    sizes = len(frame.coefficients.betas), len(frame.coefficients.expression)
    if image not in (None, (meta.image_size, meta.image_size, 3)) or sizes != (
        meta.n_shape,
        meta.n_expression,
    ):
        raise DatasetError(
            f"image of shape {image} with {sizes[0]} shape and {sizes[1]} expression coefficients"
        )
    return frame


def read_fault(dataset: Dataset, split: str, record: int, with_images: bool = True) -> str | None:
    """Why a record cannot be read, or None if it can.

    Raises:
      DatasetError: its shard is no longer there.
    """
    file, _ = locate_record(dataset, split, record)
    if not (dataset.path / file).is_file():
        raise DatasetError(f"{dataset.path / file}: shard is gone. {ADVICE}")
    try:
        _checked(*dataset.read(split, [record], with_images), dataset)
    except DatasetError as error:
        return str(error.__cause__ or error)
    return None


def locate_record(dataset: Dataset, split: str, record: int) -> tuple[str, int]:
    """(shard file, index within it) of record number `record` of a split."""
    for name, (count, _) in dataset.metadata.shards.items():
        if f"-{split}." in name:
            if record < count:
                return name, record
            record -= count
    raise IndexError(f"{dataset.path}: split {split!r} ends {record + 1} records before the one asked for")


def record_name(dataset: Dataset, split: str, record: int) -> str:
    """A record as a person looks for it: file, index in it, clip and frame."""
    file, index = locate_record(dataset, split, record)
    clip = next(clip for clip in dataset.clips_of(split) if record < clip.first_record + clip.length)
    return f"{dataset.path / file} record {index} (clip {clip.clip_id!r}, frame {record - clip.first_record})"


def _local_batch(batch: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not one of {process_count} processes")
    if batch <= 0 or batch % process_count:
        raise ValueError(
            f"the global batch of {batch} windows cannot be shared evenly by {process_count} processes"
        )
    return batch // process_count


def _open_slots(
    path: str | os.PathLike, split: str, window: int, with_images: bool, head_sha256: str | None
) -> tuple[Dataset, list[_Slot]]:
    dataset = open_dataset(path, head_sha256)
    if dataset.metadata.latent_shape is None and not with_images:
        raise DatasetError(
            f"{dataset.path}: holds no latents, only images. Read the images, or build it with latents."
        )
    clips = dataset.clips_of(split)
    slots = window_slots(clips, window)
    if not slots:
        longest = max((clip.length for clip in clips), default=0)
        raise DatasetError(
            f"{dataset.path}: split {split!r} has {len(clips)} clips, the longest of {longest} frames: none "
            f"holds a window of {window}. Add longer clips or choose a shorter window (`config.window`)."
        )
    return dataset, slots


def make_dataset(
    path: str | os.PathLike,
    window: int,
    batch: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    *,
    split: str = "train",
    fixed_reference: bool = False,
    cache_bytes: int = 0,
    with_images: bool = True,
    head_sha256: str | None = None,
    max_corrupt_share: float = 0.0,
) -> Batches:
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
      cache_bytes: decoded frames kept in memory, per process; small datasets are then decoded once.
      with_images: False leaves images undecoded where latents are all that is needed.
      head_sha256: hash of the head in use, compared with the dataset's.
      max_corrupt_share: share of the split's records that may be unreadable before `iterate` stops;
        each process counts the ones it meets.

    Raises:
      DatasetError: the dataset is damaged, has no such split or no clip of `window` frames.
      ValueError: `batch` does not divide by `process_count`.
    """
    local = _local_batch(batch, process_index, process_count)
    dataset, slots = _open_slots(path, split, window, with_images, head_sha256)
    draw = _DrawWindow(fixed_reference, seed)
    redraw = _Redraw(tuple(slots), draw)
    elements = (
        grain.MapDataset.source(slots)
        .seed(seed)
        .random_map(draw)
        .shuffle()
        .repeat()
        .map(_ReadWindow(dataset, split, window, cache_bytes, with_images, redraw))
        .batch(local, drop_remainder=True)
        .slice(slice(process_index, None, process_count))
    )
    return Batches(elements, dataset, split, max_corrupt_share)


def make_validation_dataset(
    path: str | os.PathLike,
    window: int,
    batch: int,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    *,
    split: str = "validation",
    cache_bytes: int = 0,
    with_images: bool = True,
    head_sha256: str | None = None,
    max_corrupt_share: float = 0.0,
) -> Batches:
    """One pass over a split, the same every time: every clip's windows from frame 0 on, without overlap.

    The first window of each clip comes before the second of any, so that few batches show many
    identities. The reference of a window is drawn once from the seed. All batches are full: the last one is
    filled up from the beginning. Arguments and errors as for `make_dataset`.
    """
    local = _local_batch(batch, process_index, process_count)
    dataset, slots = _open_slots(path, split, window, with_images, head_sha256)
    clips = list(dict.fromkeys(slot.clip.clip_index for slot in slots))
    rows = [dataset.clips[index] for index in clips]
    rounds = max(row.length // window for row in rows)
    windows = [
        _Window(row, k * window, int(np.random.default_rng((seed, row.clip_index, k)).integers(row.length)))
        for k in range(rounds)
        for row in rows
        if (k + 1) * window <= row.length
    ]
    full = -(-len(windows) // batch) * batch
    redraw = _Redraw(tuple(slots), _DrawWindow(False, seed))
    elements = (
        grain.MapDataset.source([windows[i % len(windows)] for i in range(full)])
        .map(_ReadWindow(dataset, split, window, cache_bytes, with_images, redraw))
        .batch(local, drop_remainder=True)
        .slice(slice(process_index, None, process_count))
    )
    return Batches(elements, dataset, split, max_corrupt_share)


@dataclasses.dataclass(frozen=True)
class Batches:
    """This process's batches, by random access: `batches[k]`, `len(batches)`; `iterate` reads ahead.

    Attributes:
      elements: Grain's dataset; its elements also name the unreadable records they met.
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
        return _take_apart(self.elements[index])[0]


def _take_apart(element: dict[str, Any]) -> tuple[Batch, np.ndarray]:
    """(the batch, the unreadable records it met)."""
    return {key: value for key, value in element.items() if key != UNREADABLE}, np.array(element[UNREADABLE])
