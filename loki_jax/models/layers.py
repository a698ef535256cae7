"""Layers shared by the UNet, the conditioning encoder and the autoencoder.

Parameters are float32; `dtype` is the dtype of the computation. Normalisation statistics are always
float32 and two-pass: the mean first, then the mean of squared deviations. The one-pass form
(E[x^2] - E[x]^2) cancels where a plane is constant, as driver maps are outside of the head.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PRNGKeyArray

from loki_jax.arrays import ArrayLike

Dtype = Any


def group_norm(
    x: Float[Array, "n h w c"],
    scale: Float[ArrayLike, " c"],
    bias: Float[ArrayLike, " c"],
    groups: int,
    eps: float,
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
            raise ValueError(
                f"{channels} channels cannot be split into {self.groups} norm groups; "
                "set model.norm_groups to a divisor of every width"
            )
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


# Standard deviation of a standard normal variable cut at -2 and 2.
_CUT_NORMAL = 0.87962566103423978


def kernel_init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    """Initial values of variance 1 / inputs (LeCun et al. 1998), normal and cut at 2 standard deviations.

    The numbers of `nn.initializers.lecun_normal()`, drawn as the first of a power of two: compiling a draw
    takes half a second, and networks have more shapes than powers of two. With JAX's default generator, what
    comes first does not depend on how many numbers are drawn (`jax_threefry_partitionable`).

    Args:
      shape: (*kernel, inputs, outputs).
    """
    count, inputs = math.prod(shape), math.prod(shape[:-1])
    drawn = jax.random.truncated_normal(key, -2, 2, (1 << (count - 1).bit_length(),), dtype)
    return drawn[:count].reshape(shape) * (
        jnp.sqrt(jnp.array(1 / inputs, dtype)) / jnp.array(_CUT_NORMAL, dtype)
    )


# XLA's CPU convolution is slower than a matrix product with at most so many pixels (over the batch) and
# at least so many channels: 2.5 to 5 times at 8 x 8 x 1,280.
_PATCH_PIXELS, _PATCH_CHANNELS = 512, 512


def conv3x3(
    x: Float[Array, "n h w c"],
    kernel: Float[ArrayLike, "3 3 c f"],
    stride: int,
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> Float[Array, "n h2 w2 f"]:
    """3 x 3 convolution in the dtype of its arguments; `padding` is ((top, bottom), (left, right))."""
    n, h, w, c = x.shape
    kernel = jnp.asarray(kernel)
    if jax.default_backend() == "cpu" and n * h * w <= _PATCH_PIXELS * stride**2 and c >= _PATCH_CHANNELS:
        return _conv3x3_of_patches(x, kernel, stride, padding)
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _conv3x3_of_patches(x: Array, kernel: Array, stride: int, padding) -> Array:
    """The same convolution as one product of all 3 x 3 neighbourhoods with the kernel."""
    n, _, _, c = x.shape
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    h, w = ((size - 3) // stride + 1 for size in padded.shape[1:3])
    span = lambda start, size: slice(start, start + stride * (size - 1) + 1, stride)
    taps = [padded[:, span(i, h), span(j, w)] for i in range(3) for j in range(3)]
    out = jnp.concatenate(taps, axis=-1).reshape(n * h * w, 9 * c) @ kernel.reshape(9 * c, -1)
    return out.reshape(n, h, w, -1)


class Conv3x3(nn.Module):
    """3 x 3 convolution, zero padding. `padding` is 1 on all sides unless given per side."""

    features: int
    stride: int = 1
    padding: Any = 1
    zero_init: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 features"]:
        init = nn.initializers.zeros if self.zero_init else kernel_init
        kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        padding = ((self.padding, self.padding),) * 2 if isinstance(self.padding, int) else self.padding
        y = conv3x3(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, padding)
        return y + bias.astype(self.dtype)


def dense(
    features: int, name: str | None, dtype: Dtype, *, use_bias: bool = True, zero_init: bool = False
) -> nn.Dense:
    """A linear layer over the last axis (also every 1 x 1 convolution of the networks)."""
    init = nn.initializers.zeros if zero_init else kernel_init
    return nn.Dense(features, use_bias=use_bias, kernel_init=init, dtype=dtype, name=name)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 conv, + time, GroupNorm, SiLU, 3x3 conv, + skip (1x1 where the widths differ).

    Attributes:
      features: channels of the result.
      groups: of both GroupNorms; must divide the channels before and after (ValueError).
      zero_init: start with a second convolution of zeros.
    """

    features: int
    groups: int
    dtype: Dtype
    eps: float = 1e-5
    zero_init: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], time: Float[Array, "n e"] | None = None
    ) -> Float[Array, "n h w features"]:
        """`time` is the embedding of the diffusion time, in the UNet only."""
        h = nn.silu(GroupNorm(self.groups, self.eps, name="norm1")(x))
        h = Conv3x3(self.features, dtype=self.dtype, name="conv1")(h)
        if time is not None:
            h = h + dense(self.features, "time", self.dtype)(nn.silu(time))[:, None, None, :]
        h = nn.silu(GroupNorm(self.groups, self.eps, name="norm2")(h))
        h = Conv3x3(self.features, zero_init=self.zero_init, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, "skip", self.dtype)(x)
        return x + h


def upsample_nearest(x: Float[Array, "n h w c"]) -> Float[Array, "n 2*h 2*w c"]:
    """Doubles height and width by repeating every pixel."""
    n, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (n, h, 2, w, 2, c))
    return x.reshape(n, 2 * h, 2 * w, c)


def timestep_embedding(timesteps: Num[Array, " n"], dim: int) -> Float[Array, "n dim"]:
    """Sinusoidal embedding [cos, sin] of diffusion times, wavelengths 2 pi to 2 pi 10^4; float32."""
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
