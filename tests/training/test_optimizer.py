"""The optimiser's options: schedules, decay masks, clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common, demo
from loki_jax.face.builtin import builtin_head
from loki_jax.networks import build_networks, random_params
from loki_jax.training.sharding import path_name
from loki_jax.training.state import decay_mask, learning_rate, make_optimizer


def config_of(**options):
    config = common.base_config()
    config.steps = 100
    config.optimizer.update(options)
    return config


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {0: 1.0, 99: 1.0, 10_000: 1.0}),
        (dict(warmup_steps=10), {0: 0.0, 5: 0.5, 10: 1.0, 99: 1.0}),
        (dict(decay="cosine"), {0: 1.0, 50: 0.5, 25: 0.5 + np.sqrt(0.125), 100: 0.0, 200: 0.0}),
        (dict(decay="cosine", warmup_steps=20, final_share=0.2), {10: 0.5, 20: 1.0, 60: 0.6, 100: 0.2}),
        (
            dict(decay="linear", warmup_steps=20, hold_steps=40),
            {10: 0.5, 20: 1.0, 60: 1.0, 80: 0.5, 100: 0.0},
        ),
        (dict(decay="linear", final_share=0.5), {0: 1.0, 50: 0.75, 100: 0.5, 300: 0.5}),
        # EDM2 (Karras et al. 2024): sqrt(hold / step) from the hold on.
        (dict(decay="rsqrt", hold_steps=25), {0: 1.0, 25: 1.0, 100: 0.5, 400: 0.25}),
    ],
)
def test_learning_rate(options, expected):
    rate = learning_rate(config_of(learning_rate=3e-4, **options))
    found = {step: float(rate(step)) / 3e-4 for step in expected}
    assert found == pytest.approx(expected, abs=1e-6)


def test_decay_touches_matrices_only_where_asked():
    config = demo.get_config("tiny")
    networks = build_networks(config, builtin_head())
    shapes = jax.eval_shape(lambda: random_params(networks, jax.random.key(0)))
    decayed = jax.tree_util.tree_leaves_with_path(decay_mask(shapes))
    names = {True: set(), False: set()}
    for path, yes in decayed:
        names[yes].add(path_name(path).split("/")[-1])
    assert names == {True: {"kernel"}, False: {"bias", "scale"}}

    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    for on, bias in (("all", 1 - 1e-2), ("matrices", 1.0)):
        optimizer = make_optimizer(config_of(learning_rate=0.1, weight_decay=0.1, weight_decay_on=on))
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
        new = optax.apply_updates(params, updates)
        np.testing.assert_allclose(new["kernel"], 1 - 1e-2, rtol=1e-6)
        np.testing.assert_allclose(new["bias"], bias, rtol=1e-6)


def test_clipping_keeps_the_direction_and_bounds_the_norm():
    params = {"a": jnp.zeros(2), "b": jnp.zeros((1, 1))}
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}  # norm 5
    moments = {}
    for clip in (0.0, 1.0, 10.0):
        optimizer = make_optimizer(config_of(clip_norm=clip, b1=0.0))
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        moments[clip] = optax.tree.get(state, "mu")
    np.testing.assert_allclose(moments[1.0]["a"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(moments[1.0]["b"], [[0.8]], rtol=1e-6)
    for clip in (0.0, 10.0):
        jax.tree.map(np.testing.assert_array_equal, moments[clip], gradient)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(decay="step"), "decay='step': use constant, cosine, linear or rsqrt"),
        (dict(decay="rsqrt"), "set config.optimizer.hold_steps"),
        (dict(weight_decay_on="norms"), "weight_decay_on='norms': use all or matrices"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(config_of(**options))
