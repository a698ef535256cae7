"""The train state and the optimiser."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int
from ml_collections import ConfigDict


class TrainState(NamedTuple):
    """Everything a step changes, and the frozen parameters it reads.

    `params`, `ema` and `frozen` are dicts by network: "generation", "reference", "autoencoder";
    `ema` is None when the config keeps none; `frozen` is never in the optimiser.
    """

    step: Int[Array, ""]
    params: Any
    ema: Any
    opt_state: Any
    frozen: Any


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW with optional warm-up, cosine decay and global-norm clipping."""
    c = config.optimizer
    if c.decay not in ("constant", "cosine"):
        raise ValueError(f"config.optimizer.decay={c.decay!r}: use constant or cosine")
    steps = max(config.steps - c.warmup_steps, 1)
    after = (
        optax.cosine_decay_schedule(c.learning_rate, steps)
        if c.decay == "cosine"
        else optax.constant_schedule(c.learning_rate)
    )
    rate = optax.join_schedules(
        [optax.linear_schedule(0.0, c.learning_rate, max(c.warmup_steps, 1)), after], [c.warmup_steps]
    )
    adamw = optax.adamw(rate, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay)
    return optax.chain(optax.clip_by_global_norm(c.clip_norm), adamw) if c.clip_norm else adamw


def create_state(params, frozen, optimizer: optax.GradientTransformation, keep_ema: bool) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy: the step donates the state, and a buffer can be donated once only.
        ema=jax.tree.map(jnp.copy, params) if keep_ema else None,
        opt_state=optimizer.init(params),
        frozen=frozen,
    )


def update_ema(ema, params, step: Int[Array, ""], decay: float):
    """Exponential moving average whose decay grows as (1 + step) / (10 + step) up to `decay`."""
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1 - rate) * (p - e), ema, params)
