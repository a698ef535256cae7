"""The whole network: driver encoder, generation UNet and reference UNet. Method, sections 1, 6, 11.

configs/common.py explains the keys of `config.model`. `networks.build_networks` adds the three that follow
from others: `latent_size` (h = w), `encoder.kind` ("map" or "vector") and `encoder.in_channels`.

Parameters are {"generation": {"unet", "encoder"}, "reference": {...}}; the autoencoder is separate
(`models/autoencoder.py`).

Null conditions for classifier-free guidance (method, section 11, rows 1 and 2): a dropped identity is
zero *features* (`drop_identity`), a dropped motion is a zero *driver map*, so that the encoder still
runs (`drop_motion`). Zero features differ from no features: the zero tokens take part in the softmax.
The public code's training ran the reference UNet on a zero latent instead; to reproduce it, call
`reference_features(drop_motion(latent, keep))`.
"""

from __future__ import annotations

from collections.abc import Iterable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from ml_collections import ConfigDict

from loki_jax.arrays import ArrayLike
from loki_jax.models.encoder import ConditioningEncoder, VectorEncoder
from loki_jax.models.unet import ADDED_ATTENTION, Features, KeysValues, UNet


class Generation(nn.Module):
    """The part that the paper trains: the driver encoder and the generation UNet."""

    encoder: ConditioningEncoder | VectorEncoder
    unet: UNet

    def encode(self, driver: Float[Array, "n *s c"]) -> Float[Array, "n h w c0"]:
        """Residual for the UNet's first feature map."""
        return self.encoder(driver)

    def denoise(self, *inputs) -> Float[Array, "b t h w c"]:
        """The UNet's prediction; arguments as for `Loki.denoise`."""
        return self.unet(*inputs)[0]


class Loki(nn.Module):
    """Both branches. Call its methods through `model.apply({"params": params}, ..., method="denoise")`."""

    generation: Generation
    reference: UNet

    def encode_condition(self, driver: Float[Array, "b t *s c"]) -> Float[Array, "b t h w c0"]:
        """Residual for the generation UNet from driver maps (B,T,S,S,C), or vectors (B,T,C)."""
        batch, frames = driver.shape[:2]
        out = self.generation.encode(driver.reshape(batch * frames, *driver.shape[2:]))
        return out.reshape(batch, frames, *out.shape[1:])

    def reference_features(
        self,
        reference_latent: Float[Array, "b h w c"],
        context: Float[Array, "b l e"] | None = None,
        condition: Float[Array, "b h w c0"] | None = None,
    ) -> Features:
        """The tokens entering every self-attention of the reference UNet at t = 0.

        Args:
          reference_latent: scaled latent of the reference portrait, without noise.
          context: embedding of the empty prompt, (B, 77, 1024) for SD 2.1; None without cross-attention.
          condition: the encoder's result for the reference frame's own driver map (`reference.driver`);
            None as in the paper.
        """
        timesteps = jnp.zeros((reference_latent.shape[0], 1), jnp.int32)
        condition = None if condition is None else condition[:, None]
        return self.reference(reference_latent[:, None], timesteps, condition, context=context)[1]

    def denoise(
        self,
        x: Float[Array, "b t h w c"],
        timesteps: Int[Array, "b t"],
        condition: Float[Array, "b t h w c0"] | None,
        features: Features | KeysValues | None,
        context: Float[Array, "b l e"] | None = None,
    ) -> Float[Array, "b t h w c"]:
        """The generation UNet's prediction (noise or v), float32; `features` as `UNet` takes them."""
        return self.generation.denoise(x, timesteps, condition, features, context)

    def __call__(self, x, timesteps, driver, reference_latent, reference_context=None, context=None):
        """Everything in sequence; touches every parameter (for `init`)."""
        features = self.reference_features(reference_latent, reference_context)
        return self.denoise(x, timesteps, self.encode_condition(driver), features, context)


def drop_identity(features: Features, keep: Bool[Array, " b"]) -> Features:
    """Zero features for the samples that are not kept."""
    return tuple(jnp.where(keep[:, None, None], f, jnp.zeros_like(f)) for f in features)


def drop_motion(driver: Float[ArrayLike, "..."], keep: Bool[Array, "..."]) -> Float[Array, "..."]:
    """A zero driver map (or vector, or latent) for the samples, or frames (B,T), that are not kept."""
    keep = keep.reshape(*keep.shape, *(1,) * (driver.ndim - keep.ndim))
    return jnp.where(keep, driver, jnp.zeros_like(driver))


def make_loki(config: ConfigDict) -> Loki:
    """The networks of `config.model` (see the module docstring).

    Raises:
      ValueError: unknown encoder kind. The networks check the other options when they are called.
    """
    dtype = jnp.dtype(config.get("dtype", "float32"))
    groups, remat = config.get("norm_groups", 32), config.get("remat", False)
    unet, reference, encoder = config.unet, config.reference, config.encoder

    def make_unet(branch: ConfigDict, modes: Iterable[str], remat: bool) -> UNet:
        """The reference branch has the sizes of the generation branch unless it gives its own."""
        return UNet(
            out_channels=config.latent_channels,
            channels=branch.get("channels", unet.channels),
            multipliers=tuple(branch.get("multipliers", unet.multipliers)),
            num_res_blocks=branch.get("num_res_blocks", unet.num_res_blocks),
            attention_levels=tuple(unet.attention_levels),
            attention_modes=tuple(modes),
            head_channels=unet.head_channels,
            context_dim=branch.get("context_dim", None),
            norm_groups=groups,
            dtype=dtype,
            attention_backend=config.get("attention_backend", "auto"),
            remat=remat,
        )

    # Time exists in the generation branch only: the reference is one frame, and a pretrained backbone
    # has no such layers.
    modes = ("spatial" if mode in ADDED_ATTENTION else mode for mode in unet.attention_modes)
    # Kept activations are only needed when gradients flow through the branch.
    reference_unet = make_unet(reference, modes, remat and reference.trainable)
    kind = encoder.get("kind", "map")
    driver_encoder: ConditioningEncoder | VectorEncoder
    if kind == "map":
        widths = tuple(encoder.widths)
        driver_encoder = ConditioningEncoder(encoder.stem, widths, unet.channels, groups, dtype, remat)
    elif kind == "vector":
        driver_encoder = VectorEncoder(encoder.hidden, unet.channels, (config.latent_size,) * 2, dtype)
    else:
        raise ValueError(f"unknown model.encoder.kind {kind!r}; one of 'map', 'vector'")
    return Loki(Generation(driver_encoder, make_unet(unet, unet.attention_modes, remat)), reference_unet)


def init_params(model: Loki, config: ConfigDict, key: PRNGKeyArray) -> PyTree:
    """Random float32 parameters of the networks of `config.model`; traceable.

    No parameter depends on the size of the images, so the smallest one that fits is used.
    """
    size = 2 ** (max(len(model.generation.unet.multipliers), len(model.reference.multipliers)) - 1)
    channels = config.encoder.in_channels
    if isinstance(model.generation.encoder, VectorEncoder):
        size = config.latent_size
        driver = jnp.zeros((1, 1, channels))
    else:
        side = size * 2 ** len(model.generation.encoder.widths)
        driver = jnp.zeros((1, 1, side, side, channels))
    x = jnp.zeros((1, 1, size, size, config.latent_channels))
    timesteps = jnp.zeros((1, 1), jnp.int32)
    null = lambda unet: None if unet.context_dim is None else jnp.zeros((1, 1, unet.context_dim))
    contexts = null(model.reference), null(model.generation.unet)
    return model.init(key, x, timesteps, driver, x[:, 0], *contexts)["params"]
