"""Intervals of means over seeds and pairs."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def bootstrap_interval(
    values: Float[np.ndarray, "seeds pairs"], rng: np.random.Generator, draws: int = 4000
) -> list[float]:
    """Mean and its 95 % bootstrap interval, [mean, low, high]: seeds are drawn, then pairs."""
    seeds, pairs = values.shape
    of_seed = rng.integers(seeds, size=(draws, seeds, 1))
    of_pair = rng.integers(pairs, size=(draws, 1, pairs))
    means = values[of_seed, of_pair].mean((1, 2))
    return [float(x) for x in (values.mean(), *np.quantile(means, (0.025, 0.975)))]
