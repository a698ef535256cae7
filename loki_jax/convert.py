"""Convert weights between formats.

    python -m loki_jax.convert --workdir runs/demo --out model.safetensors

writes the moving average of a run (or its parameters, with --no-ema) as one file for inference. It
works for models of the built-in head; others carry licences and stay in their workdir.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from loki_jax.head.asset import HeadAssetError
from loki_jax.training.checkpoint import CheckpointError, load_checkpoint, save_model_file


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loki_jax.convert", description="A run's model as one file.")
    parser.add_argument("--workdir", required=True, help="workdir of a run of loki_jax.train")
    parser.add_argument("--out", required=True, type=Path, help="file to write, .safetensors")
    parser.add_argument("--no-ema", action="store_true", help="the last parameters instead of their moving average")
    args = parser.parse_args()
    if args.out.suffix != ".safetensors":
        parser.error(f"--out {args.out}: the only format written is .safetensors")
    try:
        checkpoint = load_checkpoint(args.workdir, use_ema=not args.no_ema)
        save_model_file(args.out, checkpoint)
    except (CheckpointError, HeadAssetError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: step {checkpoint.step}, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
