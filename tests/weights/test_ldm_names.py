"""Names, shapes and counts of the full-size networks against the public state dicts, exactly."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from loki_jax.models.autoencoder import make_autoencoder
from loki_jax.models.loki import init_params, make_loki
from loki_jax.weights.ldm_names import (
    LdmWeight,
    autoencoder_table,
    encoder_table,
    from_ldm,
    to_ldm,
    unet_table,
)
from tests.models.weights import params_from_ldm, params_to_ldm


@pytest.fixture(scope="module")
def config():
    return ConfigDict(
        dict(
            latent_channels=4,
            latent_size=64,
            dtype="bfloat16",
            remat=True,
            unet=dict(
                channels=320,
                multipliers=(1, 2, 4, 4),
                num_res_blocks=2,
                attention_levels=(0, 1, 2),
                attention_modes=("spatial", "3d", "3d", "3d"),
                head_channels=64,
            ),
            encoder=dict(in_channels=45, stem=64, widths=(128, 256, 320)),
            reference=dict(trainable=False, context_dim=1024),
            autoencoder=dict(kind="kl", widths=(128, 256, 512, 512), num_res_blocks=2, scale=0.18215),
        )
    )


@pytest.fixture(scope="module")
def shapes(config):
    model = make_loki(config)
    params = jax.eval_shape(lambda key: init_params(model, config, key), jax.random.key(0))
    autoencoder = make_autoencoder(config)
    image = jnp.zeros((1, 16, 16, 3))
    vae = jax.eval_shape(lambda key: autoencoder.init(key, image)["params"], jax.random.key(0))
    return dict(params, autoencoder=vae)


def ldm_shapes(shapes, table):
    """State-dict names and shapes of a tree of shapes; fails when the paths are not exactly the table's."""
    flat = flatten_dict(shapes, sep="/")
    assert flat.keys() == table.keys()
    return {
        name: list(to_ldm(np.empty(flat[path].shape, np.bool_), layout).shape)
        for path, (name, layout) in table.items()
    }


def test_parameter_counts(shapes):
    count_parameters = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count_parameters(shapes["generation"]) == 822_878_788
    assert count_parameters(shapes["generation"]["encoder"]) == 7_345_344
    assert count_parameters(shapes["reference"]) == 865_910_724
    assert count_parameters(shapes["autoencoder"]) == 83_653_863
    assert count_parameters(shapes) == 1_772_443_375


def test_generation_names_and_shapes(golden, config, shapes):
    generation = make_loki(config).generation
    prefix = "model.diffusion_model."
    ours = ldm_shapes(shapes["generation"]["unet"], unet_table(generation.unet, prefix))
    encoder = encoder_table(generation.encoder, prefix + "cond_encoder.")
    ours |= ldm_shapes(shapes["generation"]["encoder"], encoder)
    assert ours == with_prefix(json.loads((golden / "keys/loki_unet_keys.json").read_text()), prefix)


def test_reference_names_and_shapes(golden, config, shapes):
    ours = ldm_shapes(shapes["reference"], unet_table(make_loki(config).reference))
    assert ours == json.loads((golden / "keys/ref_unet_keys.json").read_text())


def test_autoencoder_names_and_shapes(golden, config, shapes):
    ours = ldm_shapes(shapes["autoencoder"], autoencoder_table(make_autoencoder(config)))
    assert ours == json.loads((golden / "keys/vae_keys.json").read_text())


def test_every_weight_is_in_the_sd21_checkpoint(golden, config):
    keys = json.loads((golden / "keys/sd21_ldm_checkpoint_keys.json").read_text())
    table = unet_table(make_loki(config).reference, "model.diffusion_model.")
    table |= autoencoder_table(make_autoencoder(config), "first_stage_model.")
    names = {weight.name for weight in table.values()}
    assert names <= set(keys)
    unused = {name for name in set(keys) - names if not name.startswith("cond_stage_model.")}
    assert not any(name.startswith(("model.diffusion_model.", "first_stage_model.")) for name in unused)


def test_order_of_attention_blocks(golden, config):
    """The order in which features are returned is the order in which the public code collects them."""
    blocks = json.loads((golden / "keys/attention_block_order.json").read_text())
    model = make_loki(config)
    unet = model.generation.unet
    x = jax.ShapeDtypeStruct((1, 2, 64, 64, 4), jnp.float32)
    params = jax.eval_shape(
        lambda key: unet.init(key, jnp.zeros((1, 1, 8, 8, 4)), jnp.zeros((1, 1), int)), jax.random.key(0)
    )
    _, features = jax.eval_shape(unet.apply, params, x, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    assert [f.shape[-1] for f in features] == [b["channels"] for b in blocks]
    assert [f.shape[-1] // unet.head_channels for f in features] == [b["heads"] for b in blocks]
    assert len(features) == len(unet.transformers()) == 16
    transformers = [path for path in unet_table(unet).values() if path.name.endswith("attn1.to_q.weight")]
    assert [w.name.removesuffix(".transformer_blocks.0.attn1.to_q.weight") for w in transformers] == [
        b["gen"] for b in blocks
    ]
    level = {320: 0, 640: 1, 1280: 2}
    assert [unet.attention_modes[level[b["channels"]]] for b in blocks] == [b["mode"] for b in blocks]


@pytest.mark.parametrize(
    "layout, shape",
    [
        ("vector", (3,)),
        ("linear", (2, 3)),
        ("conv1x1", (2, 3)),
        ("conv", (3, 3, 2, 5)),
        ("pointwise", (2, 3)),
    ],
)
def test_layouts_invert(layout, shape):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    np.testing.assert_array_equal(from_ldm(to_ldm(array, layout), layout), array)


def test_missing_and_superfluous_weights_are_named():
    table = {"a/kernel": LdmWeight("x.weight", "linear"), "a/bias": LdmWeight("x.bias", "vector")}
    params = params_from_ldm({"x.weight": np.ones((3, 2)), "x.bias": np.ones(3), "legacy": np.ones(1)}, table)
    assert params["a"]["kernel"].shape == (2, 3)
    assert params_to_ldm(params, table)["x.weight"].shape == (3, 2)
    with pytest.raises(KeyError, match="x.bias"):
        params_from_ldm({"x.weight": np.ones((3, 2))}, table)
    with pytest.raises(KeyError, match="b/kernel"):
        params_to_ldm(dict(params, b={"kernel": np.ones(1)}), table)


def with_prefix(keys, prefix):
    return {name if name.startswith(prefix) else prefix + name: shape for name, shape in keys.items()}
