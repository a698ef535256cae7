"""Inputs of an animation: portraits and driving clips, from files, arrays, motions or clips of a dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, PyTree, UInt8

from loki_jax.data.reader import Dataset, open_dataset
from loki_jax.data.schema import ClipInfo, DatasetError, Frame
from loki_jax.face.asset import HeadAsset
from loki_jax.face.crop import crop_and_resize
from loki_jax.face.motion_file import Motion, read_motion, without_identity
from loki_jax.face.temporal import neutral_frame
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.clips import FittedClip, fit_image, fit_video
from loki_jax.video import Frames, LazyFrames, resample_indices

_NO_CUTS = np.zeros(0, np.int64)


class Portrait(NamedTuple):
    """A reference: one picture of a person and the head fitted to it.

    Attributes:
      image: the crop, RGB.
      coefficients: fields (n,), without a leading axis.
      camera: of the uncropped picture.
      crop: x0, y0, x1, y1 in pixels of the uncropped picture.
      name: file or clip, for messages.
      picture: the whole picture, RGB; None where only the crop is stored.
      landmarks: seen in the picture, in its pixels; None: no networks have seen it.
    """

    image: UInt8[np.ndarray, "s s 3"]
    coefficients: Coefficients
    camera: Camera
    crop: Float[np.ndarray, " 4"]
    name: str
    picture: UInt8[np.ndarray, "h w 3"] | None = None
    landmarks: Float[np.ndarray, "478 2"] | None = None


class DrivingClip(NamedTuple):
    """A driver: a clip and the head fitted to its frames.

    Attributes:
      frames: the crops (S, S, 3), RGB, for display; of a file decoded when they are asked for, of a motion
        file black.
      coefficients: fields (N, ...).
      camera: one for all frames, of the uncropped video.
      fps: exact frame rate.
      valid: frames whose face was found; the coefficients of others are interpolated.
      source: video file that has the audio; None for an array or a clip of a dataset.
      name: file or clip, for messages.
      start: time of the first frame in `source`, in seconds after its first picture.
      neutral: the frame in which the portrait has its own pose in relative mode; None: the first, as in the
        paper.
      cuts: first frames of other shots.
      crop: the box that `frames` show, x0, y0, x1, y1 in pixels of the uncropped video; None where the
        coefficients are not those of the frames.
    """

    frames: UInt8[np.ndarray, "n s s 3"] | LazyFrames
    coefficients: Coefficients
    camera: Camera
    fps: Fraction
    valid: Bool[np.ndarray, " n"]
    source: Path | None
    name: str
    start: Fraction = Fraction(0)
    neutral: int | None = None
    cuts: Int[np.ndarray, " c"] = _NO_CUTS
    crop: Float[np.ndarray, " 4"] | None = None

    def with_neutral(self, head: HeadAsset, neutral: int | None = None) -> DrivingClip:
        """The clip with a neutral frame; None: its own, or if it has none the one nearest to rest
        (`loki_jax.face.temporal.neutral_frame`).

        Raises:
          ValueError: no such frame.
        """
        if neutral is None:
            neutral = self.neutral
        if neutral is None:
            neutral = neutral_frame(head, self.coefficients, self.camera, self.valid)
        if not 0 <= neutral < len(self.valid):
            raise ValueError(
                f"{self.name}: no frame {neutral} to be the neutral one: it has {len(self.valid)} frames, "
                "counted from 0"
            )
        return self._replace(neutral=neutral)

    def motion(self, head: HeadAsset) -> Motion:
        """What a motion file keeps of the clip: how the head moves, not whose it is."""
        coefficients = without_identity(head, self.coefficients, self.camera)
        return Motion(coefficients, self.camera, self.fps, self.valid, self.cuts, self.neutral or 0)

    def cut(self, start: int, stop: int) -> DrivingClip:
        """Frames [start, stop) alone, without audio."""
        return self._take(slice(start, stop))._replace(source=None)

    def at_rate(self, fps: Fraction) -> DrivingClip:
        """The clip at another frame rate: at each time its nearest frame."""
        if fps == self.fps:
            return self
        return self._take(resample_indices(len(self.frames), self.fps, fps))._replace(fps=Fraction(fps))

    def _take(self, index: slice | Int[np.ndarray, " m"]) -> DrivingClip:
        coefficients = jax.tree.map(lambda x: x[index], self.coefficients)
        number = np.arange(len(self.valid))[index]  # they rise
        cuts = np.searchsorted(number, self.cuts)
        return self._replace(
            frames=self.frames[index],
            valid=self.valid[index],
            coefficients=coefficients,
            neutral=None if self.neutral is None else int(np.argmin(np.abs(number - self.neutral))),
            cuts=np.unique(cuts[(cuts > 0) & (cuts < len(number))]),
        )


def combine_drivers(expression: DrivingClip, pose: DrivingClip) -> DrivingClip:
    """A driver with the face of one clip (expression, jaw, gaze) and the head's pose of another one.

    It has the frame rate, sound and pictures of `expression` and ends with the shorter one. A clip of one
    frame, such as a picture, lasts as long as the other one.
    """
    pose = pose.at_rate(expression.fps)
    lengths = [len(clip.valid) for clip in (expression, pose)]
    length = max(lengths) if min(lengths) == 1 else min(lengths)
    expression, pose = (
        clip._take(np.minimum(np.arange(length), len(clip.valid) - 1)) for clip in (expression, pose)
    )
    face = expression.coefficients
    return expression._replace(
        coefficients=pose.coefficients._replace(expression=face.expression, jaw=face.jaw, eyes=face.eyes),
        camera=pose.camera,
        valid=expression.valid & pose.valid,
        neutral=pose.neutral,
        cuts=np.union1d(expression.cuts, pose.cuts).astype(np.int64),
        name=f"{expression.name} with the pose of {pose.name}",
        crop=None,
    )


def still_clip(portrait: Portrait, length: int, fps: Fraction) -> DrivingClip:
    """A driver that is the portrait itself and does not move: what sliders alone change."""
    coefficients = jax.tree.map(
        lambda x: np.repeat(np.asarray(x)[None], length, axis=0), portrait.coefficients
    )
    frames = np.broadcast_to(portrait.image, (length, *portrait.image.shape))
    valid = np.ones(length, bool)
    return DrivingClip(
        frames, coefficients, portrait.camera, fps, valid, None, portrait.name, crop=portrait.crop
    )


def stack_trees(trees: Sequence[PyTree]) -> PyTree:
    """Equal trees, for example portraits, as one whose (numpy) leaves have a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def fit_portrait(
    image: str | os.PathLike | UInt8[np.ndarray, "H W 3"], head: HeadAsset, size: int, **options: Any
) -> Portrait:
    """Fit a head to the face in a picture, by landmarks.

    Args:
      image: image file, or RGB array.
      size: edge of the portrait's crop in pixels: the `size` of the pipeline that animates it.
      options: `landmarker`, `face`, `focal`, `name` and others of `loki_jax.fitting.clips.fit_image`.

    Raises:
      MediaError, LandmarkError, FitError: unreadable picture, no (single) face, or a head without landmarks.
    """
    fitted = fit_image(image, head, **options)
    coefficients = jax.tree.map(lambda x: np.asarray(x)[0], fitted.fit.coefficients)
    crop = crop_and_resize(fitted.frames[0], fitted.crop, size)
    landmarks = fitted.track.points[0, :, :2]
    return Portrait(
        crop, coefficients, fitted.fit.camera, fitted.crop, fitted.name, fitted.frames[0], landmarks
    )


def fit_clip(video: str | os.PathLike | Frames, head: HeadAsset, size: int, **options: Any) -> DrivingClip:
    """Fit a head to the face in the longest shot of a clip, by landmarks, with one identity for all frames.

    Args:
      video: video file, read at its own frame rate unless `fps` is given; folder of pictures, or a picture
        (`LazyFrames`); or RGB frames with `fps`.
      size: edge of the crops in pixels.
      options: `fps`, `landmarker`, `face`, `all_shots`, `allow_lost`, `focal`, `name` and others of
        `loki_jax.fitting.clips.fit_video`.

    Raises:
      MediaError, LandmarkError, FitError: unreadable video, no face, or a head without landmarks.
      ValueError: frames without `fps`.
    """
    clip = driving_clip(fit_video(video, head, **options), size)
    sounds = isinstance(clip.frames, LazyFrames) and clip.frames.has_audio
    return clip._replace(source=Path(video)) if sounds and isinstance(video, str | os.PathLike) else clip


def driving_clip(fitted: FittedClip, size: int) -> DrivingClip:
    """A fitted clip as a driver without sound; `size`: edge of the crops in pixels."""
    crop = lambda frame: crop_and_resize(frame, fitted.crop, size)
    frames: np.ndarray | LazyFrames
    if isinstance(fitted.frames, LazyFrames):
        frames = fitted.frames.map(crop)
    else:
        frames = np.stack([crop(frame) for frame in fitted.frames])
    valid = np.asarray(fitted.fit.confidence) > 0
    return DrivingClip(
        frames, fitted.fit.coefficients, fitted.fit.camera, fitted.fps, valid, None, fitted.name,
        fitted.start / fitted.fps, cuts=fitted.track.cuts, crop=fitted.crop,
    )  # fmt: skip


def split_clip_source(source: str) -> tuple[Path, str] | None:
    """("folder", "clip id") of a source DATASET_FOLDER:CLIP_ID; None for anything else."""
    folder, colon, clip_id = source.rpartition(":")
    return (Path(folder), clip_id) if colon and Path(folder).is_dir() else None


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


def load_portrait(source: str, head: HeadAsset, size: int, frame: int = 0, **options: Any) -> Portrait:
    """A portrait from an image file (`fit_portrait`, with its options), or frame `frame` of
    DATASET_FOLDER:CLIP_ID as stored.

    Raises:
      MediaError, LandmarkError, DatasetError, FitError: unreadable, no face, no such clip.
    """
    found = split_clip_source(source)
    if found is None:
        return fit_portrait(source, head, size, **options)
    dataset, clip = find_clip(*found, head)
    record = dataset.read_clip(clip, frame, frame + 1)[0]
    image = _stored_image(record, clip, size)
    return Portrait(image, record.coefficients, record.camera, record.crop, clip.clip_id)


def load_driving_clip(source: str, head: HeadAsset, size: int, **options: Any) -> DrivingClip:
    """A driving clip from a file or folder (`fit_clip`, with its options), from a motion file (.npz) of this
    head, or DATASET_FOLDER:CLIP_ID as stored.

    Raises:
      MediaError, LandmarkError, DatasetError, FitError, MotionError: unreadable, no face, no such clip, a
        motion of another head.
    """
    found = split_clip_source(source)
    if found is None and Path(source).suffix.lower() == ".npz":
        moving = _clip_of_motion(source, read_motion(source, head), size)
        return moving if options.get("fps") is None else moving.at_rate(options["fps"])
    if found is None:
        return fit_clip(source, head, size, **options)
    dataset, clip = find_clip(*found, head)
    records = dataset.read(clip.split, clip.records, with_image=False)
    coefficients = stack_trees([record.coefficients for record in records])
    frames = LazyFrames.of(_StoredClip(dataset, clip, size))
    valid = np.array([record.confidence > 0 for record in records])
    stored = DrivingClip(
        frames, coefficients, records[0].camera, clip.fps, valid, None, clip.clip_id, crop=records[0].crop
    )
    return stored if options.get("fps") is None else stored.at_rate(options["fps"])


def _clip_of_motion(name: str, motion: Motion, size: int) -> DrivingClip:
    black = np.broadcast_to(np.zeros((), np.uint8), (len(motion.valid), size, size, 3))
    return DrivingClip(
        black, motion.coefficients, motion.camera, motion.fps, motion.valid, None, name,
        neutral=motion.neutral, cuts=motion.cuts,
    )  # fmt: skip


class _StoredClip:
    """Pictures of a clip of a dataset, read when they are asked for; the first at once, as a check."""

    has_audio = False

    def __init__(self, dataset: Dataset, clip: ClipInfo, size: int):
        self.fps, self._dataset, self._clip, self._size = clip.fps, dataset, clip, size
        self.frame(0)

    def __len__(self) -> int:
        return self._clip.length

    def frame(self, index: int) -> np.ndarray:
        (record,) = self._dataset.read_clip(self._clip, index, index + 1)
        return _stored_image(record, self._clip, self._size)


def _stored_image(frame: Frame, clip: ClipInfo, size: int) -> UInt8[np.ndarray, "size size 3"]:
    if frame.image is None:
        raise DatasetError(f"clip {clip.clip_id!r} is stored as latents only. Build the dataset with images.")
    whole = np.array([0, 0, frame.image.shape[1], frame.image.shape[0]], np.float64)
    return frame.image if frame.image.shape[0] == size else crop_and_resize(frame.image, whole, size)
