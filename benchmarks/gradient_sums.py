"""Rounding error of a gradient that is summed over devices, by the dtype of the sum: a model, no measurement.

    python benchmarks/gradient_sums.py

Each device holds a partial gradient: random numbers, or the same plus a mean four times as large.
A ring adds them one after another and rounds every partial sum to the dtype, as collective libraries do; a
tree adds pairs. Prints the root mean square error, relative to the exact sum. The step itself is
measured on 8 simulated devices by tests/training/test_gradient_sums.py. docs/scaling.md holds the figures.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def ring(parts: np.ndarray, dtype: type) -> np.ndarray:
    """Sum over the first axis, rounded to `dtype` after each addition."""
    total = parts[0].astype(dtype)
    for part in parts[1:]:
        total = (total.astype(np.float32) + part.astype(dtype).astype(np.float32)).astype(dtype)
    return total.astype(np.float64)


def tree(parts: np.ndarray, dtype: type) -> np.ndarray:
    """The same by pairs; the number of parts must be a power of two."""
    parts = parts.astype(dtype)
    while len(parts) > 1:
        parts = (parts[::2].astype(np.float32) + parts[1::2].astype(np.float32)).astype(dtype)
    return parts[0].astype(np.float64)


def relative_error(devices: int, mean: float, add, dtype: type, size: int = 20_000) -> float:
    parts = (mean + np.random.default_rng(0).standard_normal((devices, size))).astype(np.float32)
    exact = parts.astype(np.float64).sum(0)
    return float(np.sqrt(np.mean((add(parts, dtype) - exact) ** 2) / np.mean(exact**2)))


def main() -> None:
    print("devices  dtype      ring, noise  ring, mean 4  tree, noise  tree, mean 4")
    for devices in (8, 256, 1024):
        for name, dtype in DTYPES.items():
            cases = [(add, mean) for add in (ring, tree) for mean in (0.0, 4.0)]
            errors = [relative_error(devices, mean, add, dtype) for add, mean in cases]
            print(f"{devices:7d}  {name:9s}" + "".join(f"{error:13.1e}" for error in errors))


if __name__ == "__main__":
    main()
