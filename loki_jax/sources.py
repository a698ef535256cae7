from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from loki_jax.data.reader import Dataset, open_dataset
from loki_jax.data.schema import ClipInfo, DatasetError, Frame
from loki_jax.face.asset import HeadAsset
from loki_jax.face.crop import crop_and_resize
from loki_jax.face.types import Camera, Coefficients
from loki_jax.video.reader import MediaError


class Portrait(NamedTuple):
    """A reference: `image` is its crop; coefficients (n,), camera and crop (4,) are unbatched."""

    image: UInt8[np.ndarray, "s s 3"]
    coefficients: Coefficients
    camera: Camera
    crop: Float[np.ndarray, " 4"]
    name: str


class DrivingClip(NamedTuple):
    """A driver: coefficients (N, ...), its camera unbatched, its crop's frames for display.

    `source` is the file that rate and audio come from; None for a clip of a dataset, which has no audio.
    `valid` marks frames whose face was found.
    """

    frames: UInt8[np.ndarray, "n s s 3"]
    coefficients: Coefficients
    camera: Camera
    fps: Fraction
    valid: Float[np.ndarray, " n"]
    source: Path | None
    name: str


def split_clip_source(source: str) -> tuple[Path, str] | None:
    """("folder", "clip id") of a source DATASET_FOLDER:CLIP_ID; None for anything else."""
    folder, colon, clip_id = source.rpartition(":")
    if not colon or not Path(folder).is_dir():
        return None
    return Path(folder), clip_id


def find_clip(folder: Path, clip_id: str, head: HeadAsset) -> tuple[Dataset, ClipInfo]:
    """The clip `clip_id` of the dataset at `folder`.

    Raises:
      DatasetError: no such dataset or clip, or the dataset's coefficients belong to another head.
    """
    dataset = open_dataset(folder)
    stored = dataset.head()
    if stored.template.shape != head.template.shape or not np.allclose(
        stored.template, head.template, atol=1e-6
    ):
        raise DatasetError(
            f"{folder}: its coefficients belong to the head {stored.name!r}, "
            f"the checkpoint to {head.name!r}. Build the dataset with the checkpoint's head."
        )
    for clip in dataset.clips:
        if clip.clip_id == clip_id:
            return dataset, clip
    names = ", ".join(clip.clip_id for clip in dataset.clips[:8])
    raise DatasetError(
        f"{folder}: has no clip {clip_id!r}. Its clips: {names}{', ...' * (len(dataset.clips) > 8)}"
    )


def fit_portrait(path: str, head: HeadAsset):
    """`loki_jax.fitting.clips.fit_image` of a file; the networks load on first use."""
    from loki_jax.fitting.clips import fit_image
    from loki_jax.fitting.model_files import LandmarkError

    try:
        return fit_image(path, head)
    except LandmarkError as error:
        raise MediaError(str(error)) from error


def fit_clip(path: str, head: HeadAsset):
    """`loki_jax.fitting.clips.fit_video` of a file, at its own frame rate."""
    from loki_jax.fitting.clips import fit_video
    from loki_jax.fitting.model_files import LandmarkError

    try:
        return fit_video(path, head)
    except LandmarkError as error:
        raise MediaError(str(error)) from error


def load_portrait(source: str, head: HeadAsset, size: int, frame: int = 0) -> Portrait:
    """Read a reference from an image file (fitted) or from frame `frame` of a dataset's clip.

    Raises:
      MediaError, DatasetError, FitError: unreadable, no such clip, or no face.
    """
    found = split_clip_source(source)
    if found is None:
        fitted = fit_portrait(source, head)
        coefficients = jax.tree.map(lambda x: np.asarray(x)[0], fitted.fit.coefficients)
        image = crop_and_resize(fitted.frames[0], fitted.crop, size)
        return Portrait(image, coefficients, fitted.fit.camera, fitted.crop, source)
    dataset, clip = find_clip(*found, head)
    record = dataset.read_clip(clip, frame, frame + 1)[0]
    image = _stored_image(record, clip, size)
    return Portrait(image, record.coefficients, record.camera, record.crop, clip.clip_id)


def stack_portraits(portraits: Sequence[Portrait]) -> Portrait:
    """Portraits as one whose arrays have a leading axis."""
    arrays = [portrait._replace(name=()) for portrait in portraits]
    stacked = jax.tree.map(lambda *x: np.stack([np.asarray(v) for v in x]), *arrays)
    return stacked._replace(name=", ".join(portrait.name for portrait in portraits))


def load_driving_clip(source: str, head: HeadAsset, size: int) -> DrivingClip:
    """Read a driver from a video file (fitted) or a dataset's clip.

    Raises:
      MediaError, DatasetError, FitError: unreadable, no such clip, or no face.
    """
    found = split_clip_source(source)
    if found is None:
        fitted = fit_clip(source, head)
        frames = np.stack([crop_and_resize(frame, fitted.crop, size) for frame in fitted.frames])
        valid = np.asarray(fitted.fit.confidence) > 0
        return DrivingClip(
            frames, fitted.fit.coefficients, fitted.fit.camera, fitted.fps, valid, Path(source), source
        )
    dataset, clip = find_clip(*found, head)
    records = dataset.read_clip(clip)
    coefficients = jax.tree.map(lambda *x: np.stack(x), *(record.coefficients for record in records))
    frames = np.stack([_stored_image(record, clip, size) for record in records])
    valid = np.array([record.confidence > 0 for record in records])
    return DrivingClip(frames, coefficients, records[0].camera, clip.fps, valid, None, clip.clip_id)


def _stored_image(frame: Frame, clip: ClipInfo, size: int) -> UInt8[np.ndarray, "size size 3"]:
    if frame.image is None:
        raise DatasetError(f"clip {clip.clip_id!r} is stored as latents only. Build the dataset with images.")
    whole = np.array([0, 0, frame.image.shape[1], frame.image.shape[0]], np.float64)
    return frame.image if frame.image.shape[0] == size else crop_and_resize(frame.image, whole, size)
