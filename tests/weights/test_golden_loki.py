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
from tests.models.weights import channels_last, error, quick_jit

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


def public_state(golden):
    """The state dict that the public trainer would have saved."""
    state = {}
    for branch, prefix in (("gen", "model.diffusion_model."), ("ref", "ref_extractor.unet.")):
        files = sorted(golden.glob(f"unet_tiny_{branch}_params_*.npz"))
        assert len(files) == 6
        for file in files:
            state |= {prefix + name: array for name, array in np.load(file).items() if name != "meta_json"}
    for name, array in np.load(golden / "vae_tiny.npz").items():
        if name.startswith("state/"):
            state["first_stage_model." + name.removeprefix("state/")] = array
    return state


def test_public_checkpoint_predicts_what_the_public_code_does(golden, tmp_path):
    import torch

    state = {name: torch.from_numpy(array) for name, array in public_state(golden).items()}
    state["betas"] = torch.ones(1000)
    torch.save({"state_dict": state, "epoch": 7, "lr_schedulers": []}, tmp_path / "loki.ckpt")
    (tmp_path / "config.json").write_text(config_to_json(golden_config()))
    save_head(tmp_path / "head.npz", builtin_head())
    np.save(tmp_path / "null.npy", np.ones((1, 77, 64), np.float32))
    convert.main([
        str(tmp_path / "loki.ckpt"), "--out", str(tmp_path / "run"), "--head", str(tmp_path / "head.npz"),
        "--config", str(tmp_path / "config.json"), "--null-prompt", str(tmp_path / "null.npy"),
    ])  # fmt: skip

    checkpoint = load_checkpoint(tmp_path / "run")
    networks = build_networks(checkpoint.config, checkpoint.head)
    io = np.load(golden / "unet_tiny_io.npz")
    driver = jnp.asarray(np.load(golden / "unet_tiny_spatial_cond.npz")["spatial_cond"])

    @quick_jit
    def predict(params, x, timesteps, driver, latent):
        features = reference_features(networks, params, latent)
        return denoise(networks, params, x, timesteps, encode_condition(networks, params, driver), features)

    # The recorded context has 7 tokens, not a prompt's 77.
    params = jax.tree.map(jnp.asarray, checkpoint.params | {"null_prompt": io["null_context"]})
    eps = predict(params, channels_last(io["x"]), io["timesteps"], driver, channels_last(io["ref_z"]))
    assert error(eps, channels_last(io["f64ref/eps"])) < 5e-5

    vae = np.load(golden / "vae_tiny.npz")
    mean, _ = quick_jit(lambda params, x: networks.autoencoder.apply({"params": params}, x, method="encode"))(
        params["autoencoder"], channels_last(vae["image"])
    )
    assert error(mean / checkpoint.config.model.autoencoder.scale, channels_last(vae["mean"])) < 5e-5
