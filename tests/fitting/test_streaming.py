"""The fit of frames as they come, on a head whose coefficients are known."""

import jax
import numpy as np
import pytest

from loki_jax.face.builtin import builtin_head
from loki_jax.fitting.problem import FitSettings
from loki_jax.fitting.streaming import FrameFitter
from tests.fitting.known_face import HEIGHT, WIDTH, N, true_coefficients, true_points

SURE = np.ones(478, np.float32)


@pytest.fixture(scope="module")
def truth():
    head = builtin_head()
    true = true_coefficients(head)
    return head, true, true_points(head, true)


@pytest.fixture(scope="module")
def fitter(truth):
    head, _, points = truth
    return FrameFitter(head, points, np.ones((N, 478), np.float32), (HEIGHT, WIDTH))


def degrees_off(found, true, index):
    return np.degrees(np.linalg.norm(found.rot - true.rot[index]))


def follow(fitter, points, indices, before):
    """Coefficients of frames, one after another."""
    found, last = [], None
    for index in indices:
        interval = 0.04 * (1 if last is None else index - last)
        before, last = fitter.fit(points[index], SURE, interval, before), index
        found.append(fitter.coefficients(before))
    return found


def test_frames_one_by_one_are_fitted_as_the_clip_is(truth, fitter):
    _, true, points = truth
    # From far away, then as they come.
    first = fitter.fit(points[0], SURE, 10.0, fitter.start)
    assert degrees_off(fitter.coefficients(first), true, 0) < 1
    for index, found in zip(range(1, N), follow(fitter, points, range(1, N), first), strict=True):
        clip = jax.tree.map(lambda x, i=index: x[i], fitter.first)
        assert degrees_off(found, true, index) < 1.5
        np.testing.assert_allclose(found.rot, clip.rot, atol=np.radians(1))
        np.testing.assert_allclose(found.jaw, clip.jaw, atol=0.03)
        np.testing.assert_allclose(found.tra, clip.tra, atol=0.02)
        np.testing.assert_array_equal(found.betas, clip.betas)


def test_dropped_frames_cost_little(truth, fitter):
    _, true, points = truth
    first = fitter.fit(points[0], SURE, 10.0, fitter.start)
    indices = range(3, N, 3)
    for index, found in zip(indices, follow(fitter, points, indices, first), strict=True):
        assert degrees_off(found, true, index) < 2


def test_smoothness_holds_a_head_that_stands_still(truth):
    """Noisy landmarks: the smoother the motion is said to be, the less the fit trembles."""
    head, _, points = truth
    rng = np.random.default_rng(0)
    noisy = points[:1] + rng.normal(0, 0.3, (40, 478, 3)).astype(np.float32)
    trembling, poses = [], []
    for smooth in (0.06, 0.002):
        settings = FitSettings(smooth_rot=smooth)
        fitter = FrameFitter(head, points, np.ones((N, 478), np.float32), (HEIGHT, WIDTH), settings=settings)
        before, turns = fitter.fit(points[0], SURE, 10.0, fitter.start), []
        for each in noisy:
            before = fitter.fit(each, SURE, 0.04, before)
            turns.append(fitter.coefficients(before).rot)
        trembling.append(np.std(np.diff(turns, axis=0)))
        poses.append(np.mean(turns, axis=0))
    assert trembling[1] < 0.6 * trembling[0]
    np.testing.assert_allclose(poses[1], poses[0], atol=np.radians(0.5))
