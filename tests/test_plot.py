"""Curves of runs: what is read, smoothed, drawn and refused."""

import json

import numpy as np
import pytest
from PIL import Image

from loki_jax.plot import Options, PlotError, draw_runs, main, plot, read_run, run_names, smoothed


def write_run(path, steps=20, every=10, mfu=False, scale=1.0, cut=False):
    path.mkdir(parents=True)
    rng = np.random.default_rng(len(path.name))
    rows = []
    for i in range(1, steps + 1):
        row = {
            "step": i * every,
            "loss": scale * (0.1 + rng.exponential(0.02) + 1 / i),
            "grad_norm": 1 / i,
            "data_wait": 0.02,
        }
        rows.append(row | ({"mfu": 0.4} if mfu else {}))
        if i % 5 == 0:
            rows.append({"step": i * every, "val_loss": scale * (0.1 + 1 / i)})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "metrics.jsonl").write_text(text[:-9] if cut else text)
    return path


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_a_picture_of_two_runs(tmp_path, capsys):
    runs = [write_run(tmp_path / "first"), write_run(tmp_path / "second", mfu=True, scale=2.0)]
    out = tmp_path / "curves.png"
    plot(Options(tuple(runs), out))
    picture = np.asarray(Image.open(out).convert("RGB"))
    assert picture.shape[0] > 300 and picture.shape[1] > 600 and picture.std() > 10
    said = capsys.readouterr().out.splitlines()
    assert (
        said[0].startswith("first: step 200: loss")
        and said[1].startswith("second: step 200")
        and "mfu 0.4" in said[1]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "first", "second"]
    assert main([str(runs[0]), "--out", str(tmp_path / "curves.svg")]) == 0
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_panels_are_what_the_runs_have(tmp_path):
    plain, full = read_run(write_run(tmp_path / "a")), read_run(write_run(tmp_path / "b", mfu=True))
    one = draw_runs([plain])
    assert len(titles(one)) == 4 and not any("MFU" in title for title in titles(one))
    both = draw_runs([plain, full], half_life=30.0)
    assert len(titles(both)) == 5 and "MFU" in titles(both)[4]
    # In a panel of both: two runs, each as logged and smoothed; of MFU one; validation is not smoothed.
    lines = [axes.get_lines() for axes in both.axes]
    assert [len(panel) for panel in lines] == [4, 2, 4, 4, 2]
    np.testing.assert_array_equal(lines[0][0].get_ydata(), plain.curves["loss"][1])
    steps, loss = plain.curves["loss"]
    np.testing.assert_allclose(
        lines[0][1].get_ydata(), np.exp(smoothed(steps, np.log(loss), 30.0))
    )  # a log axis
    assert both.axes[0].get_yscale() == "log" and both.axes[3].get_yscale() == "linear"
    np.testing.assert_array_equal(lines[3][1].get_ydata(), smoothed(*plain.curves["data_wait"], 30.0))
    assert "half-life of 30 steps" in both.get_supxlabel()
    assert "not smoothed" in draw_runs([plain], half_life=0.0).get_supxlabel()
    assert [text.get_text() for text in both.legends[0].get_texts()] == ["a", "b"]


def test_smoothing_by_its_definition():
    rng = np.random.default_rng(0)
    steps = np.cumsum(rng.integers(1, 30, 50)).astype(float)  # uneven
    values = rng.normal(size=50)
    for half_life in (1.0, 20.0, 1000.0):
        weights = np.tril(0.5 ** (np.maximum(steps[:, None] - steps, 0) / half_life))
        np.testing.assert_allclose(
            smoothed(steps, values, half_life), weights @ values / weights.sum(1), rtol=1e-9
        )
    np.testing.assert_allclose(smoothed(steps, np.full(50, 3.0), 7.0), 3.0)  # no bias at the start
    np.testing.assert_array_equal(smoothed(steps, values, 0.0), values)


def test_a_run_in_progress_and_a_resumed_one(tmp_path):
    """A last line that is cut off is left out; a step that was done again counts once."""
    run = read_run(write_run(tmp_path / "cut", cut=True))
    assert run.curves["loss"][0][-1] == 200 and run.curves["val_loss"][0][-1] == 150
    path = write_run(tmp_path / "again")
    with open(path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 150, "loss": 9.0}) + "\n")
    steps, values = read_run(path).curves["loss"]
    assert (np.diff(steps) > 0).all() and values[steps == 150] == 9.0


def test_names_tell_runs_apart(tmp_path):
    assert run_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert run_names(["x/run", "y/run"]) == ["x/run", "y/run"]
    with pytest.raises(PlotError, match="given twice"):
        run_names(["x/run", "x/run"])


def test_what_cannot_be_drawn(tmp_path):
    good, empty, young, broken = (tmp_path / name for name in ("good", "empty", "young", "broken"))
    write_run(good)
    for path in (empty, young, broken):
        path.mkdir()
    (young / "metrics.jsonl").write_text("")
    (broken / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    for path, message in (
        (tmp_path / "nowhere", "no such folder"), (empty, "no metrics.jsonl"),
        (young, "holds no values yet"), (broken, "not a metrics file"),
    ):  # fmt: skip
        with pytest.raises(PlotError, match=message) as error:
            plot(Options((good, path), tmp_path / "x.png"))
        assert str(path) in str(error.value)
    for out, message in (
        ("x.gif2", "use .png, .pdf or .svg"),
        ("x", "without a suffix"),
        ("no/x.png", "no such folder"),
    ):
        with pytest.raises(PlotError, match=message):
            plot(Options((good,), tmp_path / out))
    with pytest.raises(PlotError, match="--smooth -1"):
        plot(Options((good,), tmp_path / "x.png", smooth=-1.0))
    assert not list(tmp_path.glob("*x*"))
