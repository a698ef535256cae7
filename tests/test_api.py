"""The public interface: what docs/api.md shows exists and runs, and imports stay light."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import loki_jax
from loki_jax.video import is_tagged_synthetic, read_video
from tests.synthetic.synthetic_clips import write_clips

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text()


def test_every_public_name_exists_and_is_documented():
    documented = set(re.findall(r"\b\w+", " ".join(re.findall(r"^\| `.*", PAGE, re.MULTILINE))))
    for name in loki_jax.__all__:
        assert name in documented, f"docs/api.md does not list {name}"
        assert callable(getattr(loki_jax, name)) and name in dir(loki_jax)
    assert set(re.findall(r"\bloki_jax\.(\w+)\(", PAGE)) <= set(loki_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        loki_jax.nothing  # noqa: B018


def test_the_example_runs(tmp_path, monkeypatch):
    write_clips(tmp_path / "shards", frames=9, seed=0)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(compile(example, "docs/api.md", "exec"), names)
    assert names["frames"].shape == (9, 64, 64, 3) and names["frames"].dtype == np.uint8
    assert names["maps"].shape == (9, 64, 64, 45) and names["pose"].degrees < 0.01
    assert read_video("out.mp4").frames.shape == (9, 64, 64, 3) and is_tagged_synthetic("out.mp4")
    # The same seed gives the same frames, in windows too.
    windows = names["pipeline"].windows(names["portrait"], names["clip"], steps=4, guidance=1.5, seed=1)
    np.testing.assert_array_equal(np.concatenate([window.frames for window in windows]), names["frames"])


@pytest.mark.slow
def test_the_notebook_runs(landmarker, tmp_path, monkeypatch):
    """The cells of examples/quickstart.ipynb, one after another; it uses public names alone."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = {}
    for number, source in enumerate(sources):
        exec(compile(source, f"cell {number}", "exec"), names)
    frames, smiling = names["frames"], names["smiling"]
    assert frames.shape == smiling.shape == (16, 512, 512, 3) and is_tagged_synthetic("quickstart.mp4")
    assert np.abs(frames[-1].astype(int) - frames[0]).mean() > 1
    assert np.abs(frames[-1].astype(int) - smiling[-1]).mean() > 1
    assert names["hpf"] < 0.01
    used = re.findall(r"\bloki_jax\.(?!video\b)(\w+)", "\n".join(sources))
    assert used and set(used) <= set(loki_jax.__all__)


def test_options_out_of_range_are_errors():
    pipeline = loki_jax.LokiPipeline.from_checkpoint("demo")
    for options, message in (
        ({"steps": 0}, "steps is 0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"mode": "sideways"}, "mode is 'sideways'"),
        ({"steps": 1001}, "1001 sampling steps"),
        ({"solver": "euler"}, "unknown solver 'euler'"),
        ({"overlap": 5}, "overlap is 5, expected 0 to 4"),
        ({"overlap": -1}, "overlap is -1"),
        ({"windows_at_once": 0}, "windows_at_once is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.sampling(**options)


@pytest.mark.parametrize("module", ["", ".animate", ".app", ".demo", ".evaluate", ".live"])
def test_imports_are_light(module):
    heavy = "{'jax', 'flax', 'orbax', 'av', 'matplotlib', 'tensorflow_datasets', 'numpy'}"
    program = f"import sys, loki_jax{module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
