"""Runs killed with SIGKILL and resumed end with the parameters of an undisturbed run, bit for bit.

    python benchmarks/resume.py [--quick] [--runs 20] [--steps 60]

The real program trains a tiny config on shards that this script makes. One run is left alone. Each
of the others is killed once, half of them at a random moment of the loop and half of them while a
checkpoint is being written, and started again with the same command. Compared are all arrays of the last
checkpoint (parameters, moving average, optimiser), the position in the data, and the losses of all steps.
--quick: two runs. The last line of the output is one JSON object; the exit code is 1 unless all agree.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loki_jax.training.checkpoint import restore_as_numpy, saved_steps
from loki_jax.training.logging import read_metrics
from tests.training.tiny_run import environment, tiny_config, train_command, write_shards

TREES = ("params", "ema", "optimizer")


def last_state(workdir: Path, steps: int) -> dict:
    """All arrays of the last checkpoint, the data position, and the loss of every step."""
    folder = workdir / "checkpoints" / str(steps)
    state = {name: restore_as_numpy((folder / name).absolute()) for name in TREES}
    state["data"] = json.loads((folder / "data" / "metadata").read_text())
    state["losses"] = {
        row["step"]: row["loss"] for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row
    }
    return state


def identical(a: dict, b: dict) -> bool:
    """Whether two `last_state` agree in every bit."""
    if a["data"] != b["data"] or a["losses"] != b["losses"]:
        return False
    same = jax.tree.map(lambda x, y: np.array_equal(x, y), [a[n] for n in TREES], [b[n] for n in TREES])
    return all(jax.tree.leaves(same))


def unfinished(workdir: Path) -> list[str]:
    """Checkpoints under way."""
    folder = workdir / "checkpoints"
    return [entry.name for entry in folder.iterdir() if "tmp" in entry.name] if folder.is_dir() else []


def kill_in_loop(
    command: list[str], env: dict, workdir: Path, delay: float, in_write: bool, late: float
) -> int | None:
    """Start a run and kill it; the step of its last line, or None when it had finished before.

    Args:
      delay: seconds after the loop began.
      in_write: from then on wait for a checkpoint under way.
      late: seconds to wait still.
    """
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, cwd=workdir.parent)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("compiling the train step took"):
            break
    os.set_blocking(process.stderr.fileno(), False)
    end = time.monotonic() + delay
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.001)
    while in_write and process.poll() is None and not unfinished(workdir):
        time.sleep(0.0005)
    if in_write:
        time.sleep(late)
    process.send_signal(signal.SIGKILL)
    lines += (process.stderr.read() or "").splitlines()
    if process.wait() == 0:
        return None
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError("the run failed by itself:\n" + "".join(lines))
    steps = [int(m[1]) for m in map(re.compile(r"step (\d+)/").match, lines) if m]
    return steps[-1] if steps else 0


def run(folder: Path, runs: int, steps: int, env: dict, log=print) -> dict:
    """The whole measurement in `folder`; the JSON object."""
    began = time.monotonic()
    shards = write_shards(folder / "shards")
    config = tiny_config(shards, steps=steps, checkpoint__every=steps // 5, checkpoint__keep=2)
    straight = folder / "straight"
    subprocess.run(train_command(config, straight), env=env, check=True, capture_output=True)
    expected = last_state(straight, steps)
    # Rates include the checkpoints: what a delay is drawn from.
    rows = read_metrics(straight / "metrics.jsonl")
    duration = sum(1 / row["steps_per_s"] for row in rows if "steps_per_s" in row)
    log(f"undisturbed: {steps} steps in {duration:.1f} s")

    draw, found = random.Random(0), []
    while len(found) < runs:
        workdir = folder / f"run{len(found)}"
        in_write = len(found) % 2 == 1
        command = train_command(config, workdir)
        killed_at = kill_in_loop(
            command, env, workdir, draw.uniform(0, 0.9 * duration), in_write, draw.uniform(0, 0.05)
        )
        if killed_at is None:
            subprocess.run(["rm", "-rf", str(workdir)], check=True)
            continue
        writing, saved = unfinished(workdir), saved_steps(workdir)
        again = subprocess.run(command, env=env, capture_output=True, text=True)
        if again.returncode != 0:
            raise RuntimeError(f"run {len(found)} did not resume:\n{again.stderr[-3000:]}")
        same = identical(expected, last_state(workdir, steps))
        found.append(
            {
                "killed_after": killed_at,
                "in_write": bool(writing),
                "resumed_from": saved[-1] if saved else 0,
                "same": same,
            }
        )
        log(f"run {len(found)}: {found[-1]}")
    return {
        "runs": runs,
        "identical": sum(row["same"] for row in found),
        "killed_in_a_write": sum(row["in_write"] for row in found),
        "resumed_from_steps": sorted({row["resumed_from"] for row in found}),
        "steps": steps,
        "seconds": round(time.monotonic() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two runs")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        env = environment(Path(folder) / "cache")
        result = run(Path(folder), 2 if args.quick else args.runs, args.steps, env)
    print(json.dumps(result))
    sys.exit(0 if result["identical"] == result["runs"] else 1)


if __name__ == "__main__":
    main()
