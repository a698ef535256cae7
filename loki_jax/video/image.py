"""Image files in."""

from __future__ import annotations

import io
import os
from fractions import Fraction
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
            return _pixels(opened)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def reduce_picture(picture: UInt8[np.ndarray, "H W 3"], longest: int) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with at most `longest` pixels on its longer side; a smaller one as it is."""
    factor = longest / max(picture.shape[:2])
    if factor >= 1:
        return picture
    height, width = (max(1, round(side * factor)) for side in picture.shape[:2])
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX))


_UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def _unreadable(path: Path, error: Exception) -> MediaError:
    return MediaError(
        f"{path}: not a readable picture, or truncated ({error}). Copy it again or save it as PNG or JPEG."
    )


def _pixels(opened: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith("I") or picture.mode == "F":
        return _deep_grey(picture)
    if picture.has_transparency_data:
        return over_white(np.asarray(_to_srgb(picture, "RGBA")))
    return np.array(_to_srgb(picture, "RGB"))


def is_animated(path: Path) -> bool:
    """Whether a WebP or PNG file has several frames.

    Raises:
      MediaError: it is not a picture.
    """
    if path.suffix.lower() not in (".webp", ".png"):
        return False
    check_file(path, "image")
    try:
        with Image.open(path) as opened:
            return getattr(opened, "n_frames", 1) > 1
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


class AnimatedPicture:
    """The frames of an animated WebP or PNG, by random access.

    Attributes:
      times: when each is first shown, seconds.
      rate: frames a second, of the usual one.

    Raises:
      MediaError: it is truncated.
    """

    def __init__(self, path: Path):
        self._path = path
        self._opened = Image.open(path)
        shown = []
        for index in range(getattr(self._opened, "n_frames", 1)):
            self.frame(index)
            shown.append(round(self._opened.info.get("duration", 0)))
        usual = int(np.median(shown)) or 100  # as browsers do
        self.rate = Fraction(1000, usual)
        shown = [duration or usual for duration in shown]
        self.times = [Fraction(int(ms), 1000) for ms in np.cumsum([0, *shown[:-1]])]

    def frame(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        """Frame number `index`."""
        try:
            if index < self._opened.tell():
                # Pillow does not go back in every PNG.
                self._opened.close()
                self._opened = Image.open(self._path)
            self._opened.seek(index)
            self._opened.load()
            return _pixels(self._opened)
        except (*_UNREADABLE, EOFError) as error:
            raise _unreadable(self._path, error) from error


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
