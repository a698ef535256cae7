"""Motion over time: neutral frame, smoothing with its lag, cuts and lost faces without jumps."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from loki_jax.face.builtin import builtin_head
from loki_jax.face.temporal import bridge_interruptions, neutral_frame, smooth_motion
from loki_jax.face.types import Camera, Coefficients

N, FPS = 60, 25.0
NONE = np.zeros(0, np.int64)
CAMERA = Camera(np.array([800, 800, 256, 256], np.float32), np.eye(4, dtype=np.float32))


@pytest.fixture(scope="module")
def head():
    return builtin_head()


def swing(head, n=N):
    """A head that swings from 30 degrees of yaw to -30 with some expression that fades in the middle."""
    t = np.linspace(-1, 1, n)
    zero = np.zeros((n, 3))
    rot = np.radians(30) * t[:, None] * np.array([0, 1.0, 0])
    expression = np.abs(t)[:, None] * np.ones(head.n_expression) * 0.3
    tra = np.array([0, 0, -0.7]) + 0.01 * t[:, None] * np.array([1.0, 0, 0])
    return Coefficients(np.zeros((n, head.n_shape)), expression, rot, tra, zero, zero, zero)


def test_the_neutral_frame_is_frontal_and_relaxed(head):
    clip = swing(head)
    assert abs(neutral_frame(head, clip, CAMERA) - N / 2) <= 2
    # One bad fit that looks perfect does not attract it, and frames without the face do not count.
    outlier = Coefficients(*(np.array(field) for field in clip))
    outlier.rot[3], outlier.expression[3] = 0, 0
    assert abs(neutral_frame(head, outlier, CAMERA) - N / 2) <= 2
    valid = np.ones(N, bool)
    valid[20:40] = False
    assert neutral_frame(head, clip, CAMERA, valid) in range(17, 20) or neutral_frame(
        head, clip, CAMERA, valid
    ) in range(40, 43)
    # Frontal means as the camera sees it.
    turn = np.eye(4, dtype=np.float32)
    turn[:3, :3] = Rotation.from_euler("Y", 15, degrees=True).as_matrix()
    seen = neutral_frame(
        head, clip._replace(expression=0 * clip.expression), CAMERA._replace(extrinsics=turn)
    )
    angle = np.degrees(clip.rot[seen, 1])
    assert abs(abs(angle) - 15) < 3


def test_without_interruptions_nothing_changes(head):
    clip = swing(head)
    assert bridge_interruptions(clip, np.ones(N, bool), NONE, FPS, 0.4) is clip
    valid = np.ones(N, bool)
    valid[[0, 1, 10, 11, 12]] = False  # short gaps stay interpolated
    assert bridge_interruptions(clip, valid, NONE, FPS, 0.4) is clip


def step(field):
    return np.abs(np.diff(np.asarray(field, float), axis=0)).max()


def test_a_cut_is_eased(head):
    clip = swing(head)
    jumped = clip._replace(
        rot=np.where(np.arange(N)[:, None] < 30, clip.rot, clip.rot + 0.5),
        expression=np.where(np.arange(N)[:, None] < 30, clip.expression, 0.9),
    )
    smooth = bridge_interruptions(jumped, np.ones(N, bool), np.array([30]), FPS, 0.4)
    np.testing.assert_array_equal(smooth.expression[:30], jumped.expression[:30])
    np.testing.assert_allclose(smooth.expression[30], jumped.expression[29], atol=1e-9)  # no jump
    np.testing.assert_allclose(smooth.rot[30], jumped.rot[29], atol=1e-9)
    np.testing.assert_array_equal(smooth.rot[40:], jumped.rot[40:])  # 0.4 s later the driver's again
    assert step(smooth.expression) < 0.2 * step(jumped.expression)
    assert step(smooth.rot) < 0.3 * step(jumped.rot)


def test_a_lost_face_is_held_and_eased_back(head):
    clip = swing(head)
    valid = np.ones(N, bool)
    valid[20:35] = False
    held = bridge_interruptions(clip, valid, np.array([28]), FPS, 0.4)
    for name in ("expression", "rot", "tra"):
        field, live = getattr(held, name), np.asarray(getattr(clip, name))
        np.testing.assert_array_equal(field[20:35], np.tile(live[19], (15, 1)))
        np.testing.assert_allclose(field[35], live[19], atol=1e-9)
        np.testing.assert_array_equal(field[45:], live[45:])
        assert step(field) < 5 * step(live)
    # Until the end, the last pose is kept.
    valid[35:] = False
    ended = bridge_interruptions(clip, valid, NONE, FPS, 0.4)
    np.testing.assert_array_equal(ended.rot[20:], np.tile(clip.rot[19], (N - 20, 1)))
    # At the beginning there is nothing to hold.
    start = np.ones(N, bool)
    start[:15] = False
    assert bridge_interruptions(clip, start, NONE, FPS, 0.4) is clip


@pytest.mark.parametrize("lag", [0.04, 0.12])
@pytest.mark.parametrize("name, rise", [("jaw", 5.0), ("rot", 3.0)])
def test_slow_motion_lags_as_stated_and_fast_motion_less(head, lag, name, rise):
    t = np.arange(200) / FPS

    def lags(speed):
        """Seconds by which a motion of this speed is late at its end."""
        moving = np.outer(speed * t, [1.0, 0, 0])
        smooth = smooth_motion(swing(head, 200)._replace(**{name: moving}), FPS, lag)
        return t[-20:] - getattr(smooth, name)[-20:, 0] / speed

    np.testing.assert_allclose(lags(1e-3), lag, rtol=0.03)
    np.testing.assert_allclose(lags(0.3), 1 / (1 / lag + 2 * np.pi * rise * 0.3), rtol=0.01)


def test_smoothing_takes_noise_and_leaves_the_pose(head):
    rng = np.random.default_rng(0)
    still = swing(head)._replace(rot=np.zeros((N, 3)), expression=np.full((N, head.n_expression), 0.3))
    noisy = still._replace(
        rot=still.rot + 0.01 * rng.normal(size=(N, 3)),
        expression=still.expression + 0.02 * rng.normal(size=(N, head.n_expression)),
    )
    smooth = smooth_motion(noisy, FPS, 0.1)
    # The first frame is the filter's start.
    for name in ("rot", "expression"):
        flicker = lambda c, name=name: np.diff(np.asarray(getattr(c, name)), axis=0).std()
        assert flicker(smooth) < 0.4 * flicker(noisy)
    assert np.abs(smooth.rot).max() < 0.03
