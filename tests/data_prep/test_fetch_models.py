"""`python -m data_prep.fetch_models` and its old name."""

import runpy
import sys

import pytest


@pytest.mark.parametrize("program", ["fetch_models", "landmarker"])
def test_both_names_run_the_program(monkeypatch, tmp_path, capsys, program):
    wheel = tmp_path / "no.whl"
    monkeypatch.setattr(sys, "argv", [program, "--wheel", str(wheel), "--cache", str(tmp_path / "cache")])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"data_prep.{program}", run_name="__main__")
    assert end.value.code == 1 and str(wheel) in capsys.readouterr().err
