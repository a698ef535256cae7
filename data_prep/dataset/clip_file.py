"""Work files: one fitted clip, or the reason why it was rejected, safely on disk.

The file of a clip is KEY.npz or KEY.json, where the key stands for the clip's content and all settings
(`data_prep.dataset.manifest`). It appears whole or not at all, also after a loss of power.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from loki_jax.data.schema import COEFFICIENT_FEATURES
from loki_jax.face.types import Camera, Coefficients
from loki_jax.io import atomic_path

_IMAGES = "images"  # the member of a work file with the encoded pictures, one behind the other

_FILE = "{file}"  # stands for the clip's path in stored reasons, which may be another one next time


class ClipData(NamedTuple):
    """A fitted clip of N frames, ready for the shards.

    Attributes:
      coefficients: fields (N, n).
      camera: intrinsics (4,) or (N, 4), extrinsics (4, 4) or (N, 4, 4).
      crop: box (4,) or boxes (N, 4) in pixels of the uncropped frame.
      confidence: (N,) in [0, 1].
      images: N encoded pictures of the crop, one after another; those of a stored clip any number of times.
      row: what the summary says about the clip.
    """

    coefficients: Coefficients
    camera: Camera
    crop: Float[np.ndarray, "*n 4"]
    confidence: Float[np.ndarray, " N"]
    images: Iterable[bytes]
    row: dict[str, Any]


def clip_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.npz"


def rejection_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.json"


def overlay_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.mp4"


def is_done(folder: Path, key: str) -> bool:
    """Whether the clip was fitted or rejected before."""
    return clip_path(folder, key).is_file() or rejection_path(folder, key).is_file()


def save_clip(folder: Path, key: str, clip: ClipData) -> None:
    """Store a fitted clip; of its pictures one is held at a time."""
    floats = {
        **{f"coefficients/{k}": v for k, v in zip(COEFFICIENT_FEATURES, clip.coefficients, strict=True)},
        **{f"camera/{k}": v for k, v in clip.camera._asdict().items()},
        "crop": clip.crop,
        "confidence": clip.confidence,
    }
    arrays: dict[str, Any] = {
        **{name: np.asarray(value, np.float32) for name, value in floats.items()},
        "row": np.asarray(json.dumps(clip.row)),
    }
    with atomic_path(clip_path(folder, key), durable=True) as partial, zipfile.ZipFile(partial, "w") as file:
        sizes = []
        with file.open(_IMAGES, "w", force_zip64=True) as opened:
            for image in clip.images:
                sizes.append(opened.write(image))
        for name, array in (arrays | {"image_sizes": np.array(sizes, np.int64)}).items():
            with file.open(f"{name}.npy", "w") as opened:
                np.lib.format.write_array(opened, array, allow_pickle=False)


class _StoredImages:
    """The pictures of a work file, read one at a time."""

    def __init__(self, path: Path, sizes: Int[np.ndarray, " N"]):
        self._path, self._sizes = path, sizes

    def __iter__(self) -> Iterator[bytes]:
        with zipfile.ZipFile(self._path) as file, file.open(_IMAGES) as opened:
            for size in self._sizes.tolist():
                yield opened.read(size)


def load_clip(folder: Path, key: str) -> ClipData | None:
    """A stored clip; None if there is none, or if its file is damaged (which then goes)."""
    path = clip_path(folder, key)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None or archive.getinfo(_IMAGES).compress_type:
                raise ValueError("damaged")
            stored = archive.getinfo(_IMAGES).file_size
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name != _IMAGES}
        if stored != arrays["image_sizes"].sum():
            raise ValueError("pictures are missing")
        return ClipData(
            Coefficients(*(arrays[f"coefficients/{name}"] for name in COEFFICIENT_FEATURES)),
            Camera(*(arrays[f"camera/{name}"] for name in Camera._fields)),
            arrays["crop"],
            arrays["confidence"],
            _StoredImages(path, arrays["image_sizes"]),
            json.loads(str(arrays["row"])),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        path.unlink(missing_ok=True)
        return None


def template_of(reason: str, path: Path) -> str:
    """A reason without the clip's path, as `fill_template` takes it."""
    return reason.replace(str(path), _FILE)


def fill_template(reason: str, path: Path) -> str:
    return reason.replace(_FILE, str(path))


def save_rejection(folder: Path, key: str, reason: str, path: Path) -> None:
    """Store why the clip at `path` was rejected."""
    with atomic_path(rejection_path(folder, key), durable=True) as partial:
        partial.write_text(json.dumps({"reason": template_of(reason, path)}))


def load_rejection(folder: Path, key: str, path: Path) -> str | None:
    """The stored reason, with the clip's present path; None if there is none."""
    try:
        return fill_template(json.loads(rejection_path(folder, key).read_text())["reason"], path)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock; yields whether it was free. A killed process gives it up."""
    try:
        import fcntl
    except ImportError:  # Windows: two builds at a time are the user's to avoid
        yield True
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
