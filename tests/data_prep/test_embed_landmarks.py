"""Landmarks for heads that lack them: on the built-in head, whose own are known, and on ICT."""

import dataclasses

import numpy as np
import pytest

from data_prep.embed_landmarks import main
from data_prep.landmarks import embed as embed_landmarks
from data_prep.landmarks.embed import LIDS, check_embedding, embed, measure_openings
from loki_jax.face.asset import HeadAsset, HeadAssetError, Landmarks, load_head, save_head
from loki_jax.face.builtin import builtin_head
from loki_jax.face.ict import MEDIAPIPE_OF_IBUG, head_from_ict


def positions(head: HeadAsset, marks: Landmarks) -> np.ndarray:
    corners = np.asarray(head.template)[np.asarray(head.faces)[np.maximum(marks.face, 0)]]
    return np.einsum("nk,nkx->nx", marks.bary, corners)


@pytest.fixture(scope="module")
def bare() -> HeadAsset:
    """The built-in head in other proportions, with the 68 landmarks only."""
    head = builtin_head()
    marks = head.landmarks["mediapipe478"]
    ibug = Landmarks(np.asarray(marks.face)[MEDIAPIPE_OF_IBUG], np.asarray(marks.bary)[MEDIAPIPE_OF_IBUG])
    stretch = np.array([1.15, 0.92, 1.05], np.float32)
    return dataclasses.replace(
        head,
        template=head.template * stretch + np.array([0, 0.03, 0.1], np.float32),
        expression_basis=head.expression_basis * stretch,
        landmarks={"ibug68": ibug},
        name="bare",
    )


@pytest.fixture(scope="module")
def marks(bare) -> Landmarks:
    return embed(bare)


def test_finds_the_landmarks_of_a_stretched_head(bare, marks):
    known = builtin_head().landmarks["mediapipe478"]
    distance = np.linalg.norm(positions(bare, marks) - positions(bare, known), axis=-1)[:468]
    # The stretch is not a similarity, so the spline has to find it from 68 points.
    assert np.median(distance) < 0.0015 and np.quantile(distance, 0.95) < 0.005
    exact = MEDIAPIPE_OF_IBUG[17:]
    np.testing.assert_allclose(distance[exact], 0, atol=1e-6)


def test_landmarks_lie_on_skin_and_irises_on_eyeballs(bare, marks):
    assert (marks.face >= 0).all()
    np.testing.assert_allclose(marks.bary.sum(-1), 1, atol=1e-5)
    assert marks.bary.min() >= -1e-6
    corners = np.asarray(bare.faces)[marks.face]
    joints = [bare.joint("left_eye"), bare.joint("right_eye")]
    eye = np.asarray(bare.skinning_weights)[:, joints].max(-1) > 0.5
    assert eye[corners[468:]].all() and not eye[corners[:468]].any()
    points = positions(bare, marks)
    # Right eye first; rims in the order nose, above, temple, below.
    for first, towards_nose in ((468, 1), (473, -1)):
        around = points[first + 1 : first + 5] - points[first]
        assert np.sign(around[0, 0]) == towards_nose and np.sign(around[2, 0]) == -towards_nose
        assert around[1, 1] > 0.004 and around[3, 1] < -0.004


def test_eyes_close_and_the_mouth_opens(bare, marks):
    right, left, mouth = check_embedding(bare, marks)
    for eye in (right, left):
        assert eye.rest > 0.15 and eye.least < 0.3 * eye.rest and "eyeBlink" in eye.least_by
    assert abs(mouth.rest) < 0.2 and mouth.most > 0.3


def test_exchanged_lids_are_refused(bare, marks):
    face, bary = marks.face.copy(), marks.bary.copy()
    upper, lower = (list(row) for row in LIDS["right"])
    face[upper + lower], bary[upper + lower] = face[lower + upper], bary[lower + upper]
    wrong = Landmarks(face, bary)
    assert measure_openings(bare, wrong)[0].rest < 0
    with pytest.raises(HeadAssetError, match="right eye do not open and close"):
        check_embedding(bare, wrong)


def test_a_head_without_any_landmarks_is_refused(bare, tmp_path, capsys):
    lost = dataclasses.replace(bare, landmarks={})
    with pytest.raises(HeadAssetError, match="68 .or 51. iBUG landmarks are needed"):
        embed(lost)
    save_head(tmp_path / "lost.npz", lost)
    status = main([str(tmp_path / "lost.npz"), "--no-networks", "--out", str(tmp_path / "out.npz")])
    assert status == 1 and not (tmp_path / "out.npz").exists()
    assert "iBUG" in capsys.readouterr().err


def test_ict_by_closest_points(ict_path, tmp_path):
    out = tmp_path / "ict.npz"
    assert main([str(ict_path), "--no-networks", "--out", str(out)]) == 0
    head = load_head(out)
    assert (head.landmarks["mediapipe478"].face >= 0).all() and "closest points" in head.provenance
    assert head.licence == head_from_ict(ict_path).licence
    right, left, mouth = check_embedding(head, head.landmarks["mediapipe478"])
    assert right.least < 0.15 and left.least < 0.15 and mouth.most > 0.5


@pytest.mark.slow
def test_ict_by_the_networks(ict_path, landmarker):
    head = head_from_ict(ict_path)
    found = embed_landmarks.embed(head, landmarker)
    check_embedding(head, found)
    distance = np.linalg.norm(positions(head, found) - positions(head, embed(head)), axis=-1)
    # Two ways to the same landmarks: a few millimetres apart, and not the same.
    assert 0.0005 < np.median(distance[:468]) < 0.006
