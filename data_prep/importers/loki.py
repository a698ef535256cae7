from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from data_prep.importers.arrays import ImportedFit, check_arrays, fitted_axes, read_arrays
from data_prep.importers.frames import find_frames, given_frames
from loki_jax.data.schema import DatasetError
from loki_jax.face.asset import HeadAsset
from loki_jax.face.types import Camera, Coefficients

_LOKI_KEYS = ("shape", "expr", "rot", "tra", "eye_rot", "neck_rot", "fx", "fy", "cx", "cy", "extr")

_N_PUBLIC_EXPRESSION = 65


def _expression(
    values: Float[np.ndarray, "N have"], head: HeadAsset, path: Path
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Expression of a public fit, whose 65th axis is a blink, on the head's axes."""
    names = head.expression_names
    if values.shape[1] != _N_PUBLIC_EXPRESSION or head.name != "flame":
        return fitted_axes(values, head.n_expression, "expression", path, "--n-expression"), ()
    last = _N_PUBLIC_EXPRESSION - 1
    result, notes = np.zeros((len(values), head.n_expression), np.float32), ()
    plain = [index for index, name in enumerate(names) if name != "blink"][:last]
    if len(plain) < last and np.abs(values[:, len(plain) : last]).max() > 0:
        raise DatasetError(
            f"{path}: uses {last} expression axes of FLAME and a blink, the head has {len(plain)}. Make it "
            "with "
            "`python -m data_prep.head_asset flame MODEL.pkl --blink FILE`."
        )
    result[:, plain] = values[:, : len(plain)]
    if "blink" in names:
        result[:, names.index("blink")] = values[:, last]
    elif np.abs(values[:, last]).max() > 0:
        notes = (
            f"the blink (65th expression axis, up to {np.abs(values[:, last]).max():.2f}) is dropped: the "
            "head has "
            "no such axis. Make it with `data_prep.head_asset flame --blink FILE` to keep it.",
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
    n = len(np.atleast_1d(arrays.get("expr", np.zeros(0))))
    cameras = len(np.atleast_1d(arrays.get("fx", np.zeros(0))))
    shapes = dict.fromkeys(("rot", "tra", "eye_rot", "neck_rot"), (n, 3))
    shapes |= dict.fromkeys(("fx", "fy", "cx", "cy"), (cameras, 1))
    shapes |= {"shape": (None,), "expr": (n, None), "extr": (cameras, 4, 4)}
    if "jaw_rot" in arrays:
        shapes["jaw_rot"] = (n, 3)
    check_arrays(path, arrays, shapes)
    if n == 0:
        raise DatasetError(f"{path}: holds no frames. Fit the clip again.")
    if not 0 <= camera < cameras:
        raise DatasetError(f"{path}: has {cameras} cameras, number {camera} is asked for. Check `--camera`.")
    expression, notes = _expression(arrays["expr"], head, path)
    shape = fitted_axes(arrays["shape"], head.n_shape, "shape", path, "--n-shape")
    jaw = arrays.get("jaw_rot", np.zeros((n, 3)))
    kept = np.asarray(arrays["neck_rot"]) * (neck == "keep")
    motion = (arrays["rot"], arrays["tra"], kept, jaw, arrays["eye_rot"])
    coefficients = Coefficients(
        np.tile(shape, (n, 1)), expression, *(np.asarray(value, np.float32) for value in motion)
    )
    intrinsics = np.array([arrays[key][camera, 0] for key in ("fx", "fy", "cx", "cy")], np.float32)
    pictures = find_frames(path, camera) if frames is None else given_frames(frames)
    return ImportedFit(
        coefficients, Camera(intrinsics, arrays["extr"][camera].astype(np.float32)), pictures, notes
    )
