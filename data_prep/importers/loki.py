"""Fits of the public Loki and CAP4D code: `fit.npz` in and out (method, section 11)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from data_prep.importers.arrays import (
    ImportedFit,
    check_arrays,
    fitted_axes,
    join_coefficients,
    length,
    read_arrays,
)
from data_prep.importers.frames import find_frames, given_frames
from loki_jax.data.reader import Dataset, stack_frames
from loki_jax.data.schema import ClipInfo, DatasetError, Frame
from loki_jax.face.asset import HeadAsset
from loki_jax.face.types import Camera
from loki_jax.io import atomic_path, remove, stale_siblings

# Their rotations and translations, and our names, in our order.
_MOTION = {"rot": "rot", "tra": "tra", "neck_rot": "neck", "jaw_rot": "jaw", "eye_rot": "eyes"}
_INTRINSICS = ("fx", "fy", "cx", "cy")
_N_PUBLIC_EXPRESSION = 65


def _expression(
    values: Float[np.ndarray, "N have"], head: HeadAsset, path: Path
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Expression of a public fit, whose 65th axis is a blink, on the head's axes."""
    names = head.expression_names
    if values.shape[1] != _N_PUBLIC_EXPRESSION or head.name != "flame":
        return fitted_axes(values, head.n_expression, "expression", path, "--n-expression"), ()
    last = _N_PUBLIC_EXPRESSION - 1
    result = np.zeros((len(values), head.n_expression), np.float32)
    notes: tuple[str, ...] = ()
    plain = [index for index, name in enumerate(names) if name != "blink"][:last]
    if len(plain) < last and np.abs(values[:, len(plain) : last]).max() > 0:
        raise DatasetError(
            f"{path}: uses {last} expression axes of FLAME and a blink, the head has {len(plain)}. Make it "
            "with `python -m data_prep.head_asset flame MODEL.pkl --blink FILE`."
        )
    result[:, plain] = values[:, : len(plain)]
    if "blink" in names:
        result[:, names.index("blink")] = values[:, last]
    elif np.abs(values[:, last]).max() > 0:
        notes = (
            f"the blink (65th expression axis, up to {np.abs(values[:, last]).max():.2f}) is dropped: the "
            "head has no such axis. Make it with `data_prep.head_asset flame --blink FILE` to keep it.",
        )
    return result, notes


def read_loki_fit(
    path: Path, head: HeadAsset, *, camera: int = 0, neck: str = "keep", frames: Path | None = None
) -> ImportedFit:
    """A `fit.npz` of the public Loki or CAP4D code (method, section 11).

    Its rotation is about the origin and comes after skinning, as ours. Its neck rotation is taken over
    (`neck="keep"`) although the public driver map ignores it; "drop" sets it to zero as that does.

    Raises:
      DatasetError: the file is damaged, lacks arrays, or does not fit the head.
      MediaError: its pictures are not there.
    """
    arrays = read_arrays(path)
    n, cameras = length(arrays, "expr"), length(arrays, "fx")
    arrays.setdefault("jaw_rot", np.zeros((n, 3)))
    shapes: dict[str, tuple[int | None, ...]] = {"shape": (None,), "expr": (n, None)}
    shapes |= dict.fromkeys(_MOTION, (n, 3)) | dict.fromkeys(_INTRINSICS, (cameras, 1))
    check_arrays(path, arrays, shapes | {"extr": (cameras, 4, 4)})
    if not 0 <= camera < cameras:
        raise DatasetError(f"{path}: has {cameras} cameras, number {camera} is asked for. Check `--camera`.")
    expression, notes = _expression(arrays["expr"], head, path)
    shape = fitted_axes(arrays["shape"], head.n_shape, "shape", path, "--n-shape")
    arrays["neck_rot"] = arrays["neck_rot"] * (neck == "keep")
    coefficients = join_coefficients(shape, expression, *(arrays[key] for key in _MOTION))
    intrinsics = np.array([arrays[key][camera, 0] for key in _INTRINSICS], np.float32)
    pictures = find_frames(path, camera) if frames is None else given_frames(frames)
    view = Camera(intrinsics, arrays["extr"][camera].astype(np.float32))
    return ImportedFit(coefficients, view, pictures, notes)


# --- and out again --------------------------------------------------------------------------------------


def _public_expression(
    expression: Float[np.ndarray, "N n"], head: HeadAsset
) -> tuple[Float[np.ndarray, "N m"], tuple[str, ...]]:
    """Expression on the public axes: for FLAME 64 of its own and a blink, for other heads theirs."""
    if head.name != "flame":
        return expression, (f"the head is {head.name!r}: programs for FLAME cannot use this fit.",)
    names, last = head.expression_names, _N_PUBLIC_EXPRESSION - 1
    plain = [index for index, name in enumerate(names) if name != "blink"]
    result = np.zeros((len(expression), _N_PUBLIC_EXPRESSION), np.float32)
    kept = plain[:last]
    result[:, : len(kept)] = expression[:, kept]
    if "blink" in names:
        result[:, last] = expression[:, names.index("blink")]
    lost = np.abs(expression[:, plain[last:]]).max(initial=0)
    if lost == 0:
        return result, ()
    return result, (f"FLAME's axes beyond the 64th (up to {lost:.2f}) have no place and are lost.",)


def clip_to_fit(
    frames: Sequence[Frame], head: HeadAsset, name: str, *, crop_size: int | None = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arrays of a clip's `fit.npz`, and what could not be expressed in them.

    Args:
      name: what errors call the clip.
      crop_size: side of the stored crops, to give their camera instead of that of the uncropped frames.

    Raises:
      DatasetError: shape, camera or, with `crop_size`, box change within the clip; the layout has one.
    """
    stacked = stack_frames(frames)
    intrinsics = stacked.camera.intrinsics.astype(np.float64)
    if crop_size is not None:
        boxes = stacked.crop.astype(np.float64)
        scale = crop_size / (boxes[:, 2:] - boxes[:, :2])
        intrinsics = np.concatenate(
            [intrinsics[:, :2] * scale, (intrinsics[:, 2:] - boxes[:, :2]) * scale], axis=1
        )
    betas, extrinsics = stacked.coefficients.betas, stacked.camera.extrinsics
    for what, values in (("shape", betas), ("camera", intrinsics), ("camera's pose", extrinsics)):
        if (values != values[0]).any():
            raise DatasetError(
                f"{name}: its {what} changes from frame to frame, a fit.npz has one for the clip"
                + (". Export it without `--frames`." if crop_size and what == "camera" else ".")
            )
    expression, notes = _public_expression(np.asarray(stacked.coefficients.expression), head)
    arrays: dict[str, Any] = {
        "shape": betas[0],
        "expr": expression,
        **{key: getattr(stacked.coefficients, field) for key, field in _MOTION.items()},
        **{key: intrinsics[:1, index : index + 1] for index, key in enumerate(_INTRINSICS)},
        "extr": extrinsics[:1],
    }
    return {key: np.asarray(value, np.float32) for key, value in arrays.items()}, notes


def export_clip(
    dataset: Dataset, clip: ClipInfo, head: HeadAsset, out: Path, *, frames: bool = False
) -> tuple[str, ...]:
    """Write one clip to the folder `out` atomically; returns what could not be expressed.

    Raises:
      DatasetError: see `clip_to_fit`; the dataset has no pictures; or `out` is taken.
    """
    if frames and dataset.metadata.image_format is None:
        raise DatasetError(f"{dataset.path}: holds latents only. Export without `--frames`.")
    if out.exists():
        raise DatasetError(f"{out}: exists already. Choose another `--out`.")
    read = dataset.read_clip(clip)
    arrays, notes = clip_to_fit(
        read, head, f"{dataset.path}: clip {clip.clip_id!r}",
        crop_size=dataset.metadata.image_size if frames else None,
    )  # fmt: skip
    for stale in stale_siblings(out):
        remove(stale)
    with atomic_path(out, durable=True) as partial:
        partial.mkdir()
        if frames:
            pictures = partial / "images" / "cam0"
            pictures.mkdir(parents=True)
            for frame in read:
                Image.fromarray(np.asarray(frame.image)).save(pictures / f"{frame.frame_index:05d}.png")
        np.savez(partial / "fit.npz", **arrays)
    return notes
