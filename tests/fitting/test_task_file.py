"""MediaPipe's newer landmarker: its file, its scores' names, and what the fit makes of scores."""

import zipfile

import numpy as np
import pytest

from loki_jax.face.builtin import builtin_head
from loki_jax.fitting.fit import fit_landmarks
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.model_files import LandmarkError, fetch_models
from loki_jax.fitting.task_file import SCORE_INPUTS, SCORE_NAMES, axis_scores, with_task_file
from loki_jax.fitting.tracking import clip_landmarks
from tests.fitting.known_face import HEIGHT, WIDTH, N, true_coefficients, true_points


def test_scores_find_the_axes_of_their_names():
    assert len(SCORE_NAMES) == 52 and len(SCORE_INPUTS) == 146 == len(set(SCORE_INPUTS))
    scores = np.arange(52, dtype=np.float32)[None] / 100
    column = {name: scores[0, index] for index, name in enumerate(SCORE_NAMES)}
    names = ("eyeBlink_L", "browInnerUp_R", "mouthSmileLeft", "jawOpen", "cheekRaiser_L", "blink", "e7")
    found = axis_scores(names, scores)
    assert set(found) == {0, 1, 2, 3, 5}
    assert found[1] == column["browInnerUp"] and found[2] == column["mouthSmileLeft"]
    # A score of .7 is a shut eye.
    assert found[0] == pytest.approx(column["eyeBlinkLeft"] / 0.7)
    assert found[5] == pytest.approx((column["eyeBlinkLeft"] + column["eyeBlinkRight"]) / 1.4)
    assert axis_scores(("eyeBlinkLeft",), np.ones((1, 52)))[0] == 1


def test_another_file_is_refused(tmp_path):
    assert with_task_file({}, None) == {}
    with pytest.raises(LandmarkError, match="none.task: not MediaPipe's face_landmarker.task"):
        with_task_file({}, tmp_path / "none.task")
    (tmp_path / "text.task").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "empty.task", "w"):
        pass
    for name in ("text.task", "empty.task"):
        with pytest.raises(LandmarkError, match=name):
            with_task_file({}, tmp_path / name)


def test_scores_are_observations_of_the_fit():
    head = builtin_head()
    points = true_points(head, true_coefficients(head))
    seen = np.ones((N, 478), np.float32)
    lips = np.r_[0:468]
    hidden = seen.copy()
    hidden[:, lips[points[0, lips, 1] > np.median(points[0, lips, 1])]] = 0.02  # the lower face says little
    scores = np.zeros((N, 52), np.float32)
    scores[:, SCORE_NAMES.index("mouthLeft")] = 0.8
    axis = head.expression_names.index("mouthLeft")
    fits = [fit_landmarks(head, points, c, (HEIGHT, WIDTH), scores=s).coefficients.expression[:, axis].mean()
            for c, s in ((hidden, None), (hidden, scores), (seen, scores))]  # fmt: skip
    assert fits[0] < 0.15 and fits[1] > 0.5
    # Clear landmarks outweigh a wrong score.
    assert fits[2] < 0.5 * fits[1]
    none = fit_landmarks(head, points, seen, (HEIGHT, WIDTH), scores=np.zeros((N, 0), np.float32))
    np.testing.assert_array_equal(
        none.coefficients.expression,
        fit_landmarks(head, points, seen, (HEIGHT, WIDTH)).coefficients.expression,
    )


def test_the_networks_see_eyes_that_shut(landmarker, task_file):
    from benchmarks.expression_response import axes_of, express, response

    head = builtin_head()
    newer = Landmarker(with_task_file(fetch_models(), task_file), threads=1)
    axes = axes_of(head, "eyes shut")
    person = express(head, 1, axes)
    track = clip_landmarks(newer, person.frames)
    blink = track.scores[:, SCORE_NAMES.index("eyeBlinkLeft")]
    assert track.scores.shape == (len(person.frames), 52)
    assert blink.max() > 0.4 > 0.1 > blink[0]
    assert response(head, newer, person, axes)[0] > response(head, landmarker, person, axes)[0] - 0.1
