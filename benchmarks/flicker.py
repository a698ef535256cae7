"""Flicker of a trained model: how much consecutive frames differ beyond motion.

    python benchmarks/flicker.py --portrait PICTURE --clip CLIP.mp4 [--checkpoint demo] [--frames 16]

Each frame is moved onto the next one by dense optical flow (Farneback, at 256 x 256); the figure is the
mean absolute difference left, in grey levels of 255, over all pixels and over the top twelfth of the
picture. Measured for the driver's crops, for animations whose frames start from the same noise (the
default) and from noise of their own, and the largest plain difference within the top four rows. The last
line of the output is one JSON object. Needs the landmark models.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loki_jax.metrics.temporal import FLOW_SIZE, warped_differences
from loki_jax.pipeline import LokiPipeline
from loki_jax.sources import fit_clip, fit_portrait
from loki_jax.video import read_video


def figures(frames: np.ndarray) -> dict[str, float]:
    warped = np.stack(list(warped_differences(frames)))
    plain = np.abs(np.diff(frames.astype(float), axis=0)).mean(-1)
    return {
        "all": round(float(warped.mean()), 2),
        "top": round(float(warped[:, : FLOW_SIZE // 12].mean()), 2),
        "top_rows_largest": round(float(plain[:, :4].max()), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--portrait", type=Path, required=True)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    pipeline = LokiPipeline.from_checkpoint(args.checkpoint)
    video = read_video(args.clip, args.frames)
    portrait = fit_portrait(args.portrait, pipeline.head, pipeline.size, face=0)
    clip = fit_clip(video.frames, pipeline.head, pipeline.size, fps=video.fps)
    results = {"driver": figures(np.stack(list(clip.frames)))}
    for name, shared in (("noise of its own for each frame", False), ("the same noise", True)):
        results[name] = figures(pipeline(portrait, clip, steps=args.steps, shared_noise=shared))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
