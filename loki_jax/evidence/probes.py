"""Probes: can somebody be told from something? Trained on some clips of each person, tested on others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

_RIDGE = 1e-2
_WIDTHS = (24, 32, 48)
_BATCH = 64


def linear_probe(
    train: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
) -> Int[np.ndarray, " m"]:
    """Labels of the test rows, by ridge regression onto each label; features are standardised."""
    mean, deviation = train.mean(0), train.std(0)
    used = deviation > 1e-6
    scale = deviation[used] * np.sqrt(used.sum())
    one, other = ((x[:, used] - mean[used]) / scale for x in (train, test))
    wanted = np.eye(labels.max() + 1)[labels]
    weights = np.linalg.solve(one @ one.T + _RIDGE * np.eye(len(one)), wanted - wanted.mean(0))
    return np.argmax(other @ one.T @ weights, axis=1)


def train_convolutional(
    maps: Float[np.ndarray, "n s s c"], labels: Int[np.ndarray, " n"], steps: int = 300, seed: int = 0
) -> dict[str, Any]:
    """A small convolutional network: three layers of stride 2, the mean over the pixels, a linear layer."""
    people = int(labels.max()) + 1
    key = jax.random.key(seed)
    widths = (maps.shape[-1], *_WIDTHS)
    scale = maps.std((0, 1, 2)) + 1e-3
    params: dict[str, Any] = {"layers": []}
    for before, after in zip(widths, widths[1:], strict=False):
        key, own = jax.random.split(key)
        kernel = jax.random.normal(own, (3, 3, before, after)) * np.sqrt(2 / (9 * before))
        params["layers"].append((kernel, jnp.zeros(after)))
    params["last"] = (jnp.zeros((_WIDTHS[-1], people)), jnp.zeros(people))
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=1e-3)
    state = optimizer.init(params)

    def loss(params, batch, wanted):
        logits = _logits(params, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

    @jax.jit
    def step(params, state, batch, wanted):
        gradients = jax.grad(loss)(params, batch, wanted)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.integers(len(maps), size=_BATCH)
        params, state = step(params, state, maps[chosen] / scale, labels[chosen])
    return {"params": params, "scale": scale}


def classify(network: dict[str, Any], maps: Float[np.ndarray, "n s s c"]) -> Int[np.ndarray, " n"]:
    """Labels of maps."""
    logits = jax.jit(_logits)
    pieces = [maps[k : k + _BATCH] / network["scale"] for k in range(0, len(maps), _BATCH)]
    return np.concatenate([np.argmax(logits(network["params"], piece), axis=1) for piece in pieces])


def _logits(params: dict[str, Any], maps: Float[Array, "n s s c"]) -> Float[Array, "n people"]:
    x = jnp.asarray(maps, jnp.float32)
    for kernel, bias in params["layers"]:
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + bias)
    weights, bias = params["last"]
    return x.mean((1, 2)) @ weights + bias
