"""Sampling of a trained model: solvers, borders of windows, cached keys and values, long drivers.

    python benchmarks/animate.py --out DIR [--parts solvers borders cache length] [--checkpoint demo]
        [--pairs 4]

All on held-out synthetic heads, across identities, as in `python -m loki_jax.demo`.

    solvers   HPF, HEF and PSNR against the rendered truth for DDIM at 50 and 12 steps and DPM-Solver++ at 12;
              ratios to DDIM at 50
    borders   mean absolute difference of consecutive frames by where they lie in their window, for several
              overlaps: the largest over the mean of those within windows that share nothing
    cache     seconds of one window whose reference features are projected in every step, over those with keys
              and values projected once, in turns; largest difference of the latents
    length    a driver of 60 s whose motion repeats every 5 s: HPF and HEF of its last 5 s over those of its
              first; peak memory of processes that animate 6 s and 60 s

Printed: a table a part; as the last line one JSON object.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from loki_jax.compile_cache import enable_compile_cache
from loki_jax.demo import CLIP_FRAMES, HEF_SIZE, PAIRS, held_out_pairs, make_shards
from loki_jax.evaluation import evaluate_pairs, fit_animation, measure_following, synthetic_pairs
from loki_jax.models.unet import keys_values
from loki_jax.networks import initial_noise, reference_features, sample_windows
from loki_jax.pipeline import LokiPipeline, Sampling, retarget_clip
from loki_jax.sources import DrivingClip, stack_trees
from loki_jax.synthetic.appearance import sample_appearance

SEED = 12  # of the dataset: that of the demo's held-out people
PERIOD, FPS = 125, 25  # of the long driver, frames


@dataclasses.dataclass(frozen=True)
class Options:
    out: Path
    parts: tuple[str, ...] = ("solvers", "borders", "cache", "length")
    checkpoint: str = "demo"
    pairs: int = 4
    """of 8"""
    overlaps: tuple[int, ...] = (0, 2, 4)
    """for the borders"""
    steps: int = 12
    """of dpm++"""
    repeats: int = 5
    """of the timing"""
    seconds: int | None = None
    """only animate a driver of this length and print the peak memory (for the benchmark's own processes)"""


def generate(pipeline: LokiPipeline, pairs: list, sampling: Sampling) -> tuple[Any, np.ndarray]:
    """Retargeted coefficients (B, N, ...) and frames (B, N, S, S, 3)."""
    coefficients = stack_trees([retarget_clip(pipeline.head, driver, own) for own, driver, _ in pairs])
    portraits = stack_trees([portrait for portrait, _, _ in pairs])
    windows = pipeline.windows_of_batch(portraits, coefficients, portraits.camera, portraits.crop, sampling)
    return coefficients, np.concatenate([window.frames for window in windows], axis=1)


def solvers(pipeline: LokiPipeline, pairs: list, options: Options) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for solver, steps in (("ddim", 50), ("ddim", options.steps), ("dpm++", options.steps)):
        began = time.monotonic()
        sampling = pipeline.sampling(steps=steps, solver=solver)
        coefficients, frames = generate(pipeline, pairs, sampling)
        seconds = time.monotonic() - began
        row = evaluate_pairs(
            pipeline.head, synthetic_pairs(pipeline.head, pairs, coefficients, frames), size=HEF_SIZE
        )
        figures = {key: row["generated"][key] for key in ("hpf", "hef", "psnr")} | {"seconds": seconds}
        first = next(iter(found.values()), figures)
        figures |= {f"{key}_ratio": figures[key] / first[key] for key in ("hpf", "hef")}
        found[f"{solver}-{steps}"] = figures
        print(
            f"{solver:6}{steps:4} steps  " + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()), flush=True
        )
    return found


def borders(pipeline: LokiPipeline, pairs: list, options: Options) -> dict[str, Any]:
    """Largest mean difference among the places in a window, over the mean within windows without overlap."""
    window, found, inside = pipeline.config.window, {}, None
    for overlap in sorted({0, *options.overlaps}):
        sampling = pipeline.sampling(steps=options.steps, solver="dpm++", overlap=overlap)
        _, frames = generate(pipeline, pairs, sampling)
        differences = np.abs(np.diff(frames.astype(np.float32), axis=1)).mean((0, 2, 3, 4))
        stride = window - overlap
        place = np.arange(1, len(differences) + 1) % stride
        means = np.array([differences[place == k].mean() for k in range(stride)])
        inside = means[1:].mean() if inside is None else inside
        found[str(overlap)] = {
            "by_place": means.round(3).tolist(), "largest_over_inside": float(means.max() / inside)
        }  # fmt: skip
        print(f"overlap {overlap}: {found[str(overlap)]}", flush=True)
    return found


def cache(pipeline: LokiPipeline, pairs: list, options: Options) -> dict[str, float]:
    """Inputs are random: time does not depend on them."""
    config, networks, params = pipeline.config, pipeline._networks, pipeline._params
    size, channels = networks.model_config.latent_size, networks.model_config.latent_channels
    keys = jax.random.split(jax.random.key(0), 3)
    features = jax.jit(functools.partial(reference_features, networks))(
        params, jax.random.normal(keys[0], (1, size, size, channels))
    )
    unet = networks.loki.generation.unet
    once = jax.jit(functools.partial(keys_values, unet))(params["generation"]["unet"], features)
    shape = (
        1,
        config.window,
        config.image_size,
        config.image_size,
        networks.model_config.encoder.in_channels,
    )
    driver, noise = jax.random.normal(keys[1], shape), initial_noise(networks, keys[2], 1, config.window)
    sample = jax.jit(
        lambda reference: sample_windows(
            config, networks, params, reference, driver, noise, solver="dpm++", steps=options.steps,
            guidance=config.sample.guidance, spacing=config.sample.spacing,
        )[0]
    )  # fmt: skip
    results = {name: sample(given) for name, given in (("every step", features), ("once", once))}
    difference = float(abs(results["every step"] - results["once"]).max())
    seconds: dict[str, list[float]] = {name: [] for name in results}
    for _ in range(options.repeats):
        for name, given in (("every step", features), ("once", once)):
            began = time.perf_counter()
            jax.block_until_ready(sample(given))
            seconds[name].append(time.perf_counter() - began)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    found = {"ratio": median["every step"] / median["once"], "largest_difference": difference, **median}
    print("cache  " + "  ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)
    return found


def long_driver(driver: DrivingClip, seconds: int) -> DrivingClip:
    """A clip played forwards and backwards so that it repeats every 5 s; without pictures."""
    there = np.linspace(0, len(driver.valid) - 1, (PERIOD + 1) // 2).round().astype(int)
    index = np.resize(np.concatenate([there, there[:0:-1]]), seconds * FPS)
    coefficients = jax.tree.map(lambda x: np.asarray(x)[index], driver.coefficients)
    return driver._replace(coefficients=coefficients, frames=driver.frames[:0], valid=driver.valid[index])


def length(pipeline: LokiPipeline, pairs: list, options: Options) -> dict[str, Any]:
    megabytes, seconds = {}, (6, 60)
    for value in seconds:
        command = [sys.executable, __file__, "--out", str(options.out), "--checkpoint", options.checkpoint,
                   "--steps", str(options.steps), "--seconds", str(value)]  # fmt: skip
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        megabytes[value] = json.loads(done.stdout.splitlines()[-1])["peak_mb"]
    frames = np.load(options.out / f"ends-{seconds[-1]}.npy")
    portrait, driver, identity = pairs[0]
    target = long_driver(driver, 5).coefficients
    appearance, scores = sample_appearance(identity, pipeline.head), []
    for shown in (frames[:PERIOD], frames[PERIOD:]):
        fitted = fit_animation(shown, pipeline.head, portrait, appearance)
        scores.append(measure_following(pipeline.head, fitted, target, driver.camera, HEF_SIZE).scores())
    ratios = {key: scores[1][key] / scores[0][key] for key in ("hpf", "hef")}
    found = {"first_5_s": scores[0], "last_5_s": scores[1], "last_over_first": ratios, "peak_mb": megabytes,
             "memory_ratio": megabytes[60] / megabytes[6]}  # fmt: skip
    print(f"length  {found}", flush=True)
    return found


def animate_long(pipeline: LokiPipeline, pairs: list, options: Options, seconds: int) -> dict[str, float]:
    """Animate, keep the first and last 5 s alone in a file, and say how much memory that took."""
    portrait, driver, _ = pairs[0]
    kept, number, total = [], 0, seconds * FPS
    sampling = pipeline.sampling(steps=options.steps, solver="dpm++")
    for window in pipeline.windows(portrait, long_driver(driver, seconds), **sampling._asdict()):
        index = number + np.arange(len(window.frames))
        kept.append(window.frames[(index < PERIOD) | (index >= total - PERIOD)])
        number += len(window.frames)
    np.save(options.out / f"ends-{seconds}.npy", np.concatenate(kept))
    return {"frames": number, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


PARTS = {"solvers": solvers, "borders": borders, "cache": cache, "length": length}


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    enable_compile_cache()
    pipeline = LokiPipeline.from_checkpoint(options.checkpoint)
    held_out = options.out / "held_out"
    if not (held_out / "dataset_info.json").is_file():
        make_shards(held_out, SEED, 2 * PAIRS, CLIP_FRAMES, pipeline.size, "--validation", "0")
    pairs = held_out_pairs(held_out, pipeline.head, pipeline.size)[: options.pairs]
    if options.seconds is not None:
        print(json.dumps(animate_long(pipeline, pairs, options, options.seconds)))
        return
    found = {part: PARTS[part](pipeline, pairs, options) for part in options.parts}
    print(json.dumps({"checkpoint": options.checkpoint, "step": pipeline.step, "pairs": len(pairs)} | found))


if __name__ == "__main__":
    main()
