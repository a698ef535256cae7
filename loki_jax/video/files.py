"""What all readers and writers of video and image files share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import UInt8


class MediaError(ValueError):
    """A video or image file cannot be read or written; the message names the file and the remedy."""


class InputWarning(UserWarning):
    """Something about a user's file that is worth knowing; programs print it as one line."""


def check_file(path: Path, kind: str) -> None:
    """Check that there is a file with content; `kind` is "video" or "image".

    Raises:
      MediaError: there is none.
    """
    if not path.is_file():
        raise MediaError(f"{path}: no such {kind} file. Check the path.")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: the {kind} file is empty (0 bytes). Copy or download it again.")


def over_white(rgba: UInt8[np.ndarray, "H W 4"]) -> UInt8[np.ndarray, "H W 3"]:
    """A picture laid over white, the colour of the padding outside crops."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
