"""The ICT head, with landmarks made without these clips, on real clips: errors, trembling, shut eyes."""

from fractions import Fraction

import numpy as np
import pytest

from data_prep.dataset.summary import jitter_degrees
from data_prep.landmarks.embed import with_landmarks
from loki_jax.face.builtin import builtin_head
from loki_jax.face.ict import head_from_ict
from loki_jax.face.skinning import head_vertices, landmark_positions, make_identity
from loki_jax.face.types import Coefficients
from loki_jax.fitting.clips import fit_image
from loki_jax.fitting.fit import fit_landmarks
from loki_jax.fitting.lids import lid_openings
from loki_jax.fitting.tracking import clip_landmarks
from loki_jax.video.reader import read_video, resample_to_fps

# A frame (at 25 a second) in which both eyes are shut, seen by eye in the pictures; the clip that is missing
# shows none. The woman of the last one laughs and leaves a slit.
SHUT = {
    "a_drv01_man_green": 65,
    "a_drv02_woman_turns": 48,
    "a_drv03_man_selfie_glasses": 86,
    "a_drv04_man_glasses_turns": 144,
    "a_drv05_man_beard_expr": 2,
    "a_drv06_woman_speech": 32,
    "a_drv07_grid_woman": 22,
    "a_drv09_grid_man2": 28,
    "a_drv10_woman_34view": 147,
}


def opening_left(head, coefficients, frame):
    """The fitted gap between the lids in a frame, over that of the clip's open eyes; mean of both."""
    spread = np.linspace(0, len(coefficients.rot) - 1, 31).round().astype(int)
    some = Coefficients(*(field[np.append(spread, frame)] for field in coefficients))
    vertices = head_vertices(head, make_identity(head, some.betas[:1]), some)
    openings = lid_openings(np.asarray(landmark_positions(head, vertices, "mediapipe478")))
    return float((openings[-1] / np.quantile(openings[:-1], 0.8, axis=0)).mean())


@pytest.mark.slow
def test_real_clips(ict_head_path, real_clips, landmarker):
    head, _ = with_landmarks(head_from_ict(ict_head_path), landmarker)
    clips = sorted(real_clips.glob("*.mp4"))
    assert len(clips) >= 10
    left = {}
    for path in clips:
        clip = read_video(path)
        if clip.fps != 25:
            clip = resample_to_fps(clip, Fraction(25))
        track = clip_landmarks(landmarker, clip.frames, name=path.name)
        assert (track.score >= 0.5).all(), path.name
        fit = fit_landmarks(head, track.points, track.confidence, clip.frames[0].shape[:2])
        assert np.median(fit.error) < 0.02, path.name
        # A head that is nobody's would explain the landmarks too.
        assert np.abs(fit.coefficients.betas).max() < 3.5, path.name
        if "grid" in path.name:
            assert jitter_degrees(np.degrees(fit.coefficients.rot)) < 0.3, path.name
        if path.stem in SHUT:
            left[path.stem] = opening_left(head, fit.coefficients, SHUT[path.stem])
    assert left.keys() == SHUT.keys()
    assert np.median(list(left.values())) <= 0.15, left
    assert max(left.values()) < 0.35, left


def test_noses_of_fits_are_no_thorns(real_clips, landmarker):
    """The tip lies at most 5 mm before that of the mean head; it lay 6.6, 8.3 and 8.6 mm before it."""
    head = builtin_head()
    tip = int(np.argmax(np.where(np.abs(head.template[:, 0]) < 0.01, head.template[:, 2], 0)))
    depth = [head.shape_names.index(name) for name in ("nose_bridge", "nose_tip")]
    for name in ("a_ref02_photo_man_glasses", "a_ref05_photo_historic_man", "a_ref08_painting_woman_black"):
        fit = fit_image(real_clips / f"{name}.jpg", head, landmarker=landmarker, face=0).fit
        out = fit.coefficients.betas[0, depth] @ head.shape_basis[depth, tip, 2]
        assert 0 < out < 0.005, (name, out)
        assert np.median(fit.error) < 0.011, name
