"""Place MediaPipe's 478 face landmarks on any head that has the 68 iBUG landmarks.

    python -m data_prep.embed_landmarks HEAD.npz --out HEAD_WITH_LANDMARKS.npz [--sheet FILE.png]

HEAD is a head asset, or the ICT-FaceKit arrays. `data_prep.landmarks.embed` describes the method.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from data_prep import cli
from loki_jax.fitting.model_files import fetch_models


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the program.

    Attributes:
      head: head asset (.npz), or the ICT-FaceKit arrays.
      out: the asset to write, with the landmarks.
      wheel: the mediapipe 0.10.21 wheel with the networks (else the cache).
      networks: let the landmark networks find the landmarks (--no-networks: by closest points alone).
      sheet: also write pictures of the head with its landmarks.
    """

    head: tyro.conf.Positional[str]
    out: Path
    wheel: str | None = None
    networks: bool = True
    sheet: Path | None = None


def embed_landmarks(options: Options) -> None:
    from data_prep.dataset.clips import load_any_head
    from data_prep.landmarks.embed import N_POINTS, with_landmarks
    from data_prep.landmarks.head_sheet import save_sheet
    from loki_jax.face.asset import HeadAssetError, save_head
    from loki_jax.fitting.landmarker import Landmarker
    from loki_jax.fitting.points import LANDMARK_SET

    if options.out.suffix != ".npz":
        raise HeadAssetError(f"{options.out}: a head asset ends in .npz. Choose such a name for --out.")
    landmarker = Landmarker(fetch_models(options.wheel)) if options.networks else None
    head, openings = with_landmarks(load_any_head(options.head), landmarker)
    digest = save_head(options.out, head)
    print(*openings, sep="\n")
    held = int((head.landmarks[LANDMARK_SET].face >= 0).sum())
    print(f"{options.out}: {head.name} with {held} of {N_POINTS} landmarks, sha256 {digest}")
    if options.sheet is not None:
        save_sheet(options.sheet, head)
        print(f"{options.sheet}: pictures of it")


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(Options, "embed_landmarks", __doc__, argv)
    return cli.run(embed_landmarks, options)


if __name__ == "__main__":
    sys.exit(main())
