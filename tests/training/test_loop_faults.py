"""The real training program under injected faults: right message, right exit code, last checkpoint whole."""

import json
import resource
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from loki_jax.data.schema import DatasetError
from loki_jax.face.builtin import builtin_head
from loki_jax.networks import build_networks, draw_params
from loki_jax.train import train
from loki_jax.training.checkpoint import load_checkpoint, restore_as_numpy, saved_steps
from loki_jax.training.config import CheckpointError, NonFiniteError
from loki_jax.training.faults import ExitCode, exit_code
from loki_jax.training.init import initial_params
from loki_jax.training.logging import read_metrics
from loki_jax.training.snapshot import read_snapshot, replay
from loki_jax.video.reader import read_video
from tests.training.processes import ONE, Topology, free_port, losses, start
from tests.training.tiny_run import environment, tiny_config, train_command, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def started(shards, tmp_path_factory):
    """A workdir with a checkpoint after step 2; copy it."""
    workdir = tmp_path_factory.mktemp("started") / "run"
    train(tiny_config(shards, steps=2), workdir)
    return workdir


@pytest.fixture
def workdir(started, tmp_path):
    return shutil.copytree(started, tmp_path / "run")


def cache():
    """Where this process keeps compiled programs, for those it starts."""
    return jax.config.jax_compilation_cache_dir or ""


def test_updates_that_are_not_finite_are_skipped_and_then_stop_the_run(tmp_path, capsys):
    shards = write_shards(tmp_path / "shards", latents=np.inf)
    config = tiny_config(shards, steps=9, checkpoint__every=1, faults__max_skips=3)
    with pytest.raises(NonFiniteError, match="3 updates in a row.*step 3.*loki_jax.replay") as error:
        train(config, tmp_path / "run")
    assert exit_code(error.value) == ExitCode.NOT_FINITE
    logged = capsys.readouterr().err
    assert all(f"step {step}: update skipped" in logged for step in (1, 2, 3)) and "'clip" in logged
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    skipped = [event for event in events if event["event"] == "skipped"]
    assert [event["step"] for event in skipped] == [1, 2, 3]
    assert all(len(event["windows"]) == config.batch_size for event in skipped)
    # Nothing has moved, in the parameters, their average and the optimiser.
    stored = load_checkpoint(tmp_path / "run", use_ema=False)
    assert saved_steps(tmp_path / "run") == [1, 2] and stored.step == 2
    start = initial_params(config, build_networks(config, stored.head), stored.head)[0]
    for use_ema in (True, False):
        params = load_checkpoint(tmp_path / "run", use_ema).params
        jax.tree.map(np.testing.assert_array_equal, dict(params)["generation"], start["generation"])
    moments = restore_as_numpy(tmp_path / "run" / "checkpoints" / "2" / "optimizer")
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(moments))
    # The snapshot has the batch and what the step saw.
    snapshot = read_snapshot(tmp_path / "run" / "snapshots" / "3")
    assert snapshot.step == 3 and snapshot.info["windows"] == skipped[-1]["windows"]
    assert np.isinf(np.asarray(snapshot.batch.latent_mean, np.float32)).all()
    jax.tree.map(np.testing.assert_array_equal, snapshot.params["trained"]["generation"], start["generation"])
    (tmp_path / "run" / "snapshots" / "3" / "snapshot.json").unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        read_snapshot(tmp_path / "run" / "snapshots" / "3")


def test_skipped_last_updates_are_an_error_at_the_end_and_again(tmp_path):
    shards = write_shards(tmp_path / "shards", latents=np.inf)
    config = tiny_config(shards, steps=1, checkpoint__every=1)
    for _ in range(2):  # the second time there is nothing to do
        with pytest.raises(NonFiniteError, match="the last 1 updates were skipped") as error:
            train(config, tmp_path / "run")
        assert exit_code(error.value) == ExitCode.NOT_FINITE
    assert saved_steps(tmp_path / "run") == [1]
    # Skipped updates count on after a restart.
    config.steps, config.faults.max_skips = 3, 2
    with pytest.raises(NonFiniteError, match="2 updates in a row.*step 2"):
        train(config, tmp_path / "run")


def test_an_error_in_sampling_is_logged_and_training_goes_on(tmp_path, monkeypatch, capsys):
    def fail(*args):
        assert saved_steps(tmp_path / "run") or list((tmp_path / "run" / "checkpoints").iterdir())
        raise RuntimeError("no memory left")

    # The real sampler is too dear to fail on purpose.
    monkeypatch.setattr("loki_jax.train.make_sampler", lambda *_: fail)
    shards = write_shards(tmp_path / "shards")
    train(tiny_config(shards, steps=2, checkpoint__every=1, sample__every=1), tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [1, 2]
    logged = capsys.readouterr().err
    assert "step 1: no samples (RuntimeError: no memory left); training goes on" in logged
    assert "compiling the train step took" in logged and "step 1 samples took" in logged
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "no samples"] == [1, 2]
    assert [event["step"] for event in events if event["event"] == "saved"] == [1, 2]


@pytest.mark.slow
def test_a_snapshot_replays_the_step(tmp_path):
    shards = write_shards(tmp_path / "shards", latents=np.inf)
    with pytest.raises(NonFiniteError):
        train(tiny_config(shards, steps=2, faults__max_skips=1), tmp_path / "run")
    found = replay(read_snapshot(tmp_path / "run" / "snapshots" / "1"))
    assert not np.isfinite(found["loss"]) and found["gradients"]
    assert any(line.startswith("latent_mean of window 0: {'clip'") for line in found["batch"])


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(shards, workdir):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses to let any file grow beyond this, as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(Exception) as error:  # noqa: B017, PT011 (what it is called is Orbax's business)
            train(tiny_config(shards, steps=4), workdir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert exit_code(error.value) == ExitCode.STORAGE, repr(error.value)
    assert saved_steps(workdir) == [2]
    train(tiny_config(shards, steps=4), workdir)
    assert load_checkpoint(workdir).step == 4


def test_an_unreadable_shard_stops_the_run_and_leaves_the_last_checkpoint(shards, workdir, tmp_path):
    broken = shutil.copytree(shards, tmp_path / "shards")
    shard = next(broken.glob("loki-train*"))
    content = bytearray(shard.read_bytes())
    content[100:-100] = bytes(len(content) - 200)
    shard.write_bytes(content)
    with pytest.raises(DatasetError, match=shard.name) as error:
        train(tiny_config(broken, steps=4, data__max_corrupt_share=0.0), workdir)
    assert exit_code(error.value) == ExitCode.DATA
    shard.write_bytes(content[:200])
    with pytest.raises(DatasetError, match=shard.name):
        train(tiny_config(broken, steps=4), workdir)
    assert load_checkpoint(workdir).step == 2


def test_a_checkpoint_of_another_architecture_is_refused(shards, workdir):
    config = tiny_config(shards, steps=4)
    config.model.unet.channels = 32
    # As if the same config built another network, in another version of the code.
    (workdir / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"another architecture(.|\n)*\(3, 3, \d+, 16\) there, \(3, 3, \d+, 32\)"
    ):
        train(config, workdir)


def read_until(process, wanted):
    for line in process.stderr:
        if line.startswith(wanted):
            return
    raise AssertionError(f"ended with {process.wait()} before {wanted!r}")


def test_sigterm_saves_and_resumes_where_it_was(shards, workdir):
    command = train_command(tiny_config(shards, steps=10**6, checkpoint__every=10**6), workdir)
    process = subprocess.Popen(command, env=environment(cache()), stderr=subprocess.PIPE, text=True)
    read_until(process, "step 5/")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait() == ExitCode.PREEMPTED, rest
    assert time.monotonic() - began < 30
    last = saved_steps(workdir)[-1]
    assert last >= 5 and f"saved after step {last}" in rest
    train(tiny_config(shards, steps=last + 1), workdir)
    assert saved_steps(workdir)[-1] == last + 1
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, last + 2))  # none lost, none repeated


def start_two(shards, workdir, tmp_path):
    config = tiny_config(shards, steps=10**6, checkpoint__every=10**6)
    port = free_port()
    return [
        subprocess.Popen(
            train_command(
                config, workdir, f"--coordinator=localhost:{port}", "--processes=2", f"--process_id={i}"
            ),
            env=environment(tmp_path / "cache"), stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_after_one_step(shards, tmp_path):
    processes = start_two(shards, tmp_path / "run", tmp_path)
    read_until(processes[0], "step 3/")
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [ExitCode.PREEMPTED] * 2, outputs
    last = saved_steps(tmp_path / "run")[-1]
    assert all(f"saved after step {last}" in output for output in outputs)


@pytest.mark.slow
def test_a_process_whose_partner_is_gone_ends(shards, tmp_path):
    processes = start_two(shards, tmp_path / "run", tmp_path)
    read_until(processes[0], "step 3/")
    processes[1].kill()
    output = processes[0].communicate(timeout=200)[1]
    assert processes[0].returncode == ExitCode.LOST_PROCESS, output
    assert "same command" in output


@pytest.mark.slow
def test_two_processes_share_frozen_parameters_and_resume_from_the_workdir(shards, tmp_path):
    options = dict(
        steps=2, pretrained=str(tmp_path / "sd"), model__reference__trainable=False,
        model__reference__driver=False, model__reference__context_dim=8, sharding_min_size=64,
    )  # fmt: skip
    config = tiny_config(shards, **options)
    params = draw_params(build_networks(config, builtin_head()), jax.random.key(7))
    backbone = {key: params[key] for key in ("reference", "autoencoder", "null_prompt")}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "sd", backbone)
    train(config, tmp_path / "one")
    two = tiny_config(shards, **options, mesh__data=1, mesh__fsdp=2)
    topology = Topology(2, 1, "fsdp")
    start(train_command(two, tmp_path / "two"), topology, tmp_path / "cache")
    shutil.rmtree(tmp_path / "sd")
    config.steps = two.steps = 3
    train(config, tmp_path / "one")
    start(train_command(two, tmp_path / "two"), topology, tmp_path / "cache")
    one, two = (load_checkpoint(tmp_path / name, use_ema=False) for name in ("one", "two"))
    assert one.step == two.step == 3
    for key in ("reference", "null_prompt"):
        jax.tree.map(np.testing.assert_array_equal, one.params[key], two.params[key])
        jax.tree.map(np.testing.assert_array_equal, one.params[key], jax.device_get(backbone[key]))
    found = [losses(tmp_path / name) for name in ("one", "two")]
    assert len(found[0]) == 3
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_two_processes_train_validate_sample_and_save(shards, tmp_path):
    """A run of a few seconds through everything that processes do together; slow tests compare with one."""
    every = dict.fromkeys(("validation__every", "sample__every", "checkpoint__every"), 3)
    config = tiny_config(
        shards, steps=3, sharding_min_size=64, sample__pairs=2, mesh__data=1, mesh__fsdp=2, **every
    )
    start(train_command(config, tmp_path / "run"), Topology(2, 1, "fsdp"), tmp_path / "cache")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert all(np.isfinite(row.get("loss", row.get("val_loss"))) for row in rows)
    assert any("val_loss" in row for row in rows)
    assert len(read_video(tmp_path / "run" / "samples" / "00000003.mp4").frames) == config.window
    assert load_checkpoint(tmp_path / "run").step == 3


@pytest.mark.slow
def test_two_processes_validate_and_sample_as_one_does(tmp_path):
    shards = write_shards(tmp_path / "shards", count=6)
    options = dict(
        steps=2, batch_size=4, sharding_min_size=64, validation__every=2, sample__every=2, sample__pairs=2
    )
    start(train_command(tiny_config(shards, **options), tmp_path / "one"), ONE, tmp_path / "cache")
    start(
        train_command(tiny_config(shards, **options, mesh__data=1, mesh__fsdp=2), tmp_path / "two"),
        Topology(2, 1, "fsdp"), tmp_path / "cache",
    )  # fmt: skip
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    values = [[row.get("loss", row.get("val_loss")) for row in side] for side in rows]
    assert len(values[0]) == 3
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
    one, two = (
        read_video(tmp_path / name / "samples" / "00000002.mp4").frames.astype(int) for name in ("one", "two")
    )
    assert one.std() > 1 and np.abs(one - two).mean() < 1
