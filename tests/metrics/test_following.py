"""Errors of single frames: absolute pose, gaze, expressions; and failures."""

import numpy as np
import pytest

from loki_jax.face.builtin import builtin_head
from loki_jax.face.types import Coefficients
from loki_jax.metrics.expressions import expression_errors
from loki_jax.metrics.failures import failure_share, mean_with_failures, success_rate
from loki_jax.metrics.gaze import gaze_error
from loki_jax.metrics.hpf import absolute_pose_error, head_pose_follow

HEAD = builtin_head()


def neutral(frames):
    fields = (HEAD.n_shape, HEAD.n_expression, 3, 3, 3, 3, 3)
    return Coefficients(*(np.zeros((frames, width), np.float32) for width in fields))


def about(axis, degrees):
    return np.radians(degrees)[:, None] * np.eye(3)[axis]


def test_absolute_pose_error_is_that_of_each_frame():
    rng = np.random.default_rng(0)
    rot, neck, turn = rng.normal(0, 0.3, (3, 6, 3))
    error = absolute_pose_error(rot, rot + 0, neck, neck)
    assert error.max() < 1e-5
    error = absolute_pose_error(about(1, np.arange(6.0)), np.zeros((8, 3)), valid=np.arange(8) != 2)
    np.testing.assert_allclose(error, [0, 1, np.nan, 3, 4, 5], atol=1e-9)
    extrinsics = np.eye(4)
    extrinsics[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    arguments = (rot, turn, neck, None, extrinsics, None)
    whole = head_pose_follow(*arguments[:4], pred_extrinsics=extrinsics)
    assert absolute_pose_error(*arguments).mean() == pytest.approx(whole.absolute_degrees)


def test_gaze_error_is_the_angle_between_the_lines_of_sight():
    one, other = neutral(4), neutral(5)
    one = one._replace(eyes=about(1, np.array([0, 10.0, 20, 0])), rot=one.rot + 1)
    one.eyes[3] = (0, 0, 2.0)  # about the line of sight
    valid = np.array([True, True, True, True])
    np.testing.assert_allclose(gaze_error(one, other, valid), [0, 10, 20, 0], atol=1e-6)
    assert np.isnan(gaze_error(one, other, ~valid)).all()


def test_expression_errors_have_names():
    one, other = neutral(3), neutral(3)
    axis = HEAD.expression_names.index("jawOpen")
    one.expression[:, axis] = 0, 0.25, 1
    errors = expression_errors(HEAD, one, other, np.array([True, True, False]))
    np.testing.assert_allclose(errors["jawOpen"], [0, 0.25, np.nan])
    assert sum(np.nansum(error) for error in errors.values()) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="prediction has expression"):
        expression_errors(HEAD, one._replace(expression=np.zeros((3, 2))), other)


def test_lost_frames_are_failures():
    errors = np.array([1.0, 4, np.nan, 2])
    assert failure_share(errors) == 0.25 and failure_share(errors, asked=5) == pytest.approx(0.4)
    assert success_rate(errors, 2.0) == 0.5 and success_rate(errors, 2.0, asked=8) == 0.25
    assert mean_with_failures(errors, 9.0) == 4 and mean_with_failures(errors, 9.0, asked=5) == 5
    assert failure_share(errors, asked=2) == 0
    with pytest.raises(ValueError, match="no frame was asked for"):
        failure_share(np.zeros(0))
