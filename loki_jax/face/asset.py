"""The head asset: one `.npz` that holds everything the package knows about a parametric head.

Sources (FLAME pickles, ICT-FaceKit arrays, the built-in procedural head) are converted to this one
format; nothing downstream knows where a head came from. Method, section 3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, no_type_check

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from loki_jax.arrays import ArrayLike
from loki_jax.io import atomic_path, file_sha256

FORMAT_VERSION = 1

# How much an .npz file may unpack to: so many times its own size, or so many bytes.
_LARGEST_RATIO, _ALWAYS_ALLOWED = 64, 1 << 26


class HeadAssetError(ValueError):
    """A head asset file is missing, damaged or inconsistent; the message names the file and the remedy."""


# Not type-checked: tree transformations build heads of shapes or shardings.
@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Landmarks:
    """Points on the surface: for landmark i, the face `face[i]` with barycentrics `bary[i]`.

    `face` indexes `HeadAsset.faces`; a negative entry marks a landmark this head does not have.
    """

    face: Int[ArrayLike, " n"]
    bary: Float[ArrayLike, "n 3"]


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadAsset:
    """A linear blend-skinned parametric head with V vertices, F faces and J joints.

    Metres, +y up, +z out of the face, +x to the subject's left. Faces are counter-clockwise seen
    from outside. The array fields are pytree leaves; the metadata is static.

    Attributes:
      template: neutral mean head.
      faces: vertex indices.
      shape_basis, expression_basis: offsets per unit coefficient.
      pose_correctives: one offset field per entry of (R_k - I), k = 1..J-1, row-major; may be empty.
      joint_regressor: joints = regressor @ shaped neutral vertices.
      parents: parent joint, -1 for the root.
      skinning_weights: rows sum to 1.
      render_mask: vertices that the driver map shows; the rest only occludes.
      inner_mouth: vertices inside the mouth: they have zero expression offset and are always shown.
      shape_sigma, expression_sigma: prior standard deviations of the coefficients.
      expression_bounds: lower and upper limit of each expression coefficient (may be infinite).
      landmarks: landmark sets by name: "mediapipe478", "ibug68".
      lip_vertex: where FLAME's inner-mouth half-sphere is attached (method, section 3); -1: the
        mesh needs none.
    """

    template: Float[ArrayLike, "V 3"]
    faces: Int[ArrayLike, "F 3"]
    shape_basis: Float[ArrayLike, "n_shape V 3"]
    expression_basis: Float[ArrayLike, "n_expr V 3"]
    pose_correctives: Float[ArrayLike, "P V 3"]
    joint_regressor: Float[ArrayLike, "J V"]
    skinning_weights: Float[ArrayLike, "V J"]
    render_mask: Bool[ArrayLike, " V"]
    inner_mouth: Bool[ArrayLike, " V"]
    shape_sigma: Float[ArrayLike, " n_shape"]
    expression_sigma: Float[ArrayLike, " n_expr"]
    expression_bounds: Float[ArrayLike, "n_expr 2"]
    landmarks: dict[str, Landmarks]
    # Static metadata (hashable, so that a head can be a jit argument).
    parents: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(metadata={"static": True})
    joint_names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    shape_names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    expression_names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    licence: str = dataclasses.field(metadata={"static": True})
    provenance: str = dataclasses.field(metadata={"static": True})
    lip_vertex: int = dataclasses.field(default=-1, metadata={"static": True})

    @property
    def n_shape(self) -> int:
        return self.shape_basis.shape[0]

    @property
    def n_expression(self) -> int:
        return self.expression_basis.shape[0]

    def joint(self, name: str) -> int | None:
        """Index of the joint `name` ("root", "neck", "jaw", "left_eye", "right_eye") or None."""
        return self.joint_names.index(name) if name in self.joint_names else None


_ARRAYS = {
    "template": np.float32,
    "faces": np.int32,
    "shape_basis": np.float32,
    "expression_basis": np.float32,
    "pose_correctives": np.float32,
    "joint_regressor": np.float32,
    "parents": np.int32,
    "skinning_weights": np.float32,
    "render_mask": np.bool_,
    "inner_mouth": np.bool_,
    "shape_sigma": np.float32,
    "expression_sigma": np.float32,
    "expression_bounds": np.float32,
}

_TEXT = ("name", "licence", "provenance")
_NAMES = ("joint_names", "shape_names", "expression_names")


def validate_head(head: HeadAsset, source: str) -> None:
    """Check that all shapes, indices and names of `head` fit together.

    Args:
      source: the file or model, for the message.

    Raises:
      HeadAssetError: they do not.
    """

    def need(ok: bool | np.bool_, what: str) -> None:
        if not ok:
            raise HeadAssetError(
                f"{source}: {what}. Rebuild the asset with `python -m data_prep.head_asset`."
            )

    texts = [getattr(head, field) for field in _TEXT]
    names = [name for field in _NAMES for name in getattr(head, field)]
    need(all(isinstance(text, str) for text in texts + names), "names and licence must be text")
    n_vertices, n_joints = len(head.template), len(head.parents)
    shapes = {
        "template": (n_vertices, 3),
        "faces": (len(head.faces), 3),
        "shape_basis": (len(head.shape_names), n_vertices, 3),
        "expression_basis": (len(head.expression_names), n_vertices, 3),
        "joint_regressor": (n_joints, n_vertices),
        "skinning_weights": (n_vertices, n_joints),
        "render_mask": (n_vertices,),
        "inner_mouth": (n_vertices,),
        "shape_sigma": (len(head.shape_names),),
        "expression_sigma": (len(head.expression_names),),
        "expression_bounds": (len(head.expression_names), 2),
    }
    for field, expected in shapes.items():
        found = tuple(getattr(head, field).shape)
        need(found == expected, f"{field} has shape {found}, expected {expected}")
    correctives = tuple(head.pose_correctives.shape)
    need(
        correctives[1:] == (n_vertices, 3) and correctives[0] in (0, 9 * (n_joints - 1)),
        f"pose_correctives has shape {correctives}, expected (0 or {9 * (n_joints - 1)}, {n_vertices}, 3)",
    )
    need(len(head.joint_names) == n_joints, f"{len(head.joint_names)} joint names for {n_joints} joints")
    faces = np.asarray(head.faces)
    need(
        faces.size == 0 or (faces.min() >= 0 and faces.max() < n_vertices),
        "faces index vertices that do not exist",
    )
    need(
        head.parents[:1] == (-1,) and all(0 <= p < i for i, p in enumerate(head.parents[1:], start=1)),
        "parents must be -1 for the root and point backwards otherwise",
    )
    need(
        np.allclose(np.asarray(head.skinning_weights).sum(-1), 1, atol=1e-3),
        "skinning_weights rows do not sum to 1",
    )
    need(-1 <= head.lip_vertex < n_vertices, f"lip_vertex {head.lip_vertex} does not exist")
    for field, dtype in _ARRAYS.items():
        if dtype == np.float32:
            value = np.asarray(getattr(head, field))
            fine = ~np.isnan(value) if field == "expression_bounds" else np.isfinite(value)
            need(bool(fine.all()), f"{field} holds values that are not finite")
    for key, marks in head.landmarks.items():
        need(
            marks.bary.shape == (len(marks.face), 3)
            and (len(marks.face) == 0 or np.asarray(marks.face).max() < len(faces))
            and bool(np.isfinite(np.asarray(marks.bary)).all()),
            f"landmark set {key!r} does not fit the faces",
        )


@contextlib.contextmanager
def reading(path: str | os.PathLike, what: str, remedy: str) -> Iterator[None]:
    """Turn whatever the block raises into a `HeadAssetError` that names the file and the remedy.

    A damaged file can make zipfile, NumPy, JSON and pickle raise nearly anything; all of it means the same.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy, about headers and dtypes of old or damaged files
            yield
    except HeadAssetError:
        raise
    except Exception as error:
        raise HeadAssetError(
            f"{path}: not a readable {what} ({type(error).__name__}: {error}). {remedy}"
        ) from error


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Arrays of an `.npz` file by name, without pickles.

    No more is allocated than the size of the file makes plausible, whatever its headers declare. A damaged
    file can raise any exception: call it within `reading`.
    """
    limit = max(_LARGEST_RATIO * os.path.getsize(path), _ALWAYS_ALLOWED)
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        declared = sum(member.file_size for member in members)
        if declared > limit:
            raise ValueError(f"it would unpack to {declared} bytes")
        for member in members:
            # Other methods unpack a block of any size at once.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{member.filename} is compressed by an unknown method")
            with archive.open(member) as file:
                content = file.read(member.file_size)
            arrays[member.filename.removesuffix(".npy")] = _parse_npy(content)
    return arrays


def _parse_npy(content: bytes) -> np.ndarray:
    """The array of an `.npy` file. `np.load` would allocate what the header declares before it reads on."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    flat = np.frombuffer(content, dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran_order else "C").copy()


def write_npz(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays atomically, member by member with a fixed date, so that equal arrays give equal files."""
    with atomic_path(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in sorted(arrays):
            member = io.BytesIO()
            np.lib.format.write_array(member, arrays[key], allow_pickle=False)
            info = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, member.getvalue())


def save_head(
    path: str | os.PathLike, head: HeadAsset, labels: Mapping[str, np.ndarray] | None = None
) -> str:
    """Write `head` to `path` atomically and return the SHA-256 of the file.

    Args:
      labels: further arrays to store, which `load_head` ignores.

    Raises:
      HeadAssetError: the head is inconsistent.
    """
    validate_head(head, str(path))
    arrays: dict[str, np.ndarray] = {}
    arrays |= {field: np.asarray(getattr(head, field), dtype) for field, dtype in _ARRAYS.items()}
    for key, marks in head.landmarks.items():
        arrays[f"landmarks_{key}_face"] = np.asarray(marks.face, np.int32)
        arrays[f"landmarks_{key}_bary"] = np.asarray(marks.bary, np.float32)
    meta = {"format_version": FORMAT_VERSION, "units": "metres", "lip_vertex": head.lip_vertex}
    meta |= {field: getattr(head, field) for field in (*_TEXT, *_NAMES)}
    write_npz(path, arrays | dict(labels or {}) | {"meta_json": np.asarray(json.dumps(meta))})
    return file_sha256(path)


def load_head(path: str | os.PathLike) -> HeadAsset:
    """Read a head asset.

    Raises:
      HeadAssetError: the file is missing, damaged, of another format version or inconsistent.
    """
    path = Path(path)
    if not path.is_file():
        raise HeadAssetError(
            f"{path}: no such head asset. Make one with `python -m data_prep.head_asset builtin|flame|ict`."
        )
    with reading(path, "head asset", "Rebuild it with `python -m data_prep.head_asset`."):
        head = _head_of_arrays(path, read_npz(path))
        validate_head(head, str(path))
    return head


def _head_of_arrays(path: Path, stored: dict[str, np.ndarray]) -> HeadAsset:
    missing = [key for key in (*_ARRAYS, "meta_json") if key not in stored]
    if missing:
        raise HeadAssetError(
            f"{path}: not a loki_jax head asset, it lacks {', '.join(missing)}. "
            "Convert the model with `python -m data_prep.head_asset flame|ict`."
        )
    meta = json.loads(str(stored["meta_json"]))
    if meta.get("format_version") != FORMAT_VERSION:
        raise HeadAssetError(
            f"{path}: head asset format {meta.get('format_version')}, this version reads {FORMAT_VERSION}. "
            "Rebuild it with `python -m data_prep.head_asset`."
        )

    def array(key: str, dtype: type) -> np.ndarray:
        return stored[key].astype(dtype, casting="same_kind", copy=False)

    fields: dict[str, Any] = {field: array(field, dtype) for field, dtype in _ARRAYS.items()}
    fields |= {"parents": tuple(fields["parents"].tolist()), "lip_vertex": int(meta["lip_vertex"])}
    fields |= {field: meta[field] for field in _TEXT} | {field: tuple(meta[field]) for field in _NAMES}
    sets = [match[1] for key in sorted(stored) if (match := re.fullmatch("landmarks_(.*)_face", key))]
    fields["landmarks"] = {
        key: Landmarks(array(f"landmarks_{key}_face", np.int32), array(f"landmarks_{key}_bary", np.float32))
        for key in sets
    }
    return HeadAsset(**fields)
