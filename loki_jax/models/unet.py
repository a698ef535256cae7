"""The denoising UNet of Stable Diffusion 2.1, made spatio-temporal. Method, section 6.

One module serves both branches. The generation branch runs on windows of T frames without text
cross-attention and receives tokens of the reference; the reference branch runs on single images
(T = 1) and is called for the features it returns. What one branch hands to the other is a return value
and an argument; modules hold no state.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from loki_jax.models.attention import attend, attend_frames
from loki_jax.models.layers import (
    Conv3x3,
    Dtype,
    GroupNorm,
    LayerNorm,
    ResidualBlock,
    dense,
    timestep_embedding,
    upsample_nearest,
)

ATTENTION_MODES = ("spatial", "3d", "temporal", "full")
# Modes that attend within each frame and then once more, and which tokens of the window see each other then.
ADDED_ATTENTION = {"temporal": "temporal", "full": "3d"}

Tokens = Float[Array, "b t n c"]  # of the frames of a window

Features = tuple[Float[Array, "b _ _"], ...]  # what entered each self-attention: down, middle, up

# What another network's self-attentions make of them: their keys and values (`keys_values`).
KeysValues = tuple[tuple[Float[Array, "b _ _"], Float[Array, "b _ _"]], ...]

Extra = Float[Array, "b m c"] | tuple[Float[Array, "b m c"], Float[Array, "b m c"]]


class BlockOptions(NamedTuple):
    """What the blocks of one UNet share; see `UNet`."""

    head_channels: int
    norm_groups: int
    context_dim: int | None
    backend: str
    dtype: Dtype


class Attention(nn.Module):
    """Multi-head attention of `tokens` to themselves, to extra tokens, or to a context.

    Extra tokens can also be given as their keys and values. q, k, v have no bias, the output projection has
    one. `mode` says which tokens of the window see each other: "spatial" those of the same frame, "3d" all,
    "temporal" those of the same pixel.
    """

    options: BlockOptions
    zero_init: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        mode: str,
        extra: Extra | None = None,
        context: Float[Array, "b l e"] | None = None,
    ) -> Tokens:
        b, t, n, channels = tokens.shape
        backend, dtype = self.options.backend, self.options.dtype
        to_q, to_k, to_v = (dense(channels, name, dtype, use_bias=False) for name in "qkv")
        split = lambda x: x.reshape(*x.shape[:-1], -1, self.options.head_channels)
        source = tokens if context is None else context
        q, k, v = split(to_q(tokens)), split(to_k(source)), split(to_v(source))
        shared = None
        if extra is not None:
            # The reference goes through the same projections as the frames' own tokens.
            keys_values = extra if isinstance(extra, tuple) else (to_k(extra), to_v(extra))
            shared = tuple(map(split, keys_values))
        if mode == "temporal":
            per_pixel = lambda x: x.swapaxes(1, 2).reshape(b * n, t, *x.shape[3:])
            out = attend(per_pixel(q), per_pixel(k), per_pixel(v), backend)
            out = out.reshape(b, n, t, channels).swapaxes(1, 2)
        elif mode == "spatial" and t > 1:
            out = attend_frames(q, k, v, shared, backend)
        else:
            whole = lambda x: x.reshape(b, -1, *x.shape[-2:])
            k, v = whole(k), whole(v)
            if shared is not None:
                k, v = (jnp.concatenate(pair, axis=1) for pair in zip((k, v), shared, strict=True))
            out = attend(whole(q), k, v, backend)
        return dense(channels, "out", dtype, zero_init=self.zero_init)(out.reshape(b, t, n, channels))


class TransformerBlock(nn.Module):
    """Self-attention, optional added and cross-attention, GEGLU feed-forward, each residual.

    Added attention ("temporal" or "full") is among the tokens of the window alone, without the reference.

    Returns the tokens and the LayerNorm output that entered self-attention, (B, T N, C): the
    feature the reference branch hands on.
    """

    options: BlockOptions
    mode: str

    @nn.compact
    def __call__(
        self, x: Tokens, reference: Extra | None, context: Float[Array, "b l e"] | None
    ) -> tuple[Tokens, Float[Array, "b tn c"]]:
        b, t, n, channels = x.shape
        attention = partial(Attention, self.options)
        normed = LayerNorm(name="self_norm")(x)
        within = "3d" if self.mode == "3d" else "spatial"
        x = x + attention(name="self_attention")(normed, within, extra=reference)
        if self.mode in ADDED_ATTENTION:
            # Zero at the start, so that a pretrained backbone is unchanged (AnimateDiff, Guo et al. 2024).
            added = attention(zero_init=True, name=f"{self.mode}_attention")
            x = x + added(LayerNorm(name=f"{self.mode}_norm")(x), ADDED_ATTENTION[self.mode])
        if self.options.context_dim is not None:
            h = LayerNorm(name="cross_norm")(x)
            x = x + attention(name="cross_attention")(h, "context", context=context)
        h = LayerNorm(name="ff_norm")(x)
        h, gate = jnp.split(dense(8 * channels, "ff_in", self.options.dtype)(h), 2, axis=-1)
        h = h * nn.gelu(gate, approximate=False)
        x = x + dense(channels, "ff_out", self.options.dtype)(h)
        return x, normed.reshape(b, t * n, channels)


class SpatioTemporalTransformer(nn.Module):
    """GroupNorm, linear in, one transformer block, linear out (zero at the start), + input."""

    options: BlockOptions
    mode: str
    frames: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "bt h w c"],
        reference: Extra | None = None,
        context: Float[Array, "b l e"] | None = None,
    ) -> tuple[Float[Array, "bt h w c"], Float[Array, "b n c"]]:
        channels, dtype = x.shape[-1], self.options.dtype
        h = GroupNorm(self.options.norm_groups, eps=1e-6, name="norm")(x)
        h = dense(channels, "proj_in", dtype)(h)
        h = h.reshape(-1, self.frames, x.shape[1] * x.shape[2], channels)
        h, feature = TransformerBlock(self.options, self.mode, name="block")(h, reference, context)
        h = dense(channels, "proj_out", dtype, zero_init=True)(h)
        return x + h.reshape(x.shape), feature


class UNet(nn.Module):
    """Denoising UNet on windows of frames; equivariant to permuting the frames of a window.

    Attributes:
      out_channels: channels of the prediction.
      channels: width of the first level.
      multipliers: width of each level as a multiple of `channels`; a stride of 2 between levels.
      num_res_blocks: residual blocks a level going down (one more going up).
      attention_levels: levels whose residual blocks are followed by a transformer; the middle
        always has one.
      attention_modes: "spatial", "3d", "temporal" (per-frame, then per-pixel over time) or "full" (per-frame,
        then over all tokens of all frames) for each level; the middle uses the last.
      head_channels: channels of an attention head; must divide every attended width.
      context_dim: width of the cross-attention context, None for no cross-attention.
      norm_groups: groups of every GroupNorm; must divide every width.
      dtype: of the computation; parameters are float32.
      attention_backend: see `attention.attend`.
      remat: recompute residual blocks and transformers in the backward pass.
    """

    out_channels: int = 4
    channels: int = 320
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    attention_modes: tuple[str, ...] = ("spatial", "3d", "3d", "3d")
    head_channels: int = 64
    context_dim: int | None = None
    norm_groups: int = 32
    dtype: Dtype = jnp.float32
    attention_backend: str = "auto"
    remat: bool = False

    def transformers(self) -> list[str]:
        """Names of the modules with self-attention in the order of their features: down, middle, up."""
        levels = [level for level in range(len(self.multipliers)) if level in self.attention_levels]
        down = [f"down_{level}_transformer_{i}" for level in levels for i in range(self.num_res_blocks)]
        up = [f"up_{level}_transformer_{i}" for level in levels[::-1] for i in range(self.num_res_blocks + 1)]
        return [*down, "middle_transformer", *up]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        timesteps: Int[Array, "b t"],
        condition: Float[Array, "b t h w c0"] | None = None,
        reference: Features | KeysValues | None = None,
        context: Float[Array, "b l e"] | None = None,
    ) -> tuple[Float[Array, "b t h w out"], Features]:
        """Predicts noise (or v) and returns the tokens that entered each self-attention.

        Args:
          x: noisy latents.
          timesteps: diffusion time of each frame.
          condition: added once, after the first convolution.
          reference: for each self-attention in order (down, middle, up), tokens appended to its keys
            and values, or these keys and values (`keys_values`); None appends nothing.
          context: cross-attention tokens, needed when `context_dim` is set.

        Returns:
          The prediction, float32, and one (B, T h w, D) feature for each self-attention.

        Raises:
          ValueError: inputs that do not fit the configuration, with the offending shapes.
        """
        self._check(x, timesteps, condition, reference, context)
        batch, frames = x.shape[:2]
        maybe_remat = nn.remat if self.remat else lambda module: module
        residual_block, transformer = maybe_remat(ResidualBlock), maybe_remat(SpatioTemporalTransformer)
        options = BlockOptions(
            self.head_channels, self.norm_groups, self.context_dim, self.attention_backend, self.dtype
        )
        pending = iter(reference) if reference is not None else None
        features = []

        def residual(h: Array, width: int, name: str) -> Array:
            return residual_block(width, self.norm_groups, self.dtype, zero_init=True, name=name)(h, time)

        def attention(h: Array, level: int, name: str) -> Array:
            block = transformer(options, self.attention_modes[level], frames, name=name)
            h, feature = block(h, None if pending is None else next(pending), context)
            features.append(feature)
            return h

        widths = [self.channels * m for m in self.multipliers]
        time = timestep_embedding(timesteps.reshape(-1), self.channels).astype(self.dtype)
        time = dense(4 * self.channels, "time_in", self.dtype)(time)
        time = dense(4 * self.channels, "time_out", self.dtype)(nn.silu(time))

        h = x.reshape(batch * frames, *x.shape[2:]).astype(self.dtype)
        h = Conv3x3(self.channels, dtype=self.dtype, name="conv_in")(h)
        if condition is not None:
            h = h + condition.reshape(h.shape).astype(self.dtype)

        skips = [h]
        for level, width in enumerate(widths):
            for i in range(self.num_res_blocks):
                h = residual(h, width, f"down_{level}_residual_{i}")
                if level in self.attention_levels:
                    h = attention(h, level, f"down_{level}_transformer_{i}")
                skips.append(h)
            if level + 1 < len(widths):
                h = Conv3x3(width, stride=2, dtype=self.dtype, name=f"down_{level}_sample")(h)
                skips.append(h)

        h = residual(h, widths[-1], "middle_residual_0")
        h = attention(h, -1, "middle_transformer")
        h = residual(h, widths[-1], "middle_residual_1")

        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.num_res_blocks + 1):
                h = residual(jnp.concatenate([h, skips.pop()], -1), width, f"up_{level}_residual_{i}")
                if level in self.attention_levels:
                    h = attention(h, level, f"up_{level}_transformer_{i}")
            if level:
                h = upsample_nearest(h)
                h = Conv3x3(width, dtype=self.dtype, name=f"up_{level}_sample")(h)

        h = nn.silu(GroupNorm(self.norm_groups, name="norm_out")(h))
        h = Conv3x3(self.out_channels, zero_init=True, dtype=self.dtype, name="conv_out")(h)
        out = h.astype(jnp.float32).reshape(batch, frames, *h.shape[1:])
        return out, tuple(features)

    def _check(self, x, timesteps, condition, reference, context) -> None:
        if len(self.attention_modes) != len(self.multipliers):
            raise ValueError(
                f"attention_modes {self.attention_modes} must name one mode for each of the "
                f"{len(self.multipliers)} levels"
            )
        if unknown := set(self.attention_modes) - set(ATTENTION_MODES):
            raise ValueError(f"unknown attention modes {sorted(unknown)}; known are {ATTENTION_MODES}")
        attended = {self.channels * self.multipliers[level] for level in (*self.attention_levels, -1)}
        if any(width % self.head_channels for width in attended):
            raise ValueError(f"head_channels {self.head_channels} must divide the widths {sorted(attended)}")
        if x.ndim != 5 or timesteps.shape != x.shape[:2]:
            raise ValueError(f"x must be (B, T, h, w, c) and timesteps (B, T): {x.shape}, {timesteps.shape}")
        stride = 2 ** (len(self.multipliers) - 1)
        if x.shape[2] % stride or x.shape[3] % stride:
            raise ValueError(
                f"latents of {x.shape[2]} x {x.shape[3]} are not divisible by {stride}, "
                f"which {len(self.multipliers)} levels need"
            )
        if condition is not None and condition.shape != (*x.shape[:4], self.channels):
            raise ValueError(f"condition {condition.shape} must be {(*x.shape[:4], self.channels)}")
        layers = len(self.transformers())
        if reference is not None and len(reference) != layers:
            raise ValueError(f"{len(reference)} reference features for {layers} self-attentions")
        if (context is None) != (self.context_dim is None):
            raise ValueError(
                f"context_dim is {self.context_dim} but context is "
                f"{'missing' if context is None else 'given'}"
            )


def keys_values(unet: UNet, params: PyTree, features: Features) -> KeysValues:
    """What `unet` with `params` makes of another network's features in each of its self-attentions.

    It takes them in place of the features, and then need not project the same features in every call.
    """

    def project(layer: str, feature: Float[Array, "b n c"]) -> tuple[Array, Array]:
        weights = params[layer]["block"]["self_attention"]
        linear = dense(feature.shape[-1], None, unet.dtype, use_bias=False)
        apply = lambda name: jnp.asarray(linear.apply({"params": weights[name]}, feature))
        return apply("k"), apply("v")

    return tuple(project(*pair) for pair in zip(unet.transformers(), features, strict=True))
