"""Place MediaPipe's 478 face landmarks on any head that has the 68 iBUG landmarks.

    python -m data_prep.embed_landmarks HEAD.npz --out HEAD_WITH_LANDMARKS.npz [--sheet FILE.png]

HEAD is a head asset, or the ICT-FaceKit arrays. `data_prep.landmarks.embed` describes the method.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.dataset.clips import load_any_head
from data_prep.landmarks.embed import N_POINTS, with_landmarks
from data_prep.landmarks.head_sheet import head_sheet
from loki_jax.compile_cache import enable_compile_cache
from loki_jax.face.asset import HeadAssetError, save_head
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.model_files import LandmarkError, fetch_models
from loki_jax.fitting.points import LANDMARK_SET


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.embed_landmarks", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("head", help="head asset (.npz), or the ICT-FaceKit arrays")
    parser.add_argument("--out", type=Path, required=True, help="the asset to write, with the landmarks")
    parser.add_argument("--wheel", help="the mediapipe 0.10.21 wheel with the networks (else the cache)")
    parser.add_argument("--no-networks", action="store_true", help="by closest points alone")
    parser.add_argument("--sheet", type=Path, help="also write pictures of the head with its landmarks")
    args = parser.parse_args(argv)
    enable_compile_cache()
    try:
        if args.out.suffix != ".npz":
            raise HeadAssetError(f"{args.out}: a head asset ends in .npz. Choose such a name for --out.")
        landmarker = None
        if not args.no_networks:
            landmarker = Landmarker(fetch_models(args.wheel))
        head, openings = with_landmarks(load_any_head(args.head), landmarker)
        digest = save_head(args.out, head)
    except (HeadAssetError, LandmarkError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for opening in openings:
        print(
            f"{opening.part}: gap over width {opening.rest:.3f} at rest, {opening.least:.3f} by "
            f"{opening.least_by}, {opening.most:.3f} by {opening.most_by}"
        )
    held = int((np.asarray(head.landmarks[LANDMARK_SET].face) >= 0).sum())
    print(f"{args.out}: {head.name} with {held} of {N_POINTS} landmarks, sha256 {digest}")
    if args.sheet is not None:
        Image.fromarray(head_sheet(head)).save(args.sheet)
        print(f"{args.sheet}: pictures of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
