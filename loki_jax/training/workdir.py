"""What a run needs to be told apart and repeated: code, packages, devices, data. One file for each start."""

from __future__ import annotations

import hashlib
import importlib.metadata
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
from loki_jax.face.asset import HeadAsset, load_head, save_head
from loki_jax.io import atomic_path, file_sha256, write_json
from loki_jax.training.config import CheckpointError, config_differences, config_from_json, config_to_json
from loki_jax.training.distributed import wait_for_all


def prepare_workdir(workdir: Path, config: ConfigDict, head: HeadAsset) -> None:
    """Write config and head asset into a new workdir, or check that an old one is of this run.

    With several processes all must call; process 0 writes.

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
                f"{head_file}: this workdir was trained on head {stored.name!r}, "
                f"the data uses {head.name!r}. Choose another --workdir."
            )
    # Nobody writes before all have read.
    wait_for_all("workdir read")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        if not head_file.is_file():
            save_head(head_file, head)
        with atomic_path(config_file) as partial:
            partial.write_text(config_to_json(config))
    wait_for_all("workdir written")


def code_version() -> str:
    """Version of the package and, in a git checkout, the revision it was run from."""
    revision = git_revision(Path(loki_jax.__file__).parent)
    if revision is None:
        return loki_jax.__version__
    return f"{loki_jax.__version__} {revision['revision']}" + (" and changes" if revision["changed"] else "")


# Hashing a terabyte would keep the chips waiting; larger shards are told apart by size and both ends.
_WHOLE_UP_TO = 64 * 2**20

_END = 2**20


def git_revision(folder: Path) -> dict[str, Any] | None:
    """{"revision", "changed": files that differ from it} of `folder`'s checkout, None outside one."""
    git = lambda *args: subprocess.run(
        ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=20
    ).stdout  # fmt: skip
    try:
        revision = git("rev-parse", "HEAD").strip()
        return {
            "revision": revision,
            "changed": git("status", "--porcelain", "--untracked-files=no").splitlines(),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def installed_packages() -> list[str]:
    """`name==version` of every installed distribution, as `pip freeze` lists them."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(name.lower(), f"{name}=={distribution.version}")
    return [found[key] for key in sorted(found)]


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


def describe_run(config: ConfigDict, mesh: Mesh, data: Path, first_step: int) -> dict[str, Any]:
    """Everything about this start of a run but its weights."""
    devices = jax.devices()
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
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
            "of_process": [sum(d.process_index == p for d in devices) for p in range(jax.process_count())],
            "mesh": dict(mesh.shape),
            "runtime": devices[0].client.platform_version,
        },
        "environment": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith(("XLA_", "JAX_", "NCCL_", "LIBTPU_"))
        },
        "dataset": {"path": str(data), "files": dataset_checksums(data)},
    }


def record_start(workdir: Path, description: dict[str, Any]) -> Path:
    """Write a start's description to `workdir/starts/NNN.json` and return the path."""
    folder = workdir / "starts"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{1 + len(list(folder.glob('[0-9]*.json'))):03d}.json"
    write_json(path, description)
    return path
