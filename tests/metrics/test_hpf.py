"""Head-pose follow: parity with the public metric, and what it is meant to (not) see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from loki_jax.face.retarget import retarget
from loki_jax.face.types import Camera, Coefficients
from loki_jax.metrics.hpf import head_pose_follow


def turning(n, degrees, axis):
    return np.linspace(0, np.radians(degrees), n)[:, None] * np.asarray(axis, float)


@pytest.mark.parametrize("case", range(6))
def test_golden(golden, case):
    data = np.load(golden / "metrics.npz")

    def get(name):
        return data[f"{case}/{name}"] if f"{case}/{name}" in data else None

    result = head_pose_follow(
        get("pred_rot"),
        get("target_rot"),
        get("pred_neck_rot"),
        get("target_neck_rot"),
        n_frames=int(get("n_frames_arg")),
    )
    assert result.n_frames == get("n_frames")
    assert result.track_rate == pytest.approx(float(get("track_rate")))
    if np.isnan(get("dist_deg")):
        assert result.degrees is None and result.absolute_degrees is None
    else:
        assert result.degrees == pytest.approx(float(get("dist_deg")), abs=1e-3)


def test_frame_zero_counts():
    target = turning(5, 40, [0, 1, 0])
    result = head_pose_follow(np.zeros((5, 3)), target)
    assert result.per_frame == pytest.approx([0, 10, 20, 30, 40])
    assert result.degrees == pytest.approx(20)


def test_constant_offset_shows_only_in_the_absolute_error():
    target = turning(8, 30, [0, 1, 0])
    offset = Rotation.from_rotvec([0.0, 0.0, np.radians(12)])
    # An offset in the head's own frame, applied before the turn, cancels in R_t R_0^T.
    shifted = (Rotation.from_rotvec(target) * offset).as_rotvec()
    result = head_pose_follow(shifted, target)
    assert result.degrees == pytest.approx(0, abs=1e-6)
    assert result.absolute_degrees == pytest.approx(12)


def test_a_perfect_transfer_has_no_error_whatever_the_extrinsics():
    rng = np.random.default_rng(3)
    driver = Coefficients(*(jnp.asarray(0.4 * rng.normal(size=(9, 3)), jnp.float32) for _ in range(7)))
    reference = jax.tree.map(lambda x: x[5] + 0.2, driver)
    extrinsics = np.tile(np.eye(4), (2, 1, 1))
    extrinsics[:, :3, :3] = Rotation.random(2, random_state=1).as_matrix()
    cameras = [Camera(jnp.ones(4), jnp.asarray(matrix, jnp.float32)) for matrix in extrinsics]
    moved = retarget(driver, reference, driver_camera=cameras[0], reference_camera=cameras[1])
    moved, driver = jax.tree.map(np.asarray, (moved, driver))
    world = head_pose_follow(moved.rot, driver.rot, moved.neck, driver.neck)
    cameras = {"pred_extrinsics": extrinsics[1], "target_extrinsics": np.tile(extrinsics[0], (9, 1, 1))}
    result = head_pose_follow(moved.rot, driver.rot, moved.neck, driver.neck, **cameras)
    assert world.degrees > 10
    assert result.degrees < 1e-3 and result.aligned_degrees < 1e-3
    # One camera turned with its world changes nothing.
    same = head_pose_follow(
        driver.rot, driver.rot, pred_extrinsics=extrinsics[0], target_extrinsics=extrinsics[0]
    )
    assert same.absolute_degrees < 1e-6


def test_neck_and_root_share_the_rotation():
    target = turning(6, 25, [0, 1, 0])
    assert head_pose_follow(np.zeros((6, 3)), target, pred_neck=target).degrees == pytest.approx(0, abs=1e-6)
    assert head_pose_follow(np.zeros((6, 3)), target).degrees == pytest.approx(12.5)


def test_untracked_frames_lower_the_track_rate_only():
    target = turning(10, 45, [1, 0, 0])
    prediction = target.copy()
    prediction[3] = [2.0, 0, 0]
    valid = np.arange(10) != 3
    result = head_pose_follow(prediction, target, pred_valid=valid)
    assert result.degrees == pytest.approx(0, abs=1e-6)
    assert result.track_rate == pytest.approx(0.9)
    assert np.isnan(result.per_frame[3])
    nothing = head_pose_follow(prediction, target, pred_valid=np.arange(10) == 3)
    assert nothing.degrees is None and nothing.track_rate == 0


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="target_rot has shape"):
        head_pose_follow(np.zeros((4, 3)), np.zeros((4, 3, 3)))
    with pytest.raises(ValueError, match="neck or validity 3"):
        head_pose_follow(np.zeros((4, 3)), np.zeros((4, 3)), pred_neck=np.zeros((3, 3)))


def test_alignment_does_not_see_the_noise_of_frame_zero():
    """One frame that is 3 degrees off: HPF pays it in every frame, the aligned variant about once."""
    target = turning(30, 40, [0, 1, 0])
    wrong = Rotation.from_rotvec(np.radians([3.0, 0.0, 0.0]))
    prediction = target.copy()
    prediction[0] = (Rotation.from_rotvec(target[0]) * wrong).as_rotvec()
    result = head_pose_follow(prediction, target)
    assert result.degrees == pytest.approx(3 * 29 / 30, abs=0.01)
    assert result.aligned_degrees == pytest.approx(2 * 3 * 29 / 30**2, abs=0.01)


def test_alignment_sees_no_constant_offset():
    target = turning(8, 30, [0, 1, 0])
    shifted = (Rotation.from_rotvec(target) * Rotation.from_rotvec([0.1, -0.2, 0.2])).as_rotvec()
    assert head_pose_follow(shifted, target).aligned_degrees == pytest.approx(0, abs=1e-6)
