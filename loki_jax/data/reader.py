"""Opens a dataset: metadata, clip table and random access to decoded frames (method, section 8).

Whatever the libraries raise about a damaged file becomes a `DatasetError` in one place, `_reading`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import types
import typing
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image
from tensorflow_datasets.core.data_sources.base import BaseDataSource
from tensorflow_datasets.proto import tf_example_pb2

from loki_jax.data.schema import (
    CLIPS_FILE,
    COEFFICIENT_FEATURES,
    HEAD_FILE,
    METADATA_FILE,
    SCHEMA_VERSION,
    SPLITS,
    Clip,
    ClipInfo,
    DatasetError,
    Frame,
    Metadata,
    float_features,
)
from loki_jax.face.asset import HeadAsset, load_head
from loki_jax.face.types import Camera, Coefficients
from loki_jax.io import file_sha256
from loki_jax.stores import StoreError, is_url, local_copy

_REMEDY = (
    "Copy it again from where it was made, or build the dataset again with `python -m data_prep.build` or "
    "`python -m data_prep.synth`."
)


class RecordError(DatasetError):
    """A record cannot be read.

    Attributes:
      record: its number in the split.
      reason: what the libraries found.
    """

    def __init__(self, message: str, record: int = -1, reason: str = ""):  # defaults: it is pickled
        super().__init__(message)
        self.record, self.reason = record, reason


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except DatasetError:
        raise
    except FileNotFoundError as error:
        raise DatasetError(
            f"{path}: no such file, so {path.parent} is not a complete loki_jax dataset. {_REMEDY}"
        ) from error
    except Exception as error:  # JSON, TFDS, ArrayRecord, protocol buffers and Pillow raise many types
        raise DatasetError(f"{path}: damaged ({_reason(error)}). {_REMEDY}") from error


def _reason(error: Exception) -> str:
    """Type and text of an error, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def decode_image(encoded: bytes) -> UInt8[np.ndarray, "S S 3"]:
    """Decode a stored image to RGB."""
    with Image.open(io.BytesIO(encoded)) as picture:
        return np.asarray(picture.convert("RGB") if picture.mode != "RGB" else picture)


def _fields(record: bytes) -> Any:
    return tf_example_pb2.Example.FromString(record).features.feature


def _decode_record(record: bytes, metadata: Metadata, with_image: bool) -> Frame:
    """Decode one record; about 0.1 ms plus the image. Errors are those of the libraries."""
    fields = _fields(record)
    floats = {
        name: np.array(fields[name].float_list.value, np.float32).reshape(shape)
        for name, shape in float_features(metadata.n_shape, metadata.n_expression).items()
    }

    def latent(name: str) -> np.ndarray | None:
        if metadata.latent_shape is None:
            return None
        raw = np.frombuffer(fields[name].bytes_list.value[0], ml_dtypes.bfloat16)
        return raw.reshape(metadata.latent_shape)

    image = None
    if with_image and metadata.image_format is not None:
        image = decode_image(fields["image"].bytes_list.value[0])
        if image.shape != (metadata.image_size, metadata.image_size, 3):
            raise ValueError(f"image of shape {image.shape}")
    return Frame(
        clip_index=fields["clip_index"].int64_list.value[0],
        frame_index=fields["frame_index"].int64_list.value[0],
        image=image,
        latent_mean=latent("latent_mean"),
        latent_logvar=latent("latent_logvar"),
        coefficients=Coefficients(*(floats[name] for name in COEFFICIENT_FEATURES)),
        camera=Camera(floats["intrinsics"], floats["extrinsics"]),
        crop=floats["crop"],
        confidence=floats["confidence"],
    )


def stack_frames(frames: Sequence[Frame]) -> Frame:
    """Frames as one `Frame` whose arrays have a leading time axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *frames)


@dataclasses.dataclass
class Dataset:
    """An open dataset: metadata, clip table and random access to frames.

    Can be pickled (worker processes open the files anew) and read from several threads.
    """

    path: Path
    metadata: Metadata
    clips: tuple[ClipInfo, ...]
    _sources: dict[str, BaseDataSource] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sources": {}}

    def clips_of(self, split: str) -> tuple[ClipInfo, ...]:
        """The clips of "train" or "validation"; empty if the dataset has no such split."""
        return tuple(clip for clip in self.clips if clip.split == split)

    def head(self) -> HeadAsset:
        """The head asset that the coefficients belong to."""
        return load_head(self.path / HEAD_FILE)

    def source(self, split: str) -> BaseDataSource:
        """TFDS's random-access source of the serialised records of a split.

        Raises:
          DatasetError: no such split, or TFDS cannot read its own description of the dataset.
        """
        if split not in self._sources:
            if split not in self.metadata.records:
                raise DatasetError(
                    f"{self.path}: has no split {split!r}, only {', '.join(self.metadata.records)}. Build "
                    "it from more identities, or read another split."
                )
            with _reading(self.path / "features.json"):
                tfds.features.FeatureConnector.from_config(str(self.path))
            with _reading(self.path / "dataset_info.json"):
                source = tfds.builder_from_directory(self.path).as_data_source(
                    split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
                )
                if len(source) != self.metadata.records[split]:
                    raise ValueError(
                        f"split {split!r} has {len(source)} records, {METADATA_FILE} another number"
                    )
            self._sources[split] = source
        return self._sources[split]

    def read(self, split: str, records: Sequence[int], with_image: bool = True) -> list[Frame]:
        """The frames with these record numbers of a split.

        Raises:
          RecordError: a record cannot be read or decoded.
          DatasetError: its shard is no longer there.
        """
        source = self.source(split)
        decode = lambda numbers: [
            _decode_record(raw, self.metadata, with_image) for raw in source.__getitems__(list(numbers))
        ]
        try:
            return decode(records)
        except Exception:
            pass
        # One by one, to name the first that is bad. All get a second try: a busy network file system may
        # refuse once.
        frames = []
        for record in records:
            try:
                frames += decode([record])
            except Exception as error:
                file, _ = self.locate(split, record)
                if not (self.path / file).is_file():
                    raise DatasetError(f"{self.path / file}: shard is gone. {_REMEDY}") from error
                name = self.record_name(split, record)
                raise RecordError(
                    f"{name} cannot be read: {_reason(error)}. {_REMEDY}", record, _reason(error)
                ) from error
        return frames

    def read_clip(self, clip: ClipInfo, start: int = 0, stop: int | None = None) -> list[Frame]:
        """Frames start..stop (to the end by default) of a clip. Raises as `read` does."""
        stop = clip.length if stop is None else stop
        if not 0 <= start < stop <= clip.length:
            raise IndexError(f"clip {clip.clip_id!r} has {clip.length} frames, asked for {start}..{stop}")
        return self.read(clip.split, clip.records[start:stop])

    def stored_clip(self, clip: ClipInfo) -> Clip:
        """A clip as it went into the dataset: `write_dataset` makes the same records of it again.

        Raises as `read` does.
        """
        stacked = stack_frames(self.read(clip.split, clip.records, with_image=False))

        return Clip(
            **clip.facts(),
            coefficients=stacked.coefficients,
            camera=stacked.camera,
            crop=stacked.crop,
            images=None if self.metadata.image_format is None else _StoredImages(self, clip),
            latent_mean=stacked.latent_mean,
            latent_logvar=stacked.latent_logvar,
            confidence=stacked.confidence,
        )

    def locate(self, split: str, record: int) -> tuple[str, int]:
        """(shard file, index within it) of record number `record` of a split."""
        for name, (count, _) in self.metadata.shards.items():
            if f"-{split}." in name:
                if record < count:
                    return name, record
                record -= count
        raise IndexError(f"{self.path}: split {split!r} ends {record + 1} records before the one asked for")

    def record_name(self, split: str, record: int) -> str:
        """A record as a person looks for it: file, index in it, clip and frame."""
        file, index = self.locate(split, record)
        clip = next(clip for clip in self.clips_of(split) if record in clip.records)
        return (
            f"{self.path / file} record {index} (clip {clip.clip_id!r}, frame {record - clip.first_record})"
        )


class _StoredImages:
    """The encoded pictures of a clip, read one at a time, any number of times."""

    def __init__(self, dataset: Dataset, clip: ClipInfo):
        self._dataset, self._clip = dataset, clip

    def __iter__(self) -> Iterator[bytes]:
        dataset, split = self._dataset, self._clip.split
        source = dataset.source(split)
        for number in self._clip.records:
            with _reading(dataset.path / dataset.locate(split, number)[0]):
                yield _fields(source[number])["image"].bytes_list.value[0]


def _read_metadata(path: Path) -> Metadata:
    """Read and check `metadata.json`."""
    file = path / METADATA_FILE
    if not path.is_dir():
        raise DatasetError(f"{path}: no such dataset folder. Check `data.path`.")
    if not (path / "dataset_info.json").is_file():
        raise DatasetError(
            f"{path}: holds no dataset_info.json. `data.path` must be the folder that holds it. {_REMEDY}"
        )
    with _reading(file):
        stored = json.loads(file.read_text())
        if stored["schema_version"] != SCHEMA_VERSION:
            raise DatasetError(
                f"{file}: schema version {stored['schema_version']}, this loki_jax reads {SCHEMA_VERSION}. "
                "Build the dataset again, or read it with the version that made it."
            )
        stored["latent_shape"] = stored["latent_shape"] and tuple(stored["latent_shape"])
        stored["shards"] = {name: (int(n), int(size)) for name, (n, size) in stored["shards"].items()}
        metadata = Metadata(**stored)
        _check_types(metadata)
        for split in SPLITS:
            counts = [n for name, (n, _) in metadata.shards.items() if f"-{split}." in name]
            if sum(counts) != metadata.records.get(split, 0):
                raise ValueError(f"the shards of split {split!r} do not add up to its records")
    return metadata


def _check_types(stored: Metadata | ClipInfo) -> None:
    """Raise TypeError where JSON gave a field another type than it is annotated with."""
    for name, hint in typing.get_type_hints(type(stored)).items():
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = (*(typing.get_origin(kind) or kind for kind in kinds), *([int] if float in kinds else []))
        if not isinstance(getattr(stored, name), kinds):
            raise TypeError(f"{name} is {getattr(stored, name)!r:.40}")


def _read_clips(path: Path, metadata: Metadata) -> tuple[ClipInfo, ...]:
    """The clip table, whose rows must cover the records of each split in order."""
    file = path / CLIPS_FILE
    with _reading(file):
        rows = json.loads(file.read_text())
        clips = tuple(ClipInfo(**row | {"fps": Fraction(*row["fps"])}) for row in rows)
        ends = dict.fromkeys(metadata.records, 0)
        for clip in clips:
            _check_types(clip)
            if clip.first_record != ends[clip.split] or clip.length < 1:
                raise ValueError(f"clip {clip.clip_id!r} does not follow the clip before it")
            ends[clip.split] += clip.length
        if ends != metadata.records:
            raise ValueError(f"clips of {ends} records, {METADATA_FILE} says {metadata.records}")
    return clips


def _local(path: str | os.PathLike) -> Path:
    """`path`, or the copy of a dataset in a store: ArrayRecord reads local files."""
    if not is_url(path):
        return Path(path)
    try:
        return local_copy(str(path))
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such dataset folder. Check `data.path`.") from error
    except StoreError as error:
        raise DatasetError(str(error)) from error


def open_dataset(path: str | os.PathLike, head_sha256: str | None = None) -> Dataset:
    """Open the dataset folder at `path` for reading.

    Args:
      path: the folder that holds `dataset_info.json`; of a URL (gs://, s3://) a copy in the user's cache.
      head_sha256: hash of the head that the caller works with (a workdir's `head.npz`), compared with
        the dataset's.

    Raises:
      DatasetError: no dataset there, another schema version, a file missing, truncated or damaged, a head
        file that is not the one the coefficients were fitted with.
    """
    path = _local(path)
    metadata = _read_metadata(path)
    for name, (_, size) in metadata.shards.items():
        file = path / name
        if not file.is_file():
            raise DatasetError(f"{file}: shard is missing. {_REMEDY}")
        if file.stat().st_size != size:
            raise DatasetError(
                f"{file}: has {file.stat().st_size} bytes, {size} were written: truncated or changed. "
                f"{_REMEDY}"
            )
    head_file = path / HEAD_FILE
    if not head_file.is_file():
        raise DatasetError(f"{head_file}: the dataset's head asset is missing. {_REMEDY}")
    found = file_sha256(head_file)
    if found != metadata.head_sha256:
        raise DatasetError(
            f"{head_file}: SHA-256 {found[:12]}... is not the head of this dataset "
            f"({metadata.head_sha256[:12]}...): its coefficients mean nothing for another head. {_REMEDY}"
        )
    if head_sha256 is not None and head_sha256 != metadata.head_sha256:
        raise DatasetError(
            f"{path}: was made with the head {metadata.head_name!r} ({metadata.head_sha256[:12]}...), not "
            f"with the one in use ({head_sha256[:12]}...). Build it with that head, or use a fresh workdir."
        )
    dataset = Dataset(path, metadata, _read_clips(path, metadata))
    for split in metadata.records:
        dataset.source(split)
    return dataset
