"""Gradient accumulation: the gradients of the whole batch, part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.networks import build_networks, draw_params, random_params
from loki_jax.training.config import check_config
from loki_jax.training.inputs import open_inputs
from loki_jax.training.sharding import global_batch, make_mesh
from loki_jax.training.state import TrainState
from loki_jax.training.step import make_eval_step, make_gradients, split_microbatches
from tests.training.tiny_run import tiny_config, write_shards


def test_parts_give_the_gradients_of_the_whole(tmp_path):
    config = tiny_config(
        write_shards(tmp_path / "shards"), batch_size=4, window=2, driver__arm="flame_vector",
        model__unet__multipliers=(1,), model__unet__attention_modes=("3d",),
        model__unet__attention_levels=(0,), dropout__identity=0.3, dropout__motion=0.3,
    )  # fmt: skip
    mesh = make_mesh(1, 1, jax.devices()[:1])
    inputs = open_inputs(config, mesh)
    head = inputs.dataset.head()
    networks = build_networks(config, head)
    shapes = jax.eval_shape(lambda: random_params(networks, jax.random.key(0)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape).astype(np.float32), shapes)
    trained = {key: params.pop(key) for key in ("generation", "reference")}
    state = TrainState(jnp.asarray(7, jnp.int32), trained, None, None, params)
    batch = global_batch(inputs.windows[0], mesh)
    found = {}
    for parts in (1, 2):
        config.grad_accum_steps = parts
        found[parts] = jax.jit(make_gradients(config, networks, mesh))(state, batch, head)
    (loss, whole), (other_loss, summed) = found[1], found[2]
    np.testing.assert_allclose(loss, other_loss, rtol=1e-5)
    whole, summed = jax.device_get((whole, summed))
    near = jax.tree.map(lambda a, b: np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a), whole, summed)
    assert all(jax.tree.leaves(near))


def test_validation_goes_through_the_same_microbatches(tmp_path):
    config = tiny_config(
        write_shards(tmp_path / "shards"), batch_size=4, window=2, driver__arm="flame_vector",
        model__unet__multipliers=(1,), model__unet__attention_modes=("3d",),
        model__unet__attention_levels=(0,), model__reference__driver=False,
    )  # fmt: skip
    mesh = make_mesh(1, 1, jax.devices()[:1])
    inputs = open_inputs(config, mesh)
    head = inputs.dataset.head()
    networks = build_networks(config, head)
    params = jax.tree.map(lambda x: x + 0.05, draw_params(networks, jax.random.key(0)))
    batch = global_batch(inputs.held_out[0], mesh)
    losses, widest = [], []
    for steps in (1, 4):
        config.grad_accum_steps = steps
        compiled = jax.jit(make_eval_step(config, networks, mesh)).lower(params, {}, batch, head, 3).compile()
        losses.append(float(compiled(params, {}, batch, head, 3)))
        widest.append(compiled.memory_analysis().temp_size_in_bytes)
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert widest[1] < 0.6 * widest[0]


@pytest.mark.parametrize("null_gradient", [False, True])
def test_a_lost_driver_map_trains_its_encoder_only_if_asked(tmp_path, null_gradient):
    config = tiny_config(
        write_shards(tmp_path / "shards"), batch_size=2, window=2, dropout__identity=0.0,
        dropout__motion=1.0, dropout__both=0.0, dropout__null_gradient=null_gradient,
        model__unet__multipliers=(1,), model__unet__attention_modes=("3d",),
        model__unet__attention_levels=(0,), model__reference__driver=False,
    )  # fmt: skip
    mesh = make_mesh(1, 1, jax.devices()[:1])
    inputs = open_inputs(config, mesh)
    head = inputs.dataset.head()
    networks = build_networks(config, head)
    params = draw_params(networks, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1, params)
    trained = {key: params.pop(key) for key in ("generation", "reference")}
    state = TrainState(jnp.asarray(7, jnp.int32), trained, None, None, params)
    gradients = jax.jit(make_gradients(config, networks, mesh))(
        state, global_batch(inputs.windows[0], mesh), head
    )[1]
    moves = lambda tree: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(tree)) > 0
    assert moves(gradients["generation"]["encoder"]) == null_gradient
    assert moves(gradients["generation"]["unet"]) and moves(gradients["reference"])


def test_a_device_deals_out_its_own_windows():
    split = split_microbatches(jnp.arange(12).reshape(6, 2), 3)
    np.testing.assert_array_equal(split, jnp.arange(12).reshape(3, 2, 2))


def test_batches_that_cannot_be_cut_are_refused(tmp_path):
    config = tiny_config(tmp_path, batch_size=4, grad_accum_steps=3)
    with pytest.raises(ValueError, match="batch_size=4.*grad_accum_steps=3"):
        check_config(config)
