"""Pictures as textures, and sampling them between their pixels.

A texture has twice the picture's resolution, interpolated by Lanczos' kernel, so that bilinear sampling of
it is as sharp as cubic sampling of the picture and does not flicker between sharp and soft as the picture
moves. Its pixels are packed into 32 bits: sampling is bound by the number of reads.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from jaxtyping import Array, Float, UInt8, UInt32

_LANCZOS = 3


class Texture(NamedTuple):
    """A picture of h x w pixels at twice its resolution.

    Attributes:
      fine: RGB and a fourth channel, 8 bits each, at steps of half a pixel from the first pixel's centre.
      coarse: the same of the picture at half its resolution: for where the result is smaller.
    """

    fine: UInt32[Array, "h2 w2"]
    coarse: UInt32[Array, "h3 w3"]


def make_texture(
    picture: UInt8[np.ndarray, "h w 3"], extra: Float[np.ndarray, "h w"] | None = None
) -> Texture:
    """The texture of a picture and a further channel with values in [0, 1]."""
    height, width, _ = picture.shape
    extra = np.zeros((height, width)) if extra is None else extra
    pixels = np.concatenate([picture, 255 * extra[..., None]], -1).astype(np.float32)
    fine = _halve_steps(_halve_steps(pixels, 0), 1)
    blurred = scipy.ndimage.gaussian_filter(pixels, (0.9, 0.9, 0), mode="nearest", truncate=3.0)
    return Texture(_pack(fine), _pack(blurred))


def _halve_steps(values, axis):
    """Twice the samples along an axis: the old ones, and between them Lanczos' interpolation."""
    values = np.moveaxis(values, axis, 0)
    offsets = np.arange(-_LANCZOS, _LANCZOS) + 0.5
    weights = np.sinc(offsets) * np.sinc(offsets / _LANCZOS)
    weights /= weights.sum()
    padded = np.pad(values, ((_LANCZOS, _LANCZOS), *[(0, 0)] * (values.ndim - 1)), mode="edge")
    between = sum(w * padded[k + 1 : k + 1 + len(values)] for k, w in enumerate(weights))
    out = np.stack([values, between], 1).reshape(2 * len(values), *values.shape[1:])
    return np.moveaxis(out, 0, axis)


def _pack(values) -> UInt32[Array, "h w"]:
    bytes_ = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return jnp.asarray(np.ascontiguousarray(bytes_).view(np.uint32)[..., 0])


def sample(
    texture: Texture,
    position: Float[Array, "*b 2"],
    shrink: Float[Array, "*b"] | None = None,
) -> Float[Array, "*b 4"]:
    """The texture at positions in picture pixels; beyond the outermost pixels' centres these continue.

    Args:
      shrink: how many pixels of the picture a pixel of the result stands for; from 1 to 2 the picture is
        smoothed more and more. Default 1.

    Returns:
      Channels in [0, 255].
    """
    sharp = _bilinear(texture.fine, 2 * (position - 0.5))
    if shrink is None:
        return sharp
    soft = _bilinear(texture.coarse, position - 0.5)
    weight = jnp.clip(1.25 * (shrink - 1.2), 0.0, 1.0)[..., None]
    return sharp + weight * (soft - sharp)


def _bilinear(packed: UInt32[Array, "h w"], place: Float[Array, "*b 2"]) -> Float[Array, "*b 4"]:
    height, width = packed.shape
    place = jnp.clip(place, 0.0, jnp.array([width - 1.0, height - 1.0]))
    low = jnp.minimum(jnp.floor(place), jnp.array([width - 2.0, height - 2.0]))
    x, y = (place - low)[..., 0], (place - low)[..., 1]
    index = low[..., 1].astype(jnp.int32) * width + low[..., 0].astype(jnp.int32)
    flat = packed.reshape(-1)
    corners = [jnp.take(flat, index + step, mode="clip") for step in (0, 1, width, width + 1)]
    weights = ((1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y)
    channels = [
        sum(w * ((c >> shift) & 255).astype(jnp.float32) for w, c in zip(weights, corners, strict=True))
        for shift in (0, 8, 16, 24)
    ]
    return jnp.stack(channels, axis=-1)


def sample_grid(
    grid: Float[Array, "s s C"], box: Float[Array, " 4"], position: Float[Array, "*b 2"]
) -> Float[Array, "*b C"]:
    """A grid of values at the pixel centres of a box x0, y0, x1, y1, bilinear; outside its edge continues."""
    size = grid.shape[0]
    place = (position - box[:2]) / (box[2:] - box[:2]) * size - 0.5
    place = jnp.clip(place, 0.0, size - 1.0)
    low = jnp.clip(jnp.floor(place), 0, size - 2)
    share = place - low
    x, y = share[..., :1], share[..., 1:]
    index = low[..., 1].astype(jnp.int32) * size + low[..., 0].astype(jnp.int32)
    flat = grid.reshape(-1, grid.shape[-1])
    a, b, c, d = (jnp.take(flat, index + step, axis=0, mode="clip") for step in (0, 1, size, size + 1))
    top, bottom = a + x * (b - a), c + x * (d - c)
    return top + y * (bottom - top)


def region_positions(height: int, width: int) -> Float[Array, "h w 2"]:
    """Positions of pixel centres."""
    x, y = jnp.arange(width) + 0.5, jnp.arange(height) + 0.5
    return jnp.stack(jnp.broadcast_arrays(x[None, :], y[:, None]), axis=-1)


def shrinkage(position: Float[Array, "h w 2"]) -> Float[Array, "h w"]:
    """How many source pixels a pixel of the result stands for along the direction of the greatest density."""
    across = position[:, 1:] - position[:, :-1]
    down = position[1:] - position[:-1]
    across = jnp.concatenate([across, across[:, -1:]], 1)
    down = jnp.concatenate([down, down[-1:]], 0)
    return jnp.sqrt(jnp.maximum(jnp.sum(across**2, -1), jnp.sum(down**2, -1)))


def to_uint8(image: Float[Array, "*b"]) -> UInt8[Array, "*b"]:
    return jnp.clip(jnp.round(image), 0, 255).astype(jnp.uint8)
