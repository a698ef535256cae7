"""A new arm is one entry of the registry: it trains, animates and shows its preview."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.driver.registry import ARMS, DriverArm, driver_channels, find_arm, find_map_arm
from loki_jax.face.builtin import builtin_head
from loki_jax.face.normals import vertex_normals
from loki_jax.networks import driver_input, driver_preview
from loki_jax.pipeline import LokiPipeline, retarget_clip
from loki_jax.raster import interpolate
from loki_jax.sources import load_driving_clip, load_portrait
from loki_jax.train import train
from tests.training.tiny_run import SIZE, tiny_config, write_shards

pytestmark = pytest.mark.usefixtures("few_optimizations")


def camera_normals(fragments, inputs, dtype=jnp.float32):
    """Unit normals of the surface in camera axes (+x right, +y down, +z away), zero on the background."""
    normals = interpolate(fragments, inputs.faces, vertex_normals(inputs.points, inputs.faces))
    length = jnp.linalg.norm(jnp.where(normals == 0, 1e-9, normals), axis=-1, keepdims=True)
    return (normals / length).astype(dtype)


def normals_picture(driver):
    covered = (driver != 0).any(-1, keepdims=True)
    return jnp.where(covered, jnp.round(127.5 * (driver + 1)), 255).astype(jnp.uint8)


@pytest.fixture
def with_normals(monkeypatch):
    monkeypatch.setitem(ARMS, "normals", DriverArm(3, camera_normals, normals_picture))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("registry") / "shards")


def test_a_new_arm_trains_animates_and_shows_its_preview(with_normals, shards, tmp_path):
    config = tiny_config(shards, steps=1, driver__arm="normals")
    assert np.isfinite(train(config, tmp_path))

    pipeline = LokiPipeline.from_checkpoint(tmp_path)
    assert pipeline.config.driver.arm == "normals"
    portrait = load_portrait(f"{shards}:clip1", pipeline.head, SIZE)
    clip = load_driving_clip(f"{shards}:clip2", pipeline.head, SIZE)
    windows = list(pipeline.windows(portrait, clip, steps=1))
    frames, pictures = (np.concatenate(part) for part in zip(*windows, strict=True))
    assert frames.shape == pictures.shape == (len(clip.frames), SIZE, SIZE, 3)

    moved = jax.tree.map(lambda x: jnp.asarray(x)[None], retarget_clip(pipeline.head, clip, portrait))
    where = jax.tree.map(lambda x: jnp.asarray(x)[None], (portrait.camera, portrait.crop))
    in_time = lambda x: jnp.broadcast_to(x[:, None], (1, len(clip.frames), *x.shape[1:]))
    inputs = (moved, *jax.tree.map(in_time, where))
    driver = jax.jit(lambda *inputs: driver_input(pipeline.config, pipeline.head, *inputs))(*inputs)
    # Compiled as another program, a value may round to the other side of one half.
    np.testing.assert_allclose(pictures, normals_picture(driver)[0], atol=1)
    np.testing.assert_array_equal(
        driver_preview(pipeline.config, pipeline.head, driver, *inputs), normals_picture(driver)
    )
    covered = np.asarray(driver != 0).any(-1)
    assert 0.05 < covered.mean() < 0.95 and (np.asarray(driver)[~covered] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(driver, axis=-1)[covered], 1, atol=1e-5)
    # What is seen faces the camera, which looks along +z.
    assert np.mean(np.asarray(driver)[covered][:, 2] < 0.1) > 0.95


def test_an_arm_without_a_map_shows_the_default_map():
    assert find_map_arm("flame_vector") is find_arm("full") and find_map_arm("no_deform") is ARMS["no_deform"]


def test_channels_of_every_arm_and_an_unknown_one():
    head = builtin_head()
    channels = {name: driver_channels(name, head) for name in ARMS}
    expected = {"full": 45, "no_posenc": 3, "no_deform": 42, "flow": 48, "warp": 51, "regions": 4}
    assert channels == expected | {"flame_vector": head.n_expression + 12}
    with pytest.raises(ValueError, match="unknown driver arm 'normals'; one of full, no_posenc"):
        find_arm("normals")
