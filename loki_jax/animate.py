"""Animate a portrait with a driver clip.

    python -m loki_jax.animate --reference portrait.png --driver clip.mp4 --checkpoint WORKDIR --out out.mp4

Reference and driver are files, which the checkpoint's head is fitted to by landmarks, or clips of a
dataset, DATASET_FOLDER:CLIP_ID, whose coefficients are stored (the reference is then its first
frame). The checkpoint is a workdir of `loki_jax.train`, a model file, or "demo". Beside OUT.mp4 a
panel OUT_panel.mp4 shows reference, driver, driver map and result. Both videos keep the driver's
frame rate and audio and are tagged as synthetic.

A driver of any length is animated window by window; the last window is filled up with its last frame
and cut again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from loki_jax.networks import build_networks
from loki_jax.pictures import panel_frames
from loki_jax.pipeline import animate_windows, make_animator, retarget_clip
from loki_jax.sources import load_driving_clip, load_portrait, stack_portraits
from loki_jax.training.checkpoint import load_checkpoint
from loki_jax.video.writer import VideoWriter


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loki_jax.animate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reference", required=True, help="image file, or DATASET_FOLDER:CLIP_ID")
    parser.add_argument("--driver", required=True, help="video file, or DATASET_FOLDER:CLIP_ID")
    parser.add_argument("--checkpoint", required=True, help='workdir, .safetensors file, or "demo"')
    parser.add_argument("--out", required=True, type=Path, help="video to write, .mp4")
    parser.add_argument("--steps", type=int, help="DDIM steps (default: the config's)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance (default: the config's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument(
        "--mode",
        choices=("relative", "absolute"),
        default=None,
        help="relative: turn from the reference's pose by the driver's increments; "
        "absolute: the driver's own pose (default: the config's)",
    )
    parser.add_argument("--no-audio", action="store_true", help="leave the driver's audio out")
    return parser.parse_args(argv)


def animate(argv: list[str] | None = None) -> None:
    """Run the program. Raises the errors of its inputs; nothing is written then."""
    args = _arguments(argv)
    panel_path = args.out.with_name(f"{args.out.stem}_panel{args.out.suffix}")

    # ------------------------------------------------------------------------------------- model
    config, params, head, step = load_checkpoint(args.checkpoint)
    networks = build_networks(config, head)
    steps = config.sample.steps if args.steps is None else args.steps
    guidance = config.sample.guidance if args.guidance is None else args.guidance
    mode = args.mode or config.sample.get("pose", "relative")  # models of before this key
    if steps < 1:
        raise ValueError(f"--steps {steps} must be at least 1")
    animator = make_animator(config, networks, steps=steps, guidance=guidance, spacing=config.sample.spacing)
    params = jax.tree.map(jnp.asarray, params)

    # ------------------------------------------------------------------------------------ inputs
    reference = load_portrait(args.reference, head, config.image_size)
    driver = load_driving_clip(args.driver, head, config.image_size)
    coefficients = jax.tree.map(lambda x: x[None], retarget_clip(head, driver, reference, mode))
    length = len(driver.frames)
    print(
        f"{driver.name}: {length} frames at {driver.fps} fps; "
        f"model of step {step}, {steps} steps, guidance {guidance}"
    )

    # ----------------------------------------------------------------------- windows and writing
    audio = None if args.no_audio else driver.source
    height = max(256, config.image_size)
    started, done = time.monotonic(), 0
    with (
        VideoWriter(args.out, driver.fps, audio_from=audio) as video,
        VideoWriter(panel_path, driver.fps, audio_from=audio) as panel,
    ):
        one = stack_portraits([reference])
        for frames, maps in animate_windows(
            animator, params, head, one, coefficients, one.camera, one.crop, args.seed
        ):
            shown = driver.frames[done : done + frames.shape[1]]
            for frame in frames[0]:
                video.write(frame)
            for frame in panel_frames([reference.image, shown, maps[0], frames[0]], height):
                panel.write(frame)
            done += frames.shape[1]
            rate = done / (time.monotonic() - started)
            print(
                f"\r{done}/{length} frames, {rate:.1f} frames/s, {(length - done) / rate:.0f} s left  ",
                end="",
                flush=True,
            )
    print(f"\nwrote {args.out} and {panel_path}")


def main(argv: list[str] | None = None) -> None:
    # MediaError, DatasetError, HeadAssetError, CheckpointError and FitError are all ValueErrors.
    try:
        animate(argv)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
