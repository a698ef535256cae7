"""Writers of weights that hold one tensor in memory at a time, and leave nothing half-written."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from loki_jax.weights.ldm_names import Table, from_ldm, to_ldm
from loki_jax.weights.match import state_shape
from loki_jax.weights.tensors import TensorInfo, Tensors, WeightsError

_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ALIGNMENT = 64


def to_ours(
    tensors: Tensors, table: Table, used: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> Tensors:
    """The tensors of a matched source under our paths and in our layout."""
    infos = {path: TensorInfo(shapes[path], tensors.infos[name].dtype) for path, name in used.items()}
    return Tensors(infos, lambda path: from_ldm(tensors.read(used[path]), table[path].layout), tensors.files)


def to_theirs(params: Tensors, table: Table) -> Tensors:
    """Our parameters under the names and in the layout of a table, which must not ask for others."""
    paths = {weight.name: path for path, weight in table.items()}
    infos = {
        name: TensorInfo(state_shape(params.infos[path].shape, table[path].layout), params.infos[path].dtype)
        for name, path in paths.items()
    }
    return Tensors(
        infos, lambda name: to_ldm(params.read(paths[name]), table[paths[name]].layout), params.files
    )


def cast(tensors: Tensors, dtype: str) -> Tensors:
    """The same numbers in another dtype. Reading raises WeightsError where a number is too large for it."""
    target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    def read(name: str) -> np.ndarray:
        array = tensors.read(name)
        with np.errstate(over="ignore"):
            result = array.astype(target, copy=False)
        if np.isinf(result.astype(np.float32)).any() and not np.isinf(array.astype(np.float32)).any():
            raise WeightsError(f"{name}: holds numbers too large for {dtype}. Choose another --dtype.")
        return result

    return Tensors(
        {name: info._replace(dtype=target.name) for name, info in tensors.infos.items()}, read, tensors.files
    )


def write_safetensors(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write one safetensors file, a tensor at a time. Tensors must be of a dtype of `match.FLOATS`."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    # Wide numbers first keeps every tensor aligned to its own width.
    names = sorted(tensors.infos, key=lambda name: (-_itemsize(tensors.infos[name]), name))
    for name in names:
        info = tensors.infos[name]
        start, end = end, end + int(np.prod(info.shape)) * _itemsize(info)
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(np.ascontiguousarray(tensors.read(name)).tobytes())


def write_orbax(folder: Path, tensors: Tensors) -> None:
    """Write a tree saved by Orbax, whose paths the names spell.

    Orbax wants all arrays at once: they are mapped from a scratch file beside the folder, which needs
    as much disk again for the time of writing, and the system keeps in memory what it has room for.
    """
    offsets, size = {}, 0
    for name, info in tensors.infos.items():
        offsets[name] = size
        size += -(-int(np.prod(info.shape)) * _itemsize(info) // _ALIGNMENT) * _ALIGNMENT
    scratch = folder.with_name(f"{folder.name}.scratch")
    try:
        with scratch.open("wb") as file:
            for name, offset in offsets.items():
                file.seek(offset)
                file.write(np.ascontiguousarray(tensors.read(name)).tobytes())
            file.truncate(size)
        tree: dict = {}
        for name, info in tensors.infos.items():
            *parents, leaf = name.split("/")
            branch = tree
            for parent in parents:
                branch = branch.setdefault(parent, {})
            mapped = np.memmap(scratch, _dtype(info), "r", offsets[name], info.shape)
            branch[leaf] = mapped.view(np.ndarray)
        handlers = ocp.type_handlers.create_type_handler_registry(
            # Without this flag Orbax copies every array before it writes the first.
            (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
            (jax.Array, ocp.type_handlers.ArrayHandler()),
        )
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder.absolute(), ocp.args.PyTreeSave(tree))
    finally:
        scratch.unlink(missing_ok=True)


def _dtype(info: TensorInfo) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if info.dtype == "bfloat16" else info.dtype)


def _itemsize(info: TensorInfo) -> int:
    return _dtype(info).itemsize
