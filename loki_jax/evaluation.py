"""Measures of animations: against their drivers, and against the truth where it can be rendered."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy.spatial.transform import Rotation

from loki_jax.data.schema import DatasetError
from loki_jax.face.asset import HeadAsset
from loki_jax.face.crop import crop_and_resize
from loki_jax.face.skinning import make_identity
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.photometric import fit_photometric, fit_photometric_clips
from loki_jax.metrics.hef import HeadExpressionFollow, head_expression_follow
from loki_jax.metrics.hpf import HeadPoseFollow, head_pose_follow, head_rotation
from loki_jax.metrics.image import psnr, ssim
from loki_jax.sources import (
    DrivingClip,
    Portrait,
    find_clip,
    fit_clip,
    load_portrait,
    split_clip_source,
    stack_trees,
)
from loki_jax.synthetic.appearance import Appearance, sample_appearance
from loki_jax.synthetic.shading import render
from loki_jax.video import Frames, LazyFrames

LARGEST_FIT = 128  # pixels: photometric fits of larger frames take longer and gain nothing
_RENDER_CHUNK = 16  # frames at a time


class Following(NamedTuple):
    """How a prediction follows a target: pose and expression."""

    pose: HeadPoseFollow
    expression: HeadExpressionFollow

    def scores(self) -> dict[str, float | None]:
        """The means, as programs write them; degrees, and HEF."""
        return {
            "hpf": self.pose.degrees,
            "hpf_aligned": self.pose.aligned_degrees,
            "absolute_pose": self.pose.absolute_degrees,
            "hef": self.expression.distance,
        }


def measure_following(
    head: HeadAsset,
    prediction: Coefficients,
    target: Coefficients,
    camera: Camera,
    size: int = 512,
    prediction_valid: Bool[np.ndarray, " n"] | None = None,
    target_valid: Bool[np.ndarray, " m"] | None = None,
    prediction_camera: Camera | None = None,
) -> Following:
    """HPF and HEF of fitted coefficients against a driver's; frames not tracked in both count in neither.

    Args:
      prediction, target: fields (n, ...); `target` is the driver's, and so is `camera`.
      size: edge of HEF's renders in pixels.
      prediction_valid, target_valid: which frames were tracked; None: all.
      prediction_camera: the prediction's; None: one whose extrinsics do not turn the world.
    """
    pose = head_pose_follow(
        np.asarray(prediction.rot), np.asarray(target.rot),
        np.asarray(prediction.neck), np.asarray(target.neck),
        pred_valid=prediction_valid, target_valid=target_valid,
        pred_extrinsics=None if prediction_camera is None else np.asarray(prediction_camera.extrinsics),
        target_extrinsics=np.asarray(camera.extrinsics),
    )  # fmt: skip
    tracked = np.flatnonzero(np.isfinite(pose.per_frame))
    pick = lambda tree: jax.tree.map(lambda x: np.asarray(x)[tracked], tree)
    return Following(pose, head_expression_follow(head, pick(prediction), pick(target), camera, size=size))


class Reading(NamedTuple):
    """A head as an estimator reads it from the frames of an animation.

    Attributes:
      coefficients: fields (n, ...).
      valid: frames whose face was found.
      camera: of the frames.
    """

    coefficients: Coefficients
    valid: Bool[np.ndarray, " n"]
    camera: Camera

    def following(self, head: HeadAsset, driver: DrivingClip, size: int = 512) -> Following:
        """HPF and HEF against a driver of the same frame rate; `size`: edge of HEF's renders in pixels."""
        return measure_following(
            head, self.coefficients, driver.coefficients, driver.camera, size, self.valid, driver.valid,
            self.camera,
        )  # fmt: skip


def read_animation(
    frames: LazyFrames, head: HeadAsset, known: tuple[Portrait, Appearance] | None = None, **options: Any
) -> Reading:
    """The head in the frames of an animation.

    Args:
      known: portrait and appearance of a synthetic head (`known_appearance`), which is read by photometric
        fitting; None: a person, read by landmarks.
      options: of `fit_clip`, for a person.

    Raises:
      LandmarkError, FitError: no face in the frames.
      ValueError: frames of a synthetic head that are not square.
    """
    if known is not None:
        fitted = fit_animation(frames, head, *known)
        return Reading(fitted, np.ones(len(frames), bool), known[0].camera)
    # What is lost counts in the track rate; a cut within a result is its fault.
    options = {"fps": frames.fps, "all_shots": True, "allow_lost": True} | options
    clip = fit_clip(frames, head, LARGEST_FIT, **options)
    return Reading(clip.coefficients, clip.valid, clip.camera)


def known_appearance(source: str, head: HeadAsset) -> tuple[Portrait, Appearance]:
    """Portrait and appearance of a clip of synthetic heads, DATASET_FOLDER:CLIP_ID.

    Raises:
      DatasetError: no such clip, or its appearance is unknown.
    """
    found = split_clip_source(source)
    if found is None:
        raise DatasetError(
            f"{source}: not DATASET_FOLDER:CLIP_ID. Only synthetic heads have a known appearance; leave the "
            "reference out to judge a real video by landmarks."
        )
    dataset, clip = find_clip(*found, head)
    if "identity_seed" not in clip.extra:
        raise DatasetError(
            f"{found[0]}: clip {clip.clip_id!r} is not of `python -m data_prep.synth`: "
            "its appearance is unknown."
        )
    portrait = load_portrait(source, head, dataset.metadata.image_size)
    return portrait, sample_appearance(clip.extra["identity_seed"], head)


def fit_animation(
    frames: Frames, head: HeadAsset, portrait: Portrait, appearance: Appearance
) -> Coefficients:
    """Coefficients (n, ...) of the frames (h, w, 3) of an animation, by photometric fitting.

    Identity, camera and crop are those of the portrait; the fit starts from the neutral head.

    Raises:
      ValueError: the frames are not square.
    """
    height, width = frames[0].shape[:2]
    if height != width:
        raise ValueError(f"{width}x{height} pixels, but an animation of a crop is square")
    if height > LARGEST_FIT:
        whole = np.array([0, 0, width, height], np.float64)
        frames = np.stack([crop_and_resize(frame, whole, LARGEST_FIT) for frame in frames])
    coefficients, _ = fit_photometric(
        np.stack(list(frames)), head, portrait.coefficients.betas, appearance, portrait.camera, portrait.crop
    )
    return coefficients


def rendered_truth(
    head: HeadAsset, coefficients: Coefficients, reference: Portrait, appearance: Appearance, size: int
) -> UInt8[np.ndarray, "n s s 3"]:
    """A perfect animation: renders of the reference's head and appearance with `coefficients` (n, ...)."""
    return np.stack(list(rendered_frames(head, coefficients, reference, appearance, size)))


def rendered_frames(
    head: HeadAsset, coefficients: Coefficients, reference: Portrait, appearance: Appearance, size: int
) -> Iterator[UInt8[np.ndarray, "s s 3"]]:
    """The frames of `rendered_truth`, a few at a time."""
    length = len(coefficients.expression)
    for start in range(0, length, _RENDER_CHUNK):
        index = np.minimum(np.arange(start, start + _RENDER_CHUNK), length - 1)
        part = jax.tree.map(lambda x, index=index: jnp.asarray(x)[index], coefficients)
        piece = _render_chunk(head, part, reference.camera, reference.crop, appearance, size)
        yield from np.asarray(piece)[: length - start]


@functools.partial(jax.jit, static_argnames="size")
def _render_chunk(head, coefficients, camera, crop, appearance, size):
    identity = make_identity(head, coefficients.betas[:1])
    images = render(head, identity, coefficients, camera, crop, appearance, size)
    return jnp.round(255 * images).astype(jnp.uint8)


class EvaluationPair(NamedTuple):
    """A reference of known appearance, a driver of known coefficients, and frames to judge.

    `generated` are the animation's frames, `truth` the render it should equal (`rendered_truth`).
    """

    reference: Portrait
    appearance: Appearance
    driver: DrivingClip
    generated: UInt8[np.ndarray, "n s s 3"]
    truth: UInt8[np.ndarray, "n s s 3"]


def synthetic_pairs(
    head: HeadAsset,
    pairs: Sequence[tuple[Portrait, DrivingClip, int]],
    coefficients: Coefficients,
    generated: UInt8[np.ndarray, "b n s s 3"],
) -> list[EvaluationPair]:
    """Pairs of (reference, driver, seed of the reference's appearance) with the renders they should equal.

    Args:
      coefficients: retargeted, (b, n, ...).
    """
    judged = []
    for i, (portrait, driver, seed) in enumerate(pairs):
        appearance = sample_appearance(seed, head)
        own = type(coefficients)(*(field[i] for field in coefficients))
        truth = rendered_truth(head, own, portrait, appearance, generated.shape[-2])
        judged.append(EvaluationPair(portrait, appearance, driver, generated[i], truth))
    return judged


def evaluate_pairs(
    head: HeadAsset,
    pairs: Sequence[EvaluationPair],
    swapped: Sequence[UInt8[np.ndarray, "n s s 3"]] | None = None,
    size: int = 512,
) -> dict[str, Any]:
    """Rows *generated*, *static* and *refit* of pairs with equally long drivers.

    "static" repeats the reference image (what a method that does nothing scores). "refit" is the rendered
    truth itself (what the estimator can resolve). All three are videos that are read back by the same
    photometric fit, which knows the reference's identity and appearance and starts from the neutral head.

    Args:
      swapped: for each pair the animation made with another pair's reference image.
      size: edge of HEF's renders in pixels.

    Returns:
      {"generated": {"hpf", "hpf_aligned", "hef", "psnr", "ssim",
      "absolute_pose"}, "static", "refit", "pairs": [...],
      "generated_swapped_reference": {"psnr", "ssim"}, "per_frame": {row: [[degrees]]}, "hef_size"}; degrees
      and dB. PSNR and SSIM are against `truth`; those of "refit" are of the render of what was read back.
    """
    videos = {
        "generated": [pair.generated for pair in pairs],
        "static": [np.broadcast_to(pair.reference.image, pair.truth.shape) for pair in pairs],
        "refit": [pair.truth for pair in pairs],
    }
    references = stack_trees([pair.reference for pair in pairs])
    appearances = stack_trees([pair.appearance for pair in pairs])
    table: list[dict[str, Any]] = [
        {
            "reference": pair.reference.name,
            "driver": pair.driver.name,
            "frames": len(pair.truth),
            "driver_yaw_sd": float(driver_yaw(pair.driver).std()),
        }
        for pair in pairs
    ]
    per_frame: dict[str, list] = {}
    for row in videos:
        # One call for each row: equal shapes compile once.
        fitted, residual = fit_photometric_clips(
            np.stack(videos[row]), head, references.coefficients.betas, appearances,
            references.camera, references.crop,
        )  # fmt: skip
        fitted = jax.tree.map(np.asarray, fitted)
        per_frame[row] = []
        for i, pair in enumerate(pairs):
            one = jax.tree.map(lambda x, i=i: x[i], fitted)
            following = measure_following(
                head, one, pair.driver.coefficients, pair.driver.camera, size,
                prediction_camera=pair.reference.camera,
            )  # fmt: skip
            shown = videos[row][i]
            if row == "refit":
                # The truth itself has no finite PSNR; what the estimator sees in it has.
                shown = rendered_truth(head, one, pair.reference, pair.appearance, pair.truth.shape[1])
            entry = following.scores() | {"fit_residual": float(residual[i].mean())}
            table[i][row] = entry | image_scores(shown, pair.truth).means()
            per_frame[row].append(following.pose.per_frame.tolist())
    if swapped is not None:
        for i, (pair, frames) in enumerate(zip(pairs, swapped, strict=True)):
            table[i]["generated_swapped_reference"] = image_scores(frames, pair.truth).means()
    rows = [row for row in (*videos, "generated_swapped_reference") if row in table[0]]
    means = {
        row: {key: float(np.mean([e[row][key] for e in table])) for key in table[0][row]} for row in rows
    }
    return means | {"pairs": table, "per_frame": per_frame, "hef_size": size}


class ImageScores(NamedTuple):
    """Scores of each frame of a video against the frame it should be."""

    psnr: Float[np.ndarray, " n"]
    ssim: Float[np.ndarray, " n"]

    def means(self) -> dict[str, float | None]:
        """As programs write them: PSNR in dB, of frames where it is finite, and SSIM."""
        finite = self.psnr[np.isfinite(self.psnr)]
        return {"psnr": float(finite.mean()) if len(finite) else None, "ssim": float(self.ssim.mean())}


def image_scores(
    frames: Iterable[UInt8[np.ndarray, "h w 3"]], truth: Iterable[UInt8[np.ndarray, "h w 3"]]
) -> ImageScores:
    """PSNR and SSIM of each frame, one after another; of unequally many the first ones."""
    # Fetched one by one: pictures would be held until the device gets to them.
    scores = [[float(score) for score in _frame_scores(*pair)] for pair in zip(frames, truth, strict=False)]
    return ImageScores(*np.array(scores, np.float32).reshape(-1, 2).T)


@jax.jit
def _frame_scores(frame, truth):
    return psnr(frame, truth), ssim(frame, truth)


def driver_rotation(driver: DrivingClip) -> Rotation:
    """World rotations of the head in all frames."""
    return head_rotation(np.asarray(driver.coefficients.rot), np.asarray(driver.coefficients.neck))


def driver_yaw(driver: DrivingClip) -> Float[np.ndarray, " n"]:
    """Yaw of the head in degrees: the direction of the face's z axis about the vertical."""
    forward = driver_rotation(driver).as_matrix()[:, :, 2]
    return np.degrees(np.arctan2(forward[:, 0], forward[:, 2]))
