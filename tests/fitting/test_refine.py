"""Photometric refinement: its parts, and (slow) rendered clips with known poses."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from data_prep.dataset.summary import jitter_degrees
from loki_jax.face.builtin import builtin_head
from loki_jax.fitting.clips import FittedClip, clip_crop_box
from loki_jax.fitting.fit import fit_landmarks
from loki_jax.fitting.refine import (
    fast_part,
    harmonics,
    refine,
    solve_appearance,
    steadiness,
    trembling,
)
from loki_jax.fitting.tracking import Track
from loki_jax.metrics.hpf import head_pose_follow, head_rotation
from loki_jax.synthetic.appearance import sample_appearance
from loki_jax.synthetic.clips import render_frames
from tests.fitting.accuracy import FRAME_SIZE, observe, true_clip


def random_directions(n, seed=0):
    points = np.random.default_rng(seed).standard_normal((n, 3))
    return points / np.linalg.norm(points, axis=-1, keepdims=True)


def test_harmonics_are_orthonormal_on_the_sphere():
    z, w = np.polynomial.legendre.leggauss(8)
    angle = 2 * np.pi * np.arange(16) / 16
    flat = np.sqrt(1 - z**2)[:, None]
    height = np.broadcast_to(z[:, None], (8, 16))
    points = np.stack([flat * np.cos(angle), flat * np.sin(angle), height], -1).reshape(-1, 3)
    weight = np.repeat(w, 16) * 2 * np.pi / 16
    basis = np.asarray(harmonics(jnp.asarray(points)))
    np.testing.assert_allclose((basis * weight[:, None]).T @ basis, np.eye(9), atol=2e-5)


def test_appearance_explains_colours_it_was_made_from():
    rng = np.random.default_rng(1)
    albedo = rng.uniform(0.3, 0.8, (200, 3))
    # Every vertex turns from frame to frame, so that light and colour can be distinguished.
    basis = np.stack([np.asarray(harmonics(jnp.asarray(random_directions(200, seed)))) for seed in range(12)])
    light = np.zeros((9, 3))
    light[0], light[2], light[3] = 3.0, 0.6, -0.4
    colour = albedo * np.einsum("nvh,hc->nvc", basis, light)
    weight = np.ones((12, 200))
    weight[:, :20] = 0
    found = solve_appearance(*(jnp.asarray(a, jnp.float32) for a in (colour, basis, weight)))
    assert not np.asarray(found.known)[:20].any() and np.asarray(found.known)[20:].all()
    found = np.asarray(found.albedo) * np.einsum("nvh,hc->nvc", basis, np.asarray(found.light))
    still = np.abs(colour - colour.mean(0))[:, 20:].mean()
    assert np.abs(found - colour)[:, 20:].mean() < 0.25 * still


def test_only_fast_changes_are_kept():
    slow = np.linspace(0, 1, 60)[:, None] * [1.0, -2.0]
    fast = 0.1 * (-1.0) ** np.arange(60)[:, None]
    kept = fast_part(slow + fast, 9)
    np.testing.assert_allclose(kept[8:-8], np.broadcast_to(fast, kept.shape)[8:-8], atol=0.02)


def test_noise_is_distinguished_from_motion():
    time = np.arange(200) / 25
    swing = np.stack([20 * np.sin(2 * np.pi * time), 5 * time], -1)
    noise = 0.1 * np.random.default_rng(2).standard_normal(swing.shape)
    assert trembling(swing).max() < 0.02
    np.testing.assert_allclose(trembling(swing + noise), 0.1, rtol=0.3)


def test_the_face_that_moves_counts_less():
    head = builtin_head()
    steady = np.asarray(steadiness(head))
    marks = head.landmarks["mediapipe478"]
    at = lambda index: steady[np.asarray(head.faces)[marks.face[index]]].mean()
    assert at(4) > 2 * at(14) and at(9) > at(14)  # nose tip and forehead against the lower lip
    assert at(468) == 0  # the pupil


def rendered_clip(noise: float, frames: int, seed: int = 8):
    head = builtin_head()
    true, camera = true_clip(head, seed, frames)
    points, confidence = observe(head, true, camera, noise, seed)
    whole = np.array([0, 0, FRAME_SIZE, FRAME_SIZE], np.float32)
    images = render_frames(head, true, camera, whole, sample_appearance(seed, head), FRAME_SIZE)
    fit = fit_landmarks(head, points, confidence, (FRAME_SIZE, FRAME_SIZE), focal=float(camera.intrinsics[0]))
    points = np.pad(points, ((0, 0), (0, 0), (0, 1)))
    track = Track(points, confidence, np.ones(frames, np.float32), 1)
    crop = clip_crop_box(head, fit.coefficients, fit.camera)
    return head, true, FittedClip(images, Fraction(25), track, fit, crop, "rendered")


def test_a_very_short_clip_is_left_alone():
    head = builtin_head()
    still = np.zeros((7, 3), np.float32)
    clip = FittedClip([still] * 7, Fraction(25), None, None, np.zeros(4), "short")
    assert refine(clip, head) is clip


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "gain"), [(0.5, 1.1), (4.0, 0.95)])
def test_refinement_never_worsens_and_calms_trembling_landmarks(noise, gain):
    head, true, clip = rendered_clip(noise, 32)
    found = refine(clip, head).fit.coefficients

    def errors(coefficients):
        follow = head_pose_follow(coefficients.rot, true.rot, coefficients.neck, true.neck)
        wrong = head_rotation(coefficients.rot, coefficients.neck).inv() * head_rotation(true.rot, true.neck)
        return follow.absolute_degrees, follow.degrees, jitter_degrees(np.degrees(wrong.as_rotvec()))

    before, after = errors(clip.fit.coefficients), errors(found)
    assert after[0] < before[0] + 0.02 and after[1] < before[1] + 0.02
    assert after[2] < gain * before[2]
    assert (found.expression == clip.fit.coefficients.expression).all()
