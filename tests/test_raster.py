"""The rasteriser against a brute-force float64 oracle and its own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raster_oracle import rasterize_oracle

from loki_jax import raster

SIZE = 24


def sphere(rings, sectors, radius=0.7, distance=3.0):
    """Vertices and outward counter-clockwise faces of a sphere with degenerate faces at its poles."""
    polar, azimuth = np.linspace(0, np.pi, rings), np.linspace(0, 2 * np.pi, sectors, endpoint=False)
    points = np.stack(
        [
            np.sin(polar)[:, None] * np.cos(azimuth),
            np.cos(polar)[:, None] + 0 * azimuth,
            np.sin(polar)[:, None] * np.sin(azimuth),
        ],
        -1,
    ).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(rings - 1), np.arange(sectors), indexing="ij")
    a, b = i * sectors + j, i * sectors + (j + 1) % sectors
    c, d = a + sectors, b + sectors
    faces = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([b, d, c], -1).reshape(-1, 3)])
    return (points * radius + [0.03, -0.02, distance]).astype(np.float32), faces.astype(np.int32)


def assert_matches_oracle(vertices, faces, size, **options):
    expected = rasterize_oracle(vertices, faces, size, options.get("cull", True), options.get("perspective_correct", False))
    found = jax.tree.map(np.asarray, raster.rasterize(vertices, faces, size, **options))
    wrong = (found.face != expected.face) & expected.certain
    assert not wrong.any(), f"{wrong.sum()} pixels differ"
    assert expected.certain.mean() > 0.98
    same = (found.face == expected.face) & (expected.face >= 0)
    assert same.any()
    np.testing.assert_allclose(found.depth[same], expected.depth[same], rtol=1e-5)
    corners = np.asarray(vertices, np.float64)[np.asarray(faces)[found.face[same]]][..., :2]
    sides = corners - np.roll(corners, 1, axis=1)
    area = np.abs(np.cross(sides[:, 0], sides[:, 1])) if False else np.abs(sides[:, 0, 0] * sides[:, 1, 1] - sides[:, 0, 1] * sides[:, 1, 0])
    sliver = 8 * np.finfo(np.float32).eps * (sides**2).sum(-1).max(-1) / area
    error = np.abs(found.bary[same] - expected.bary[same]).max(-1)
    assert (error <= np.maximum(1e-5, sliver)).all(), error.max()
    assert (found.bary[found.face < 0] == 0).all() and np.isinf(found.depth[found.face < 0]).all()
    return found


@pytest.mark.parametrize("options", [{}, {"cull": False}, {"perspective_correct": True}, {"tile": 4}])
def test_sphere_matches_oracle(options):
    vertices, faces = sphere(12, 15)
    found = assert_matches_oracle(vertices, faces, SIZE, **options)
    assert 0.3 < (found.face >= 0).mean() < 0.45
