"""Shapes of train state and batch, for planning and ahead-of-time compilation; nothing is allocated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from loki_jax.head.asset import HeadAsset
from loki_jax.head.types import Camera, Coefficients
from loki_jax.networks import Networks, random_params
from loki_jax.training.state import TrainState, create_state
from loki_jax.training.step import split_params


def abstract_state(
    config: ConfigDict, networks: Networks, optimizer: optax.GradientTransformation
) -> TrainState:
    """The train state as ShapeDtypeStructs."""

    def build():
        params, frozen = split_params(config, random_params(networks, jax.random.key(0)))
        return create_state(params, frozen, optimizer, keep_ema=config.ema_decay > 0)

    return jax.eval_shape(build)


def abstract_batch(config: ConfigDict, head: HeadAsset, latents_of: Networks | None = None) -> dict[str, Any]:
    """A global batch as ShapeDtypeStructs (see `data/pipeline.py`): of images, or of latents.

    Args:
      latents_of: networks whose autoencoder's latents the shards hold instead of images.
    """
    b, t, s = config.batch_size, config.window, config.image_size
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)

    def coefficients(*lead: int) -> Coefficients:
        rotations = (floats(*lead, 3) for _ in range(5))
        return Coefficients(floats(*lead, head.n_shape), floats(*lead, head.n_expression), *rotations)

    pictures = {
        "frames": jax.ShapeDtypeStruct((b, t, s, s, 3), jnp.uint8),
        "reference": jax.ShapeDtypeStruct((b, s, s, 3), jnp.uint8),
    }
    if latents_of is not None:
        side, channels = latents_of.model_config.latent_size, latents_of.model_config.latent_channels
        latent = lambda *lead: jax.ShapeDtypeStruct((*lead, side, side, channels), jnp.bfloat16)
        pictures = {
            f"{prefix}latent_{name}": latent(*lead)
            for prefix, lead in (("", (b, t)), ("reference_", (b,)))
            for name in ("mean", "logvar")
        }
    return pictures | {
        "coefficients": coefficients(b, t),
        "reference_coefficients": coefficients(b),
        "camera": Camera(floats(b, t, 4), floats(b, t, 4, 4)),
        "crop": floats(b, t, 4),
        "confidence": floats(b, t),
        "clip_index": ints(b),
        "frame_index": ints(b, t),
        "reference_index": ints(b),
    }
