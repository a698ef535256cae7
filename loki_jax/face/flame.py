"""FLAME model files as head assets (method, section 3).

FLAME is distributed as Python pickles, a format that can run any program. They are read here by an
unpickler that accepts NumPy arrays, SciPy sparse matrices (rebuilt from their parts, whatever SciPy
wrote them), chumpy arrays (chumpy itself is not needed) and plain containers. It refuses everything
else before anything is called.
"""

from __future__ import annotations

import codecs
import io
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from loki_jax.face.asset import HeadAsset, HeadAssetError, Landmarks, read_npz, reading, validate_head
from loki_jax.io import file_sha256

_SPARSE_FORMATS = ("csc", "csr", "coo")
_FLAME_VERTICES = 5023
_FLAME_LIP_VERTEX = 3533
_N_SHAPE_AXES, _N_EXPRESSION_AXES = 300, 100
_JOINTS = ("root", "neck", "jaw", "left_eye", "right_eye")
_PARENTS = (-1, 0, 1, 1, 1)
_N_MEDIAPIPE, _N_IBUG, _N_IBUG_CONTOUR = 478, 68, 17

_LICENCE = (
    "FLAME model licence of the file's distributor (2016-2023: non-commercial, registration; "
    "FLAME 2023 Open: CC BY 4.0 with prohibited uses). Do not redistribute without checking it."
)


class _Inert:
    """Takes any arguments and state and does nothing but keep the state."""

    def __init__(self, *args: Any):
        self.args = args
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        # Objects with slots are pickled as (dict, slots).
        parts = state if isinstance(state, tuple) else (state,)
        self.state = {k: v for part in parts if isinstance(part, dict) for k, v in part.items()}


class _Chumpy(_Inert):
    """Takes the place of `chumpy.Ch`, whose value is the member `x`."""


class _ChumpySelect(_Inert):
    """Takes the place of `chumpy.reordering.Select`: elements `idxs` of `a`."""


class _Sparse(_Inert):
    """Takes the place of a SciPy sparse matrix; subclasses set `layout`."""

    layout = ""


_SPARSE = {name: type(f"_Sparse_{name}", (_Sparse,), {"layout": name}) for name in _SPARSE_FORMATS}


def _restore_object(cls: type, base: type, state: Any) -> Any:
    """`copyreg._reconstructor` for the inert classes alone."""
    if not (isinstance(cls, type) and issubclass(cls, _Inert)):
        raise pickle.UnpicklingError(f"asks to rebuild an object of {cls!r}")
    return cls()


def _encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode` as pickles of bytes use it."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"asks for the codec {encoding!r}")
    return codecs.encode(text, "latin1")


def _allowed_globals() -> dict[tuple[str, str], Any]:
    allowed: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    # The functions themselves are private; the values NumPy pickles with them are not.
    array = np.zeros(1)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed[module, "_reconstruct"] = array.__reduce__()[0]
        allowed[module, "scalar"] = array[0].__reduce__()[0]
    for module in ("numpy.core.numeric", "numpy._core.numeric"):
        allowed[module, "_frombuffer"] = array.__reduce_ex__(5)[0]
    for layout in _SPARSE_FORMATS:
        for module in ("scipy.sparse", f"scipy.sparse.{layout}", f"scipy.sparse._{layout}"):
            for kind in ("matrix", "array"):
                allowed[module, f"{layout}_{kind}"] = _SPARSE[layout]
    for module in ("chumpy", "chumpy.ch"):
        allowed[module, "Ch"] = _Chumpy
    for module in ("chumpy", "chumpy.reordering"):
        allowed[module, "Select"] = _ChumpySelect
    for module in ("builtins", "__builtin__"):
        allowed |= {(module, t.__name__): t for t in (set, frozenset, object)}
    for module in ("copyreg", "copy_reg"):
        allowed[module, "_reconstructor"] = _restore_object
    allowed["_codecs", "encode"] = _encode
    return allowed


class _AllowListUnpickler(pickle.Unpickler):
    """Resolves only `_allowed_globals`."""

    def __init__(self, path: Path, content: bytes):
        super().__init__(io.BytesIO(content), encoding="latin1")
        self._path = path
        self._allowed = _allowed_globals()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise HeadAssetError(
                f"{self._path}: unsafe pickle, it asks to load {module}.{name}, which no head model needs. "
                "Nothing was run. Get the model from its distributor."
            )
        return self._allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("refers to objects outside the file")


def load_trusted_pickle(path: str | os.PathLike) -> Any:
    """Read a pickle that holds only arrays, sparse matrices, chumpy arrays and plain containers.

    Raises:
      HeadAssetError: the file is missing, truncated, not a pickle, or asks for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise HeadAssetError(
            f"{path}: no such file. Download the model from its distributor and give its path."
        )
    with reading(path, "pickle", "Download the file again."):
        content = path.read_bytes()
        # The unpickler allocates its memo up to the largest index.
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(content):
                raise pickle.UnpicklingError(f"memo index {argument}")
        return _AllowListUnpickler(path, content).load()


def _dense(value: Any, what: str) -> np.ndarray:
    """Any array-like that a FLAME file holds, as a plain array."""
    if isinstance(value, _ChumpySelect):
        chosen = _dense(value.state["a"], what).ravel()[np.asarray(value.state["idxs"]).ravel()]
        return chosen.reshape(value.state.get("preferred_shape") or chosen.shape)
    if isinstance(value, _Chumpy):
        if "x" not in value.state:
            raise ValueError(f"{what} is a chumpy object without a value")
        return _dense(value.state["x"], what)
    if isinstance(value, _Sparse):
        state = value.state
        shape = tuple(int(n) for n in state["_shape" if "_shape" in state else "shape"])
        data = np.asarray(state["data"])
        out = np.zeros(shape, np.result_type(data.dtype, np.float32))
        if value.layout == "coo":
            row, column = state["coords"] if "coords" in state else (state["row"], state["col"])
        else:
            pointers, minor = np.asarray(state["indptr"]), np.asarray(state["indices"])
            major = np.repeat(np.arange(len(pointers) - 1), np.diff(pointers))
            row, column = (minor, major) if value.layout == "csc" else (major, minor)
        np.add.at(out, (row, column), data)
        return out
    array = np.asarray(value)
    if array.dtype == object:
        raise ValueError(f"{what} is not an array")
    return array


def _read_array_file(path: str | os.PathLike, what: str) -> dict[str, np.ndarray]:
    """Arrays of a .npy, .npz, .txt or pickle file, by name ("" where there is only one)."""
    path = Path(path)
    if not path.is_file():
        raise HeadAssetError(f"{path}: no such file ({what}).")
    with reading(path, f"{what} file", "Download it again."):
        if path.suffix == ".npz":
            return read_npz(path)
        if path.suffix == ".npy":
            return {"": np.load(path, allow_pickle=False)}
        if path.suffix == ".txt":
            return {"": np.loadtxt(path)}
        value = load_trusted_pickle(path)
        items = value.items() if isinstance(value, dict) else [("", value)]
        return {str(key): _dense(entry, str(key)) for key, entry in items}


def _read_blink(path: str | os.PathLike, n_vertices: int) -> Float[np.ndarray, "V 3"]:
    arrays = _read_array_file(path, "blink shape")
    fitting = [array for array in arrays.values() if array.size == 3 * n_vertices]
    if len(fitting) != 1:
        shapes = {key or "array": array.shape for key, array in arrays.items()}
        raise HeadAssetError(
            f"{path}: holds {shapes}, expected one array of ({n_vertices}, 3) vertex offsets in metres."
        )
    return fitting[0].reshape(n_vertices, 3).astype(np.float32)


def _read_mask(path: str | os.PathLike, n_vertices: int, region: str) -> Bool[np.ndarray, " V"]:
    arrays = _read_array_file(path, "vertex mask")
    if len(arrays) > 1 and region not in arrays:
        raise HeadAssetError(f"{path}: has no region {region!r}, only {', '.join(sorted(arrays))}.")
    chosen = np.asarray(arrays[region] if region in arrays else next(iter(arrays.values())))
    if chosen.dtype == bool and chosen.shape == (n_vertices,):
        return chosen
    ids = chosen.ravel()
    whole = ids.astype(np.int64)
    if ids.size == 0 or (whole != ids).any() or whole.min() < 0 or whole.max() >= n_vertices:
        raise HeadAssetError(f"{path}: is no list of vertex numbers below {n_vertices}.")
    mask = np.zeros(n_vertices, bool)
    mask[whole] = True
    return mask


def _read_landmarks(path: str | os.PathLike, n_faces: int) -> dict[str, Landmarks]:
    """A published landmark embedding: face indices and barycentrics, MediaPipe's with their numbers."""
    arrays = _read_array_file(path, "landmark embedding")

    def find(*names: str) -> np.ndarray | None:
        return next((arrays[name] for name in names if name in arrays), None)

    faces = find("lmk_face_idx", "static_lmk_faces_idx", "face")
    bary = find("lmk_b_coords", "static_lmk_bary_coords", "bary")
    if faces is None or bary is None:
        raise HeadAssetError(
            f"{path}: lacks lmk_face_idx and lmk_b_coords, found {', '.join(sorted(arrays))}."
        )
    faces, bary = faces.ravel().astype(np.int32), bary.reshape(-1, 3).astype(np.float32)
    numbers = find("landmark_indices")
    if numbers is not None:
        name, total, numbers = "mediapipe478", _N_MEDIAPIPE, numbers.ravel().astype(np.int64)
    elif len(faces) in (_N_IBUG, _N_IBUG - _N_IBUG_CONTOUR):
        name, total = "ibug68", _N_IBUG
        numbers = np.arange(_N_IBUG - len(faces), _N_IBUG)
    elif len(faces) == _N_MEDIAPIPE:
        name, total, numbers = "mediapipe478", _N_MEDIAPIPE, np.arange(_N_MEDIAPIPE)
    else:
        raise HeadAssetError(
            f"{path}: {len(faces)} landmarks without landmark_indices; expected 51, 68 or 478 of them."
        )
    consistent = len(faces) == len(bary) == len(numbers) and len(faces) > 0
    if (
        not consistent
        or faces.min() < 0
        or faces.max() >= n_faces
        or numbers.min() < 0
        or numbers.max() >= total
    ):
        raise HeadAssetError(f"{path}: landmark indices do not fit each other or the {n_faces} faces.")
    all_faces, all_bary = np.full(total, -1, np.int32), np.zeros((total, 3), np.float32)
    all_faces[numbers], all_bary[numbers] = faces, bary
    return {name: Landmarks(all_faces, all_bary)}


def _model_arrays(path: Path, model: Any) -> dict[str, np.ndarray]:
    """The arrays of an unpickled FLAME model, their shapes and the joint tree checked."""
    wanted = ("v_template", "f", "shapedirs", "posedirs", "J_regressor", "weights", "kintree_table")
    if not isinstance(model, dict) or any(key not in model for key in wanted):
        missing = [key for key in wanted if not isinstance(model, dict) or key not in model]
        raise HeadAssetError(f"{path}: not a FLAME model, it lacks {', '.join(missing)}.")
    arrays = {key: _dense(model[key], key) for key in wanted}
    n_vertices, n_faces = len(arrays["v_template"]), len(arrays["f"])
    n_axes = _N_SHAPE_AXES + _N_EXPRESSION_AXES
    expected = {
        "v_template": (n_vertices, 3),
        "f": (n_faces, 3),
        "shapedirs": (n_vertices, 3, n_axes),
        "posedirs": (n_vertices, 3, 9 * (len(_JOINTS) - 1)),
        "J_regressor": (len(_JOINTS), n_vertices),
        "weights": (n_vertices, len(_JOINTS)),
        "kintree_table": (2, len(_JOINTS)),
    }
    for key, shape in expected.items():
        if arrays[key].shape != shape:
            raise HeadAssetError(
                f"{path}: {key} has shape {arrays[key].shape}, FLAME's is {shape}. Use the full FLAME model."
            )
    # The root's parent is written as 2^32 - 1 in some integer type or other.
    parents = tuple(int(p) for p in arrays["kintree_table"][0].astype(np.int64).astype(np.int32))
    if parents != _PARENTS:
        raise HeadAssetError(f"{path}: joint parents are {parents}, FLAME's are {_PARENTS}.")
    return arrays


def head_from_flame(
    path: str | os.PathLike,
    blink: str | os.PathLike | None = None,
    n_shape: int = 150,
    n_expression: int = 65,
    *,
    landmarks: str | os.PathLike | None = None,
    mask: str | os.PathLike | None = None,
    mask_region: str = "face",
    lip_vertex: int = _FLAME_LIP_VERTEX,
) -> HeadAsset:
    """The head asset of a FLAME pickle (2016 to 2023, with or without chumpy).

    Args:
      path: the pickle, as downloaded.
      blink: file (.npy, .npz, .pkl) with the vertex offsets of a blink, which then takes the place of
        the last expression axis and is named "blink", as in the public fits. Without it all
        expression axes are FLAME's.
      n_shape, n_expression: leading axes to keep, of 300 and 100.
      landmarks: landmark embedding file (.npz, .npy, .pkl with `lmk_face_idx`, `lmk_b_coords` and, for
        MediaPipe's, `landmark_indices`); FLAME itself brings none, and fitting needs one.
      mask: file with the vertex numbers (or a mapping from region names to them, such as
        FLAME_masks.pkl) that the driver map shows. Default: all vertices that the root joint does
        not dominate, which leaves out the lower neck.
      mask_region: which region of `mask` to use if it has several.
      lip_vertex: where the inner-mouth half-sphere hangs; -1 for none.

    Raises:
      HeadAssetError: a file is missing, damaged, unsafe or of unexpected shapes.
    """
    path = Path(path)
    model = load_trusted_pickle(path)
    with reading(path, "FLAME model", "Download the file again."):
        arrays = _model_arrays(path, model)
        n_vertices, n_faces = len(arrays["v_template"]), len(arrays["f"])
        if not 0 < n_shape <= _N_SHAPE_AXES or not 0 < n_expression <= _N_EXPRESSION_AXES:
            raise HeadAssetError(
                f"{path}: asked for {n_shape} shape and {n_expression} expression axes; "
                f"FLAME has {_N_SHAPE_AXES} and {_N_EXPRESSION_AXES}."
            )
        if lip_vertex >= n_vertices:
            raise HeadAssetError(
                f"{path}: no lip vertex {lip_vertex} among {n_vertices} vertices. Give `lip_vertex` "
                f"(it is {_FLAME_LIP_VERTEX} in FLAME's {_FLAME_VERTICES}), or -1 for no inner mouth."
            )

        directions = np.moveaxis(arrays["shapedirs"].astype(np.float32), -1, 0)
        expression = directions[_N_SHAPE_AXES : _N_SHAPE_AXES + n_expression].copy()
        expression_names = [f"flame_expression_{i:03d}" for i in range(n_expression)]
        bounds = np.tile(np.array([-np.inf, np.inf], np.float32), (n_expression, 1))
        if blink is not None:
            expression[-1] = _read_blink(blink, n_vertices)
            expression_names[-1] = "blink"
        weights = arrays["weights"].astype(np.float32)
        shown = weights[:, 0] < 0.5 if mask is None else _read_mask(mask, n_vertices, mask_region)
        head = HeadAsset(
            template=arrays["v_template"].astype(np.float32),
            faces=arrays["f"].astype(np.int32),
            shape_basis=directions[:n_shape].copy(),
            expression_basis=expression,
            pose_correctives=np.moveaxis(arrays["posedirs"].astype(np.float32), -1, 0).copy(),
            joint_regressor=arrays["J_regressor"].astype(np.float32),
            skinning_weights=weights,
            render_mask=shown,
            inner_mouth=np.zeros(n_vertices, bool),
            shape_sigma=np.ones(n_shape, np.float32),
            expression_sigma=np.ones(n_expression, np.float32),
            expression_bounds=bounds,
            landmarks={} if landmarks is None else _read_landmarks(landmarks, n_faces),
            parents=_PARENTS,
            name="flame",
            joint_names=_JOINTS,
            shape_names=tuple(f"flame_shape_{i:03d}" for i in range(n_shape)),
            expression_names=tuple(expression_names),
            licence=_LICENCE,
            provenance=f"{path.name}, sha256 {file_sha256(path)}"
            + (f", blink {Path(blink).name}" if blink else ""),
            lip_vertex=lip_vertex,
        )
        validate_head(head, str(path))
    return head
