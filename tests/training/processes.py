"""Training programs in several processes on simulated devices that talk over gloo."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loki_jax.training.logging import read_metrics
from tests.training.tiny_run import environment


class Topology(NamedTuple):
    processes: int
    devices: int  # of each process
    axis: str  # which mesh axis takes them all
    accumulate: int = 1

    @property
    def name(self) -> str:
        return f"{self.processes}x{self.devices}-{self.axis}-{self.accumulate}"


ONE = Topology(1, 1, "data")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(command: list[str], topology: Topology, cache: Path) -> None:
    """Run one command in all processes of a topology; RuntimeError with their output when one fails."""
    address = f"localhost:{free_port()}"
    env = environment(cache, topology.devices)
    running = []
    for index in range(topology.processes):
        cluster = []
        if topology.processes > 1:
            cluster = [
                f"--coordinator={address}",
                f"--processes={topology.processes}",
                f"--process_id={index}",
            ]
        running.append(
            subprocess.Popen(
                [*command, *cluster], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    outputs = [process.communicate()[0] for process in running]
    codes = [process.returncode for process in running]
    if any(codes):
        raise RuntimeError(
            f"{topology.name}: exit codes {codes}\n" + "\n".join(out[-3000:] for out in outputs)
        )


def losses(workdir: Path) -> np.ndarray:
    return np.array([row["loss"] for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row])
