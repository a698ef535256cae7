"""Nearest points on a triangle mesh."""

from __future__ import annotations

import numpy as np


def locate(vertices, faces, points):
    """Face and barycentrics of the surface points of `faces` nearest to `points` (n, 3)."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    near_face, near_bary = [], []
    for point in points:
        bary = _closest_barycentrics(a, b, c, point)
        at = bary[:, :1] * a + bary[:, 1:2] * b + bary[:, 2:] * c
        best = int(np.argmin(((at - point) ** 2).sum(-1)))
        near_face.append(best)
        near_bary.append(bary[best])
    return np.array(near_face, np.int32), np.array(near_bary, np.float32)


def _closest_barycentrics(a, b, c, point):
    """Barycentrics (F, 3) of the point of each triangle nearest to `point`."""

    def segment(p, q):
        d = q - p
        t = ((point - p) * d).sum(-1) / np.maximum((d * d).sum(-1), 1e-18)
        return np.clip(t, 0.0, 1.0)

    ab, ac, ap = b - a, c - a, point - a
    d00, d01, d11 = (ab * ab).sum(-1), (ab * ac).sum(-1), (ac * ac).sum(-1)
    d20, d21 = (ap * ab).sum(-1), (ap * ac).sum(-1)
    det = np.maximum(d00 * d11 - d01 * d01, 1e-24)
    v, w = (d11 * d20 - d01 * d21) / det, (d00 * d21 - d01 * d20) / det
    inner = np.stack([1 - v - w, v, w], -1)
    zero = np.zeros(len(a))
    t0, t1, t2 = segment(a, b), segment(b, c), segment(c, a)
    options = np.stack(
        [
            np.stack([1 - t0, t0, zero], -1),
            np.stack([zero, 1 - t1, t1], -1),
            np.stack([t2, zero, 1 - t2], -1),
        ]
    )
    at = np.einsum("kfi,ifx->kfx", options, np.stack([a, b, c]))
    best = np.argmin(((at - point) ** 2).sum(-1), axis=0)
    edge = options[best, np.arange(len(a))]
    return np.where((inner >= 0).all(-1, keepdims=True), inner, edge)
