"""What `animate --dump` keeps of an animation: motions, driver maps, and how well the result follows."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from loki_jax.evaluation import read_animation
from loki_jax.face.asset import HeadAsset
from loki_jax.face.motion_file import write_motion
from loki_jax.face.types import Coefficients
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.fitting.problem import FitError
from loki_jax.io import atomic_path, write_json
from loki_jax.sources import DrivingClip, Portrait
from loki_jax.synthetic.appearance import Appearance
from loki_jax.video import InputWarning, LazyFrames, MediaError


def check_dump(folder: Path, out: Path) -> None:
    """Check that a dump can be written and that the animation `out` can be read back.

    Raises:
      MediaError: the folder holds files or cannot be made, or `out` is a pattern of names.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MediaError(f"{folder}: exists already. --dump names a new or empty folder.")
    if not folder.absolute().parent.is_dir():
        raise MediaError(f"{folder}: the folder {folder.parent} does not exist. Make it first.")
    if "%" in out.name:
        raise MediaError(f"{out}: --dump reads the result back. Name a video, or a folder for the frames.")


@contextlib.contextmanager
def open_dump(folder: Path) -> Iterator[Path]:
    """A temporary folder, which gets its name when the `with` block ends without error."""
    with atomic_path(folder) as partial:
        partial.mkdir()
        yield partial


def wanted_motion(driver: DrivingClip, portrait: Portrait, moved: Coefficients) -> DrivingClip:
    """The portrait as it should move: `moved` (N, ...) of `retarget_clip` in place of the driver's head."""
    coefficients = Coefficients(*(np.asarray(field) for field in moved))
    return driver._replace(coefficients=coefficients, camera=portrait.camera)


def write_motions(folder: Path, head: HeadAsset, driver: DrivingClip, wanted: DrivingClip) -> None:
    """driver.npz and wanted.npz: motion files (`loki_jax.face.motion_file`)."""
    write_motion(folder / "driver.npz", head, driver.motion(head))
    write_motion(folder / "wanted.npz", head, wanted.motion(head))


def write_scores(
    folder: Path,
    head: HeadAsset,
    out: Path,
    driver: DrivingClip,
    wanted: DrivingClip,
    known: tuple[Portrait, Appearance] | None = None,
    **options: Any,
) -> None:
    """scores.json: how well the finished animation `out` follows the driver, and what it was asked for.

    They are null where no face is found in it, with a warning.

    Args:
      known, options: see `read_animation`.
    """
    scores: dict[str, Any] = {"driver": None, "wanted": None}
    try:
        reading = read_animation(LazyFrames(out), head, known, **options)
    except (LandmarkError, FitError) as error:
        warnings.warn(f"the result is not measured: {error}", InputWarning, stacklevel=2)
    else:
        for name, target in (("driver", driver), ("wanted", wanted)):
            scores[name] = reading.following(head, target).scores()
    write_json(folder / "scores.json", scores)
