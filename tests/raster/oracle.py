"""Brute-force float64 rasteriser: every face against every pixel, the conventions spelled out.

Written for clarity, independent of `loki_jax.raster`, which it judges.
"""

from typing import NamedTuple

import numpy as np

EPSILON = float(np.finfo(np.float32).eps)


class Oracle(NamedTuple):
    face: np.ndarray  # (S, S), -1 on the background
    bary: np.ndarray  # (S, S, 3)
    depth: np.ndarray  # (S, S), infinite on the background
    certain: np.ndarray  # (S, S): float32 rounding cannot change the winner


def pixel_centres(size):
    """x (S,) of columns and y (S,) of rows."""
    centre = 1 - (2 * np.arange(size, dtype=np.float64) + 1) / size
    return centre, centre


def rasterize_oracle(vertices, faces, size, cull=True, perspective_correct=False, slack=16):
    """Reference image of one frame; `slack` scales the float32 epsilon within which it is unsure."""
    vertices = np.asarray(vertices, np.float64)
    column_x, row_y = pixel_centres(size)
    px, py = np.meshgrid(column_x, row_y)
    best_depth = np.full((size, size), np.inf)
    best_face = np.full((size, size), -1)
    best_bary = np.zeros((size, size, 3))
    unsure_depth = np.full((size, size), np.inf)  # nearest face that rounding may or may not cover
    second_depth = np.full((size, size), np.inf)
    tolerance = np.zeros((size, size))
    for index, face in enumerate(np.asarray(faces)):
        p = vertices[face]
        if not (np.abs(p) < 1e15).all() or (p[:, 2] < 1e-8).any():
            continue
        area = (p[1, 0] - p[0, 0]) * (p[2, 1] - p[0, 1]) - (p[1, 1] - p[0, 1]) * (p[2, 0] - p[0, 0])
        if area == 0 or (cull and area > 0):
            continue
        turn = 1 if area > 0 else -1
        inside = np.ones((size, size), bool)
        surely_out = np.zeros((size, size), bool)
        surely_in = np.ones((size, size), bool)
        edges = []
        for a, b in ((1, 2), (2, 0), (0, 1)):
            d = p[b, :2] - p[a, :2]
            first, second = d[0] * (py - p[a, 1]), d[1] * (px - p[a, 0])
            edge = turn * (first - second)
            # On screen x points right, so mirror; walk the outline counter-clockwise there.
            walk = np.array([-d[0], d[1]]) * (1 if turn < 0 else -1)
            top_left = walk[1] < 0 or (walk[1] == 0 and walk[0] < 0)
            inside &= (edge > 0) | ((edge == 0) & top_left)
            # Rounding of products of the edge with the way from its end to the pixel, by way of the
            # centre of the pixel's tile.
            way = np.abs(px - p[a, 0]) + np.abs(py - p[a, 1]) + 8 / size
            margin = slack * EPSILON * np.abs(d).sum() * way
            surely_out |= edge < -margin
            surely_in &= edge > margin
            edges.append(edge)
        bary = np.stack(edges, -1) / abs(area)
        if perspective_correct:
            bary = bary / p[:, 2]
            bary = bary / bary.sum(-1, keepdims=True)
        depth = p[0, 2] + bary[..., 1] * (p[1, 2] - p[0, 2]) + bary[..., 2] * (p[2, 2] - p[0, 2])
        unsure = ~surely_in & ~surely_out
        unsure_depth = np.where(
            unsure, np.minimum(unsure_depth, np.minimum(depth, p[:, 2].max())), unsure_depth
        )
        # A sliver's depth is as uncertain as its barycentrics are.
        longest = max(np.hypot(*(p[b, :2] - p[a, :2])) for a, b in ((1, 2), (2, 0), (0, 1)))
        spread = np.ptp(p[:, 2]) * min(
            1.0, slack * EPSILON * (longest + 2 / size) * max(longest, 0) / abs(area)
        )
        own = slack * EPSILON * np.abs(p[:, 2]).max() + spread
        closer = inside & (depth < best_depth)
        second_depth = np.where(
            closer, best_depth, np.where(inside, np.minimum(second_depth, depth), second_depth)
        )
        tolerance = np.where(inside, np.maximum(tolerance, own), tolerance)
        best_depth = np.where(closer, depth, best_depth)
        best_face = np.where(closer, index, best_face)
        best_bary = np.where(closer[..., None], bary, best_bary)
    with np.errstate(invalid="ignore"):
        rival = np.minimum(second_depth, unsure_depth)
        certain = ~(rival <= best_depth + 2 * tolerance) | ((best_face < 0) & np.isinf(unsure_depth))
    certain &= ~((best_face < 0) & np.isfinite(unsure_depth))
    # A winner that is itself unsure is covered above: its depth equals unsure_depth.
    return Oracle(best_face, best_bary, best_depth, certain)


def _screen_area(a, b, c):
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _open_edges(vertices, faces):
    """Edges {i, j} whose sound faces all lie on one side of them on the screen."""
    sides = {}
    for face in faces:
        p = vertices[face]
        if not (np.abs(p) < 1e15).all() or (p[:, 2] < 1e-8).any():
            continue
        for a, b, c in ((1, 2, 0), (2, 0, 1), (0, 1, 2)):
            i, j = sorted((face[a], face[b]))
            area = _screen_area(vertices[i], vertices[j], vertices[face[c]])
            sides.setdefault((i, j), set()).add(np.sign(area))
    return {edge for edge, seen in sides.items() if not {-1.0, 1.0} <= seen}


def antialias_oracle(image, face, depth, vertices, faces):
    """Pixel pairs one by one: the blend that `loki_jax.raster.antialias` promises, in float64.

    `face` and `depth` (S, S) say what each pixel of `image` (S, S, C) shows.
    """
    vertices, size = np.asarray(vertices, np.float64), face.shape[0]
    open_edges = _open_edges(vertices, faces)
    at_edge = {}
    for index, corners in enumerate(faces):
        for a, b in ((1, 2), (2, 0), (0, 1)):
            at_edge.setdefault(tuple(sorted((corners[a], corners[b]))), []).append(index)
    # Pixels as coordinates: the centre of row i, column j lies at (j, i).
    points = ((1 - vertices[:, :2]) * size - 1) / 2
    total, mixed = np.zeros((size, size)), np.zeros(image.shape)
    for down, right in ((0, 1), (1, 0)):
        ahead = (slice(0, size - down), slice(0, size - right)), (slice(down, size), slice(right, size))
        for i, j in np.argwhere(face[ahead[0]] != face[ahead[1]]):
            one, two = (i, j), (i + down, j + right)
            near = face[one] if depth[one] <= depth[two] else face[two]
            ahead = 1 if depth[one] <= depth[two] else -1
            while near >= 0:
                crossed = []
                corners = faces[near]
                for a, b in ((1, 2), (2, 0), (0, 1)):
                    start, stop = points[corners[a]] - (j, i), points[corners[b]] - (j, i)
                    if down:
                        start, stop = start[::-1], stop[::-1]
                    if (start[1] > 0) != (stop[1] > 0):
                        t = start[0] + (stop[0] - start[0]) * start[1] / (start[1] - stop[1])
                        crossed.append((ahead * t, t, *np.abs(stop - start), corners[a], corners[b]))
                if not crossed:
                    break
                _, t, along, across, *edge = max(crossed)
                edge = tuple(sorted(edge))
                if not 0 <= t <= 1:
                    break
                if edge in open_edges:
                    if (across > along) if down else (across >= along):
                        taker, giver = (two, one) if t > 0.5 else (one, two)
                        total[taker] += abs(t - 0.5)
                        mixed[taker] += abs(t - 0.5) * (image[giver] - image[taker])
                    break
                there = [f for f in at_edge[edge] if f != near]
                near = there[0] if len(there) == 1 else -1
    return image + mixed / np.maximum(total, 1)[..., None]
