"""Config files are found from any folder, and configs of older versions are read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs import demo
from loki_jax.training.checkpoint import load_checkpoint
from loki_jax.training.config import (
    RENAMED,
    config_arguments,
    config_differences,
    config_from_json,
    config_to_json,
    upgrade_config,
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
SHOW = """
import sys
from absl import app, flags
from ml_collections import config_flags
from loki_jax.training.config import config_arguments
config = config_flags.DEFINE_config_file("config")
sys.argv = config_arguments(sys.argv)
app.run(lambda _: print(config.value.batch_size, config.value.grad_accum_steps))
"""


def show(folder, package, *arguments):
    """What a program in `folder` prints of its config, with the package of another folder."""
    environment = os.environ | {"PYTHONPATH": f"{package}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", SHOW, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what a wheel holds: no checkout around it."""
    site = tmp_path_factory.mktemp("site")
    build = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(site / "b"),
        "--build-lib",
        str(site),
    ]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return site


def test_a_config_of_the_clone_from_any_folder(tmp_path):
    shown = show(tmp_path, ROOT, "--config", f"{ROOT}/configs/demo.py:tiny", "--config.batch_size=6")
    assert shown.stdout.split() == ["6", "1"], shown.stderr


def test_configs_come_with_an_installed_package(installed, tmp_path):
    assert (installed / "configs" / "hdtf.py").is_file()
    shown = show(tmp_path, installed, "--config=configs/ablations.py:no_posenc")
    assert shown.stdout.split() == ["16", "1"], shown.stderr


def test_a_copied_and_edited_config(installed, tmp_path):
    # Beside other files in a folder of the same name, which must not hide the package's.
    (tmp_path / "configs").mkdir()
    mine = tmp_path / "configs" / "mine.py"
    shutil.copy(ROOT / "configs" / "talkvid.py", mine)
    mine.write_text(mine.read_text().replace("config.data.workers = 8", "config.batch_size = 24"))
    for package in (ROOT, installed):
        shown = show(tmp_path, package, "--config", "configs/mine.py:zero_snr")
        assert shown.stdout.split() == ["24", "1"], shown.stderr


def test_old_names_of_keys_work_and_are_noted(tmp_path):
    for spelling in (["--config.accumulate=2"], ["-config.accumulate", "2"]):
        shown = show(tmp_path, ROOT, "--config", "configs/demo.py", *spelling)
        assert shown.stdout.split() == ["4", "2"], shown.stderr
        assert "note: config.accumulate is now config.grad_accum_steps" in shown.stderr
    untouched = ["train", "--workdir=accumulate", "--config.data.path=accumulate"]
    assert config_arguments(untouched) == untouched


def test_stored_configs_of_older_versions_are_read():
    config = demo.get_config()
    stored = json.loads(config_to_json(config))
    assert stored.pop("config_version") == 2
    del stored["history"], stored["grad_accum_steps"]
    del stored["sample"]["solver"], stored["diffusion"]["max_beta"]
    old = stored | {"accumulate": 4}
    read = config_from_json(json.dumps(old))
    assert read.grad_accum_steps == 4 and "accumulate" not in read
    assert config_differences(config, read) == []  # the number of microbatches does not bind a run
    # A key that the older version lacks has its default, and the run can be continued with no other value.
    assert (read.history.frames, read.sample.solver, read.diffusion.max_beta) == (0, "ddim", 0.99)
    config.diffusion.max_beta = 1.0
    assert config_differences(config, read) == ["diffusion.max_beta: 0.99 -> 1.0"]
    assert config_from_json(config_to_json(config)).to_dict() == config.to_dict()
    assert upgrade_config({"accumulate": 2, "grad_accum_steps": 1})["grad_accum_steps"] == 2
    assert not RENAMED.keys() & config.keys()


def test_the_shipped_model_is_read():
    config = load_checkpoint("demo").config
    assert not RENAMED.keys() & config.keys() and config.driver.arm == "full"
