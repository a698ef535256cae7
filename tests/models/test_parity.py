"""Forward and backward parity with the public PyTorch networks, every parameter random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from loki_jax.models.autoencoder import AutoencoderKL
from loki_jax.models.encoder import ConditioningEncoder
from loki_jax.models.unet import SpatioTemporalTransformer, UNet
from loki_jax.weights.ldm_names import (
    autoencoder_table,
    encoder_table,
    params_from_ldm,
    params_to_ldm,
    transformer_table,
    unet_table,
)
from tests.models.weights import channels_last, error, quick_jit, recipe_params, recipe_weight

# The reference branch was only recorded in torch's float32, so its own rounding comes on top.
FLOAT32_TOLERANCE = 2e-4


def shapes_of(module, *args, **kwargs):
    shapes = jax.eval_shape(lambda key: module.init(key, *args, **kwargs)["params"], jax.random.key(0))
    return flatten_dict(shapes, sep="/")


# ------------------------------------------------------------------------- conditioning encoder


@pytest.fixture(scope="module")
def encoder_case(golden):
    data = np.load(golden / "conditioning_encoder.npz")
    encoder = ConditioningEncoder(stem=32, widths=(32, 64, 64), out=64)
    table = encoder_table(encoder)
    state = {name: data[f"state/{name}"] for name, _ in table.values()}
    x = jnp.asarray(channels_last(data["input"]))
    return data, encoder, table, params_from_ldm(state, table), x


def test_recipe_rebuilds_the_weights(encoder_case):
    data, encoder, table, params, x = encoder_case
    rebuilt = recipe_params(table, shapes_of(encoder, x), seed=1234)
    for path, value in flatten_dict(params, sep="/").items():
        np.testing.assert_array_equal(flatten_dict(rebuilt, sep="/")[path], value, err_msg=path)


def test_conditioning_encoder(encoder_case):
    data, encoder, table, params, x = encoder_case
    cotangent = jnp.asarray(channels_last(data["cotangent"]))

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
    transformer = SpatioTemporalTransformer(
        frames=4, groups=32, head_channels=16, mode=mode, context_dim=None, backend=backend, dtype=jnp.float32
    )
    table = transformer_table(mode, cross_attention=False)
    params = params_from_ldm({name: data[f"state/{name}"] for name, _ in table.values()}, table)
    apply = lambda params, x, reference: transformer.apply({"params": params}, x, reference)
    x, reference = jnp.asarray(channels_last(data["x"])), jnp.asarray(data["ref_kv"])
    cotangent = jnp.asarray(channels_last(data["cotangent"]))

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
    x = jnp.asarray(channels_last(io["x"]))
    z = jnp.asarray(channels_last(io["ref_z"]))
    context = jnp.asarray(io["null_context"])
    driver = jnp.asarray(np.load(golden / "unet_tiny_spatial_cond.npz")["spatial_cond"])
    timesteps = jnp.asarray(io["timesteps"])
    seed = 20240
    params = {
        "unet": recipe_params(unet_table(generation), shapes_of(generation, x, timesteps), seed, "gen/"),
        "encoder": recipe_params(
            encoder_table(encoder, "cond_encoder."), shapes_of(encoder, driver[0]), seed, "gen/"
        ),
        "reference": recipe_params(
            unet_table(reference),
            shapes_of(reference, z[:, None], jnp.zeros((1, 1), int), context=context),
            seed,
            "ref/",
        ),
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


def test_unet_weights_are_the_recipe(golden):
    data = np.load(golden / "unet_tiny_gen_params_00of06.npz")
    for name in [n for n in data.files if n != "meta_json"]:
        rebuilt = recipe_weight(f"gen/{name}", data[name].shape, 20240)
        np.testing.assert_array_equal(rebuilt, data[name], err_msg=name)


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
    params = params_from_ldm({name: data[f"state/{name}"] for name, _ in table.values()}, table)
    image = jnp.asarray(channels_last(data["image"]))
    mean, logvar = quick_jit(lambda x: vae.apply({"params": params}, x, method="encode"))(image)
    # The interface speaks diffusion latents: the VAE's codes times `scale`.
    assert error(mean / scale, channels_last(data["mean"])) < 5e-5
    assert error(logvar - 2 * np.log(scale), channels_last(data["logvar"])) < 5e-5
    assert error(jnp.exp(0.5 * logvar) / scale, channels_last(data["std"])) < 5e-5
    z = scale * jnp.asarray(channels_last(data["z"]))
    decoded = quick_jit(lambda z: vae.apply({"params": params}, z, method="decode"))(z)
    assert error(decoded, channels_last(data["decoded"])) < 5e-5
