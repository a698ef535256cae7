"""Debug snapshots: what reproduces a step that gave no finite numbers (`python -m loki_jax.replay`).

SNAPSHOT/snapshot.json             step, seed and key, config, code version, windows, figures; written last
SNAPSHOT/head.npz                  the head asset
SNAPSHOT/batch-0.safetensors ...   each process's part of the step's batch
SNAPSHOT/state/                    parameters and frozen parameters as they were before the step (Orbax)

Version 0.1 wrote the same as `dumps/STEP` with a `dump.json`; both are read.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict
from safetensors.flax import load_file, save_file

from loki_jax.data.schema import Batch, DriverWindow
from loki_jax.face.asset import HeadAsset, load_head, save_head
from loki_jax.face.types import Camera, Coefficients
from loki_jax.io import write_json
from loki_jax.networks import build_networks
from loki_jax.training.checkpoint import restore_as_numpy
from loki_jax.training.config import CheckpointError, config_from_json, config_to_json
from loki_jax.training.distributed import wait_for_all
from loki_jax.training.monitor import Anomaly
from loki_jax.training.sharding import local_batch, make_mesh, path_name
from loki_jax.training.state import TrainState, make_optimizer
from loki_jax.training.step import make_gradients
from loki_jax.training.workdir import code_version

_TUPLES = {
    "coefficients": Coefficients, "reference_coefficients": Coefficients,
    "camera": Camera, "reference_camera": Camera,
}  # fmt: skip


class Snapshot(NamedTuple):
    """A snapshot, read: `batch` is the whole global batch, `params` {"trained": ..., "frozen": ...}."""

    step: int
    config: ConfigDict
    head: HeadAsset
    batch: Batch
    params: Any
    info: dict[str, Any]


def write_snapshot(
    workdir: Path, anomaly: Anomaly, state: TrainState, config: ConfigDict, head: HeadAsset,
    windows: list[dict[str, Any]],
) -> Path:  # fmt: skip
    """Write what reproduces a skipped step to `workdir/snapshots/STEP`, its path; all processes must call.

    Args:
      anomaly: the step, its batch (global arrays) and what it gave.
      state: the state, whose last updates were skipped, so that it is still the one before the step.
      windows: `window_names` of the batch.
    """
    step, folder = anomaly.step, workdir / "snapshots" / str(anomaly.step)
    lead = jax.process_index() == 0
    if lead:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    wait_for_all(f"snapshot {step}")
    leaves = jax.tree_util.tree_leaves_with_path(local_batch(anomaly.batch))
    flat = {path_name(path): jnp.asarray(leaf) for path, leaf in leaves}
    save_file(flat, str(folder / f"batch-{jax.process_index()}.safetensors"))
    with ocp.StandardCheckpointer() as checkpointer:
        frozen = {key: value for key, value in state.frozen.items() if jax.tree.leaves(value)}
        checkpointer.save((folder / "state").absolute(), {"trained": state.params, "frozen": frozen})
    if lead:
        save_head(folder / "head.npz", head)
        key = jax.random.fold_in(jax.random.key(config.seed), step - 1)
        figures = {name: repr(value) for name, value in anomaly.figures.items()}
        info = {
            "step": step, "seed": config.seed, "key": np.asarray(jax.random.key_data(key)).tolist(),
            "code": code_version(), "processes": jax.process_count(), "devices": jax.device_count(),
            "device": jax.devices()[0].device_kind, "figures": figures, "windows": windows,
            "config": json.loads(config_to_json(config)),
        }  # fmt: skip
        write_json(folder / "snapshot.json", info)
    return folder


def read_snapshot(folder: str | os.PathLike) -> Snapshot:
    """Read a snapshot on any number of devices.

    Raises:
      CheckpointError: not a snapshot, or one that was not finished.
    """
    folder = Path(folder)
    file = next((folder / n for n in ("snapshot.json", "dump.json") if (folder / n).is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{folder}: no snapshot.json: not a debug snapshot, or an incomplete one. "
            "Give WORKDIR/snapshots/STEP."
        )
    info = json.loads(file.read_text())
    files = [folder / f"batch-{i}.safetensors" for i in range(info["processes"])]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} missing; gather the files of all processes")
    parts = [load_file(str(file)) for file in files]
    # Version 0.1 called the identity coefficients `shape`.
    today = lambda name: name.replace("coefficients/shape", "coefficients/betas")
    flat = {today(name): np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}
    fields = unflatten_dict(flat, sep="/").items()
    batch = Batch(**{key: _field(key, value) for key, value in fields})
    config = config_from_json(json.dumps(info["config"]))
    params = restore_as_numpy((folder / "state").absolute())
    return Snapshot(info["step"], config, load_head(folder / "head.npz"), batch, params, info)


def _field(name: str, value: Any) -> Any:
    """A field of a batch, or of the driver in it, from a dict of its parts."""
    if name == "driver":
        return DriverWindow(**{key: _field(key, part) for key, part in value.items()})
    return _TUPLES[name](**value) if name in _TUPLES else value


def replay(snapshot: Snapshot) -> dict[str, Any]:
    """Do the step again on the first device of this process.

    Returns:
      {"loss", "grad_norm", "batch": [names of the batch's arrays, with their windows, that hold values that
      are not finite], "gradients": [paths of the gradients that do]}
    """
    config, mesh = snapshot.config, make_mesh(1, 1, jax.devices()[:1])
    trained, frozen = (
        jax.tree.map(jnp.asarray, snapshot.params.get(key, {})) for key in ("trained", "frozen")
    )
    # Files keep no empty dict: the pixel autoencoder's.
    frozen = {"autoencoder": {}} | frozen
    step = jnp.asarray(snapshot.step - 1, jnp.int32)
    state = TrainState(step, trained, None, make_optimizer(config).init({}), frozen)
    gradients = make_gradients(config, build_networks(config, snapshot.head), mesh)
    loss, grads = jax.jit(gradients)(state, snapshot.batch, snapshot.head)
    bad_rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(snapshot.batch):
        finite = np.isfinite(np.asarray(leaf, np.float32)).reshape(len(leaf), -1).all(1)
        for row in np.flatnonzero(~finite):
            bad_rows.append(f"{path_name(path)} of window {row}: {snapshot.info['windows'][row]}")
    named = jax.tree_util.tree_leaves_with_path(jax.device_get(grads))
    return {
        "loss": float(loss),
        "grad_norm": float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for _, g in named))),
        "batch": bad_rows,
        "gradients": [path_name(path) for path, g in named if not np.isfinite(g).all()],
    }
