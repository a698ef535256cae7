"""Agreement of two measurements: known bias, limits and ranks."""

import numpy as np
import pytest

from loki_jax.metrics.agreement import measure_agreement


def test_bias_limits_and_correlations():
    rng = np.random.default_rng(0)
    first = rng.uniform(0, 10, 2000)
    found = measure_agreement(first, first + 0.5 + rng.normal(0, 0.2, 2000))
    assert found.bias == pytest.approx(0.5, abs=0.02)
    assert found.limits == pytest.approx((0.5 - 0.392, 0.5 + 0.392), abs=0.03)
    assert found.pearson > 0.99 and found.samples == 2000
    curved = measure_agreement(first, np.exp(first))
    assert curved.spearman == pytest.approx(1) and curved.pearson < 0.9


def test_missing_values_are_left_out():
    first = np.array([0.0, 1, 2, 3, np.nan])
    assert measure_agreement(first, first + np.array([0, 0, 0, np.nan, 0])).samples == 3
    with pytest.raises(ValueError, match="found 2"):
        measure_agreement(first[:2], first[:2])
