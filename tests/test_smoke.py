"""The least that must work under every Python and jax: import, one map, one fit, one training step."""

import numpy as np
import pytest

import loki_jax
from loki_jax.fitting.fit import fit_landmarks
from loki_jax.metrics.hpf import head_pose_follow
from loki_jax.train import train
from loki_jax.training.logging import read_metrics
from tests.fitting.accuracy import FRAME_SIZE, observe, true_clip
from tests.training.tiny_run import tiny_config, write_shards

# The programs of the training tests, which are compiled once.
pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("few_optimizations")]


@pytest.fixture(scope="module")
def head():
    return loki_jax.builtin_head()


def test_every_public_name_imports():
    for name in loki_jax.__all__:
        assert callable(getattr(loki_jax, name))


def test_one_driver_map(head):
    coefficients, camera = true_clip(head, seed=0, frames=2)
    frame = type(coefficients)(*(field[0] for field in coefficients))
    identity = loki_jax.make_identity(head, frame.betas)
    crop = np.array([0, 0, FRAME_SIZE, FRAME_SIZE], np.float32)
    drawn = np.asarray(loki_jax.driver_map(head, identity, frame, camera, crop, 32))
    assert drawn.shape == (32, 32, 45) and np.isfinite(drawn).all() and 0.05 < (drawn != 0).mean() < 0.95


def test_one_fit(head):
    true, camera = true_clip(head, seed=1, frames=4)
    points, confidence = observe(head, true, camera, noise=0.0, seed=0)
    size = (FRAME_SIZE, FRAME_SIZE)
    found = fit_landmarks(head, points, confidence, size, focal=float(camera.intrinsics[0])).coefficients
    assert head_pose_follow(found.rot, true.rot, found.neck, true.neck).absolute_degrees < 1


def test_one_training_step(tmp_path):
    config = tiny_config(write_shards(tmp_path / "shards"), steps=1, driver__arm="full")
    train(config, tmp_path / "run")
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["step"] == 1 and np.isfinite(row["loss"])
