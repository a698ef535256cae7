"""Photometric refinement: its parts, and (slow) rendered clips with known poses and expressions."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.expression_response import axes_of, express, response
from data_prep.dataset.summary import jitter_degrees
from loki_jax.face.builtin import builtin_head
from loki_jax.fitting.clips import FittedClip, clip_crop_box
from loki_jax.fitting.fit import fit_landmarks
from loki_jax.fitting.problem import Surface
from loki_jax.fitting.refine import PhotometricSettings, refine, surface_points
from loki_jax.fitting.solver import _look
from loki_jax.fitting.tracking import Track
from loki_jax.metrics.hpf import head_pose_follow, head_rotation
from loki_jax.synthetic.appearance import sample_appearance
from loki_jax.synthetic.clips import render_frames
from tests.fitting.accuracy import FRAME_SIZE, observe, true_clip

SPACING = PhotometricSettings().spacing


def test_points_cover_the_face_and_not_the_mouths_inside():
    head = builtin_head()
    points, area = surface_points(head, SPACING)
    corners = np.asarray(head.faces)[points.face]
    assert np.allclose(points.bary.sum(1), 1, atol=1e-6) and (points.bary >= 0).all()
    assert not np.asarray(head.inner_mouth)[corners].any() and np.asarray(head.render_mask)[corners].all()
    # The areas that the points stand for add up to that of the surface.
    a, b, c = (np.asarray(head.template)[np.asarray(head.faces)[:, k]] for k in range(3))
    face_area = np.linalg.norm(np.cross(b - a, c - a), axis=-1) / 2
    shown = np.asarray(head.render_mask)[head.faces].all(1) & ~np.asarray(head.inner_mouth)[head.faces].any(1)
    assert area.sum() == pytest.approx(face_area[shown].sum(), rel=0.01)
    # Close together at the mouth, far apart at the back of the head.
    place = np.einsum("mk,mkc->mc", points.bary, np.asarray(head.template)[corners])
    lips = np.einsum(
        "nk,nkc->nc",
        marks_of(head).bary[[61, 291]],
        head.template[head.faces[marks_of(head).face[[61, 291]]]],
    )
    near = np.linalg.norm(place - lips[0], axis=-1) < 0.01
    assert (area[near] == np.float32(SPACING[0] ** 2)).mean() > 0.9
    assert area[np.argmin(place[:, 2])] == np.float32(SPACING[1] ** 2)


def marks_of(head):
    return head.landmarks["mediapipe478"]


def test_a_point_is_drawn_to_where_the_picture_shows_its_look():
    """Cost, gradient and curvature of points in a picture that is a plane in each channel."""
    row, column = np.mgrid[:32, :32] + 0.5
    picture = np.stack([0.1 * column, 0.05 * row], -1).astype(np.float32)
    surface = Surface(
        pictures=picture, corner=np.array([100, 50], np.float32), scale=np.float32(0.5),
        texture=np.array([[0.5, 0.5], [1.5, 0.5]], np.float32), weight=np.ones(2, np.float32),
        noise=np.float32(100),
    )  # fmt: skip
    # Picture places (5, 10) and (15, 10) have these looks: frame pixels (110, 70) and (130, 70).
    true = np.array([[110.0, 70.0], [130.0, 70.0]], np.float32)
    shift = np.array([[3.0, -2.0], [-1.0, 4.0]], np.float32)
    cost, tensor, pull = _look(surface, jnp.asarray(true + shift))
    slope = np.array([[0.05, 0.0], [0.0, 0.025]])  # per frame pixel
    np.testing.assert_allclose(tensor, np.broadcast_to(slope.T @ slope, (2, 2, 2)), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        np.linalg.solve(np.asarray(tensor), np.asarray(pull)[..., None])[..., 0], shift, rtol=1e-3
    )
    assert float(cost) == pytest.approx(0.5 * np.sum((shift @ slope.T) ** 2), rel=1e-3)
    assert float(_look(surface, jnp.asarray(true))[0]) < 1e-6


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
    np.testing.assert_array_equal(found.betas, clip.fit.coefficients.betas)


@pytest.mark.slow
@pytest.mark.parametrize(("expression", "least"), [("mouth to the left", 0.6), ("smile on the left", 0.75)])
def test_a_skewed_mouth_is_found(landmarker, expression, least):
    """The networks draw it nearly symmetric; the pictures of the same clip show it."""
    head = builtin_head()
    axes = axes_of(head, expression)
    person = express(head, 1, axes)
    before, after = (response(head, landmarker, person, axes, refined)[0] for refined in (False, True))
    assert before < 0.45 and after > least
