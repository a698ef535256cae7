"""What a run needs to be told apart and repeated: code, packages, devices, data. One file for each start."""

from __future__ import annotations

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
from jax.sharding import Mesh
from ml_collections import ConfigDict

import loki_jax
from loki_jax.head.asset import file_sha256

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
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(description, indent=1, default=list) + "\n")
    os.replace(partial, path)
    return path
