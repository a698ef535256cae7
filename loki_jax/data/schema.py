"""What a dataset holds: clips and their table, metadata, the features of a record, and training batches.

A dataset is one folder, `data.path` of the configs:

    dataset_info.json, features.json    TFDS's own description: any TFDS user can open the folder
    loki-train.array_record-00000-of-00003 ...    one record a frame, clips one after another
    metadata.json     schema version, sizes, head hash, size of every shard
    clips.json        the clip table
    head.npz          the head asset whose coefficients the records hold

`writer` makes such a folder, `reader` opens it, `windows` and `iterator` make batches of it. None of them
imports TensorFlow. `docs/data.md` describes every field. Method, section 8.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import BFloat16, Float, Int32, UInt8

from loki_jax.arrays import ArrayLike
from loki_jax.face.types import Camera, Coefficients

SCHEMA_VERSION = 1
SPLITS = ("train", "validation")

DATASET_NAME = "loki"  # TFDS's name of the dataset, with which the names of shards begin
HEAD_FILE = "head.npz"
METADATA_FILE = "metadata.json"
CLIPS_FILE = "clips.json"

# Names of the coefficients in a record, in the order of `Coefficients`. On disk `betas` is called "shape".
COEFFICIENT_FEATURES = ("shape", *Coefficients._fields[1:])


class DatasetError(ValueError):
    """A dataset folder is missing, damaged or of another version, or clips do not fit the schema.

    The message names the file and what to do about it.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipFacts:
    """What is known of a clip as a whole: N consecutive frames of one person.

    Attributes:
      clip_id: unique name within the dataset.
      identity: who it is; one identity is never in both splits.
      fps: exact frame rate.
      split: "train" or "validation".
      source: where the frames come from (file name, URL, "data_prep.synth").
      licence: licence of the frames.
      fit_quality: one number for the clip (mean reprojection error in pixels); None: not fitted.
      extra: anything else worth keeping that JSON can hold (`identity_seed` of synthetic clips).
    """

    clip_id: str
    identity: str
    fps: Fraction
    split: str
    source: str
    licence: str
    fit_quality: float | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """The attributes above, as arguments of another kind of clip."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(ClipFacts)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip(ClipFacts):
    """A clip on its way into a dataset.

    Attributes:
      coefficients: fields (N, n); `betas` may be (n_shape,), the same for all frames.
      camera: intrinsics (4,) or (N, 4) in pixels of the uncropped frame; extrinsics (4, 4) or (N, 4, 4).
      crop: (4,) or (N, 4) box x0, y0, x1, y1 in pixels of the uncropped frame; the stored image is
        this box resized to image_size. One box a clip, except in data for the `official` variant.
      images: N cropped frames, (S, S, 3) uint8 RGB each, or bytes already encoded as the dataset's
        image format. Any iterable: it is read once, frame by frame. None: latents only.
      latent_mean, latent_logvar: (N, h, w, c) moments of the VAE posterior of the same frames (not
        multiplied by the scale factor), stored as bfloat16; both or neither.
      confidence: (N,) in [0, 1], quality of the fit for each frame; None: 1 everywhere.
    """

    coefficients: Coefficients
    camera: Camera
    crop: Float[np.ndarray, ...]
    images: Iterable[UInt8[np.ndarray, "S S 3"] | bytes] | None
    latent_mean: Float[np.ndarray, "N h w c"] | None = None
    latent_logvar: Float[np.ndarray, "N h w c"] | None = None
    confidence: Float[np.ndarray, " N"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipInfo(ClipFacts):
    """One row of the clip table."""

    clip_index: int
    length: int
    first_record: int

    @property
    def records(self) -> range:
        """The numbers of its records, one a frame, in its split."""
        return range(self.first_record, self.first_record + self.length)


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What holds for the whole dataset.

    `shards` maps each shard file to (records, size in bytes), so that a truncated copy is noticed
    when the dataset is opened. `latent_shape` is (h, w, c) or None; `image_format` "png", "jpeg" or None.
    """

    schema_version: int
    code_version: str
    head_sha256: str
    head_name: str
    head_licence: str
    image_size: int
    image_format: str | None
    latent_shape: tuple[int, int, int] | None
    n_shape: int
    n_expression: int
    records: dict[str, int]
    shards: dict[str, tuple[int, int]]


class Frame(NamedTuple):
    """One record, decoded. `image` is RGB or None; the latent moments may be None.

    Several frames as one (`stack_frames`) have a leading axis T everywhere.
    """

    clip_index: int
    frame_index: int
    image: UInt8[np.ndarray, "*T S S 3"] | None
    latent_mean: BFloat16[np.ndarray, "*T h w c"] | None
    latent_logvar: BFloat16[np.ndarray, "*T h w c"] | None
    coefficients: Coefficients
    camera: Camera
    crop: Float[np.ndarray, "*T 4"]
    confidence: Float[np.ndarray, "*T"]


class DriverWindow(NamedTuple):
    """Frames of somebody who performs a window: fields as those of `Batch`."""

    frames: UInt8[ArrayLike, "*B T S S 3"] | None
    coefficients: Coefficients  # (B, T, n)
    camera: Camera  # (B, T, ...)
    crop: Float[ArrayLike, "*B T 4"]


class Batch(NamedTuple):
    """Windows of T consecutive frames of one clip each, with a reference frame of the same clip.

    NumPy arrays as read, `jax.Array` in the train step. B windows, S image size, (h, w, c) latent shape; a
    single window lacks B. Images are None where only latents are read, latents where the shards hold none.

    Attributes:
      camera, crop: of the window's frames; reference_camera, reference_crop: of the reference frame.
      confidence: quality of the fit in [0, 1].
      clip_index: row of the clip table.
      frame_index, reference_index: frame numbers within the clip.
      frames, reference: RGB.
      latent_mean, latent_logvar: moments of the VAE posterior, not multiplied by the scale factor.
      driver: another person who performs the window, where such pairs are read.
    """

    coefficients: Coefficients  # (B, T, n)
    reference_coefficients: Coefficients  # (B, n)
    camera: Camera  # (B, T, ...)
    crop: Float[ArrayLike, "*B T 4"]
    confidence: Float[ArrayLike, "*B T"]
    clip_index: Int32[ArrayLike, "*B"]
    frame_index: Int32[ArrayLike, "*B T"]
    reference_index: Int32[ArrayLike, "*B"]
    reference_camera: Camera  # (B, ...)
    reference_crop: Float[ArrayLike, "*B 4"]
    frames: UInt8[ArrayLike, "*B T S S 3"] | None = None
    reference: UInt8[ArrayLike, "*B S S 3"] | None = None
    latent_mean: BFloat16[ArrayLike, "*B T h w c"] | None = None
    latent_logvar: BFloat16[ArrayLike, "*B T h w c"] | None = None
    reference_latent_mean: BFloat16[ArrayLike, "*B h w c"] | None = None
    reference_latent_logvar: BFloat16[ArrayLike, "*B h w c"] | None = None
    driver: DriverWindow | None = None


def float_features(n_shape: int, n_expression: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a record holds as float32."""
    return {
        "shape": (n_shape,),
        "expression": (n_expression,),
        **{name: (3,) for name in COEFFICIENT_FEATURES[2:]},
        "intrinsics": (4,),
        "extrinsics": (4, 4),
        "crop": (4,),
        "confidence": (),
    }


def record_features(
    n_shape: int,
    n_expression: int,
    image_size: int,
    image_format: str | None,
    latent_shape: tuple[int, int, int] | None,
) -> tfds.features.FeaturesDict:
    """The TFDS features of a record; what is stored under which name."""
    features: dict[str, Any] = {
        "clip_id": tfds.features.Text(),
        "clip_index": tfds.features.Tensor(shape=(), dtype=np.int32),
        "frame_index": tfds.features.Tensor(shape=(), dtype=np.int32),
    }
    for name, shape in float_features(n_shape, n_expression).items():
        features[name] = tfds.features.Tensor(shape=shape, dtype=np.float32)
    if image_format is not None:
        features["image"] = tfds.features.Image(
            shape=(image_size, image_size, 3), encoding_format=image_format
        )
    if latent_shape is not None:
        for name in ("latent_mean", "latent_logvar"):
            features[name] = tfds.features.Tensor(
                shape=latent_shape, dtype=ml_dtypes.bfloat16, encoding="bytes"
            )
    return tfds.features.FeaturesDict(features)


def assign_split(identity: str, validation_share: float = 0.02, seed: int = 0) -> str:
    """ "train" or "validation", a fixed function of the identity's name: all its clips go together."""
    digest = hashlib.sha256(f"{seed}/{identity}".encode()).digest()
    return SPLITS[int.from_bytes(digest[:8], "big") < validation_share * 2**64]
