"""Against the Flax models of diffusers: files that they saved, and what they compute.

Their feed-forward has the tanh form of GELU and their transformers normalise with eps 1e-5 where the
PyTorch models, which we follow, have the exact GELU and 1e-6. Set to theirs, our blocks agree closely.
"""

from importlib.util import find_spec

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from loki_jax import convert
from loki_jax.models import unet as unet_module
from loki_jax.models.loki import make_loki
from loki_jax.weights import sources
from loki_jax.weights.layouts import diffusers_configs, make_layout, make_network
from tests.models.weights import error, quick_jit
from tests.weights.tiny import save_config, save_null_prompt, tiny_config

# Slow, because importing diffusers alone takes longer than most test files.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers (the convert extra)"),
]

pytest.importorskip("torch")

# diffusers' Flax models have these fixed.
NOT_IN_FLAX = ("norm_num_groups", "norm_eps", "act_fn", "center_input_sample")


@pytest.fixture(scope="module")
def network():
    config = tiny_config().model
    config.dtype = "float32"
    return make_network(config)


def random_like(shapes, seed):
    """Every parameter random; drawn with numpy, because their own initialisation takes minutes."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.standard_normal(leaf.shape).astype(np.float32)
        if len(leaf.shape) > 1:
            return jnp.asarray(x / np.sqrt(np.prod(leaf.shape[:-1])).astype(np.float32))
        return jnp.asarray(0.1 * x + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    """A folder that `save_pretrained` of both Flax models wrote, with models and parameters."""
    import diffusers

    folder = tmp_path_factory.mktemp("flax")
    configs = diffusers_configs(network)
    models = {}
    for part, kind in (("unet", diffusers.FlaxUNet2DConditionModel), ("vae", diffusers.FlaxAutoencoderKL)):
        dropped = NOT_IN_FLAX if part == "unet" else ()
        options = {k: v for k, v in configs[part].items() if not k.startswith("_") and k not in dropped}
        model = kind(**options)
        params = random_like(jax.eval_shape(model.init_weights, jax.random.key(0)), len(part))
        model.save_pretrained(str(folder / part), params=params)
        models[part] = model, params
    return folder, models


@pytest.fixture(scope="module")
def params(saved, network, tmp_path_factory):
    """Our parameters, through the program."""
    tmp_path = tmp_path_factory.mktemp("ours")
    assert convert.main([
        str(saved[0]), "--out", str(tmp_path / "ours"), "--config", save_config(tmp_path),
        "--null-prompt", str(save_null_prompt(tmp_path, network)),
    ]) == 0  # fmt: skip
    tensors = sources.open_orbax(tmp_path / "ours")
    return unflatten_dict({name: jnp.asarray(tensors.read(name)) for name in tensors.infos}, sep="/")


def test_every_array_that_they_saved_is_ours(saved, params, network):
    _, models = saved
    theirs = flatten_dict({part: tree for part, (_, tree) in models.items()}, sep="/")
    ours = flatten_dict(params, sep="/")
    table = make_layout("flax", network).table
    assert {name for name, _ in table.values()} == theirs.keys()
    for path, (name, _) in table.items():
        np.testing.assert_array_equal(ours[path].ravel(), theirs[name].ravel(), err_msg=name)


def test_unet_computes_what_theirs_does(saved, params, network, monkeypatch):
    model, theirs = saved[1]["unet"]
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    context = rng.standard_normal((2, 77, 16)).astype(np.float32)
    timesteps = jnp.array([3, 700])
    nchw = x.transpose(0, 3, 1, 2)
    expected = quick_jit(lambda p: model.apply({"params": p}, nchw, timesteps, context).sample)(theirs)
    expected = np.moveaxis(np.asarray(expected), 1, -1)
    reference = make_loki(network.config).reference

    def ours():
        apply = lambda p: reference.apply({"params": p}, x[:, None], timesteps[:, None], context=context)[0]
        return quick_jit(apply)(params["reference"])[:, 0]

    assert 1e-5 < error(ours(), expected) < 2e-2  # as it is: exact GELU, eps 1e-6
    norm = unet_module.GroupNorm
    their_norm = lambda groups, eps=1e-5, name=None: norm(groups, 1e-5, name=name)
    monkeypatch.setattr(unet_module, "GroupNorm", their_norm)
    monkeypatch.setattr(nn, "gelu", lambda x, approximate: jax.nn.gelu(x, approximate=True))
    assert error(ours(), expected) < 1e-5


def test_autoencoder_computes_what_theirs_does(saved, params, network):
    model, theirs = saved[1]["vae"]
    image = np.random.default_rng(2).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    nchw = image.transpose(0, 3, 1, 2)
    encode = lambda p: model.apply({"params": p}, nchw, method=model.encode).latent_dist.mean
    latents = quick_jit(encode)(theirs)
    autoencoder, scale = network.autoencoder, network.autoencoder.scale
    apply = lambda method: quick_jit(lambda p, x: autoencoder.apply({"params": p}, x, method=method))
    mean, _ = apply("encode")(params["autoencoder"], image)
    assert error(mean / scale, latents) < 1e-5
    # Their encoder returns channels last, their decoder takes channels first.
    decode = lambda p, z: model.apply({"params": p}, z, method=model.decode).sample
    decoded = quick_jit(decode)(theirs, np.moveaxis(np.asarray(latents), -1, 1))
    assert error(apply("decode")(params["autoencoder"], mean), np.moveaxis(np.asarray(decoded), 1, -1)) < 1e-5
