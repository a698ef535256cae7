"""Cross-identity retargeting: a perfect result follows the driver exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from loki_jax.face.retarget import fold_neck, head_rotation, neck_joint, retarget, size_ratio
from loki_jax.face.skinning import make_identity, world_vertices
from loki_jax.face.types import Camera, Coefficients
from tests.face.golden_flame import head_of, read

FRAMES = 6
retarget = jax.jit(retarget, static_argnums=2)


def random_coefficients(seed, *batch):
    rng = np.random.default_rng(seed)
    draw = lambda n, scale: jnp.asarray(rng.normal(size=(*batch, n)) * scale, jnp.float32)
    return Coefficients(
        draw(5, 1), draw(4, 1), draw(3, 0.5), draw(3, 0.3), draw(3, 0.2), draw(3, 0.2), draw(3, 0.1)
    )


def head_pose_follow(prediction, target):
    """HPF of method, section 10, independent of the package: degrees, quaternion form."""

    def increments(c):
        rotation = Rotation.from_rotvec(np.asarray(c.rot, float)) * Rotation.from_rotvec(
            np.asarray(c.neck, float)
        )
        return (rotation * rotation[0].inv()).as_quat()

    dot = np.abs((increments(prediction) * increments(target)).sum(-1))
    return np.rad2deg(2 * np.arccos(np.minimum(dot, 1))).mean()


def test_relative_retargeting_has_no_head_pose_error():
    driver, reference = random_coefficients(0, FRAMES), random_coefficients(1)
    result = retarget(driver, reference, "relative")
    assert head_pose_follow(result, driver) < 2e-2  # arccos near 1 turns float32 into 1e-2 degrees
    d = lambda c: np.asarray(head_rotation(c) @ head_rotation(c)[0].T)
    np.testing.assert_allclose(d(result), d(driver), atol=3e-6)
    # Composed on the right instead, the error would be large: the test can fail.
    wrong = head_rotation(reference) @ jnp.swapaxes(head_rotation(driver)[:1], -1, -2) @ head_rotation(driver)
    assert np.abs(np.asarray(wrong @ wrong[0].T) - d(driver)).max() > 0.1


def test_relative_retargeting_starts_at_the_reference():
    driver, reference = random_coefficients(2, FRAMES), random_coefficients(3)
    result = retarget(driver, reference, "relative", scale=1.3)
    np.testing.assert_allclose(head_rotation(result)[0], head_rotation(reference), atol=2e-6)
    np.testing.assert_allclose(result.tra[0], reference.tra, atol=1e-6)
    np.testing.assert_allclose(result.tra, reference.tra + 1.3 * (driver.tra - driver.tra[0]), atol=1e-6)
    for field in ("expression", "jaw", "eyes", "neck"):
        np.testing.assert_array_equal(getattr(result, field), getattr(driver, field))
    np.testing.assert_array_equal(result.betas, np.tile(reference.betas, (FRAMES, 1)))


def test_absolute_retargeting_keeps_the_drivers_pose():
    driver, reference = random_coefficients(4, FRAMES), random_coefficients(5)
    result = retarget(driver, reference, "absolute")
    for field in ("expression", "rot", "tra", "neck", "jaw", "eyes"):
        np.testing.assert_array_equal(getattr(result, field), getattr(driver, field))
    np.testing.assert_array_equal(result.betas, np.tile(reference.betas, (FRAMES, 1)))


def test_windows_and_batches():
    driver, reference = random_coefficients(6, 2, FRAMES), random_coefficients(7, 2)
    whole = retarget(driver, reference, "relative", scale=jnp.array([0.9, 1.1]))
    for b in range(2):
        take = lambda c, index: Coefficients(*(field[index] for field in c))
        single = retarget(take(driver, b), take(reference, b), "relative", scale=(0.9, 1.1)[b])
        later = retarget(
            take(driver, (b, slice(3, None))),
            take(reference, b),
            "relative",
            scale=(0.9, 1.1)[b],
            origin=take(driver, (b, 0)),
        )
        for field in ("rot", "tra"):
            np.testing.assert_allclose(getattr(single, field), getattr(whole, field)[b], atol=3e-6)
            np.testing.assert_allclose(getattr(later, field), getattr(whole, field)[b, 3:], atol=3e-6)


def test_increments_pass_from_camera_to_camera():
    driver, reference = random_coefficients(8, FRAMES), random_coefficients(9)
    matrices = Rotation.random(2, random_state=0).as_matrix()
    cameras = []
    for matrix in matrices:
        extrinsics = np.eye(4, dtype=np.float32)
        extrinsics[:3, :3] = matrix
        cameras.append(Camera(jnp.ones(4), jnp.asarray(extrinsics)))
    result = retarget(driver, reference, "relative", driver_camera=cameras[0], reference_camera=cameras[1])
    flip = np.diag([1.0, -1.0, -1.0])

    def seen(coefficients, matrix):
        rotation = matrix @ flip @ np.asarray(head_rotation(coefficients), np.float64)
        moved = np.asarray(coefficients.tra - coefficients.tra[0], np.float64) @ (matrix @ flip).T
        return rotation @ rotation[0].T, moved

    for found, expected in zip(seen(result, matrices[1]), seen(driver, matrices[0]), strict=True):
        np.testing.assert_allclose(found, expected, atol=5e-6)


def test_a_folded_neck_moves_the_head_as_before(golden):
    head = head_of(read(golden, "flame_model"))
    # A head that follows the neck wholly.
    weights = np.tile(np.float32([0, 1, 0, 0, 0]), (len(head.template), 1))
    head = dataclasses.replace(
        head, skinning_weights=weights, pose_correctives=np.zeros((0, 502, 3), np.float32)
    )
    driver, reference = random_coefficients(12, FRAMES), random_coefficients(13)
    driver = driver._replace(expression=jnp.zeros((FRAMES, 65)))
    betas = jnp.asarray(np.random.default_rng(0).normal(size=150), jnp.float32)
    moved = retarget(driver, reference._replace(betas=betas), "relative")
    folded = fold_neck(moved, neck_joint(head, betas))
    identity = make_identity(head, betas)
    assert not np.asarray(folded.neck).any() and np.asarray(moved.neck).any()
    assert head_pose_follow(folded, driver) < 2e-2
    assert head_pose_follow(folded._replace(rot=moved.rot), driver) > 3  # the neck's bend simply left out
    before, after = (world_vertices(head, identity, c)[:, :502] for c in (moved, folded))
    np.testing.assert_allclose(after, before, atol=3e-6)


def test_size_ratio(golden):
    head = head_of(read(golden, "flame_model"))
    small, large = jnp.zeros(150), jnp.zeros(150)
    assert float(size_ratio(head, large, small)) == pytest.approx(1)
    # A head whose first axis scales it by a tenth about its mean.
    basis = np.array(head.shape_basis)
    basis[0] = 0.1 * (head.template - head.template.mean(0))
    scaled = dataclasses.replace(head, shape_basis=basis)
    assert float(size_ratio(scaled, large.at[0].set(1.0), small)) == pytest.approx(1.1, rel=1e-5)


def test_refusals():
    driver, reference = random_coefficients(10, FRAMES), random_coefficients(11)
    with pytest.raises(ValueError, match="unknown mode 'sideways'"):
        retarget(driver, reference, "sideways")
    with pytest.raises(ValueError, match="both cameras or none"):
        retarget(driver, reference, "relative", driver_camera=Camera(jnp.ones(4), jnp.eye(4)))
