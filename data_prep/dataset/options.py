"""The options that the programs which make datasets share, and their messages."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from data_prep.dataset.assemble import work_folder
from data_prep.dataset.clips import BuildSettings

_INTERRUPTED = 130  # what shells report after Ctrl-C


def format_table(summary: dict[str, Any]) -> str:
    """The accepted clips and their errors, then the rejected ones, as text."""
    rows = [("clip", "split", "frames", "error %", "p90 %", "jitter deg", "face")]
    for row in summary["clips"]:
        rows.append(
            (row["clip"], row["split"], str(row["frames"]), f"{row['error_percent']:.2f}",
             f"{row['error_percent_p90']:.2f}", f"{row['jitter_degrees']:.2f}",
             f"{100 * row['face_share']:.0f} %")
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines += [f"rejected  {entry['reason']}" for entry in summary["rejected"]]
    return "\n".join(lines)


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data_prep.build` and `data_prep.import_fits`."""
    default = BuildSettings()
    parser.add_argument("--out", type=Path, required=True, help="folder of the dataset to make")
    parser.add_argument("--size", type=int, default=default.size, help="side of the stored frames in pixels")
    parser.add_argument("--crop-factor", type=float, default=default.crop_factor)
    parser.add_argument(
        "--image-format", choices=("png", "jpeg"), help="default: png up to 128 pixels, jpeg above"
    )
    parser.add_argument(
        "--latents", metavar="DIR", help="store VAE latents too; DIR is from loki_jax.convert"
    )
    parser.add_argument(
        "--latents-config", help="config with the VAE's sizes (default: Stable Diffusion 2.1's)"
    )
    parser.add_argument("--latents-batch", type=int, default=8, help="pictures encoded at a time")
    parser.add_argument("--no-images", action="store_true", help="store latents only")
    parser.add_argument(
        "--validation", type=float, default=default.validation, help="share of identities held out"
    )
    parser.add_argument("--identity-from", choices=("file", "folder"), default=default.identity_from)
    parser.add_argument("--identities", help="CSV with clip, identity and perhaps source, licence")
    parser.add_argument("--licence", default=default.licence, help="licence of the clips, stored with them")
    parser.add_argument(
        "--workers",
        type=int,
        default=available_cores(),
        help="processes (default: %(default)s); 0: none extra",
    )
    parser.add_argument("--keep-work", action="store_true", help="leave the work files in DIR.work")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that is already there")


def check_dataset_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.size < 8 or args.crop_factor <= 0 or args.workers < 0 or args.latents_batch < 1:
        parser.error(
            "--size must be at least 8, --crop-factor and --latents-batch positive, --workers not negative"
        )
    if not 0 <= args.validation < 1:
        parser.error("--validation must be in [0, 1)")
    if args.no_images and args.latents is None:
        parser.error("--no-images needs --latents: records must hold one of them")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def interrupted(out: Path) -> int:
    """Print how to continue after Ctrl-C; returns the exit status."""
    print(
        f"\nstopped; finished clips are kept in {work_folder(out)}. Run the same command again to go on.",
        file=sys.stderr,
    )
    return _INTERRUPTED
