"""What other projects call our parameters: one table and the drop rules for each layout.

  diffusers  folder with unet/ and vae/ of PyTorch files
  flax       the same folder with diffusers' Flax files
  ldm        one file of the original latent-diffusion code (`v2-1_512-ema-pruned`)
  loki       one training checkpoint of the public Loki code
  orbax      our folder of a pretrained backbone (`config.pretrained`)
  workdir    all parameters of a run of ours

Our parameter paths begin with "generation/unet/", "generation/encoder/", "reference/", "autoencoder/",
or are "null_prompt". A Stable Diffusion UNet is our reference branch.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from loki_jax.models.autoencoder import AutoencoderKL, make_autoencoder
from loki_jax.models.encoder import ConditioningEncoder
from loki_jax.models.loki import Loki, init_params, make_loki
from loki_jax.training.config import config_from_json, import_configs
from loki_jax.training.sharding import path_name
from loki_jax.weights.diffusers_names import diffusers_autoencoder_table, diffusers_unet_table, flax_table
from loki_jax.weights.ldm_names import (
    LdmWeight,
    Table,
    autoencoder_table,
    encoder_table,
    prefixed,
    unet_table,
)
from loki_jax.weights.match import Drop
from loki_jax.weights.tensors import WeightsError
from loki_jax.weights.torch_zip import OUTSIDE

PROMPT_TOKENS = 77


class Layout(NamedTuple):
    """Names of one project: the parameters it fills, and what it holds besides."""

    name: str
    table: Table
    drops: tuple[Drop, ...] = ()


class Network(NamedTuple):
    """The networks of a model config, and the shapes of all parameters by path."""

    config: ConfigDict
    loki: Loki
    autoencoder: AutoencoderKL
    shapes: dict[str, tuple[int, ...]]


_BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    "lvlb_weights", "logvar", "scale_factor",
)  # fmt: skip
# A Lightning module may wrap the model once more: all its names then begin with "model.".
_TRAINING_DROPS = (
    Drop(rf"(model\.)?({'|'.join(_BUFFERS)})", "noise schedule, computed by diffusion/schedule.py"),
    Drop(r"(model\.)?cond_stage_model\..*", "text encoder, replaced by the embedding of the empty prompt"),
    Drop(r"(model\.)?model_ema\.(decay|num_updates)", "counters of a moving average"),
    Drop(r"(model\.)?first_stage_model\.loss\..*", "loss networks of the autoencoder's training"),
    Drop(rf"{re.escape(OUTSIDE)}.*", "state of the training program"),
)
_LOKI_DROPS = (
    Drop(
        r"(model\.)?model\.diffusion_model\..*\.transformer_blocks\.0\.(attn2|norm2)\..*",
        "legacy text cross-attention of the generation branch",
    ),
    Drop(r"(.*\.)?audio_encoder\..*", "legacy audio encoder"),
)


def sd21_config() -> ConfigDict:
    """Sizes of Stable Diffusion 2.1 and of Loki on it, as `config.model` has them."""
    return ConfigDict({
        "latent_channels": 4,
        "unet": {
            "channels": 320, "multipliers": (1, 2, 4, 4), "num_res_blocks": 2, "attention_levels": (0, 1, 2),
            "attention_modes": ("spatial", "3d", "3d", "3d"), "head_channels": 64,
        },
        "encoder": {"stem": 64, "widths": (128, 256, 320)},
        "reference": {"trainable": False, "context_dim": 1024},
        "autoencoder": {"kind": "kl", "widths": (128, 256, 512, 512), "num_res_blocks": 2, "scale": 0.18215},
    })  # fmt: skip


def load_config(argument: str) -> ConfigDict:
    """The config of FILE.py[:VARIANT] or of a run's `config.json`. Raises WeightsError when it is none."""
    name, _, variant = argument.partition(":")
    path = Path(name)
    if not path.is_file():
        raise WeightsError(f"--config {path}: no such file.")
    try:
        if path.suffix == ".json":
            return config_from_json(path.read_text())
        import_configs()  # a config file imports its neighbours by this name
        return runpy.run_path(str(path))["get_config"](variant or None)
    except (AttributeError, ImportError, KeyError, SyntaxError, ValueError) as error:
        raise WeightsError(f"--config {argument}: not a config file ({error}).") from error


def make_network(model_config: ConfigDict, driver_channels: int = 45) -> Network:
    """The networks that weights are converted for; nothing is computed, only shapes are.

    Raises:
      WeightsError: the config has no VAE or no text cross-attention, so it takes no such weights.
    """
    config = ConfigDict(model_config.to_dict())
    config.latent_size = 8 * 2 ** len(config.unet.multipliers)
    config.encoder.kind, config.encoder.in_channels = "map", driver_channels
    autoencoder = make_autoencoder(config) if config.autoencoder.kind == "kl" else None
    if not isinstance(autoencoder, AutoencoderKL) or config.reference.context_dim is None:
        raise WeightsError(
            "config.model: this config trains without Stable Diffusion (it needs autoencoder.kind='kl' and "
            "reference.context_dim), so there is nothing to convert for it."
        )
    loki = make_loki(config)
    image = jnp.zeros((1, 2 * autoencoder.stride, 2 * autoencoder.stride, 3))
    init = lambda key: {
        **init_params(loki, config, key), "autoencoder": autoencoder.init(key, image)["params"],
        "null_prompt": jnp.zeros((1, PROMPT_TOKENS, config.reference.context_dim)),
    }  # fmt: skip
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(init, jax.random.key(0)))
    return Network(config, loki, autoencoder, {path_name(path): leaf.shape for path, leaf in leaves})


def make_layout(name: str, network: Network, wrapped: bool = False) -> Layout:
    """The layout called `name` for a network.

    Args:
      wrapped: names begin with one more "model." (Lightning checkpoints of the public Loki code).

    Raises:
      WeightsError: the layout cannot express this network.
    """
    reference, autoencoder = network.loki.reference, network.autoencoder
    if name in ("diffusers", "flax"):
        try:
            table = prefixed(diffusers_unet_table(reference, "unet/"), "reference/")
        except ValueError as error:
            raise WeightsError(f"layout {name}: {error}.") from error
        table |= prefixed(diffusers_autoencoder_table(autoencoder, "vae/"), "autoencoder/")
        return Layout(name, table if name == "diffusers" else flax_table(table))
    if name == "ldm":
        table = prefixed(unet_table(reference, "model.diffusion_model."), "reference/")
        table |= prefixed(autoencoder_table(autoencoder, "first_stage_model."), "autoencoder/")
        return Layout(name, table, _TRAINING_DROPS)
    if name == "loki":
        outer, generation = "model." if wrapped else "", network.loki.generation
        if not isinstance(generation.encoder, ConditioningEncoder):
            raise WeightsError("layout loki: the public code has no encoder of coefficient vectors.")
        prefix = f"{outer}model.diffusion_model."
        table = prefixed(unet_table(generation.unet, prefix), "generation/unet/")
        table |= prefixed(encoder_table(generation.encoder, f"{prefix}cond_encoder."), "generation/encoder/")
        table |= prefixed(unet_table(reference, f"{outer}ref_extractor.unet."), "reference/")
        table |= prefixed(autoencoder_table(autoencoder, f"{outer}first_stage_model."), "autoencoder/")
        return Layout(name, table, _TRAINING_DROPS + _LOKI_DROPS)
    if name in ("orbax", "workdir"):
        own = (path for path in network.shapes if name == "workdir" or not path.startswith("generation/"))
        return Layout(name, {path: LdmWeight(path, "vector") for path in own})
    raise WeightsError(f"unknown layout {name!r}.")


def new_parameters(network: Network) -> dict[str, str]:
    """Trained parameters that a run cannot take from the backbone: path -> where they come from."""
    new = {}
    for path in network.shapes:
        if path.startswith("generation/encoder/"):
            new[path] = "random; its last convolution is zero, so training starts from the backbone"
        elif path.startswith("generation/unet/"):
            twin = path.replace("generation/unet/", "reference/", 1)
            if network.shapes.get(twin) != network.shapes[path]:
                new[path] = "random; the backbone has no such layer"
    return new


def diffusers_configs(network: Network) -> dict[str, dict]:
    """`config.json` of UNet and VAE as diffusers reads them."""
    unet, vae = network.loki.reference, network.autoencoder
    levels, widths = range(len(unet.multipliers)), [unet.channels * m for m in unet.multipliers]
    down = ["CrossAttnDownBlock2D" if level in unet.attention_levels else "DownBlock2D" for level in levels]
    up = [
        "CrossAttnUpBlock2D" if level in unet.attention_levels else "UpBlock2D" for level in reversed(levels)
    ]
    return {
        "unet": {
            "_class_name": "UNet2DConditionModel", "sample_size": 64,
            "in_channels": unet.out_channels, "out_channels": unet.out_channels,
            "block_out_channels": widths, "layers_per_block": unet.num_res_blocks,
            "down_block_types": down, "up_block_types": up, "cross_attention_dim": unet.context_dim,
            # Diffusers' name for the number of heads.
            "attention_head_dim": [width // unet.head_channels for width in widths],
            "use_linear_projection": True, "norm_num_groups": unet.norm_groups, "norm_eps": 1e-5,
            "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False,
        },
        "vae": {
            "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "sample_size": 512,
            "block_out_channels": list(vae.widths), "layers_per_block": vae.num_res_blocks,
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.widths),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.widths), "latent_channels": vae.latent_channels,
            "norm_num_groups": vae.norm_groups, "scaling_factor": vae.scale, "act_fn": "silu",
        },
    }  # fmt: skip


# What changes the function of a network but not the shapes of its weights.
CHECKED_SETTINGS = (
    "attention_head_dim", "norm_num_groups", "norm_eps", "act_fn", "flip_sin_to_cos", "freq_shift",
    "center_input_sample", "scaling_factor",
)  # fmt: skip
