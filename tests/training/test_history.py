"""What a window sees of the frames before it in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.networks import build_networks, random_params
from loki_jax.training.config import check_config
from loki_jax.training.init import abstract_batch
from loki_jax.training.step import draw_history, make_loss, share_without_history, window_keys
from tests.training.tiny_run import tiny_config

WINDOWS = 4


@pytest.fixture(scope="module")
def head():
    from loki_jax.face.builtin import builtin_head

    return builtin_head()


@pytest.fixture(scope="module")
def loss(head):
    """loss(frames (B,k+T,...), share of windows without history) of a random network, and frames."""
    config = tiny_config(
        "none", batch_size=WINDOWS, history__frames=2, model__unet__attention_levels=(0,),
        dropout__motion=0.0, dropout__both=0.0, dropout__identity=0.0,
    )  # fmt: skip
    networks, rng = build_networks(config, head), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: random_params(networks, jax.random.key(0)))
    params = jax.tree.map(lambda x: 0.4 * rng.standard_normal(x.shape).astype(np.float32), shapes)

    def fill(x):
        return rng.integers(0, 255, x.shape, x.dtype) if x.dtype == jnp.uint8 else np.ones(x.shape, x.dtype)

    batch = jax.tree.map(fill, abstract_batch(config, head))
    keys = window_keys(jax.random.key(1), jnp.arange(WINDOWS))
    of = make_loss(config, networks)
    run = jax.jit(lambda frames, lost: of(params, {}, batch._replace(frames=frames), head, keys, True, lost))
    return run, batch.frames


def test_windows_see_their_history_unless_it_is_lost(loss):
    run, frames = loss
    other = frames.copy()
    other[:, :2] = 0
    assert frames.shape[1] == 4 and np.isfinite(run(frames, 0.0))
    # Lost, its pixels are neither seen nor predicted.
    assert float(run(frames, 1.0)) == float(run(other, 1.0))
    assert abs(float(run(frames, 0.0)) - float(run(other, 0.0))) > 1e-5
    assert abs(float(run(frames, 0.0)) - float(run(frames, 1.0))) > 1e-5


def test_history_is_clean_but_for_noise_of_the_stated_level():
    latents = jnp.ones((64, 3, 8, 8, 4))
    keys = window_keys(jax.random.key(0), jnp.arange(64))
    clean, keep = draw_history(latents, keys, 0.0, jnp.zeros(64))
    np.testing.assert_array_equal(clean, latents)
    assert keep.all()
    noisy, keep = draw_history(latents, keys, 0.5, jnp.full(64, 0.25))
    assert 0.5 < keep.mean() < 0.95
    np.testing.assert_array_equal(noisy[~keep], 0)
    std = (noisy - latents)[keep].std((1, 2, 3, 4))
    assert std.max() < 0.55 and std.min() < 0.1  # standard deviations are known to 3 %


def test_history_is_zero_until_the_last_part_of_training():
    config = tiny_config("none", steps=100, history__real_share=0.2, history__dropout=0.3)
    shares = [float(share_without_history(config, jnp.asarray(step))) for step in (0, 79, 80, 99)]
    np.testing.assert_allclose(shares, [1, 1, 0.3, 0.3])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"history__frames": 3}, "history.frames=3: 0 to config.window=2"),
        ({"history__noise": -1.0}, "history.noise=-1.0"),
        ({"history__real_share": 1.5}, "real_share=1.5"),
    ],
)
def test_options_of_the_history_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        check_config(tiny_config("none", **changes))
