"""Names and layouts of our parameters in LDM checkpoints (Stable Diffusion 2.1, the public Loki code).

Each table maps a parameter path, joined by "/", to the name and layout of the same weight in a
PyTorch state dict, one to one. Conversion in either direction is a loop over a table; nothing here
reads files.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from loki_jax.models.autoencoder import AutoencoderKL
from loki_jax.models.encoder import ConditioningEncoder
from loki_jax.models.unet import ADDED_ATTENTION, UNet


class LdmWeight(NamedTuple):
    """A weight of a state dict: its name, and how its axes relate to ours.

    Layouts: "vector" (the same), "linear" (ours (in, out), theirs (out, in)), "conv" (ours
    (h, w, in, out), theirs (out, in, h, w)), "conv1x1" (ours (in, out), theirs (out, in, 1, 1)),
    "pointwise" (ours (in, out), theirs (1, 1, in, out), as Flax convolutions have it).
    """

    name: str
    layout: str


Table = dict[str, LdmWeight]


# Layers of a block: name of ours -> name of theirs and layout.
_RESIDUAL = {
    "norm1": ("norm1", "vector"), "conv1": ("conv1", "conv"),
    "norm2": ("norm2", "vector"), "conv2": ("conv2", "conv"),
}  # fmt: skip
_UNET_RESIDUAL = {
    "norm1": ("in_layers.0", "vector"), "conv1": ("in_layers.2", "conv"), "time": ("emb_layers.1", "linear"),
    "norm2": ("out_layers.0", "vector"), "conv2": ("out_layers.3", "conv"),
}  # fmt: skip
_VAE_ATTENTION = {
    "norm": ("norm", "vector"), "q": ("q", "conv1x1"), "k": ("k", "conv1x1"), "v": ("v", "conv1x1"),
    "out": ("proj_out", "conv1x1"),
}  # fmt: skip


def unet_table(unet: UNet, prefix: str = "") -> Table:
    """Every parameter of a UNet of this shape. Public prefixes: "model.diffusion_model." (generation
    branch and SD 2.1 itself) and "ref_extractor.unet." (reference branch)."""
    levels, blocks = len(unet.multipliers), unet.num_res_blocks
    widths = [unet.channels * m for m in unet.multipliers]
    table = _layer("time_in", "time_embed.0", "linear") | _layer("time_out", "time_embed.2", "linear")
    table |= _layer("conv_in", "input_blocks.0.0", "conv")

    def transformer(ours: str, theirs: str, level: int) -> Table:
        cross = unet.context_dim is not None
        return transformer_table(unet.attention_modes[level], cross, f"{ours}/", f"{theirs}.")

    below = widths[0]
    skips = [below]
    for level, width in enumerate(widths):
        for i in range(blocks):
            theirs = f"input_blocks.{1 + level * (blocks + 1) + i}"
            skip = "skip_connection" if below != width else None
            table |= _block(f"down_{level}_residual_{i}", f"{theirs}.0", _UNET_RESIDUAL, skip)
            if level in unet.attention_levels:
                table |= transformer(f"down_{level}_transformer_{i}", f"{theirs}.1", level)
            below = width
            skips.append(below)
        if level + 1 < levels:
            theirs = f"input_blocks.{(level + 1) * (blocks + 1)}.0.op"
            table |= _layer(f"down_{level}_sample", theirs, "conv")
            skips.append(below)
    table |= _block("middle_residual_0", "middle_block.0", _UNET_RESIDUAL)
    table |= transformer("middle_transformer", "middle_block.1", -1)
    table |= _block("middle_residual_1", "middle_block.2", _UNET_RESIDUAL)
    for level, width in reversed(list(enumerate(widths))):
        first = (levels - 1 - level) * (blocks + 1)
        attended = level in unet.attention_levels
        for i in range(blocks + 1):
            theirs = f"output_blocks.{first + i}"
            skip = "skip_connection" if below + skips.pop() != width else None
            table |= _block(f"up_{level}_residual_{i}", f"{theirs}.0", _UNET_RESIDUAL, skip)
            if attended:
                table |= transformer(f"up_{level}_transformer_{i}", f"{theirs}.1", level)
            below = width
        if level:
            theirs = f"output_blocks.{first + blocks}.{1 + attended}.conv"
            table |= _layer(f"up_{level}_sample", theirs, "conv")
    table |= _layer("norm_out", "out.0", "vector") | _layer("conv_out", "out.2", "conv")
    return prefixed(table, theirs=prefix)


def transformer_table(mode: str, cross_attention: bool, ours: str = "", theirs: str = "") -> Table:
    """Parameters of one `SpatioTemporalTransformer`."""
    attentions = [("self", "attn1", "norm1")]
    if mode in ADDED_ATTENTION:
        attentions.append((mode, f"attn_{mode[0]}", f"norm_{mode[0]}"))
    if cross_attention:
        attentions.append(("cross", "attn2", "norm2"))
    table = _layer("norm", "norm", "vector")
    table |= _layer("proj_in", "proj_in", "linear") | _layer("proj_out", "proj_out", "linear")
    for path, attention, norm in attentions:
        path, attention = f"block/{path}", f"transformer_blocks.0.{attention}"
        table |= _layer(f"{path}_norm", f"transformer_blocks.0.{norm}", "vector")
        for part in "qkv":
            table[f"{path}_attention/{part}/kernel"] = LdmWeight(f"{attention}.to_{part}.weight", "linear")
        table |= _layer(f"{path}_attention/out", f"{attention}.to_out.0", "linear")
    table |= _layer("block/ff_norm", "transformer_blocks.0.norm3", "vector")
    table |= _layer("block/ff_in", "transformer_blocks.0.ff.net.0.proj", "linear")
    table |= _layer("block/ff_out", "transformer_blocks.0.ff.net.2", "linear")
    return prefixed(table, ours, theirs)


def encoder_table(encoder: ConditioningEncoder, prefix: str = "") -> Table:
    """Every parameter of a conditioning encoder. Public prefix: "model.diffusion_model.cond_encoder."."""
    table = _layer("stem", "stem", "conv")
    below = encoder.stem
    for i, width in enumerate(encoder.widths):
        skip = "skip" if below != width else None
        table |= _block(f"stage_{i}_residual", f"stages.{i}.0", _RESIDUAL, skip)
        table |= _layer(f"stage_{i}_sample", f"stages.{i}.1.conv", "conv")
        below = width
    table |= _block("refine", "refine", _RESIDUAL)
    table |= _layer("norm_out", "out_norm", "vector") | _layer("conv_out", "out_conv", "conv")
    return prefixed(table, theirs=prefix)


def autoencoder_table(autoencoder: AutoencoderKL, prefix: str = "") -> Table:
    """Every parameter of the VAE. Public prefix: "first_stage_model."."""
    table: Table = {}
    for part in ("encoder", "decoder"):
        table |= _layer(f"{part}/conv_in", f"{part}.conv_in", "conv")
        table |= _block(f"{part}/middle/residual_0", f"{part}.mid.block_1", _RESIDUAL)
        table |= _block(f"{part}/middle/residual_1", f"{part}.mid.block_2", _RESIDUAL)
        table |= _block(f"{part}/middle/attention", f"{part}.mid.attn_1", _VAE_ATTENTION)
        table |= _layer(f"{part}/norm_out", f"{part}.norm_out", "vector")
        table |= _layer(f"{part}/conv_out", f"{part}.conv_out", "conv")
    below, last = autoencoder.widths[0], len(autoencoder.widths) - 1
    for part, side, sample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        for level in range(last + 1) if side == "down" else range(last, -1, -1):
            width = autoencoder.widths[level]
            for i in range(autoencoder.num_res_blocks + (side == "up")):
                skip = "nin_shortcut" if below != width else None
                ours, theirs = f"{part}/{side}_{level}_residual_{i}", f"{part}.{side}.{level}.block.{i}"
                table |= _block(ours, theirs, _RESIDUAL, skip)
                below = width
            if level != (last if side == "down" else 0):
                theirs = f"{part}.{side}.{level}.{sample}.conv"
                table |= _layer(f"{part}/{side}_{level}_sample", theirs, "conv")
    table |= _layer("quant", "quant_conv", "conv1x1") | _layer("post_quant", "post_quant_conv", "conv1x1")
    return prefixed(table, theirs=prefix)


def prefixed(table: Table, ours: str = "", theirs: str = "") -> Table:
    return {f"{ours}{path}": LdmWeight(f"{theirs}{name}", how) for path, (name, how) in table.items()}


def _layer(ours: str, theirs: str, layout: str) -> Table:
    """Scale and bias of a normalisation ("vector"), kernel and bias of any other layer."""
    weight = "scale" if layout == "vector" else "kernel"
    return {
        f"{ours}/{weight}": LdmWeight(f"{theirs}.weight", layout),
        f"{ours}/bias": LdmWeight(f"{theirs}.bias", "vector"),
    }


def _block(ours: str, theirs: str, layers: dict[str, tuple[str, str]], skip: str | None = None) -> Table:
    """All layers of a block; `skip` is their name of its 1x1 convolution, if it has one."""
    table: Table = {}
    for path, (name, layout) in (layers | ({"skip": (skip, "conv1x1")} if skip else {})).items():
        table |= _layer(f"{ours}/{path}", f"{theirs}.{name}", layout)
    return table


def to_ldm(array: np.ndarray, layout: str) -> np.ndarray:
    """Our array in the layout of the state dict."""
    if layout == "linear":
        return array.T
    if layout == "conv1x1":
        return array.T[:, :, None, None]
    if layout == "conv":
        return array.transpose(3, 2, 0, 1)
    return array[None, None] if layout == "pointwise" else array


def from_ldm(array: np.ndarray, layout: str) -> np.ndarray:
    """The inverse of `to_ldm`. A 1x1 convolution may also arrive as a plain matrix (diffusers)."""
    if layout in ("linear", "conv1x1"):
        return array.reshape(array.shape[:2]).T
    if layout == "conv":
        return array.transpose(2, 3, 1, 0)
    return array.reshape(array.shape[2:]) if layout == "pointwise" else array
