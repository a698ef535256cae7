"""Flow of one frame by a loop over pixels in float64: rays, triangles, and nothing of `loki_jax.flow`."""

from typing import NamedTuple

import numpy as np


class OracleFlow(NamedTuple):
    position: np.ndarray  # (S, S, 2) picture pixels; NaN where no head is
    face: np.ndarray  # (S, S), -1 where no head is
    facing: np.ndarray  # (S, S) cosine in the portrait, of the face itself
    behind: np.ndarray  # (S, S) metres between the point and the nearest surface before it in the portrait
    margin: np.ndarray  # (S, S) how far inside the face the ray is: the smallest barycentric coordinate


def _rotation(rotvec):
    """Rodrigues' formula."""
    angle = np.linalg.norm(rotvec)
    if angle == 0:
        return np.eye(3)
    x, y, z = np.asarray(rotvec, np.float64) / angle
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def pose(vertices, rot, tra):
    """Vertices of the head frame in OpenCV camera axes (no extrinsics), float64."""
    world = np.asarray(vertices, np.float64) @ _rotation(rot).T + np.asarray(tra, np.float64)
    return world * [1, -1, -1]


def _hits(origin_less_ray, corners):
    """Distance along the ray from the camera's centre and barycentrics for triangles (F, 3, 3).

    Moeller and Trumbore 1997 for a ray from the origin; infinite distance without a hit. Faces turned away do
    not count.
    """
    ray = origin_less_ray
    one, two = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    across = np.cross(ray, two)
    determinant = (one * across).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        from_corner = -corners[:, 0]
        u = (from_corner * across).sum(-1) / determinant
        turned = np.cross(from_corner, one)
        v = (ray * turned).sum(-1) / determinant
        distance = (two * turned).sum(-1) / determinant
        bary = np.stack([1 - u - v, u, v], -1)
        hit = (determinant > 0) & (bary.min(-1) >= 0) & (distance > 0)
    return np.where(hit, distance, np.inf), bary


def flow_oracle(portrait, target, faces, intrinsics, portrait_intrinsics, crop, size):
    """Per pixel of `crop`: a ray to the target, its point carried to the portrait, a ray to it there.

    Args:
      portrait, target: (V, 3) vertices in camera axes.
      intrinsics, portrait_intrinsics: fx, fy, cx, cy in pixels of target and portrait.
      crop: x0, y0, x1, y1 in pixels of the target.
    """
    fx, fy, cx, cy = intrinsics
    gx, gy, dx, dy = portrait_intrinsics
    there, here = portrait[faces], target[faces]
    position = np.full((size, size, 2), np.nan)
    face, facing = np.full((size, size), -1), np.zeros((size, size))
    behind, margin = np.zeros((size, size)), np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            x = crop[0] + (j + 0.5) / size * (crop[2] - crop[0])
            y = crop[1] + (i + 0.5) / size * (crop[3] - crop[1])
            distance, bary = _hits(np.array([(x - cx) / fx, (y - cy) / fy, 1.0]), here)
            first = distance.argmin()
            if not np.isfinite(distance[first]):
                continue
            face[i, j], margin[i, j] = first, bary[first].min()
            corners = there[first]
            point = bary[first] @ corners
            position[i, j] = point[0] / point[2] * gx + dx, point[1] / point[2] * gy + dy
            normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
            facing[i, j] = -normal @ point / np.linalg.norm(normal) / np.linalg.norm(point)
            nearest = _hits(point / point[2], there)[0].min()
            behind[i, j] = point[2] - nearest if np.isfinite(nearest) else 0.0
    return OracleFlow(position, face, facing, behind, margin)
