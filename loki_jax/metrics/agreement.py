"""Agreement of two ways of measuring the same samples (docs/metrics.md)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float


class Agreement(NamedTuple):
    """How two measurements of the same samples agree.

    Attributes:
      samples: how many have both values.
      pearson, spearman: correlations of the values, and of their ranks.
      bias: mean of the second minus the first.
      limits: bias -+ 1.96 standard deviations of the differences (Bland and Altman 1986). Like the bias, they
        mean nothing where the units differ.
    """

    samples: int
    pearson: float
    spearman: float
    bias: float
    limits: tuple[float, float]


def measure_agreement(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]) -> Agreement:
    """Correlations, bias and limits of agreement; samples with NaN on either side are left out.

    Raises:
      ValueError: fewer than three samples with both values.
    """
    both = np.isfinite(first) & np.isfinite(second)
    if both.sum() < 3:
        raise ValueError(f"agreement needs three or more samples with both values, found {both.sum()}")
    one, other = np.asarray(first, np.float64)[both], np.asarray(second, np.float64)[both]
    difference = other - one
    bias, spread = float(difference.mean()), 1.96 * float(difference.std(ddof=1))
    return Agreement(
        samples=int(both.sum()),
        pearson=float(scipy.stats.pearsonr(one, other).statistic),
        spearman=float(scipy.stats.spearmanr(one, other).statistic),
        bias=bias,
        limits=(bias - spread, bias + spread),
    )
