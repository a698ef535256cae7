"""Outlines of eyes and mouth, and patches of a picture around them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from jaxtyping import Array, Bool, Float

from loki_jax.arrays import ArrayLike
from loki_jax.fitting.points import LIDS_LEFT, LIDS_RIGHT

# Landmarks in order around each opening: the lower edge from one corner to the other, the upper one back.
INNER_LIPS = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191)
OUTER_LIPS = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185)
EYE_OUTLINES = tuple((*lids[:9], *reversed(lids[9:])) for lids in (LIDS_RIGHT, LIDS_LEFT))


@functools.partial(jax.jit, inline=True)
def distance_inside(
    position: Float[ArrayLike, "*b 2"], outline: Float[ArrayLike, "n 2"]
) -> Float[Array, "*b"]:
    """Distance to a closed outline, positive inside of it."""
    a = jnp.asarray(outline)
    b = jnp.roll(a, -1, axis=0)
    edge, to = b - a, jnp.asarray(position)[..., None, :] - a
    along = jnp.clip(jnp.sum(to * edge, -1) / (jnp.sum(edge * edge, -1) + 1e-9), 0.0, 1.0)
    nearest = jnp.min(jnp.sum((to - along[..., None] * edge) ** 2, -1), -1)
    crosses = (to[..., 1] >= 0) != (to[..., 1] >= edge[..., 1])
    beside = (to[..., 0] * edge[..., 1] - to[..., 1] * edge[..., 0] < 0) == (edge[..., 1] > 0)
    inside = jnp.sum(crosses & beside, -1) % 2 == 1
    return jnp.where(inside, 1.0, -1.0) * jnp.sqrt(nearest + 1e-12)


@functools.partial(jax.jit, inline=True)
def nearest_on_line(
    position: Float[ArrayLike, "*b 2"], line: Float[ArrayLike, "n 2"], other: Float[ArrayLike, "n 2"]
) -> tuple[Float[Array, "*b 2"], Float[Array, "*b 2"]]:
    """The nearest point of a line through n points, and the same point of another line."""
    line, other = jnp.asarray(line), jnp.asarray(other)
    a, edge = line[:-1], line[1:] - line[:-1]
    to = jnp.asarray(position)[..., None, :] - a
    along = jnp.clip(jnp.sum(to * edge, -1) / (jnp.sum(edge * edge, -1) + 1e-9), 0.0, 1.0)
    nearest = jnp.argmin(jnp.sum((to - along[..., None] * edge) ** 2, -1), -1)
    share = jnp.take_along_axis(along, nearest[..., None], -1)
    there = other[:-1][nearest] + share * (other[1:] - other[:-1])[nearest]
    return a[nearest] + share * edge[nearest], there


def smoothstep(low: float, high: float, x: Array) -> Array:
    """Cubic step from 0 at `low` to 1 at `high`."""
    t = jnp.clip((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def patch_size(extent: float, limit: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a patch with sides of at least `extent` pixels within a picture (height, width).

    Multiples of 32, so that few sizes have to be compiled.
    """
    side = 32 * int(np.ceil(max(extent, 1.0) / 32))
    return min(side, limit[0]), min(side, limit[1])


def patch_corner(
    centre: Float[Array, " 2"], size: tuple[int, int], extent: tuple[int, int]
) -> tuple[Array, Array]:
    """Row and column of the first pixel of a patch around `centre` (x, y) inside of a picture."""
    row = jnp.clip(jnp.round(centre[1] - size[0] / 2).astype(jnp.int32), 0, extent[1] - size[0])
    column = jnp.clip(jnp.round(centre[0] - size[1] / 2).astype(jnp.int32), 0, extent[0] - size[1])
    return row, column


def patch_positions(corner: tuple[Array, Array], size: tuple[int, int]) -> Float[Array, "h w 2"]:
    """Positions of the pixel centres of a patch in the picture."""
    y = corner[0] + jnp.arange(size[0]) + 0.5
    x = corner[1] + jnp.arange(size[1]) + 0.5
    return jnp.stack(jnp.broadcast_arrays(x[None, :], y[:, None]), axis=-1)


def paint_patch(
    image: Float[Array, "h w c"],
    patch: Float[Array, "p q c"],
    alpha: Float[Array, "p q"],
    corner: tuple[Array, Array],
) -> Float[Array, "h w c"]:
    """The image with a patch over it."""
    start = (*corner, 0)
    under = jax.lax.dynamic_slice(image, start, patch.shape)
    return jax.lax.dynamic_update_slice(image, under + alpha[..., None] * (patch - under), start)


def fill_smoothly(
    values: Float[np.ndarray, "h w c"], known: Bool[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w c"]:
    """Unknown pixels from the known ones: from near ones where there are any, else from far ones.

    Without known pixels, zeros.
    """
    weight = known.astype(np.float64)
    filled, trust = values * weight[..., None], weight.copy()
    radius = 1.0
    while trust.min() < 0.99 and radius < 2 * max(known.shape):
        amount = scipy.ndimage.gaussian_filter(weight, radius, mode="constant", truncate=3.0)
        total = scipy.ndimage.gaussian_filter(
            values * weight[..., None], (radius, radius, 0), mode="constant", truncate=3.0
        )
        mean = total / np.maximum(amount, 1e-9)[..., None]
        share = (1 - trust) * np.clip(amount / 0.05, 0, 1)
        filled, trust = filled + share[..., None] * mean, trust + share
        radius *= 1.6
    return filled / np.maximum(trust, 1e-9)[..., None]


def region_box(
    points: Float[np.ndarray, "n 2"], margin: float, limit: tuple[int, int]
) -> tuple[slice, slice]:
    """Rows and columns of a picture (height, width) around points, with a margin in widths of theirs."""
    reach = margin * np.ptp(points[:, 0]) + 2
    low = np.maximum(np.floor(points.min(0) - reach), 0).astype(int)
    high = np.minimum(np.ceil(points.max(0) + reach), np.array(limit[::-1])).astype(int)
    return slice(low[1], high[1]), slice(low[0], high[0])
