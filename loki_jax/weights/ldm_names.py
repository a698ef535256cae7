"""Names and layouts of our parameters in LDM checkpoints (Stable Diffusion 2.1, the public Loki code).

Each table maps a parameter path, joined by "/", to the name and layout of the same weight in a
PyTorch state dict, one to one. Conversion in either direction is a loop over a table; nothing here
reads files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from loki_jax.models.autoencoder import AutoencoderKL
from loki_jax.models.encoder import ConditioningEncoder
from loki_jax.models.unet import UNet


class LdmWeight(NamedTuple):
    """A weight of a state dict: its name, and how its axes relate to ours.

    Layouts: "vector" (the same), "linear" (ours (in, out), theirs (out, in)), "conv" (ours
    (h, w, in, out), theirs (out, in, h, w)), "conv1x1" (ours (in, out), theirs (out, in, 1, 1)),
    "pointwise" (ours (in, out), theirs (1, 1, in, out), as Flax convolutions have it).
    """

    name: str
    layout: str


Table = dict[str, LdmWeight]


def unet_table(unet: UNet, prefix: str = "") -> Table:
    """Every parameter of a UNet of this shape. Public prefixes: "model.diffusion_model." (generation
    branch and SD 2.1 itself) and "ref_extractor.unet." (reference branch)."""
    levels, blocks = len(unet.multipliers), unet.num_res_blocks
    widths = [unet.channels * m for m in unet.multipliers]
    table: Table = {}

    def residual(ours: str, theirs: str, has_skip: bool) -> None:
        table.update(_norm(f"{ours}/norm1", f"{theirs}.in_layers.0"))
        table.update(_conv(f"{ours}/conv1", f"{theirs}.in_layers.2"))
        table.update(_linear(f"{ours}/time", f"{theirs}.emb_layers.1"))
        table.update(_norm(f"{ours}/norm2", f"{theirs}.out_layers.0"))
        table.update(_conv(f"{ours}/conv2", f"{theirs}.out_layers.3"))
        if has_skip:
            table.update(_linear(f"{ours}/skip", f"{theirs}.skip_connection", layout="conv1x1"))

    def transformer(ours: str, theirs: str, level: int) -> None:
        cross = unet.context_dim is not None
        table.update(transformer_table(unet.attention_modes[level], cross, f"{ours}/", f"{theirs}."))

    table.update(_linear("time_in", "time_embed.0") | _linear("time_out", "time_embed.2"))
    table.update(_conv("conv_in", "input_blocks.0.0"))
    below = widths[0]
    skips = [below]
    for level, width in enumerate(widths):
        for i in range(blocks):
            theirs = f"input_blocks.{1 + level * (blocks + 1) + i}"
            residual(f"down_{level}_residual_{i}", f"{theirs}.0", below != width)
            if level in unet.attention_levels:
                transformer(f"down_{level}_transformer_{i}", f"{theirs}.1", level)
            below = width
            skips.append(below)
        if level + 1 < levels:
            table.update(_conv(f"down_{level}_sample", f"input_blocks.{(level + 1) * (blocks + 1)}.0.op"))
            skips.append(below)
    residual("middle_residual_0", "middle_block.0", False)
    transformer("middle_transformer", "middle_block.1", -1)
    residual("middle_residual_1", "middle_block.2", False)
    for level, width in reversed(list(enumerate(widths))):
        first = (levels - 1 - level) * (blocks + 1)
        attended = level in unet.attention_levels
        for i in range(blocks + 1):
            theirs = f"output_blocks.{first + i}"
            residual(f"up_{level}_residual_{i}", f"{theirs}.0", below + skips.pop() != width)
            if attended:
                transformer(f"up_{level}_transformer_{i}", f"{theirs}.1", level)
            below = width
        if level:
            table.update(_conv(f"up_{level}_sample", f"output_blocks.{first + blocks}.{1 + attended}.conv"))
    table.update(_norm("norm_out", "out.0") | _conv("conv_out", "out.2"))
    return {path: LdmWeight(prefix + name, layout) for path, (name, layout) in table.items()}


def transformer_table(mode: str, cross_attention: bool, ours: str = "", theirs: str = "") -> Table:
    """Parameters of one `SpatioTemporalTransformer`."""
    block, ldm_block = f"{ours}block/", f"{theirs}transformer_blocks.0."
    attentions = [("self", "attn1", "norm1")]
    if mode == "temporal":
        attentions.append(("temporal", "attn_t", "norm_t"))
    if cross_attention:
        attentions.append(("cross", "attn2", "norm2"))
    table = _norm(f"{ours}norm", f"{theirs}norm")
    table |= _linear(f"{ours}proj_in", f"{theirs}proj_in") | _linear(f"{ours}proj_out", f"{theirs}proj_out")
    for name, attention, norm in attentions:
        table |= _norm(f"{block}{name}_norm", f"{ldm_block}{norm}")
        for part in "qkv":
            path = f"{block}{name}_attention/{part}/kernel"
            table[path] = LdmWeight(f"{ldm_block}{attention}.to_{part}.weight", "linear")
        table |= _linear(f"{block}{name}_attention/out", f"{ldm_block}{attention}.to_out.0")
    table |= _norm(f"{block}ff_norm", f"{ldm_block}norm3")
    table |= _linear(f"{block}ff_in", f"{ldm_block}ff.net.0.proj")
    return table | _linear(f"{block}ff_out", f"{ldm_block}ff.net.2")


def encoder_table(encoder: ConditioningEncoder, prefix: str = "") -> Table:
    """Every parameter of a conditioning encoder. Public prefix: "model.diffusion_model.cond_encoder."."""
    table = _conv("stem", "stem")
    below = encoder.stem
    for i, width in enumerate(encoder.widths):
        table |= _residual(f"stage_{i}_residual", f"stages.{i}.0", "skip" if below != width else None)
        table |= _conv(f"stage_{i}_sample", f"stages.{i}.1.conv")
        below = width
    table |= _residual("refine", "refine")
    table |= _norm("norm_out", "out_norm") | _conv("conv_out", "out_conv")
    return {path: LdmWeight(prefix + name, layout) for path, (name, layout) in table.items()}


def autoencoder_table(autoencoder: AutoencoderKL, prefix: str = "") -> Table:
    """Every parameter of the VAE. Public prefix: "first_stage_model."."""
    levels, blocks = len(autoencoder.widths), autoencoder.num_res_blocks

    def middle(part: str) -> Table:
        ours, theirs = f"{part}/middle", f"{part}.mid"
        table = _residual(f"{ours}/residual_0", f"{theirs}.block_1")
        table |= _residual(f"{ours}/residual_1", f"{theirs}.block_2")
        table |= _norm(f"{ours}/attention/norm", f"{theirs}.attn_1.norm")
        for name in "qkv":
            table |= _linear(f"{ours}/attention/{name}", f"{theirs}.attn_1.{name}", layout="conv1x1")
        return table | _linear(f"{ours}/attention/out", f"{theirs}.attn_1.proj_out", layout="conv1x1")

    table: Table = {}
    for part in ("encoder", "decoder"):
        table |= _conv(f"{part}/conv_in", f"{part}.conv_in") | middle(part)
        table |= _norm(f"{part}/norm_out", f"{part}.norm_out") | _conv(f"{part}/conv_out", f"{part}.conv_out")
    below = autoencoder.widths[0]
    for level, width in enumerate(autoencoder.widths):
        for i in range(blocks):
            skip = "nin_shortcut" if below != width else None
            table |= _residual(f"encoder/down_{level}_residual_{i}", f"encoder.down.{level}.block.{i}", skip)
            below = width
        if level + 1 < levels:
            table |= _conv(f"encoder/down_{level}_sample", f"encoder.down.{level}.downsample.conv")
    for level, width in reversed(list(enumerate(autoencoder.widths))):
        for i in range(blocks + 1):
            skip = "nin_shortcut" if below != width else None
            table |= _residual(f"decoder/up_{level}_residual_{i}", f"decoder.up.{level}.block.{i}", skip)
            below = width
        if level:
            table |= _conv(f"decoder/up_{level}_sample", f"decoder.up.{level}.upsample.conv")
    table |= _linear("quant", "quant_conv", layout="conv1x1")
    table |= _linear("post_quant", "post_quant_conv", layout="conv1x1")
    return {path: LdmWeight(prefix + name, layout) for path, (name, layout) in table.items()}


def to_ldm(array: np.ndarray, layout: str) -> np.ndarray:
    """Our array in the layout of the state dict."""
    if layout == "linear":
        return array.T
    if layout == "conv1x1":
        return array.T[:, :, None, None]
    if layout == "conv":
        return array.transpose(3, 2, 0, 1)
    if layout == "pointwise":
        return array[None, None]
    return array


def from_ldm(array: np.ndarray, layout: str) -> np.ndarray:
    """The inverse of `to_ldm`. A 1x1 convolution may also arrive as a plain matrix (diffusers)."""
    if layout == "linear":
        return array.reshape(array.shape[:2]).T
    if layout == "conv1x1":
        return array.reshape(array.shape[:2]).T
    if layout == "conv":
        return array.transpose(2, 3, 1, 0)
    if layout == "pointwise":
        return array.reshape(array.shape[2:])
    return array


def params_from_ldm(state: Mapping[str, np.ndarray], table: Table) -> PyTree:
    """Nested parameters taken from a state dict; its other entries are ignored.

    Raises:
      KeyError: the state dict lacks weights of the table; the first eight are named.
    """
    missing = [weight.name for weight in table.values() if weight.name not in state]
    if missing:
        named = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
        raise KeyError(f"the state dict lacks {len(missing)} of {len(table)} weights: {named}")
    flat = {tuple(path.split("/")): from_ldm(state[name], layout) for path, (name, layout) in table.items()}
    return unflatten_dict(flat)


def params_to_ldm(params: PyTree, table: Table) -> dict[str, np.ndarray]:
    """State dict of nested parameters. Raises KeyError when the paths are not exactly the table's."""
    flat = flatten_dict(params, sep="/")
    if flat.keys() != table.keys():
        unmatched = sorted(flat.keys() ^ table.keys())
        raise KeyError(f"parameters without a name, or names without a parameter: {unmatched}")
    return {table[path].name: to_ldm(np.asarray(value), table[path].layout) for path, value in flat.items()}


def _residual(ours: str, theirs: str, skip: str | None = None) -> Table:
    """A residual block without time embedding; `skip` names its 1x1 convolution."""
    table: Table = {}
    for i in (1, 2):
        table |= _norm(f"{ours}/norm{i}", f"{theirs}.norm{i}")
        table |= _conv(f"{ours}/conv{i}", f"{theirs}.conv{i}")
    if skip is not None:
        table |= _linear(f"{ours}/skip", f"{theirs}.{skip}", layout="conv1x1")
    return table


def _norm(ours: str, theirs: str) -> Table:
    return {
        f"{ours}/scale": LdmWeight(f"{theirs}.weight", "vector"),
        f"{ours}/bias": LdmWeight(f"{theirs}.bias", "vector"),
    }


def _conv(ours: str, theirs: str) -> Table:
    return _linear(ours, theirs, layout="conv")


def _linear(ours: str, theirs: str, layout: str = "linear") -> Table:
    return {
        f"{ours}/kernel": LdmWeight(f"{theirs}.weight", layout),
        f"{ours}/bias": LdmWeight(f"{theirs}.bias", "vector"),
    }
