"""Save the motion of a driving clip, to reuse it without the video.

    python -m loki_jax.motion save --driver clip.mp4 --out motion.npz
    python -m loki_jax.animate --reference portrait.jpg --driver motion.npz --out out.mp4

The file has coefficients, camera, frame rate, the neutral frame, and which head they are of. It has no
picture, no sound, no name of the video, and not the shape of the person's head.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro


@dataclasses.dataclass(frozen=True)
class SaveOptions:
    driver: str
    """video, picture, folder of pictures, or DATASET_FOLDER:CLIP_ID"""
    out: Path
    """motion file to write, .npz"""
    head: Path | None = None
    """head asset (default: the built-in head)"""
    neutral: int | None = None
    """neutral frame, from 0 (default: the one nearest to rest)"""
    face: str | None = None
    """which face: a number, 0 the largest; left; right; pixels X,Y (default: the largest)"""
    landmarker: Path | None = None
    """MediaPipe's face_landmarker.task, for lids and mouths that say more"""
    all_shots: bool = False
    """follow the driver over cuts (default: its longest shot)"""
    allow_lost: bool = False
    """accept a driver whose face is not visible in most frames"""


def save(options: SaveOptions) -> None:
    """Write the motion file. Raises the errors of its inputs; nothing is written then."""
    from loki_jax.face.asset import load_head
    from loki_jax.face.builtin import builtin_head
    from loki_jax.face.motion_file import write_motion
    from loki_jax.fitting.clips import default_landmarker
    from loki_jax.sources import load_driving_clip
    from loki_jax.video import check_output

    inputs = [options.driver] + ([] if options.head is None else [str(options.head)])
    check_output(options.out, inputs, [".npz"])
    head = builtin_head() if options.head is None else load_head(options.head)
    clip = load_driving_clip(
        options.driver, head, 64, face=options.face, all_shots=options.all_shots,
        allow_lost=options.allow_lost,
        landmarker=None if options.landmarker is None else default_landmarker(options.landmarker),
    ).with_neutral(head, options.neutral)  # fmt: skip
    write_motion(options.out, head, clip.motion(head))
    print(f"{clip.name}: {len(clip.valid)} frames at {clip.fps} fps, neutral frame {clip.neutral}")
    print(f"wrote {options.out}")


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.extras.subcommand_cli_from_dict(
        {"save": SaveOptions}, prog="python -m loki_jax.motion", args=argv, description=__doc__
    )

    from loki_jax.program import run_program

    return run_program(save, options)


if __name__ == "__main__":
    sys.exit(main())
