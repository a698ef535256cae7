"""Train Loki.

    python -m loki_jax.train --config configs/demo.py --workdir runs/demo --config.data.path=shards

Any key of the config can be given as `--config.key=value`. The same command given again continues a run
from its last checkpoint. The same command runs on one device or on many
processes; docs/training.md says how they find each other, what the workdir holds, and the exit codes.

The loop's order matters: take the batch of step n, do the step, then save parameters, optimiser, moving
average and the iterator (right after batch n) together. A step's randomness is derived from the seed and
n. So a resumed run repeats an undisturbed one exactly.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict, config_flags

from loki_jax.compile_cache import enable_compile_cache
from loki_jax.networks import build_networks
from loki_jax.stores import StoreError
from loki_jax.training import checkpoint as ckpt
from loki_jax.training.config import NonFiniteError, check_config, config_arguments, upgrade_config
from loki_jax.training.distributed import ClusterError, find_cluster, join, on_tpu_vm, wait_for_all
from loki_jax.training.faults import Preempted, StopRequest, Watchdog, leave
from loki_jax.training.flops import chip_of, work_of
from loki_jax.training.init import initial_params, sharded_state
from loki_jax.training.inputs import open_inputs, start_reading
from loki_jax.training.logging import (
    MetricWriter,
    Progress,
    log,
    log_duration,
    peak_memory,
    progress_line,
)
from loki_jax.training.monitor import Anomaly, StepMonitor, window_names
from loki_jax.training.remote import copy_to_bucket, open_workdir
from loki_jax.training.samples import check_sampling, make_pairs, make_sampler, write_samples
from loki_jax.training.sharding import global_batch, make_mesh, put_global
from loki_jax.training.snapshot import write_snapshot
from loki_jax.training.state import make_optimizer
from loki_jax.training.step import make_eval_step, make_train_step
from loki_jax.training.workdir import code_version, describe_run, prepare_workdir, record_start

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/demo.py.")
flags.DEFINE_string("workdir", None, "Folder of the run: config, checkpoints, metrics.")
flags.DEFINE_bool("distributed", False, "Stop unless the environment names other processes to join.")
flags.DEFINE_string("coordinator", None, "host:port of process 0, where the environment does not tell.")
flags.DEFINE_integer("processes", None, "How many processes there are; with --coordinator.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0; with --coordinator.")


def train(config: ConfigDict, workdir: Path) -> float:
    """Run `config` to its last step in `workdir` and return the last training loss.

    Raises:
      DatasetError, HeadAssetError, CheckpointError, ValueError: the input does not fit; nothing is written.
      NonFiniteError: too many updates in a row were skipped (a debug snapshot is written), the last ones
        were, or the state is not finite (it is not saved).
      Preempted: the process was asked to stop; a checkpoint is saved.
    """
    lead = jax.process_index() == 0

    # ------------------------------------------------------------------------------------ data
    check_config(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    with log_duration("opening the data", lead):
        dataset, windows, held_out = open_inputs(config, mesh)
        iterator = start_reading(config, windows, mesh)
        head = dataset.head()

    # ------------------------------------------------------------------------- model and state
    networks, optimizer = build_networks(config, head), make_optimizer(config)
    check_sampling(config, networks.schedule)
    with log_duration("making the networks' first parameters", lead):
        # A resumed run needs neither the weights it started from nor their memory.
        initial = None if ckpt.saved_steps(workdir) else initial_params(config, networks, head)
        abstract, shardings, unsharded = sharded_state(config, networks, optimizer, mesh)
    prepare_workdir(workdir, config, dataset, head)
    writer = MetricWriter(workdir, lead)
    count = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in abstract.params.items()}
    log(f"mesh {dict(mesh.shape)}, {jax.process_count()} processes, trained parameters {count}", lead)
    for name, shape in unsharded:
        log(f"not sharded: {name} {shape}", lead)
    manager, recorded = ckpt.open_manager(workdir, config.checkpoint), set(ckpt.saved_steps(workdir))
    with log_duration("making the state of the run", lead):
        if initial is None:
            state, run = ckpt.restore_state(manager, abstract, iterator)
            first, skipped = run["step"], (run["skipped"], run.get("skipped_in_row", 0))
            log(f"resumed from step {first}", lead)
        else:
            state = ckpt.start(workdir, initial, optimizer, shardings, config.ema_decay > 0)
            first, skipped = 0, (0, 0)
    del initial
    code = code_version()
    if lead:
        record_start(workdir, describe_run(config, mesh, dataset, first))
    copy_to_bucket(workdir)
    writer.event(first, "start", code=code, devices=jax.device_count(), processes=jax.process_count())
    monitor = StepMonitor(config.faults, *skipped)
    if first >= config.steps:
        log(f"nothing to do: config.steps={config.steps}", lead)
        monitor.check_end()
        return float("nan")

    # --------------------------------------------------------------------------------- compile
    everywhere = NamedSharding(mesh, PartitionSpec())
    device_head = put_global(head, jax.tree.map(lambda _: everywhere, head))
    validation = [global_batch(batch, mesh) for batch in held_out]
    options = (config.sample.pairs, head, dataset, config.sample.pose, mesh, config.driver.neck)
    pairs = None
    if validation and config.sample.every > 0:
        pairs = make_pairs(validation[0], *options, config.history.frames)
    sample = make_sampler(config, networks, mesh)
    eval_step = jax.jit(make_eval_step(config, networks, mesh))
    train_step = jax.jit(
        make_train_step(config, networks, optimizer, mesh), donate_argnums=0, out_shardings=(shardings, None)
    )
    with log_duration("compiling the train step", lead):
        traced = train_step.trace(state, global_batch(windows[0], mesh), device_head)
        train_step = traced.lower().compile()
    wait_for_all("compiled")
    flops, chip = work_of(traced.jaxpr).model, chip_of(jax.devices()[0].device_kind)
    peak = f"{chip.name}, {chip.flops:.3g} FLOP/s" if chip else "no peak known, so no MFU"
    log(f"{flops:.3g} FLOP a step; chip: {peak}", lead)

    # ------------------------------------------------------------------------------------ loop
    progress = Progress(first, config.steps, config.batch_size, flops, chip and chip.flops * mesh.size)
    watchdog = Watchdog(float(config.faults.hang_seconds), float(config.faults.slow_seconds))
    averaged = lambda state: (state.params if state.ema is None else state.ema) | state.frozen
    due = lambda step, every: every > 0 and (step % every == 0 or step == config.steps)
    loss = float("nan")

    def report(anomalies: list[Anomaly]) -> None:
        for anomaly in anomalies:
            names = window_names(anomaly.batch, dataset.clips)
            log(f"{anomaly}; windows (clip, frame, reference): {[tuple(n.values()) for n in names]}", lead)
            writer.event(anomaly.step, anomaly.kind, **anomaly.figures, windows=names)
            if monitor.stuck and anomaly.kind == "skipped":
                folder = write_snapshot(workdir, anomaly, state, config, head, names)
                raise NonFiniteError(
                    f"{monitor.in_row} updates in a row were not finite, the last of step {anomaly.step}. "
                    f"Look into it with: python -m loki_jax.replay {folder}"
                )

    def record_saved() -> None:
        for saved in sorted(set(ckpt.saved_steps(workdir)) - recorded):
            recorded.add(saved)
            writer.event(saved, "saved")

    with contextlib.ExitStack() as stack:
        stack.callback(copy_to_bucket, workdir)
        stack.callback(writer.close)
        stack.callback(record_saved)
        stack.callback(watchdog.stop)
        stack.callback(iterator.close)
        stack.enter_context(ckpt.finishing(manager, agreed=(Preempted, NonFiniteError)))
        request = stack.enter_context(StopRequest())
        early = stack.enter_context(contextlib.ExitStack())
        if config.log.every > 0:
            early.enter_context(log_duration("steps before the first report", lead))
        for step in range(first + 1, config.steps + 1):
            with progress.waiting():
                batch = next(iterator)
            state, metrics = train_step(state, batch, device_head)
            report(monitor.follow(step, batch, metrics))
            watchdog.beat()

            if due(step, config.log.every):
                report(monitor.finish())
                manager.check_for_errors()  # of a save under way, long before the next one
                record_saved()
                values = monitor.means() | progress.report(step) | peak_memory()
                loss = values.get("loss", loss)
                writer.scalars(step, values)
                early.close()
                log(progress_line(step, config.steps, values), lead)

            val_loss = None
            if validation and due(step, config.validation.every):
                with watchdog.slow(), log_duration(f"step {step} validation", lead):
                    each = [
                        eval_step(averaged(state), {}, b, device_head, i) for i, b in enumerate(validation)
                    ]
                    val_loss = float(np.mean([float(x) for x in each]))
                writer.scalars(step, {"val_loss": val_loss})
                log(f"step {step} validation loss {val_loss:.4f}", lead)

            stop = request.reached(step)
            if stop or due(step, config.checkpoint.every):
                report(monitor.finish())
                skipped = (monitor.skipped, monitor.in_row)
                with watchdog.slow():  # waits for the write before
                    ckpt.save_state(manager, step, state, iterator, config, code, skipped, val_loss)
                    try:
                        copy_to_bucket(workdir)
                    except StoreError as error:
                        log(f"step {step}: {error}; tried again after the next checkpoint")
            if stop:
                manager.wait_until_finished()
                writer.event(step, "stopped", reason="asked to stop")
                raise Preempted(step)

            # After the checkpoint: pictures must not stop a run.
            if pairs is not None and due(step, config.sample.every):
                try:
                    with watchdog.slow(), log_duration(f"step {step} samples", lead):
                        frames = sample(averaged(state), device_head, pairs)
                        if lead:
                            write_samples(writer, workdir, step, pairs, frames, head, dataset, config)
                except Exception as error:
                    if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
                        raise  # another process may be gone
                    log(f"step {step}: no samples ({type(error).__name__}: {error}); training goes on")
                    writer.event(step, "no samples", error=repr(error))
        report(monitor.finish())
        monitor.check_end()
    return loss


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    # Orbax and TFDS report every file they open; the progress lines are ours.
    logging.set_verbosity(logging.WARNING)
    enable_compile_cache()
    config = ConfigDict(upgrade_config(FLAGS.config.to_dict()))
    workdir = Path(FLAGS.workdir)
    if config.deterministic:
        # Read when jax first looks for devices, which is later than here.
        flag = "--xla_gpu_deterministic_ops=true"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    try:
        cluster = find_cluster(os.environ, FLAGS.coordinator, FLAGS.processes, FLAGS.process_id, on_tpu_vm())
        if FLAGS.distributed and cluster is None:
            raise ClusterError(
                "--distributed: nothing in the environment names other processes (docs/training.md)"
            )
        join(cluster)
        workdir = open_workdir(FLAGS.workdir)
        train(config, workdir)
    except Exception as error:
        leave(error, workdir)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    sys.argv = config_arguments(sys.argv)  # config_flags reads it, too
    app.run(main)
