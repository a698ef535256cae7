"""Silhouettes: the antialiased edge term, its gradients, and pictures fitted through the rasteriser."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax import raster
from loki_jax.driver.encoding import canonical_positions
from loki_jax.face.builtin import builtin_head
from loki_jax.face.rotation import geodesic_angle, matrix_from_rotvec, rotvec_from_matrix
from loki_jax.raster.antialias import _outline
from tests.raster.oracle import antialias_oracle

SIZE = 16
OCTAHEDRON = np.int32(
    [[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]]
)
# A closed surface, and four triangles that float before, behind and through it.
FACES = np.concatenate([OCTAHEDRON, 6 + np.arange(12, dtype=np.int32).reshape(4, 3)])


rasterize = jax.jit(partial(raster.rasterize, cull=False), static_argnums=2)
antialias = jax.jit(raster.antialias)
outline = jax.jit(_outline)


@jax.jit
def coverage(vertices, faces):
    """Covered share of every pixel, antialiased and not."""
    found = raster.rasterize(vertices, faces, SIZE, cull=False)
    plain = found.covered[..., None].astype(jnp.float32)
    return raster.antialias(plain, found, vertices, faces)[..., 0], plain[..., 0]


def quads(centres, half, angles=0.0):
    """Squares (N, 4, 3) as two triangles each, turned by `angles`, half sides `half`."""
    n = len(centres)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
    angles = np.broadcast_to(angles, (n,))
    turn = np.stack(
        [np.stack([np.cos(angles), -np.sin(angles)], -1), np.stack([np.sin(angles), np.cos(angles)], -1)], -2
    )
    points = np.einsum("nij,kj->nki", turn, corners) + np.asarray(centres)[:, None]
    return np.concatenate([points, np.full((n, 4, 1), 2.0)], -1).astype(np.float32)


QUAD = np.int32([[0, 1, 2], [0, 2, 3]])


def test_coverage_of_upright_edges_is_exact():
    """A square moved by fractions of a pixel: rows and columns sum to its sides, and it never jumps."""
    shift = np.linspace(0, 2 / SIZE, 24)
    half = 0.55
    smooth, plain = (np.asarray(c) for c in coverage(quads(np.stack([shift, 0.3 * shift], -1), half), QUAD))
    middle = SIZE // 2
    np.testing.assert_allclose(smooth[:, middle].sum(-1), half * SIZE, atol=1e-4)
    np.testing.assert_allclose(smooth[:, :, middle].sum(-1), half * SIZE, atol=1e-4)
    assert np.abs(plain[:, middle].sum(-1) - half * SIZE).max() > 0.15
    jumps = lambda c: np.abs(np.diff(c[:, middle], axis=0)).max()
    assert jumps(smooth) < 1.01 * shift[1] * SIZE / 2 and jumps(plain) == 1


def test_coverage_of_turned_edges_is_close():
    """Against the covered area of every pixel, from 8 x 8 samples."""
    angles, centre, half = np.linspace(0, np.pi / 2, 24), np.array([0.01, 0.02]), 0.5
    smooth, plain = coverage(quads(np.tile(centre, (24, 1)), half, angles), QUAD)
    fine = 1 - (2 * np.arange(8 * SIZE) + 1) / (8 * SIZE)
    x, y = np.meshgrid(fine - centre[0], fine - centre[1])
    along = lambda angle: np.abs(np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y)
    inside = (along(angles) <= half) & (along(angles + np.pi / 2) <= half)
    area = inside.reshape(24, SIZE, 8, SIZE, 8).mean((2, 4))
    error = lambda image: np.sqrt(np.mean((np.asarray(image) - area) ** 2))
    assert error(smooth) < 0.35 * error(plain)
    assert np.asarray(smooth).min() >= 0 and np.asarray(smooth).max() <= 1


def tessellated(corners, cells):
    """A square (N, 4, 3) of two triangles as cells x cells x 2 triangles, and their indices."""
    t = np.linspace(0, 1, cells + 1)
    u, v = (w[..., None] for w in np.meshgrid(t, t, indexing="ij"))
    a, b, c, d = (corners[:, None, None, k] for k in range(4))
    points = (1 - u) * (1 - v) * a + u * (1 - v) * b + u * v * c + (1 - u) * v * d
    index = np.arange((cells + 1) ** 2).reshape(cells + 1, cells + 1)
    a, b, c, d = index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]
    faces = np.concatenate([np.stack([a, b, c], -1), np.stack([a, c, d], -1)]).reshape(-1, 3)
    return points.reshape(len(corners), -1, 3).astype(np.float32), faces.astype(np.int32)


def test_faces_smaller_than_pixels_keep_their_silhouette():
    """A square of 2 faces and the same square of 2,312 have the same antialiased edges."""
    square = quads(np.tile([0.01, 0.02], (6, 1)), 0.5, np.linspace(0.1, 1.4, 6))
    smooth, plain = coverage(square, QUAD)
    fine, faces = tessellated(square, 34)
    fine_smooth, fine_plain = coverage(fine, faces)
    np.testing.assert_array_equal(fine_plain, plain)
    assert np.abs(np.asarray(smooth) - plain).max() > 0.4
    np.testing.assert_allclose(fine_smooth, smooth, atol=2e-3)


def test_edges_inside_a_surface_are_left_alone():
    vertices = quads([[0.0, 0.0]], 1.5)
    found = rasterize(vertices, QUAD, SIZE)
    assert set(np.unique(found.face)) == {0, 1}
    image = np.random.default_rng(0).normal(size=(1, SIZE, SIZE, 3)).astype(np.float32)
    np.testing.assert_array_equal(antialias(image, found, vertices, QUAD), image)
    # The same two triangles without common vertices have borders between them.
    torn = vertices[:, QUAD.reshape(-1)]
    assert np.abs(antialias(image, found, torn, np.arange(6).reshape(2, 3)) - image).max() > 0.1


def test_silhouettes_follow_edges_and_not_their_order():
    """The octahedron's outline is a cycle; a third sheet on an edge hides its border."""
    corners = np.float32([[1, 0, 3], [-1, 0, 3], [0, 1, 3], [0, -1, 3], [0.2, 0.1, 2], [0.1, 0.2, 4]])
    found = np.asarray(outline(corners[None], OCTAHEDRON).silhouette)[0]
    edges = {
        tuple(sorted((face[(k + 1) % 3], face[(k + 2) % 3])))
        for face, flags in zip(OCTAHEDRON.tolist(), found, strict=True)
        for k in range(3)
        if flags[k]
    }
    assert edges == {(0, 2), (1, 2), (1, 3), (0, 3)}
    sheets = np.float32([[0, 0, 2], [0, 1, 2], [1, 0, 2], [0.5, 0.2, 2], [-1, 0.5, 2], [np.nan, 0, 2]])
    edge_of = lambda faces: np.asarray(outline(sheets[None], np.int32(faces)).silhouette)[0, :, 2]
    np.testing.assert_array_equal(edge_of([[0, 1, 2], [1, 0, 3]]), [True, True])
    np.testing.assert_array_equal(edge_of([[0, 1, 2], [1, 0, 3], [0, 1, 4]]), [False] * 3)
    np.testing.assert_array_equal(edge_of([[0, 1, 2], [0, 1, 5]]), [True, True])  # a broken neighbour


# Scenes with everything at once, against float64.

STEP = 1e-6


def scenes(count, seed):
    """Vertices (count, 18, 3), attributes (count, 18, 2) and pixel weights (count, S, S, 2)."""
    rng = np.random.default_rng(seed)
    body = np.concatenate([np.eye(3), -np.eye(3)])[[0, 3, 1, 4, 2, 5]]
    turn = np.linalg.qr(rng.normal(size=(count, 3, 3)))[0]
    body = np.einsum("vk,njk->nvj", body, turn) * rng.uniform(0.4, 0.9, (count, 6, 1)) + [0, 0, 3]
    loose = rng.uniform(-1.1, 1.1, (count, 12, 3)) + [0, 0, 3]
    vertices = np.concatenate([body, loose], 1).astype(np.float32)
    attributes = rng.normal(size=(count, 18, 2)).astype(np.float32)
    return vertices, attributes, rng.normal(size=(count, SIZE, SIZE, 2)).astype(np.float32)


def edges_of(corners):
    """Edge functions (..., S, S, 3) of triangles (..., 3, 3) at all pixel centres, in float64."""
    centre = 1 - (2 * np.arange(SIZE) + 1) / SIZE
    x = corners[..., None, None, :, 0] - centre[None, :, None]
    y = corners[..., None, None, :, 1] - centre[:, None, None]
    return np.stack([x[..., a] * y[..., b] - x[..., b] * y[..., a] for a, b in ((1, 2), (2, 0), (0, 1))], -1)


def faces_seen(vertices):
    """Nearest faces (P, S, S) of many perturbed meshes (P, V, 3), without culling."""
    corners = vertices[:, FACES]
    edges = edges_of(corners)
    total = edges.sum(-1)
    depth = (edges * corners[..., None, None, :, 2]).sum(-1) / total
    inside = (edges * np.sign(total)[..., None] > 0).all(-1)
    depth = np.where(inside, depth, np.inf)
    return np.where(inside.any(1), depth.argmin(1), -1)


def exact_image(vertices, attributes, face, smooth=True):
    """The float64 picture of attributes and depth where faces are known, antialiased if `smooth`."""
    covered = face >= 0
    corners = vertices[FACES[np.maximum(face, 0)]]  # (S, S, 3, 3)
    centre = 1 - (2 * np.arange(SIZE) + 1) / SIZE
    x, y = corners[..., 0] - centre[None, :, None], corners[..., 1] - centre[:, None, None]
    bary = np.stack([x[..., a] * y[..., b] - x[..., b] * y[..., a] for a, b in ((1, 2), (2, 0), (0, 1))], -1)
    bary = bary / bary.sum(-1, keepdims=True)
    depth = (bary * corners[..., 2]).sum(-1)
    colour = np.einsum("ijk,ijkc->ijc", bary, attributes[FACES[np.maximum(face, 0)]])
    image = np.concatenate([colour, depth[..., None]], -1) * covered[..., None]
    depth = np.where(covered, depth, np.inf)
    return antialias_oracle(image, face, depth, vertices, FACES) if smooth else image


def drawn(vertices, attributes):
    """The same picture from the package, and the faces it found."""
    found = raster.rasterize(vertices, FACES, SIZE, cull=False)
    image = raster.interpolate(found, FACES, attributes)
    depth = jnp.where(found.covered, found.depth, 0.0)[..., None]
    image = jnp.concatenate([image, depth], -1)
    return raster.antialias(image, found, vertices, FACES), found.face


@jax.jit
def drawn_with_gradients(vertices, attributes, weights):
    def loss(vertices, attributes):
        image, face = drawn(vertices, attributes)
        return jnp.sum(weights * image), (image, face)

    gradients, (image, face) = jax.grad(loss, argnums=(0, 1), has_aux=True)(vertices, attributes)
    return image, face, *gradients


@pytest.mark.parametrize("wanted", [15, pytest.param(50, marks=pytest.mark.slow)])
def test_gradients_of_scenes_match_central_differences(wanted):
    """Float64 differences of the float64 picture, edge term included, where no pixel changes its face."""
    count = wanted * 6 // 5
    vertices, attributes, weights = scenes(count, 0)
    weights = np.concatenate([weights, weights[..., :1]], -1)
    image, face, by_vertex, by_attribute = map(
        np.asarray, drawn_with_gradients(vertices, attributes, weights)
    )
    checked, edge_share = 0, []
    for n in range(count):
        start = vertices[n].astype(np.float64)
        moves = STEP * np.eye(start.size).reshape(-1, *start.shape)
        moved = np.concatenate([start + moves, start - moves])
        if (faces_seen(moved) != face[n]).any():
            continue
        exact = exact_image(start, attributes[n].astype(np.float64), face[n])
        np.testing.assert_allclose(image[n], exact, atol=2e-4)
        colours = attributes[n].astype(np.float64)
        values = [(weights[n] * exact_image(v, colours, face[n])).sum() for v in moved]
        expected = (np.subtract(*np.split(np.array(values), 2)) / (2 * STEP)).reshape(start.shape)
        error = np.linalg.norm(by_vertex[n] - expected)
        assert error < 1e-3 * np.linalg.norm(expected), f"scene {n}: {error / np.linalg.norm(expected):.1e}"
        # The picture is linear in its attributes: two differences along random directions are enough.
        direction = np.random.default_rng(n).normal(size=attributes[n].shape)
        sides = [
            (weights[n] * exact_image(start, attributes[n] + sign * STEP * direction, face[n])).sum()
            for sign in (1, -1)
        ]
        slope = (sides[0] - sides[1]) / (2 * STEP)
        assert abs((by_attribute[n] * direction).sum() - slope) < 1e-3 * np.linalg.norm(by_attribute[n])
        edge_share.append(np.linalg.norm(exact - exact_image(start, attributes[n], face[n], smooth=False)))
        checked += 1
        if checked == wanted:
            break
    assert checked == wanted
    assert np.median(edge_share) > 1, "these scenes hardly have silhouettes"


@pytest.mark.parametrize("smooth, per_pixel", [(False, 4 + 12), (True, 4 + 12 + 4 + 2 * 4)])
def test_backward_pass_keeps_little(smooth, per_pixel):
    """Face ids and barycentrics; depth and the image of two channels for silhouettes."""
    vertices, attributes, _ = scenes(2, 1)
    size = 64

    def image(vertices, attributes):
        found = raster.rasterize(vertices, FACES, size)
        plain = raster.interpolate(found, FACES, attributes)
        return raster.antialias(plain, found, vertices, FACES) if smooth else plain

    backward = jax.eval_shape(lambda *given: jax.vjp(image, *given)[1], vertices, attributes)
    kept = [r for r in jax.tree.leaves(backward) if r.size >= 2 * size**2]
    total = sum(r.size * r.dtype.itemsize for r in kept) / (2 * size**2)
    assert 0 < total <= per_pixel, [(r.shape, r.dtype) for r in kept]


# A head found by gradient descent through its picture.

DEGREE = np.pi / 180
STEPS = 120


def test_head_converges_to_a_target_picture():
    """30 degrees and 10 % off, to below 0.5 degree and 0.5 %, by Adam on the picture's squared error."""
    head = builtin_head()
    body = canonical_positions(jnp.asarray(head.template))
    body = 0.8 * body / jnp.max(jnp.abs(body))

    def picture(pose):
        turned = jnp.exp(pose[3]) * body @ matrix_from_rotvec(pose[:3]).T
        ndc = jnp.stack([-turned[:, 0], turned[:, 1], 3 - turned[:, 2]], -1)
        return raster.render(ndc, head.faces, body, 64, smooth_silhouettes=True)

    goal = jnp.array([0.1, -0.2, 0.05, 0.0])
    axis = np.array([0.5, 1.0, 0.3]) / np.linalg.norm([0.5, 1.0, 0.3])

    def apart(a, b):
        return geodesic_angle(matrix_from_rotvec(a[:3]), matrix_from_rotvec(b[:3])) / DEGREE

    @jax.jit
    def fit(goal):
        turned = matrix_from_rotvec(30 * DEGREE * axis) @ matrix_from_rotvec(goal[:3])
        start = jnp.append(rotvec_from_matrix(turned), np.log(1.1))
        target = picture(goal)

        def loss(pose):
            return sum(jnp.mean((a - b) ** 2) for a, b in zip(picture(pose), target, strict=True))

        def step(state, rate):
            pose, mean, square = state
            value, gradient = jax.value_and_grad(loss)(pose)
            mean, square = 0.8 * mean + 0.2 * gradient, 0.95 * square + 0.05 * gradient**2
            return (pose - rate * mean / (jnp.sqrt(square) + 1e-9), mean, square), value

        rates = 0.04 * 0.5 * (1 + jnp.cos(jnp.linspace(0, np.pi, STEPS)))
        (found, _, _), losses = jax.lax.scan(step, (start, jnp.zeros(4), jnp.zeros(4)), rates)
        return apart(start, goal), apart(found, goal), jnp.exp(found[3] - goal[3]), losses

    before, after, scale, losses = map(np.asarray, fit(goal))
    assert before > 29.9
    assert after < 0.5
    assert abs(scale - 1) < 0.005
    assert losses[-1] < 1e-2 * losses[0]
