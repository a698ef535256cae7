"""Loki's driver map against the driver's pixels, in one network at equal compute (docs/svp.md).

    python benchmarks/svp.py --out DIR [--config configs/demo_svp.py] [--size 64] [--steps 1000] [--seeds 3]
        [--identities 300] [--parts arms history fusion] [--flags=--config.batch_size=8 ...]

Trains `CONFIG:loki_driver`, `CONFIG:same_identity` and CONFIG (cross-identity pairs) on the same synthetic
people, and measures 8 held-out pairs of 32 frames in absolute pose:

- arms: HPF, HEF, PSNR, and leakage of the driver's colours and of the shape of its face (0: none, 1: all).
- history: 160 frames with the history and without: motion at the borders of windows over that inside, in the
  truth and generated; PSNR over time.
- fusion: HPF against PSNR for scales of source and motion, on 4 pairs.

History and fusion are measured with Loki's driver map of seed 0. A run or measurement that is in DIR/results
is not repeated and an interrupted training goes on from its last checkpoint, so the same command resumes.
Writes DIR/arms.png, history.png, fusion.png; the last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import tyro
from PIL import Image

from loki_jax.compile_cache import enable_compile_cache
from loki_jax.data.reader import open_dataset
from loki_jax.demo import FRAMES, HEF_SIZE, PAIRS, held_out_pairs, make_shards
from loki_jax.evaluation import evaluate_pairs, rendered_truth, synthetic_pairs
from loki_jax.face.types import Coefficients
from loki_jax.io import write_json
from loki_jax.metrics.image import psnr
from loki_jax.metrics.intervals import bootstrap_interval
from loki_jax.metrics.leakage import leakage
from loki_jax.pipeline import LokiPipeline, Sampling, retarget_clip
from loki_jax.sources import DrivingClip, Portrait, load_driving_clip, stack_trees
from loki_jax.synthetic.appearance import sample_appearance, sample_shape

matplotlib.use("Agg")

ARMS = {"loki map": ":loki_driver", "pixels, same": ":same_identity", "pixels, cross": ""}
FIGURES = ("hpf", "hef", "psnr", "colours", "shape")
LONG = 160  # frames
SCALES = (1.0, 2.0, 3.0)
# Seeds of the datasets: neither the shipped model nor the demo has seen these people.
TRAIN_SEED, HELD_OUT_SEED, LONG_SEED = 23, 24, 25


@dataclasses.dataclass(frozen=True)
class Options:
    out: Path
    config: str = "configs/demo_svp.py"
    size: int = 64
    """side in pixels of the frames, that of the config"""
    steps: int = 1000
    seeds: int = 3
    identities: int = 300
    frames: int = 20
    """of each training clip"""
    parts: tuple[str, ...] = ("arms", "history", "fusion")
    flags: tuple[str, ...] = ()
    """further flags of loki_jax.train"""


class Pair(NamedTuple):
    """A portrait, a driver, and the seeds of both people."""

    portrait: Portrait
    driver: DrivingClip
    seed: int
    driver_seed: int


def make_data(options: Options) -> None:
    out = options.out
    if not (out / "shards" / "dataset_info.json").is_file():
        make_shards(out / "shards", TRAIN_SEED, options.identities, options.frames, options.size)
    if not (out / "pairs" / "dataset_info.json").is_file():
        command = [sys.executable, "-m", "data_prep.cross_pairs", "--shards", str(out / "shards")]
        subprocess.run([*command, "--out", str(out / "pairs"), "--overwrite"], check=True)
    for name, seed, frames in (("held_out", HELD_OUT_SEED, 64), ("long", LONG_SEED, LONG)):
        if not (out / name / "dataset_info.json").is_file():
            make_shards(out / name, seed, 2 * PAIRS, frames, options.size, "--validation", "0")


def train_arm(options: Options, arm: str, seed: int) -> Path:
    """Train, or go on with, one run; returns its workdir."""
    workdir = options.out / "runs" / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
    command = [
        sys.executable, "-m", "loki_jax.train", "--config", options.config + ARMS[arm],
        "--workdir", str(workdir), f"--config.data.path={options.out / 'pairs'}", f"--config.seed={seed}",
        f"--config.steps={options.steps}", "--config.sample.every=0", "--config.checkpoint.every=100",
        "--config.checkpoint.keep=1", *options.flags,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return workdir


def find_pairs(folder: Path, pipeline: LokiPipeline) -> list[Pair]:
    seeds = [clip.extra["identity_seed"] for clip in open_dataset(folder).clips]
    found = held_out_pairs(folder, pipeline.head, pipeline.size)
    return [Pair(*pair, seeds[PAIRS + i]) for i, pair in enumerate(found)]


def animate(pipeline: LokiPipeline, pairs: list[Pair], sampling: Sampling) -> tuple[np.ndarray, Coefficients]:
    """Frames (pairs, n, S, S, 3) in absolute pose, and the coefficients that they should show."""
    moved = stack_trees(
        [retarget_clip(pipeline.head, pair.driver, pair.portrait, "absolute") for pair in pairs]
    )
    portraits = stack_trees([pair.portrait for pair in pairs])
    clips = [pair.driver for pair in pairs]
    windows = pipeline.windows_of_batch(
        portraits, moved, portraits.camera, portraits.crop, sampling, clips
    )  # fmt: skip
    return np.concatenate([window.frames for window in windows], axis=1), moved


def measure_leaks(pipeline: LokiPipeline, pair: Pair, moved: Coefficients, frames: np.ndarray) -> dict:
    """Leakage of the driver's colours and of its shape."""
    head, size = pipeline.head, pipeline.size
    own, theirs = (sample_appearance(seed, head) for seed in (pair.seed, pair.driver_seed))
    shape = np.broadcast_to(sample_shape(pair.driver_seed, head), np.shape(moved.betas))
    render = lambda coefficients, look: rendered_truth(head, coefficients, pair.portrait, look, size)
    truth = render(moved, own)
    return {
        "colours": leakage(frames, truth, render(moved, own._replace(albedo=theirs.albedo))),
        "shape": leakage(frames, truth, render(moved._replace(betas=shape), own)),
    }


def measure_arm(workdir: Path, folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Figures of each pair, and a picture: reference, driver, generated, truth of four pairs."""
    pipeline = LokiPipeline.from_checkpoint(workdir)
    pairs = find_pairs(folder, pipeline)
    frames, moved = animate(pipeline, pairs, pipeline.sampling(mode="absolute"))
    known = [(pair.portrait, pair.driver, pair.seed) for pair in pairs]
    judged = synthetic_pairs(pipeline.head, known, moved, frames)
    table = evaluate_pairs(pipeline.head, judged, size=HEF_SIZE)["pairs"]
    rows = []
    for i, pair in enumerate(pairs):
        one = Coefficients(*(field[i] for field in moved))
        rows.append(table[i]["generated"] | measure_leaks(pipeline, pair, one, frames[i]))
    middle = FRAMES // 2
    picture = [
        np.concatenate(
            [p.portrait.image, p.driver.frames[middle], frames[i, middle], judged[i].truth[middle]]
        )
        for i, p in enumerate(pairs[:4])
    ]
    return {"pairs": rows}, np.concatenate(picture, axis=1)


def measure_history(workdir: Path, folder: Path) -> dict[str, Any]:
    """Of long clips: PSNR over time, and motion at the borders of windows over that inside them."""
    pipeline = LokiPipeline.from_checkpoint(workdir)
    head, size, dataset = pipeline.head, pipeline.size, open_dataset(folder)
    seeds = [clip.extra["identity_seed"] for clip in dataset.clips]
    portraits = [pair[0] for pair in held_out_pairs(folder, head, size)][:4]
    pairs = []
    for i, portrait in enumerate(portraits):
        driver = load_driving_clip(f"{folder}:{dataset.clips[PAIRS + i].clip_id}", head, size)
        pairs.append(Pair(portrait, driver, seeds[i], seeds[PAIRS + i]))
    source, motion, history = tuple(pipeline.config.sample.fusion)
    border = np.arange(pipeline.config.window, LONG, pipeline.config.window) - 1
    inside = np.setdiff1d(np.arange(LONG - 1), border)
    step = lambda x: np.abs(np.diff(x.astype(np.float64), axis=0)).mean((1, 2, 3))
    found: dict[str, Any] = {"psnr": {}, "seam": {"truth": []}}
    for name, scale in (("with history", history), ("without history", 0.0)):
        sampling = pipeline.sampling(mode="absolute", guidance=(source, motion, scale), overlap=0)
        frames, moved = animate(pipeline, pairs, sampling)
        curves, seams = [], []
        for i, pair in enumerate(pairs):
            one = Coefficients(*(field[i] for field in moved))
            truth = rendered_truth(head, one, pair.portrait, sample_appearance(pair.seed, head), size)
            curves.append([float(psnr(a, b)) for a, b in zip(frames[i], truth, strict=True)])
            seams.append(float(step(frames[i])[border].mean() / step(frames[i])[inside].mean()))
            if scale:
                found["seam"]["truth"].append(float(step(truth)[border].mean() / step(truth)[inside].mean()))
        found["psnr"][name], found["seam"][name] = np.mean(curves, 0).tolist(), seams
    return found


def measure_fusion(workdir: Path, folder: Path) -> dict[str, Any]:
    """HPF, PSNR and leakage of colours for each pair of scales: rows [source, motion, hpf, psnr]."""
    pipeline = LokiPipeline.from_checkpoint(workdir)
    pairs = find_pairs(folder, pipeline)[:4]
    known = [(pair.portrait, pair.driver, pair.seed) for pair in pairs]
    rows = []
    for source in SCALES:
        for motion in SCALES:
            sampling = pipeline.sampling(mode="absolute", guidance=(source, motion, 1.0))
            frames, moved = animate(pipeline, pairs, sampling)
            judged = synthetic_pairs(pipeline.head, known, moved, frames)
            means = evaluate_pairs(pipeline.head, judged, size=HEF_SIZE)["generated"]
            rows.append([source, motion, means["hpf"], means["psnr"]])
            print(
                f"source {source}, motion {motion}: HPF {rows[-1][2]:.2f}, PSNR {rows[-1][3]:.2f}", flush=True
            )
    return {"rows": rows}


def kept(file: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `file` holds, measured and written where it is missing."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, measure())
    return json.loads(file.read_text())


def compare_arms(options: Options) -> dict[str, Any]:
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):  # an interrupted benchmark has all arms of the first seeds
        for arm in ARMS:

            def measure(arm=arm, seed=seed) -> dict[str, Any]:
                found, picture = measure_arm(train_arm(options, arm, seed), options.out / "held_out")
                Image.fromarray(picture).save(options.out / "results" / f"{arm}-{seed}.png")
                return found

            results[arm].append(kept(options.out / "results" / f"{arm}-{seed}.json", measure))
    rng, table = np.random.default_rng(0), {}
    print(f"\n{'':14} " + "".join(f"{figure:>28}" for figure in FIGURES))
    for arm, runs in results.items():
        values = {f: np.array([[pair[f] for pair in run["pairs"]] for run in runs]) for f in FIGURES}
        table[arm] = {figure: bootstrap_interval(values[figure], rng) for figure in FIGURES}
        cells = ("{:.4f} [{:.4f}, {:.4f}]".format(*table[arm][figure]) for figure in FIGURES)
        print(f"{arm:14} " + "".join(f"{cell:>28}" for cell in cells))
    pictures = [Image.open(options.out / "results" / f"{arm}-0.png") for arm in ARMS]
    Image.fromarray(np.concatenate([np.asarray(p) for p in pictures], axis=1)).save(options.out / "arms.png")
    return table


def draw_history(found: dict[str, Any], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    for name, curve in found["psnr"].items():
        axis.plot(curve, label=f"{name}: seams {np.mean(found['seam'][name]):.2f}")
    axis.set(
        xlabel="frame", ylabel="PSNR (dB)", title=f"seams of the truth {np.mean(found['seam']['truth']):.2f}"
    )
    axis.legend()
    figure.savefig(file, dpi=120)


def draw_fusion(found: dict[str, Any], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
    for source, motion, hpf, quality in found["rows"]:
        axis.plot(hpf, quality, "o", color=plt.get_cmap("viridis")(SCALES.index(source) / 2))
        axis.annotate(f"{source:g}, {motion:g}", (hpf, quality), textcoords="offset points", xytext=(4, 4))
    axis.set(xlabel="HPF (degrees)", ylabel="PSNR (dB)", title="scales of source and motion")
    figure.savefig(file, dpi=120)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    enable_compile_cache()
    make_data(options)
    results, found = options.out / "results", {"steps": options.steps, "seeds": options.seeds}
    if "arms" in options.parts:
        found["arms"] = compare_arms(options)
    if {"history", "fusion"} & set(options.parts):
        workdir = train_arm(options, "loki map", 0)
    if "history" in options.parts:
        found["history"] = kept(
            results / "history.json", lambda: measure_history(workdir, options.out / "long")
        )
        draw_history(found["history"], options.out / "history.png")
    if "fusion" in options.parts:
        found["fusion"] = kept(
            results / "fusion.json", lambda: measure_fusion(workdir, options.out / "held_out")
        )
        draw_fusion(found["fusion"], options.out / "fusion.png")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
