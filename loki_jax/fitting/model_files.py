"""The three landmark networks, files of the mediapipe wheel (`loki_jax.downloads`)."""

from __future__ import annotations

import os
from pathlib import Path

from loki_jax.downloads import LANDMARKS, DownloadError, cached_files, fetch_files


class LandmarkError(RuntimeError):
    """No landmark models, or no (single) face in an image; the message names the remedy."""


def cached_models(folder: Path | None = None) -> dict[str, Path] | None:
    """Paths of the three models by stem if `folder` (default: the user's cache) holds them, else None."""
    return cached_files(LANDMARKS, folder)


def fetch_models(wheel: str | os.PathLike | None = None, folder: Path | None = None) -> dict[str, Path]:
    """Paths of the three models by stem, from the cache, from `wheel` or by pip (`fetch_files`).

    Raises:
      LandmarkError: no wheel and no way to download it, or a file with another checksum.
    """
    try:
        return fetch_files(LANDMARKS, wheel, folder)
    except DownloadError as error:
        raise LandmarkError(str(error)) from error
