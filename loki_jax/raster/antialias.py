"""Smooth silhouettes, and with them gradients with respect to where silhouettes are.

Which face a pixel shows carries no gradient. `antialias` blends the pixels on both sides of a silhouette;
the step from one face to the next on an unbroken surface stays outside every gradient. The backward pass
keeps the image and the depth that it is given, besides the fragments.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from loki_jax.raster.fragments import (
    Faces,
    Fragments,
    Vertices,
    centre_table,
    doubled_area,
    is_drawable,
    pick,
)

_SHORTEST_EDGE = 1e-6  # pixels, across the row or column that it crosses

_PIXEL_SLACK = 1e-4  # pixels that rounding may put a crossing beyond the centre of its pixel

_LONGEST_WALK = 64  # faces between two neighbouring pixel centres that are searched for a silhouette


def antialias(
    image: Float[Array, "*b S S C"], fragments: Fragments, vertices: Vertices, faces: Faces
) -> Float[Array, "*b S S C"]:
    """Blend the pixels on both sides of every silhouette by where it passes between their centres.

    After Laine et al., "Modular Primitives for High-Performance Differentiable Rendering" (2020),
    section 3.4. Two pixels side by side, or one above the other, that show different faces are a pair.
    The search starts at the centre of the nearer pixel and follows its surface towards the other centre,
    from face to neighbouring face, until it meets a silhouette edge. If there is one, at t in [0, 1] of
    the way from the first to the second pixel, then the second takes t - 1/2 of the first one's colour;
    if that is negative, the first takes 1/2 - t of the second one's. So a straight edge that moves by a
    pixel changes the image linearly and without a jump (a corner of the silhouette may jump), and the
    image has a gradient with respect to the positions of silhouettes. The paper searches only the edges
    of the nearer pixel's own face, which misses silhouettes where faces are smaller than pixels.

    An edge is a silhouette if all drawable faces at it are on the same side of it on the screen: the edge
    of a fold or of an open border. Pairs in a row handle edges closer to the vertical, pairs in a column
    the others, so that no edge counts twice. A pixel with silhouettes on several sides takes its
    neighbours' colours in proportion, at most all of it, so that the result never leaves the range of
    the image's values.

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


def _blend_pairs(image, vertices, faces, face, depth):
    """The body of `antialias`, leading axes folded into one."""
    # Faces known at compile time would have XLA sort their edges itself, for half a minute.
    outline = _outline(lax.stop_gradient(vertices), lax.optimization_barrier(faces))
    across = _share_of_pairs(vertices, outline, face, depth, along=0)
    turned = face.swapaxes(1, 2), depth.swapaxes(1, 2)
    down = _share_of_pairs(vertices, outline, *turned, along=1).swapaxes(1, 2)

    def taken_from(share, step, axis):
        """A neighbour, and what each pixel takes of it: (N, S, S, 1) in [0, 1/2]."""
        widths = [(0, 0)] * 3
        widths[axis] = (1, 0) if step == 1 else (0, 1)
        share = jnp.pad(jnp.maximum(share, 0), widths)[..., None].astype(image.dtype)
        return jnp.roll(image, step, axis), share

    sides = [taken_from(across, 1, 2), taken_from(-across, -1, 2)]  # from the left, the right pixel
    sides += [taken_from(down, 1, 1), taken_from(-down, -1, 1)]  # from the upper, the lower pixel
    scale = 1 / jnp.maximum(sum(share for _, share in sides), 1)
    return image + scale * sum(share * (neighbour - image) for neighbour, share in sides)


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
    centres = centre_table(face.shape[-1], 1, 2, face.shape[-1])
    # In pixels from the first centre, positive towards the second: u along the pair, v across.
    frame_of = ((along, centres[:, None, :-1]), (1 - along, centres[:, :, None]))

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
            at = u[a] - v[a] * ((u[b] - u[a]) / jnp.where(crosses, v[b] - v[a], 1.0))
            at = jnp.where(crosses, ahead * (at - 0.5), -jnp.inf)
            further = at > best
            best = jnp.where(further, at, best)
            leave = jnp.where(further, outline.neighbour[:, k][here], leave)
            border = jnp.where(further, silhouette[..., k], border)
            low, high = jnp.where(further, corners[a], low), jnp.where(further, corners[b], high)
        walking &= jnp.abs(best) <= 0.5 + _PIXEL_SLACK
        take = walking & border
        walking &= ~border & (leave >= 0)
        here = jnp.where(walking, leave, here)
        start, stop = jnp.where(take, low, start), jnp.where(take, high, stop)
        return count + 1, here, walking, start, stop, found | take

    none = jnp.zeros(near.shape, jnp.int32)
    state = (0, jnp.where(differ, near, 0), differ, none, none, jnp.zeros(near.shape, bool))
    state = lax.while_loop(lambda s: (s[0] < _LONGEST_WALK) & jnp.any(s[2]), one_face, state)
    return state[3:]


def _outline(vertices: Float[Array, "N V 3"], faces: Faces) -> _Outline:
    """Neighbours, and the edges that have all their drawable faces on one side of them."""
    faces = jnp.asarray(faces)
    n_faces = faces.shape[0]
    x, y, z = (vertices[..., axis][:, faces] for axis in range(3))
    area = doubled_area(x[..., 0], y[..., 0], x[..., 1], y[..., 1], x[..., 2], y[..., 2])
    start, stop = faces[:, jnp.array((1, 2, 0))], faces[:, jnp.array((2, 0, 1))]
    # On which side of the edge, walked from its lower to its higher vertex, the face lies.
    side = jnp.where(start < stop, 1, -1) * jnp.where(is_drawable(x, y, z), jnp.sign(area), 0)[..., None]
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
    index = jnp.arange(order.shape[0], dtype=jnp.int32)
    fresh = jnp.concatenate([jnp.ones(1, bool), (low[1:] != low[:-1]) | (high[1:] != high[:-1])])
    first = lax.cummax(jnp.where(fresh, index, 0))
    final = jnp.concatenate([fresh[1:], jnp.ones(1, bool)])
    past = lax.cummin(jnp.where(final, index + 1, order.shape[0]), reverse=True)
    rank = jnp.argsort(order)
    return order, first[rank], past[rank]
