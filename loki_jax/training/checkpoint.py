"""Checkpoints of a run: saved, resumed, and loaded for inference.

    workdir/config.json     the resolved config
    workdir/head.npz        the head asset of the training data
    workdir/frozen/         parameters that are not trained (written once; absent without any)
    workdir/checkpoints/N/  all that step N + 1 depends on (Orbax, atomic): params, ema, optimizer; data, the
                            iterator's state; run, the step, the random key, config and code version
    workdir/metrics.jsonl, workdir/events.jsonl, workdir/tensorboard/, workdir/samples/
    workdir/starts/NNN.json code, packages, devices and data of each start
    workdir/snapshots/N/    what reproduces a step that gave no finite numbers (training/snapshot.py)

A trained model can also be one `.safetensors` file (training/model_file.py); the package ships one, "demo".
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from loki_jax.diffusion.loss import check_prediction
from loki_jax.diffusion.sampler import check_guidance, solver_steps
from loki_jax.face.asset import load_head
from loki_jax.networks import build_networks, default_guidance, random_params
from loki_jax.stores import is_url
from loki_jax.training.config import CheckpointError, NonFiniteError, config_to_json, read_config
from loki_jax.training.model_file import Checkpoint, load_model_file
from loki_jax.training.remote import open_workdir, stored_at
from loki_jax.training.sharding import path_name, put_global
from loki_jax.training.state import TrainState, create_state


def open_manager(workdir: Path, retention: ConfigDict) -> ocp.CheckpointManager:
    """Orbax manager of `workdir/checkpoints`; saves asynchronously, each checkpoint appears whole or not.

    Args:
      retention: `config.checkpoint`. The last `keep` checkpoints stay, those at multiples of
        `keep_every` (0: none), and the `keep_best` with the lowest validation loss.
    """
    by_loss = lambda metrics: -metrics.get("val_loss", float("inf"))
    policies = [preservation.LatestN(retention.keep)]
    if retention.keep_every:
        policies.append(preservation.EveryNSteps(retention.keep_every))
    if retention.keep_best:
        best = dict(get_metric_fn=by_loss, n=retention.keep_best, keep_checkpoints_without_metrics=False)
        policies.append(preservation.BestN(**best))
    return ocp.CheckpointManager(
        stored_at(workdir) / "checkpoints",
        options=ocp.CheckpointManagerOptions(
            preservation_policy=preservation.AnyPreservationPolicy(policies),
            best_fn=by_loss, best_mode="max",
            enable_async_checkpointing=True, step_prefix=None, cleanup_tmp_directories=True,
        ),
    )  # fmt: skip


@contextlib.contextmanager
def finishing(manager: ocp.CheckpointManager, agreed: tuple[type[Exception], ...]) -> Iterator[None]:
    """Let the save under way finish, whatever ends the run.

    But not after an error in one of several processes, unless it is one that all raise (`agreed`): the
    others would be waited for.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, agreed):
            manager.close()
        raise
    manager.wait_until_finished()
    manager.close()


def save_state(
    manager: ocp.CheckpointManager, step: int, state: TrainState, iterator, config: ConfigDict,
    code: str, skipped: tuple[int, int] = (0, 0), val_loss: float | None = None,
) -> None:  # fmt: skip
    """Start saving everything that the steps after `step` depend on; all processes must call.

    `iterator` must stand right after the batch of step `step`.

    Args:
      code: `code_version()` when the process started.
      skipped: updates skipped so far, and how many of them were the last ones.
      val_loss: validation loss after this step, where it was measured: decides which checkpoints are best.

    Raises:
      NonFiniteError: the state holds NaN or infinity; nothing is written.
    """
    trees = {"params": state.params, "optimizer": state.opt_state}
    if state.ema is not None:
        trees["ema"] = state.ema
    if bad := nonfinite_arrays(trees):
        raise NonFiniteError(f"step {step} is not saved: {_listed(bad)}")
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    run = {
        "step": step, "seed": config.seed, "next_key": np.asarray(jax.random.key_data(key)).tolist(),
        "skipped": skipped[0], "skipped_in_row": skipped[1], "code": code,
        "config": json.loads(config_to_json(config)),
        "devices": jax.device_count(), "processes": jax.process_count(),
    }  # fmt: skip
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()} | {
        # Process 0's, whose position is that of all: another number of processes can go on from it.
        "data": ocp.args.JsonSave(iterator.get_state()),
        "run": ocp.args.JsonSave(run),
    }
    metrics = {} if val_loss is None else {"val_loss": float(val_loss)}
    if not manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True):
        raise CheckpointError(f"{manager.directory}: step {step} was not saved")


def restore_state(manager: ocp.CheckpointManager, abstract: TrainState, iterator) -> tuple[TrainState, dict]:
    """The newest whole checkpoint and the frozen parameters, placed as `abstract` says.

    Any mesh and any number of processes will do. Sets the state of `iterator`.

    Args:
      abstract: TrainState of ShapeDtypeStructs with shardings.

    Returns:
      (state, what `save_state` wrote as "run").

    Raises:
      CheckpointError: there is none, it is of another architecture or is damaged.
    """
    step = manager.latest_step()
    if step is None:
        raise CheckpointError(f"{manager.directory}: holds no finished checkpoint.")
    folder = manager.directory / str(step)
    trees = {"params": abstract.params, "optimizer": abstract.opt_state}
    if abstract.ema is not None:
        trees["ema"] = abstract.ema
    older = f"Move {folder} away to go on from the checkpoint before it."
    items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
    items |= {"data": ocp.args.JsonRestore(), "run": ocp.args.JsonRestore()}
    with _reading(folder, older):
        for name, wanted in trees.items():
            check_fit(leaf_shapes(_stored_shapes(folder / name)), wanted, str(folder / name))
        restored = manager.restore(step, args=ocp.args.Composite(**items))
    if restored.run["step"] != step:
        raise CheckpointError(f"{folder}: holds step {restored.run['step']}. {older}")
    if bad := nonfinite_arrays({name: restored[name] for name in trees}):
        raise CheckpointError(f"{folder}: {_listed(bad)} {older}")
    iterator.set_state(restored.data)
    ema = None if abstract.ema is None else restored.ema
    count = put_global(jnp.asarray(step, jnp.int32), abstract.step.sharding)
    frozen = restore_frozen(manager.directory.parent, abstract.frozen)
    return TrainState(count, restored.params, ema, restored.optimizer, frozen), restored.run


@contextlib.contextmanager
def _reading(path: os.PathLike, remedy: str) -> Iterator[None]:
    """Whatever Orbax raises on a folder that is damaged becomes a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, OSError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). {remedy}") from error


def start(
    workdir: Path,
    initial: tuple,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    keep_ema: bool,
) -> TrainState:
    """The state of a new run from (trained, frozen) parameters; the frozen ones are saved."""
    trained, frozen = (
        put_global(tree, s) for tree, s in zip(initial, (shardings.params, shardings.frozen), strict=True)
    )
    save_frozen(workdir, frozen)
    create = lambda trained, frozen: create_state(trained, frozen, optimizer, keep_ema)
    return jax.jit(create, out_shardings=shardings)(trained, frozen)


def _stored_shapes(folder: os.PathLike):
    """A saved tree with shapes and dtypes in place of its arrays."""
    return ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder)).tree


_finite = jax.jit(lambda leaves: [jnp.isfinite(x).all() for x in leaves])


def nonfinite_arrays(tree) -> list[str]:
    """Paths of the arrays that hold NaN or infinity; all processes must call."""
    named = [
        (path_name(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    if all(isinstance(leaf, np.ndarray) for _, leaf in named):
        finite = [np.isfinite(leaf).all() for _, leaf in named]
    else:
        finite = jax.device_get(_finite([leaf for _, leaf in named]))
    return [name for (name, _), good in zip(named, finite, strict=True) if not good]


def _listed(bad: list[str]) -> str:
    return f"{len(bad)} arrays hold NaN or infinity: {', '.join(bad[:4])}{', ...' if len(bad) > 4 else '.'}"


def check_finite(params, source: str):
    """`params`. Raises CheckpointError where arrays hold NaN or infinity."""
    if bad := nonfinite_arrays(params):
        raise CheckpointError(f"{source}: {_listed(bad)} Use another checkpoint.")
    return params


def leaf_shapes(tree) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every leaf that has one; fields of tuples by name or number, as Orbax stores them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


def check_fit(found: dict[str, tuple[int, ...]], wanted, source: str) -> None:
    """Compare the shapes of a saved tree with those of the tree `wanted`.

    Raises:
      CheckpointError: another architecture; names the first paths and shapes that differ.
    """
    expected = leaf_shapes(wanted)
    wrong = [
        f"{key}: {found.get(key, 'missing')} there, {expected.get(key, 'none')} in this config"
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    ]
    if wrong:
        shown = "\n  ".join(wrong[:8])
        raise CheckpointError(
            f"{source}: weights of another architecture ({len(wrong)} arrays differ):\n  {shown}\n"
            "Use the config they were made with."
        )


def _check_model(checkpoint: Checkpoint, source: str) -> None:
    """Refuse a model whose config describes no networks that can animate, or others than its parameters'.

    Raises:
      CheckpointError: says what is wrong with the config, or names the first paths and shapes that differ.
    """
    config, params, head, _ = checkpoint
    arrays = len(jax.tree.leaves(params))
    try:
        # Tracing takes time and memory by the depth that a config claims.
        branches = [config.model.unet, config.model.reference, config.model.encoder, config.model.autoencoder]
        depths = [branch.get("num_res_blocks", 1) for branch in branches]
        if max(*depths, *(len(jax.tree.leaves(branch.to_dict())) for branch in branches)) > arrays:
            raise ValueError(f"it has more layers than the file has arrays, {arrays}")
        if min(config.window, config.image_size) < 1 or not math.isfinite(config.sample.guidance):
            raise ValueError("window, image_size or sample.guidance is out of range")
        if not 0 <= config.history.frames <= config.window:
            raise ValueError(f"history.frames={config.history.frames} is out of range")
        if not isinstance(config.driver.neck, bool) or not isinstance(config.diffusion.clip, float | int):
            raise ValueError("driver.neck or diffusion.clip is of another type")
        check_prediction(config.diffusion.prediction)
        networks = build_networks(config, head)
        sample = config.sample
        check_guidance(default_guidance(config), sample.guided_steps)
        solver_steps(networks.schedule, sample.solver, sample.steps, sample.spacing)
        wanted = jax.eval_shape(lambda: random_params(networks, jax.random.key(0)))
    except Exception as error:  # a damaged config can hold anything
        raise CheckpointError(
            f"{source}: its config describes no model ({type(error).__name__}: {error}). Copy it again."
        ) from error
    check_fit(leaf_shapes({key: params.get(key, {}) for key in wanted}), wanted, source)


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the whole checkpoints in a workdir, ascending."""
    folder = stored_at(workdir) / "checkpoints"
    if not folder.is_dir():
        return []
    # In a bucket, where nothing can be renamed, Orbax marks what is whole.
    whole = lambda path: not is_url(folder) or (path / "commit_success.txt").exists()
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and whole(path))


def save_frozen(workdir: Path, frozen) -> None:
    """Write the parameters that are not trained, before the first checkpoint; all processes must call.

    Those of a start that ended before its first checkpoint are replaced: it may have had other weights.
    """
    if jax.tree.leaves(frozen):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(stored_at(workdir) / "frozen", frozen, force=True)


def restore_frozen(stored: epath.Path, abstract):
    """What `save_frozen` wrote into `stored`, placed as `abstract` (ShapeDtypeStructs with shardings) says.

    Raises:
      CheckpointError: missing, damaged, or of another architecture.
    """
    if not jax.tree.leaves(abstract):
        return abstract
    path = stored / "frozen"
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: missing, but this run has parameters that are not trained. Copy the whole workdir, "
            "or start a new run from its weights with --config.init_from."
        )
    with _reading(path, "Copy it again."), ocp.StandardCheckpointer() as checkpointer:
        check_fit(leaf_shapes(_stored_shapes(path)), abstract, str(path))
        return checkpointer.restore(path, abstract)


def load_checkpoint(source: str | os.PathLike, use_ema: bool = True) -> Checkpoint:
    """Load a trained model from a workdir, a `.safetensors` file or the shipped model ("demo").

    A workdir gives its last checkpoint, `WORKDIR/checkpoints/N` the one after step N.

    Raises:
      CheckpointError: nothing there, or it is not one of ours.
    """
    if str(source) == "demo":
        with resources.as_file(resources.files("loki_jax") / "assets" / "demo.safetensors") as path:
            return load_model_file(path)
    if is_url(source):
        source, _, number = str(source).partition("/checkpoints/")
        path = open_workdir(source) / (f"checkpoints/{number}" if number else "")
    else:
        path = Path(source)
    step = None
    if path.suffix == ".safetensors":
        checkpoint = load_model_file(path)
        check_finite(checkpoint.params, str(path))
        _check_model(checkpoint, str(path))
        return checkpoint
    if path.parent.name == "checkpoints" and path.name.isdigit():
        path, step = path.parent.parent, int(path.name)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: not a workdir of loki_jax.train (no config.json). "
            'Give the --workdir of a run, a .safetensors file of `python -m loki_jax.convert`, or "demo".'
        )
    config = read_config(path / "config.json")
    head = load_head(path / "head.npz")
    folder = stored_at(path) / "checkpoints"
    saved = saved_steps(path)
    if not saved:
        raise CheckpointError(
            f"{folder}: holds no finished checkpoint. Train for at least one checkpoint interval."
        )
    step = saved[-1] if step is None else step
    if step not in saved:
        raise CheckpointError(
            f"{folder}: no checkpoint of step {step}; there are {', '.join(map(str, saved))}."
        )
    item = "ema" if use_ema and (folder / str(step) / "ema").exists() else "params"
    with _reading(folder / str(step), "Copy the workdir again."):
        # The pixel autoencoder has no parameters, and files keep no empty dict.
        params = {"autoencoder": {}} | restore_as_numpy(folder / str(step) / item)
        frozen = stored_at(path) / "frozen"
        if frozen.is_dir():
            params |= restore_as_numpy(frozen)
    return Checkpoint(config, check_finite(params, str(folder / str(step))), head, step)


def restore_as_numpy(path: os.PathLike) -> PyTree:
    """A saved tree without a target, which would want the devices of the training run back."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = _stored_shapes(path)
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore_args))
