"""Forward and backward parity with the public PyTorch networks, every parameter random."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.models.autoencoder import AutoencoderKL
from loki_jax.models.encoder import ConditioningEncoder
from loki_jax.models.unet import BlockOptions, SpatioTemporalTransformer, UNet
from loki_jax.weights.ldm_names import (
    autoencoder_table,
    encoder_table,
    transformer_table,
    unet_table,
)
from tests.golden.make import NETWORKS, digest
from tests.models.weights import (
    channels_last,
    error,
    params_from_ldm,
    params_to_ldm,
    quick_jit,
    recipe_driver_map,
    recipe_input,
    recipe_state,
)

# The reference branch was only recorded in torch's float32, so its own rounding comes on top.
FLOAT32_TOLERANCE = 2e-4


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_are_those_of_the_public_run(golden, network):
    state = recipe_state(golden, network)
    assert digest(state) == json.loads((golden / "weights.json").read_text())[network]["sha256"]


# ------------------------------------------------------------------------- conditioning encoder


def test_conditioning_encoder(golden):
    data = np.load(golden / "conditioning_encoder.npz")
    encoder = ConditioningEncoder(stem=32, widths=(32, 64, 64), out=64)
    table = encoder_table(encoder)
    params = params_from_ldm(recipe_state(golden, "encoder"), table)
    x = jnp.asarray(channels_last(recipe_input("input", (2, 45, 64, 64), seed=1234)))
    cotangent = jnp.asarray(channels_last(recipe_input("cotangent", (2, 64, 8, 8), seed=1234)))

    @quick_jit
    def run(params, x):
        out, pullback = jax.vjp(lambda p, x: encoder.apply({"params": p}, x), params, x)
        return out, pullback(cotangent)

    out, (grads, grad_x) = run(params, x)
    assert error(out, channels_last(data["output"])) < 2e-5
    assert error(grad_x[..., :4], channels_last(data["grad_input_ch0_3"])) < 2e-5
    grads = params_to_ldm(grads, table)
    compared = [name.removeprefix("grad/") for name in data.files if name.startswith("grad/")]
    assert len(compared) == 6
    for name in compared:
        assert error(grads[name], data[f"grad/{name}"]) < 2e-5, name


# -------------------------------------------------------------------------------- transformer


@pytest.mark.parametrize("public_mode, mode", [("none", "spatial"), ("3d", "3d"), ("temporal", "temporal")])
@pytest.mark.parametrize("backend", ["xla", "chunked"])
def test_transformer(golden, public_mode, mode, backend):
    data = {
        name.removeprefix(f"{public_mode}/"): value
        for name, value in np.load(golden / "attention.npz").items()
        if name.startswith(f"{public_mode}/")
    }
    options = BlockOptions(16, norm_groups=32, context_dim=None, backend=backend, dtype=jnp.float32)
    transformer = SpatioTemporalTransformer(options, mode, frames=4)
    table = transformer_table(mode, cross_attention=False)
    params = params_from_ldm(recipe_state(golden, f"attention_{public_mode}"), table)
    drawn = lambda name, *shape: recipe_input(f"{public_mode}/{name}", shape, seed=77)
    apply = lambda params, x, reference: transformer.apply({"params": params}, x, reference)
    x, reference = jnp.asarray(channels_last(drawn("x", 8, 32, 6, 6))), jnp.asarray(drawn("ref", 2, 36, 32))
    cotangent = jnp.asarray(channels_last(drawn("cot", 8, 32, 6, 6)))

    @quick_jit
    def run(params, x, reference):
        out, pullback = jax.vjp(lambda p, x: apply(p, x, reference)[0], params, x)
        zero = apply(params, x, jnp.zeros_like(reference))[0]
        return out, pullback(cotangent), zero, apply(params, x, None)[0]

    out, (grads, grad_x), out_zero, out_none = run(params, x, reference)
    assert error(out, channels_last(data["out_ref"])) < 2e-5
    assert error(out_zero, channels_last(data["out_zeroref"])) < 2e-5
    assert error(out_none, channels_last(data["out_noref"])) < 2e-5
    assert error(grad_x, channels_last(data["grad_x_ref"])) < 2e-5
    grads = params_to_ldm(grads, table)
    for part in "qkv":
        name = f"transformer_blocks.0.attn1.to_{part}.weight"
        assert error(grads[name], data[f"grad_ref/{name}"]) < 2e-5, name
    # The three cases are different functions.
    assert error(out_zero, out_none) > 1e-2
    assert error(out, out_zero) > 1e-2


# --------------------------------------------------------------------------------------- UNet


@pytest.fixture(scope="module")
def unet_case(golden):
    sizes = dict(channels=32, multipliers=(1, 2, 4, 4), head_channels=16)
    generation = UNet(**sizes)
    reference = UNet(**sizes, context_dim=64)
    encoder = ConditioningEncoder(stem=32, widths=(32, 32, 32), out=32)
    io = np.load(golden / "unet_tiny_io.npz")
    drawn = lambda name, *shape: jnp.asarray(recipe_input(name, shape, seed=20240))
    x = channels_last(drawn("x", 1, 4, 4, 16, 16))
    z = channels_last(drawn("ref_z", 1, 4, 16, 16))
    context = drawn("null_context", 1, 7, 64)
    driver = jnp.asarray(recipe_driver_map())
    timesteps = jnp.asarray(io["timesteps"])
    state = recipe_state(golden, "generation")
    params = {
        "unet": params_from_ldm(state, unet_table(generation)),
        "encoder": params_from_ldm(state, encoder_table(encoder, "cond_encoder.")),
        "reference": params_from_ldm(recipe_state(golden, "reference"), unet_table(reference)),
    }

    @quick_jit
    def encode(driver):
        return encoder.apply({"params": params["encoder"]}, driver[0])[None]

    @quick_jit
    def refer(z):
        zero = jnp.zeros((1, 1), int)
        return reference.apply({"params": params["reference"]}, z[:, None], zero, context=context)

    @quick_jit
    def denoise(x, timesteps, condition, features):
        return generation.apply({"params": params["unet"]}, x, timesteps, condition, features)

    return io, dict(x=x, z=z, driver=driver, timesteps=timesteps), encode, refer, denoise


def test_unet_forward(golden, unet_case):
    io, inputs, encode, refer, denoise = unet_case
    condition = encode(inputs["driver"])
    assert error(condition[0], channels_last(io["f64ref/cond_feature"])) < 5e-5

    out, features = refer(inputs["z"])
    assert error(out[:, 0], channels_last(io["ref_unet_out"])) < FLOAT32_TOLERANCE
    reference_features = np.load(golden / "unet_tiny_ref_features.npz")
    names = [name for name in reference_features.files if name.startswith("ref_features/")]
    assert len(names) == 8
    for name in names:
        assert error(features[int(name[-2:])], reference_features[name]) < FLOAT32_TOLERANCE, name
    for feature, (mean, std, absmax) in zip(features, io["ref_features_stats_mean_std_absmax"], strict=True):
        statistics = [feature.mean(), feature.std(ddof=1), jnp.abs(feature).max()]
        np.testing.assert_allclose(statistics, [mean, std, absmax], rtol=1e-4, atol=1e-5)

    eps, _ = denoise(inputs["x"], inputs["timesteps"], condition, features)
    assert error(eps, channels_last(io["f64ref/eps"])) < 5e-5
    eps, _ = denoise(inputs["x"], inputs["timesteps"], condition, None)
    assert error(eps, channels_last(io["f64ref/eps_refnone"])) < 5e-5


def test_unet_null_conditions(unet_case):
    """Zero features; motion dropped as a zero driver map; both public versions of the null condition."""
    io, inputs, encode, refer, denoise = unet_case
    features = refer(inputs["z"])[1]
    zero_features = jax.tree.map(jnp.zeros_like, features)
    run = lambda condition, features: denoise(inputs["x"], inputs["timesteps"], condition, features)[0]
    eps = run(encode(inputs["driver"]), zero_features)
    assert error(eps, channels_last(io["f64ref/eps_zero_features"])) < 5e-5

    no_motion = encode(jnp.zeros_like(inputs["driver"]))
    sampling = run(no_motion, zero_features)
    assert error(sampling, channels_last(io["f64ref/eps_uncond_sampling"])) < 5e-5
    training = run(no_motion, refer(jnp.zeros_like(inputs["z"]))[1])
    assert error(training, channels_last(io["f64ref/eps_uncond_training"])) < 5e-5
    assert error(sampling, training) > 1e-2


# ---------------------------------------------------------------------------------------- VAE


def test_autoencoder(golden):
    data = np.load(golden / "vae_tiny.npz")
    scale = 0.18215
    vae = AutoencoderKL(widths=(32, 32, 64, 64), num_res_blocks=1, scale=scale)
    table = autoencoder_table(vae)
    params = params_from_ldm(recipe_state(golden, "autoencoder"), table)
    image = jnp.asarray(channels_last(recipe_input("img", (1, 3, 48, 48), seed=4242, scale=0.5)))
    mean, logvar = quick_jit(lambda x: vae.apply({"params": params}, x, method="encode"))(image)
    # The interface speaks diffusion latents: the VAE's codes times `scale`.
    assert error(mean / scale, channels_last(data["mean"])) < 5e-5
    assert error(logvar - 2 * np.log(scale), channels_last(data["logvar"])) < 5e-5
    assert error(jnp.exp(0.5 * logvar) / scale, channels_last(data["std"])) < 5e-5
    z = scale * jnp.asarray(channels_last(recipe_input("z", (1, 4, 6, 6), seed=4242)))
    decoded = quick_jit(lambda z: vae.apply({"params": params}, z, method="decode"))(z)
    assert error(decoded, channels_last(data["decoded"])) < 5e-5
