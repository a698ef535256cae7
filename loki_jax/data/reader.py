from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from loki_jax.data.schema import (
    CLIPS_FILE,
    COEFFICIENT_FEATURES,
    HEAD_FILE,
    METADATA_FILE,
    REBUILD_ADVICE,
    SCHEMA_VERSION,
    Clip,
    ClipInfo,
    DatasetError,
    Frame,
    Metadata,
)
from loki_jax.face.asset import HeadAsset, load_head
from loki_jax.face.types import Camera, Coefficients
from loki_jax.io import file_sha256


def decode_image(encoded: bytes) -> UInt8[np.ndarray, "S S 3"]:
    """Decode a stored image to (S, S, 3) uint8 RGB."""
    with Image.open(io.BytesIO(encoded)) as picture:
        return np.asarray(picture.convert("RGB") if picture.mode != "RGB" else picture)


def _fields(record: bytes) -> Any:
    return tf_example_pb2.Example.FromString(record).features.feature


def decode_record(record: bytes, metadata: Metadata, with_image: bool = True) -> Frame:
    """Decode one record; about 0.1 ms plus the image (`with_image=False` leaves the image out)."""
    fields = _fields(record)

    def floats(name: str) -> np.ndarray:
        return np.array(fields[name].float_list.value, np.float32)

    def latent(name: str) -> np.ndarray | None:
        if metadata.latent_shape is None:
            return None
        raw = np.frombuffer(fields[name].bytes_list.value[0], ml_dtypes.bfloat16)
        return raw.reshape(metadata.latent_shape)

    image = None
    if with_image and metadata.image_format is not None:
        image = decode_image(fields["image"].bytes_list.value[0])
    return Frame(
        clip_index=fields["clip_index"].int64_list.value[0],
        frame_index=fields["frame_index"].int64_list.value[0],
        image=image,
        latent_mean=latent("latent_mean"),
        latent_logvar=latent("latent_logvar"),
        coefficients=Coefficients(*(floats(name) for name in COEFFICIENT_FEATURES)),
        camera=Camera(floats("intrinsics"), floats("extrinsics").reshape(4, 4)),
        crop=floats("crop"),
        confidence=fields["confidence"].float_list.value[0],
    )


@dataclasses.dataclass
class Dataset:
    """An open dataset: metadata, clip table and random access to frames.

    Can be pickled (worker processes open the files anew) and read from several threads.
    """

    path: Path
    metadata: Metadata
    clips: tuple[ClipInfo, ...]
    _sources: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "metadata": self.metadata, "clips": self.clips, "_sources": {}}

    def clips_of(self, split: str) -> tuple[ClipInfo, ...]:
        """The clips of "train" or "validation"; empty if the dataset has no such split."""
        return tuple(clip for clip in self.clips if clip.split == split)

    def head(self) -> HeadAsset:
        """The head asset that the coefficients belong to."""
        return load_head(self.path / HEAD_FILE)

    def source(self, split: str) -> Sequence[bytes]:
        """TFDS's random-access source of the serialised records of a split."""
        if split not in self._sources:
            if split not in self.metadata.records:
                raise DatasetError(
                    f"{self.path}: has no split {split!r}, only {', '.join(self.metadata.records)}. "
                    f"{REBUILD_ADVICE}"
                )
            self._sources[split] = tfds.builder_from_directory(self.path).as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        return self._sources[split]

    def read(self, split: str, records: Sequence[int], with_image: bool = True) -> list[Frame]:
        """The frames with these record numbers of a split.

        Raises:
          DatasetError: a record cannot be read or decoded.
        """
        source = self.source(split)
        try:
            return [
                decode_record(raw, self.metadata, with_image) for raw in source.__getitems__(list(records))
            ]
        except Exception as error:  # the readers raise many types; the file is what the reader needs to know
            raise DatasetError(
                f"{self.path}: records {list(records)} of split {split!r} are damaged ({error}). "
                f"Copy the shards again. {REBUILD_ADVICE}"
            ) from error

    def stored_clip(self, clip: ClipInfo) -> Clip:
        """A clip as it went into the dataset: `write_dataset` makes the same records of it again.

        Raises:
          DatasetError: a record cannot be read or decoded.
        """
        numbers = range(clip.first_record, clip.first_record + clip.length)
        frames = self.read(clip.split, numbers, with_image=False)
        has_images = self.metadata.image_format is not None
        has_latents = self.metadata.latent_shape is not None

        def images():
            source = self.source(clip.split)
            for number in numbers:
                yield _fields(source[number])["image"].bytes_list.value[0]

        def stack(values):
            return np.stack(list(values))

        coefficients = zip(*(frame.coefficients for frame in frames), strict=True)
        cameras = zip(*(frame.camera for frame in frames), strict=True)
        return Clip(
            clip_id=clip.clip_id,
            identity=clip.identity,
            fps=clip.fps,
            split=clip.split,
            source=clip.source,
            licence=clip.licence,
            coefficients=Coefficients(*map(stack, coefficients)),
            camera=Camera(*map(stack, cameras)),
            crop=stack(f.crop for f in frames),
            images=images() if has_images else None,
            latent_mean=stack(f.latent_mean for f in frames) if has_latents else None,
            latent_logvar=stack(f.latent_logvar for f in frames) if has_latents else None,
            confidence=stack(f.confidence for f in frames),
            fit_quality=clip.fit_quality,
            extra=dict(clip.extra),
        )

    def read_clip(self, clip: ClipInfo, start: int = 0, stop: int | None = None) -> list[Frame]:
        """Frames start..stop (to the end by default) of a clip."""
        stop = clip.length if stop is None else stop
        if not 0 <= start < stop <= clip.length:
            raise IndexError(f"clip {clip.clip_id!r} has {clip.length} frames, asked for {start}..{stop}")
        return self.read(clip.split, range(clip.first_record + start, clip.first_record + stop))


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise DatasetError(
            f"{path}: no such file, so {path.parent} is not a complete loki_jax dataset. {REBUILD_ADVICE}"
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DatasetError(f"{path}: not readable as JSON ({error}). {REBUILD_ADVICE}") from error


def read_metadata(path: str | os.PathLike) -> Metadata:
    """Read and check `metadata.json` of the dataset at `path`.

    Raises:
      DatasetError: no such folder, no dataset in it, or another schema version.
    """
    path = Path(path)
    if not path.is_dir():
        raise DatasetError(f"{path}: no such dataset folder. Check `data.path`. {REBUILD_ADVICE}")
    if not (path / "dataset_info.json").is_file():
        raise DatasetError(
            f"{path}: holds no dataset_info.json. `data.path` must be the folder that holds it. "
            f"{REBUILD_ADVICE}"
        )
    stored = _read_json(path / METADATA_FILE)
    version = stored.get("schema_version") if isinstance(stored, dict) else None
    if version != SCHEMA_VERSION:
        raise DatasetError(
            f"{path / METADATA_FILE}: schema version {version}, this loki_jax reads {SCHEMA_VERSION}. "
            f"{REBUILD_ADVICE}"
        )
    try:
        metadata = Metadata(**stored)
        return dataclasses.replace(
            metadata,
            latent_shape=None if metadata.latent_shape is None else tuple(metadata.latent_shape),
            shards={name: tuple(entry) for name, entry in metadata.shards.items()},
        )
    except (TypeError, AttributeError) as error:
        raise DatasetError(f"{path / METADATA_FILE}: damaged ({error}). {REBUILD_ADVICE}") from error


def open_dataset(path: str | os.PathLike, head_sha256: str | None = None) -> Dataset:
    """Open the dataset folder at `path` for reading.

    Args:
      path: the folder that holds `dataset_info.json`.
      head_sha256: hash of the head that the caller works with (a workdir's `head.npz`), compared with
        the dataset's.

    Raises:
      DatasetError: no dataset there, another schema version, a shard missing or truncated, a head
        file that is not the one the coefficients were fitted with.
    """
    path = Path(path)
    metadata = read_metadata(path)
    for name, (_, size) in metadata.shards.items():
        file = path / name
        if not file.is_file():
            raise DatasetError(f"{file}: shard is missing. Copy it again. {REBUILD_ADVICE}")
        if file.stat().st_size != size:
            raise DatasetError(
                f"{file}: has {file.stat().st_size} bytes, {size} were written: truncated or changed. "
                f"Copy it again. {REBUILD_ADVICE}"
            )
    head_file = path / HEAD_FILE
    if not head_file.is_file():
        raise DatasetError(
            f"{head_file}: the dataset's head asset is missing. Copy it again. {REBUILD_ADVICE}"
        )
    found = file_sha256(head_file)
    if found != metadata.head_sha256:
        raise DatasetError(
            f"{head_file}: SHA-256 {found[:12]}... is not the head of this dataset "
            f"({metadata.head_sha256[:12]}...): its coefficients mean nothing for another head. "
            f"Restore the original file. {REBUILD_ADVICE}"
        )
    if head_sha256 is not None and head_sha256 != metadata.head_sha256:
        raise DatasetError(
            f"{path}: was made with the head {metadata.head_name!r} ({metadata.head_sha256[:12]}...), not "
            f"with the one in use ({head_sha256[:12]}...). Build it with that head, or use a fresh workdir."
        )
    rows = _read_json(path / CLIPS_FILE)
    try:
        clips = tuple(ClipInfo(**(row | {"fps": Fraction(*row["fps"])})) for row in rows)
    except (TypeError, KeyError, ValueError) as error:
        raise DatasetError(f"{path / CLIPS_FILE}: damaged ({error}). {REBUILD_ADVICE}") from error
    return Dataset(path, metadata, clips)
