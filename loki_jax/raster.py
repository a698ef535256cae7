"""An exact, tile-binned triangle rasteriser in pure JAX.

Conventions (design section 4). Vertices are (x, y, depth) with +x left and +y up, visible in
[-1, 1]; depth is positive away from the camera. The centre of the pixel in row i, column j of an
S x S image lies at y = 1 - (2i + 1)/S, x = 1 - (2j + 1)/S.

  Culling: with `cull`, only faces with negative signed area in these coordinates are kept, which is
    counter-clockwise on the screen.
  Dropped: faces with a vertex at depth below 1e-8, with a coordinate that is not finite or above
    1e15, or without area.
  Fill rule: a pixel belongs to a face if its centre lies inside, or on a top or left edge. Every
    edge is evaluated from the same end point whichever face asks, so the two faces of an edge see
    exactly opposite numbers: between neighbours there are neither cracks nor pixels drawn twice.
  Depth test: the nearest face wins, at equal depth the one with the lower index.

Algorithm. Per frame, every face that may hold a pixel centre is paired with the tiles its bounding
box touches; the pairs are sorted by tile; then each tile tests its own faces, a block at a time, and
keeps depth and face of the nearest. No buffer is as large as pixels x faces, nothing is scattered
per pixel, and nothing can overflow: pairs are enumerated in windows of a fixed number, and a loop
goes on until every frame has seen all its pairs (one turn, unless the mesh is unusual).

What is differentiable: barycentrics and depth, and through them everything interpolated, with
respect to vertices and attributes. What is not: which face a pixel shows. So silhouettes carry no
gradient until `antialias` blends the pixels on both sides of them; the step from one face to the next
stays outside every gradient.

For the backward pass only face ids and barycentrics are kept per pixel (`antialias` keeps depth and
the image it is given, too); all else is computed again.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_SMALLEST_DEPTH = 1e-8
# Squares of coordinates must stay far below the largest float32.
_LARGEST_COORDINATE = 1e15
_TINY = float(np.finfo(np.float32).tiny)
_SHORTEST_EDGE = 1e-6  # pixels, across the row or column that it crosses
_PIXEL_SLACK = 1e-4  # pixels that rounding may put a crossing beyond the centre of its pixel
_LONGEST_WALK = 64  # faces between two neighbouring pixel centres that are searched for a silhouette


class Fragments(NamedTuple):
    """What each pixel of an S x S image shows.

    Attributes:
      face: index of the nearest face, -1 on the background.
      bary: barycentric coordinates of the pixel centre in that face (zeros on the background).
      depth: interpolated depth (infinite on the background).
    """

    face: Int[Array, "*b S S"]
    bary: Float[Array, "*b S S 3"]
    depth: Float[Array, "*b S S"]

    @property
    def covered(self) -> Bool[Array, "*b S S"]:
        """Pixels that show a face."""
        return self.face >= 0


class Rendering(NamedTuple):
    """An image over a background of zeros.

    Attributes:
      image: the attributes, zero on the background; where `coverage` is a fraction, so is the image.
      coverage: share of the pixel that shows a face, in [0, 1]; 0 or 1 unless edges are smoothed.
    """

    image: Float[Array, "*b S S C"]
    coverage: Float[Array, "*b S S"]


class _Plan(NamedTuple):
    """Static sizes of one search."""

    size: int
    tile: int  # pixels along a tile's side
    side: int  # tiles along the image's side
    block: int  # faces a tile tests at a time
    window: int  # (face, tile) pairs a frame enumerates at a time


def rasterize(
    vertices: Float[Array, "*b V 3"],
    faces: Int[Array, "F 3"],
    size: int,
    cull: bool = True,
    *,
    perspective_correct: bool = False,
    tile: int | None = None,
    window: int | None = None,
) -> Fragments:
    """Nearest face, barycentrics and depth at every pixel centre; see the module's conventions.

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


def nearest_faces(
    vertices: Float[Array, "*b V 3"],
    faces: Int[Array, "F 3"],
    size: int,
    cull: bool = True,
    *,
    perspective_correct: bool = False,
    tile: int | None = None,
    window: int | None = None,
) -> Int[Array, "*b S S"]:
    """Only the search of `rasterize`: the nearest face at every pixel, -1 on the background.

    Not differentiable. The same arguments and errors as `rasterize`.
    """
    if vertices.ndim < 2 or vertices.shape[-1] != 3:
        raise ValueError(f"vertices must be (*b, V, 3), not {tuple(vertices.shape)}")
    if faces.ndim != 2 or faces.shape[-1] != 3:
        raise ValueError(f"faces must be (F, 3), not {tuple(faces.shape)}")
    if size < 1:
        raise ValueError(f"size must be positive, not {size}")
    batch = vertices.shape[:-2]
    if faces.shape[0] == 0 or vertices.shape[-2] == 0 or 0 in batch:
        return jnp.full((*batch, size, size), -1, jnp.int32)
    plan = _make_plan(size, faces.shape[0], tile, window)
    vertices = lax.stop_gradient(jnp.asarray(vertices, jnp.float32))
    folded = vertices.reshape(-1, *vertices.shape[-2:])
    triangles = folded[:, jnp.asarray(faces).reshape(-1)].reshape(folded.shape[0], -1, 9)
    face = _nearest_faces(triangles, plan, cull, perspective_correct)
    return face.reshape(*batch, size, size)


def locate(
    vertices: Float[Array, "*b V 3"],
    faces: Int[Array, "F 3"],
    face: Int[Array, "*b S S"],
    *,
    perspective_correct: bool = False,
) -> Fragments:
    """Barycentrics and depth at pixels whose faces are known; the differentiable part of `rasterize`."""
    vertices, faces = jnp.asarray(vertices, jnp.float32), jnp.asarray(faces)
    shape = face.shape
    if faces.shape[0] == 0 or vertices.shape[-2] == 0 or 0 in shape:
        return Fragments(face, jnp.zeros((*shape, 3), jnp.float32), jnp.full(shape, jnp.inf, jnp.float32))
    folded, folded_face = vertices.reshape(-1, *vertices.shape[-2:]), face.reshape(-1, *shape[-2:])
    # Under differentiation nothing of this is kept but its arguments.
    barycentrics = jax.checkpoint(partial(_barycentrics, perspective_correct=perspective_correct))
    bary, depth = barycentrics(folded, faces, folded_face)
    return Fragments(face, bary.reshape(*shape, 3), depth.reshape(shape))


def interpolate(
    fragments: Fragments, faces: Int[Array, "F 3"], attributes: Float[Array, "*b V C"]
) -> Float[Array, "*b S S C"]:
    """Attributes of vertices at every pixel, zero on the background.

    `attributes` (V, C) without leading axes serve all frames.

    Raises:
      ValueError: leading axes of `attributes` are neither none nor those of `fragments`.
    """
    batch = fragments.face.shape[:-2]
    if attributes.shape[:-2] not in ((), batch):
        raise ValueError(
            f"attributes {tuple(attributes.shape)} do not fit fragments with leading axes {batch}"
        )
    covered = fragments.face >= 0
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


def clear_hidden_faces(
    fragments: Fragments, faces: Int[Array, "F 3"], vertex_mask: Bool[Array, " V"]
) -> Fragments:
    """Turn pixels into background whose face has no vertex in `vertex_mask`.

    Such faces have already occluded what lies behind them.
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


def antialias(
    image: Float[Array, "*b S S C"],
    fragments: Fragments,
    vertices: Float[Array, "*b V 3"],
    faces: Int[Array, "F 3"],
) -> Float[Array, "*b S S C"]:
    """Blend the pixels on both sides of every silhouette by where it passes between their centres.

    After Laine et al., "Modular Primitives for High-Performance Differentiable Rendering" (2020),
    section 3.4. Two pixels side by side, or one above the other, that show different faces are a pair.
    On the surface of the nearer pixel, going from its centre towards the other one's, the first
    silhouette edge is looked for, from face to neighbouring face. If there is one, at t in [0, 1] of the
    way from the first to the second pixel, then the second takes t - 1/2 of the first one's colour, or,
    if that is negative, the first takes 1/2 - t of the second one's. So a straight edge that moves by a
    pixel changes the image linearly and without a jump (a corner of the silhouette may jump), and the
    image has a gradient with respect to the positions of silhouettes. The paper searches only the edges
    of the nearer pixel's own face, which misses silhouettes where faces are smaller than pixels.

    An edge is a silhouette if all sound faces at it lie on the same side of it on the screen: the edge
    of a fold or of an open border. Edges closer to the vertical are dealt with by pairs in a row, the
    others by pairs in a column, so that no edge counts twice. A pixel with silhouettes on several sides
    is given its neighbours' colours in proportion, at most all of it, so that the result never leaves
    the range of the image's values.

    Missed: sheets and spikes that pass between pixel centres, silhouettes behind an edge with more than
    two faces, and the border that `clear_hidden_faces` cuts into a surface. Not differentiable: which
    faces are seen, which of two is nearer, which edges are silhouettes, which edge counts as vertical.

    Args:
      image: any picture of `fragments`, for example from `interpolate`; C channels, background included.
      fragments: from `rasterize`, with the same leading axes.
      vertices: those that were rasterised; gradients flow to x and y.
      faces: those that were rasterised. Faces are neighbours if they name the same two vertices.

    Raises:
      ValueError: shapes do not fit.
    """
    batch, size = fragments.face.shape[:-2], fragments.face.shape[-1]
    if image.shape[:-1] != fragments.face.shape or vertices.shape[:-2] != batch or vertices.shape[-1] != 3:
        raise ValueError(
            f"image {tuple(image.shape)}, fragments {tuple(fragments.face.shape)} and vertices "
            f"{tuple(vertices.shape)} do not fit: (*b, S, S, C), (*b, S, S) and (*b, V, 3) are needed"
        )
    if faces.shape[0] == 0 or vertices.shape[-2] == 0 or 0 in image.shape:
        return image
    folded = jnp.asarray(vertices, jnp.float32).reshape(-1, *vertices.shape[-2:])
    face = fragments.face.reshape(-1, size, size)
    depth = lax.stop_gradient(fragments.depth).reshape(face.shape)
    blend = jax.checkpoint(_blend_pairs)
    blended = blend(image.reshape(*face.shape, -1), folded, jnp.asarray(faces), face, depth)
    return blended.reshape(image.shape)


def downsample(image: Float[Array, "*b H W C"], factor: int = 2) -> Float[Array, "*b H/f W/f C"]:
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
    vertices: Float[Array, "*b V 3"],
    faces: Int[Array, "F 3"],
    attributes: Float[Array, "*b V C"],
    size: int,
    *,
    cull: bool = True,
    perspective_correct: bool = False,
    vertex_mask: Bool[Array, " V"] | None = None,
    smooth_silhouettes: bool = False,
    supersample: int = 1,
) -> Rendering:
    """Rasterise, interpolate, and as asked mask, antialias and average down, in one call.

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


def _make_plan(size: int, n_faces: int, tile: int | None, window: int | None) -> _Plan:
    """Static sizes that make one window enough for a mesh that fills the frame twice over."""
    tile = tile or 8
    side = -(-size // tile)
    # Mean side, in pixels, of the bounding box of a face when the front half covers the frame.
    extent = math.sqrt(2 * size * size / max(n_faces / 2, 1))
    expected = n_faces / 2 * min(1.0, extent + 0.25) ** 2 * (1 + extent / tile) ** 2
    window = window or 256 * math.ceil(max(1.25 * expected, 512) / 256)
    window = min(window, n_faces * side * side)
    return _Plan(size, tile, side, 8, window)


def _centre_table(size: int, doubled_start: int, doubled_step: int, count: int) -> np.ndarray:
    """Coordinates 1 - p/S at p = start/2 + i step/2, each as a float32 and its rounding error."""
    exact = 1 - (doubled_start + doubled_step * np.arange(count, dtype=np.float64)) / size
    high = exact.astype(np.float32)
    return np.stack([high, (exact - high).astype(np.float32)])


def _nearest_faces(triangles, plan: _Plan, cull: bool, perspective_correct: bool):
    """Face indices (N, S, S) of triangle soups (N, F, 9); -1 where there is none.

    Under `jax.vmap` the mapped axis is folded into N, since loops with a trip count that depends on
    the data would otherwise run in lockstep over the batch with every branch taken.
    """

    @jax.custom_batching.custom_vmap
    def search(triangles):
        return _search(triangles, plan, cull, perspective_correct)

    @search.def_vmap
    def _(axis_size, in_batched, triangles):
        folded = triangles.reshape(-1, *triangles.shape[2:])
        face = search(folded)
        return face.reshape(axis_size, -1, *face.shape[1:]), True

    return search(triangles)


class _Bins(NamedTuple):
    """Which tiles each face may cover, and the running number of (face, tile) pairs per frame."""

    column: Int[Array, "N F"]
    row: Int[Array, "N F"]
    width: Int[Array, "N F"]
    last: Int[Array, "N F"]  # pairs of this face and all before it


def _bin(triangles: Float[Array, "N F 9"], plan: _Plan, cull: bool) -> _Bins:
    x, y, z = (triangles[..., axis::3] for axis in range(3))
    area = (x[..., 1] - x[..., 0]) * (y[..., 2] - y[..., 0]) - (y[..., 1] - y[..., 0]) * (
        x[..., 2] - x[..., 0]
    )
    kept = jnp.all(jnp.abs(triangles) < _LARGEST_COORDINATE, axis=-1) & jnp.all(z >= _SMALLEST_DEPTH, axis=-1)
    kept &= (area < 0) if cull else (area != 0)
    # A little more than rounding can move a coordinate, so that no pixel on an edge is missed.
    slack = 1e-6 * plan.size

    def pixels(low, high):
        first = jnp.ceil((1 - high) * (plan.size / 2) - 0.5 - slack)
        final = jnp.floor((1 - low) * (plan.size / 2) - 0.5 + slack)
        clip = lambda v: jnp.clip(jnp.where(kept, v, 0), -1, plan.size).astype(jnp.int32)
        return jnp.maximum(clip(first), 0), jnp.minimum(clip(final), plan.size - 1)

    left, right = pixels(x.min(-1), x.max(-1))
    top, bottom = pixels(y.min(-1), y.max(-1))
    kept &= (left <= right) & (top <= bottom)
    column, row = left // plan.tile, top // plan.tile
    width, height = right // plan.tile - column + 1, bottom // plan.tile - row + 1
    number = jnp.where(kept, width * height, 0)
    return _Bins(column, row, jnp.maximum(width, 1), jnp.cumsum(number, axis=-1))


def _pairs(bins: _Bins, start, plan: _Plan):
    """Pairs start .. start + window of each frame, sorted by tile, then face.

    Returns tile and face of every pair (N, window); pairs past a frame's last have tile side^2.
    """
    n_faces = bins.last.shape[-1]
    n_tiles = plan.side * plan.side
    index = start + jnp.arange(plan.window, dtype=jnp.int32)
    find = lambda last: jnp.searchsorted(last, index, side="right").astype(jnp.int32)
    found = jax.vmap(find)(bins.last)
    exists = found < n_faces
    face = jnp.minimum(found, n_faces - 1)
    take = lambda table: jnp.take_along_axis(table, face, axis=-1)
    before = jnp.where(face > 0, jnp.take_along_axis(bins.last, jnp.maximum(face - 1, 0), axis=-1), 0)
    offset = index - before
    width = take(bins.width)
    tile = (take(bins.row) + offset // width) * plan.side + take(bins.column) + offset % width
    tile = jnp.where(exists, tile, n_tiles)
    return _sort_pairs(tile, face, n_faces, packed=(n_tiles + 1) * n_faces <= 2**32)


def _sort_pairs(tile, face, n_faces: int, packed: bool):
    """Pairs in ascending order of tile, then face.

    `packed` puts tile and face into one integer, which sorts several times faster where it fits.
    """
    if not packed:
        return lax.sort((tile, face), num_keys=2)
    key = lax.sort(tile.astype(jnp.uint32) * np.uint32(n_faces) + face.astype(jnp.uint32))
    return (key // np.uint32(n_faces)).astype(jnp.int32), (key % np.uint32(n_faces)).astype(jnp.int32)


def _search(triangles: Float[Array, "N F 9"], plan: _Plan, cull: bool, perspective_correct: bool):
    """Nearest faces of `_nearest_faces`, the batch already folded."""
    n_frames, n_faces, _ = triangles.shape
    n_tiles, pixels = plan.side * plan.side, plan.tile * plan.tile
    bins = _bin(triangles, plan, cull)
    last_pair = jnp.max(bins.last[:, -1])
    if perspective_correct:
        # 1/depth is linear on the screen, so its negative orders faces as their surfaces do.
        triangles = triangles.at[..., 2::3].set(-1 / triangles[..., 2::3])
    table = triangles.reshape(n_frames * n_faces, 9)

    def one_window(state):
        start, depth, face = state
        tiles, faces = _pairs(bins, start, plan)
        new_depth, new_face = _shade_tiles(table, tiles, faces, n_faces, plan)
        closer = (new_depth < depth) | ((new_depth == depth) & (new_face < face))
        return (
            start + plan.window,
            jnp.where(closer, new_depth, depth),
            jnp.where(closer, new_face, face),
        )

    state = (
        jnp.int32(0),
        jnp.full((n_frames * n_tiles, pixels), jnp.inf, jnp.float32),
        jnp.full((n_frames * n_tiles, pixels), n_faces, jnp.int32),
    )
    _, _, face = lax.while_loop(lambda state: state[0] < last_pair, one_window, state)
    face = jnp.where(face == n_faces, -1, face)
    face = face.reshape(n_frames, plan.side, plan.side, plan.tile, plan.tile).swapaxes(2, 3)
    padded = plan.side * plan.tile
    return face.reshape(n_frames, padded, padded)[:, : plan.size, : plan.size]


def _shade_tiles(table, tiles, faces, n_faces: int, plan: _Plan):
    """Depth and face (N * side^2, tile^2) from sorted pairs; infinite depth where nothing is."""
    n_frames, window = tiles.shape
    n_tiles, pixels = plan.side * plan.side, plan.tile * plan.tile
    total = n_frames * n_tiles
    bounds = jax.vmap(lambda t: jnp.searchsorted(t, jnp.arange(n_tiles + 1)))(tiles).astype(jnp.int32)
    first = (bounds[:, :-1] + window * jnp.arange(n_frames, dtype=jnp.int32)[:, None]).reshape(-1)
    count = jnp.diff(bounds, axis=-1).reshape(-1)

    # Busy tiles first, so that tiles worked on together have about as many faces.
    order = jnp.argsort(-count)
    rank = jnp.argsort(order)
    n_busy = jnp.sum(count > 0)
    faces = faces.reshape(-1)

    def shade(chunk: int):
        padded = -(-total // chunk) * chunk
        pad = lambda v: jnp.pad(v[order], (0, padded - total))
        tile_sorted = jnp.pad(order, (0, padded - total))
        first_sorted, count_sorted = pad(first), pad(count)

        def one_chunk(index, buffers):
            part = lambda v: lax.dynamic_slice_in_dim(v, index * chunk, chunk)
            values = _shade_chunk(
                table, faces, part(tile_sorted), part(first_sorted), part(count_sorted), n_faces, plan
            )
            return tuple(
                lax.dynamic_update_slice_in_dim(buffer, value, index * chunk, axis=0)
                for buffer, value in zip(buffers, values, strict=True)
            )

        buffers = (
            jnp.full((padded, pixels), jnp.inf, jnp.float32),
            jnp.full((padded, pixels), n_faces, jnp.int32),
        )
        depth, face = lax.fori_loop(0, (n_busy + chunk - 1) // chunk, one_chunk, buffers)
        return depth[rank], face[rank]

    # Small chunks stay in a CPU's cache; an accelerator wants enough pixels to fill it.
    return lax.platform_dependent(cpu=lambda: shade(min(64, total)), default=lambda: shade(min(4096, total)))


def _shade_chunk(table, faces, tile, first, count, n_faces: int, plan: _Plan):
    """Depth and face of W tiles, each going through its own `count` faces from `first` on."""
    frame, tile = tile // (plan.side * plan.side), tile % (plan.side * plan.side)
    centres = jnp.asarray(_centre_table(plan.size, plan.tile, 2 * plan.tile, plan.side))
    centre_x, centre_y = centres[:, tile % plan.side, None], centres[:, tile // plan.side, None]
    local = np.arange(plan.tile) * -2.0 + (plan.tile - 1)
    local_x = np.tile(local / plan.size, plan.tile).astype(np.float32)
    local_y = np.repeat(local / plan.size, plan.tile).astype(np.float32)
    shape = (tile.shape[0], plan.tile * plan.tile)

    def one_block(index, state):
        depth, best = state
        step = index * plan.block + jnp.arange(plan.block, dtype=jnp.int32)
        valid = step < count[:, None]
        face = faces[jnp.where(valid, first[:, None] + step, 0)]
        corners = table[frame[:, None] * n_faces + face]
        setup = _edge_setup(corners, centre_x, centre_y, valid)
        for k in range(plan.block):
            value = [v[:, k, None] for v in setup]
            e0, e1, e2 = (
                value[3 * i] * local_x + value[3 * i + 1] * local_y + value[3 * i + 2] for i in range(3)
            )
            z = value[12] + e1 * value[13] + e2 * value[14]
            # Faces of a tile come in ascending order, so a strict comparison keeps the lower index.
            hit = (e0 > value[9]) & (e1 > value[10]) & (e2 > value[11]) & (z < depth)
            depth = jnp.where(hit, z, depth)
            best = jnp.where(hit, face[:, k, None], best)
        return depth, best

    state = (jnp.full(shape, jnp.inf, jnp.float32), jnp.full(shape, n_faces, jnp.int32))
    blocks = (jnp.max(count) + plan.block - 1) // plan.block
    return lax.fori_loop(0, blocks, one_block, state)


def _edge_setup(corners, centre_x, centre_y, valid):
    """Coefficients that turn tile-local pixel coordinates into edge values and depth.

    Returns fifteen arrays (W, K): for each of the edges opposite to vertex 0, 1, 2 the factors of
    x, y and 1; the three thresholds an edge value must exceed; depth at vertex 0 and its change per
    value of edges 1 and 2. Edge values are positive inside, whichever way the face turns.
    """
    # Coordinates relative to the tile's centre are small, so their products round little.
    x = [(corners[..., 3 * i] - centre_x[0]) - centre_x[1] for i in range(3)]
    y = [(corners[..., 3 * i + 1] - centre_y[0]) - centre_y[1] for i in range(3)]
    z = [corners[..., 3 * i + 2] for i in range(3)]
    area = _edge_constant(x[0], y[0], x[1], y[1], x[2], y[2])
    flip = jnp.where(area > 0, 1.0, -1.0)
    factors, thresholds = [], []
    for a, b in ((1, 2), (2, 0), (0, 1)):
        swap, ax, ay, bx, by = _canonical(x[a], y[a], x[b], y[b])
        dx, dy = bx - ax, by - ay
        sign = jnp.where(swap, -flip, flip)
        factors += [-sign * dy, sign * dx, sign * (dy * ax - dx * ay)]
        # On the screen, walking the outline counter-clockwise, left edges go down and top edges go
        # left, which is +x here. That walk has negative area in these coordinates, so it follows
        # (dx, dy) where `sign` is negative and turns it round where it is positive.
        top_left = (sign * dy > 0) | ((dy == 0) & (sign * dx < 0))
        thresholds.append(jnp.where(valid, jnp.where(top_left, -_TINY, 0.0), jnp.inf))
    scale = 1 / jnp.where(area == 0, 1.0, jnp.abs(area))
    return (*factors, *thresholds, z[0], (z[1] - z[0]) * scale, (z[2] - z[0]) * scale)


def _canonical(ax, ay, bx, by):
    """The end points of an edge in lexicographic order, and whether they were exchanged."""
    swap = (bx < ax) | ((bx == ax) & (by < ay))
    pick = lambda p, q: jnp.where(swap, q, p)
    return swap, pick(ax, bx), pick(ay, by), pick(bx, ax), pick(by, ay)


def _edge_constant(ax, ay, bx, by, px, py):
    """Twice the signed area of the triangle a, b, p."""
    return (bx - ax) * (py - ay) - (by - ay) * (px - ax)


def _barycentrics(vertices, faces, face, perspective_correct: bool):
    """Barycentrics (N, S, S, 3) and depth (N, S, S) of known faces; plain differentiable JAX."""
    size = face.shape[-1]
    covered = face >= 0
    centres = _centre_table(size, 1, 2, size)
    px, py = centres[:, None, :], centres[:, :, None]
    corners = faces[jnp.maximum(face, 0)]
    gather = jax.vmap(lambda vertices, index: vertices[index])
    points = [gather(vertices, corners[..., k]) for k in range(3)]
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


# ---------------------------------------------------------------------------------------- silhouettes


def _blend_pairs(image, vertices, faces, face, depth):
    """The body of `antialias`, leading axes folded into one."""
    taken = [share[..., None].astype(image.dtype) for share in _taken_shares(vertices, faces, face, depth)]
    scale = 1 / jnp.maximum(sum(taken), 1)
    steps = ((1, 2), (-1, 2), (1, 1), (-1, 1))  # from the left, right, upper, lower pixel
    return image + scale * sum(
        share * (jnp.roll(image, step, axis) - image)
        for share, (step, axis) in zip(taken, steps, strict=True)
    )


def _taken_shares(vertices, faces, face, depth):
    """What each pixel takes of its left, right, upper and lower neighbour: four (N, S, S) in [0, 1/2]."""
    # Faces known at compile time would have XLA sort their edges itself, for half a minute.
    outline = _outline(lax.stop_gradient(vertices), lax.optimization_barrier(faces))
    across = _share_of_pairs(vertices, outline, face, depth, along=0)
    turned = face.swapaxes(1, 2), depth.swapaxes(1, 2)
    down = _share_of_pairs(vertices, outline, *turned, along=1).swapaxes(1, 2)
    pad = lambda share, *widths: jnp.pad(jnp.maximum(share, 0), ((0, 0), *widths))
    none, before, after = (0, 0), (1, 0), (0, 1)
    return (
        pad(across, none, before),
        pad(-across, none, after),
        pad(down, before, none),
        pad(-down, after, none),
    )


class _Outline(NamedTuple):
    """Faces with what lies across their edges; edge k is the one opposite to corner k."""

    faces: Int[Array, "F 3"]
    neighbour: Int[Array, "F 3"]  # the other face at the edge; -1: none, or several
    silhouette: Bool[Array, "N F 3"]


def _share_of_pairs(vertices, outline: _Outline, face, depth, along: int):
    """t - 1/2 for the pairs along the last axis of `face`, (N, S, S - 1); zero where nothing crosses.

    `along` is the axis of `vertices` that runs with the pairs: 0 within rows, 1 within columns (for
    which `face` and `depth` come transposed).
    """
    centres = _centre_table(face.shape[-1], 1, 2, face.shape[-1])
    # In pixels from the first centre, positive towards the second: u along the pair, v across.
    frame_of = (
        (along, centres[:, None, :-1]),
        (1 - along, centres[:, :, None]),
    )
    pick = jax.vmap(lambda table, index: table[index])

    def on_pairs(vertices, corner):
        return (
            ((high - pick(vertices[..., axis], corner)) + low) * (face.shape[-1] / 2)
            for axis, (high, low) in frame_of
        )

    start, stop, found = _walk(partial(on_pairs, lax.stop_gradient(vertices)), outline, face, depth)
    (ua, va), (ub, vb) = on_pairs(vertices, start), on_pairs(vertices, stop)
    du, dv = ub - ua, vb - va
    ours = (jnp.abs(dv) >= jnp.abs(du)) if along == 0 else (jnp.abs(dv) > jnp.abs(du))
    # Extremely short edges are left out: their slopes would overflow in the backward pass.
    ours &= found & (jnp.abs(dv) > _SHORTEST_EDGE)
    crossing = ua - va * (du / jnp.where(ours, dv, 1.0))
    return jnp.where(ours, crossing - 0.5, 0.0)


def _walk(on_pairs, outline: _Outline, face, depth):
    """The silhouette edge that each pair of pixels meets first, going from the nearer one's centre.

    From face to face over the edge where the way to the other centre leaves, until that edge is a
    silhouette or the other pixel is reached: on an unbroken surface, or where faces are as large as
    pixels, at the first or second face.

    Returns:
      Two vertices of that edge and whether there is one, each (N, S, S - 1).
    """
    first, second = np.s_[..., :-1], np.s_[..., 1:]
    differ = face[first] != face[second]
    forward = depth[first] <= depth[second]
    ahead = jnp.where(forward, 1.0, -1.0)
    near = jnp.where(forward, face[first], face[second])
    pick = jax.vmap(lambda table, index: table[index])

    def one_face(state):
        count, here, walking, start, stop, found = state
        corners = [outline.faces[:, k][here] for k in range(3)]
        u, v = zip(*(on_pairs(corner) for corner in corners), strict=True)
        silhouette = pick(outline.silhouette, here)
        # The way enters a face over one edge and leaves over the one further ahead.
        best = jnp.full(here.shape, -jnp.inf)
        leave, low, high = jnp.full(here.shape, -1), start, stop
        border = jnp.zeros(here.shape, bool)
        for k, (a, b) in enumerate(((1, 2), (2, 0), (0, 1))):
            crosses = (v[a] > 0) != (v[b] > 0)
            place = u[a] - v[a] * ((u[b] - u[a]) / jnp.where(crosses, v[b] - v[a], 1.0))
            place = jnp.where(crosses, ahead * (place - 0.5), -jnp.inf)
            further = place > best
            best = jnp.where(further, place, best)
            leave = jnp.where(further, outline.neighbour[:, k][here], leave)
            border = jnp.where(further, silhouette[..., k], border)
            low, high = jnp.where(further, corners[a], low), jnp.where(further, corners[b], high)
        walking &= jnp.abs(best) <= 0.5 + _PIXEL_SLACK
        take = walking & border
        walking &= ~border & (leave >= 0)
        return (
            count + 1,
            jnp.where(walking, leave, here),
            walking,
            jnp.where(take, low, start),
            jnp.where(take, high, stop),
            found | take,
        )

    none = jnp.zeros(near.shape, jnp.int32)
    state = (0, jnp.where(differ, near, 0), differ, none, none, jnp.zeros(near.shape, bool))
    state = lax.while_loop(lambda s: (s[0] < _LONGEST_WALK) & jnp.any(s[2]), one_face, state)
    return state[3:]


def _outline(vertices: Float[Array, "N V 3"], faces: Int[Array, "F 3"]) -> _Outline:
    """Neighbours, and the edges that have all their sound faces on one side of them."""
    n_faces = faces.shape[0]
    x, y, z = (vertices[..., axis][:, faces] for axis in range(3))
    area = _edge_constant(x[..., 0], y[..., 0], x[..., 1], y[..., 1], x[..., 2], y[..., 2])
    sound = jnp.all((jnp.abs(x) < _LARGEST_COORDINATE) & (jnp.abs(y) < _LARGEST_COORDINATE), axis=-1)
    sound &= jnp.all((z >= _SMALLEST_DEPTH) & (z < _LARGEST_COORDINATE), axis=-1)
    start, stop = faces[:, jnp.array((1, 2, 0))], faces[:, jnp.array((2, 0, 1))]
    # On which side of the edge, walked from its lower to its higher vertex, the face lies.
    side = jnp.where(start < stop, 1, -1) * jnp.where(sound, jnp.sign(area), 0)[..., None]
    order, first, past = _runs_of_equal_edges(start.reshape(-1), stop.reshape(-1))

    def anywhere(flag):
        """Whether any face of the edge has the flag, from running counts over edges in order."""
        count = jnp.cumsum(flag.reshape(-1, 3 * n_faces)[:, order].astype(jnp.int32), axis=-1)
        count = jnp.pad(count, ((0, 0), (1, 0)))
        return (count[:, past] > count[:, first]).reshape(flag.shape)

    # Of two faces at an edge, the one that is not this one.
    pair = (order[first] // 3, order[jnp.minimum(first + 1, 3 * n_faces - 1)] // 3)
    this = jnp.arange(3 * n_faces) // 3
    other = jnp.where(past - first == 2, jnp.where(pair[0] == this, pair[1], pair[0]), -1)
    return _Outline(faces, other.reshape(n_faces, 3), ~(anywhere(side > 0) & anywhere(side < 0)))


def _runs_of_equal_edges(start: Int[Array, " E"], stop: Int[Array, " E"]):
    """An order in which equal edges follow each other, and per edge the bounds of its run therein."""
    low, high = jnp.minimum(start, stop), jnp.maximum(start, stop)
    order = jnp.lexsort((high, low))
    low, high = low[order], high[order]
    place = jnp.arange(order.shape[0], dtype=jnp.int32)
    fresh = jnp.concatenate([jnp.ones(1, bool), (low[1:] != low[:-1]) | (high[1:] != high[:-1])])
    first = lax.cummax(jnp.where(fresh, place, 0))
    final = jnp.concatenate([fresh[1:], jnp.ones(1, bool)])
    past = lax.cummin(jnp.where(final, place + 1, order.shape[0]), reverse=True)
    rank = jnp.argsort(order)
    return order, first[rank], past[rank]
