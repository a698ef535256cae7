"""The rasteriser's entry points, and the conventions they share.

Coordinates (method, section 4). Vertices are (x, y, depth) with +x left and +y up, visible in
[-1, 1]; depth is positive away from the camera. The centre of the pixel in row i, column j of an
S x S image is at y = 1 - (2i + 1)/S, x = 1 - (2j + 1)/S.

  Culling: with `cull`, only faces with negative signed area in these coordinates are kept, which is
    counter-clockwise on the screen.
  Dropped: faces with a vertex at depth below 1e-8, with a coordinate that is not finite or above
    1e15, or without area.
  Fill rule: a pixel belongs to a face if its centre is inside, or on a top or left edge. Every pixel of
    an unbroken surface belongs to exactly one of its faces.
  Depth test: the nearest face wins, at equal depth the one with the lower index.

Differentiable: barycentrics and depth, and through them everything interpolated, with respect to
vertices and attributes. Not differentiable: which face a pixel shows. So silhouettes carry no gradient
until `antialias` blends the pixels on both sides of them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from loki_jax.arrays import ArrayLike
from loki_jax.raster.antialias import antialias
from loki_jax.raster.fragments import (
    Faces,
    Fragments,
    Vertices,
    clear_hidden_faces,
    interpolate,
    locate,
)
from loki_jax.raster.search import nearest_faces


class Rendering(NamedTuple):
    """An image over a background of zeros.

    Attributes:
      image: the attributes, zero on the background; where `coverage` is a fraction, so is the image.
      coverage: share of the pixel that shows a face, in [0, 1]; 0 or 1 unless edges are smoothed.
    """

    image: Float[Array, "*b S S C"]
    coverage: Float[Array, "*b S S"]


def rasterize(
    vertices: Vertices,
    faces: Faces,
    size: int,
    cull: bool = True,
    *,
    perspective_correct: bool = False,
    tile: int | None = None,
    window: int | None = None,
) -> Fragments:
    """Nearest face, barycentrics and depth at every pixel centre; the module states the conventions.

    Args:
      vertices: (x, y, depth) in normalised device coordinates; leading axes are frames. `jax.vmap`
        folds into them.
      faces: vertex indices, shared by all frames.
      size: S, the image's side in pixels.
      cull: keep only faces that are counter-clockwise on the screen.
      perspective_correct: barycentrics of the surface point instead of the affine ones of its
        projection; the depth test and `depth` then follow the true surface too.
      tile: side of a tile in pixels; affects speed only.
      window: pairs of face and tile enumerated at a time; affects speed and memory only.

    Raises:
      ValueError: shapes do not fit or sizes are not positive.
    """
    face = nearest_faces(
        vertices, faces, size, cull, perspective_correct=perspective_correct, tile=tile, window=window
    )
    return locate(vertices, faces, face, perspective_correct=perspective_correct)


def downsample(image: Float[Array, "*b H W C"], factor: int = 2) -> Float[Array, "*b h w C"]:
    """Mean over blocks of factor x factor pixels.

    Raises:
      ValueError: the image's sides are no multiples of `factor`.
    """
    *batch, height, width, channels = image.shape
    if factor < 1 or height % factor or width % factor:
        raise ValueError(f"an image of {height} x {width} has no blocks of {factor} x {factor} pixels")
    blocks = image.reshape(*batch, height // factor, factor, width // factor, factor, channels)
    return jnp.mean(blocks, axis=(-4, -2))


def render(
    vertices: Vertices,
    faces: Faces,
    attributes: Float[ArrayLike, "*#b V C"],
    size: int,
    *,
    cull: bool = True,
    perspective_correct: bool = False,
    vertex_mask: Bool[ArrayLike, " V"] | None = None,
    smooth_silhouettes: bool = False,
    supersample: int = 1,
) -> Rendering:
    """Rasterise and interpolate in one call; optionally mask, antialias and average down.

    Args:
      vertices: (x, y, depth) in normalised device coordinates; leading axes are frames.
      faces: vertex indices, shared by all frames.
      attributes: what to show, per vertex; without leading axes they serve all frames.
      size: S, side of the result in pixels.
      cull: keep only faces that are counter-clockwise on the screen.
      perspective_correct: interpolate on the surface instead of on the screen.
      vertex_mask: show only faces with a vertex in it; the others still occlude.
      smooth_silhouettes: apply `antialias`.
      supersample: rasterise with this many times the pixels along each side and take means.

    Raises:
      ValueError: shapes do not fit or sizes are not positive.
    """
    if supersample < 1:
        raise ValueError(f"supersample must be positive, not {supersample}")
    fine = size * supersample
    fragments = rasterize(vertices, faces, fine, cull, perspective_correct=perspective_correct)
    if vertex_mask is not None:
        fragments = clear_hidden_faces(fragments, faces, vertex_mask)
    colour = interpolate(fragments, faces, attributes)
    image = jnp.concatenate([colour, fragments.covered[..., None].astype(colour.dtype)], axis=-1)
    if smooth_silhouettes:
        image = antialias(image, fragments, vertices, faces)
    image = downsample(image, supersample)
    return Rendering(image[..., :-1], image[..., -1])
