"""The quality report: what it measures on the records, and the page it writes."""

import json
from fractions import Fraction

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_prep import report as program
from data_prep.dataset import report
from data_prep.dataset.report import count_closures, make_report
from data_prep.dataset.summary import jitter_degrees
from loki_jax.data.schema import Clip, DatasetError
from loki_jax.data.writer import write_dataset
from loki_jax.face.builtin import builtin_head
from loki_jax.face.types import Coefficients
from loki_jax.fitting.fit import make_camera

N, SIZE = 12, 16
YAW = np.linspace(-20, 30, N)


def make_clip(head, name: str, split: str) -> Clip:
    rng = np.random.default_rng(len(name))
    zero = np.zeros((N, 3), np.float32)
    turn = Rotation.from_euler("YXZ", np.stack([YAW, 0 * YAW + 5, 0 * YAW - 3], -1), degrees=True)
    # Half of the turn in the neck: only the total counts.
    neck = Rotation.from_euler("Y", 0.5 * YAW[:, None], degrees=True)
    expression = np.zeros((N, head.n_expression), np.float32)
    blink = [head.expression_names.index(f"eyeBlink{side}") for side in ("Left", "Right")]
    expression[[3, 4, 9], blink[0]] = expression[[3, 4, 9], blink[1]] = 0.9
    jaw = zero.copy()
    jaw[5, 0] = np.deg2rad(12)
    rot, bend = (turn * neck.inv()).as_rotvec(), neck.as_rotvec()
    fields = np.zeros((N, head.n_shape)), expression, rot, zero, bend, jaw, zero
    return Clip(
        clip_id=name, identity=name, fps=Fraction(25), split=split, source="test", licence="test",
        coefficients=Coefficients(*(np.asarray(field, np.float32) for field in fields)),
        camera=make_camera((64, 64)), crop=np.array([0, 0, 64, 64], np.float32),
        images=rng.integers(0, 255, (N, SIZE, SIZE, 3)).astype(np.uint8),
        confidence=np.full(N, 0.75, np.float32),
    )  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "shards"
    head = builtin_head()
    write_dataset(path, head, [make_clip(head, "a<b", "train"), make_clip(head, "other", "validation")], SIZE)
    summary = {
        "clips": [{"clip": "a<b", "error_percent": 4.5, "error_percent_p90": 5.25, "face_share": 0.95}],
        "rejected": [{"clip": "bad", "file": "bad.mp4", "reason": "bad.mp4: no <face> found"}],
        "settings": {"max_error": 0.05, "min_frames": 16},
    }
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "overlays").mkdir()
    (path / "overlays" / "other.mp4").write_bytes(b"not really a video")
    return path


def test_measures_the_records(dataset, tmp_path):
    clips, summary = make_report(dataset, tmp_path / "page.html")
    assert [clip.info.clip_id for clip in clips] == ["a<b", "other"]
    first = clips[0]
    expected = np.stack([YAW, 0 * YAW + 5, 0 * YAW - 3], -1)
    np.testing.assert_allclose(first.angles, expected, atol=1e-3)
    assert first.closures == 2 and first.opening == pytest.approx(12, abs=1e-3)
    # Blinks reach into the upper 5 % of 12 frames, nothing else moves.
    assert first.active_axes == 2
    row = dict(zip(report._COLUMNS, report.table_row(first), strict=True))
    assert row["error %"] == "4.50" and row["yaw"] == "-20..30" and row["confidence"] == "0.75"
    assert dict(zip(report._COLUMNS, report.table_row(clips[1]), strict=True))["error %"] == "-"
    assert summary["settings"]["max_error"] == 0.05
    assert "2 of 2 identities" in report.format_table(clips)


def test_page_is_one_file_with_everything(dataset, tmp_path):
    page = tmp_path / "page.html"
    make_report(dataset, page)
    text = page.read_text()
    assert "a&lt;b" in text and "a<b" not in text and "no &lt;face&gt; found" in text
    assert text.count("data:image/jpeg") == 2 and text.count("data:image/png") == 3
    assert text.count("<video") == 1 and "data:video/mp4" in text
    # 4.5 % is above 80 % of the limit of 5 %; the clip without errors is not marked.
    assert text.count("number high") == 1 and "max_error" in text
    assert "http" not in text  # nothing is fetched
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_overlays_can_be_linked_or_left_out(dataset):
    page = dataset / "report.html"
    make_report(dataset, page, "link")
    assert 'src="overlays/other.mp4"' in page.read_text()
    make_report(dataset, page, "none")
    assert "<video" not in page.read_text()
    page.unlink()


def test_program_prints_table_and_rejections(dataset, tmp_path, capsys):
    assert program.main([str(dataset), "--out", str(tmp_path / "r.html")]) == 0
    printed = capsys.readouterr().out
    assert "a<b" in printed and "rejected (1): bad.mp4: no <face> found" in printed
    assert program.main([str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err


def test_damaged_summary_is_named(dataset, tmp_path):
    whole = (dataset / "summary.json").read_text()
    try:
        (dataset / "summary.json").write_text(whole[:40])
        with pytest.raises(DatasetError, match="summary.json: damaged"):
            make_report(dataset, tmp_path / "page.html")
        assert not (tmp_path / "page.html").exists()
    finally:
        (dataset / "summary.json").write_text(whole)


def test_jitter_ignores_smooth_motion_and_sees_trembling():
    line = np.outer(np.arange(50.0), [1.0, 0.5, 0.0])
    assert jitter_degrees(line) < 0.35  # the two ends only, where the median is not centred
    trembling = np.zeros((50, 3))
    trembling[2::5] = 1.0
    assert jitter_degrees(trembling) == pytest.approx(np.sqrt(1 / 5), rel=1e-6)


def test_closures_need_the_eye_to_open_again():
    assert count_closures(np.array([0, 0.7, 0.5, 0.8, 0.2, 0.9, 0.1])) == 2
    assert count_closures(np.full(10, 0.5)) == 0
