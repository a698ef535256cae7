"""What all readers return, and the one error they raise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np

# NumPy's name of a dtype -> its name in safetensors files.
SAFETENSORS_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class WeightsError(ValueError):
    """Weights are missing, damaged, unsafe or of another network; the message names file and remedy."""


class TensorInfo(NamedTuple):
    """Shape and dtype (NumPy's name, or "bfloat16") of a tensor that is not loaded."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} ({', '.join(map(str, self.shape))})"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Tensors(NamedTuple):
    """Named tensors in one or several files. `read(name)` loads a single one, anew each time."""

    infos: dict[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    files: tuple[Path, ...]

    def pick(self, names: Mapping[str, str]) -> Tensors:
        """Some of the tensors under other names: `names` maps the new name to the present one."""
        infos = {new: self.infos[name] for new, name in names.items()}
        return Tensors(infos, lambda new: self.read(names[new]), self.files)

    def keep(self, names: Iterable[str]) -> Tensors:
        return self.pick({name: name for name in names})
