"""The folder of a run: whose it is, and what each start ran on (code, packages, devices, data)."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

import loki_jax
from loki_jax.data.reader import Dataset
from loki_jax.face.asset import HeadAsset, load_head, save_head
from loki_jax.io import file_sha256, write_json
from loki_jax.training.checkpoint import saved_steps
from loki_jax.training.config import CheckpointError, config_differences, config_to_json, read_config
from loki_jax.training.distributed import wait_for_all
from loki_jax.training.remote import stored_at


def prepare_workdir(workdir: Path, config: ConfigDict, dataset: Dataset, head: HeadAsset) -> None:
    """Write config and head asset into a new workdir, or check that an old one is of this run.

    With several processes all must call; process 0 writes.

    Raises:
      CheckpointError: the workdir holds a run of another config, other clips or another head, or its
        checkpoints are gone.
    """
    config_file, head_file = workdir / "config.json", workdir / "head.npz"
    if config_file.is_file():
        differences = config_differences(config, read_config(config_file))
        if differences:
            shown = "\n  ".join(differences[:20])
            raise CheckpointError(
                f"{config_file}: this workdir holds a run of another config:\n  {shown}\n"
                "Choose another --workdir, or start from its weights with --config.init_from."
            )
    if head_file.is_file():
        stored = load_head(head_file)
        if stored.template.shape != head.template.shape or not np.allclose(stored.template, head.template):
            raise CheckpointError(
                f"{head_file}: this workdir was trained on head {stored.name!r}, "
                f"the data uses {head.name!r}. Choose another --workdir."
            )
    starts = [json.loads(file.read_text()) for file in sorted(workdir.glob("starts/*.json"))]
    clips = next((start["dataset"]["clips"] for start in starts if "clips" in start["dataset"]), None)
    if clips not in (None, clips_digest(dataset)):
        raise CheckpointError(
            f"{workdir}: this run was trained on other clips than {dataset.path} holds. "
            "Choose another --workdir, or start from its weights with --config.init_from."
        )
    metrics, events = workdir / "metrics.jsonl", workdir / "events.jsonl"
    folder = stored_at(workdir) / "checkpoints"
    lost = None
    if metrics.is_file() and metrics.stat().st_size and not folder.is_dir():
        lost = "missing, but metrics.jsonl shows that this run has trained"
    elif events.is_file() and '"event": "saved"' in events.read_text() and not saved_steps(workdir):
        lost = "empty, but events.jsonl shows that this run has saved checkpoints"
    if lost:
        raise CheckpointError(f"{folder}: {lost}. Copy the whole workdir again, or choose another --workdir.")
    # Nobody writes before all have read.
    wait_for_all("workdir read")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        if not head_file.is_file():
            save_head(head_file, head)
        write_json(config_file, json.loads(config_to_json(config)))
    wait_for_all("workdir written")


def code_version() -> str:
    """Version of the package and, in a git checkout, the revision it was run from."""
    revision = git_revision(Path(loki_jax.__file__).parent)
    if revision is None:
        return loki_jax.__version__
    return f"{loki_jax.__version__} {revision['revision']}" + (" and changes" if revision["changed"] else "")


# Hashing a terabyte would keep the chips waiting; of larger shards size and both ends are compared.
_WHOLE_UP_TO, _END = 64 * 2**20, 2**20


def git_revision(folder: Path) -> dict[str, Any] | None:
    """{"revision", "changed": files that differ from it} of `folder`'s checkout, None outside one."""
    git = lambda *args: subprocess.check_output(
        ["git", "-C", str(folder), *args], text=True, stderr=subprocess.DEVNULL, timeout=20
    )
    try:
        changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
        return {"revision": git("rev-parse", "HEAD").strip(), "changed": changed}
    except (OSError, subprocess.SubprocessError):
        return None


def installed_packages() -> list[str]:
    """`name==version` of every installed distribution, as `pip freeze` lists them."""
    found = {d.metadata["Name"]: d.version for d in reversed(list(importlib.metadata.distributions()))}
    return sorted((f"{name}=={version}" for name, version in found.items() if name), key=str.lower)


def dataset_checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a dataset; above 64 MiB of its first and last MiB ("ends")."""
    sums = {}
    for file in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        size = file.stat().st_size
        if size <= _WHOLE_UP_TO:
            sums[file.name] = {"bytes": size, "sha256": file_sha256(file)}
            continue
        digest = hashlib.sha256()
        with open(file, "rb") as stream:
            digest.update(stream.read(_END))
            stream.seek(-_END, os.SEEK_END)
            digest.update(stream.read(_END))
        sums[file.name] = {"bytes": size, "sha256_ends": digest.hexdigest()}
    return sums


def clips_digest(dataset: Dataset) -> str:
    """SHA-256 of the table of clips: the same wherever the dataset is, and with or without latents."""
    rows = [dataclasses.asdict(clip) for clip in dataset.clips]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def describe_run(config: ConfigDict, mesh: Mesh, dataset: Dataset, first_step: int) -> dict[str, Any]:
    """Everything about this start of a run but its weights."""
    devices = jax.devices()
    of_process = [sum(d.process_index == p for d in devices) for p in range(jax.process_count())]
    variables = ("XLA_", "JAX_", "NCCL_", "LIBTPU_")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "after_step": first_step,
        "command": sys.argv,
        "config": config.to_dict(),
        "loki_jax": loki_jax.__version__,
        "git": git_revision(Path(loki_jax.__file__).parent),
        "python": platform.python_version(),
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "packages": installed_packages(),
        "devices": {
            "platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices),
            "processes": jax.process_count(), "of_process": of_process, "mesh": dict(mesh.shape),
            "runtime": devices[0].client.platform_version,
        },
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(variables)},
        "dataset": {
            "path": str(dataset.path), "clips": clips_digest(dataset),
            "files": dataset_checksums(dataset.path),
        },
    }  # fmt: skip


def record_start(workdir: Path, description: dict[str, Any]) -> Path:
    """Write a start's description to `workdir/starts/NNN.json` and return the path."""
    folder = workdir / "starts"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{1 + len(list(folder.glob('[0-9]*.json'))):03d}.json"
    write_json(path, description)
    return path
