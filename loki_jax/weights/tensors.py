"""What all readers return, and the one error they raise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np


class WeightsError(ValueError):
    """Weights are missing, damaged, unsafe or of another network; the message names file and remedy."""


class TensorInfo(NamedTuple):
    """Shape and dtype (NumPy's name; "bfloat16" where NumPy has none) of a tensor that is not loaded."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} ({', '.join(map(str, self.shape))})"


class Tensors(NamedTuple):
    """Named tensors in one or several files. `read(name)` loads a single one, anew each time."""

    infos: dict[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    files: tuple[Path, ...]
