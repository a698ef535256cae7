"""Which workdirs a run may continue, and which options are refused at the start; no model runs here."""

import dataclasses
import shutil

import jax
import pytest

from configs import hdtf
from loki_jax.data.reader import open_dataset
from loki_jax.diffusion.schedule import make_schedule
from loki_jax.train import train
from loki_jax.training.checkpoint import load_checkpoint
from loki_jax.training.config import CheckpointError
from loki_jax.training.faults import ExitCode, exit_code
from loki_jax.training.samples import check_sampling
from loki_jax.training.sharding import make_mesh
from loki_jax.training.workdir import clips_digest, describe_run, prepare_workdir, record_start
from tests.training.tiny_run import tiny_config, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def trained(shards, tmp_path):
    """The workdir of a run that has taken a step, as far as its continuation reads it."""
    config, dataset = tiny_config(shards), open_dataset(shards)
    prepare_workdir(tmp_path / "run", config, dataset, dataset.head())
    mesh = make_mesh(1, 1, jax.devices()[:1])
    record_start(tmp_path / "run", describe_run(config, mesh, dataset, 0))
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    return tmp_path / "run"


def test_the_same_clips_elsewhere_are_accepted_and_others_refused(shards, trained, tmp_path):
    config, moved = tiny_config(shards), open_dataset(shutil.copytree(shards, tmp_path / "moved"))
    prepare_workdir(trained, config, moved, moved.head())
    fewer = open_dataset(write_shards(tmp_path / "other", count=3))
    with pytest.raises(CheckpointError, match=f"other clips than {tmp_path}/other holds.*--workdir"):
        prepare_workdir(trained, config, fewer, fewer.head())
    clips = (dataclasses.replace(moved.clips[0], identity="another"), *moved.clips[1:])
    assert clips_digest(dataclasses.replace(moved, clips=clips)) != clips_digest(moved)


def test_a_workdir_whose_checkpoints_are_gone_is_refused(shards, trained):
    (trained / "checkpoints").rmdir()
    config, dataset = tiny_config(shards), open_dataset(shards)
    with pytest.raises(CheckpointError, match=r"checkpoints: missing, but metrics.jsonl"):
        prepare_workdir(trained, config, dataset, dataset.head())
    (trained / "checkpoints").mkdir()
    prepare_workdir(trained, config, dataset, dataset.head())  # ended before its first checkpoint
    (trained / "events.jsonl").write_text('{"step": 2, "time": 0.0, "event": "saved"}\n')
    with pytest.raises(CheckpointError, match=r"checkpoints: empty, but events.jsonl"):
        prepare_workdir(trained, config, dataset, dataset.head())
    (trained / "checkpoints").rmdir()
    (trained / "events.jsonl").unlink()
    # A run that ended before its first step starts again.
    (trained / "metrics.jsonl").write_text("")
    prepare_workdir(trained, config, dataset, dataset.head())


def test_a_cut_config_is_one_clear_error(shards, trained):
    config, dataset = tiny_config(shards), open_dataset(shards)
    stored = (trained / "config.json").read_text()
    wrong = {stored[:200]: "damaged", "{}": "has no model, driver, diffusion", "[]": "damaged"}
    for text, message in wrong.items():
        (trained / "config.json").write_text(text)
        for read in (
            lambda: prepare_workdir(trained, config, dataset, dataset.head()),
            lambda: load_checkpoint(trained),
        ):
            with pytest.raises(CheckpointError, match=f"config.json: .*{message}") as error:
                read()
            assert exit_code(error.value) == ExitCode.ERROR


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("window", 0, "config.window=0: at least 1"),
        ("batch_size", 0, "config.batch_size=0: at least 1"),
        ("sample.steps", 0, "config.sample.steps=0: at least 1"),
        ("sample.steps", 2000, "config.sample: 2000 sampling steps; the schedule has 1000"),
        ("sample.spacing", "typo", "config.sample: unknown spacing 'typo'; one of leading"),
        ("sample.solver", "typo", "config.sample: unknown solver 'typo'; one of ddim, dpm++"),
        ("sample.guidance", float("nan"), "config.sample.guidance=nan is not a finite number"),
        ("sample.pose", "typo", "config.sample.pose='typo': use relative or absolute"),
        ("sample.every", -1, "config.sample.every=-1: at least 0"),
        ("validation.every", -5, "config.validation.every=-5: at least 0"),
    ],
)
def test_options_are_checked_before_anything_is_written(shards, tmp_path, key, value, message):
    config = tiny_config(shards, **{key.replace(".", "__"): value})
    with pytest.raises(ValueError, match=message) as error:
        train(config, tmp_path / "run")
    assert exit_code(error.value) == ExitCode.ERROR and not (tmp_path / "run").exists()


def test_sampling_an_epsilon_model_from_pure_noise_is_refused():
    config = hdtf.get_config()
    schedule = make_schedule(shift_frames=config.diffusion.shift_frames)
    check_sampling(config, schedule)
    config.sample.spacing = "trailing"
    with pytest.raises(ValueError, match="config.sample: epsilon prediction cannot start at step 999"):
        check_sampling(config, schedule)
