"""Synthetic clips with known coefficients: the limits that benchmarks/fit_accuracy.py prints."""

import pytest

from loki_jax.face.builtin import builtin_head
from tests.fitting.accuracy import LIMITS, measure


def check(result):
    missed = {name: result[name] for name, limit in LIMITS.items() if not result[name] < limit}
    assert not missed
    # Systematic errors towards or away from the camera, in any of the bins of 15 degrees to 45.
    assert len(result["yaw_bias"]) == 6 and result["worst_yaw_bias"] < 0.25, result["yaw_bias"]
    assert 0.02 < result["hef_neutral"] < 0.2  # the faces do move


def test_a_few_people():
    check(measure(builtin_head(), identities=5, frames=32, size=128, hef_frames=3))


@pytest.mark.slow
@pytest.mark.parametrize("guess_camera", [False, True])
def test_twenty_people(guess_camera):
    check(measure(builtin_head(), identities=20, frames=50, guess_camera=guess_camera))
