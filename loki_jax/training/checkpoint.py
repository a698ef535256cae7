"""What a workdir holds, and how runs are saved, resumed and loaded for inference.

    workdir/config.json     the resolved config
    workdir/head.npz        the head asset of the training data
    workdir/frozen/         parameters that are not trained (written once; absent without any)
    workdir/checkpoints/N/  params, ema, optimizer and data-iterator state after N steps (Orbax, atomic)
    workdir/metrics.jsonl, workdir/tensorboard/

A trained model also travels as one `.safetensors` file (bfloat16 parameters, config and head name in
its metadata); the package ships one, called "demo".
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from loki_jax.head.asset import HeadAsset, load_head, save_head
from loki_jax.head.builtin import builtin_head
from loki_jax.training.state import TrainState

# Keys that may differ between a run and its continuation; all others describe the model, the data or
# the mathematics, and a changed one means another run.
RUN_KEYS = ("steps", "init_from", "pretrained", "log", "checkpoint", "validation", "sample", "mesh", "sharding_rules",
            "sharding_min_size", "data.path", "data.workers", "data.cache_mb", "model.attention_backend", "model.remat")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another run; the message names the mend."""


class Checkpoint(NamedTuple):
    """A model ready for inference. `params` is {"generation": ..., "reference": ..., ...}."""

    config: ConfigDict
    params: Any
    head: HeadAsset
    step: int


# ------------------------------------------------------------------------------------------ config


def config_to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=1, sort_keys=True)


def config_from_json(text: str) -> ConfigDict:
    def freeze(value):
        if isinstance(value, dict):
            return {key: freeze(item) for key, item in value.items()}
        return tuple(map(freeze, value)) if isinstance(value, list) else value

    return ConfigDict(freeze(json.loads(text)))


def _flatten(tree: dict[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one dict whose keys are the joined names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, separator, f"{prefix}{key}{separator}")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _nest(flat: dict[str, Any], separator: str) -> dict[str, Any]:
    """The inverse of `_flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(separator)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _flat_config(config: ConfigDict) -> dict[str, Any]:
    flat = _flatten(json.loads(config_to_json(config)), ".")
    return {key: value for key, value in flat.items() if not any(key == k or key.startswith(k + ".") for k in RUN_KEYS)}


def config_differences(mine: ConfigDict, theirs: ConfigDict, only: str = "") -> list[str]:
    """Lines `key: theirs -> mine` for binding keys (under the prefix `only`) that differ."""
    a, b = _flat_config(mine), _flat_config(theirs)
    return [
        f"{key}: {b.get(key, '(absent)')} -> {a.get(key, '(absent)')}"
        for key in sorted(a.keys() | b.keys())
        if key.startswith(only) and a.get(key) != b.get(key)
    ]


def prepare_workdir(workdir: Path, config: ConfigDict, head: HeadAsset) -> None:
    """Write config and head asset into a new workdir, or check that an old one is of this run.

    Raises:
      CheckpointError: the workdir holds a run of another config or another head.
    """
    config_file, head_file = workdir / "config.json", workdir / "head.npz"
    if config_file.is_file():
        differences = config_differences(config, config_from_json(config_file.read_text()))
        if differences:
            raise CheckpointError(
                f"{config_file}: this workdir holds a run of another config:\n  "
                + "\n  ".join(differences[:20])
                + "\nChoose another --workdir, or start from its weights with --config.init_from."
            )
    if head_file.is_file():
        stored = load_head(head_file)
        if stored.template.shape != head.template.shape or not np.allclose(stored.template, head.template):
            raise CheckpointError(
                f"{head_file}: this workdir was trained on head {stored.name!r}, the data uses {head.name!r}. "
                "Choose another --workdir."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    if not head_file.is_file():
        save_head(head_file, head)
    partial = workdir / ".config.json.partial"
    partial.write_text(config_to_json(config))
    os.replace(partial, config_file)


# ---------------------------------------------------------------------------- training checkpoints


def open_manager(workdir: Path, every: int, keep: int) -> ocp.CheckpointManager:
    """Orbax manager of `workdir/checkpoints`; saves asynchronously, each checkpoint appears whole or not."""
    return ocp.CheckpointManager(
        (workdir / "checkpoints").absolute(),
        options=ocp.CheckpointManagerOptions(
            save_interval_steps=every, max_to_keep=keep, enable_async_checkpointing=True, step_prefix=None
        ),
    )


def save_state(manager: ocp.CheckpointManager, step: int, state: TrainState, iterator, force: bool = False) -> None:
    """Save parameters, EMA, optimiser and data-iterator state together.

    `iterator` must stand right after the batch of step `step`.
    """
    items = {
        "params": ocp.args.StandardSave(state.params),
        "optimizer": ocp.args.StandardSave(state.opt_state),
        "data": grain.checkpoint.CheckpointSave(iterator),
    }
    if state.ema is not None:
        items["ema"] = ocp.args.StandardSave(state.ema)
    manager.save(step, args=ocp.args.Composite(**items), force=force)


def restore_state(manager: ocp.CheckpointManager, abstract: TrainState, iterator) -> tuple[TrainState, Any] | None:
    """The newest whole checkpoint, placed as `abstract` says (any mesh), or None when there is none.

    Args:
      abstract: TrainState of ShapeDtypeStructs with shardings; its `frozen` part is passed through.
    """
    step = manager.latest_step()
    if step is None:
        return None
    items = {
        "params": ocp.args.StandardRestore(abstract.params),
        "optimizer": ocp.args.StandardRestore(abstract.opt_state),
        "data": grain.checkpoint.CheckpointRestore(iterator),
    }
    if abstract.ema is not None:
        items["ema"] = ocp.args.StandardRestore(abstract.ema)
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    state = abstract._replace(
        step=jnp.asarray(step, jnp.int32),
        params=restored.params,
        opt_state=restored.optimizer,
        ema=restored.ema if abstract.ema is not None else None,
    )
    return state, restored.data


def save_frozen(workdir: Path, frozen) -> None:
    """Write the parameters that are not trained, once."""
    path = (workdir / "frozen").absolute()
    if not path.exists() and jax.tree.leaves(frozen):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, frozen)


# --------------------------------------------------------------------------------------- inference


def load_checkpoint(source: str | os.PathLike, use_ema: bool = True) -> Checkpoint:
    """Load a trained model from a workdir, a `.safetensors` file or the shipped model ("demo").

    Raises:
      CheckpointError: nothing there, or it is not one of ours.
    """
    if str(source) == "demo":
        with resources.as_file(resources.files("loki_jax") / "assets" / "demo.safetensors") as path:
            return load_model_file(path)
    path = Path(source)
    if path.suffix == ".safetensors":
        return load_model_file(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: not a workdir of loki_jax.train (no config.json). "
            'Give the --workdir of a run, a .safetensors file of `python -m loki_jax.convert`, or "demo".'
        )
    config = config_from_json((path / "config.json").read_text())
    head = load_head(path / "head.npz")
    folder = path / "checkpoints"
    manager = ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(read_only=True)) if folder.is_dir() else None
    step = manager.latest_step() if manager is not None else None
    if step is None:
        raise CheckpointError(f"{folder}: holds no finished checkpoint. Train for at least one checkpoint interval.")
    item = "ema" if use_ema and (folder / str(step) / "ema").exists() else "params"
    # The pixel autoencoder has no parameters, and files keep no empty dict.
    params = {"autoencoder": {}} | _restore_as_numpy((folder / str(step) / item).absolute())
    if (path / "frozen").is_dir():
        params |= _restore_as_numpy((path / "frozen").absolute())
    return Checkpoint(config, params, head, step)


def _restore_as_numpy(path: Path) -> dict:
    """A saved tree without a target, which would want the devices of the training run back."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore_args))


def save_model_file(path: Path, checkpoint: Checkpoint) -> None:
    """Write one `.safetensors` file with bfloat16 parameters and everything needed to use them.

    Only models of the built-in head travel this way: its asset is code, others have licences.

    Raises:
      CheckpointError: the model was trained on another head than the built-in one.
    """
    if checkpoint.head.name != builtin_head().name:
        raise CheckpointError(f"head {checkpoint.head.name!r} cannot travel inside a model file; share the workdir instead.")
    tensors = {
        key: jnp.asarray(value, jnp.bfloat16) for key, value in _flatten(checkpoint.params, "/").items()
    }
    metadata = {
        "format": "loki_jax-1",
        "config": config_to_json(checkpoint.config),
        "head": checkpoint.head.name,
        "head_geometry": _geometry_digest(checkpoint.head),
        "step": str(checkpoint.step),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, str(partial), metadata=metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _geometry_digest(head: HeadAsset) -> str:
    """SHA-256 of what the driver map depends on, to a hundredth of a millimetre; landmarks may change."""
    digest = hashlib.sha256(np.asarray(head.faces, np.int32).tobytes())
    for array in (head.template, head.shape_basis, head.expression_basis, head.skinning_weights, head.render_mask):
        digest.update(np.round(np.asarray(array, np.float64) * 1e5).astype(np.int64).tobytes())
    return digest.hexdigest()


def load_model_file(path: Path) -> Checkpoint:
    """Read a file of `save_model_file`; parameters come back as float32.

    Raises:
      CheckpointError: missing, damaged, not ours, or made with another built-in head.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such model file. Give a workdir of loki_jax.train instead.")
    try:
        with safe_open(str(path), framework="flax") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).astype(jnp.float32) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}). Copy it again.") from error
    if metadata.get("format") != "loki_jax-1":
        raise CheckpointError(f"{path}: not a loki_jax model file. For other weights use `python -m loki_jax.convert`.")
    head = builtin_head()
    if metadata["head"] != head.name or metadata["head_geometry"] != _geometry_digest(head):
        raise CheckpointError(f"{path}: made with another built-in head ({metadata['head']}); use the version that made it.")
    params = {"autoencoder": {}} | _nest(tensors, "/")
    return Checkpoint(config_from_json(metadata["config"]), params, head, int(metadata["step"]))


