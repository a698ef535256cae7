"""The search for the nearest face at every pixel, binned by tiles.

Per frame, every face that may hold a pixel centre is paired with the tiles its bounding box touches;
the pairs are sorted by tile; then each tile tests its own faces, a block at a time, and keeps depth and
face of the nearest. No buffer is as large as pixels x faces, nothing is scattered per pixel, and nothing
can overflow: pairs are enumerated in windows of a fixed number, and a loop runs until every frame has
seen all its pairs (one turn, unless the mesh is unusual).

Every edge is evaluated from the same end point whichever face asks, so the two faces of an edge see
exactly opposite numbers: between neighbours there are neither cracks nor pixels drawn twice.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from loki_jax.raster.fragments import Faces, Vertices, centre_table, doubled_area, is_drawable

_TINY = float(np.finfo(np.float32).tiny)


class _Plan(NamedTuple):
    """Static sizes of one search."""

    size: int
    n_faces: int
    cull: bool
    perspective_correct: bool
    tile: int  # pixels along a tile's side
    side: int  # tiles along the image's side
    block: int  # faces a tile tests at a time
    window: int  # (face, tile) pairs a frame enumerates at a time


@partial(jax.jit, static_argnames=("size", "cull", "perspective_correct", "tile", "window"), inline=True)
def nearest_faces(
    vertices: Vertices,
    faces: Faces,
    size: int,
    cull: bool = True,
    *,
    perspective_correct: bool = False,
    tile: int | None = None,
    window: int | None = None,
) -> Int[Array, "*b S S"]:
    """Only the search of `rasterize`: the nearest face at every pixel, -1 on the background.

    Not differentiable. Arguments, conventions and errors are those of `rasterize`.
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
    plan = _make_plan(size, faces.shape[0], cull, perspective_correct, tile, window)
    vertices = lax.stop_gradient(jnp.asarray(vertices, jnp.float32))
    folded = vertices.reshape(-1, *vertices.shape[-2:])
    triangles = folded[:, jnp.asarray(faces).reshape(-1)].reshape(folded.shape[0], -1, 9)
    return _fold_mapped_axes(partial(_search, plan=plan))(triangles).reshape(*batch, size, size)


def _make_plan(
    size: int, n_faces: int, cull: bool, perspective_correct: bool, tile: int | None, window: int | None
) -> _Plan:
    """Static sizes that make one window enough for a mesh that fills the frame twice over."""
    tile = tile or 8
    side = -(-size // tile)
    # Mean side, in pixels, of the bounding box of a face when the front half covers the frame.
    extent = math.sqrt(2 * size * size / max(n_faces / 2, 1))
    expected = n_faces / 2 * min(1.0, extent + 0.25) ** 2 * (1 + extent / tile) ** 2
    window = window or 256 * math.ceil(max(1.25 * expected, 512) / 256)
    window = min(window, n_faces * side * side)
    return _Plan(size, n_faces, cull, perspective_correct, tile, side, 8, window)


def _fold_mapped_axes(function):
    """`function`, with the mapped axis of `jax.vmap` folded into the leading one.

    Loops with a trip count that depends on the data would otherwise run in lockstep over the batch with
    every branch taken.
    """
    folded = jax.custom_batching.custom_vmap(function)

    @folded.def_vmap
    def _(axis_size, in_batched, x):
        out = folded(x.reshape(-1, *x.shape[2:]))
        return out.reshape(axis_size, -1, *out.shape[1:]), True

    return folded


class _Bins(NamedTuple):
    """Which tiles each face may cover, and the running number of (face, tile) pairs per frame."""

    column: Int[Array, "N F"]
    row: Int[Array, "N F"]
    width: Int[Array, "N F"]
    last: Int[Array, "N F"]  # pairs of this face and all before it


def _bin(triangles: Float[Array, "N F 9"], plan: _Plan) -> _Bins:
    x, y, z = (triangles[..., axis::3] for axis in range(3))
    area = doubled_area(x[..., 0], y[..., 0], x[..., 1], y[..., 1], x[..., 2], y[..., 2])
    kept = is_drawable(x, y, z) & ((area < 0) if plan.cull else (area != 0))
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
    n_tiles = plan.side * plan.side
    index = start + jnp.arange(plan.window, dtype=jnp.int32)
    find = lambda last: jnp.searchsorted(last, index, side="right").astype(jnp.int32)
    found = jax.vmap(find)(bins.last)
    face = jnp.minimum(found, plan.n_faces - 1)
    take = lambda table: jnp.take_along_axis(table, face, axis=-1)
    before = jnp.where(face > 0, jnp.take_along_axis(bins.last, jnp.maximum(face - 1, 0), axis=-1), 0)
    offset = index - before
    width = take(bins.width)
    tile = (take(bins.row) + offset // width) * plan.side + take(bins.column) + offset % width
    tile = jnp.where(found < plan.n_faces, tile, n_tiles)
    return _sort_pairs(tile, face, plan.n_faces, packed=(n_tiles + 1) * plan.n_faces <= 2**32)


def _sort_pairs(tile, face, n_faces: int, packed: bool):
    """Pairs in ascending order of tile, then face.

    `packed` puts tile and face into one integer, which sorts several times faster where it fits.
    """
    if not packed:
        return lax.sort((tile, face), num_keys=2)
    key = lax.sort(tile.astype(jnp.uint32) * np.uint32(n_faces) + face.astype(jnp.uint32))
    return (key // np.uint32(n_faces)).astype(jnp.int32), (key % np.uint32(n_faces)).astype(jnp.int32)


def _search(triangles: Float[Array, "N F 9"], plan: _Plan) -> Int[Array, "N S S"]:
    """Face indices of triangle soups; -1 where there is none."""
    n_frames = triangles.shape[0]
    bins = _bin(triangles, plan)
    last_pair = jnp.max(bins.last[:, -1])
    if plan.perspective_correct:
        # 1/depth is linear on the screen, so its negative orders faces as their surfaces do.
        triangles = triangles.at[..., 2::3].set(-1 / triangles[..., 2::3])
    table = triangles.reshape(n_frames * plan.n_faces, 9)

    def one_window(state):
        start, depth, face = state
        tiles, faces = _pairs(bins, start, plan)
        new_depth, new_face = _shade_tiles(table, tiles, faces, plan)
        closer = (new_depth < depth) | ((new_depth == depth) & (new_face < face))
        return (start + plan.window, jnp.where(closer, new_depth, depth), jnp.where(closer, new_face, face))

    state = (jnp.int32(0), *_empty_tiles(n_frames * plan.side * plan.side, plan))
    _, _, face = lax.while_loop(lambda state: state[0] < last_pair, one_window, state)
    face = jnp.where(face == plan.n_faces, -1, face)
    face = face.reshape(n_frames, plan.side, plan.side, plan.tile, plan.tile).swapaxes(2, 3)
    padded = plan.side * plan.tile
    return face.reshape(n_frames, padded, padded)[:, : plan.size, : plan.size]


def _empty_tiles(count: int, plan: _Plan):
    """Depth and face (count, tile^2) before any face is tested."""
    shape = (count, plan.tile * plan.tile)
    return jnp.full(shape, jnp.inf, jnp.float32), jnp.full(shape, plan.n_faces, jnp.int32)


def _shade_tiles(table, tiles, faces, plan: _Plan):
    """Depth and face (N * side^2, tile^2) from sorted pairs; infinite depth where nothing is."""
    n_frames, window = tiles.shape
    n_tiles = plan.side * plan.side
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
        work = [jnp.pad(v, (0, padded - total)) for v in (order, first[order], count[order])]

        def one_chunk(index, buffers):
            part = [lax.dynamic_slice_in_dim(v, index * chunk, chunk) for v in work]
            values = _shade_chunk(table, faces, *part, plan)
            return tuple(
                lax.dynamic_update_slice_in_dim(buffer, value, index * chunk, axis=0)
                for buffer, value in zip(buffers, values, strict=True)
            )

        chunks = (n_busy + chunk - 1) // chunk
        depth, face = lax.fori_loop(0, chunks, one_chunk, _empty_tiles(padded, plan))
        return depth[rank], face[rank]

    # Small chunks stay in a CPU's cache; an accelerator wants enough pixels to fill it.
    return lax.platform_dependent(cpu=lambda: shade(min(64, total)), default=lambda: shade(min(4096, total)))


def _shade_chunk(table, faces, tile, first, count, plan: _Plan):
    """Depth and face of W tiles, each going through its own `count` faces from `first` on."""
    frame, tile = tile // (plan.side * plan.side), tile % (plan.side * plan.side)
    centres = jnp.asarray(centre_table(plan.size, plan.tile, 2 * plan.tile, plan.side))
    centre_x, centre_y = centres[:, tile % plan.side, None], centres[:, tile // plan.side, None]
    local = np.arange(plan.tile) * -2.0 + (plan.tile - 1)
    local_x = np.tile(local / plan.size, plan.tile).astype(np.float32)
    local_y = np.repeat(local / plan.size, plan.tile).astype(np.float32)

    def one_block(index, state):
        depth, best = state
        step = index * plan.block + jnp.arange(plan.block, dtype=jnp.int32)
        valid = step < count[:, None]
        face = faces[jnp.where(valid, first[:, None] + step, 0)]
        corners = table[frame[:, None] * plan.n_faces + face]
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

    blocks = (jnp.max(count) + plan.block - 1) // plan.block
    return lax.fori_loop(0, blocks, one_block, _empty_tiles(tile.shape[0], plan))


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
    area = doubled_area(x[0], y[0], x[1], y[1], x[2], y[2])
    flip = jnp.where(area > 0, 1.0, -1.0)
    factors, thresholds = [], []
    for a, b in ((1, 2), (2, 0), (0, 1)):
        # From the lexicographically lower end point, whichever face asks.
        swap = (x[b] < x[a]) | ((x[b] == x[a]) & (y[b] < y[a]))
        ax, ay, bx, by = (
            jnp.where(swap, q, p) for p, q in ((x[a], x[b]), (y[a], y[b]), (x[b], x[a]), (y[b], y[a]))
        )
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
