"""The ICT head, with landmarks made without these clips, on real clips: faces found, errors, trembling."""

from fractions import Fraction

import numpy as np
import pytest

from data_prep.dataset.summary import jitter_degrees
from data_prep.landmarks.embed import with_landmarks
from loki_jax.face.builtin import builtin_head
from loki_jax.face.ict import head_from_ict
from loki_jax.fitting.clips import fit_image
from loki_jax.fitting.fit import fit_landmarks
from loki_jax.fitting.tracking import clip_landmarks
from loki_jax.video.reader import read_video, resample_to_fps


@pytest.mark.slow
def test_real_clips(ict_head_path, real_clips, landmarker):
    head, _ = with_landmarks(head_from_ict(ict_head_path), landmarker)
    clips = sorted(real_clips.glob("*.mp4"))
    assert len(clips) >= 10
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
