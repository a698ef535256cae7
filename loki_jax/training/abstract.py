"""Shapes of the train state and of a batch, for planning and ahead-of-time compilation; nothing is allocated."""

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


def abstract_state(config: ConfigDict, networks: Networks, optimizer: optax.GradientTransformation) -> TrainState:
    """The train state as ShapeDtypeStructs."""

    def build():
        params, frozen = split_params(config, random_params(networks, jax.random.key(0)))
        return create_state(params, frozen, optimizer, keep_ema=config.ema_decay > 0)

    return jax.eval_shape(build)


def abstract_batch(config: ConfigDict, head: HeadAsset) -> dict[str, Any]:
    """A global batch of images as ShapeDtypeStructs (see `data/pipeline.py`)."""
    b, t, s = config.batch_size, config.window, config.image_size
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)

    def coefficients(*lead: int) -> Coefficients:
        return Coefficients(floats(*lead, head.n_shape), floats(*lead, head.n_expression), *(floats(*lead, 3) for _ in range(5)))

    return {
        "frames": jax.ShapeDtypeStruct((b, t, s, s, 3), jnp.uint8),
        "reference": jax.ShapeDtypeStruct((b, s, s, 3), jnp.uint8),
        "coefficients": coefficients(b, t),
        "reference_coefficients": coefficients(b),
        "camera": Camera(floats(b, t, 4), floats(b, t, 4, 4)),
        "crop": floats(b, t, 4),
        "confidence": floats(b, t),
        "clip_index": ints(b),
        "frame_index": ints(b, t),
        "reference_index": ints(b),
    }
