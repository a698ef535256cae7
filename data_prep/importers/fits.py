from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from data_prep.dataset.assemble import FitClip, RejectedClip
from data_prep.dataset.clip_file import ClipData
from data_prep.dataset.manifest import PlannedClip
from data_prep.importers.arrays import ImportedFit, read_arrays
from data_prep.importers.frames import TRANSFORMS_FILE, frames_of
from data_prep.importers.loki import read_loki_fit
from data_prep.importers.vhap import read_vhap_fit
from loki_jax.data.schema import DatasetError
from loki_jax.data.writer import encode_image
from loki_jax.face.asset import HeadAsset
from loki_jax.face.crop import crop_and_resize, crop_box
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.clips import clip_crop_box, head_extent
from loki_jax.video import MediaError
from loki_jax.video.reader import VideoReader, resample_indices


def find_fits(sources: Sequence[str]) -> list[Path]:
    """`fit*.npz` files, `transforms.json` files and `flame_param.npz` files, as given or inside folders.

    Raises:
      DatasetError: a source does not exist, or there is none.
    """
    found: dict[Path, None] = {}
    for source in map(Path, sources):
        if not source.exists():
            raise DatasetError(f"{source}: no such file or folder. Check `--fits`.")
        if not source.is_dir():
            found.setdefault(source.resolve(), None)
            continue
        for path in sorted(source.rglob("*")):
            if path.name in TRANSFORMS_FILE[:1] or path.name == "fit.npz":
                found.setdefault(path.resolve(), None)
            # Beside a transforms.json it is part of that fit.
            elif path.name == "flame_param.npz" and not (path.parent / TRANSFORMS_FILE[0]).exists():
                found.setdefault(path.resolve(), None)
    if not found:
        raise DatasetError(
            f"{', '.join(sources)}: neither fit.npz nor transforms.json nor flame_param.npz there. Check "
            "`--fits`."
        )
    return list(found)


def read_fit(path: Path, head: HeadAsset, **options: Any) -> ImportedFit:
    """A fit of either kind, recognised by its content.

    Raises:
      DatasetError, MediaError: see `read_loki_fit` and `read_vhap_fit`.
    """
    is_vhap = path.suffix == ".json" or {"rotation", "translation"} <= read_arrays(path).keys()
    reader = read_vhap_fit if is_vhap else read_loki_fit
    try:
        return reader(path, head, **options)
    except (DatasetError, MediaError):
        raise
    except Exception as error:  # JSON and NumPy raise many types about damaged files
        raise DatasetError(
            f"{path}: damaged ({type(error).__name__}: {error}). Copy it again, or fit the clip again."
        ) from error


def make_import(
    head: HeadAsset,
    *,
    size: int,
    image_format: str,
    crop_factor: float,
    official_crops: bool,
    fps: Fraction,
    source_fps: Fraction,
    reader: dict[str, Any],
) -> FitClip:
    """The function that `data_prep.dataset.assemble` applies to every fit; arguments as of the program."""

    def take(clip: PlannedClip, folder: Path) -> ClipData:
        fit = read_fit(clip.path, head, **reader)
        n = len(fit.coefficients.expression)
        rate = source_fps
        if isinstance(fit.frames, Path):
            with VideoReader(fit.frames) as video:
                rate = video.source_fps
        if official_crops:
            low, high = head_extent(head, fit.coefficients, fit.camera)
            boxes = np.asarray(crop_box(np.stack([low, high], axis=1), crop_factor, integer=True))
        else:
            box = clip_crop_box(head, fit.coefficients, fit.camera, crop_factor)
            boxes = np.broadcast_to(box, (n, 4))
        if not np.isfinite(boxes).all() or (boxes[:, 2:] - boxes[:, :2] < 1).any():
            raise RejectedClip(
                f"{clip.path}: the head is behind the camera or a point. The fit is of another head or "
                "camera."
            )
        indices = resample_indices(n, rate, fps)
        wanted, images = dict.fromkeys(indices.tolist()), {}
        for index, frame in enumerate(frames_of(fit, clip.path)):
            if index == 0:
                _check_in_sight(boxes[0], frame.shape, clip.path)
            if index in wanted:
                images[index] = encode_image(crop_and_resize(frame, boxes[index], size), image_format)
        coefficients = Coefficients(*(np.asarray(field)[indices] for field in fit.coefficients))
        camera = fit.camera
        if camera.intrinsics.ndim == 2:
            camera = Camera(camera.intrinsics[indices], camera.extrinsics[indices])
        row = {
            "frames": len(indices), "fps": str(fps), "source_fps": str(rate), "notes": list(fit.notes),
        }  # fmt: skip
        crop = boxes[indices] if official_crops else boxes[0]
        return ClipData(
            coefficients, camera, crop, np.ones(len(indices), np.float32),
            [images[i] for i in indices.tolist()], row,
        )  # fmt: skip

    return take


def _check_in_sight(box: Float[np.ndarray, "4"], shape: tuple[int, ...], path: Path) -> None:
    height, width = shape[:2]
    inside = np.minimum(box[2:], (width, height)) - np.maximum(box[:2], 0)
    share = np.prod(np.clip(inside, 0, None)) / np.prod(box[2:] - box[:2])
    if share < 0.25:
        raise RejectedClip(
            f"{path}: only {100 * share:.0f} % of the head's box {np.round(box).astype(int).tolist()} lie "
            "in the "
            f"{width}x{height} pictures. They have another size than those that were fitted, or belong to "
            "another "
            "camera (`--camera`)."
        )


def fit_digest(path: Path, frames: Path | None, camera: int) -> str:
    """SHA-256 of a fit's file, and of the names and sizes of all files beside it that it may use.

    The pictures themselves are not read: there may be millions.
    """
    digest = hashlib.sha256(path.read_bytes())
    roots = [path.parent] if frames is None else [path.parent, frames]
    for root in roots:
        inside = sorted(root.rglob("*")) if root.is_dir() else [root]
        for file in inside:
            if file.is_file():
                name = file.relative_to(root) if file != root else file.name
                digest.update(f"{name} {file.stat().st_size}\n".encode())
    digest.update(str(camera).encode())
    return digest.hexdigest()
