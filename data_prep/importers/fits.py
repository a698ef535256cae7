"""Fits of other programs to the records of a dataset."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from data_prep.dataset.assemble import FitClip, RejectedClip, build
from data_prep.dataset.clip_file import ClipData
from data_prep.dataset.latents import chosen_encoder
from data_prep.dataset.manifest import PlannedClip, find_files, pipeline_identity, plan_clips
from data_prep.dataset.options import ImportOptions
from data_prep.importers.arrays import ImportedFit, read_arrays
from data_prep.importers.frames import TRANSFORMS_FILE, called, frames_of
from data_prep.importers.loki import read_loki_fit
from data_prep.importers.vhap import read_vhap_fit
from loki_jax.data.schema import DatasetError
from loki_jax.data.writer import encode_image
from loki_jax.face.asset import HeadAsset
from loki_jax.face.crop import crop_and_resize, crop_box
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.clips import clip_crop_box, head_extent
from loki_jax.video import MediaError, VideoReader, resample_indices


def find_fits(sources: Sequence[str]) -> list[Path]:
    """`fit*.npz` files, `transforms.json` files and `flame_param.npz` files, as given or inside folders.

    Raises:
      DatasetError: a source does not exist, or there is none.
    """

    def is_fit(path: Path) -> bool:
        # Beside a transforms.json, flame_param.npz is part of that fit.
        part = (path.parent / TRANSFORMS_FILE[0]).exists()
        return path.name in (TRANSFORMS_FILE[0], "fit.npz") or (path.name == "flame_param.npz" and not part)

    if found := find_files(sources, is_fit, "--fits", DatasetError):
        return found
    raise DatasetError(
        f"{', '.join(sources)}: neither fit.npz nor transforms.json nor flame_param.npz there. Check "
        "`--fits`."
    )


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


def make_import(head: HeadAsset, options: ImportOptions) -> FitClip:
    """The function that `data_prep.dataset.assemble` applies to every fit."""

    def take(clip: PlannedClip, folder: Path) -> ClipData:
        fit = read_fit(clip.path, head, camera=options.camera, neck=options.neck, frames=options.frames)
        n = len(fit.coefficients.expression)
        rate = options.source_fps
        if isinstance(fit.frames, Path):
            with VideoReader(fit.frames) as video:
                rate = video.source_fps
        if options.official_crops:
            low, high = head_extent(head, fit.coefficients, fit.camera)
            boxes = np.asarray(crop_box(np.stack([low, high], axis=1), options.crop_factor, integer=True))
        else:
            box = clip_crop_box(head, fit.coefficients, fit.camera, options.crop_factor)
            boxes = np.broadcast_to(box, (n, 4))
        if not np.isfinite(boxes).all() or (boxes[:, 2:] - boxes[:, :2] < 1).any():
            raise RejectedClip(
                f"{clip.path}: the head is behind the camera or a point. The fit is of another head or "
                "camera."
            )
        indices = resample_indices(n, rate, options.fps)
        wanted, images = set(indices.tolist()), {}
        for index, frame in enumerate(frames_of(fit, clip.path)):
            if index == 0:
                _check_in_sight(boxes[0], frame.shape, clip.path)
            if index in wanted:
                crop = crop_and_resize(frame, boxes[index], options.size)
                images[index] = encode_image(crop, options.stored_format)
        camera = fit.camera
        if camera.intrinsics.ndim == 2:
            camera = Camera(camera.intrinsics[indices], camera.extrinsics[indices])
        row = {
            "frames": len(indices), "fps": str(options.fps), "source_fps": str(rate), "notes": list(fit.notes)
        }  # fmt: skip
        return ClipData(
            Coefficients(*(np.asarray(field)[indices] for field in fit.coefficients)),
            camera,
            boxes[indices] if options.official_crops else boxes[0],
            np.ones(len(indices), np.float32),
            [images[i] for i in indices.tolist()],
            row,
        )

    return take


def import_dataset(
    fits: Sequence[Path], head: HeadAsset, out: Path, options: ImportOptions
) -> dict[str, Any]:
    """Build, continue or extend the dataset `out` from fits and return its summary (also `out/summary.json`).

    Raises:
      DatasetError: `out` is taken, no fit could be used, or `options.frames` is given for several fits.
    """
    if options.frames is not None and len(fits) > 1:
        raise DatasetError(
            f"--frames names the pictures of one fit, there are {len(fits)}. Import one by one."
        )
    settings = {
        "importer": True, "size": options.size, "image_format": options.stored_format,
        "crop_factor": options.crop_factor, "official_crops": options.official_crops,
        "fps": str(options.fps), "source_fps": str(options.source_fps), "camera": options.camera,
        "neck": options.neck,
    }  # fmt: skip
    made_by = pipeline_identity(head, {}, settings)
    digest_of = lambda path: fit_digest(path, options.frames, options.camera)
    named = [called(path) for path in fits]
    planned = plan_clips(fits, made_by, options, named=named, digest_of=digest_of)
    make_fit = functools.partial(make_import, head, options)
    return build(planned, head, out, make_fit, made_by, options, encoder=chosen_encoder(options))


def _check_in_sight(box: Float[np.ndarray, "4"], shape: tuple[int, ...], path: Path) -> None:
    height, width = shape[:2]
    inside = np.minimum(box[2:], (width, height)) - np.maximum(box[:2], 0)
    share = np.prod(np.clip(inside, 0, None)) / np.prod(box[2:] - box[:2])
    if share < 0.25:
        raise RejectedClip(
            f"{path}: only {100 * share:.0f} % of the head's box {np.round(box).astype(int).tolist()} lie "
            f"in the {width}x{height} pictures. They have another size than those that were fitted, or "
            "belong to another camera (`--camera`)."
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
