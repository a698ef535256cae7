"""Train Loki.

    python -m loki_jax.train --config configs/demo.py --workdir runs/demo --config.data.path=shards

Any key of the config can be given as `--config.key=value`. A run that stopped goes on from its last
checkpoint when the same command is given again.

The loop's order matters: the batch of step n is taken, the step is done, then parameters, optimiser,
moving average and the iterator (which stands right after batch n) are saved together. A step's
randomness is folded from the seed and n. So a resumed run repeats an undisturbed one exactly.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_flags

from loki_jax.data.pipeline import iterate, make_dataset, make_validation_dataset
from loki_jax.data.records import DatasetError, open_dataset
from loki_jax.head.asset import HeadAssetError
from loki_jax.networks import build_networks
from loki_jax.training import checkpoint as ckpt
from loki_jax.training.logging import MetricWriter, Progress, duration, say
from loki_jax.training.samples import make_sampler, sample_sheet, take_windows
from loki_jax.training.sharding import global_batch, make_mesh, tree_shardings
from loki_jax.training.state import create_state, make_optimizer
from loki_jax.training.step import check_config, initial_params, make_eval_step, make_train_step

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/demo.py.")
flags.DEFINE_string("workdir", None, "Folder of the run: config, checkpoints, metrics.")
flags.DEFINE_bool("distributed", False, "Join the other processes of the cluster (jax.distributed).")


def train(config, workdir: Path) -> float:
    """Run `config` to its last step in `workdir` and return the last training loss.

    Raises:
      DatasetError, HeadAssetError, CheckpointError, ValueError: the input does not fit; nothing is written.
      FloatingPointError: the loss is not finite; names the step.
    """
    lead = jax.process_index() == 0

    # ----------------------------------------------------------------------------------- input
    check_config(config)
    if not config.data.path:
        raise DatasetError("config.data.path is empty: give --config.data.path=DIR, the folder with dataset_info.json")
    dataset = open_dataset(config.data.path)
    if dataset.metadata.image_size != config.image_size:
        raise DatasetError(
            f"{config.data.path}: frames of {dataset.metadata.image_size} pixels, the config wants "
            f"{config.image_size}. Rebuild with --size {config.image_size} or set --config.image_size."
        )
    if config.batch_size % jax.device_count():
        raise ValueError(f"config.batch_size={config.batch_size} is not divisible by {jax.device_count()} devices")
    source = dict(
        path=config.data.path, window=config.window, batch=config.batch_size, seed=config.seed,
        process_index=jax.process_index(), process_count=jax.process_count(), cache_bytes=config.data.cache_mb * 2**20,
        max_corrupt_share=config.data.max_corrupt_share,
    )
    has_latents = dataset.metadata.latent_shape is not None
    windows = make_dataset(**source, fixed_reference=config.data.fixed_reference, with_images=not has_latents)
    iterator = iterate(windows, config.data.workers, config.data.threads, prefetch=2 * config.data.threads)
    held_out = []
    if dataset.clips_of("validation"):
        held_out = list(itertools.islice(iterate(make_validation_dataset(**source)), config.validation.batches))

    # ------------------------------------------------------------------------- model and state
    head = dataset.head()
    networks = build_networks(config, head)
    optimizer = make_optimizer(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    params, frozen = initial_params(config, networks, head)
    state = create_state(params, frozen, optimizer, keep_ema=config.ema_decay > 0)
    del params, frozen
    shardings, unsharded = tree_shardings(state, mesh, config.sharding_rules, config.sharding_min_size)
    state = jax.device_put(state, shardings)

    ckpt.prepare_workdir(workdir, config, head)
    ckpt.save_frozen(workdir, state.frozen)
    writer = MetricWriter(workdir, lead)
    count = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in state.params.items()}
    say(f"mesh {dict(mesh.shape)}, trained parameters {count}", lead)
    for name, shape in unsharded:
        say(f"not sharded: {name} {shape}", lead)

    train_step = jax.jit(
        make_train_step(config, networks, optimizer, mesh), donate_argnums=0,
        out_shardings=(shardings, None),
    )
    eval_step = jax.jit(make_eval_step(config, networks, mesh))
    sample = make_sampler(config, networks)
    head = jax.device_put(head, NamedSharding(mesh, PartitionSpec()))
    validation = [global_batch(batch, mesh) for batch in held_out]
    pairs = take_windows(held_out[0], config.sample.pairs) if held_out and lead else None

    # --------------------------------------------------------------------------------- restore
    manager = ckpt.open_manager(workdir, config.checkpoint.every, config.checkpoint.keep)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored = ckpt.restore_state(manager, abstract._replace(frozen=state.frozen), iterator)
    first = 0
    if restored is not None:
        state, iterator = restored
        state = jax.device_put(state, shardings)
        first = int(state.step)
        say(f"resumed from step {first}", lead)

    # ------------------------------------------------------------------------------------ loop
    progress = Progress(first, config.steps)
    losses, loss = [], float("nan")
    for step in range(first + 1, config.steps + 1):
        began = time.monotonic()
        batch = next(iterator)
        progress.waiting(time.monotonic() - began)
        state, metrics = train_step(state, global_batch(batch, mesh), head)
        losses.append(metrics)

        if _due(step, config.log.every, config.steps):
            means = {k: float(np.mean([m[k] for m in losses])) for k in jax.device_get(losses[-1])}
            losses, loss = [], means["loss"]
            if not np.isfinite(loss):
                raise FloatingPointError(f"loss is {loss} within the {config.log.every} steps before step {step}")
            figures = progress.report(step)
            writer.scalars(step, means | figures)
            say(
                f"step {step}/{config.steps} loss {loss:.4f} {figures['steps_per_s'] * config.batch_size:.2f} clips/s "
                f"data wait {figures['data_wait']:.0%} left {duration(figures['eta_s'])}", lead,
            )
        if validation and _due(step, config.validation.every, config.steps):
            trained = state.ema if state.ema is not None else state.params
            values = [float(eval_step(trained, state.frozen, b, head, i)) for i, b in enumerate(validation)]
            writer.scalars(step, {"val_loss": float(np.mean(values))})
            say(f"step {step} validation loss {np.mean(values):.4f}", lead)
        if pairs is not None and _due(step, config.sample.every, config.steps):
            trained = state.ema if state.ema is not None else state.params
            frames = np.asarray(sample(trained | state.frozen, head, pairs))
            picture = sample_sheet(np.asarray(pairs["reference"]), np.asarray(pairs["frames"]), frames)
            writer.image(step, "samples", picture)
        if _due(step, config.checkpoint.every, config.steps):
            ckpt.save_state(manager, step, state, iterator, force=True)

    manager.wait_until_finished()
    manager.close()
    writer.close()
    return loss


def _due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps, and after the last, is due; 0 means never."""
    return every > 0 and (step % every == 0 or step == last)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    # Orbax and TFDS report every file they open; the progress lines are ours.
    logging.set_verbosity(logging.WARNING)
    if FLAGS.distributed:
        jax.distributed.initialize()
    try:
        train(FLAGS.config, Path(FLAGS.workdir))
    except (DatasetError, HeadAssetError, ckpt.CheckpointError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
