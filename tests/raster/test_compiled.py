"""What the compiled programs promise: other platforms, little memory, no gathering between devices."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax import driver, raster

FRAMES, VERTICES, SIZE = 16, 5223, 512


def grid_faces(side):
    """Two triangles for each cell of side x side vertices."""
    i, j = np.meshgrid(np.arange(side - 1), np.arange(side - 1), indexing="ij")
    a = (i * side + j).ravel()
    return np.concatenate([np.stack([a, a + side, a + 1], -1), np.stack([a + 1, a + side, a + side + 1], -1)])


FACES = jnp.asarray(grid_faces(72), jnp.int32)  # 10,082 over 5,184 of the vertices


def drawn_map(vertices, canonical, offsets, dtype=jnp.bfloat16):
    mask = jnp.ones(vertices.shape[-2], bool)
    inputs = driver.DriverInputs(FACES, canonical, vertices, offsets)
    return driver.map_of_mesh(vertices, mask, inputs, SIZE, dtype=dtype)


def edge_gradient(vertices, attributes, size=64):
    def loss(vertices, attributes):
        drawn = raster.render(vertices, FACES, attributes, size, smooth_silhouettes=True, supersample=2)
        return jnp.sum(drawn.image**2) + jnp.sum(drawn.coverage)

    return jax.grad(loss, argnums=(0, 1))(vertices, attributes)


def shapes(frames=FRAMES):
    mesh = jax.ShapeDtypeStruct((frames, VERTICES, 3), jnp.float32)
    return mesh, jax.ShapeDtypeStruct((VERTICES, 3), jnp.float32)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_driver_map_and_edge_gradients_lower_for(platform):
    mesh, flat = shapes(2)
    exported = jax.export.export(jax.jit(drawn_map), platforms=[platform])(mesh, flat, mesh)
    assert exported.platforms == (platform,)
    assert exported.out_avals[0].shape == (2, SIZE, SIZE, 45) and exported.out_avals[0].dtype == jnp.bfloat16
    exported = jax.export.export(jax.jit(edge_gradient), platforms=[platform])(mesh, flat)
    assert [aval.shape for aval in exported.out_avals] == [mesh.shape, flat.shape]


@pytest.mark.parametrize("what", ["fragments", "map"])
def test_sixteen_frames_need_little_memory(what):
    """Under 300 MB of temporaries: nothing is as large as pixels x faces, nor as a second map."""
    mesh, flat = shapes()
    if what == "map":
        lowered = jax.jit(partial(drawn_map, dtype=jnp.float32)).lower(mesh, flat, mesh)
    else:
        lowered = jax.jit(raster.rasterize, static_argnums=2).lower(mesh, FACES, SIZE)
    needed = lowered.compile().memory_analysis()
    assert 0 < needed.temp_size_in_bytes < 300e6, f"{needed.temp_size_in_bytes / 1e6:.0f} MB"
    channels = 45 if what == "map" else 5
    assert needed.output_size_in_bytes >= FRAMES * SIZE**2 * channels * 4


SHARDED = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from loki_jax import raster

mesh = jax.make_mesh((4,), ("frames",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
vertices = rng.uniform(-1, 1, (8, 30, 3)).astype(np.float32) + np.float32([0, 0, 3])
faces = rng.integers(0, 30, (20, 3)).astype(np.int32)
weights = rng.normal(size=(8, 16, 16, 3)).astype(np.float32)

def picture(vertices):
    return raster.render(vertices, faces, vertices, 16, cull=False, smooth_silhouettes=True).image

def both(vertices, weights):
    image, backward = jax.vjp(picture, vertices)
    return image, backward(weights)[0]

alone = jax.jit(both)(vertices, weights)
frames = P("frames")
sharded = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=frames, out_specs=frames, check_vma=False))
placed = [jax.device_put(v, NamedSharding(mesh, frames)) for v in (vertices, weights)]
compiled = sharded.lower(*placed).compile()
talk = r"all-(gather|reduce|to-all)|collective-permute|reduce-scatter"
print("collectives", len(re.findall(talk, compiled.as_text())))
for found, expected in zip(compiled(*placed), alone):
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, frames), found.ndim), found.sharding
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
print("covered", float(np.mean(np.asarray(alone[0]) != 0)))
"""


def test_frames_on_four_devices_exchange_nothing():
    """Under `jax.shard_map` over frames: the same pictures and gradients, and no collective at all."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=env,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed = dict(line.split() for line in done.stdout.splitlines())
    assert printed["collectives"] == "0" and float(printed["covered"]) > 0.2
