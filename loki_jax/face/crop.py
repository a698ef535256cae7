"""Crop boxes around projected heads, and the pixels of a box (method, section 4)."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Bool, Float, Real, UInt8

from loki_jax.arrays import ArrayLike


@functools.partial(jax.jit, static_argnames=("scale", "integer"), inline=True)
def crop_box(
    pixels: Float[ArrayLike, "*b n 2"],
    scale: float = 1.2,
    integer: bool = False,
    mask: Bool[ArrayLike, " n"] | None = None,
) -> Float[Array, "*b 4"]:
    """Square box (x0, y0, x1, y1) around projected points, `scale` times their longer extent.

    For one box a clip, merge the time axis into `n` first.

    Args:
      integer: truncate as the public code does (method, section 4), which makes boxes jump by a pixel from
        frame to frame.
      mask: the points that count; default all.
    """
    where = None if mask is None else mask[:, None]
    low = jnp.min(pixels, axis=-2, where=where, initial=jnp.inf)
    high = jnp.max(pixels, axis=-2, where=where, initial=-jnp.inf)
    if integer:
        low, high = jnp.trunc(low), jnp.trunc(high)
        centre = jnp.floor((low + high) / 2)
        half = jnp.trunc(jnp.max(high - low, axis=-1, keepdims=True) // 2 * scale)
    else:
        centre = (low + high) / 2
        half = jnp.max(high - low, axis=-1, keepdims=True) / 2 * scale
    return jnp.concatenate([centre - half, centre + half], axis=-1)


# All frames of a clip are cropped alike, and the matrix takes longer than its product with a frame.
@functools.lru_cache(maxsize=8)
def _resampling_matrix(start: float, stop: float, size: int, n_pixels: int) -> scipy.sparse.csr_array:
    """(size, n_pixels + 1) weights that resample [start, stop) of a row of pixels to `size` pixels.

    The last column stands for everything outside the image. Shrinking averages over the area of the
    new pixel, enlarging interpolates linearly between pixel centres and holds the crop's outermost
    pixels beyond theirs.
    """
    step = (stop - start) / size
    first, last = math.floor(start), math.ceil(stop) - 1
    rows, columns, weights = [], [], []
    for row in range(size):
        if step >= 1:
            low, high = start + row * step, start + (row + 1) * step
            touched = np.arange(math.floor(low), math.ceil(high))
            share = (np.minimum(high, touched + 1) - np.maximum(low, touched)) / step
        else:
            centre = start + (row + 0.5) * step - 0.5
            left = math.floor(centre)
            touched = np.clip([left, left + 1], first, last)
            share = np.array([left + 1 - centre, centre - left])
        rows.append(np.full(len(touched), row))
        columns.append(np.where((touched >= 0) & (touched < n_pixels), touched, n_pixels))
        weights.append(share)
    entries = (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns)))
    return scipy.sparse.coo_array(entries, shape=(size, n_pixels + 1)).tocsr()


def crop_and_resize(
    image: UInt8[np.ndarray, "h w c"] | Float[np.ndarray, "h w c"],
    box: Real[np.ndarray, " 4"],
    size: int,
    fill: float = 255.0,
) -> UInt8[np.ndarray, "size size c"] | Float[np.ndarray, "size size c"]:
    """The pixels of a box (x0, y0, x1, y1, not necessarily whole numbers) as a size x size image.

    Area filter down, bilinear up, `fill` (white) outside the image: the public crop where the box is
    made of whole numbers, and no jitter where it is not. NumPy, for use while loading; the dtype of the
    image is kept.

    Raises:
      ValueError: the box is empty or not finite, or the image is not (h, w, c).
    """
    box = np.asarray(box, np.float64)
    if image.ndim != 3 or box.shape != (4,) or not np.isfinite(box).all() or (box[2:] <= box[:2]).any():
        raise ValueError(f"cannot crop box {box.tolist()} (x0, y0, x1, y1) from an image {image.shape}")
    x0, y0 = np.maximum(np.floor(box[:2]), 0).astype(int)
    x1, y1 = np.maximum(np.ceil(box[2:]), 0).astype(int)
    image, box = image[y0:y1, x0:x1], box - np.array([x0, y0, x0, y0])
    height, width, channels = image.shape
    across = _resampling_matrix(box[0], box[2], size, width)
    down = _resampling_matrix(box[1], box[3], size, height)
    # Relative to the fill, everything outside the image is zero.
    framed = np.pad(image.astype(np.float32) - fill, ((0, 1), (0, 1), (0, 0)))
    rows = (down @ framed.reshape(height + 1, -1)).reshape(size, width + 1, channels)
    out = across @ rows.transpose(1, 0, 2).reshape(width + 1, -1)
    out = out.reshape(size, size, channels).transpose(1, 0, 2) + fill
    if image.dtype == np.uint8:
        return np.clip(np.rint(out), 0, 255).astype(np.uint8)
    return out.astype(image.dtype)
