"""Runs whose disk fills up at random bytes end with code 74 and lose nothing.

    python benchmarks/disk_full.py [--runs 20] [--steps 20]

The real program trains a tiny config in a file system in memory whose size is drawn between nothing and
what an undisturbed run writes. It must end with exit code 74 (or 0, where there was room) and one message.
Then the disk gets room, and the same command must end with all arrays, data position and losses of the
undisturbed run. Mounting needs a user namespace (`unshare`) or root; without, the script ends with code 69.
Ctrl-C ends the measurement with what is done. The last line of the output is one JSON object; the exit code
is 1 unless all agree.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.resume import identical, last_state
from loki_jax.training.faults import ExitCode
from tests.training.tiny_run import environment, tiny_config, train_command, write_shards

ROOM = 2**30


def resize(disk: Path, size: int, mounted: bool) -> None:
    """Mount a file system of `size` bytes at `disk`, or give the one there another size."""
    options = f"{'remount,' if mounted else ''}size={size // 4096 * 4096 + 4096}"
    where = [str(disk)] if mounted else ["tmpfs", str(disk)]
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, *where], check=True)


def train(command: list[str], env: dict) -> tuple[int, list[str]]:
    """(exit code, lines that tell an error)."""
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def measure(folder: Path, runs: int, steps: int, env: dict) -> dict:
    """The whole measurement in `folder`; the JSON object."""
    began = time.monotonic()
    config = tiny_config(
        write_shards(folder / "shards"), steps=steps, checkpoint__every=steps // 4, checkpoint__keep=2
    )
    straight, disk = folder / "straight", folder / "disk"
    code, errors = train(train_command(config, straight), env)
    if code != 0:
        raise RuntimeError(f"the undisturbed run failed: {errors}")
    expected = last_state(straight, steps)
    written = sum(path.stat().st_size for path in straight.rglob("*") if path.is_file())
    # While a checkpoint is written, the ones before it are still there.
    largest = int(1.5 * written)
    print(f"undisturbed: {steps} steps leave {written / 1e6:.1f} MB", flush=True)
    draw, rows = random.Random(0), []
    disk.mkdir()
    try:
        for number in range(runs):
            size = int(draw.uniform(0, largest))
            resize(disk, size, mounted=False)
            try:
                command = train_command(config, disk / "run")
                code, errors = train(command, env)
                resize(disk, ROOM, mounted=True)
                again, _ = train(command, env)
                same = again == 0 and identical(expected, last_state(disk / "run", steps))
            finally:
                subprocess.run(["umount", "--lazy", str(disk)], check=True)
            told = code == 0 or (code == ExitCode.STORAGE and len(errors) == 1)
            rows.append({"bytes": size, "code": code, "told": told, "same": same})
            print(f"run {number}: {rows[-1]} {errors}", flush=True)
    except KeyboardInterrupt:
        print("stopped")
    return {
        "runs": len(rows), "of": runs, "filled": sum(row["code"] != 0 for row in rows),
        "told": sum(row["told"] for row in rows), "identical": sum(row["same"] for row in rows),
        "steps": steps, "seconds": round(time.monotonic() - began),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.inside:
        # Mounts of a namespace of its own disappear with it.
        own = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
        if shutil.which("unshare") is None or subprocess.run([*own, "true"]).returncode != 0:
            sys.exit(69)
        os.execvp("unshare", [*own, sys.executable, *sys.argv, "--inside"])
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.runs, args.steps, environment(Path(folder) / "cache"))
    print(json.dumps(result))
    sys.exit(0 if result["told"] == result["identical"] == result["runs"] else 1)


if __name__ == "__main__":
    main()
