"""Cross-attention kept on the null prompt, and attention that is added to a pretrained backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo
from loki_jax.face.builtin import builtin_head
from loki_jax.models.unet import BlockOptions, TransformerBlock
from loki_jax.networks import build_networks, denoise, random_params
from loki_jax.training.config import check_config
from tests.models.weights import quick_jit

T, SIZE = 3, 8


def small_config(**options):
    """The tiny demo with one transformer (the middle's), a frozen reference and a null prompt."""
    config = demo.get_config("tiny")
    config.image_size = SIZE * 4
    config.model.unet.multipliers = (1,)
    config.model.unet.attention_levels = ()
    config.model.unet.attention_modes = ("spatial",)
    config.model.encoder.widths = (8, 8)
    config.model.reference.trainable = False
    config.model.reference.driver = False
    config.model.reference.context_dim = 8
    config.update_from_flattened_dict(options)
    return config


def names(tree):
    return {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def randomised(networks, seed=0):
    shapes = jax.eval_shape(lambda: random_params(networks, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), shapes)


def run(networks, params, x):
    features = tuple(jnp.ones((1, 4, 16)) for _ in networks.loki.generation.unet.transformers())
    return denoise(networks, params, x, jnp.full(x.shape[:2], 7), None, features)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(3), (1, T, SIZE, SIZE, 48))


def test_cross_attention_is_kept_on_the_null_prompt_or_dropped(x):
    dropped = build_networks(small_config(), builtin_head())
    kept = build_networks(small_config(**{"model.unet.context_dim": 8}), builtin_head())
    a, b = (
        jax.eval_shape(lambda n=n: random_params(n, jax.random.key(0)))["generation"]["unet"]
        for n in (dropped, kept)
    )
    extra = names(b) - names(a)
    assert not names(a) - names(b) and extra and all("/cross_" in name for name in extra)

    # The prompt in the parameters is what the branch attends to.
    params = randomised(kept)
    step = quick_jit(lambda params: run(kept, params, x))
    out = step(params)
    assert jnp.abs(step(params | {"null_prompt": 2 * params["null_prompt"]}) - out).max() > 1e-3

    # A pretrained backbone, whose arrays the branch takes by name, has them all.
    shapes = jax.tree.map(jnp.shape, params)
    block = lambda tree: tree["middle_transformer"]["block"]["cross_attention"]
    assert block(shapes["generation"]["unet"]) == block(shapes["reference"])
    config = small_config(**{"model.unet.context_dim": 8})
    config.pretrained = "sd"
    check_config(config)


@pytest.mark.parametrize("mode", ["temporal", "full"])
def test_added_attention_starts_as_nothing_and_joins_frames(x, mode):
    plain = build_networks(small_config(), builtin_head())
    added = build_networks(small_config(**{"model.unet.attention_modes": (mode,)}), builtin_head())
    params = randomised(added)
    before = jax.eval_shape(lambda: random_params(plain, jax.random.key(0)))
    # Only the generation branch grows: a pretrained reference has no such layers.
    assert names(params["reference"]) == names(before["reference"])
    extra = names(params["generation"]) - names(before["generation"])
    assert extra and all(f"/{mode}_" in name for name in extra)

    # The new layers' projection out is zero at the start ...
    block = TransformerBlock(BlockOptions(8, 4, None, "xla", jnp.float32), mode)
    initial = block.init(jax.random.key(0), jnp.ones((1, T, 4, 16)), None, None)["params"]
    out = initial[f"{mode}_attention"]["out"]
    assert (
        not any(leaf.any() for leaf in jax.tree.leaves(out))
        and initial[f"{mode}_attention"]["q"]["kernel"].any()
    )
    # ... and with that, the model is the one without them.
    zeroed = lambda path, leaf: 0 * leaf if f"{mode}_attention']['out" in jax.tree_util.keystr(path) else leaf
    started = jax.tree_util.tree_map_with_path(zeroed, params)
    pick = lambda shapes, tree: {
        key: pick(value, tree[key]) if isinstance(value, dict) else tree[key] for key, value in shapes.items()
    }
    step = quick_jit(lambda params, x: run(added, params, x))
    np.testing.assert_allclose(
        step(started, x), quick_jit(lambda params: run(plain, params, x))(pick(before, started)), atol=1e-5
    )

    # Without it frames know nothing of each other here; with it they do, in any order alike.
    other = x.at[:, 0].add(1.0)
    assert jnp.abs(step(started, other)[:, 1:] - step(started, x)[:, 1:]).max() < 1e-5
    assert jnp.abs(step(params, other)[:, 1:] - step(params, x)[:, 1:]).max() > 1e-3
    np.testing.assert_allclose(step(params, x[:, ::-1]), step(params, x)[:, ::-1], atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model.unet.context_dim": 4}, "null prompt has width 8"),
        ({"diffusion.max_beta": 1.0, "diffusion.prediction": "epsilon"}, "leaves no signal at the last step"),
        ({"diffusion.min_snr_gamma": -1.0}, "min_snr_gamma=-1.0"),
    ],
)
def test_contradictions(options, message):
    config = small_config(**options)
    config.pretrained = "sd"
    with pytest.raises(ValueError, match=message):
        check_config(config)
