"""Properties of the rasteriser that hold for every mesh.

Coordinates are multiples of 1/64 and the size is a power of two, so that edge values are exact in float32.
"""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from loki_jax import raster
from tests.raster.oracle import EPSILON

SIZE, N_VERTICES, N_FACES = 16, 12, 20
PIXEL = 2 / SIZE
rasterize = jax.jit(raster.rasterize, static_argnames=("size", "cull"))
quick = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def meshes(draw):
    """Vertices (V, 3) in and around the frame, and faces (F, 3), some of them without area."""
    x, y = draw(arrays(np.int32, (2, N_VERTICES), elements=st.integers(-96, 96))) / 64
    depth = draw(arrays(np.int32, N_VERTICES, elements=st.integers(1, 64))) / 16
    faces = draw(arrays(np.int32, (N_FACES, 3), elements=st.integers(0, N_VERTICES - 1)))
    return np.stack([x, y, depth], -1).astype(np.float32), faces


def draw_faces(vertices, faces, cull=False):
    return jax.tree.map(np.asarray, rasterize(vertices, faces, size=SIZE, cull=cull))


@quick
@given(meshes())
def test_barycentrics_are_shares_of_the_face(mesh):
    vertices, faces = mesh
    found = draw_faces(vertices, faces)
    covered = found.face >= 0
    assert (found.bary[~covered] == 0).all() and np.isinf(found.depth[~covered]).all()
    corners = vertices[faces[found.face[covered]]].astype(np.float64)
    sides = corners[..., :2] - np.roll(corners[..., :2], 1, axis=1)
    area = np.abs(sides[:, 0, 0] * sides[:, 1, 1] - sides[:, 0, 1] * sides[:, 1, 0])
    assert (area > 0).all()
    allowed = np.maximum(1e-5, 8 * EPSILON * (sides**2).sum(-1).max(-1) / area)
    bary = found.bary[covered]
    assert (bary >= -allowed[:, None]).all() and (bary <= 1 + allowed[:, None]).all()
    np.testing.assert_allclose(bary.sum(-1), 1, atol=1e-5)
    low, high, slack = corners[..., 2].min(1), corners[..., 2].max(1), 4 * allowed
    assert ((found.depth[covered] >= low - slack) & (found.depth[covered] <= high + slack)).all()


@quick
@given(meshes(), st.permutations(range(N_FACES)))
def test_the_order_of_faces_decides_nothing_but_ties(mesh, order):
    vertices, faces = mesh
    found, permuted = draw_faces(vertices, faces), draw_faces(vertices, faces[np.array(order)])
    np.testing.assert_array_equal(found.face >= 0, permuted.face >= 0)
    covered = found.face >= 0
    same = np.array(order)[permuted.face] == found.face
    tied = covered & ~same
    np.testing.assert_array_equal(found.depth[covered & same], permuted.depth[covered & same])
    np.testing.assert_allclose(found.depth[tied], permuted.depth[tied], rtol=1e-3)


@quick
@given(arrays(np.int32, (2, 6, 6), elements=st.integers(-7, 7)), st.booleans())
def test_shared_edges_leave_no_cracks(jitter, cull):
    """A grid over the whole frame whose vertices move by less than they are apart covers every pixel."""
    y, x = np.meshgrid(np.arange(6), np.arange(6), indexing="ij")
    points = 1.25 - 0.5 * np.stack([x, y]) + jitter / 64
    vertices = np.concatenate([points, np.full((1, 6, 6), 2.0)]).reshape(3, -1).T.astype(np.float32)
    a = (y * 6 + x)[:-1, :-1].ravel()
    faces = np.concatenate([np.stack([a, a + 6, a + 1], -1), np.stack([a + 1, a + 6, a + 7], -1)])
    assert (draw_faces(vertices, faces.astype(np.int32), cull).face >= 0).all()


@quick
@given(meshes(), st.integers(-9, 9), st.integers(-9, 9))
def test_whole_pixels_of_translation_shift_the_image(mesh, right, down):
    vertices, faces = mesh
    moved = vertices - np.float32([right * PIXEL, down * PIXEL, 0])
    before, after = draw_faces(vertices, faces).face, draw_faces(moved, faces).face
    kept = lambda shift: slice(max(-shift, 0), SIZE - max(shift, 0))
    np.testing.assert_array_equal(after[kept(-down), kept(-right)], before[kept(down), kept(right)])
