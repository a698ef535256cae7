"""Two estimators on real recordings: they agree on the pose, and both tell small from large differences."""

import pytest

from loki_jax.evidence.estimators import compare_estimators, draw_estimators, slopes_on_renders


@pytest.mark.slow
def test_estimators_agree_on_recordings(landmarker, real_clips, task_file, tmp_path):
    clips = sorted(real_clips.glob("*.mp4"))[:3]
    result = compare_estimators(clips, task_file, frames=16)
    assert result["clips"] == 3 and len(result["pairs"]) == 3 * 4 + 3
    assert result["hpf"]["pearson"] > 0.9 and result["expression"]["spearman"] > 0.5
    draw_estimators(result, tmp_path / "estimators.png")
    assert (tmp_path / "estimators.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="two clips of 24 or more"):
        compare_estimators(clips[:1], task_file, frames=16)


@pytest.mark.slow
def test_both_find_known_turns(landmarker, task_file):
    for axis, found in slopes_on_renders(task_file, people=1).items():
        # Of one person; the built-in head is no photograph.
        assert found["fit"] == pytest.approx([1], abs=0.2), axis
        assert found["mediapipe"] == pytest.approx([1], abs=0.25), axis
