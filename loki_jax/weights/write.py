"""Writers of weights that hold one tensor in memory at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from loki_jax.weights.ldm_names import Table, from_ldm, to_ldm
from loki_jax.weights.match import state_shape
from loki_jax.weights.sources import FLAX_ARRAY
from loki_jax.weights.tensors import SAFETENSORS_DTYPES, TensorInfo, Tensors, WeightsError

_ALIGNMENT = 64


def to_ours(tensors: Tensors, table: Table, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """The tensors that a table names, under our paths and in our layout."""
    infos = {path: TensorInfo(shapes[path], tensors.infos[name].dtype) for path, (name, _) in table.items()}
    read = lambda path: from_ldm(tensors.read(table[path].name), table[path].layout)
    return Tensors(infos, read, tensors.files)


def to_theirs(params: Tensors, table: Table) -> Tensors:
    """Our parameters under the names and in the layout of a table, which must not ask for others."""
    infos, paths = {}, {}
    for path, (name, layout) in table.items():
        shape, dtype = params.infos[path]
        paths[name], infos[name] = path, TensorInfo(state_shape(shape, layout), dtype)
    read = lambda name: to_ldm(params.read(paths[name]), table[paths[name]].layout)
    return Tensors(infos, read, params.files)


def cast(tensors: Tensors, dtype: str) -> Tensors:
    """The same numbers in another dtype. Reading raises WeightsError where a number is too large for it."""

    def read(name: str) -> np.ndarray:
        array = tensors.read(name)
        with np.errstate(over="ignore"):
            result = array.astype(dtype, copy=False)
        if np.isinf(result.astype(np.float32)).any() and not np.isinf(array.astype(np.float32)).any():
            raise WeightsError(f"{name}: holds numbers too large for {dtype}. Choose another --dtype.")
        return result

    infos = {name: TensorInfo(info.shape, dtype) for name, info in tensors.infos.items()}
    return Tensors(infos, read, tensors.files)


def write_safetensors(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write one safetensors file, a tensor at a time."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    # Wide numbers first keeps every tensor aligned to its own width.
    names = sorted(tensors.infos, key=lambda name: (-np.dtype(tensors.infos[name].dtype).itemsize, name))
    for name in names:
        info = tensors.infos[name]
        start, end = end, end + info.nbytes
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(np.ascontiguousarray(tensors.read(name)).tobytes())


def write_flax(path: Path, tensors: Tensors) -> None:
    """Write a Flax file, a tensor at a time: nested maps in MessagePack, whose keys the names spell."""
    with path.open("wb") as file:
        for piece in _pack(unflatten_dict({name: name for name in tensors.infos}, sep="/"), tensors):
            file.write(piece)


def _pack(node: dict[str, Any] | str, tensors: Tensors) -> Iterable[bytes]:
    if isinstance(node, dict):
        yield struct.pack(">BI", 0xDF, len(node))
        for key, value in node.items():
            text = key.encode()
            yield struct.pack(">BH", 0xDA, len(text)) + text
            yield from _pack(value, tensors)
        return
    shape, dtype = tensors.infos[node]
    numbers = np.ascontiguousarray(tensors.read(node)).tobytes()
    header = b"\x93" + struct.pack(">BH", 0xDC, len(shape))
    header += b"".join(struct.pack(">BI", 0xCE, n) for n in shape)
    header += struct.pack(">BB", 0xD9, len(dtype)) + dtype.encode()
    header += struct.pack(">BI", 0xC6, len(numbers))
    yield struct.pack(">BIB", 0xC9, len(header) + len(numbers), FLAX_ARRAY) + header
    yield numbers


def write_orbax(folder: Path, tensors: Tensors) -> None:
    """Write a tree saved by Orbax, whose paths the names spell.

    Orbax wants all arrays at once: they are mapped from a scratch file beside the folder, which needs
    as much disk again for the time of writing, and the system keeps in memory what it has room for.
    """
    offsets, size = {}, 0
    for name, info in tensors.infos.items():
        offsets[name] = size
        size += -(-info.nbytes // _ALIGNMENT) * _ALIGNMENT
    scratch = folder.with_name(f"{folder.name}.scratch")
    try:
        with scratch.open("wb") as file:
            for name, offset in offsets.items():
                file.seek(offset)
                file.write(np.ascontiguousarray(tensors.read(name)).tobytes())
            file.truncate(size)
        mapped = {
            name: np.memmap(scratch, dtype, "r", offsets[name], shape).view(np.ndarray)
            for name, (shape, dtype) in tensors.infos.items()
        }
        handlers = ocp.type_handlers.create_type_handler_registry(
            # Without this flag Orbax copies every array before it writes the first.
            (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
            (jax.Array, ocp.type_handlers.ArrayHandler()),
        )
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder.absolute(), ocp.args.PyTreeSave(unflatten_dict(mapped, sep="/")))
    finally:
        scratch.unlink(missing_ok=True)
