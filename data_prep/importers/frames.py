from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from data_prep.dataset.options import VIDEO_SUFFIXES
from data_prep.importers.arrays import ImportedFit
from loki_jax.data.schema import DatasetError
from loki_jax.video import MediaError, VideoReader, read_image

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

# Files that go by the name of their folder.
_GENERIC_STEMS = ("fit", "flame_param", "transforms", "transforms_train")
TRANSFORMS_FILE = ("transforms.json", "transforms_train.json")


def called(path: Path) -> Path:
    """The file or folder that a fit goes by: `person7/fit.npz` is person7."""
    return path.parent if path.stem in _GENERIC_STEMS else path


def find_frames(fit: Path, camera: int) -> list[Path] | Path:
    """The pictures that lie beside a fit: a folder of pictures, or a video.

    Raises:
      MediaError: there are none.
    """
    folder = fit.parent
    folders = [folder / "images" / f"cam{camera}", folder / "images", folder / "frames", folder]
    for candidate in folders:
        if candidate.is_dir() and (pictures := list_pictures(candidate)):
            return pictures
    for stem in (fit.stem, "video", f"cam{camera}", "images/video", f"images/cam{camera}"):
        for suffix in VIDEO_SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    raise MediaError(
        f"{fit}: no pictures beside it; looked for images/cam{camera}/, images/, frames/ and video.mp4. Name "
        "their folder or video with `--frames`."
    )


def list_pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)


def given_frames(path: Path) -> list[Path] | Path:
    """The pictures in a folder, or the video, that `--frames` names.

    Raises:
      MediaError: there are none.
    """
    if path.is_dir():
        if pictures := list_pictures(path):
            return pictures
        raise MediaError(f"{path}: holds no pictures ({', '.join(_IMAGE_SUFFIXES)}). Check `--frames`.")
    if not path.is_file():
        raise MediaError(f"{path}: no such folder or video. Check `--frames`.")
    return path


def picture_of(path: Path) -> Path:
    """NeRF data sets may leave the suffix out."""
    if path.suffix.lower() in _IMAGE_SUFFIXES:
        return path
    found = (path.with_name(path.name + suffix) for suffix in _IMAGE_SUFFIXES)
    return next((candidate for candidate in found if candidate.is_file()), path)


def frames_of(fit: ImportedFit, path: Path) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """The fit's pictures, exactly as many as it has frames.

    Raises:
      MediaError: a picture cannot be read.
      DatasetError: there are more or fewer of them, or they differ in size.
    """
    n = len(fit.coefficients.expression)

    def wrong(count: str, where: Path) -> DatasetError:
        return DatasetError(
            f"{path}: the fit has {n} frames, {where} has {count}. Give the pictures that were fitted "
            "(`--frames`), at the fit's frame rate."
        )

    if isinstance(fit.frames, list):
        if len(fit.frames) != n:
            raise wrong(str(len(fit.frames)), fit.frames[0].parent)
        frames: Iterator[np.ndarray] = map(read_image, fit.frames)
        where = fit.frames[0].parent
    else:
        frames, where = iter(VideoReader(fit.frames)), fit.frames
    count, shape = 0, None
    for frame in frames:
        shape = shape or frame.shape
        if frame.shape != shape:
            raise DatasetError(
                f"{path}: picture {count} in {where} is {frame.shape[1]}x{frame.shape[0]}, the first is "
                f"{shape[1]}x{shape[0]}. All must have the size that was fitted."
            )
        count += 1
        if count > n:
            raise wrong("more", where)
        yield frame
    if count != n:
        raise wrong(str(count), where)
