"""Writers hold one tensor at a time, whole files appear or none, and casts lose nothing silently."""

import tracemalloc
import weakref

import numpy as np
import pytest

from loki_jax.weights import sources
from loki_jax.weights.tensors import TensorInfo, Tensors, WeightsError
from loki_jax.weights.write import cast, write_flax, write_orbax, write_safetensors

COUNT, SIZE = 8, 2**18  # tensors of 1 MiB


def watched():
    """Tensors that fail when a second one is read while another is alive."""
    alive: list[weakref.ref] = []

    def read(name):
        assert sum(ref() is not None for ref in alive) == 0, "an earlier tensor is still in memory"
        array = np.full(SIZE, int(name.partition("/")[2]), np.float32)
        alive.append(weakref.ref(array))
        return array

    infos = {f"part/{i}": TensorInfo((SIZE,), "float32") for i in range(COUNT)}
    return Tensors(infos, read, ()), alive


@pytest.mark.parametrize("kind", ["safetensors", "msgpack", "orbax"])
def test_one_tensor_at_a_time(tmp_path, kind):
    tensors, alive = watched()
    path = tmp_path / f"x.{kind}"
    if kind == "orbax":
        write_orbax(tmp_path / "warm", sources.from_arrays({"part/0": np.zeros(3, np.float32)}))
    tracemalloc.start()
    if kind == "safetensors":
        write_safetensors(path, tensors, {})
    elif kind == "msgpack":
        write_flax(path, tensors)
    else:
        write_orbax(path, tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(alive) == COUNT
    # An array and its bytes; all eight would be 8 MiB.
    assert peak < 4 * 4 * SIZE
    back = sources.open_orbax(path) if kind == "orbax" else sources.open_file(path)
    for name in tensors.infos:
        np.testing.assert_array_equal(back.read(name), int(name.partition("/")[2]))
    leftovers = {p.name for p in tmp_path.iterdir()} - {path.name, "warm"}
    assert not leftovers


def test_cast():
    tensors = sources.from_arrays(
        {"a": np.array([1.5, -2.0], np.float32), "big": np.array([1e5], np.float32)}
    )
    half = cast(tensors, "float16")
    assert half.infos["a"] == TensorInfo((2,), "float16")
    np.testing.assert_array_equal(half.read("a"), np.array([1.5, -2.0], np.float16))
    with pytest.raises(WeightsError, match="big: holds numbers too large for float16"):
        half.read("big")
    assert cast(tensors, "bfloat16").read("big").dtype.name == "bfloat16"
