"""Jitter and flicker: known answers for noise, smooth motion, gaps and textures."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from loki_jax.metrics.temporal import (
    flicker,
    jitter,
    landmark_jitter,
    root_mean_square,
    rotation_jitter,
    warped_differences,
)


def test_jitter_is_the_length_of_independent_noise():
    noise = np.random.default_rng(0).normal(0, 0.3, (4000, 2))
    time = np.arange(4000.0)[:, None]
    smooth = 5 + 2 * time - 0.01 * time**2  # constant acceleration does not count
    per_frame = jitter(smooth + noise)
    assert per_frame.shape == (4000,) and np.isnan(per_frame[:3]).all()
    assert root_mean_square(per_frame) == pytest.approx(0.3 * np.sqrt(2), rel=0.05)
    assert root_mean_square(jitter(smooth)) < 1e-6


def test_jitter_of_one_displaced_frame_is_that_of_the_formula():
    track = np.zeros((9, 1))
    track[4] = 2
    np.testing.assert_allclose(jitter(track)[3:], 2 * np.array([0, 1, 3, 3, 1, 0]) / np.sqrt(20))


def test_gaps_leave_out_the_windows_that_they_touch():
    valid = np.ones(10, bool)
    valid[4] = False
    assert np.flatnonzero(np.isfinite(jitter(np.ones((10, 3)), valid))).tolist() == [3, 8, 9]
    assert np.isnan(jitter(np.ones((3, 3)))).all() and root_mean_square(np.full(3, np.nan)) is None
    assert np.isnan(rotation_jitter(np.zeros((2, 3)))).all()
    assert np.isnan(landmark_jitter(np.zeros((5, 478, 3)), np.zeros(5, bool))).all()


def test_rotation_jitter_is_in_degrees_and_blind_to_steady_turns():
    turning = Rotation.from_rotvec(np.radians(3) * np.arange(2000)[:, None] * [0, 1, 0])
    assert root_mean_square(rotation_jitter(turning.as_rotvec())) < 1e-5
    noise = Rotation.from_rotvec(np.radians(np.random.default_rng(1).normal(0, 0.2, (2000, 3))))
    found = root_mean_square(rotation_jitter((noise * turning).as_rotvec()))
    assert found == pytest.approx(0.2 * np.sqrt(3), rel=0.05)


def test_landmark_jitter_is_relative_to_the_eyes():
    rng = np.random.default_rng(2)
    points = np.broadcast_to(rng.uniform(0, 100, (478, 3)), (300, 478, 3)).copy()
    points[:, 33], points[:, 263] = (10, 10, 0), (90, 10, 0)
    points[..., 2] = rng.normal(0, 50, (300, 478))  # depth does not count
    assert np.nanmax(landmark_jitter(points)) == 0
    noisy = points + rng.normal(0, 0.4, points.shape)
    # The mean length of noise of two numbers is sqrt(pi / 2) of its deviation.
    expected = 100 * 0.4 * np.sqrt(np.pi / 2) / 80
    assert np.nanmean(landmark_jitter(noisy)) == pytest.approx(expected, rel=0.03)
    assert np.nanmean(landmark_jitter(2 * noisy)) == pytest.approx(expected, rel=0.03)


def test_flicker_sees_brightness_and_not_motion():
    pytest.importorskip("cv2", reason="needs the prep extra (OpenCV)")
    blobs = gaussian_filter(np.random.default_rng(0).normal(size=(128, 140, 3)), (2, 2, 0))
    picture = (127 + 40 * blobs / blobs.std()).clip(0, 240).astype(np.uint8)
    still = picture[:, :128]
    assert flicker([still] * 3).max() < 0.01  # the flow is not exact
    moving = np.stack([picture[:, shift : shift + 128] for shift in (0, 2, 4)])
    assert flicker(moving).max() < 0.5 < 20 < np.abs(np.diff(moving.astype(float), axis=0)).mean()
    np.testing.assert_allclose(flicker([still, still + 10, still]), 10, atol=0.5)
    assert [d.shape for d in warped_differences([still] * 3, 64)] == [(64, 64)] * 2
    assert len(flicker([still])) == 0
