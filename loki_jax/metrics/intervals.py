"""Means with intervals, and tests of differences between systems (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float

DRAWS = 4000
_QUANTILES = (0.025, 0.975)


def bootstrap_interval(
    values: Float[np.ndarray, "seeds pairs"], rng: np.random.Generator, draws: int = DRAWS
) -> list[float]:
    """Mean and its 95 % bootstrap interval, [mean, low, high]: seeds are drawn, then pairs."""
    seeds, pairs = values.shape
    of_seed = rng.integers(seeds, size=(draws, seeds, 1))
    of_pair = rng.integers(pairs, size=(draws, 1, pairs))
    means = values[of_seed, of_pair].mean((1, 2))
    return [float(x) for x in (values.mean(), *np.quantile(means, _QUANTILES))]


def weighted_interval(
    values: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"] | None = None,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> list[float]:
    """Weighted mean of samples and its 95 % bootstrap interval, [mean, low, high].

    Args:
      weights: of the samples, such as the share of frames tracked; None: equal.
      seed: of the draws; the interval is a function of the arguments alone.
      groups: of each sample, such as its driver. Samples of a group are alike, so whole groups are drawn,
        which gives wider intervals; None: each sample is a group.

    Raises:
      ValueError: no sample, a value that is not finite, or weights that are negative or sum to 0.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    if not len(values) or not np.isfinite(values).all() or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError("a weighted mean needs finite values, and weights of at least 0 with a positive sum")
    names = range(len(values)) if groups is None else groups
    member = np.unique(np.asarray(names), return_inverse=True)[1]
    total, weight = np.bincount(member, values * weights), np.bincount(member, weights)
    drawn = np.random.default_rng(seed).integers(len(total), size=(DRAWS, len(total)))
    sums, weights_drawn = total[drawn].sum(1), weight[drawn].sum(1)
    means = sums[weights_drawn > 0] / weights_drawn[weights_drawn > 0]
    return [float(x) for x in (total.sum() / weight.sum(), *np.quantile(means, _QUANTILES))]


def paired_difference(
    values: Mapping[str, float], other: Mapping[str, float], seed: int = 0
) -> dict[str, Any] | None:
    """How much a system's `values` are above another's on the samples that both have.

    Returns:
      {"difference": [mean, low, high] with a 95 % bootstrap interval over samples, "samples", "p": of
      Wilcoxon's signed-rank test, two-sided}; None with fewer than two common samples.
    """
    names = sorted(values.keys() & other.keys())
    if len(names) < 2:
        return None
    difference = np.array([values[name] - other[name] for name in names])
    p = 1.0 if not difference.any() else float(scipy.stats.wilcoxon(difference).pvalue)
    return {"difference": weighted_interval(difference, seed=seed), "samples": len(names), "p": p}
