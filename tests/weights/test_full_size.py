"""Every layout at full size, by names and shapes alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs.common import base_config
from loki_jax.weights.diffusers_names import current_name, diffusers_unet_table
from loki_jax.weights.layouts import (
    diffusers_configs,
    make_layout,
    make_network,
    new_parameters,
    sd21_config,
)
from loki_jax.weights.match import match_keys, state_shape
from loki_jax.weights.tensors import TensorInfo, WeightsError


@pytest.fixture(scope="module")
def network():
    return make_network(sd21_config())


@pytest.fixture(scope="module")
def diffusers_keys():
    """Names and shapes of diffusers 0.39's models at SD 2.1's sizes, PyTorch and Flax."""
    return json.loads((Path(__file__).parent / "diffusers_sd21_keys.json").read_text())


def golden_keys(golden, name):
    return json.loads((golden / "keys" / f"{name}.json").read_text())


def infos_of(keys, dtype="float32"):
    return {name: TensorInfo(tuple(shape), dtype) for name, shape in keys.items()}


def count(shapes):
    return sum(int(np.prod(shape)) for shape in shapes)


def test_the_default_sizes_are_the_configs(network):
    theirs = base_config().model
    for part, options in sd21_config().items():
        if part == "latent_channels":
            assert theirs[part] == options
        else:
            assert {key: theirs[part][key] for key in options} == options.to_dict()
    assert count(shape for path, shape in network.shapes.items() if path != "null_prompt") == 1_772_443_375
    assert network.shapes["null_prompt"] == (1, 77, 1024)


@pytest.mark.parametrize(
    "layout, parts", [("diffusers", ("unet", "vae")), ("flax", ("flax_unet", "flax_vae"))]
)
def test_diffusers_names_and_shapes(network, diffusers_keys, layout, parts):
    theirs = {
        f"{part.removeprefix('flax_')}/{name}": tuple(shape)
        for part in parts for name, shape in diffusers_keys[part].items()
    }  # fmt: skip
    ours = {
        name: state_shape(network.shapes[path], how)
        for path, (name, how) in make_layout(layout, network).table.items()
    }
    assert ours == theirs


def test_old_attention_names(diffusers_keys):
    """SD 2.1-base's own VAE file was saved before diffusers renamed its attention."""
    names = diffusers_keys["vae"]
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    changed = 0
    for name in names:
        was = name
        for new, before in old.items():
            was = was.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        changed += was != name
        assert current_name(was) == name
        assert current_name(name) == name
    assert changed == 16


@pytest.mark.parametrize("name", ["to_q.weight", "down_blocks.0.attentions.0.query.weight", "value"])
def test_other_names_stay(name):
    assert current_name(name) == name


def test_sd21_checkpoint_is_matched(network, golden):
    infos = infos_of(golden_keys(golden, "sd21_ldm_checkpoint_keys"))
    infos |= {
        "cond_stage_model.model.positional_embedding": TensorInfo((77, 1024), "float32"),
        "cond_stage_model.model.attn_mask": TensorInfo((77, 77), "bool"),
        "alphas_cumprod": TensorInfo((1000,), "float32"),
        "model_ema.num_updates": TensorInfo((), "int32"),
    }
    layout = make_layout("ldm", network)
    dropped = match_keys(infos, layout.table, network.shapes, layout.drops, "sd21")
    assert len(layout.table) == 686 + 248
    assert count(network.shapes[path] for path in layout.table) == 865_910_724 + 83_653_863
    assert set(dropped) == set(infos) - set(golden_keys(golden, "sd21_ldm_checkpoint_keys"))


def test_a_moving_average_is_never_dropped_silently(network, golden):
    infos = infos_of(golden_keys(golden, "sd21_ldm_checkpoint_keys"))
    infos["model_ema.diffusion_modelout2bias"] = TensorInfo((4,), "float32")
    layout = make_layout("ldm", network)
    with pytest.raises(
        WeightsError, match="1 tensors that nothing asks for.*\n.*model_ema.diffusion_modelout2bias"
    ):
        match_keys(infos, layout.table, network.shapes, layout.drops, "sd21")


def test_what_a_run_takes_from_the_backbone(network, golden):
    counts = golden_keys(golden, "param_counts")
    new = new_parameters(network)
    assert count(network.shapes[path] for path in new) == counts["loki_new"]
    taken = [p for p in network.shapes if p.startswith("generation/") and p not in new]
    assert count(network.shapes[path] for path in taken) == counts["loki_unet_loaded_from_sd21"]
    left = [
        p
        for p in network.shapes
        if p.startswith("reference/") and p.replace("reference", "generation/unet", 1) not in network.shapes
    ]
    assert count(network.shapes[path] for path in left) == counts["sd21_dropped"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_public_loki_checkpoint_is_matched(network, golden, wrapped):
    prefix = "model.diffusion_model."
    generation = {
        n if n.startswith(prefix) else prefix + n: s for n, s in golden_keys(golden, "loki_unet_keys").items()
    }
    state = generation
    state |= {f"ref_extractor.unet.{n}": s for n, s in golden_keys(golden, "ref_unet_keys").items()}
    state |= {f"first_stage_model.{n}": s for n, s in golden_keys(golden, "vae_keys").items()}
    legacy = {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.norm2.weight": (320,),
        "model.audio_encoder.proj.weight": (8, 8),
        "betas": (1000,),
    }
    outer = "model." if wrapped else ""
    infos = infos_of({outer + name: shape for name, shape in (state | legacy).items()}, "float16")
    layout = make_layout("loki", network, wrapped)
    dropped = match_keys(infos, layout.table, network.shapes, layout.drops, "loki")
    assert layout.table.keys() == network.shapes.keys() - {"null_prompt"}
    assert set(dropped) == {outer + name for name in legacy}
    assert len(set(dropped.values())) == 3
    # The reference branch's own cross-attention is used, never dropped.
    used = [weight.name for weight in layout.table.values()]
    assert any(name.startswith(f"{outer}ref_extractor.") and "attn2" in name for name in used)
    assert not set(used) & set(dropped)


def test_settings_that_diffusers_needs(network):
    configs = diffusers_configs(network)
    assert configs["unet"]["attention_head_dim"] == [5, 10, 20, 20]
    assert configs["unet"]["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert configs["unet"]["up_block_types"] == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert configs["vae"]["scaling_factor"] == 0.18215


def test_networks_without_such_weights():
    config = sd21_config()
    config.autoencoder.kind = "pixel"
    with pytest.raises(WeightsError, match="nothing to convert"):
        make_network(config)
    # Attention over time is the generation branch's alone: diffusers' image UNet has no place for it.
    config = sd21_config()
    config.unet.attention_modes = ("temporal", "3d", "3d", "3d")
    network = make_network(config)
    assert (
        make_layout("diffusers", network).table == make_layout("diffusers", make_network(sd21_config())).table
    )
    with pytest.raises(ValueError, match="no temporal attention"):
        diffusers_unet_table(network.loki.generation.unet)
