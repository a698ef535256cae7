"""Which workdirs a run may continue; no model runs here."""

import dataclasses
import shutil

import jax
import pytest

from benchmarks.tiny_run import tiny_config, write_shards
from loki_jax.data.reader import open_dataset
from loki_jax.training.config import CheckpointError
from loki_jax.training.sharding import make_mesh
from loki_jax.training.workdir import clips_digest, describe_run, prepare_workdir, record_start


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
    # A run that ended before its first step starts again.
    (trained / "metrics.jsonl").write_text("")
    prepare_workdir(trained, config, dataset, dataset.head())
