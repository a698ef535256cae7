"""What each pixel shows: fragments, interpolation of vertex attributes, masking.

For the backward pass only face ids and barycentrics are kept per pixel; all else is computed again.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from loki_jax.arrays import ArrayLike

Vertices = Float[ArrayLike, "*b V 3"]  # (x, y, depth) in normalised device coordinates
Faces = Int[ArrayLike, "F 3"]  # vertex indices, shared by all frames

_SMALLEST_DEPTH = 1e-8

# Squares of coordinates must stay far below the largest float32.
_LARGEST_COORDINATE = 1e15


class Fragments(NamedTuple):
    """What each pixel of an S x S image shows.

    Attributes:
      face: index of the nearest face, -1 on the background.
      bary: barycentric coordinates of the pixel centre in that face (zeros on the background).
      depth: interpolated depth (infinite on the background).
    """

    face: Int[ArrayLike, "*b S S"]
    bary: Float[ArrayLike, "*b S S 3"]
    depth: Float[ArrayLike, "*b S S"]

    @property
    def covered(self) -> Bool[ArrayLike, "*b S S"]:
        """Pixels that show a face."""
        return self.face >= 0


@partial(jax.jit, static_argnames="perspective_correct", inline=True)
def locate(
    vertices: Vertices, faces: Faces, face: Int[ArrayLike, "*b S S"], *, perspective_correct: bool = False
) -> Fragments:
    """Barycentrics and depth at pixels whose faces are known; the differentiable part of `rasterize`.

    Args:
      vertices, faces, perspective_correct: as in `rasterize`.
      face: of each pixel, from `nearest_faces`; -1 on the background.
    """
    vertices, faces = jnp.asarray(vertices, jnp.float32), jnp.asarray(faces)
    shape = face.shape
    if faces.shape[0] == 0 or vertices.shape[-2] == 0 or 0 in shape:
        return Fragments(face, jnp.zeros((*shape, 3), jnp.float32), jnp.full(shape, jnp.inf, jnp.float32))
    folded, folded_face = vertices.reshape(-1, *vertices.shape[-2:]), face.reshape(-1, *shape[-2:])
    # Under differentiation nothing of this is kept but its arguments.
    barycentrics = jax.checkpoint(partial(_barycentrics, perspective_correct=perspective_correct))
    bary, depth = barycentrics(folded, faces, folded_face)
    return Fragments(face, bary.reshape(*shape, 3), depth.reshape(shape))


@partial(jax.jit, inline=True)
def interpolate(
    fragments: Fragments, faces: Faces, attributes: Float[ArrayLike, "*#b V C"]
) -> Float[Array, "*b S S C"]:
    """Attributes of vertices at every pixel, zero on the background.

    Differentiable in attributes and barycentrics. `attributes` (V, C) without leading axes serve all frames.

    Raises:
      ValueError: leading axes of `attributes` are neither none nor those of `fragments`.
    """
    batch = fragments.face.shape[:-2]
    if attributes.shape[:-2] not in ((), batch):
        raise ValueError(
            f"attributes {tuple(attributes.shape)} do not fit fragments with leading axes {batch}"
        )
    covered = fragments.covered
    if faces.shape[0] == 0 or attributes.shape[-2] == 0:
        return jnp.zeros((*covered.shape, attributes.shape[-1]), attributes.dtype)
    faces = jnp.asarray(faces)

    @jax.checkpoint
    def blend(attributes, face, bary):
        corners = faces[jnp.maximum(face, 0)]
        weights = jnp.where((face >= 0)[..., None], bary, 0.0)
        return sum(attributes[corners[..., k]] * weights[..., k, None] for k in range(3))

    if attributes.ndim == 2:
        return blend(attributes, fragments.face, fragments.bary)
    fold = lambda x, tail: x.reshape(-1, *x.shape[x.ndim - tail :])
    out = jax.vmap(blend)(fold(attributes, 2), fold(fragments.face, 2), fold(fragments.bary, 3))
    return out.reshape(*covered.shape, attributes.shape[-1])


@partial(jax.jit, inline=True)
def clear_hidden_faces(fragments: Fragments, faces: Faces, vertex_mask: Bool[ArrayLike, " V"]) -> Fragments:
    """Turn pixels whose face has no vertex in `vertex_mask` into background.

    Such faces have already occluded what is behind them.
    """
    if faces.shape[0] == 0:
        return fragments
    shown = jnp.any(jnp.asarray(vertex_mask)[jnp.asarray(faces)], axis=-1)
    kept = fragments.covered & shown[jnp.maximum(fragments.face, 0)]
    return Fragments(
        jnp.where(kept, fragments.face, -1),
        jnp.where(kept[..., None], fragments.bary, 0.0),
        jnp.where(kept, fragments.depth, jnp.inf),
    )


def centre_table(
    size: int, doubled_start: int, doubled_step: int, count: int
) -> Float[np.ndarray, "2 count"]:
    """Coordinates 1 - p/S at p = start/2 + i step/2, i < count, each as a float32 and its rounding error."""
    exact = 1 - (doubled_start + doubled_step * np.arange(count, dtype=np.float64)) / size
    high = exact.astype(np.float32)
    return np.stack([high, (exact - high).astype(np.float32)])


def pick(table: Array, index: Int[Array, "N ..."]) -> Array:
    """The rows of each frame's table at that frame's indices."""
    return jax.vmap(lambda table, index: table[index])(table, index)


def doubled_area(ax: Array, ay: Array, bx: Array, by: Array, cx: Array, cy: Array) -> Array:
    """Twice the signed area of the triangle a, b, c."""
    return (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)


def is_drawable(
    x: Float[Array, "*b F 3"], y: Float[Array, "*b F 3"], depth: Float[Array, "*b F 3"]
) -> Bool[Array, "*b F"]:
    """Faces all of whose corners are finite, below 1e15 and at a depth of at least 1e-8."""
    bounded = [jnp.abs(value) < _LARGEST_COORDINATE for value in (x, y, depth)]
    return jnp.all(bounded[0] & bounded[1] & bounded[2] & (depth >= _SMALLEST_DEPTH), axis=-1)


def _barycentrics(vertices, faces, face, perspective_correct: bool):
    """Barycentrics (N, S, S, 3) and depth (N, S, S) of known faces; plain differentiable JAX."""
    size = face.shape[-1]
    covered = face >= 0
    centres = centre_table(size, 1, 2, size)
    px, py = centres[:, None, :], centres[:, :, None]
    corners = faces[jnp.maximum(face, 0)]
    points = [pick(vertices, corners[..., k]) for k in range(3)]
    x = [(px[0] - p[..., 0]) + px[1] for p in points]
    y = [(py[0] - p[..., 1]) + py[1] for p in points]
    z = [p[..., 2] for p in points]
    # Differences to the pixel, then cross products: exact to rounding for faces of any size.
    edges = [x[a] * y[b] - x[b] * y[a] for a, b in ((1, 2), (2, 0), (0, 1))]
    if perspective_correct:
        edges = [edge / jnp.where(covered, depth, 1.0) for edge, depth in zip(edges, z, strict=True)]
    total = edges[0] + edges[1] + edges[2]
    # Background pixels get harmless numbers, so that no NaN enters their (zero) gradients.
    usable = covered & (total != 0)
    safe = jnp.where(usable, total, 1.0)
    bary = jnp.stack([jnp.where(usable, edge / safe, 1 / 3) for edge in edges], axis=-1)
    bary = jnp.where(covered[..., None], bary, 0.0)
    depth = z[0] + bary[..., 1] * (z[1] - z[0]) + bary[..., 2] * (z[2] - z[0])
    return bary, jnp.where(covered, depth, jnp.inf)
