"""Image autoencoders: the VAE of Stable Diffusion, and a space-to-depth one without weights.

Both have the interface
  encode(images (N,S,S,3) in [-1, 1]) -> (mean, logvar), each (N,h,w,c)
  decode(latents (N,h,w,c)) -> images (N,S,S,3), not clipped
as Flax methods (`model.apply(variables, x, method="encode")`). The diffusion latents z are the
autoencoder's own codes y times `scale`, and both ends of the interface speak z:
  mean_z = scale * mean_y,  logvar_z = logvar_y + 2 log(scale),  decode(z) = decoder(z / scale).
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from loki_jax.models.attention import attend
from loki_jax.models.layers import Conv3x3, Dtype, GroupNorm, ResidualBlock, dense, upsample_nearest

_EPS = 1e-6

# Log-variance of an autoencoder without noise; the VAE's own is clamped to the same lower limit.
DETERMINISTIC_LOGVAR = -30.0

Images = Float[Array, "n height width 3"]  # in [-1, 1]
Latents = Float[Array, "n h w c"]


def sample_posterior(
    key: PRNGKeyArray, mean: Float[Array, "*b h w c"], logvar: Float[Array, "*b h w c"]
) -> Float[Array, "*b h w c"]:
    """One draw mean + exp(logvar / 2) * noise."""
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)


class _MiddleAttention(nn.Module):
    """Single-head self-attention over all pixels."""

    groups: int
    backend: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        n, height, width, channels = x.shape
        h = GroupNorm(self.groups, _EPS, name="norm")(x)
        q, k, v = (
            dense(channels, name, self.dtype)(h).reshape(n, height * width, 1, channels) for name in "qkv"
        )
        out = attend(q, k, v, self.backend).reshape(x.shape)
        return x + dense(channels, "out", self.dtype)(out)


class _Middle(nn.Module):
    features: int
    groups: int
    backend: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        x = ResidualBlock(self.features, self.groups, self.dtype, _EPS, name="residual_0")(x)
        x = _MiddleAttention(self.groups, self.backend, self.dtype, name="attention")(x)
        return ResidualBlock(self.features, self.groups, self.dtype, _EPS, name="residual_1")(x)


class _Encoder(nn.Module):
    widths: tuple[int, ...]
    num_res_blocks: int
    out_channels: int
    groups: int
    backend: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Images) -> Latents:
        h = Conv3x3(self.widths[0], dtype=self.dtype, name="conv_in")(x)
        for level, width in enumerate(self.widths):
            for i in range(self.num_res_blocks):
                h = ResidualBlock(width, self.groups, self.dtype, _EPS, name=f"down_{level}_residual_{i}")(h)
            if level + 1 < len(self.widths):
                # Padded right and bottom only, as these weights were trained.
                h = Conv3x3(
                    width, stride=2, padding=((0, 1), (0, 1)), dtype=self.dtype, name=f"down_{level}_sample"
                )(h)
        h = _Middle(self.widths[-1], self.groups, self.backend, self.dtype, name="middle")(h)
        h = nn.silu(GroupNorm(self.groups, _EPS, name="norm_out")(h))
        return Conv3x3(self.out_channels, dtype=self.dtype, name="conv_out")(h)


class _Decoder(nn.Module):
    widths: tuple[int, ...]
    num_res_blocks: int
    groups: int
    backend: str
    dtype: Dtype

    @nn.compact
    def __call__(self, z: Latents) -> Images:
        h = Conv3x3(self.widths[-1], dtype=self.dtype, name="conv_in")(z)
        h = _Middle(self.widths[-1], self.groups, self.backend, self.dtype, name="middle")(h)
        for level, width in reversed(list(enumerate(self.widths))):
            for i in range(self.num_res_blocks + 1):
                h = ResidualBlock(width, self.groups, self.dtype, _EPS, name=f"up_{level}_residual_{i}")(h)
            if level:
                h = Conv3x3(width, dtype=self.dtype, name=f"up_{level}_sample")(upsample_nearest(h))
        h = nn.silu(GroupNorm(self.groups, _EPS, name="norm_out")(h))
        return Conv3x3(3, dtype=self.dtype, name="conv_out")(h)


class AutoencoderKL(nn.Module):
    """The convolutional VAE of Stable Diffusion; frozen wherever the package uses it.

    Attributes:
      widths: channels of each level, from the image inwards; a stride of 2 between levels.
      num_res_blocks: residual blocks a level in the encoder (one more in the decoder).
      latent_channels: c of the latents.
      scale: factor between the VAE's codes and the diffusion latents, see the module docstring.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    num_res_blocks: int = 2
    latent_channels: int = 4
    scale: float = 0.18215
    norm_groups: int = 32
    attention_backend: str = "auto"
    dtype: Dtype = jnp.float32

    @property
    def stride(self) -> int:
        """Pixels per latent along an image axis."""
        return 2 ** (len(self.widths) - 1)

    def setup(self) -> None:
        common = (self.norm_groups, self.attention_backend, self.dtype)
        self.encoder = _Encoder(self.widths, self.num_res_blocks, 2 * self.latent_channels, *common)
        self.decoder = _Decoder(self.widths, self.num_res_blocks, *common)
        self.quant = dense(2 * self.latent_channels, None, self.dtype)
        self.post_quant = dense(self.latent_channels, None, self.dtype)

    def encode(self, images: Images) -> tuple[Latents, Latents]:
        """Mean and log-variance of the scaled latents, float32.

        Raises:
          ValueError: the images' sides are not divisible by the stride.
        """
        _, height, width, _ = images.shape
        if height % self.stride or width % self.stride:
            raise ValueError(f"images of {height} x {width} are not divisible by {self.stride}")
        moments = self.quant(self.encoder(images.astype(self.dtype))).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        logvar = jnp.clip(logvar, DETERMINISTIC_LOGVAR, 20.0)
        return mean * self.scale, logvar + 2 * math.log(self.scale)

    def decode(self, latents: Latents) -> Images:
        """Images in about [-1, 1], float32, of scaled latents."""
        codes = (latents / self.scale).astype(self.dtype)
        return self.decoder(self.post_quant(codes)).astype(jnp.float32)

    def __call__(self, images: Images) -> Images:
        """Reconstruction from the posterior mean; touches every parameter (for `init`)."""
        return self.decode(self.encode(images)[0])


class PixelAutoencoder(nn.Module):
    """Space-to-depth of `patch` x `patch` pixels times `scale`: exactly invertible, no parameters.

    Latent channel order is (row in patch, column in patch, colour).
    """

    patch: int = 4
    scale: float = 1.0

    @property
    def stride(self) -> int:
        """Pixels per latent along an image axis."""
        return self.patch

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return 3 * self.patch**2

    def encode(self, images: Images) -> tuple[Latents, Latents]:
        """The scaled latents and a constant log-variance of -30.

        Raises:
          ValueError: the images' sides are not divisible by the patch size.
        """
        n, height, width, colours = images.shape
        p = self.patch
        if height % p or width % p:
            raise ValueError(f"images of {height} x {width} are not divisible by the patch size {p}")
        z = images.astype(jnp.float32).reshape(n, height // p, p, width // p, p, colours)
        z = z.transpose(0, 1, 3, 2, 4, 5).reshape(n, height // p, width // p, p * p * colours) * self.scale
        return z, jnp.full_like(z, DETERMINISTIC_LOGVAR)

    def decode(self, latents: Latents) -> Images:
        """The images of scaled latents."""
        n, h, w, _ = latents.shape
        p = self.patch
        x = (latents / self.scale).reshape(n, h, w, p, p, 3).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(n, h * p, w * p, 3)

    def __call__(self, images: Images) -> Images:
        """The images again (for `init`)."""
        return self.decode(self.encode(images)[0])


Autoencoder = AutoencoderKL | PixelAutoencoder


def make_autoencoder(config: ConfigDict) -> Autoencoder:
    """The autoencoder of `config.model`; configs/common.py explains the keys.

    Raises:
      ValueError: unknown kind, or latents that do not fit `model.latent_channels`.
    """
    options = config.autoencoder
    model: Autoencoder
    if options.kind == "kl":
        backend = config.get("attention_backend", "auto")
        model = AutoencoderKL(
            widths=tuple(options.widths),
            num_res_blocks=options.num_res_blocks,
            latent_channels=config.latent_channels,
            scale=options.scale,
            norm_groups=options.get("norm_groups", 32),
            # The fused kernels do not take the VAE's one head of 512 channels.
            attention_backend="auto" if backend in ("cudnn", "splash") else backend,
            dtype=jnp.dtype(config.get("dtype", "float32")),
        )
    elif options.kind == "pixel":
        model = PixelAutoencoder(patch=options.patch, scale=options.scale)
    else:
        raise ValueError(f"unknown model.autoencoder.kind {options.kind!r}; one of 'kl', 'pixel'")
    if model.latent_channels != config.latent_channels:
        raise ValueError(
            f"model.latent_channels is {config.latent_channels}, but the autoencoder "
            f"makes {model.latent_channels}"
        )
    return model
