"""Arrays of a fit: read, checked, and brought into our conventions."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from loki_jax.data.schema import DatasetError
from loki_jax.face.asset import read_npz
from loki_jax.face.types import Camera, Coefficients


class ImportedFit(NamedTuple):
    """A fit in our conventions, and where its pictures are.

    Attributes:
      coefficients: fields (N, n).
      camera: intrinsics (4,) or (N, 4), extrinsics (4, 4) or (N, 4, 4).
      frames: N picture files, or one video of N frames.
      notes: what could not be taken over.
    """

    coefficients: Coefficients
    camera: Camera
    frames: list[Path] | Path
    notes: tuple[str, ...]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DatasetError(f"{path}: no such file. Check `--fits`.")
    try:
        return read_npz(path)
    except Exception as error:  # zipfile and NumPy raise many types about damaged files
        raise DatasetError(
            f"{path}: not a readable .npz file of a fit ({error}). Copy it again, or fit the clip again."
        ) from error


def length(arrays: dict[str, np.ndarray], key: str) -> int:
    """Length of an array that may be missing."""
    return len(np.atleast_1d(arrays.get(key, np.zeros(0))))


def check_arrays(
    path: Path, arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int | None, ...]]
) -> None:
    """Raises DatasetError unless there are arrays of all `shapes` (None: any size), finite, and frames."""
    missing = [key for key in shapes if key not in arrays]
    if missing:
        raise DatasetError(
            f"{path}: lacks {', '.join(missing)}; it holds {', '.join(sorted(arrays)) or 'nothing'}. "
            "Give the file that the fitting program wrote."
        )
    for key, shape in shapes.items():
        found = arrays[key].shape
        if len(found) != len(shape) or any(
            want not in (None, have) for want, have in zip(shape, found, strict=True)
        ):
            want = "(" + ", ".join("n" if size is None else str(size) for size in shape) + ")"
            raise DatasetError(f"{path}: {key} has shape {found}, expected {want}. Fit the clip again.")
        if arrays[key].dtype.kind not in "fiu" or not np.isfinite(arrays[key].astype(np.float64)).all():
            raise DatasetError(f"{path}: {key} holds values that are not finite numbers. Fit the clip again.")
    if length(arrays, "expr") == 0:
        raise DatasetError(f"{path}: holds no frames. Fit the clip again.")


def fitted_axes(
    values: Float[np.ndarray, "*n have"], want: int, what: str, path: Path, option: str
) -> np.ndarray:
    """`values` with as many axes as the head has; what is beyond them must be zero."""
    beyond = values[..., want:]
    if np.abs(beyond).max(initial=0) > 0:
        raise DatasetError(
            f"{path}: uses {values.shape[-1]} {what} axes, the head has {want}. Make the head with "
            f"`python -m data_prep.head_asset flame MODEL.pkl {option} {values.shape[-1]}`."
        )
    short = want - min(values.shape[-1], want)
    padding = [(0, 0)] * (values.ndim - 1) + [(0, short)]
    return np.pad(values[..., :want], padding).astype(np.float32)


def join_coefficients(
    shape: Float[np.ndarray, " n_shape"], expression: Float[np.ndarray, "N n_expr"], *motion: np.ndarray
) -> Coefficients:
    """Coefficients of N frames; `motion`: rot, tra, neck, jaw, eyes."""
    betas = np.tile(shape, (len(expression), 1))
    return Coefficients(betas, expression, *(np.asarray(value, np.float32) for value in motion))
