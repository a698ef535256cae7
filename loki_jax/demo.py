"""The demo: everything from shards to a report, on synthetic heads, without any download.

It makes synthetic shards, runs steps of `python -m loki_jax.train --config configs/demo.py` from the shipped
model, animates held-out identities across identities with the shipped model, measures, and writes to --out:
report.png (pictures of each pair, loss, head-pose error over time, the table), animation.mp4 (reference,
driver, driver map and result of each pair), metrics.json (means and every pair, see
`loki_jax.evaluation.evaluate_pairs`), and the folders shards, held_out and train (datasets and workdir).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from loki_jax.face.asset import HeadAsset
    from loki_jax.sources import DrivingClip, Portrait

# Identity seeds are 1,000,000 x dataset seed + number: these two share none with each other, nor with
# the shipped model's data (docs/demo_model.md).
TRAIN_SEED, HELD_OUT_SEED = 11, 12
PAIRS, FRAMES = 8, 32
CLIP_FRAMES = 64  # of the held-out clips, from which portraits and drivers' windows are taken
SMALLEST_YAW = 8.0  # degrees, standard deviation over a driver's clip
HEF_SIZE = 128  # frames have 64 pixels; renders of 512 change HEF by less than 1 %


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    out: Path = Path("demo_out")
    """folder for the results"""
    from_scratch: bool = False
    """train from nothing, not from the shipped model"""
    steps: int = 30
    """training steps"""
    checkpoint: str = "demo"
    """model that animates (default: the shipped one)"""
    sampling_steps: int | None = None
    """DDIM steps (default: the config's)"""
    guidance: float | None = None
    """scale of classifier-free guidance (default: the config's)"""
    config: str = "configs/demo.py"
    """config of the training steps"""


def held_out_pairs(folder: Path, head: HeadAsset, size: int) -> list[tuple[Portrait, DrivingClip, int]]:
    """References and drivers of different held-out identities, and each reference's identity seed.

    A portrait looks into the camera, so the reference is its clip's most frontal frame; the driver's
    window starts where its head is most frontal, since relative pose counts from there.

    Raises:
      ValueError: a driver hardly turns its head, so that following it would prove nothing.
    """
    import numpy as np

    from loki_jax.data.reader import open_dataset
    from loki_jax.evaluation import driver_rotation, driver_yaw
    from loki_jax.sources import load_driving_clip, load_portrait

    # Angle (radians) of each frame's head rotation away from the camera's axes.
    off_frontal = lambda clip: driver_rotation(clip).magnitude()
    clips = open_dataset(folder).clips
    pairs = []
    for reference, driver in zip(clips[:PAIRS], clips[PAIRS : 2 * PAIRS], strict=True):
        whole = load_driving_clip(f"{folder}:{driver.clip_id}", head, size)
        yaw, turned = driver_yaw(whole), off_frontal(whole)
        starts = [s for s in range(len(yaw) - FRAMES + 1) if yaw[s : s + FRAMES].std() >= SMALLEST_YAW]
        if not starts:
            raise ValueError(
                f"driver {driver.clip_id}: yaw deviates by less than {SMALLEST_YAW} degrees in every window"
            )
        start = min(starts, key=lambda s: turned[s])
        source = f"{folder}:{reference.clip_id}"
        frontal = int(np.argmin(off_frontal(load_driving_clip(source, head, size))))
        portrait = load_portrait(source, head, size, frontal)
        pairs.append((portrait, whole.cut(start, start + FRAMES), reference.extra["identity_seed"]))
    return pairs


def make_shards(folder: Path, seed: int, identities: int, frames: int, size: int, *options: str) -> None:
    """Write a synthetic dataset, in a process of its own, with one clip of each identity.

    Raises:
      subprocess.CalledProcessError: the program stopped with an error, which it has printed.
    """
    numbers = {
        "seed": seed,
        "identities": identities,
        "clips-per-identity": 1,
        "frames": frames,
        "size": size,
    }
    flags = [word for key, value in numbers.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "data_prep.synth", "--out", str(folder), "--overwrite", *flags, *options]
    subprocess.run(command, check=True)


def run_training(
    config: str, workdir: Path, shards: Path, steps: int, init_from: str
) -> dict[str, tuple[list, list]]:
    """Train as a user would, in a process of its own; returns the loss curves of its `metrics.jsonl`.

    Raises:
      subprocess.CalledProcessError: the training stopped with an error, which it has printed.
    """
    if (workdir / "config.json").is_file():
        # A finished run would only be resumed, without a step.
        shutil.rmtree(workdir)
    subprocess.run(
        [
            sys.executable, "-m", "loki_jax.train", "--config", config, "--workdir", str(workdir),
            f"--config.data.path={shards}", f"--config.steps={steps}", f"--config.init_from={init_from}",
            "--config.log.every=5", "--config.validation.batches=1", f"--config.validation.every={steps}",
            f"--config.sample.every={steps}", "--config.sample.steps=4", f"--config.checkpoint.every={steps}",
        ],
        check=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    curves = {}
    for key in ("loss", "val_loss"):
        logged = [row for row in rows if key in row]
        if logged:
            curves[key] = [row["step"] for row in logged], [row[key] for row in logged]
    return curves


def demo(options: DemoOptions) -> dict[str, Any]:
    """Run the demo and return the content of `metrics.json`."""
    import numpy as np

    from loki_jax.evaluation import evaluate_pairs, synthetic_pairs
    from loki_jax.io import write_json
    from loki_jax.pictures import PairPictures, format_table, panel_frames, write_report
    from loki_jax.pipeline import LokiPipeline, retarget_clip
    from loki_jax.sources import stack_trees
    from loki_jax.video import write_video

    if options.steps < 1:
        raise ValueError(f"--steps {options.steps} must be at least 1")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out}: is a file. --out names a folder.")
    began = last = time.monotonic()
    timing = {}

    def finished(section: str) -> None:
        nonlocal last
        now = time.monotonic()
        timing[section] = round(now - last, 1)
        print(f"[{now - began:5.0f} s] {section}: {now - last:.0f} s", flush=True)
        last = now

    out = options.out
    pipeline = LokiPipeline.from_checkpoint(options.checkpoint)
    sampling = pipeline.sampling(options.sampling_steps, options.guidance, "relative")
    head, size = pipeline.head, pipeline.size
    out.mkdir(parents=True, exist_ok=True)

    # ----------------------------------------------------------------------------- shards and training
    make_shards(out / "shards", TRAIN_SEED, 12, 24, size)
    make_shards(out / "held_out", HELD_OUT_SEED, 2 * PAIRS, CLIP_FRAMES, size, "--validation", "0")
    finished("synthetic shards")
    init_from = "" if options.from_scratch else options.checkpoint
    losses = run_training(options.config, out / "train", out / "shards", options.steps, init_from)
    start = "scratch" if options.from_scratch else "the shipped model"
    finished(f"training, {options.steps} steps from {start}")

    # --------------------------------------------------------------------------------------- animation
    pairs = held_out_pairs(out / "held_out", head, size)
    coefficients = stack_trees([retarget_clip(head, driver, portrait) for portrait, driver, _ in pairs])
    portraits = [portrait for portrait, _, _ in pairs]
    places = stack_trees(portraits)

    def animate(shown: Sequence[Portrait]) -> tuple[np.ndarray, np.ndarray]:
        """Frames and driver maps (pairs, FRAMES, S, S, 3)."""
        windows = pipeline.windows_of_batch(
            stack_trees(shown), coefficients, places.camera, places.crop, sampling
        )  # fmt: skip
        frames, maps = (np.concatenate(side, axis=1) for side in zip(*windows, strict=True))
        return frames, maps

    generated, maps = animate(portraits)
    finished(f"animation of {PAIRS} pairs")
    # The same again, but each pair gets the previous pair's portrait: does the picture follow it?
    swapped, _ = animate(portraits[-1:] + portraits[:-1])
    finished("animation with swapped portraits")

    # -------------------------------------------------------------------------------------- evaluation
    judged = synthetic_pairs(head, pairs, coefficients, generated)
    metrics = evaluate_pairs(head, judged, list(swapped), HEF_SIZE)
    finished("evaluation")

    # ----------------------------------------------------------------------------------------- results
    pictures = [
        PairPictures(
            f"{pair.reference.name} following {pair.driver.name}",
            pair.reference.image, np.stack(list(pair.driver.frames)), maps[i], pair.generated, pair.truth,
        )
        for i, pair in enumerate(judged)
    ]  # fmt: skip
    panels = [panel_frames([p.reference, p.driver, p.driver_map, p.generated], 128) for p in pictures]
    rows = [np.concatenate(panels[i : i + 2], axis=2) for i in range(0, len(panels), 2)]
    write_video(out / "animation.mp4", np.concatenate(rows, axis=1), pairs[0][1].fps)
    title = (
        f"loki_jax demo: model of step {pipeline.step}, held-out identities, {PAIRS} pairs x {FRAMES} frames"
    )
    write_report(out / "report.png", pictures, metrics, metrics["per_frame"], losses, title)
    finished("report")
    metrics |= {"model_step": pipeline.step, "seconds": timing | {"total": round(last - began, 1)}}
    write_json(out / "metrics.json", metrics)
    print(f"\n{format_table(metrics)}")
    ratio = {key: metrics["generated"][key] / metrics["static"][key] for key in ("hpf", "hef")}
    other = metrics["generated_swapped_reference"]["psnr"]
    print(
        f"\ngenerated / static: HPF {ratio['hpf']:.2f}, HEF {ratio['hef']:.2f}; "
        f"PSNR {metrics['generated']['psnr']:.2f} dB, with another pair's reference {other:.2f} dB\n"
        f"wrote {out}/report.png, animation.mp4, metrics.json"
    )
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.cli(DemoOptions, prog="python -m loki_jax.demo", args=argv, description=__doc__)

    from loki_jax.program import run_program

    try:
        return run_program(demo, options)
    except subprocess.CalledProcessError as error:
        command = " ".join(error.cmd[1:3])
        print(f"error: python {command} ended with exit code {error.returncode}; see above", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
