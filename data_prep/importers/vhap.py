"""Fits of VHAP, as GaussianAvatars reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.importers.arrays import (
    ImportedFit,
    check_arrays,
    fitted_axes,
    join_coefficients,
    length,
    read_arrays,
)
from data_prep.importers.frames import TRANSFORMS_FILE, given_frames, picture_of
from loki_jax.data.schema import DatasetError
from loki_jax.face.asset import HeadAsset
from loki_jax.face.rotation import matrix_from_rotvec
from loki_jax.face.skinning import make_identity
from loki_jax.face.types import Camera

_VHAP_KEYS = ("expr", "rotation", "translation", "neck_pose", "jaw_pose", "eyes_pose")
_FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


def read_vhap_fit(
    path: Path, head: HeadAsset, *, camera: int = 0, neck: str = "keep", frames: Path | None = None
) -> ImportedFit:
    """A fit that VHAP exported, as GaussianAvatars reads it: `transforms.json` or `flame_param.npz`.

    Its FLAME turns about the root joint and then translates, ours turns about the origin: with J the
    root joint of the face with its expression, tra = translation + J - R J. Its cameras look along
    -z (OpenGL), camera to world. The two eyes' rotations become their mean. Static offsets of vertices
    have no place in our coefficients.

    Raises:
      DatasetError: files are missing or damaged, or do not fit the head.
      MediaError: its pictures are not there.
    """
    transforms = path if path.suffix == ".json" else next(
        (path.parent / name for name in TRANSFORMS_FILE if (path.parent / name).is_file()), None
    )  # fmt: skip
    if transforms is None:
        raise DatasetError(
            f"{path}: needs the transforms.json of the same export beside it, which holds the camera."
        )
    entries = _read_transforms(transforms, camera)
    whole = path if path.suffix == ".npz" else transforms.parent / "flame_param.npz"
    if all("flame_param_path" in entry for entry in entries):
        parts = [_read_vhap_arrays(transforms.parent / entry["flame_param_path"]) for entry in entries]
        rows = np.arange(len(parts))
        if (counts := {len(part["expr"]) for part in parts}) != {1}:
            raise DatasetError(
                f"{transforms}: its flame_param files hold {counts} frames, expected one each."
            )
    else:
        parts = [_read_vhap_arrays(whole)]
        rows = np.array([int(entry.get("timestep_index", i)) for i, entry in enumerate(entries)])
        if rows.min() < 0 or rows.max() >= (n := len(parts[0]["expr"])):
            raise DatasetError(
                f"{transforms}: names frame {rows.max()}, but {whole} holds {n}. They belong to different "
                "exports."
            )
    arrays = {key: np.concatenate([part[key] for part in parts])[rows] for key in _VHAP_KEYS}
    offsets = [part["static_offset"] for part in parts if "static_offset" in part]

    notes: tuple[str, ...] = ()
    largest = max((float(np.abs(offset).max(initial=0)) for offset in offsets), default=0.0)
    if largest > 0:
        notes += (f"static vertex offsets of up to {1000 * largest:.1f} mm are dropped.",)
    shape = fitted_axes(parts[0]["shape"], head.n_shape, "shape", path, "--n-shape")
    # VHAP's axes are FLAME's own, so a blink axis stays at rest.
    plain = [index for index, name in enumerate(head.expression_names) if name != "blink"]
    expression = np.zeros((len(arrays["expr"]), head.n_expression), np.float32)
    expression[:, plain] = fitted_axes(arrays["expr"], len(plain), "expression", path, "--n-expression")
    # FLAME regresses its joints from the mesh with its expression.
    moved = np.einsum("v,evc->ec", head.joint_regressor[0], head.expression_basis)
    root = np.asarray(make_identity(head, shape).joints[0], np.float64) + expression @ moved
    turn = np.asarray(matrix_from_rotvec(arrays["rotation"].astype(np.float32)), np.float64)
    tra = arrays["translation"] + root - np.einsum("nij,nj->ni", turn, root)
    eyes = (arrays["eyes_pose"][:, :3] + arrays["eyes_pose"][:, 3:]) / 2
    motion = (arrays["rotation"], tra, arrays["neck_pose"] * (neck == "keep"), arrays["jaw_pose"], eyes)
    intrinsics = np.stack([entry["intrinsics"] for entry in entries])
    extrinsics = np.stack([entry["extrinsics"] for entry in entries])
    fixed = (intrinsics == intrinsics[0]).all() and (extrinsics == extrinsics[0]).all()
    view = Camera(intrinsics[0], extrinsics[0]) if fixed else Camera(intrinsics, extrinsics)
    pictures = [entry["picture"] for entry in entries] if frames is None else given_frames(frames)
    return ImportedFit(join_coefficients(shape, expression, *motion), view, pictures, notes)


def _read_vhap_arrays(path: Path) -> dict[str, np.ndarray]:
    arrays = read_arrays(path)
    n = length(arrays, "expr")
    if "shape" in arrays:
        arrays["shape"] = arrays["shape"].reshape(-1)
    shapes = dict.fromkeys(("rotation", "translation", "neck_pose", "jaw_pose"), (n, 3))
    check_arrays(path, arrays, shapes | {"shape": (None,), "expr": (n, None), "eyes_pose": (n, 6)})
    return arrays


def _read_transforms(path: Path, camera: int) -> list[dict[str, Any]]:
    """The frames of one camera in order of time, each with intrinsics (4,), extrinsics (4, 4), picture."""
    try:
        content = json.loads(path.read_text())
        frames = content["frames"]
        chosen = [f for f in frames if int(f.get("camera_index", f.get("camera_indx", 0))) == camera]
        if not chosen:
            raise DatasetError(f"{path}: has no frames of camera {camera}. Check `--camera`.")
        chosen.sort(key=lambda f: int(f.get("timestep_index", 0)))
        entries = []
        for frame in chosen:
            values = content | frame
            if "fl_x" in values:
                focal = values["fl_x"], values.get("fl_y", values["fl_x"])
            else:
                focal = (values["w"] / 2 / np.tan(values["camera_angle_x"] / 2),) * 2
            centre = values.get("cx", values.get("w", 0) / 2), values.get("cy", values.get("h", 0) / 2)
            world_from_camera = np.asarray(values["transform_matrix"], np.float64)
            if world_from_camera.shape != (4, 4) or not np.isfinite(world_from_camera).all():
                raise ValueError("a transform_matrix is no 4 x 4 matrix")
            entries.append(frame | {
                "intrinsics": np.array([*focal, *centre], np.float32),
                "extrinsics": (_FLIP @ np.linalg.inv(world_from_camera) @ _FLIP).astype(np.float32),
                "picture": picture_of(path.parent / values["file_path"]),
            })  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, np.linalg.LinAlgError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{path}: not a readable transforms.json of VHAP ({type(error).__name__}: {error}). Export it "
            "again."
        ) from error
    return entries
