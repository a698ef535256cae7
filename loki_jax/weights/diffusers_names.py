"""Names and layouts of our parameters in diffusers' models, PyTorch and Flax (0.39).

Both name spaces follow from our parameter paths by the rules below; the tables have the form of
`ldm_names.Table`. Linear layers, and convolutions wider than one pixel, are laid out as in LDM
checkpoints; Flax keeps our own layout except for 1x1 convolutions.
"""

from __future__ import annotations

import re

from loki_jax.models.autoencoder import AutoencoderKL
from loki_jax.models.unet import ADDED_ATTENTION, UNet
from loki_jax.weights.ldm_names import LdmWeight, Table, autoencoder_table, unet_table

# Module of ours -> module of diffusers, by regular expression on the whole path without its leaf.
# {up} stands for the level counted from the middle, as diffusers counts decoder blocks.
_BLOCKS = (
    (r"down_(\d+)_residual_(\d+)", r"down_blocks.\1.resnets.\2"),
    (r"down_(\d+)_transformer_(\d+)", r"down_blocks.\1.attentions.\2"),
    (r"down_(\d+)_sample", r"down_blocks.\1.downsamplers.0.conv"),
    (r"up_(\d+)_residual_(\d+)", r"up_blocks.{up\1}.resnets.\2"),
    (r"up_(\d+)_transformer_(\d+)", r"up_blocks.{up\1}.attentions.\2"),
    (r"up_(\d+)_sample", r"up_blocks.{up\1}.upsamplers.0.conv"),
    (r"middle_residual_(\d+)", r"mid_block.resnets.\1"),
    (r"middle_transformer", r"mid_block.attentions.0"),
    (r"middle/residual_(\d+)", r"mid_block.resnets.\1"),
    (r"middle/attention", r"mid_block.attentions.0"),
    (r"norm_out", r"conv_norm_out"),
)

_UNET_LAYERS = {
    "time_in": "time_embedding.linear_1", "time_out": "time_embedding.linear_2", "time": "time_emb_proj",
    "skip": "conv_shortcut",
}  # fmt: skip

_VAE_LAYERS = {"skip": "conv_shortcut", "quant": "quant_conv", "post_quant": "post_quant_conv"}

_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}

# The attention of older VAE files, SD 2.1-base's own among them, and of the Flax VAE.
_VAE_ATTENTION_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def diffusers_unet_table(unet: UNet, prefix: str = "") -> Table:
    """Every parameter of a UNet in `diffusers.UNet2DConditionModel`.

    Raises:
      ValueError: the UNet has temporal or full attention.
    """
    if added := set(unet.attention_modes) & set(ADDED_ATTENTION):
        raise ValueError(f"diffusers' image UNet has no {' or '.join(sorted(added))} attention")
    table = {}
    for path, (ldm_name, layout) in unet_table(unet).items():
        module, _, leaf = path.rpartition("/")
        block, _, layer = module.partition("/")
        theirs = _block(block, len(unet.multipliers))
        if "transformer" in block:  # inside a transformer diffusers kept the names of the original code
            inside = re.sub(r"^(input_blocks\.\d+|output_blocks\.\d+|middle_block)\.\d+\.", "", ldm_name)
            name = f"{theirs}.{inside}"
        elif layer:
            name = f"{theirs}.{_UNET_LAYERS.get(layer, layer)}.{_leaf(leaf)}"
        else:
            name = f"{_UNET_LAYERS.get(block, theirs)}.{_leaf(leaf)}"
        table[path] = LdmWeight(f"{prefix}{name}", layout)
    return table


def diffusers_autoencoder_table(autoencoder: AutoencoderKL, prefix: str = "") -> Table:
    """Every parameter of the VAE in `diffusers.AutoencoderKL`."""
    table = {}
    for path, (_, layout) in autoencoder_table(autoencoder).items():
        module, _, leaf = path.rpartition("/")
        part, _, rest = module.partition("/")
        block, _, layer = rest.rpartition("/")
        if not rest:
            name = _VAE_LAYERS[part]
        elif not block:
            name = f"{part}.{_block(layer, len(autoencoder.widths))}"
        else:
            if block == "middle/attention":
                layer, layout = _VAE_ATTENTION[layer], "linear" if layout == "conv1x1" else layout
            name = f"{part}.{_block(block, len(autoencoder.widths))}.{_VAE_LAYERS.get(layer, layer)}"
        table[path] = LdmWeight(f"{prefix}{name}.{_leaf(leaf)}", layout)
    return table


def current_name(name: str) -> str:
    """The present name of a weight that older diffusers files call otherwise."""
    for new, old in _VAE_ATTENTION_OLD.items():
        name = re.sub(rf"(mid_block\.attentions\.0)\.{old}\.(weight|bias)$", rf"\1.{new}.\2", name)
    return name


def flax_table(table: Table) -> Table:
    """The same weights in diffusers' Flax models, from a table of its PyTorch models."""
    flax = {}
    for path, (name, layout) in table.items():
        if re.search("(^|/)(encoder|decoder)/", path):
            for new, old in _VAE_ATTENTION_OLD.items():
                name = name.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{old}.")
        module, _, _ = name.rpartition(".")
        module = re.sub(r"\.(\d+)", r"_\1", module).replace(".", "/")
        layout = "pointwise" if layout == "conv1x1" else "vector"
        flax[path] = LdmWeight(f"{module}/{path.rpartition('/')[2]}", layout)
    return flax


def _block(block: str, levels: int) -> str:
    for pattern, replacement in _BLOCKS:
        if match := re.fullmatch(pattern, block):
            name = match.expand(replacement)
            return re.sub(r"\{up(\d+)\}", lambda m: str(levels - 1 - int(m[1])), name)
    return block


def _leaf(leaf: str) -> str:
    return "bias" if leaf == "bias" else "weight"
