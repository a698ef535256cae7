"""How a process finds the others of its run, from made-up environments."""

import pytest

from loki_jax.training.distributed import Cluster, ClusterError, find_cluster

SLURM = {
    "SLURM_JOB_ID": "16003", "SLURM_STEP_NODELIST": "node[012-015,020]", "SLURM_NTASKS": "5",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "0",
}  # fmt: skip


def test_alone():
    assert find_cluster({}) is None
    assert find_cluster(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    # The shell of an allocation has a job but no step.
    assert find_cluster({key: value for key, value in SLURM.items() if "STEP" not in key}) is None
    assert find_cluster({"TPU_WORKER_HOSTNAMES": "localhost"}) is None


def test_flags_count_before_the_environment():
    assert find_cluster(SLURM, "host:1", 2, 1) == Cluster("flags", "host:1", 2, 1)
    with pytest.raises(ClusterError, match="missing: --processes, --process_id"):
        find_cluster({}, "host:1")
    with pytest.raises(ClusterError, match="process 2 of 2"):
        find_cluster({}, "host:1", 2, 2)
    with pytest.raises(ClusterError, match="expected host:port"):
        find_cluster({}, "host", 2, 0)


def test_slurm_leaves_the_coordinator_to_jax():
    assert find_cluster(SLURM) == Cluster("slurm", None, 5, 3)
    assert find_cluster(SLURM | {"JAX_COORDINATOR_ADDRESS": "h:1"}) == Cluster("slurm", "h:1", 5, 3)
    with pytest.raises(ClusterError, match="process 5 of 5"):
        find_cluster(SLURM | {"SLURM_PROCID": "5"})


def test_tasks_that_see_all_gpus_of_a_node_take_one_each():
    node = SLURM | {"SLURM_NTASKS_PER_NODE": "4", "SLURM_LOCALID": "2"}
    assert find_cluster(node).local_devices == (2,)
    assert find_cluster(node | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).local_devices == (2,)
    assert find_cluster(node | {"CUDA_VISIBLE_DEVICES": "2"}).local_devices == ()
    assert find_cluster(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).local_devices == ()


def test_open_mpi():
    ranks = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    old = ranks | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    assert find_cluster(old)[:4] == ("openmpi", None, 4, 1)  # jax reads the address
    with pytest.raises(ClusterError, match="-x JAX_COORDINATOR_ADDRESS"):
        find_cluster(ranks)
    assert find_cluster(ranks | {"JAX_COORDINATOR_ADDRESS": "h:1"})[:4] == ("openmpi", "h:1", 4, 1)
    assert find_cluster(ranks | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}).coordinator == "localhost:8476"


def test_kubernetes():
    pod = {"JAX_NUM_PROCESSES": "8", "JOB_COMPLETION_INDEX": "5"}
    assert find_cluster(pod | {"JAX_COORDINATOR_ADDRESS": "h:1"}) == Cluster("environment", "h:1", 8, 5)
    jobset = pod | {"JOBSET_NAME": "loki", "REPLICATED_JOB_NAME": "workers"}
    assert find_cluster(jobset) == Cluster("jobset", "loki-workers-0-0.loki:8476", 8, 5)
    with pytest.raises(ClusterError, match="JOB_COMPLETION_INDEX"):
        find_cluster({"JAX_NUM_PROCESSES": "8", "JAX_COORDINATOR_ADDRESS": "h:1"})
    with pytest.raises(ClusterError, match="JAX_NUM_PROCESSES='eight'"):
        find_cluster(jobset | {"JAX_NUM_PROCESSES": "eight"})


def test_tpu_hosts_are_left_to_jax():
    assert find_cluster({"TPU_WORKER_HOSTNAMES": "a,b"}) == Cluster("tpu", None, None, None)
    assert find_cluster({}, tpu_vm=True).kind == "tpu"
