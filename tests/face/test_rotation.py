"""Rotation vectors, matrices and angles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from loki_jax.face.rotation import geodesic_angle, matrix_from_rotvec, rotvec_from_matrix

# One compilation each instead of one per operation.
geodesic_angle, matrix_from_rotvec, rotvec_from_matrix = map(
    jax.jit, (geodesic_angle, matrix_from_rotvec, rotvec_from_matrix)
)


def random_rotvecs(n, seed=0):
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=(n, 3))
    angle = np.concatenate([10.0 ** rng.uniform(-9, -1, n // 2), rng.uniform(0, np.pi - 1e-3, n - n // 2)])
    return (axis / np.linalg.norm(axis, axis=1, keepdims=True) * angle[:, None]).astype(np.float32)


def test_matrices_match_scipy_and_golden(golden):
    rotvecs = random_rotvecs(200)
    expected = Rotation.from_rotvec(rotvecs.astype(np.float64)).as_matrix()
    np.testing.assert_allclose(matrix_from_rotvec(jnp.asarray(rotvecs)), expected, atol=5e-7)
    with np.load(golden / "projection_crop.npz") as file:
        given, expected = file["rodrigues/in"], file["rodrigues/out"]
    np.testing.assert_allclose(matrix_from_rotvec(jnp.asarray(given)), expected, atol=1e-6)


def test_rotvec_of_matrix_inverts():
    rotvecs = random_rotvecs(200)
    matrices = Rotation.from_rotvec(rotvecs.astype(np.float64)).as_matrix().astype(np.float32)
    back = np.asarray(rotvec_from_matrix(jnp.asarray(matrices)))
    # A float32 matrix holds an angle to about its epsilon, whatever the angle.
    np.testing.assert_allclose(back, rotvecs, atol=2e-6)


@pytest.mark.parametrize("axis", np.eye(3))
def test_half_turns(axis):
    matrix = Rotation.from_rotvec(np.pi * axis).as_matrix().astype(np.float32)
    np.testing.assert_allclose(np.abs(rotvec_from_matrix(jnp.asarray(matrix))), np.pi * axis, atol=1e-5)


def test_derivatives_at_and_near_zero():
    generators = np.zeros((3, 3, 3))
    generators[0, 2, 1] = generators[1, 0, 2] = generators[2, 1, 0] = 1
    generators -= generators.transpose(0, 2, 1)
    jacobian = jax.jit(jax.jacobian(matrix_from_rotvec))(jnp.zeros(3))
    np.testing.assert_array_equal(jnp.moveaxis(jacobian, -1, 0), generators)
    there_and_back = jax.jit(jax.jacobian(lambda v: rotvec_from_matrix(matrix_from_rotvec(v))))
    for scale in (0.0, 1e-5, 0.005, 0.0101, 0.3, 2.0):
        at = scale * jnp.array([0.6, -0.48, 0.64])
        np.testing.assert_allclose(there_and_back(at), np.eye(3), atol=2e-5)


def test_geodesic_angle():
    a, b = random_rotvecs(100, 1), random_rotvecs(100, 2)
    expected = (Rotation.from_rotvec(a).inv() * Rotation.from_rotvec(b)).magnitude()
    found = geodesic_angle(matrix_from_rotvec(jnp.asarray(a)), matrix_from_rotvec(jnp.asarray(b)))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    same = matrix_from_rotvec(jnp.asarray(a))
    assert float(jnp.max(geodesic_angle(same, same))) < 5e-7
    gradient = jax.jit(jax.grad(lambda v: geodesic_angle(matrix_from_rotvec(v), jnp.eye(3))))(jnp.zeros(3))
    np.testing.assert_array_equal(gradient, np.zeros(3))
