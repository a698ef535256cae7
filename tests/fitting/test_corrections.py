"""What the landmark networks get wrong, and its correction: heads that nod, lids that shut."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from benchmarks.expression_response import axes_of, express, response
from benchmarks.pose_response import ANGLES, found_angles, slope, turning_person
from loki_jax.face.builtin import builtin_head
from loki_jax.fitting.lids import close_lids, lid_openings
from loki_jax.fitting.points import LIDS_LEFT, LIDS_RIGHT
from loki_jax.fitting.pose_bias import pose_bias
from loki_jax.fitting.tracking import clip_landmarks
from tools.landmark_bias import RawLandmarker, measure_bias

FLIP = np.array([1.0, -1.0, -1.0])


def marked_face(bias, pitch, yaw=0.0, roll=0.0, scale=200.0):
    """The mean face in the network's axes, turned (degrees) and enlarged, and the same with the bias."""
    face = np.concatenate([bias.face, np.zeros((10, 3))])
    turn = Rotation.from_euler("ZYX", [roll, yaw, pitch], degrees=True)
    true = turn.apply(face) * scale * FLIP + [320.0, 240.0, 0.0]
    powers = np.radians(pitch) ** np.arange(1, len(bias.bias) + 1)
    offset = np.tensordot(powers, bias.bias, 1) @ Rotation.from_euler("z", roll, True).as_matrix()[:2, :2].T
    marked = true.copy()
    marked[:, :2] += offset * scale * FLIP[:2]
    return true, marked


@pytest.mark.parametrize("pitch, roll", [(0, 0), (25, 0), (-20, 0), (15, -30)])
def test_pose_of_the_networks_points(pitch, roll):
    bias = pose_bias()
    true, _ = marked_face(bias, pitch, roll=roll)
    pose = bias.pose(true)
    np.testing.assert_allclose(np.degrees([pose.pitch, pose.roll]), [pitch, roll], atol=0.01)
    assert pose.scale == pytest.approx(200)


@pytest.mark.parametrize("pitch, yaw, roll", [(20, 0, 0), (-25, 0, 0), (15, 20, 0), (20, 0, 25)])
def test_bias_of_a_nod_is_removed(pitch, yaw, roll):
    bias = pose_bias()
    true, marked = marked_face(bias, pitch, yaw, roll)
    corrected = bias.correct(marked)
    np.testing.assert_array_equal(corrected[:, 2], marked[:, 2])
    left = np.abs(corrected - true)[:468, :2].mean()
    # The pose itself is read off biased points.
    assert left < 0.25 * np.abs(marked - true)[:468, :2].mean()


def test_a_face_that_looks_ahead_stays():
    bias = pose_bias()
    true, _ = marked_face(bias, 0.0, yaw=10.0)
    np.testing.assert_allclose(bias.correct(true), true, atol=0.05)


def test_bias_is_measured_back():
    """Marks with a known bias, of three people who differ by constants."""
    rng = np.random.default_rng(0)
    known = pose_bias()
    marked, true, owner = [], [], []
    people = rng.normal(0, 2, (3, 478, 2))
    for person in range(3):
        for pitch, yaw, roll in rng.uniform(-30, 30, (20, 3)):
            place, mark = marked_face(known, pitch, yaw, roll)
            mark[:, :2] += people[person] @ Rotation.from_euler("z", -roll, True).as_matrix()[:2, :2].T
            marked.append(mark), true.append(place[:, :2]), owner.append(person)
    found = measure_bias(np.array(marked), np.array(true), np.array(owner))
    moved = np.abs(known.bias[0, :468]).mean()
    assert np.abs(found.bias[0] - known.bias[0])[:468].mean() < 0.25 * moved


def test_pitch_of_a_rendered_head_is_found(landmarker):
    head = builtin_head()
    person = turning_person(head, 1, "pitch")
    track = clip_landmarks(landmarker, person.frames)
    corrected = slope(found_angles(head, person, track, "pitch"))
    raw = track._replace(points=clip_landmarks(raw_networks(landmarker), person.frames).points)
    assert abs(corrected - 1) < 0.05
    assert slope(found_angles(head, person, raw, "pitch")) < 0.9
    assert len(ANGLES) == len(person.frames)


def raw_networks(landmarker):
    raw = RawLandmarker.__new__(RawLandmarker)
    raw.__dict__.update(landmarker.__dict__)
    return raw


# --- lids -----------------------------------------------------------------------------------------------


def eyes(opening):
    """Points (n, 478, 3) whose lids are `opening` (n,) eye widths apart in the middle; width 30 pixels."""
    opening = np.atleast_1d(np.asarray(opening, np.float32))
    points = np.zeros((len(opening), 478, 3), np.float32)
    arch = np.sin(np.pi * np.arange(9) / 8)
    for lids, x0 in ((LIDS_RIGHT, 0.0), (LIDS_LEFT, 100.0)):
        x = x0 + 30 * np.arange(9) / 8
        height = 15 * opening[:, None] * arch / arch[3:6].mean()
        points[:, lids[:9], 0], points[:, lids[:9], 1] = x, height
        points[:, lids[9:], 0], points[:, lids[9:], 1] = x[1:8], -height[:, 1:8]
    return points


def test_openings_do_not_depend_on_the_turn_of_the_head():
    points = eyes([0.35])
    np.testing.assert_allclose(lid_openings(points), 0.35, rtol=1e-5)
    turned = points @ Rotation.from_euler("y", 40, degrees=True).as_matrix().astype(np.float32).T
    np.testing.assert_allclose(lid_openings(turned), 0.35, rtol=1e-5)


def test_lids_that_the_network_leaves_half_open_shut():
    marked = np.array([0.36] * 10 + [0.30, 0.24, 0.15, 0.10, 0.36])
    points = eyes(marked)
    closed = close_lids(points, np.ones(len(marked)))
    found = lid_openings(closed)
    assert (np.abs(found[:10] - 0.36) < 1e-6).all()
    assert (np.diff(found[9:14], axis=0) <= 0).all() and (found[:, 0] <= marked + 1e-6).all()
    np.testing.assert_allclose(found[12:14], 0, atol=1e-6)
    # Only upper lids move.
    others = np.setdiff1d(np.arange(478), (*LIDS_RIGHT[9:], *LIDS_LEFT[9:]))
    np.testing.assert_array_equal(closed[:, others], points[:, others])


def test_wide_eyes_and_unseen_frames():
    points = eyes([0.3] * 8 + [0.4, 0.0])
    closed = close_lids(points, np.array([1.0] * 9 + [0.0]))
    np.testing.assert_allclose(lid_openings(closed)[:9], lid_openings(points)[:9], atol=1e-6)
    nobody = close_lids(points, np.zeros(10))
    np.testing.assert_array_equal(nobody, points)


def test_closed_eyes_of_a_portrait_are_not_taken_for_open_ones():
    assert lid_openings(close_lids(eyes([0.09]), np.ones(1))).max() < 0.02


def test_shut_eyes_of_a_rendered_head_shut_in_the_fit(landmarker):
    head = builtin_head()
    axes = axes_of(head, "eyes shut")
    part, opening = response(head, landmarker, express(head, 2, axes), axes)
    assert part > 0.55 and abs(opening) < 0.15
