"""Layers shared by the UNet, the conditioning encoder and the autoencoder.

Parameters are float32; `dtype` is the dtype of the computation. Normalisation statistics are always
float32 and two-pass: the mean first, then the mean of squared deviations. The one-pass form
(E[x^2] - E[x]^2) cancels where a plane is constant, which driver maps are outside the head.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Dtype = Any


def group_norm(
    x: Float[Array, "n h w c"], scale: Float[Array, " c"], bias: Float[Array, " c"], groups: int, eps: float
) -> Float[Array, "n h w c"]:
    """Group normalisation over space and the channels of each group, in float32.

    Returns the dtype of `x`. Reducing over space first and over the few channels of a group afterwards
    keeps the channel axis innermost, so nothing is transposed.
    """
    n, h, w, c = x.shape
    x32 = x.astype(jnp.float32).reshape(n, h * w, c)

    def over_group(per_channel: Float[Array, "n c"]) -> Float[Array, "n 1 c"]:
        mean = per_channel.reshape(n, groups, c // groups).mean(-1)
        return jnp.repeat(mean, c // groups, axis=1)[:, None, :]

    centred = x32 - over_group(x32.mean(1))
    variance = over_group(jnp.square(centred).mean(1))
    y = centred * (jax.lax.rsqrt(variance + eps) * scale) + bias
    return y.reshape(n, h, w, c).astype(x.dtype)


class GroupNorm(nn.Module):
    """`group_norm` with learned scale and bias; `groups` must divide the channels (ValueError)."""

    groups: int = 32
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(f"{channels} channels cannot be split into {self.groups} norm groups; "
                             "set model.norm_groups to a divisor of every width")
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        return group_norm(x, scale, bias, self.groups, self.eps)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis with float32 statistics; returns the dtype of `x`."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(x.dtype)


class Conv3x3(nn.Module):
    """3 x 3 convolution, zero padding. `padding` is 1 on all sides unless given per side."""

    features: int
    stride: int = 1
    padding: Any = 1
    zero_init: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 features"]:
        init = nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        padding = ((self.padding, self.padding),) * 2 if isinstance(self.padding, int) else self.padding
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + bias.astype(self.dtype)


def dense(
    features: int, name: str, dtype: Dtype, *, use_bias: bool = True, zero_init: bool = False
) -> nn.Dense:
    """A linear layer over the last axis (also every 1 x 1 convolution of the networks)."""
    init = nn.initializers.zeros if zero_init else nn.initializers.lecun_normal()
    return nn.Dense(features, use_bias=use_bias, kernel_init=init, dtype=dtype, name=name)


def upsample_nearest(x: Float[Array, "n h w c"]) -> Float[Array, "n 2*h 2*w c"]:
    """Doubles height and width by repeating every pixel."""
    n, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (n, h, 2, w, 2, c))
    return x.reshape(n, 2 * h, 2 * w, c)


def timestep_embedding(timesteps: Float[Array, " n"], dim: int) -> Float[Array, "n dim"]:
    """Sinusoidal embedding [cos, sin] of diffusion times, wavelengths 2 pi to 2 pi 10^4; float32."""
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
