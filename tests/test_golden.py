"""The committed reference vectors, and the rebuilt weights and inputs, are those of the complete set."""

import json

import numpy as np

from tests.golden import make
from tests.models.weights import recipe_driver_map, recipe_input, recipe_state

# File -> array there -> what rebuilds it.
INPUTS = {
    "conditioning_encoder": {
        "input": lambda shape: recipe_input("input", shape, 1234),
        "cotangent": lambda shape: recipe_input("cotangent", shape, 1234),
    },
    "attention": {
        f"{mode}/{theirs}": lambda shape, name=f"{mode}/{name}": recipe_input(name, shape, 77)
        for mode in ("none", "3d", "temporal")
        for theirs, name in (("x", "x"), ("ref_kv", "ref"), ("cotangent", "cot"))
    },
    "unet_tiny_io": {
        name: lambda shape, name=name: recipe_input(name, shape, 20240)
        for name in ("x", "ref_z", "null_context")
    },
    "unet_tiny_spatial_cond": {"spatial_cond": lambda shape: recipe_driver_map()},
    "vae_tiny": {
        "image": lambda shape: recipe_input("img", shape, 4242, scale=0.5),
        "z": lambda shape: recipe_input("z", shape, 4242),
    },
}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_all_is_as_in_the_complete_set(golden, whole_golden):
    for file in make.LEFT_OUT:
        with np.load(golden / f"{file}.npz") as data:
            assert_same(dict(data), make.kept_arrays(whole_golden, file))
    for name in make.KEYS:
        ours, theirs = (
            json.loads((folder / f"keys/{name}.json").read_text()) for folder in (golden, whole_golden)
        )
        assert ours == theirs, name
    for network in make.NETWORKS:
        assert_same(recipe_state(golden, network), make.state_of(whole_golden, network))
    for file, arrays in INPUTS.items():
        with np.load(whole_golden / f"{file}.npz") as data:
            for name, rebuild in arrays.items():
                np.testing.assert_array_equal(
                    rebuild(data[name].shape), data[name], err_msg=f"{file}: {name}"
                )
