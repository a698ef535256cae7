"""Unpack the landmark models into the cache (or check those that are there)."""

# No postponed annotations: tyro could not resolve them when `data_prep.landmarker` runs this file.
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep import cli
from loki_jax.fitting.model_files import LandmarkError, fetch_models


@dataclasses.dataclass(frozen=True)
class FetchOptions:
    """The options of the program.

    Attributes:
      wheel: the mediapipe 0.10.21 wheel, if it is not to be downloaded.
      cache: where the models are kept (default: the user's cache folder).
    """

    wheel: str | None = None
    cache: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(FetchOptions, "fetch_models", __doc__, argv)
    try:
        for path in fetch_models(options.wheel, options.cache).values():
            print(f"{path}  {path.stat().st_size / 1e6:.1f} MB, checksum right")
    except LandmarkError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
