"""Flax's own file format: nested string-keyed maps of arrays in MessagePack. Read and written without Flax.

An array is extension type 1, whose payload is the MessagePack array [shape, dtype name, bytes]. Only
what such files consist of is understood; numbers are read one array at a time.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from loki_jax.weights.tensors import TensorInfo, Tensors, WeightsError

_ARRAY = 1
_DTYPES = {
    dtype.name: dtype
    for dtype in map(
        np.dtype, ("float32", "float16", "float64", "int32", "int64", "uint8", "bool", ml_dtypes.bfloat16)
    )
}
_LONGEST_KEY = 2**16
_MOST_AXES = 32


class _Malformed(Exception):
    pass


class _Cursor:
    """Reads big-endian numbers and short strings of a file, never beyond its end."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def bytes(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise _Malformed("it ends in the middle of an entry")
        return data

    def number(self, count: int) -> int:
        return int.from_bytes(self.bytes(count), "big")

    def skip(self, count: int) -> None:
        if self.file.tell() + count > self.size:
            raise _Malformed("it ends in the middle of an array")
        self.file.seek(count, 1)

    def map_length(self, head: int) -> int | None:
        if head & 0xF0 == 0x80:
            return head & 0x0F
        return {0xDE: lambda: self.number(2), 0xDF: lambda: self.number(4)}.get(head, lambda: None)()

    def array_length(self) -> int:
        head = self.number(1)
        if head & 0xF0 == 0x90:
            return head & 0x0F
        if head == 0xDC:
            return self.number(2)
        raise _Malformed(f"byte {head:#x} where an array's shape should be")

    def text(self) -> str:
        head = self.number(1)
        if head & 0xE0 == 0xA0:
            length = head & 0x1F
        elif head in (0xD9, 0xDA):
            length = self.number(1 if head == 0xD9 else 2)
        else:
            raise _Malformed(f"byte {head:#x} where a name should be")
        return self.bytes(min(length, _LONGEST_KEY)).decode()

    def integer(self) -> int:
        head = self.number(1)
        if head < 0x80:
            return head
        if head in (0xCC, 0xCD, 0xCE, 0xCF):
            return self.number(1 << (head - 0xCC))
        raise _Malformed(f"byte {head:#x} where a size should be")

    def binary_length(self) -> int:
        head = self.number(1)
        if head in (0xC4, 0xC5, 0xC6):
            return self.number(1 << (head - 0xC4))
        raise _Malformed(f"byte {head:#x} where an array's numbers should be")

    def extension(self, head: int) -> tuple[int, int]:
        """(length, type) of an extension."""
        if 0xD4 <= head <= 0xD8:
            return 1 << (head - 0xD4), self.number(1)
        if head in (0xC7, 0xC8, 0xC9):
            length = self.number(1 << (head - 0xC7))
            return length, self.number(1)
        raise _Malformed(f"byte {head:#x} where an array or a map should be")


def open_msgpack(path: Path) -> Tensors:
    """The arrays of a Flax file; names are the paths, joined by "/".

    Raises:
      WeightsError: the file is damaged, cut short, or holds anything but nested maps of arrays.
    """
    found: dict[str, tuple[TensorInfo, int]] = {}

    def node(cursor: _Cursor, path: str, depth: int) -> None:
        if depth > 64:
            raise _Malformed("maps nested 64 deep")
        head = cursor.number(1)
        length = cursor.map_length(head)
        if length is None:
            found[path] = _array(cursor, head)
            return
        for _ in range(length):
            key = cursor.text()
            if key == "__msgpack_chunked_array__":
                raise _Malformed(f"{path} in chunks, as Flax stores arrays above 1 GB; split the array")
            node(cursor, f"{path}/{key}" if path else key, depth + 1)

    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            cursor = _Cursor(file, size)
            node(cursor, "", 0)
            if file.tell() != size:
                raise _Malformed(f"{size - file.tell()} bytes after the last array")
    except (_Malformed, UnicodeDecodeError, OSError) as error:
        raise WeightsError(f"{path}: not a readable Flax file ({error}). Copy it again.") from error

    def read(name: str) -> np.ndarray:
        info, offset = found[name]
        dtype = _DTYPES[info.dtype]
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(math.prod(info.shape) * dtype.itemsize)
            return np.frombuffer(data, dtype).reshape(info.shape)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path}: {name} is damaged ({error}). Copy the file again.") from error

    return Tensors({name: info for name, (info, _) in found.items()}, read, (path,))


def _array(cursor: _Cursor, head: int) -> tuple[TensorInfo, int]:
    """Shape, dtype and position of the numbers of one array; the cursor moves past it."""
    length, kind = cursor.extension(head)
    end = cursor.file.tell() + length
    if kind != _ARRAY:
        raise _Malformed(f"extension type {kind}; only arrays (1) are known")
    if cursor.array_length() != 3:
        raise _Malformed("an array without shape, dtype and numbers")
    axes = cursor.array_length()
    if axes > _MOST_AXES:
        raise _Malformed(f"an array of {axes} axes")
    shape = tuple(cursor.integer() for _ in range(axes))
    name = cursor.text()
    if name not in _DTYPES:
        raise _Malformed(f"an array of dtype {name!r}")
    count = cursor.binary_length()
    position = cursor.file.tell()
    if count != math.prod(shape) * _DTYPES[name].itemsize or position + count != end:
        raise _Malformed(f"an array of shape {shape} and {count} bytes")
    cursor.skip(count)
    return (TensorInfo(shape, name), position)


def write_msgpack(path: Path, tensors: dict[str, TensorInfo], read: Callable[[str], np.ndarray]) -> None:
    """Write arrays under paths joined by "/", one at a time; parents come out as nested maps."""
    tree: dict[str, Any] = {}
    for name in tensors:
        *parents, leaf = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = name
    with path.open("wb") as file:
        for piece in _pack(tree, tensors, read):
            file.write(piece)


def _pack(node: Any, tensors: dict[str, TensorInfo], read: Callable[[str], np.ndarray]) -> Iterable[bytes]:
    if isinstance(node, dict):
        yield struct.pack(">BI", 0xDF, len(node))
        for key, value in node.items():
            text = key.encode()
            yield struct.pack(">BH", 0xDA, len(text)) + text
            yield from _pack(value, tensors, read)
        return
    info = tensors[node]
    array = np.ascontiguousarray(read(node))
    shape = struct.pack(">BH", 0xDC, len(info.shape)) + b"".join(
        struct.pack(">BI", 0xCE, n) for n in info.shape
    )
    dtype = info.dtype.encode()
    header = (
        b"\x93"
        + shape
        + struct.pack(">BB", 0xD9, len(dtype))
        + dtype
        + struct.pack(">BI", 0xC6, array.nbytes)
    )
    yield struct.pack(">BIB", 0xC9, len(header) + array.nbytes, _ARRAY) + header
    yield array.view(np.uint8).data if array.ndim else array.tobytes()
