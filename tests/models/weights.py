"""The seeded weights and inputs behind the reference vectors, and their measure of error."""

import json
from collections.abc import Mapping
from pathlib import Path
from zlib import crc32

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from loki_jax.weights.ldm_names import Table, from_ldm, to_ldm


def quick_jit(function):
    """jit that spends half the time on compiling; what these tests run is small."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def _normal(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64([seed, crc32(name.encode())]))
    return rng.standard_normal(int(np.prod(shape)), dtype=np.float32).reshape(shape)


def _on_bfloat16_grid(array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def recipe_input(name: str, shape: tuple[int, ...], seed: int, scale: float = 1.0) -> np.ndarray:
    """One input of the reference networks: normal numbers that depend on name, shape and seed alone."""
    return _on_bfloat16_grid(np.float32(scale) * _normal(name, shape, seed))


def recipe_weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """One weight of the reference networks; depends on nothing but its name, shape and the seed."""
    draw = _normal(name, shape, seed)
    if len(shape) > 1:
        gain = 1.5 if ".to_q." in name or ".to_k." in name else 1.0
        draw = draw * np.float32(gain / np.sqrt(np.prod(shape[1:])))
    elif name.endswith("weight"):
        draw = 1 + np.float32(0.1) * draw
    else:
        draw = np.float32(0.1) * draw
    return _on_bfloat16_grid(draw)


def recipe_state(golden: Path, network: str) -> dict[str, np.ndarray]:
    """State dict of one reference network of `weights.json`, under the names of the public code."""
    recipe = json.loads((golden / "weights.json").read_text())[network]
    return {
        name: recipe_weight(recipe["prefix"] + name, tuple(shape), recipe["seed"])
        for name, shape in recipe["shapes"].items()
    }


def recipe_driver_map() -> np.ndarray:
    """The driver map (1, 4, 128, 128, 45) of `unet_tiny`: multiples of 1/8 in a disc, zero outside."""
    noise = recipe_input("spatial_cond", (1, 4, 128, 128, 45), 20240)
    y, x = np.mgrid[:128, :128] / 128
    disc = (x - 0.45) ** 2 + (y - 0.5) ** 2 < 0.38**2
    return np.where(disc[..., None], np.clip(np.round(noise * 8) / 8, -2, 2), np.float32(0))


def error(actual, expected) -> float:
    """Largest absolute difference over the standard deviation of the reference."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / expected.std())


def channels_last(x: np.ndarray) -> np.ndarray:
    """(..., C, H, W) -> (..., H, W, C)."""
    return np.moveaxis(x, -3, -1)


def params_from_ldm(state: Mapping[str, np.ndarray], table: Table) -> dict:
    """Nested parameters taken from a state dict; its other entries are ignored.

    Raises:
      KeyError: the state dict lacks weights of the table; the first eight are named.
    """
    missing = [weight.name for weight in table.values() if weight.name not in state]
    if missing:
        named = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
        raise KeyError(f"the state dict lacks {len(missing)} of {len(table)} weights: {named}")
    flat = {tuple(path.split("/")): from_ldm(state[name], layout) for path, (name, layout) in table.items()}
    return unflatten_dict(flat)


def params_to_ldm(params: dict, table: Table) -> dict[str, np.ndarray]:
    """State dict of nested parameters. Raises KeyError when the paths are not exactly the table's."""
    flat = flatten_dict(params, sep="/")
    if flat.keys() != table.keys():
        unmatched = sorted(flat.keys() ^ table.keys())
        raise KeyError(f"parameters without a name, or names without a parameter: {unmatched}")
    return {table[path].name: to_ldm(np.asarray(value), table[path].layout) for path, value in flat.items()}
