"""Image files in."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from loki_jax.video.files import MediaError, check_file, over_white


def read_image(path: str | os.PathLike) -> UInt8[np.ndarray, "H W 3"]:
    """Read a picture as 8-bit sRGB, upright (EXIF) and over white; of an animation the first frame.

    An embedded colour profile is converted. Grey of more than 8 bits is scaled from 16 bits, or, in floating
    point, from [0, 1].

    Raises:
      MediaError: no such file, empty, truncated, or not a picture.
    """
    path = Path(path)
    check_file(path, "image")
    try:
        with Image.open(path) as opened:
            opened.load()
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I") or picture.mode == "F":
                return _deep_grey(picture)
            if picture.has_transparency_data:
                return over_white(np.asarray(_to_srgb(picture, "RGBA")))
            return np.array(_to_srgb(picture, "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(
            f"{path}: not a readable picture, or truncated ({error}). "
            "Copy it again or save it as PNG or JPEG."
        ) from error


def _deep_grey(picture: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Grey of 16 or 32 bits, which Pillow's own conversion would clip to white instead of scaling."""
    wide = np.nan_to_num(np.asarray(picture, np.float64))
    if picture.mode == "F" and wide.max() <= 1:
        wide = 255 * wide
    elif wide.max() > 255:
        wide = wide * (255 / 65535)
    grey = np.clip(np.round(wide), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def _to_srgb(picture: Image.Image, mode: str) -> Image.Image:
    """The picture in mode RGB or RGBA, by its colour profile if it has a usable one other than sRGB."""
    icc = picture.info.get("icc_profile")
    if icc:
        if picture.mode not in ("L", "RGB", "RGBA", "CMYK", "LAB"):
            picture = picture.convert(mode)
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            if "srgb" not in ImageCms.getProfileDescription(profile).lower():
                kept = mode if picture.mode == mode else "RGB"
                srgb = ImageCms.createProfile("sRGB")
                # None would mean: changed in place.
                picture = ImageCms.profileToProfile(picture, profile, srgb, outputMode=kept) or picture
        except (ImageCms.PyCMSError, OSError):
            pass  # a damaged or unfit profile: the numbers are taken as sRGB, as viewers do
    return picture.convert(mode)
