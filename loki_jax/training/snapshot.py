"""What is needed to reproduce a step that gave no finite numbers, and a program that does so.

python -m loki_jax.training.snapshot runs/hdtf/dumps/1234

DUMP/dump.json                 step, seed and key, config, code version, windows, figures; written last
DUMP/head.npz                  the head asset
DUMP/batch-0.safetensors ...   each process's part of the step's batch
DUMP/state/                    parameters and frozen parameters as they were before the step (Orbax)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from safetensors.flax import load_file, save_file

from loki_jax.face.asset import HeadAsset, load_head, save_head
from loki_jax.face.types import Camera, Coefficients
from loki_jax.io import write_json
from loki_jax.networks import build_networks
from loki_jax.training.checkpoint import restore_as_numpy
from loki_jax.training.config import CheckpointError, config_from_json, config_to_json
from loki_jax.training.distributed import wait_for_all
from loki_jax.training.sharding import local_batch, make_mesh, path_name
from loki_jax.training.state import TrainState, make_optimizer
from loki_jax.training.step import make_gradients
from loki_jax.training.workdir import code_version

_TUPLES = {"coefficients": Coefficients, "reference_coefficients": Coefficients, "camera": Camera}


class Snapshot(NamedTuple):
    """A dump, read back: `batch` is the whole global batch, `params` {"trained": ..., "frozen": ...}."""

    step: int
    config: ConfigDict
    head: HeadAsset
    batch: dict[str, Any]
    params: Any
    info: dict[str, Any]


def write_snapshot(
    folder: Path, step: int, batch: dict[str, Any], state: TrainState, config: ConfigDict, head: HeadAsset,
    windows: list[dict[str, Any]], figures: dict[str, float],
) -> Path:  # fmt: skip
    """Write what reproduces step `step` to `folder`; all processes must call.

    Args:
      batch: the step's batch (global arrays).
      state: the state, whose last updates were skipped, so that it is still the one before the step.
      windows: `watch.window_names` of the batch.
      figures: what the step gave.
    """
    lead = jax.process_index() == 0
    if lead:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    wait_for_all(f"dump {step}")
    flat = {
        path_name(path): jnp.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(local_batch(batch))
    }
    save_file(flat, str(folder / f"batch-{jax.process_index()}.safetensors"))
    with ocp.StandardCheckpointer() as checkpointer:
        frozen = {key: value for key, value in state.frozen.items() if jax.tree.leaves(value)}
        checkpointer.save((folder / "state").absolute(), {"trained": state.params, "frozen": frozen})
    if lead:
        save_head(folder / "head.npz", head)
        key = jax.random.fold_in(jax.random.key(config.seed), step - 1)
        info = {
            "step": step, "seed": config.seed, "key": np.asarray(jax.random.key_data(key)).tolist(),
            "code": code_version(), "processes": jax.process_count(), "devices": jax.device_count(),
            "device": jax.devices()[0].device_kind, "figures": {k: repr(v) for k, v in figures.items()},
            "windows": windows, "config": json.loads(config_to_json(config)),
        }  # fmt: skip
        write_json(folder / "dump.json", info)
    return folder


def read_snapshot(folder: str | os.PathLike) -> Snapshot:
    """Read a dump on any number of devices.

    Raises:
      CheckpointError: not a dump, or one that was not finished.
    """
    folder = Path(folder)
    if not (folder / "dump.json").is_file():
        raise CheckpointError(
            f"{folder}: no dump.json: not a dump, or one cut short. Give WORKDIR/dumps/STEP."
        )
    info = json.loads((folder / "dump.json").read_text())
    files = [folder / f"batch-{i}.safetensors" for i in range(info["processes"])]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} missing; gather the files of all processes")
    parts = [load_file(str(file)) for file in files]
    batch: dict[str, Any] = {}
    for name in parts[0]:
        top, _, field = name.partition("/")
        value = np.concatenate([np.asarray(part[name]) for part in parts])
        if field:
            batch.setdefault(top, {})[field] = value
        else:
            batch[top] = value
    batch = {key: _TUPLES[key](**value) if key in _TUPLES else value for key, value in batch.items()}
    params = restore_as_numpy((folder / "state").absolute())
    return Snapshot(
        info["step"],
        config_from_json(json.dumps(info["config"])),
        load_head(folder / "head.npz"),
        batch,
        params,
        info,
    )


def replay(dump: Snapshot) -> dict[str, Any]:
    """Do the dumped step again on the first device of this process.

    Returns:
      {"loss", "grad_norm", "batch": [names of the batch's arrays, with their windows, that hold values that
      are not finite], "gradients": [paths of the gradients that do]}
    """
    config = ConfigDict(dump.config.to_dict())
    networks = build_networks(config, dump.head)
    mesh = make_mesh(1, 1, jax.devices()[:1])
    trained = jax.tree.map(jnp.asarray, dump.params["trained"])
    frozen = {"autoencoder": {}} | jax.tree.map(jnp.asarray, dump.params.get("frozen", {}))
    state = TrainState(
        jnp.asarray(dump.step - 1, jnp.int32), trained, None, make_optimizer(config).init({}), frozen
    )
    loss, grads = jax.jit(make_gradients(config, networks, mesh))(state, dump.batch, dump.head)
    bad_rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(dump.batch):
        finite = np.isfinite(np.asarray(leaf, np.float32)).reshape(len(leaf), -1).all(1)
        bad_rows += [
            f"{path_name(path)} of window {row}: {dump.info['windows'][row]}"
            for row in np.flatnonzero(~finite)
        ]
    named = jax.tree_util.tree_leaves_with_path(jax.device_get(grads))
    return {
        "loss": float(loss),
        "grad_norm": float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for _, g in named))),
        "batch": bad_rows,
        "gradients": [path_name(path) for path, g in named if not np.isfinite(g).all()],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loki_jax.training.snapshot", description=__doc__.splitlines()[0]
    )
    parser.add_argument("dump", help="WORKDIR/dumps/STEP")
    try:
        found = replay(read_snapshot(parser.parse_args(argv).dump))
    except CheckpointError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"loss {found['loss']}, gradient norm {found['grad_norm']}")
    for line in found["batch"]:
        print(f"not finite in the batch: {line}")
    print(
        f"{len(found['gradients'])} gradients are not finite"
        + "".join(f"\n  {n}" for n in found["gradients"][:8])
    )


if __name__ == "__main__":
    main()
