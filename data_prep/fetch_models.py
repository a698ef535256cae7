"""Unpack the landmark models into the cache (or check those that are there)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loki_jax.fitting.model_files import LandmarkError, cache_dir, fetch_models


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.fetch_models", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--wheel", help="the mediapipe 0.10.21 wheel, if it shall not be downloaded")
    parser.add_argument("--cache", type=Path, help=f"where the models are kept (default {cache_dir()})")
    args = parser.parse_args(argv)
    try:
        for path in fetch_models(args.wheel, args.cache).values():
            print(f"{path}  {path.stat().st_size / 1e6:.1f} MB, checksum right")
    except LandmarkError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
