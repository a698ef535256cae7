"""The public code's own weights and outputs, through the converter: checkpoint -> run -> prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import base_config
from loki_jax import convert
from loki_jax.face.asset import save_head
from loki_jax.face.builtin import builtin_head
from loki_jax.networks import build_networks, denoise, encode_condition, reference_features
from loki_jax.training.checkpoint import load_checkpoint
from loki_jax.training.config import config_to_json
from tests.models.weights import (
    channels_last,
    error,
    quick_jit,
    recipe_driver_map,
    recipe_input,
    recipe_state,
)

pytest.importorskip("torch")


def golden_config():
    """Sizes of the networks behind `unet_tiny_*` and `vae_tiny`."""
    config = base_config()
    config.image_size = 128
    config.model.dtype = "float32"
    config.model.unet.channels = 32
    config.model.unet.head_channels = 16
    config.model.encoder.stem = 32
    config.model.encoder.widths = (32, 32, 32)
    config.model.reference.context_dim = 64
    config.model.autoencoder.widths = (32, 32, 64, 64)
    config.model.autoencoder.num_res_blocks = 1
    return config


PREFIXES = {
    "generation": "model.diffusion_model.",
    "reference": "ref_extractor.unet.",
    "autoencoder": "first_stage_model.",
}


def public_state(golden):
    """The state dict that the public trainer would have saved."""
    return {
        prefix + name: array
        for network, prefix in PREFIXES.items() for name, array in recipe_state(golden, network).items()
    }  # fmt: skip


def test_public_checkpoint_predicts_what_the_public_code_does(golden, tmp_path):
    import torch

    state = {name: torch.from_numpy(array) for name, array in public_state(golden).items()}
    state["betas"] = torch.ones(1000)
    torch.save({"state_dict": state, "epoch": 7, "lr_schedulers": []}, tmp_path / "loki.ckpt")
    (tmp_path / "config.json").write_text(config_to_json(golden_config()))
    save_head(tmp_path / "head.npz", builtin_head())
    np.save(tmp_path / "null.npy", np.ones((1, 77, 64), np.float32))
    assert convert.main([
        str(tmp_path / "loki.ckpt"), "--out", str(tmp_path / "run"), "--head", str(tmp_path / "head.npz"),
        "--config", str(tmp_path / "config.json"), "--null-prompt", str(tmp_path / "null.npy"),
    ]) == 0  # fmt: skip

    checkpoint = load_checkpoint(tmp_path / "run")
    networks = build_networks(checkpoint.config, checkpoint.head)
    io = np.load(golden / "unet_tiny_io.npz")
    driver = jnp.asarray(recipe_driver_map())
    drawn = lambda name, *shape: recipe_input(name, shape, seed=20240)

    @quick_jit
    def predict(params, x, timesteps, driver, latent):
        features = reference_features(networks, params, latent)
        return denoise(networks, params, x, timesteps, encode_condition(networks, params, driver), features)

    # The recorded context has 7 tokens, not a prompt's 77.
    params = jax.tree.map(jnp.asarray, checkpoint.params | {"null_prompt": drawn("null_context", 1, 7, 64)})
    x, latent = channels_last(drawn("x", 1, 4, 4, 16, 16)), channels_last(drawn("ref_z", 1, 4, 16, 16))
    eps = predict(params, x, io["timesteps"], driver, latent)
    assert error(eps, channels_last(io["f64ref/eps"])) < 5e-5

    vae = np.load(golden / "vae_tiny.npz")
    image = channels_last(recipe_input("img", (1, 3, 48, 48), seed=4242, scale=0.5))
    mean, _ = quick_jit(lambda params, x: networks.autoencoder.apply({"params": params}, x, method="encode"))(
        params["autoencoder"], image
    )
    assert error(mean / checkpoint.config.model.autoencoder.scale, channels_last(vae["mean"])) < 5e-5
