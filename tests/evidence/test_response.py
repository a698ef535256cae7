"""The response of the metrics on exact coefficients, and the injections themselves."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from loki_jax.evidence.response import exact_response, make_person, muted, ramp, rotate, shaken, slope, turned
from loki_jax.face.builtin import builtin_head


@pytest.fixture(scope="module")
def person():
    return make_person(builtin_head(), 1, 6)


def test_injections_are_what_they_say(person):
    own = Rotation.from_rotvec(person.coefficients.rot)
    other = Rotation.from_rotvec(turned(person.coefficients, 5.0, np.random.default_rng(0)).rot)
    angles = np.degrees((other * own.inv()).magnitude())
    assert angles == pytest.approx(5 * ramp(6), abs=1e-4) and angles[-1] == pytest.approx(5, abs=1e-4)
    many = person.coefficients._replace(rot=np.zeros((4000, 3), np.float32))
    noise = np.degrees(Rotation.from_rotvec(shaken(many, 2.0, np.random.default_rng(0)).rot).magnitude())
    assert np.sqrt(np.mean(noise**2)) == pytest.approx(2, rel=0.03)
    quiet = muted(person.coefficients, 0.25)
    np.testing.assert_allclose(quiet.jaw, 0.75 * person.coefficients.jaw, rtol=1e-6)
    assert (muted(person.coefficients, 1.0).expression == 0).all()


def test_a_picture_turns_about_its_middle():
    picture = np.random.default_rng(0).integers(256, size=(40, 40, 3), dtype=np.uint8)
    np.testing.assert_array_equal(rotate(picture, 90.0), np.rot90(picture))
    assert slope([0.0, 1.0, 2.0], [0.0, 2.0, 4.0]) == pytest.approx(2)


def test_exact_response(monkeypatch):
    """Slope one, noise of the first frame in HPF, HEF rising from zero."""
    monkeypatch.setattr("loki_jax.evidence.response.HEF_SIZE", 32)
    monkeypatch.setattr("loki_jax.evidence.response.SIZES", (64, 32))
    found = exact_response(people=2, frames=8)
    assert found["pose_slope"] == pytest.approx(1, abs=1e-3)
    assert found["pose"][0]["hpf"] < 1e-4
    expression = [row["mean"] for row in found["expression"]]
    assert expression[0] == 0 and all(np.diff(expression) > 0)
    last = found["noise"][-1]
    assert last["hpf"] > last["hpf_aligned"] > 0.5 * last["injected"]
