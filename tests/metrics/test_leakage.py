"""How much of a driver's looks an animation shows."""

import numpy as np
import pytest

from loki_jax.metrics.leakage import leakage


def test_leakage_is_the_share_of_the_other_picture():
    rng = np.random.default_rng(0)
    truth, other = (rng.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8) for _ in range(2))
    for share in (0.0, 0.25, 1.0):
        mixed = np.rint(truth + share * (other.astype(float) - truth)).astype(np.uint8)
        assert abs(leakage(mixed, truth, other) - share) < 0.01
    # Errors that have nothing to do with the driver do not count.
    noisy = np.clip(truth.astype(float) + rng.normal(0, 10, truth.shape), 0, 255).astype(np.uint8)
    assert abs(leakage(noisy, truth, other)) < 0.05
    with pytest.raises(ValueError, match="are equal"):
        leakage(truth, truth, truth)
