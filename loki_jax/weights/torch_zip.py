"""PyTorch files (.ckpt, .bin) read without torch and without executing them.

Such a file is a zip archive: `data.pkl`, a pickle of nested containers with tensors, and one record of
raw numbers a storage. A pickle can call any function, so this one is read by an unpickler that knows
the few names a tensor is rebuilt with and refuses all others before anything is called. Tensors come
out as descriptions; their numbers are read one at a time.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from loki_jax.weights.tensors import TensorInfo, Tensors, WeightsError

# Names of tensors that a training program saved beside its `state_dict`.
OUTSIDE = "(outside state_dict) "

_STORAGES = {
    "FloatStorage": np.dtype(np.float32), "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16), "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64), "IntStorage": np.dtype(np.int32), "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8), "ByteStorage": np.dtype(np.uint8), "BoolStorage": np.dtype(np.bool_),
}  # fmt: skip

# What training checkpoints hold beside weights: hyperparameters and callbacks, read as empty objects.
_IGNORED = frozenset(
    (module, name)
    for modules, names in (
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
        ("lightning.pytorch.callbacks.model_checkpoint", "ModelCheckpoint"),
        ("pytorch_lightning.utilities.parsing", "AttributeDict"),
        ("lightning_fabric.utilities.data lightning.fabric.utilities.data", "AttributeDict"),
        ("omegaconf.dictconfig", "DictConfig"),
        ("omegaconf.listconfig", "ListConfig"),
        ("omegaconf.base", "ContainerMetadata Metadata"),
        ("omegaconf.nodes", "AnyNode"),
        ("typing", "Any"),
        ("argparse", "Namespace"),
        ("pathlib", "PosixPath Path"),
        ("collections", "defaultdict Counter"),
        ("torch", "Size device float32 float16 bfloat16 float64 int64 int32"),
        ("numpy.core.multiarray numpy._core.multiarray", "scalar _reconstruct"),
        ("numpy", "dtype ndarray"),
        ("_codecs", "encode"),
        ("builtins __builtin__", "dict list set int float str bool"),
    )
    for module in modules.split() for name in names.split()
)  # fmt: skip

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class _Storage(NamedTuple):
    dtype: np.dtype
    record: str
    size: int


class _Tensor(NamedTuple):
    """A strided view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(Exception):
    """The pickle names something that weights do not need."""


def _allowed_globals() -> dict[tuple[str, str], Any]:
    """What a pickle may name. Made anew for each file: a pickle can set attributes of what it names."""

    class Ignored:
        """Takes anything, keeps nothing."""

        def __init__(self, *args: Any, **kwargs: Any):
            pass

        def ignore(self, *args: Any) -> None:
            pass

        __setitem__ = __setstate__ = append = extend = add = ignore

    def rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_rest: Any) -> _Tensor:
        """A tensor whose elements all lie within its storage."""
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("a tensor is no view of a storage")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.size:
            raise ValueError(f"a tensor of shape {tuple(shape)} reaches beyond its storage")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))

    def rebuild_parameter(data: Any, *_rest: Any) -> Any:
        return data

    allowed: dict[tuple[str, str], Any] = dict.fromkeys(_IGNORED, Ignored)
    # By name: a pickle could change the state of a dtype.
    allowed |= {("torch", name): name for name in _STORAGES}
    allowed |= {("torch._utils", name): rebuild_tensor for name in ("_rebuild_tensor", "_rebuild_tensor_v2")}
    allowed["torch._utils", "_rebuild_parameter"] = rebuild_parameter
    allowed["collections", "OrderedDict"] = OrderedDict
    return allowed


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes, folder: str):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._allowed = _allowed_globals()
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise _Refused(f"{module}.{name}")
        return self._allowed[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid
        if kind != "storage" or dtype not in _STORAGES or type(key) is not str or type(size) is not int:
            raise ValueError("a reference is no storage")
        return _Storage(_STORAGES[dtype], f"{self._folder}/data/{key}", size)


def open_torch(path: Path) -> Tensors:
    """The tensors of a PyTorch file; names are those of its `state_dict`, or of the whole file without one.

    Raises:
      WeightsError: the file is of the format before torch 1.6, or its pickle names anything that
        rebuilding tensors does not need.
      Exception: of any kind, where the file is damaged or cut short; `sources.open_file` names it.
    """
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_MAGIC))
    if not start.startswith(_ZIP_MAGIC):
        kind = "the format before torch 1.6" if start == _LEGACY_MAGIC else "no PyTorch zip archive"
        raise WeightsError(
            f"{path}: {kind}, which is not read here. Get the .safetensors file, or load and save it once "
            "with `torch.load(..., weights_only=True)` and `torch.save` on a machine you trust it with."
        )
    limit = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        tensors = _named_tensors(path, _unpickle(path, archive))
        for name, (storage, _, shape, _) in tensors.items():
            size = _stored_record(archive, storage.record, limit).file_size
            if size != storage.size * storage.dtype.itemsize:
                raise ValueError(f"the storage of {name} has {size} bytes")
            # Strides of 0 repeat numbers: a few bytes could describe a tensor of any size.
            if math.prod(shape) * storage.dtype.itemsize > limit:
                raise ValueError(f"{name} of shape {shape} is larger than the whole file")

    def read(name: str) -> np.ndarray:
        storage, offset, shape, steps = tensors[name]
        with zipfile.ZipFile(path) as archive:
            numbers = np.frombuffer(archive.read(storage.record), storage.dtype)
        if 0 in shape:
            return np.zeros(shape, storage.dtype)
        strides = [step * storage.dtype.itemsize for step in steps]
        view = np.lib.stride_tricks.as_strided(numbers[offset:], shape, strides, writeable=False)
        return np.ascontiguousarray(view).reshape(shape)

    infos = {name: TensorInfo(tensor.shape, tensor.storage.dtype.name) for name, tensor in tensors.items()}
    return Tensors(infos, read, (path,))


def _stored_record(archive: zipfile.ZipFile, name: str, limit: int) -> zipfile.ZipInfo:
    """A record that is not compressed, as torch writes all: it cannot unpack to more than the file's size."""
    record = archive.getinfo(name)
    if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
        raise ValueError(f"record {name} is compressed")
    if record.file_size > limit:
        raise ValueError(f"record {name} is larger than the whole file")
    return record


def _unpickle(path: Path, archive: zipfile.ZipFile) -> Any:
    names = archive.namelist()
    if any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in names):
        raise WeightsError(f"{path}: a TorchScript program, not a file of weights.")
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError(f"{path}: a zip archive, but not one of PyTorch (no data.pkl).")
    folder, limit = pickles[0].partition("/")[0], path.stat().st_size
    order = f"{folder}/byteorder"
    if order in names and archive.read(_stored_record(archive, order, limit)) != b"little":
        raise WeightsError(f"{path}: written on a big-endian machine. Save it anew on another.")
    data = archive.read(_stored_record(archive, pickles[0], limit))
    for opcode, argument, _ in pickletools.genops(data):
        # The unpickler allocates up to the largest memo index.
        is_index = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if is_index and not 0 <= int(argument or 0) <= len(data):
            raise ValueError(f"memo index {argument} in a pickle of {len(data)} bytes")
    try:
        return _TensorUnpickler(data, folder).load()
    except _Refused as refused:
        raise WeightsError(
            f"{path}: its pickle names {refused}, which weights do not need and which could run a program. "
            "Nothing was executed. Get the .safetensors file instead."
        ) from None


def _named_tensors(path: Path, content: Any) -> dict[str, _Tensor]:
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict):
        raise WeightsError(f"{path}: holds a {type(weights).__name__}, not a mapping from names to tensors.")
    strange = [n for n, value in weights.items() if type(n) is not str or not isinstance(value, _Tensor)]
    if strange:
        raise WeightsError(
            f"{path}: {len(strange)} entries are no tensors, first {strange[0]!r:.80}. Is it a file of "
            "weights?"
        )
    tensors = dict(weights)
    if weights is not content:
        seen: set[int] = set()
        for key, value in content.items():
            if key != "state_dict":
                _collect(value, f"{OUTSIDE}{key}", tensors, seen)
    return tensors


def _collect(value: Any, name: str, into: dict[str, _Tensor], seen: set[int]) -> None:
    """Tensors anywhere inside nested containers."""
    if isinstance(value, _Tensor):
        into[name] = value
    elif isinstance(value, dict | list | tuple) and id(value) not in seen:
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _collect(item, f"{name}/{key}", into, seen)
