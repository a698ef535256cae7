"""Image files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from loki_jax.video.files import MediaError, check_file, over_white


def read_image(path: str | os.PathLike) -> UInt8[np.ndarray, "H W 3"]:
    """Read a picture upright (EXIF), as 8-bit RGB; of an animation the first frame.

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
                # 16-bit grey; Pillow's own conversion clips it to white instead of scaling.
                wide = np.asarray(picture, np.float64)
                scale = 1.0 if wide.max() <= 255 else 255 / 65535
                grey = np.clip(np.round(wide * scale), 0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=-1)
            if picture.has_transparency_data:
                return over_white(np.asarray(picture.convert("RGBA")))
            return np.array(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(
            f"{path}: not a readable picture, or truncated ({error}). "
            "Copy it again or save it as PNG or JPEG."
        ) from error
