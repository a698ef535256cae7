"""The claims program: files, and errors before any work."""

import json

import pytest

from loki_jax.claims import main


def test_arithmetic_is_written(tmp_path):
    assert main(["arithmetic", "--out", str(tmp_path / "claims")]) == 0
    result = json.loads((tmp_path / "claims" / "arithmetic.json").read_text())
    assert result["parameters"]["at inference"] == 1_772_443_375 and result["seconds"] < 600
    assert (tmp_path / "claims" / "arithmetic.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["estimators"], "--clips and --blendshapes"),
        (["metrics", "--people", "1"], "--people 1"),
        (["metrics", "--clips", "{folder}/none"], "no such folder"),
    ],
)
def test_bad_options_are_one_clear_error(tmp_path, arguments, message, capsys):
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and not (tmp_path / "out").exists()
