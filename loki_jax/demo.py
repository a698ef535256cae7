"""The demo: everything from shards to a report, on synthetic heads, without any download.

    python -m loki_jax.demo --out demo_out [--from-scratch] [--steps 30]

makes synthetic shards, runs steps of `python -m loki_jax.train --config configs/demo.py` from the shipped
model (from nothing with `--from-scratch`), animates held-out identities across identities with the
shipped model, measures, and writes to the folder `--out`:

    report.png      pictures of each pair, loss, head-pose error over time, the table
    animation.mp4   reference | driver | driver map | result of each pair
    metrics.json    means and every pair (docs: `loki_jax.evaluate.evaluate_pairs`)
    shards/, held_out/, train/    datasets and the run's workdir
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from loki_jax.data.reader import open_dataset
from loki_jax.evaluation import EvaluationPair, driver_yaw, evaluate_pairs, rendered_truth
from loki_jax.face.asset import HeadAsset
from loki_jax.io import write_json
from loki_jax.metrics.hpf import head_rotation
from loki_jax.networks import build_networks
from loki_jax.pictures import PairPictures, format_table, panel_frames, write_report
from loki_jax.pipeline import animate_clips, make_animator, retarget_clip
from loki_jax.sources import DrivingClip, Portrait, load_driving_clip, load_portrait, stack_portraits
from loki_jax.synthetic.appearance import sample_appearance
from loki_jax.training.checkpoint import load_checkpoint
from loki_jax.video.writer import write_video

# Identity seeds are 1,000,000 x dataset seed + number: these two share none with each other, nor with
# the shipped model's data (docs/demo_model.md).
TRAIN_SEED, HELD_OUT_SEED = 11, 12
PAIRS, FRAMES = 8, 32
CLIP_FRAMES = 64  # of the held-out clips, from which portraits and drivers' windows are taken
SMALLEST_YAW = 8.0  # degrees, standard deviation over a driver's clip
HEF_SIZE = 128  # frames have 64 pixels; renders of 512 change HEF by less than 1 %


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loki_jax.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the results")
    parser.add_argument(
        "--from-scratch", action="store_true", help="train from nothing, not from the shipped model"
    )
    parser.add_argument("--steps", type=int, default=30, help="training steps")
    parser.add_argument("--checkpoint", default="demo", help="model that animates (default: the shipped one)")
    parser.add_argument("--sampling-steps", type=int, help="DDIM steps (default: the config's)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance (default: the config's)")
    parser.add_argument("--config", default="configs/demo.py", help="config of the training steps")
    return parser.parse_args(argv)


def held_out_pairs(folder: Path, head: HeadAsset, size: int) -> list[tuple[Portrait, DrivingClip, int]]:
    """References and drivers of different held-out identities, and each reference's identity seed.

    A portrait looks into the camera, so the reference is its clip's most frontal frame; the driver's
    window starts where its head is most frontal, since relative pose counts from there.

    Raises:
      ValueError: a driver hardly turns its head, so that following it would prove nothing.
    """
    dataset = open_dataset(folder)
    clips = dataset.clips
    pairs = []
    for i in range(PAIRS):
        reference, driver = clips[i], clips[i + PAIRS]
        whole = load_driving_clip(f"{folder}:{driver.clip_id}", head, size)
        yaw, turned = driver_yaw(whole), off_frontal(whole)
        starts = [s for s in range(len(yaw) - FRAMES + 1) if yaw[s : s + FRAMES].std() >= SMALLEST_YAW]
        if not starts:
            raise ValueError(
                f"driver {driver.clip_id}: yaw deviates by less than {SMALLEST_YAW} degrees in every window"
            )
        start = min(starts, key=lambda s: turned[s])
        window = slice(start, start + FRAMES)
        driving_clip = whole._replace(
            frames=whole.frames[window],
            valid=whole.valid[window],
            coefficients=jax.tree.map(lambda x, window=window: x[window], whole.coefficients),
        )
        source = f"{folder}:{reference.clip_id}"
        frontal = int(np.argmin(off_frontal(load_driving_clip(source, head, size))))
        portrait = load_portrait(source, head, size, frontal)
        pairs.append((portrait, driving_clip, reference.extra["identity_seed"]))
    return pairs


def off_frontal(driving_clip: DrivingClip) -> np.ndarray:
    """Angle (radians) of each frame's head rotation away from the camera's axes."""
    return head_rotation(driving_clip.coefficients.rot, driving_clip.coefficients.neck).magnitude()


def run_training(
    config: str, workdir: Path, shards: Path, steps: int, init_from: str
) -> dict[str, tuple[list, list]]:
    """Train as a user would, in a process of its own; returns the loss curves of its `metrics.jsonl`.

    Raises:
      subprocess.CalledProcessError: the training stopped with an error, which it has printed.
    """
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
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            curves[key] = tuple(map(list, zip(*points, strict=True)))
    return curves


def demo(argv: list[str] | None = None) -> dict:
    """Run the program and return the content of `metrics.json`."""
    args = _arguments(argv)
    if args.steps < 1:
        raise ValueError(f"--steps {args.steps} must be at least 1")
    began = last = time.monotonic()
    timing = {}

    def finished(section: str) -> None:
        nonlocal last
        now = time.monotonic()
        timing[section] = round(now - last, 1)
        print(f"[{now - began:5.0f} s] {section}: {now - last:.0f} s", flush=True)
        last = now

    config, params, head, model_step = load_checkpoint(args.checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    shards, held_out, workdir = (args.out / name for name in ("shards", "held_out", "train"))

    # -------------------------------------------------------------------------------- synthetic shards
    size = ["--size", str(config.image_size), "--overwrite"]
    for folder, options in (
        (shards, ["--seed", str(TRAIN_SEED), "--identities", "12", "--clips-per-identity", "1",
                  "--frames", "24"]),
        (held_out, ["--seed", str(HELD_OUT_SEED), "--identities", str(2 * PAIRS), "--clips-per-identity", "1",
                    "--frames", str(CLIP_FRAMES), "--validation", "0"]),
    ):  # fmt: skip
        command = [sys.executable, "-m", "data_prep.synth", "--out", str(folder), *options, *size]
        subprocess.run(command, check=True)
    finished("synthetic shards")

    # ---------------------------------------------------------------------------------------- training
    if (workdir / "config.json").is_file():
        # A finished run would only be resumed, without a step.
        shutil.rmtree(workdir)
    losses = run_training(
        args.config, workdir, shards, args.steps, "" if args.from_scratch else args.checkpoint
    )
    finished(
        f"training, {args.steps} steps {'from scratch' if args.from_scratch else 'from the shipped model'}"
    )

    # --------------------------------------------------------------------------------------- animation
    pairs = held_out_pairs(held_out, head, config.image_size)
    networks = build_networks(config, head)
    animator = make_animator(
        config, networks,
        steps=args.sampling_steps or config.sample.steps,
        guidance=config.sample.guidance if args.guidance is None else args.guidance,
        spacing=config.sample.spacing,
    )  # fmt: skip
    params = jax.tree.map(jnp.asarray, params)
    together = lambda items: jax.tree.map(lambda *x: np.stack([np.asarray(v) for v in x]), *items)
    coefficients = together([retarget_clip(head, driver, reference) for reference, driver, _ in pairs])
    portraits = stack_portraits([reference for reference, _, _ in pairs])
    target = (coefficients, portraits.camera, portraits.crop)
    generated, maps = animate_clips(animator, params, head, portraits, *target)
    finished(f"animation of {PAIRS} pairs")
    # Everything as before, but each pair gets the pair before's portrait: does the picture follow it?
    others = stack_portraits([pairs[i - 1][0] for i in range(PAIRS)])
    swapped, _ = animate_clips(animator, params, head, others, *target)
    finished("animation with swapped portraits")

    # -------------------------------------------------------------------------------------- evaluation
    to_judge = []
    for i, (reference, driver, seed) in enumerate(pairs):
        appearance = sample_appearance(seed, head)
        own = jax.tree.map(lambda x, i=i: x[i], coefficients)
        truth = rendered_truth(head, own, reference, appearance, config.image_size)
        to_judge.append(EvaluationPair(reference, appearance, driver, generated[i], truth))
    metrics = evaluate_pairs(head, to_judge, list(swapped), HEF_SIZE)
    finished("evaluation")

    # ----------------------------------------------------------------------------------------- results
    pictures = [
        PairPictures(
            f"{pair.reference.name} behind {pair.driver.name}",
            pair.reference.image, pair.driver.frames, maps[i], pair.generated, pair.truth,
        )
        for i, pair in enumerate(to_judge)
    ]  # fmt: skip
    panels = [panel_frames([p.reference, p.driver, p.driver_map, p.generated], 128) for p in pictures]
    rows = [np.concatenate(panels[i : i + 2], axis=2) for i in range(0, len(panels), 2)]
    write_video(args.out / "animation.mp4", np.concatenate(rows, axis=1), pairs[0][1].fps)
    title = f"loki_jax demo: model of step {model_step}, held-out identities, {PAIRS} pairs x {FRAMES} frames"
    write_report(args.out / "report.png", pictures, metrics, metrics["per_frame"], losses, title)
    finished("report")
    metrics |= {"model_step": model_step, "seconds": timing | {"total": round(last - began, 1)}}
    write_json(args.out / "metrics.json", metrics)
    print()
    print(format_table(metrics))
    ratio = {key: metrics["generated"][key] / metrics["static"][key] for key in ("hpf", "hef")}
    other = metrics["generated_swapped_reference"]["psnr"]
    print(
        f"\ngenerated / static: HPF {ratio['hpf']:.2f}, HEF {ratio['hef']:.2f}; "
        f"PSNR {metrics['generated']['psnr']:.2f} dB, with another pair's reference {other:.2f} dB\n"
        f"wrote {args.out}/report.png, animation.mp4, metrics.json"
    )
    return metrics


def main(argv: list[str] | None = None) -> None:
    try:
        demo(argv)
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"error: python {' '.join(error.cmd[1:3])} ended with exit code {error.returncode}; see above"
        )
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
