"""Make a dataset of synthetic talking heads with known truth.

    python -m data_prep.synth --out DIR [--identities 64] [--clips-per-identity 2] [--frames 32..64]
    python -m data_prep.synth --preview sheet.png

The dataset (docs/data.md) holds clips of `loki_jax.synthetic.clips`, whose coefficients are exact. The clip
table keeps the `identity_seed`, from which `sample_appearance` gives the colours of the identity again.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from loki_jax.compile_cache import enable_compile_cache
from loki_jax.data.schema import Clip, DatasetError
from loki_jax.data.writer import write_dataset
from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import builtin_head, builtin_mesh
from loki_jax.synthetic.clips import synth_clip
from loki_jax.synthetic.motion import FPS


class _Plan(NamedTuple):
    """What to make; identity i of `seed` has the identity seed 1,000,000 seed + i."""

    seed: int
    first_identity: int
    identities: int
    clips_per_identity: int
    frames: tuple[int, int]
    size: int
    validation: float


def _clips(head: HeadAsset, plan: _Plan, report) -> Iterator[Clip]:
    """All clips of a plan, rendered one after another."""
    n_validation = int(round(plan.validation * plan.identities))
    if plan.validation > 0 and plan.identities > 1:
        n_validation = max(n_validation, 1)
    mesh, done, started = builtin_mesh(), 0, time.monotonic()
    for i in range(plan.identities):
        identity_seed = plan.seed * 1_000_000 + plan.first_identity + i
        split = "validation" if i >= plan.identities - n_validation else "train"
        for k in range(plan.clips_per_identity):
            clip_seed = identity_seed * 1000 + k
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([clip_seed, 9])))
            n_frames = int(rng.integers(plan.frames[0], plan.frames[1] + 1))
            clip = synth_clip(head, identity_seed, clip_seed, n_frames, plan.size, mesh=mesh)
            done += n_frames
            yield Clip(
                clip_id=f"synth-{identity_seed:08d}-{k}",
                identity=f"synth-{identity_seed:08d}",
                fps=FPS,
                split=split,
                source="data_prep.synth",
                licence="CC0-1.0",
                coefficients=clip.coefficients,
                camera=clip.camera,
                crop=clip.crop,
                images=clip.frames,
                extra={"identity_seed": identity_seed, "clip_seed": clip_seed},
            )
            report(
                i * plan.clips_per_identity + k + 1,
                plan.identities * plan.clips_per_identity,
                done,
                time.monotonic() - started,
            )


def _print_progress(clips: int, total: int, frames: int, seconds: float) -> None:
    left = seconds / clips * (total - clips)
    end = "\n" if clips == total else ""
    print(
        f"\rclip {clips}/{total}, {frames} frames, {frames / max(seconds, 1e-9):.0f} frames/s, "
        f"{left:.0f} s left   ",
        end=end, file=sys.stderr, flush=True,
    )  # fmt: skip


def preview(
    head: HeadAsset, seed: int, first_identity: int, identities: int, columns: int, size: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Contact sheet: one row an identity, `columns` frames spread over a clip of two seconds."""
    mesh, rows = builtin_mesh(), []
    for i in range(identities):
        identity_seed = seed * 1_000_000 + first_identity + i
        clip = synth_clip(head, identity_seed, identity_seed * 1000, 50, size, mesh=mesh)
        rows.append(np.concatenate(list(clip.frames[np.linspace(0, 49, columns).astype(int)]), axis=1))
    return np.concatenate(rows, axis=0)


def _frame_range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    low = int(found[1]) if found else 0
    high = int(found[2] or low) if found else 0
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of frames or a range such as 32..64")
    return low, high


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.synth", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the dataset to make")
    parser.add_argument("--preview", type=Path, help="write a contact sheet to this PNG instead of a dataset")
    parser.add_argument("--identities", type=int, default=64)
    parser.add_argument("--clips-per-identity", type=int, default=2)
    parser.add_argument("--frames", type=_frame_range, default=(32, 64), help="frames a clip: N or A..B")
    parser.add_argument("--size", type=int, default=64, help="side of the stored frames in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--first-identity", type=int, default=0, help="offset of the identities (held-out sets)"
    )
    parser.add_argument(
        "--validation", type=float, default=0.06, help="share of identities in the validation split"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that is already there")
    args = parser.parse_args(argv)
    enable_compile_cache()
    if (args.out is None) == (args.preview is None):
        parser.error("give either --out DIR or --preview FILE.png")
    for name in ("identities", "clips_per_identity", "size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= args.validation < 1 or not 0 <= args.first_identity < 1_000_000 or args.seed < 0:
        parser.error("--validation must be in [0, 1), --first-identity in [0, 1000000), --seed not negative")
    head = builtin_head()
    if args.preview is not None:
        sheet = preview(head, args.seed, args.first_identity, min(args.identities, 12), 10, args.size)
        args.preview.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(args.preview)
        print(f"wrote {args.preview}")
        return 0
    plan = _Plan(
        args.seed,
        args.first_identity,
        args.identities,
        args.clips_per_identity,
        args.frames,
        args.size,
        args.validation,
    )
    try:
        metadata = write_dataset(
            args.out, head, _clips(head, plan, _print_progress), args.size, overwrite=args.overwrite
        )
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.out}: {metadata.records} frames, head {metadata.head_sha256[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
