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

# Harmless company of weights in training checkpoints: hyperparameters and callbacks. They are read as
# empty stand-ins.
_IGNORED = frozenset({
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("lightning.pytorch.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("pytorch_lightning.utilities.parsing", "AttributeDict"),
    ("lightning_fabric.utilities.data", "AttributeDict"),
    ("lightning.fabric.utilities.data", "AttributeDict"),
    ("omegaconf.dictconfig", "DictConfig"),
    ("omegaconf.listconfig", "ListConfig"),
    ("omegaconf.base", "ContainerMetadata"),
    ("omegaconf.base", "Metadata"),
    ("omegaconf.nodes", "AnyNode"),
    ("typing", "Any"),
    ("argparse", "Namespace"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("collections", "defaultdict"),
    ("collections", "Counter"),
    ("torch", "Size"),
    ("torch", "device"),
    *(("torch", name) for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32")),
    *((module, name) for module in ("numpy.core.multiarray", "numpy._core.multiarray")
      for name in ("scalar", "_reconstruct")),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("_codecs", "encode"),
    *((module, name) for module in ("builtins", "__builtin__")
      for name in ("dict", "list", "set", "int", "float", "str", "bool")),
})  # fmt: skip

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
    pass


class _Malformed(Exception):
    pass


def _allowed_globals() -> dict[tuple[str, str], Any]:
    """What a pickle may name. Made anew for each file: a pickle can set attributes of what it names."""

    class Ignored(dict):
        """Takes anything, keeps nothing."""

        def __new__(cls, *args, **kwargs):
            return super().__new__(cls)

        def __init__(self, *args, **kwargs):
            super().__init__()

        __hash__ = object.__hash__

        def __setitem__(self, key, value):
            pass

        def __setstate__(self, state):
            pass

        def append(self, value):
            pass

        def extend(self, values):
            pass

        def add(self, value):
            pass

    def rebuild_tensor(storage, offset, shape, strides, *_rest):
        return _describe(storage, offset, shape, strides)

    def rebuild_parameter(data, *_rest):
        return data

    allowed: dict[tuple[str, str], Any] = dict.fromkeys(_IGNORED, Ignored)
    # By name: a pickle could change the state of a dtype.
    allowed |= {("torch", name): name for name in _STORAGES}
    allowed |= {("torch._utils", name): rebuild_tensor for name in ("_rebuild_tensor", "_rebuild_tensor_v2")}
    allowed["torch._utils", "_rebuild_parameter"] = rebuild_parameter
    allowed["collections", "OrderedDict"] = OrderedDict
    return allowed


def _describe(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
    """A tensor whose elements all lie within its storage."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise _Malformed("a tensor that is no view of a storage")
    if len(shape) != len(strides):
        raise _Malformed(f"a tensor of shape {tuple(shape)} with strides {tuple(strides)}")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.size:
        raise _Malformed(f"a tensor of shape {tuple(shape)} that reaches beyond its storage")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, folder: str):
        super().__init__(file, encoding="utf-8")
        self._allowed = _allowed_globals()
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise _Refused(f"{module}.{name}")
        return self._allowed[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise _Malformed("a reference that is no storage")
        _, dtype, key, _, size = pid
        if (
            not isinstance(dtype, str)
            or dtype not in _STORAGES
            or not isinstance(key, str)
            or type(size) is not int
        ):
            raise _Malformed("a storage of unknown type")
        return _Storage(_STORAGES[dtype], f"{self._folder}/data/{key}", size)


def open_torch(path: Path) -> Tensors:
    """The tensors of a PyTorch file; names are those of its `state_dict`, or of the whole file without one.

    Raises:
      WeightsError: the file is damaged, cut short, of the format before torch 1.6, or its pickle names
        anything that rebuilding tensors does not need.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_LEGACY_MAGIC))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error}).") from error
    if not start.startswith(_ZIP_MAGIC):
        kind = "the format before torch 1.6" if start == _LEGACY_MAGIC else "no PyTorch zip archive"
        raise WeightsError(
            f"{path}: {kind}, which is not read here. Get the .safetensors file, or load and save it once "
            "with `torch.load(..., weights_only=True)` and `torch.save` on a machine you trust it with."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            content = _unpickle(path, archive)
            tensors = _named_tensors(path, content)
            for name, tensor in tensors.items():
                record = _stored_record(archive, tensor.storage.record)
                if record.file_size != tensor.storage.size * tensor.storage.dtype.itemsize:
                    raise _Malformed(f"{name}, whose storage has {record.file_size} bytes")
                # Strides of 0 repeat numbers: a few bytes could describe a tensor of any size.
                if math.prod(tensor.shape) * tensor.storage.dtype.itemsize > path.stat().st_size:
                    raise _Malformed(f"{name} of shape {tensor.shape}, larger than the whole file")
    except WeightsError:
        raise
    except (_Malformed, KeyError) as error:
        raise WeightsError(
            f"{path}: damaged, it holds {error}. Copy it again and compare its SHA-256."
        ) from error
    except Exception as error:  # zipfile fails on damaged bytes in many ways
        raise WeightsError(
            f"{path}: damaged or cut short ({error}). Copy it again and compare its SHA-256."
        ) from error
    infos = {name: TensorInfo(tensor.shape, tensor.storage.dtype.name) for name, tensor in tensors.items()}
    return Tensors(infos, lambda name: _read(path, name, tensors[name]), (path,))


def _stored_record(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A record that is not compressed, as torch writes all: it cannot unpack to more than the file's size."""
    record = archive.getinfo(name)
    if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
        raise _Malformed(f"{name}, which is compressed")
    if record.file_size > Path(archive.filename).stat().st_size:
        raise _Malformed(f"{name}, which is larger than the whole file")
    return record


def _check_memo(data: bytes) -> None:
    """Refuse memo indices beyond the length of the pickle: the unpickler allocates up to the largest one."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= argument <= len(data):
            raise _Malformed(f"memo index {argument} in a pickle of {len(data)} bytes")


def _unpickle(path: Path, archive: zipfile.ZipFile) -> Any:
    names = archive.namelist()
    if any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in names):
        raise WeightsError(f"{path}: a TorchScript program, not a file of weights.")
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError(f"{path}: a zip archive, but not one of PyTorch (no data.pkl).")
    folder = pickles[0].partition("/")[0]
    order = f"{folder}/byteorder"
    if order in names and archive.read(_stored_record(archive, order)) != b"little":
        raise WeightsError(f"{path}: written on a big-endian machine. Save it anew on another.")
    try:
        data = archive.read(_stored_record(archive, pickles[0]))
        _check_memo(data)
        return _TensorUnpickler(io.BytesIO(data), folder).load()
    except _Refused as refused:
        raise WeightsError(
            f"{path}: its pickle names {refused}, which weights do not need and which could run a program. "
            "Nothing was executed. Get the .safetensors file instead."
        ) from None
    except (_Malformed, zipfile.BadZipFile):
        raise
    except Exception as error:  # an unpickler fails on damaged bytes in any way there is
        raise WeightsError(f"{path}: its pickle is damaged ({error!r}). Copy it again.") from error


def _named_tensors(path: Path, content: Any) -> dict[str, _Tensor]:
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a mapping from names to tensors.")
    weights = content.get("state_dict", content)
    if not isinstance(weights, dict):
        raise WeightsError(f"{path}: its state_dict is no mapping from names to tensors.")
    strange = [
        name for name, value in weights.items() if not isinstance(name, str) or not isinstance(value, _Tensor)
    ]
    if strange:
        raise WeightsError(
            f"{path}: {len(strange)} entries are no tensors, first {strange[0]!r}. Is it a file of weights?"
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


def _read(path: Path, name: str, tensor: _Tensor) -> np.ndarray:
    storage = tensor.storage
    try:
        with zipfile.ZipFile(path) as archive:
            numbers = np.frombuffer(archive.read(storage.record), storage.dtype)
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, storage.dtype)
        strides = [step * storage.dtype.itemsize for step in tensor.strides]
        view = np.lib.stride_tricks.as_strided(
            numbers[tensor.offset :], tensor.shape, strides, writeable=False
        )
        return np.ascontiguousarray(view).reshape(tensor.shape)
    except Exception as error:  # zipfile and NumPy fail on damaged bytes in many ways
        raise WeightsError(f"{path}: {name} is damaged ({error}). Copy the file again.") from error
