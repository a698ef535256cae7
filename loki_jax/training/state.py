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
    """AdamW (Loshchilov and Hutter 2019) with the options of `config.optimizer`.

    Gradients are clipped by their global norm first (Pascanu et al. 2013); decay is decoupled and
    scaled by the learning rate; configs/common.py says what each option means.

    Raises:
      ValueError: an unknown option.
    """
    c = config.optimizer
    if c.weight_decay_on not in ("all", "matrices"):
        raise ValueError(f"config.optimizer.weight_decay_on={c.weight_decay_on!r}: use all or matrices")
    mask = decay_mask if c.weight_decay_on == "matrices" else None
    adamw = optax.adamw(learning_rate(config), b1=c.b1, b2=c.b2, weight_decay=c.weight_decay, mask=mask)
    return optax.chain(optax.clip_by_global_norm(c.clip_norm), adamw) if c.clip_norm else adamw


def decay_mask(params):
    """True for matrices and convolution kernels, False for what has one axis: biases, scales of norms."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Step -> learning rate: linear warm-up, `hold_steps` at the peak, then `config.optimizer.decay`.

    Raises:
      ValueError: an unknown decay; "rsqrt" without `hold_steps`.
    """
    c = config.optimizer
    left = max(config.steps - c.warmup_steps - c.hold_steps, 1)
    if c.decay == "constant":
        decay = optax.constant_schedule(c.learning_rate)
    elif c.decay == "cosine":  # Loshchilov and Hutter 2017, equation 5 without restarts
        decay = optax.cosine_decay_schedule(c.learning_rate, left, alpha=c.final_share)
    elif c.decay == "linear":
        decay = optax.linear_schedule(c.learning_rate, c.final_share * c.learning_rate, left)
    elif c.decay == "rsqrt":  # EDM2 (Karras et al. 2024): 1 / sqrt(max(t / t_ref, 1)), t_ref = hold_steps
        if c.hold_steps <= 0:
            raise ValueError("config.optimizer.decay=rsqrt: set config.optimizer.hold_steps, where it begins")
        decay = lambda step: c.learning_rate / jnp.sqrt(step / c.hold_steps + 1)
    else:
        raise ValueError(f"config.optimizer.decay={c.decay!r}: use constant, cosine, linear or rsqrt")
    parts, ends = [], []
    if c.warmup_steps:
        parts, ends = [optax.linear_schedule(0.0, c.learning_rate, c.warmup_steps)], [c.warmup_steps]
    if c.hold_steps:
        parts.append(optax.constant_schedule(c.learning_rate))
        ends.append(c.warmup_steps + c.hold_steps)
    return optax.join_schedules([*parts, decay], ends) if parts else decay


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
