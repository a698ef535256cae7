"""The seeded weights behind the reference vectors, and comparison in their measure of error."""

from zlib import crc32

import jax
import ml_dtypes
import numpy as np

from loki_jax.weights.ldm_names import params_from_ldm, to_ldm


def quick_jit(function):
    """jit that spends half the time on compiling; what these tests run is small."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def recipe_weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """One weight of the reference networks; depends on nothing but its name, shape and the seed."""
    rng = np.random.Generator(np.random.PCG64([seed, crc32(name.encode())]))
    draw = rng.standard_normal(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    if len(shape) > 1:
        draw = draw * np.float32(1 / np.sqrt(np.prod(shape[1:])))
        if ".to_q." in name or ".to_k." in name:
            draw = draw * np.float32(1.5)
    elif name.endswith("weight"):
        draw = 1 + np.float32(0.1) * draw
    else:
        draw = np.float32(0.1) * draw
    return draw.astype(ml_dtypes.bfloat16).astype(np.float32)


def recipe_params(table, shapes, seed: int, prefix: str = ""):
    """Nested parameters with the recipe's weights.

    `shapes` are our parameters' shapes (a flat dict by path); every one of them must be in the table.
    """
    assert shapes.keys() == table.keys()
    state = {}
    for path, (name, layout) in table.items():
        shape = to_ldm(np.empty(shapes[path].shape, np.bool_), layout).shape
        state[name] = recipe_weight(prefix + name, shape, seed)
    return params_from_ldm(state, table)


def error(actual, expected) -> float:
    """Largest absolute difference over the standard deviation of the reference."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / expected.std())


def channels_last(x: np.ndarray) -> np.ndarray:
    """(..., C, H, W) -> (..., H, W, C)."""
    return np.moveaxis(x, -3, -1)
