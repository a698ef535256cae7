from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from loki_jax.face.asset import HeadAsset
from loki_jax.face.skinning import make_identity
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.photometric import fit_photometric_clips
from loki_jax.metrics.hef import HeadExpressionFollow, head_expression_follow
from loki_jax.metrics.hpf import HeadPoseFollow, head_pose_follow, head_rotation
from loki_jax.metrics.image import psnr, ssim
from loki_jax.sources import DrivingClip, Portrait
from loki_jax.synthetic.appearance import Appearance
from loki_jax.synthetic.shading import render

_RENDER_CHUNK = 16  # frames at a time


class Following(NamedTuple):
    """How a prediction follows a target: pose and expression."""

    pose: HeadPoseFollow
    expression: HeadExpressionFollow


def measure_following(
    head: HeadAsset,
    prediction: Coefficients,
    target: Coefficients,
    camera: Camera,
    size: int = 512,
    prediction_valid: np.ndarray | None = None,
    target_valid: np.ndarray | None = None,
) -> Following:
    """HPF and HEF of fitted coefficients (n, ...) behind a driver's; `camera` is the driver's.

    Frames that were not tracked in both count in neither measure.
    """
    to_numpy = lambda tree: jax.tree.map(np.asarray, tree)
    prediction, target = to_numpy(prediction), to_numpy(target)
    pose = head_pose_follow(
        prediction.rot, target.rot, prediction.neck, target.neck,
        pred_valid=prediction_valid, target_valid=target_valid,
    )  # fmt: skip
    tracked = np.flatnonzero(np.isfinite(pose.per_frame))
    pick = lambda tree: jax.tree.map(lambda x: x[tracked], tree)
    return Following(pose, head_expression_follow(head, pick(prediction), pick(target), camera, size=size))


def rendered_truth(
    head: HeadAsset, coefficients: Coefficients, reference: Portrait, appearance: Appearance, size: int
) -> UInt8[np.ndarray, "n s s 3"]:
    """A perfect animation: the reference's identity and appearance under `coefficients` (n, ...)."""
    length = len(coefficients.expression)
    pieces = []
    for start in range(0, length, _RENDER_CHUNK):
        index = np.minimum(np.arange(start, start + _RENDER_CHUNK), length - 1)
        part = jax.tree.map(lambda x, index=index: jnp.asarray(x)[index], coefficients)
        piece = _render_chunk(head, part, reference.camera, reference.crop, appearance, size)
        pieces.append(np.asarray(piece)[: length - start])
    return np.concatenate(pieces)


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


def evaluate_pairs(
    head: HeadAsset,
    pairs: Sequence[EvaluationPair],
    swapped: Sequence[UInt8[np.ndarray, "n s s 3"]] | None = None,
    size: int = 512,
) -> dict[str, Any]:
    """Rows *generated*, *static* and *refit* of pairs with equally long drivers.

    "static" repeats the reference image (what a method that does nothing scores), "refit" is the
    rendered truth itself (what the ruler can resolve). All three are videos that are read back by the
    same photometric fit, which knows the reference's identity and appearance, and starts from the
    neutral head.

    Args:
      swapped: for each pair the animation made with another pair's reference image.
      size: edge of HEF's renders.

    Returns:
      {"generated": {"hpf", "hef", "psnr", "ssim", "absolute_pose"}, "static", "refit", "pairs": [...],
      "generated_swapped_reference": {"psnr", "ssim"}, "per_frame": {row: [[degrees]]}, "hef_size"}; degrees
      and dB. PSNR and SSIM are against `truth`; those of "refit" are of the render of what was read back.
    """
    videos = {
        "generated": [pair.generated for pair in pairs],
        "static": [np.broadcast_to(pair.reference.image, pair.truth.shape) for pair in pairs],
        "refit": [pair.truth for pair in pairs],
    }
    together = lambda items: jax.tree.map(lambda *x: np.stack([np.asarray(v) for v in x]), *items)
    known = (
        together([np.asarray(pair.reference.coefficients.betas) for pair in pairs]),
        together([pair.appearance for pair in pairs]),
        together([pair.reference.camera for pair in pairs]),
        np.stack([pair.reference.crop for pair in pairs]),
    )
    table = [
        {
            "reference": pair.reference.name,
            "driver": pair.driver.name,
            "frames": len(pair.truth),
            "driver_yaw_sd": float(driver_yaw(pair.driver).std()),
        }
        for pair in pairs
    ]
    per_frame: dict[str, list] = {}
    for row, frames in videos.items():
        # One call for each row: equal shapes compile once.
        shape, appearance, camera, crop = known
        fitted, residual = fit_photometric_clips(np.stack(frames), head, shape, appearance, camera, crop)
        fitted = jax.tree.map(np.asarray, fitted)
        per_frame[row] = []
        for i, pair in enumerate(pairs):
            one = jax.tree.map(lambda x, i=i: x[i], fitted)
            following = measure_following(head, one, pair.driver.coefficients, pair.driver.camera, size)
            entry = {
                "hpf": following.pose.degrees,
                "hef": following.expression.distance,
                "absolute_pose": following.pose.absolute_degrees,
                "fit_residual": float(residual[i].mean()),
            }
            shown = frames[i]
            if row == "refit":
                # The truth itself has no finite PSNR; what the ruler saw in it has.
                shown = rendered_truth(head, one, pair.reference, pair.appearance, pair.truth.shape[1])
            entry |= image_scores(shown, pair.truth)
            table[i][row] = entry
            per_frame[row].append(following.pose.per_frame.tolist())
    if swapped is not None:
        for i, (pair, frames) in enumerate(zip(pairs, swapped, strict=True)):
            table[i]["generated_swapped_reference"] = image_scores(frames, pair.truth)
    rows = [row for row in (*videos, "generated_swapped_reference") if row in table[0]]
    means = {
        row: {key: float(np.mean([e[row][key] for e in table])) for key in table[0][row]} for row in rows
    }
    return means | {"pairs": table, "per_frame": per_frame, "hef_size": size}


def image_scores(
    frames: UInt8[np.ndarray, "n s s 3"], truth: UInt8[np.ndarray, "n s s 3"]
) -> dict[str, float]:
    """Mean PSNR (of finite ones) and SSIM over frames."""
    ratios = np.asarray(psnr(frames, truth))
    finite = ratios[np.isfinite(ratios)]
    return {
        "psnr": float(finite.mean()) if len(finite) else None,
        "ssim": float(np.mean(ssim(frames, truth))),
    }


def driver_yaw(driver: DrivingClip) -> Float[np.ndarray, " n"]:
    """Yaw of the head in degrees: the direction of the face's z axis about the vertical."""
    forward = head_rotation(driver.coefficients.rot, driver.coefficients.neck).as_matrix()[:, :, 2]
    return np.degrees(np.arctan2(forward[:, 0], forward[:, 2]))
