"""Evaluation of a manifest: rows, resuming, shards, failures, tables, and the baselines' pictures."""

import functools
import json
import re

import numpy as np
import pytest

from loki_jax.evaluate import main
from loki_jax.face.builtin import builtin_head
from loki_jax.manifest import main as make_manifest
from loki_jax.protocols.summary import (
    latex_tables,
    markdown_tables,
    summarise,
)
from loki_jax.protocols.systems import paste, warp_similarly
from loki_jax.video import write_video
from tests.fitting.known_face import RATE, KnownFace, N, frames_showing, true_coefficients, true_points

FRAMES = 10
OPTIONS = ["--identity", "none", "--no-lpips", "--hef-size", "32", "--pictures", "1"]


@pytest.fixture(scope="module")
def known_face():
    """The networks replaced by ones that know the faces of grey frames."""
    head = builtin_head()
    networks = KnownFace(true_points(head, true_coefficients(head)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loki_jax.fitting.clips.default_landmarker", lambda task=None: networks)
        yield networks


@pytest.fixture(scope="module")
def folder(tmp_path_factory, known_face):
    """A manifest of two clips, the same motion forwards and backwards."""
    root = tmp_path_factory.mktemp("evaluation")
    (root / "clips").mkdir()
    for name, shown in {"a": range(FRAMES), "b": range(N - 1, N - 1 - FRAMES, -1)}.items():
        write_video(root / "clips" / f"{name}.mp4", frames_showing(shown), RATE, crf=4)
    arguments = ["--sources", root / "clips", "--frames", FRAMES, "--size", "96", "--out", root / "list"]
    assert make_manifest([str(argument) for argument in arguments]) == 0
    return root / "list"


def run(folder, out, *more, baselines=("still", "refit")):
    arguments = ["--manifest", folder, "--out", out, *OPTIONS, "--baselines", *baselines, *more]
    return main([str(argument) for argument in arguments])


def rows_of(out):
    rows = [json.loads(line) for path in out.glob("metrics*.jsonl") for line in path.read_text().splitlines()]
    return {(row["system"], row["sample"]): row for row in rows}


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "out"
    assert run(folder, out) == 0
    return out


def test_floor_and_ceiling(results):
    rows = rows_of(results)
    assert len(rows) == 2 * 4
    for (system, sample), row in rows.items():
        assert row["track_rate"] == 1 and not row["failed"] and len(row["per_frame"]["hef"]) == FRAMES
        if system == "refit":
            assert row["hpf"] < 0.1 and row["hef"] < 0.001
        else:
            assert row["hpf"] > 1 and row["hef"] > 0.01
        assert ("psnr" in row) == sample.startswith("same")
    summary = json.loads((results / "summary.json").read_text())["protocols"]
    assert set(summary) == {"same", "cross"}
    mean, low, high = summary["cross"]["still"]["hpf"]
    assert low <= mean <= high
    assert summary["cross"]["refit"]["against"]["hpf"]["difference"][2] < 0


def test_tables_and_report_hold_everything(results):
    markdown, latex = ((results / f"tables.{kind}").read_text() for kind in ("md", "tex"))
    for text in (markdown, latex):
        assert "still" in text and "refit" in text and "2.24" in text and "HunyuanPortrait" in text
    page = (results / "report.html").read_text()
    # Nothing is loaded from elsewhere.
    assert "<img src=" in page and not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("<details>") == 2 and "HPF" in page


def test_a_stopped_run_goes_on(folder, results, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(folder, out, "--shard", "1/2") == 0
    half = rows_of(out)
    assert len(half) == 4 and not (out / "summary.json").exists()
    assert "4 of 8 rows are left" in capsys.readouterr().err
    # Killed while it wrote a line.
    log = out / "metrics-1of2.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-1]) + lines[-1][:20])
    assert run(folder, out) == 0
    assert "[5/5]" in capsys.readouterr().out
    again = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(again) == 5
    found = {(row["system"], row["sample"]): row for row in again} | half
    assert {key: row["hpf"] for key, row in found.items()} == {
        key: pytest.approx(row["hpf"], abs=1e-6) for key, row in rows_of(results).items()
    }
    assert run(folder, out, "--hef-size", "48") == 1
    assert "hef_size = '32', this run has '48'" in capsys.readouterr().err


def test_videos_of_another_system(folder, tmp_path, capsys):
    """One loses the face half-way, one shows none, one is short; a missing one is an error."""
    videos, out = tmp_path / "theirs", tmp_path / "out"
    videos.mkdir()
    shown = {
        "same-a": [*range(5), *[-1] * 5], "same-b": [-1] * 10,
        "cross-a-by-b": range(8), "cross-b-by-a": range(10),
    }  # fmt: skip
    for name, indices in list(shown.items())[:3]:
        write_video(videos / f"{name}.mp4", frames_showing(indices)[:, :, 16:112], RATE, crf=4)
    assert run(folder, out, "--videos", f"them={videos}", baselines=()) == 1
    assert "has no cross-b-by-a.mp4" in capsys.readouterr().err
    write_video(videos / "cross-b-by-a.mp4", frames_showing(range(10))[:, :, 16:112], RATE, crf=4)
    assert run(folder, out, "--videos", f"them={videos}", baselines=()) == 0
    rows = {sample: row for (_, sample), row in rows_of(out).items()}
    assert rows["same-a"]["track_rate"] == 0.5 and not rows["same-a"]["failed"]
    assert rows["same-b"]["failed"] and rows["same-b"]["track_rate"] == 0 and "hpf" not in rows["same-b"]
    assert rows["cross-a-by-b"]["track_rate"] == 0.8 and rows["cross-b-by-a"]["hpf"] < 0.1
    summary = json.loads((out / "summary.json").read_text())["protocols"]["same"]["them"]
    assert summary["failed"] == 1 and summary["track_rate"] == 0.25 and summary["samples"] == 2


@pytest.mark.parametrize(
    "more, message",
    [
        (["--shard", "3/2"], "--shard 3/2"),
        (["--videos", "still=x"], "name of its own"),
        (["--checkpoint", "none"], "none"),
    ],
)
def test_bad_options_are_one_clear_error(folder, tmp_path, more, message, capsys):
    assert run(folder, tmp_path / "out", *more) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_failure_has_no_weight_but_is_counted():
    row = {
        "protocol": "cross",
        "system": "x",
        "failed": False,
        "track_rate": 1.0,
        "hpf": 2.0,
        "frames": 2,
        "driver": "d",
    }
    lost = {"protocol": "cross", "system": "x", "failed": True, "track_rate": 0.0, "frames": 2, "driver": "d"}
    rows = [
        row | {"sample": "1"},
        row | {"sample": "2", "track_rate": 0.5, "hpf": 5.0},
        lost | {"sample": "3"},
    ]
    entry = summarise(rows)["cross"]["x"]
    assert entry["hpf"][0] == pytest.approx(3) and entry["failed"] == 1
    assert entry["track_rate"] == pytest.approx(0.5)
    assert "| x | 3 | 1 | 50.0 % | 3.00" in markdown_tables({"cross": {"x": entry}})
    assert r"x & 50.0\,\% & 3.00 $\pm$" in latex_tables({"cross": {"x": entry}})


@pytest.fixture
def picture():
    y, x = np.mgrid[:64, :80]
    return np.stack([2 * x, 3 * y, 100 + 20 * np.sin(x / 5)], -1).astype(np.uint8)


def test_a_similarity_moves_the_picture_as_it_moves_the_points(picture):
    points = np.array([[30.0, 20.0], [50.0, 22.0], [40.0, 44.0]])
    # Rounding of positions moves values by one level.
    equal = functools.partial(np.testing.assert_allclose, atol=1)
    equal(*map(np.int64, (warp_similarly(picture, points, points), picture)))
    shifted = warp_similarly(picture, points, points + [3, -2])
    equal(*map(np.int64, (shifted[:-2, 3:], picture[2:, :-3])))
    centre = np.array([39.5, 31.5])  # of the picture
    turned = warp_similarly(picture, points, (points - centre) @ [[0, 1], [-1, 0]] + centre)
    equal(*map(np.int64, (turned[:, 8:72], np.rot90(picture[:, 8:72], -1))))


def test_a_frame_is_laid_into_its_box(picture):
    frame = np.full((16, 16, 3), 200, np.uint8)
    inside = paste(picture, frame, np.array([10.0, 20.0, 42.0, 52.0]))
    assert (inside[20:52, 10:42] == 200).all()
    inside[20:52, 10:42] = picture[20:52, 10:42]
    np.testing.assert_array_equal(inside, picture)
    frame[:, 8:] = 50
    beyond = paste(picture, frame, np.array([-16.0, 40.0, 16.0, 72.0]))
    assert (beyond[40:, 2:16] == 50).all() and (beyond[:40] == picture[:40]).all()
