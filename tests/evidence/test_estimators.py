"""Two estimators on real recordings: they agree on the pose, and both tell small from large differences."""

import pytest

from loki_jax.evidence.estimators import compare_estimators, draw_estimators


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
