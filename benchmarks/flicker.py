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

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loki_jax.pipeline import LokiPipeline
from loki_jax.sources import fit_clip, fit_portrait
from loki_jax.video import read_video

SIZE = 256


def warped_differences(frames: np.ndarray) -> np.ndarray:
    """(n - 1, SIZE, SIZE) grey levels between each frame and the one before it, moved by optical flow."""
    large = [cv2.resize(frame, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for frame in frames]
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in large]
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    differences = []
    for k in range(len(frames) - 1):
        flow = cv2.calcOpticalFlowFarneback(grey[k + 1], grey[k], None, 0.5, 3, 21, 3, 5, 1.1, 0)
        moved = cv2.remap(
            large[k], x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        differences.append(np.abs(moved.astype(float) - large[k + 1]).mean(-1))
    return np.array(differences)


def figures(frames: np.ndarray) -> dict[str, float]:
    warped = warped_differences(frames)
    plain = np.abs(np.diff(frames.astype(float), axis=0)).mean(-1)
    return {
        "all": round(float(warped.mean()), 2),
        "top": round(float(warped[:, : SIZE // 12].mean()), 2),
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
