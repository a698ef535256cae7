"""Runs killed with SIGKILL and resumed end with the parameters of an undisturbed run, bit for bit.

    python benchmarks/resume.py [--quick] [--runs 20] [--kills 1] [--steps 60] [--modes write loop one-of-two]

The real program trains a tiny config on shards that this script makes. One run is left alone. Each of the
others is killed `--kills` times and started again with the same command each time. Runs take turns: killed
while a checkpoint is being written (write), at a random moment at which none is (loop), or one of two
processes at a random moment (one-of-two), whose partner must end by itself. Compared are all arrays of the
last checkpoint (parameters, moving average, optimiser), the position in the data and the losses of all steps.
--quick: two runs. Ctrl-C ends the measurement with what is done. The last line of the output is one JSON
object; the exit code is 1 unless all agree.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loki_jax.training.checkpoint import restore_as_numpy, saved_steps
from loki_jax.training.logging import read_metrics
from tests.training.processes import free_port
from tests.training.tiny_run import environment, tiny_config, train_command, write_shards

TREES = ("params", "ema", "optimizer")
MODES = ("write", "loop", "one-of-two")


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


class Killed(NamedTuple):
    """What a kill met; `step` is None where the run had finished before."""

    step: int | None
    in_write: bool


def start(command: list[str], env: dict, processes: int) -> list[subprocess.Popen]:
    """The processes of a run; the first one's lines can be read."""
    port = free_port()
    cluster = lambda i: [f"--coordinator=localhost:{port}", f"--processes={processes}", f"--process_id={i}"]
    return [
        subprocess.Popen(
            [*command, *(cluster(i) if processes > 1 else [])], env=env, text=True,
            stderr=subprocess.PIPE if i == 0 else subprocess.DEVNULL,
        )
        for i in range(processes)
    ]  # fmt: skip


def kill_once(
    command: list[str], env: dict, workdir: Path, mode: str, delay: float, draw: random.Random
) -> Killed:
    """Start a run, kill it `delay` seconds after its loop began (or a little later, by `mode`), and wait."""
    running = start(command, env, processes_of(mode))
    lines = []
    for line in running[0].stderr:
        lines.append(line)
        if line.startswith("compiling the train step took"):
            break
    os.set_blocking(running[0].stderr.fileno(), False)
    end = time.monotonic() + delay
    alive = lambda: all(process.poll() is None for process in running)
    while time.monotonic() < end and alive():
        time.sleep(0.001)
    if mode != "one-of-two":
        while alive() and bool(unfinished(workdir)) != (mode == "write"):
            time.sleep(0.0005)
    if mode == "write":
        time.sleep(draw.uniform(0, 0.05))
    victim = draw.choice(running)
    victim.send_signal(signal.SIGKILL)
    writing = bool(unfinished(workdir))
    codes = [process.wait(300) for process in running]
    try:
        lines += (running[0].stderr.read() or "").splitlines()
    except BlockingIOError:
        pass
    if not any(codes):
        return Killed(None, writing)
    if victim.returncode != -signal.SIGKILL:
        raise RuntimeError("the run failed by itself:\n" + "\n".join(lines[-30:]))
    if 0 in codes or 1 in codes:
        raise RuntimeError(f"one of two processes was killed, and they ended with {codes}")
    steps = [int(m[1]) for m in map(re.compile(r"step (\d+)/").match, lines) if m]
    return Killed(steps[-1] if steps else 0, writing)


def processes_of(mode: str) -> int:
    return 2 if mode == "one-of-two" else 1


def finish(command: list[str], env: dict, processes: int) -> None:
    """Run to the end; RuntimeError where it fails."""
    running = start(command, env, processes)
    text = running[0].stderr.read()
    if any(process.wait() for process in running):
        raise RuntimeError(f"a run failed:\n{text[-3000:]}")


def log(text: str) -> None:
    print(text, flush=True)


def measure(folder: Path, modes: list[str], runs: int, kills: int, steps: int, env: dict) -> dict:
    """The whole measurement in `folder`; the JSON object."""
    began = time.monotonic()
    config = tiny_config(
        write_shards(folder / "shards"), steps=steps, checkpoint__every=steps // 5, checkpoint__keep=2
    )
    expected, durations = {}, {}
    for count in sorted({processes_of(mode) for mode in modes}):
        straight = folder / f"straight{count}"
        finish(train_command(config, straight), env, count)
        expected[count] = last_state(straight, steps)
        # Rates include the checkpoints: what a delay is drawn from.
        rows = read_metrics(straight / "metrics.jsonl")
        durations[count] = sum(1 / row["steps_per_s"] for row in rows if "steps_per_s" in row)
        log(f"undisturbed, {count} processes: {steps} steps in {durations[count]:.1f} s")

    draw, found = random.Random(0), []
    try:
        for number in range(runs):
            mode = modes[number % len(modes)]
            workdir, count = folder / f"run{number}", processes_of(mode)
            command, met = train_command(config, workdir), []
            while len(met) < kills:
                left = 1 - (saved_steps(workdir) or [0])[-1] / steps
                killed = kill_once(
                    command, env, workdir, mode, draw.uniform(0, 0.9 * left * durations[count]), draw
                )
                if killed.step is None:  # it was quicker; begin again
                    shutil.rmtree(workdir)
                    met.clear()
                    continue
                met.append(killed)
            finish(command, env, count)
            same = identical(expected[count], last_state(workdir, steps))
            found.append({"mode": mode, "kills": met, "same": same})
            log(f"run {number}: {mode}, {'identical' if same else 'DIFFERENT'}, {[tuple(k) for k in met]}")
            shutil.rmtree(workdir)
    except KeyboardInterrupt:
        log("stopped")
    every = [kill for row in found for kill in row["kills"]]
    return {
        "runs": len(found), "of": runs, "kills": len(every), "identical": sum(row["same"] for row in found),
        "killed_in_a_write": sum(kill.in_write for kill in every),
        "runs_by_mode": {mode: sum(row["mode"] == mode for row in found) for mode in modes},
        "steps": steps, "seconds": round(time.monotonic() - began),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two runs")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=1, help="of each run")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        env = environment(Path(folder) / "cache")
        runs = 2 if args.quick else args.runs
        result = measure(Path(folder), args.modes, runs, args.kills, args.steps, env)
    print(json.dumps(result))
    sys.exit(0 if result["identical"] == result["runs"] else 1)


if __name__ == "__main__":
    main()
