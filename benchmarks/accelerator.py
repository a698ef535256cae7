"""What only an accelerator can show, in one run on one host, without a network.

    ./benchmarks/accelerator.sh [--out runs/accelerator] [--sections device inputs train ...] [--quick]
        [--windows 2] [--steps 50] [--portraits P... --clips C...]

Sections, each in a process and a time limit of its own:
  device    what the device is, and the rate of large matrix products on it
  tests     the tests that need a GPU
  inputs    synthetic 512-pixel shards, and random weights in the place of SD 2.1's
  train     `python -m loki_jax.train --config configs/hdtf.py` on these: killed with SIGKILL after its first
            checkpoint and run again. Time and MFU of a step, and peak memory
  parts     benchmarks/step.py: share of each part, sampling of 16 frames; memory beside `plan`'s
  torch     the same beside the PyTorch counterpart (needs diffusers)
  raster    benchmarks/raster.py
  geometry  benchmarks/geometry.py --only speed, where portraits and clips are given
The result of a section is added to OUT/results.jsonl when it ends, and its output is in OUT/SECTION.log: a
run that is cut loses nothing. Rows for docs/benchmarks.md are printed at the end, and then one JSON object.
`--quick` makes everything tiny: it shows on a CPU that the program runs, and its figures say nothing.
`launch/train_demo.sh` is to be run after it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {
    "device": 90, "tests": 120, "inputs": 300, "train": 480, "parts": 480, "torch": 600, "raster": 180,
    "geometry": 300,
}  # fmt: skip
QUICK_CONFIG = """from benchmarks.step import make_config

def get_config(arg=None):
    return make_config(True, 1)
"""
MATRIX = """
import json, jax
from benchmarks.step import matrix_rate
device = jax.devices()[0]
print(json.dumps({"jax": jax.__version__, "platform": device.platform, "device": device.device_kind,
                  "devices": jax.device_count(), "matrix_rate": matrix_rate(%r)}))
"""


def run(command: list[str], log, deadline: float) -> int:
    """Run a command until `deadline`; 124 where it was ended then."""
    try:
        left = max(deadline - time.monotonic(), 1)
        return subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, timeout=left
        ).returncode
    except subprocess.TimeoutExpired:
        return 124


def train_and_kill(command: list[str], workdir: Path, first: int, log, deadline: float) -> int:
    """Run a training, kill it when the checkpoint of step `first` is whole, and run it to its end."""
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    while process.poll() is None and not (workdir / "checkpoints" / str(first)).is_dir():
        if time.monotonic() > deadline:
            process.kill()
            return 124
        time.sleep(0.1)
    killed = process.poll() is None
    process.kill()
    process.wait()
    return run(command, log, deadline) if killed else process.returncode or 1


def train_result(workdir: Path) -> dict:
    """Medians of the intervals between reports, each run's first two left out; and the peak of both runs."""
    from statistics import median

    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "steps_per_s" in row]
    steady = rows[2:-1] or rows
    return {
        "steps": rows[-1]["step"], "first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"],
        **{
            key: median(row[key] for row in steady)
            for key in ("steps_per_s", "clips_per_s", "mfu")
            if key in rows[0]
        },
        "data_wait": max(row["data_wait"] for row in steady),
        "peak_memory_gb": max(row.get("peak_memory_gb", 0.0) for row in rows),
        "starts": len(list((workdir / "starts").iterdir())),
    }  # fmt: skip


def sections(options: argparse.Namespace) -> dict[str, Callable[..., tuple[int, dict | None]]]:
    """Name -> function of (log, deadline) that gives (exit code, result); None: the log's last line."""
    out, python, quick = options.out, [sys.executable], ["--quick"] * options.quick
    config, size, windows, steps = "configs/hdtf.py", 512, options.windows, options.steps
    if options.quick:
        config, size, windows, steps = str(out / "quick.py"), 64, 1, 4
    command = lambda *parts: lambda log, deadline: (run([*python, *parts], log, deadline), None)

    def inputs(log, deadline):
        synth = ["-m", "data_prep.synth", "--out", str(out / "shards"), "--overwrite", "--size", str(size)]
        synth += ["--identities", "4", "--clips-per-identity", "1", "--frames", "20", "--validation", "0.25"]
        backbone = ["benchmarks/random_backbone.py", str(out / "backbone"), "--config", config]
        return run([*python, *synth], log, deadline) or run([*python, *backbone], log, deadline), {}

    def train(log, deadline):
        workdir = out / "train"
        flags = {
            "data.path": out / "shards", "pretrained": out / "backbone", "batch_size": windows,
            "steps": steps, "log.every": max(steps // 10, 1), "checkpoint.every": steps // 2,
            "checkpoint.keep": 1, "validation.every": 0, "sample.every": 0,
        }  # fmt: skip
        given = [f"--config.{key}={value}" for key, value in flags.items()]
        program = [*python, "-m", "loki_jax.train", "--config", config, "--workdir", str(workdir), *given]
        code = train_and_kill(program, workdir, steps // 2, log, deadline)
        return code, train_result(workdir) if code == 0 else None

    step = ["benchmarks/step.py", "--windows", str(windows), "--rounds", "1", *quick]
    found = {
        "device": command("-c", MATRIX % options.quick),
        "tests": command("-m", "pytest", "-q", "tests/models/test_attention.py", "-k", "fused", "--tb=short"),
        "inputs": inputs,
        "train": train,
        "parts": command(*step, "--repeats", "5", "--no-torch"),
        "torch": command(*step, "--repeats", "5"),
        "raster": command("benchmarks/raster.py", *quick),
    }
    if options.portraits and options.clips:
        given = ["--portraits", *options.portraits, "--clips", *options.clips]
        found["geometry"] = command("benchmarks/geometry.py", "--only", "speed", *given)
    return found


def last_object(log: Path) -> dict | None:
    """The JSON object in the last line of a log, if there is one."""
    try:
        found = json.loads(log.read_text(errors="replace").splitlines()[-1])
    except (IndexError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def rows_of(results: dict[str, dict]) -> list[str]:
    """Rows for docs/benchmarks.md."""
    rows, command = [], "`benchmarks/accelerator.sh`"
    device = results.get("device") or {}
    where = device.get("device", "?")
    if train := results.get("train"):
        mfu = f", MFU {train['mfu']:.1%} of the data sheet's rate" if "mfu" in train else ""
        rows.append(
            f"| main command at full size, random weights, killed and resumed | {command} (train) | {where} "
            f"| {1e3 / train['steps_per_s']:.0f} ms a step, {train['clips_per_s']:.2f} windows/s{mfu}, peak "
            f"{train['peak_memory_gb']:.1f} GB, waiting for data {train['data_wait']:.1%} |"
        )
    if parts := results.get("torch") or results.get("parts"):
        share = ", ".join(f"{name} {value:.1%}" for name, value in parts["share"].items())
        ours = parts["milliseconds"]["ours"]
        rows.append(
            f"| full-size train step, {parts['windows']} windows: time, MFU of the matrix rate measured "
            f"there, share by part | {command} (parts) | {where} | {ours['train step']:.0f} ms, "
            f"{parts['mfu_of_measured_rate']:.1%}; {share} |"
        )
        rows.append(
            f"| 16 frames of 512 x 512, 50 DDIM steps, batched guidance | {command} (parts) | {where} | "
            f"{ours['sampling'] / 1e3:.1f} s |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator"))
    parser.add_argument("--sections", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--quick", action="store_true", help="everything tiny, to see that it runs")
    parser.add_argument("--windows", type=int, default=2, help="of 16 frames a step")
    parser.add_argument("--steps", type=int, default=50, help="of the training")
    parser.add_argument("--portraits", nargs="*", default=[])
    parser.add_argument("--clips", nargs="*", default=[])
    options = parser.parse_args()
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "quick.py").write_text(QUICK_CONFIG)
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    results: dict[str, dict] = {}
    for name, section in sections(options).items():
        if name not in options.sections:
            continue
        print(f"== {name}, at most {LIMITS[name]} s", flush=True)
        began, path = time.monotonic(), options.out / f"{name}.log"
        with open(path, "w") as log:
            code, result = section(log, began + LIMITS[name])
        result = last_object(path) if result is None else result
        seconds = round(time.monotonic() - began, 1)
        row = {"section": name, "exit": code, "seconds": seconds, "result": result}
        with open(options.out / "results.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if code or name == "tests":
            print("\n".join(path.read_text(errors="replace").splitlines()[-15:]))
        print(json.dumps(row), flush=True)
        if code == 0 and result:
            results[name] = result
    print("\n".join(rows_of(results)))
    print(json.dumps({"benchmark": "accelerator", "quick": options.quick, "results": results}))


if __name__ == "__main__":
    main()
