"""Joining the other processes of a run: one program, any topology.

`find_cluster` reads the environment (a pure function of a mapping), `join` acts on it. Known are explicit
flags, Slurm, Open MPI, Kubernetes (JobSet), TPU slices on GKE and TPU VMs. A process that finds none of
them runs alone. Whatever the topology, the global batch and the numbers are the same (docs/training.md).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

# jax's own choice for TPU slices; any free port serves.
_PORT = 8476


class ClusterError(ValueError):
    """The environment or the flags describe no usable cluster; the message says what is missing."""


class Cluster(NamedTuple):
    """How to reach the other processes.

    Attributes:
      kind: "flags", "environment", "slurm", "openmpi", "jobset" or "tpu".
      coordinator: host:port of process 0. None where jax asks the TPU's metadata ("tpu" only), as then are
        the two below.
      processes: how many there are.
      process_id: which one this is, from 0.
      local_devices: the GPUs of this process among those it sees; None: all.
    """

    kind: str
    coordinator: str | None
    processes: int | None
    process_id: int | None
    local_devices: tuple[int, ...] | None = None


def find_cluster(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    tpu_vm: bool = False,
) -> Cluster | None:
    """The cluster this process belongs to, or None when it is alone.

    The first that is found counts:

    - the arguments (flags `--coordinator --processes --process_id`), all three;
    - JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID (or JOB_COMPLETION_INDEX, which
      Kubernetes gives to the pods of an indexed job);
    - JobSet: JOBSET_NAME, REPLICATED_JOB_NAME, JAX_NUM_PROCESSES and JOB_COMPLETION_INDEX;
    - Slurm: what `srun` sets for each task of a step of more than one;
    - Open MPI: what `mpirun` sets for each rank of more than one;
    - TPU: TPU_WORKER_HOSTNAMES of more than one host (GKE), or a TPU VM, whose metadata jax asks.

    Args:
      environment: usually `os.environ`.
      tpu_vm: this machine is a TPU VM (`on_tpu_vm()`).

    Raises:
      ClusterError: part of a description is missing, or numbers contradict each other.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process_id": process_id}
    if any(value is not None for value in given.values()):
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise ClusterError(f"give all of {', '.join(given)} or none; missing: {', '.join(missing)}")
        return _checked(Cluster("flags", coordinator, processes, process_id))
    found = _from_variables(environment) or _from_slurm(environment) or _from_open_mpi(environment)
    if found is not None:
        return _checked(found) if found.processes > 1 else None
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(hosts) > 1 or tpu_vm:
        return Cluster("tpu", None, None, None)
    return None


def _checked(cluster: Cluster) -> Cluster:
    if cluster.processes < 1 or not 0 <= cluster.process_id < cluster.processes:
        raise ClusterError(
            f"process {cluster.process_id} of {cluster.processes} ({cluster.kind}): no such process"
        )
    if not re.fullmatch(r".+:\d+", cluster.coordinator):
        raise ClusterError(f"coordinator {cluster.coordinator!r} ({cluster.kind}): expected host:port")
    return cluster


def _number(environment: Mapping[str, str], *names: str) -> int | None:
    """The first of the variables that is set, as a number."""
    for name in names:
        if name in environment:
            try:
                return int(environment[name])
            except ValueError:
                raise ClusterError(f"{name}={environment[name]!r} is not a number") from None
    return None


def _from_variables(environment: Mapping[str, str]) -> Cluster | None:
    address, kind = environment.get("JAX_COORDINATOR_ADDRESS"), "environment"
    jobset, job = environment.get("JOBSET_NAME"), environment.get("REPLICATED_JOB_NAME")
    if address is None and jobset and job:
        # JobSet names its pods so, and gives them a headless service of its own name.
        address, kind = f"{jobset}-{job}-0-0.{jobset}:{_PORT}", "jobset"
    count = _number(environment, "JAX_NUM_PROCESSES")
    index = _number(environment, "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX")
    if address is None or count is None:
        return None  # the address alone may serve Slurm or Open MPI
    if index is None:
        raise ClusterError(
            f"{count} processes at {address}, but neither JAX_PROCESS_ID nor JOB_COMPLETION_INDEX is set"
        )
    return Cluster(kind, address, count, index)


def _from_slurm(environment: Mapping[str, str]) -> Cluster | None:
    # SLURM_STEP_NODELIST exists under srun only: a shell of salloc or the batch script itself is no task.
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environment.keys():
        return None
    count = _number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if count is None:
        return None
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"])
    if first is None:
        raise ClusterError(f"SLURM_STEP_NODELIST={environment['SLURM_STEP_NODELIST']!r} names no host")
    host = first[1] + (first[2] or "")
    # Two jobs on a node must not share a port.
    port = 49152 + _number(environment, "SLURM_JOB_ID") % 16000
    return Cluster(
        "slurm", environment.get("JAX_COORDINATOR_ADDRESS", f"{host}:{port}"), count,
        _number(environment, "SLURM_PROCID"),
        _share_of_gpus(environment, "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    )  # fmt: skip


def _from_open_mpi(environment: Mapping[str, str]) -> Cluster | None:
    count = _number(environment, "OMPI_COMM_WORLD_SIZE")
    if count is None:
        return None
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    match = re.match(r"(\d+)\.\d+;(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    if address is None and match is not None:
        host = match[2] or f"[{match[3]}]"
        address = f"{host}:{49152 + int(match[1]) // 4096 % 16000}"
    if address is None and _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") == count:
        address = f"localhost:{_PORT}"
    if address is None and count > 1:
        raise ClusterError(
            "Open MPI 5 does not tell the ranks where rank 0 runs: "
            "give mpirun -x JAX_COORDINATOR_ADDRESS=HOST_OF_RANK_0:8476"
        )
    return Cluster(
        "openmpi", address, count, _number(environment, "OMPI_COMM_WORLD_RANK"),
        _share_of_gpus(environment, "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    )  # fmt: skip


def _share_of_gpus(environment: Mapping[str, str], local_id: str, local_count: str) -> tuple[int, ...] | None:
    """Several tasks on a node that all see all its GPUs take one each; else a task takes what it sees."""
    count = re.match(r"\d+", environment.get(local_count, "1"))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if (
        count is None
        or int(count[0]) == 1
        or (visible is not None and len(visible.split(",")) < int(count[0]))
    ):
        return None
    index = _number(environment, local_id)
    return None if index is None else (index,)


def on_tpu_vm() -> bool:
    """Whether this machine is a TPU VM that jax can use."""
    has_chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return has_chips and importlib.util.find_spec("libtpu") is not None


def join(cluster: Cluster | None) -> None:
    """Connect to the other processes; must run before jax touches a device. None: nothing to do.

    Raises:
      ClusterError: the others could not be reached.
    """
    if cluster is None:
        return
    try:
        if cluster.kind == "tpu":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(
                cluster.coordinator, cluster.processes, cluster.process_id, cluster.local_devices,
                # All is known: jax must not look for another cluster around this one.
                cluster_detection_method="deactivate",
            )  # fmt: skip
        # Gloo gives up when the first collective finds a process 30 s late. Here all are on time.
        wait_for_all("joined")
        multihost_utils.sync_global_devices("joined")
    except (RuntimeError, ValueError) as error:
        raise ClusterError(f"could not join {cluster}: {error}") from error


def wait_for_all(name: str, seconds: int = 3600) -> None:
    """Wait until every process is here, without the devices; each name once in a process's life.

    Before a collective that one process may reach much later, because it compiles or reads longer.
    """
    ocp.multihost.get_barrier_sync_fn()(key=f"loki_jax {name}", timeout_ms=1000 * seconds)
