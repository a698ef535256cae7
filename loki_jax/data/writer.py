"""Writes clips as a dataset: a TFDS folder of ArrayRecord shards that appears complete or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from jaxtyping import UInt8
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

import loki_jax
from loki_jax.data.schema import (
    CLIPS_FILE,
    COEFFICIENT_FEATURES,
    DATASET_NAME,
    HEAD_FILE,
    METADATA_FILE,
    SCHEMA_VERSION,
    SPLITS,
    Clip,
    ClipInfo,
    DatasetError,
    Metadata,
    float_features,
    record_features,
)
from loki_jax.face.asset import HeadAsset, save_head
from loki_jax.io import atomic_path, remove, stale_siblings, sync


def encode_image(image: UInt8[np.ndarray, "S S 3"], image_format: str, jpeg_quality: int = 95) -> bytes:
    """Encode an RGB image as "png" or "jpeg" (4:4:4, so that a mouth of few pixels keeps its colour)."""
    buffer = io.BytesIO()
    jpeg = {"quality": jpeg_quality, "subsampling": 0}
    Image.fromarray(image).save(
        buffer, image_format, **{"compress_level": 3} if image_format == "png" else jpeg
    )
    return buffer.getvalue()


class _SplitWriter:
    """Writes one split's records into shards of about `shard_bytes`; clips are not split up.

    Attributes:
      lengths, payload: records and bytes of each shard so far.
    """

    def __init__(self, folder: Path, split: str, shard_bytes: int):
        self._stem, self._shard_bytes = folder / f"{DATASET_NAME}-{split}.array_record", shard_bytes
        self._writer: array_record_module.ArrayRecordWriter | None = None
        self.lengths: list[int] = []
        self.payload: list[int] = []

    def _unfinished(self, shard: int) -> Path:
        return self._stem.with_name(f"{self._stem.name}-{shard:05d}")

    @property
    def records(self) -> int:
        return sum(self.lengths)

    def write_clip(self, records: Iterable[bytes]) -> None:
        if self._writer is None or self.payload[-1] >= self._shard_bytes:
            self.close()
            # One record a group: random access reads one frame; the payload is already compressed.
            self._writer = array_record_module.ArrayRecordWriter(
                str(self._unfinished(len(self.lengths))), "group_size:1,uncompressed"
            )
            self.lengths.append(0)
            self.payload.append(0)
        for record in records:
            self._writer.write(record)
            self.lengths[-1] += 1
            self.payload[-1] += len(record)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def finish(self) -> dict[str, tuple[int, int]]:
        """Close, give the shards their final names, and return (records, size in bytes) of each."""
        self.close()
        shards = {}
        for shard, length in enumerate(self.lengths):
            path = self._unfinished(shard)
            path = path.rename(path.with_name(f"{path.name}-of-{len(self.lengths):05d}"))
            shards[path.name] = (length, path.stat().st_size)
        return shards


def _error(clip: Clip, problem: str) -> DatasetError:
    return DatasetError(f"clip {clip.clip_id!r} ({clip.source}): {problem}")


def _float_arrays(clip: Clip, head: HeadAsset) -> dict[str, np.ndarray]:
    """All per-frame float arrays of a clip, broadcast to (N, ...) and checked."""
    length = len(np.asarray(clip.coefficients.expression))
    if length == 0:
        raise _error(clip, "has no frames. Leave it out.")
    given = {
        **dict(zip(COEFFICIENT_FEATURES, clip.coefficients, strict=True)),
        **clip.camera._asdict(),
        "crop": clip.crop,
        "confidence": np.ones(length) if clip.confidence is None else clip.confidence,
    }
    arrays = {}
    for name, shape in float_features(head.n_shape, head.n_expression).items():
        value, expected = np.asarray(given[name], np.float32), (length, *shape)
        may_repeat = name in ("shape", "intrinsics", "extrinsics", "crop")
        if value.shape != expected and not (may_repeat and value.shape == shape):
            raise _error(
                clip,
                f"{name} has shape {value.shape}, expected {expected} for {length} frames and the head "
                f"{head.name!r}. Fit the clip with this head.",
            )
        if not np.isfinite(value).all():
            raise _error(
                clip, f"{name} holds values that are not finite. Fit the clip again or leave it out."
            )
        arrays[name] = np.broadcast_to(value, expected)
    box = arrays["crop"]
    if (box[:, 2:] <= box[:, :2]).any():
        raise _error(clip, "a crop box is empty. Crop the clip again.")
    return arrays


def _latents(clip: Clip, latent_shape: tuple[int, int, int] | None, length: int) -> dict[str, np.ndarray]:
    given = {"latent_mean": clip.latent_mean, "latent_logvar": clip.latent_logvar}
    found = {name: None if value is None else tuple(np.shape(value)) for name, value in given.items()}
    expected = None if latent_shape is None else (length, *latent_shape)
    if any(shape != expected for shape in found.values()):
        raise _error(
            clip,
            f"latents have shapes {found}, expected {expected} as in the first clip. Encode all clips with "
            "the same VAE, or none.",
        )
    return {} if expected is None else {k: np.asarray(v).astype(ml_dtypes.bfloat16) for k, v in given.items()}


def _encoded_images(
    clip: Clip, length: int, image_size: int, image_format: str | None, jpeg_quality: int
) -> Iterator[dict[str, bytes]]:
    """The image feature of each of `length` records, encoded; empty without images."""
    if clip.images is None or image_format is None:
        if clip.images is not None or image_format is not None:
            raise _error(
                clip, "some clips have images and some have none. Give images for all clips or for none."
            )
        yield from [{}] * length
        return
    count = 0
    for count, image in enumerate(clip.images, 1):
        if count > length:
            break
        if not isinstance(image, bytes):
            if np.shape(image) != (image_size, image_size, 3) or image.dtype != np.uint8:
                raise _error(
                    clip,
                    f"frame {count - 1} is {image.dtype} {image.shape}, expected uint8 "
                    f"({image_size}, {image_size}, 3). Crop and resize the frames first.",
                )
            image = encode_image(image, image_format, jpeg_quality)
        yield {"image": image}
    if count != length:
        raise _error(
            clip,
            f"{length} frames of coefficients but {'more' if count > length else count} images. Fit and crop "
            "the same frames.",
        )


def _check_row(clip: Clip, seen_ids: set[str], split_of: dict[str, str]) -> None:
    if clip.split not in SPLITS:
        raise _error(clip, f"split {clip.split!r} is none of {SPLITS}.")
    if clip.clip_id in seen_ids:
        raise _error(clip, "its id occurs twice. Give every clip its own id.")
    if split_of.setdefault(clip.identity, clip.split) != clip.split:
        raise _error(
            clip,
            f"identity {clip.identity!r} has clips in both splits. Choose the split by identity "
            "(`assign_split`).",
        )
    if not isinstance(clip.fps, Fraction) or clip.fps <= 0:
        raise _error(clip, f"fps {clip.fps!r} must be a positive fractions.Fraction.")
    seen_ids.add(clip.clip_id)


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise DatasetError(
            f"{path}: exists already. Choose another folder or pass overwrite (`--overwrite`)."
        )
    if not (path / "dataset_info.json").is_file():
        raise DatasetError(f"{path}: is not a dataset, so it is not overwritten. Choose another folder.")


def recover(path: str | os.PathLike) -> None:
    """Tidy up after writers of the dataset `path` that were killed.

    Their half-written folders go. A dataset that was moved aside to be replaced comes back if its
    successor never arrived. Folders of processes that still run are left alone.
    """
    path = Path(path)
    for old in stale_siblings(path, "old"):
        if path.exists():
            remove(old)
        else:
            old.rename(path)
    for partial in stale_siblings(path):
        remove(partial)


def write_dataset(
    out_dir: str | os.PathLike,
    head: HeadAsset,
    clips: Iterable[Clip],
    image_size: int,
    *,
    image_format: str = "png",
    jpeg_quality: int = 95,
    shard_bytes: int = 256 * 2**20,
    overwrite: bool = False,
    progress: Callable[[ClipInfo], None] | None = None,
    finish: Callable[[Path, Sequence[ClipInfo], Metadata], None] | None = None,
) -> Metadata:
    """Write `clips` as a dataset at `out_dir`; `clips` may be a generator, one clip is held at a time.

    The dataset is written to a hidden folder beside `out_dir` and renamed when it is complete: on any
    error nothing is left. The same clips give the same files, byte for byte.

    Args:
      out_dir: the folder to make.
      head: the head that the coefficients belong to; saved as `head.npz`.
      clips: the clips, in the order of their clip_index.
      image_size: side S of the square stored frames in pixels.
      image_format: "png" (lossless) or "jpeg".
      shard_bytes: a shard is closed after the clip that brings it to this size.
      overwrite: replace a dataset that is already there.
      progress: called after each clip with its row of the clip table.
      finish: called with the complete folder before it gets its name, with the clip table and the
        metadata: what it writes there appears together with the dataset.

    Raises:
      DatasetError: a clip does not fit the schema, there is no clip, or `out_dir` is taken.
    """
    path = Path(out_dir)
    if image_format not in ("png", "jpeg"):
        raise DatasetError(f"image_format {image_format!r} is neither 'png' nor 'jpeg'.")
    _check_target(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    with atomic_path(path) as partial, contextlib.ExitStack() as stack:
        partial.mkdir()
        head_sha256 = save_head(partial / HEAD_FILE, head)
        writers = {
            split: stack.enter_context(contextlib.closing(_SplitWriter(partial, split, shard_bytes)))
            for split in SPLITS
        }
        rows: list[ClipInfo] = []
        seen_ids: set[str] = set()
        split_of: dict[str, str] = {}
        stored_format = latent_shape = features = None
        for clip in clips:
            _check_row(clip, seen_ids, split_of)
            if features is None:  # the first clip decides what a record holds
                stored_format = None if clip.images is None else image_format
                latent_shape = None if clip.latent_mean is None else tuple(np.shape(clip.latent_mean)[1:])
                if stored_format is None and latent_shape is None:
                    raise _error(clip, "has neither images nor latents. Give one of them.")
                features = record_features(
                    head.n_shape, head.n_expression, image_size, stored_format, latent_shape
                )
            floats = _float_arrays(clip, head)
            length = len(floats["expression"])
            arrays = floats | _latents(clip, latent_shape, length)
            writer = writers[clip.split]
            quality = None if clip.fit_quality is None else float(clip.fit_quality)
            row = ClipInfo(
                **clip.facts() | {"fit_quality": quality},
                clip_index=len(rows), length=length, first_record=writer.records,
            )  # fmt: skip
            images = _encoded_images(clip, length, image_size, stored_format, jpeg_quality)
            writer.write_clip(
                _serialize(
                    features,
                    {"clip_id": row.clip_id, "clip_index": row.clip_index, "frame_index": frame}
                    | {name: array[frame] for name, array in arrays.items()}
                    | image,
                )
                for frame, image in enumerate(images)
            )
            rows.append(row)
            if progress is not None:
                progress(row)
        if not rows:
            raise DatasetError(f"{path}: no clip to write. Check the input clips: none was usable.")

        shards = writers["train"].finish() | writers["validation"].finish()
        metadata = Metadata(
            schema_version=SCHEMA_VERSION,
            code_version=loki_jax.__version__,
            head_sha256=head_sha256,
            head_name=head.name,
            head_licence=head.licence,
            image_size=image_size,
            image_format=stored_format,
            latent_shape=latent_shape,
            n_shape=head.n_shape,
            n_expression=head.n_expression,
            records={split: writer.records for split, writer in writers.items() if writer.records},
            shards=shards,
        )
        _write_tfds_info(partial, features, writers)
        (partial / METADATA_FILE).write_text(json.dumps(dataclasses.asdict(metadata), indent=1) + "\n")
        (partial / CLIPS_FILE).write_text(_rows_to_json(rows))
        if finish is not None:
            finish(partial, rows, metadata)
        sync(partial)
        if path.exists() and any(path.iterdir()):
            # A kill between this move and the next leaves both folders: `recover` puts the old one back.
            path.rename(old)
    remove(old)
    return metadata


def _serialize(features: tfds.features.FeaturesDict, record: dict[str, Any]) -> bytes:
    # An example is a map, whose order on the wire differs from process to process unless it is asked for.
    example = tf_example_pb2.Example.FromString(features.serialize_example(record))
    return example.SerializeToString(deterministic=True)


def _write_tfds_info(
    folder: Path, features: tfds.features.FeaturesDict, writers: dict[str, _SplitWriter]
) -> None:
    """`dataset_info.json` and `features.json`, which make the folder a TFDS dataset."""
    identity = tfds.core.DatasetIdentity(
        name=DATASET_NAME,
        version=tfds.core.Version(f"{SCHEMA_VERSION}.0.0"),
        data_dir=str(folder),
        module_name="loki_jax.data.records",  # as version 0.1.0 wrote it: equal clips give equal files
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description="Cropped frames of talking heads with parametric-head coefficients (loki_jax).",
        features=features,
        disable_shuffling=True,
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name=DATASET_NAME,
        filetype_suffix=tfds.core.FileFormat.ARRAY_RECORD.file_suffix,
    )
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=writer.lengths,
            num_bytes=sum(writer.payload),
            filename_template=template.replace(split=split),
        )
        for split, writer in writers.items()
        if writer.records
    ]
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(folder)


def _rows_to_json(rows: Sequence[ClipInfo]) -> str:
    """One line a row, with the columns in the order of version 0.1.0."""
    columns = ("clip_index", "clip_id", "identity", "fps", "length", "split", "first_record", "fit_quality",
               "source", "licence", "extra")  # fmt: skip
    values = [vars(row) | {"fps": row.fps.as_integer_ratio()} for row in rows]
    table = [{column: row[column] for column in columns} for row in values]
    return "[\n" + ",\n".join(map(json.dumps, table)) + "\n]\n"
