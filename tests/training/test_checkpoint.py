"""What a checkpoint holds, which ones stay, and which are refused; arrays of a few numbers, no model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import demo
from loki_jax.face.asset import save_head
from loki_jax.face.builtin import builtin_head
from loki_jax.training import checkpoint as ckpt
from loki_jax.training.checkpoint import (
    check_fit,
    finishing,
    leaf_shapes,
    load_checkpoint,
    open_manager,
    restore_state,
    save_state,
    saved_steps,
)
from loki_jax.training.config import CheckpointError, NonFiniteError, config_to_json
from loki_jax.training.faults import Preempted
from loki_jax.training.state import create_state


class Position:
    """An iterator as far as a checkpoint sees it."""

    def __init__(self, batches=0):
        self.batches = batches

    def get_state(self):
        return {"batches": self.batches, "unreadable": [3]}

    def set_state(self, state):
        self.batches = state["batches"]


def make_state(width=3, fill=1.0):
    params = {
        "generation": {"dense": {"kernel": jnp.full((2, width), fill)}},
        "reference": {"bias": jnp.zeros(width)},
    }
    return create_state(params, {}, optax.adamw(1e-3), keep_ema=True)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def run_config(**retention):
    config = demo.get_config("tiny")
    for key, value in retention.items():
        config.checkpoint[key] = value
    return config


def save_all(workdir, config, losses):
    manager = open_manager(workdir, config.checkpoint)
    with finishing(manager, agreed=(Preempted,)):
        for step, loss in losses.items():
            save_state(manager, step, make_state(fill=step), Position(step), config, "code 1", (2, 1), loss)


def test_last_regular_and_best_stay(tmp_path):
    config = run_config(keep=2, keep_every=4, keep_best=1)
    losses = {1: 0.5, 2: 0.1, 3: None, 4: 0.3, 5: None, 6: 0.2, 7: 0.4}
    save_all(tmp_path, config, losses)
    assert saved_steps(tmp_path) == [2, 4, 6, 7]
    # The best is remembered by a process that starts later.
    save_all(tmp_path, config, {8: 0.4, 9: 0.05})
    assert saved_steps(tmp_path) == [4, 8, 9]


def test_everything_comes_back_together(tmp_path):
    config = run_config()
    save_all(tmp_path, config, {5: None})
    manager, position = open_manager(tmp_path, config.checkpoint), Position()
    state, run = restore_state(manager, abstract(make_state()), position)
    manager.close()
    assert int(state.step) == 5 and position.batches == 5
    jax.tree.map(np.testing.assert_array_equal, state.params, make_state(fill=5.0).params)
    assert (
        run["skipped"] == 2
        and run["skipped_in_row"] == 1
        and run["code"] == "code 1"
        and run["seed"] == config.seed
    )
    assert run["config"]["model"]["unet"]["channels"] == config.model.unet.channels
    key = jax.random.key_data(jax.random.fold_in(jax.random.key(config.seed), 5))
    assert run["next_key"] == key.tolist()


def test_other_shapes_are_named(tmp_path):
    config = run_config()
    save_all(tmp_path, config, {1: None})
    manager = open_manager(tmp_path, config.checkpoint)
    with pytest.raises(
        CheckpointError, match=r"generation/dense/kernel: \(2, 3\) there, \(2, 4\) in this config"
    ):
        restore_state(manager, abstract(make_state(width=4)), Position())
    manager.close()
    with pytest.raises(CheckpointError, match=r"a: missing there, \(2,\)(.|\n)*b: \(3,\) there, none"):
        check_fit(leaf_shapes({"b": np.zeros(3)}), {"a": np.zeros(2)}, "x")


def test_a_damaged_checkpoint_names_its_folder_and_the_mend(tmp_path):
    config = run_config()
    save_all(tmp_path, config, {1: None, 2: None})
    (tmp_path / "checkpoints" / "2" / "params" / "_METADATA").write_text("{")
    manager = open_manager(tmp_path, config.checkpoint)
    with pytest.raises(CheckpointError, match=r"checkpoints/2(.|\n)*Move .*checkpoints/2 away"):
        restore_state(manager, abstract(make_state()), Position())
    manager.close()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_arrays_that_are_not_finite_are_neither_written_nor_read(tmp_path, monkeypatch, bad):
    config = run_config()
    save_all(tmp_path, config, {1: None})
    state = make_state()
    state = state._replace(ema=jax.tree.map(lambda x: x.at[..., 0].set(bad), state.ema))
    manager = open_manager(tmp_path, config.checkpoint)
    with pytest.raises(NonFiniteError, match="step 2 is not saved: 2 arrays.*ema/generation/dense/kernel"):
        save_state(manager, 2, state, Position(2), config, "code")
    assert saved_steps(tmp_path) == [1]
    # As a version before this check wrote it.
    with monkeypatch.context() as before:
        before.setattr(ckpt, "nonfinite_arrays", lambda tree: [])
        save_state(manager, 2, state, Position(2), config, "code")
        manager.wait_until_finished()
    with pytest.raises(
        CheckpointError, match=r"checkpoints/2: 2 arrays hold NaN(.|\n)*Move .*checkpoints/2 away"
    ):
        restore_state(manager, abstract(make_state()), Position())
    manager.close()
    (tmp_path / "config.json").write_text(config_to_json(config))
    save_head(tmp_path / "head.npz", builtin_head())
    with pytest.raises(CheckpointError, match="checkpoints/2: 2 arrays hold NaN or infinity: generation"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path, use_ema=False).step == 2


@pytest.mark.parametrize("error", [Preempted(1), KeyError("x")])
def test_a_save_under_way_finishes_whatever_ends_the_run(tmp_path, error):
    config = run_config()
    manager = open_manager(tmp_path, config.checkpoint)
    with pytest.raises(type(error)), finishing(manager, agreed=(Preempted,)):
        save_state(manager, 1, make_state(), Position(1), config, "code")
        raise error
    assert saved_steps(tmp_path) == [1]
    assert json.loads((tmp_path / "checkpoints" / "1" / "data" / "metadata").read_text())["batches"] == 1
