"""UNet and VAE of Stable Diffusion 2.1 at full width against diffusers + torch, every parameter random.

Slow, and with two copies of the UNet the largest tests there are: about 9 GB of memory.
"""

import gc
import json
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from loki_jax.models.loki import make_loki
from loki_jax.weights.diffusers_names import diffusers_autoencoder_table, diffusers_unet_table
from loki_jax.weights.layouts import diffusers_configs, make_layout, make_network, sd21_config
from loki_jax.weights.ldm_names import from_ldm, to_ldm
from tests.models.weights import error, recipe_weight

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers (the convert extra)"),
]

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def network():
    return make_network(sd21_config())


@pytest.fixture(autouse=True)
def free_memory():
    yield
    gc.collect()


def random_model(kind, options):
    """A diffusers model whose activations stay near 1; zero-initialised layers would hide errors."""
    with torch.device("meta"):
        model = kind(**{key: value for key, value in options.items() if not key.startswith("_")})
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
    return model


def our_params(model, table):
    state = model.state_dict()
    assert {name for name, _ in table.values()} == set(state)
    flat = {path: jnp.asarray(from_ldm(state[name].numpy(), how)) for path, (name, how) in table.items()}
    return unflatten_dict(flat, sep="/")


def nchw(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def nhwc(x):
    return np.moveaxis(x.numpy(), 1, -1)


@torch.inference_mode()
def test_unet_at_full_width(network):
    import diffusers

    model = random_model(diffusers.UNet2DConditionModel, diffusers_configs(network)["unet"])
    params = our_params(model, diffusers_unet_table(network.loki.reference))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 32, 32, 4)).astype(np.float32)
    context = rng.standard_normal((1, 77, 1024)).astype(np.float32)
    expected = nhwc(model(nchw(x), 500, torch.from_numpy(context)).sample)
    reference = make_loki(network.config).reference
    apply = lambda p: reference.apply({"params": p}, x[:, None], jnp.full((1, 1), 500), context=context)[0]
    found = error(jax.jit(apply)(params)[:, 0], expected)
    print(f"relative error of the UNet: {found:.1e}")
    assert found < 1e-4


@torch.inference_mode()
def test_generation_unet_of_a_public_checkpoint_at_full_width(network, golden):
    """The recipe's weights under the public code's names; with one frame and no reference, the generation
    branch is Stable Diffusion's UNet whose cross-attention adds nothing."""
    import diffusers

    prefix = "model.diffusion_model."
    keys = json.loads((golden / "keys" / "loki_unet_keys.json").read_text())
    shapes = {prefix + name.removeprefix(prefix): tuple(shape) for name, shape in keys.items()}
    branch = "generation/unet/"
    table = {
        path.removeprefix(branch): weight
        for path, weight in make_layout("loki", network).table.items() if path.startswith(branch)
    }  # fmt: skip
    theirs = diffusers_unet_table(network.loki.reference)
    model = random_model(diffusers.UNet2DConditionModel, diffusers_configs(network)["unet"])
    state, flat = model.state_dict(), {}
    for path, (name, how) in theirs.items():
        if path in table:
            loki_name, loki_how = table[path]
            weight = recipe_weight(loki_name.replace(prefix, "gen/", 1), shapes[loki_name], seed=7)
            ours = from_ldm(weight, loki_how)
            flat[path] = jnp.asarray(ours)
            state[name].copy_(torch.from_numpy(np.array(to_ldm(ours, how))))
        elif ".attn2.to_out." in name:
            state[name].zero_()
    assert flat.keys() == table.keys()

    x = np.random.default_rng(0).standard_normal((1, 32, 32, 4)).astype(np.float32)
    expected = nhwc(model(nchw(x), 500, torch.zeros(1, 1, 1024)).sample)
    generation = make_loki(network.config).generation.unet
    apply = lambda p: generation.apply({"params": p}, x[:, None], jnp.full((1, 1), 500))[0]
    found = error(jax.jit(apply)(unflatten_dict(flat, sep="/"))[:, 0], expected)
    print(f"relative error of the generation UNet: {found:.1e}")
    assert found < 1e-4


@torch.inference_mode()
def test_vae_at_full_width(network):
    import diffusers

    model = random_model(diffusers.AutoencoderKL, diffusers_configs(network)["vae"])
    autoencoder, scale = network.autoencoder, network.autoencoder.scale
    params = our_params(model, diffusers_autoencoder_table(autoencoder))
    image = np.random.default_rng(0).uniform(-1, 1, (1, 128, 128, 3)).astype(np.float32)
    posterior = model.encode(nchw(image)).latent_dist
    expected = nhwc(model.decode(posterior.mean).sample)
    apply = lambda method: jax.jit(lambda p, x: autoencoder.apply({"params": p}, x, method=method))
    mean, logvar = apply("encode")(params, image)
    errors = {
        "mean": error(mean / scale, nhwc(posterior.mean)),
        "logvar": error(logvar - 2 * np.log(scale), nhwc(posterior.logvar)),
        "decoded": error(apply("decode")(params, scale * nhwc(posterior.mean)), expected),
    }
    print(f"relative errors of the VAE: {errors}")
    assert max(errors.values()) < 1e-4, errors
