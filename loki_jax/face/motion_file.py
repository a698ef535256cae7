"""Motion files (.npz): how a head moves in a clip, without its pictures and without whose head it is.

A motion belongs to one parametric head: its coefficients mean nothing for another one. It holds no picture,
no name of a file, and no identity coefficients.
"""

from __future__ import annotations

import hashlib
import json
import os
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from loki_jax.face.asset import HeadAsset, HeadAssetError, read_npz, reading, write_npz
from loki_jax.face.controls import camera_centre
from loki_jax.face.retarget import size_ratio
from loki_jax.face.types import Camera, Coefficients

FORMAT_VERSION = 1


class MotionError(ValueError):
    """A motion file is missing, damaged or of another head; the message names the file and the remedy."""


class Motion(NamedTuple):
    """A motion.

    Attributes:
      coefficients: fields (n, ...); betas are 0.
      camera: one for all frames.
      fps: exact frame rate.
      valid: frames in which the face was seen.
      cuts: first frames of other shots.
      neutral: the frame nearest to rest.
    """

    coefficients: Coefficients
    camera: Camera
    fps: Fraction
    valid: Bool[np.ndarray, " n"]
    cuts: Int[np.ndarray, " c"]
    neutral: int


def head_digest(head: HeadAsset) -> str:
    """SHA-256 of what gives coefficients of a head their meaning: its mesh, bases, joints and names."""
    digest = hashlib.sha256()
    for name in ("template", "faces", "shape_basis", "expression_basis", "pose_correctives",
                 "joint_regressor", "skinning_weights"):  # fmt: skip
        array = np.asarray(getattr(head, name))
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    names = (head.parents, head.joint_names, head.shape_names, head.expression_names)
    digest.update(json.dumps(names).encode())
    return digest.hexdigest()


def without_identity(head: HeadAsset, coefficients: Coefficients, camera: Camera) -> Coefficients:
    """The same motion of a mean head: betas 0, distances from the camera in proportion to the head's size."""
    betas = np.asarray(coefficients.betas, np.float32)
    ratio = float(size_ratio(head, np.zeros_like(betas[0]), betas[0]))
    centre = camera_centre(camera)
    tra = centre + ratio * (np.asarray(coefficients.tra) - centre)
    return coefficients._replace(betas=np.zeros_like(betas), tra=tra.astype(np.float32))


def write_motion(path: str | os.PathLike, head: HeadAsset, motion: Motion) -> None:
    """Write a motion; the file appears when it is whole."""
    arrays = {f"coefficients_{k}": np.asarray(v) for k, v in motion.coefficients._asdict().items()}
    del arrays["coefficients_betas"]
    arrays |= {f"camera_{k}": np.asarray(v) for k, v in motion.camera._asdict().items()}
    meta = {
        "kind": "loki_jax motion",
        "format_version": FORMAT_VERSION,
        "fps": [motion.fps.numerator, motion.fps.denominator],
        "neutral": motion.neutral,
        "head": head.name,
        "head_sha256": head_digest(head),
    }
    arrays |= {"valid": motion.valid, "cuts": np.asarray(motion.cuts, np.int64)}
    write_npz(path, arrays | {"meta_json": np.asarray(json.dumps(meta))})


def read_motion(path: str | os.PathLike, head: HeadAsset) -> Motion:
    """Read a motion of `head`.

    Raises:
      MotionError: the file is missing, damaged, something else, or the motion of another head.
    """
    path = Path(path)
    if not path.is_file():
        raise MotionError(f"{path}: no such motion file. Make one with `python -m loki_jax.motion save`.")
    try:
        with reading(path, "motion file", "Save it again with `python -m loki_jax.motion save`."):
            return _motion_of_arrays(path, read_npz(path), head)
    except HeadAssetError as error:
        raise MotionError(str(error)) from error


def _motion_of_arrays(path: Path, arrays: dict[str, np.ndarray], head: HeadAsset) -> Motion:
    meta = json.loads(str(arrays["meta_json"])) if "meta_json" in arrays else {}
    if meta.get("kind") != "loki_jax motion":
        raise HeadAssetError(f"{path}: not a motion file. Save one with `python -m loki_jax.motion save`.")
    if meta["format_version"] != FORMAT_VERSION:
        raise HeadAssetError(
            f"{path}: motion format {meta['format_version']}, this version reads {FORMAT_VERSION}. "
            "Save it again with `python -m loki_jax.motion save`."
        )
    if meta["head_sha256"] != head_digest(head):
        raise HeadAssetError(
            f"{path}: a motion of the head {meta['head']!r}, this animation uses {head.name!r} (or another "
            "version of it). Save the motion again with this head (`python -m loki_jax.motion save --head`)."
        )
    n = len(arrays["valid"])
    widths = {"expression": head.n_expression} | dict.fromkeys(("rot", "tra", "neck", "jaw", "eyes"), 3)
    fields = {"betas": np.zeros((n, head.n_shape), np.float32)}
    for name, width in widths.items():
        field = arrays[f"coefficients_{name}"].astype(np.float32)
        if field.shape != (n, width) or n == 0 or not np.isfinite(field).all():
            raise ValueError(f"{name} has shape {field.shape} or holds values that are not finite")
        fields[name] = field
    camera = Camera(arrays["camera_intrinsics"], arrays["camera_extrinsics"])
    fps, neutral, cuts = Fraction(*meta["fps"]), int(meta["neutral"]), arrays["cuts"]
    if fps <= 0 or not 0 <= neutral < n or camera.extrinsics.shape != (4, 4) or cuts.ndim != 1:
        raise ValueError("its frame rate, neutral frame, camera or cuts are out of range")
    return Motion(Coefficients(**fields), camera, fps, arrays["valid"].astype(bool), cuts, neutral)
