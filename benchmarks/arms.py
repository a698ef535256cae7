"""Driver arms at equal compute: the same config, data, steps and seeds, and only `config.driver.arm` differs.

    python benchmarks/arms.py --out DIR [--config configs/demo128.py] [--size 128] [--arms full flow warp]
        [--seeds 3] [--steps 1000] [--identities 500] [--flags=--config.batch_size=8 ...]

For each arm and seed it trains a model on synthetic heads, animates 8 pairs of held-out people (32 frames
each, as in `python -m loki_jax.demo`) and measures HPF, HEF and PSNR against the rendered truth. Each run is
written to DIR/results/ARM-SEED.json when it is finished, and a run that is there is not repeated; an
interrupted training goes on from its last checkpoint, so the same command resumes. Printed: means over seeds
and pairs with 95 % bootstrap intervals (seeds are drawn, then pairs); as the last line one JSON object, which
also has the differences of each arm to the first in the same seeds and pairs.

A run of 1,000 steps of configs/demo.py (64 pixels, 4 windows of 8 frames a step) should take half an hour on
2 idle cores, from the 85 minutes of 4,000 steps of the demo model and the minutes of its measurement. Not yet
measured in full.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from loki_jax.compile_cache import enable_compile_cache
from loki_jax.demo import HEF_SIZE, held_out_pairs, make_shards
from loki_jax.evaluation import evaluate_pairs, synthetic_pairs
from loki_jax.io import write_json
from loki_jax.metrics.intervals import bootstrap_interval as interval
from loki_jax.pipeline import LokiPipeline, retarget_clip
from loki_jax.sources import stack_trees

# Seeds of the datasets: neither the shipped model nor the demo has seen these people.
TRAIN_SEED, HELD_OUT_SEED = 13, 16
FIGURES = ("hpf", "hef", "psnr")


@dataclasses.dataclass(frozen=True)
class Options:
    out: Path
    config: str = "configs/demo128.py"
    size: int = 128
    """side in pixels of the frames, that of the config"""
    arms: tuple[str, ...] = ("full", "flow", "warp")
    seeds: int = 3
    steps: int = 1000
    identities: int = 500
    frames: int = 20
    """of each training clip"""
    flags: tuple[str, ...] = ()
    """further flags of loki_jax.train"""


def train_arm(options: Options, arm: str, seed: int) -> Path:
    """Train, or go on with, one run; returns its workdir."""
    workdir = options.out / "runs" / f"{arm}-{seed}"
    subprocess.run(
        [
            sys.executable, "-m", "loki_jax.train", "--config", options.config, "--workdir", str(workdir),
            f"--config.data.path={options.out / 'shards'}", f"--config.driver.arm={arm}",
            f"--config.seed={seed}", f"--config.steps={options.steps}", "--config.sample.every=0",
            "--config.checkpoint.every=200", "--config.checkpoint.keep=1", *options.flags,
        ],
        check=True,
    )  # fmt: skip
    return workdir


def measure(workdir: Path, held_out: Path) -> dict[str, Any]:
    """`evaluate_pairs` of a trained model on the held-out pairs."""
    pipeline = LokiPipeline.from_checkpoint(workdir)
    head, sampling = pipeline.head, pipeline.sampling()
    pairs = held_out_pairs(held_out, head, pipeline.size)
    coefficients = stack_trees([retarget_clip(head, driver, portrait) for portrait, driver, _ in pairs])
    portraits = stack_trees([portrait for portrait, _, _ in pairs])
    windows = pipeline.windows_of_batch(
        portraits, coefficients, portraits.camera, portraits.crop, sampling
    )  # fmt: skip
    generated = np.concatenate([window.frames for window in windows], axis=1)
    judged = synthetic_pairs(head, pairs, coefficients, generated)
    return evaluate_pairs(head, judged, size=HEF_SIZE)


def summary(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Per arm: each figure, its share of the still portrait's, and its difference to the first arm."""
    rng, first = np.random.default_rng(0), next(iter(results))
    table = lambda arm, row, figure: np.array(
        [[pair[row][figure] for pair in run["pairs"]] for run in results[arm]]
    )
    found: dict[str, Any] = {}
    for arm in results:
        found[arm] = {"seeds": len(results[arm])}
        for figure in FIGURES:
            values = table(arm, "generated", figure)
            found[arm][figure] = interval(values, rng)
            if figure != "psnr":
                still = table(arm, "static", figure)
                found[arm][f"{figure}_of_still"] = float(values.mean() / still.mean())
            common = min(len(values), len(results[first]))
            if arm != first and common:
                change = values[:common] - table(first, "generated", figure)[:common]
                found[arm][f"{figure}_minus_{first}"] = interval(change, rng)
    return found


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    enable_compile_cache()
    shards, held_out = options.out / "shards", options.out / "held_out"
    if not (shards / "dataset_info.json").is_file():
        make_shards(shards, TRAIN_SEED, options.identities, options.frames, options.size)
    if not (held_out / "dataset_info.json").is_file():
        make_shards(held_out, HELD_OUT_SEED, 16, 64, options.size, "--validation", "0")
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    # Seed after seed, so that an interrupted benchmark has all arms of the first seeds.
    for seed in range(options.seeds):
        for arm in options.arms:
            file = options.out / "results" / f"{arm}-{seed}.json"
            if not file.is_file():
                began = time.monotonic()
                workdir = train_arm(options, arm, seed)
                trained = time.monotonic()
                found = measure(workdir, held_out)
                found["seconds"] = {"training": trained - began, "measuring": time.monotonic() - trained}
                file.parent.mkdir(exist_ok=True)
                write_json(file, found)
            run = json.loads(file.read_text())
            results[arm].append(run)
            means = "  ".join(f"{figure} {run['generated'][figure]:.4f}" for figure in FIGURES)
            print(f"{arm} seed {seed}: {means}  {run['seconds']}", flush=True)
    found = summary(results)
    print(f"\n{'arm':6} " + "".join(f"{figure:>30}" for figure in FIGURES))
    for arm, figures in found.items():
        cells = ("{:.4f} [{:.4f}, {:.4f}]".format(*figures[figure]) for figure in FIGURES)
        print(f"{arm:6} " + "".join(f"{cell:>30}" for cell in cells))
    print(json.dumps({"steps": options.steps, "config": options.config, "arms": found}))


if __name__ == "__main__":
    main()
