"""Joining the other processes of a run: one program, any topology.

`find_cluster` reads the environment (a pure function of a mapping), `join` acts on it. jax finds the
coordinator under Slurm, Open MPI 4 and on TPUs; Kubernetes without access to its API, shared GPUs of a node
and clear errors are ours. A process that finds no others runs alone. Whatever the topology, the global batch
and the numbers are the same (docs/training.md).
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
      coordinator: host:port of process 0; None where jax finds it, as then are for "tpu" the two below.
      processes: how many there are.
      process_id: which one this is, from 0.
      local_devices: the GPUs of this process among those it sees; empty: all.
    """

    kind: str
    coordinator: str | None
    processes: int | None
    process_id: int | None
    local_devices: tuple[int, ...] = ()


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
        return None if found.processes == 1 else _checked(found)
    if tpu_vm or "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return Cluster("tpu", None, None, None)
    return None


def _checked(cluster: Cluster) -> Cluster:
    kind, coordinator, count, index, _ = cluster
    if count is None or index is None or not 0 <= index < count:
        raise ClusterError(f"process {index} of {count} ({kind}): no such process")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ClusterError(f"coordinator {coordinator!r} ({kind}): expected host:port")
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
    count = _number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if count is None or not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environment.keys():
        return None
    gpus = _share_of_gpus(environment, "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    return Cluster("slurm", address, count, _number(environment, "SLURM_PROCID"), gpus)


def _from_open_mpi(environment: Mapping[str, str]) -> Cluster | None:
    count = _number(environment, "OMPI_COMM_WORLD_SIZE")
    if count is None:
        return None
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address is None and "OMPI_MCA_orte_hnp_uri" not in environment and count > 1:
        if _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") != count:
            raise ClusterError(
                "Open MPI 5 does not tell the ranks where rank 0 runs: "
                "give mpirun -x JAX_COORDINATOR_ADDRESS=HOST_OF_RANK_0:8476"
            )
        address = f"localhost:{_PORT}"
    gpus = _share_of_gpus(environment, "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    return Cluster("openmpi", address, count, _number(environment, "OMPI_COMM_WORLD_RANK"), gpus)


def _share_of_gpus(environment: Mapping[str, str], local_id: str, local_count: str) -> tuple[int, ...]:
    """Several tasks on a node that all see all its GPUs take one each; else a task takes what it sees."""
    count = re.match(r"\d+", environment.get(local_count, ""))  # Slurm writes 4(x2)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    index = _number(environment, local_id)
    if count is None or int(count[0]) == 1 or index is None:
        return ()
    return () if visible is not None and len(visible.split(",")) < int(count[0]) else (index,)


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
    coordinator, gpus = cluster.coordinator, cluster.local_devices
    # Where all is known, jax must not look for another cluster around this one.
    method = None if coordinator is None else "deactivate"
    try:
        jax.distributed.initialize(
            coordinator, cluster.processes, cluster.process_id, gpus, cluster_detection_method=method
        )
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
