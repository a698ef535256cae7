"""The rasteriser against a brute-force float64 oracle, the public renderer and its own promises."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from loki_jax import raster
from loki_jax.raster.search import _sort_pairs
from tests.raster.oracle import EPSILON, rasterize_oracle

SIZE = 24
rasterize = jax.jit(
    raster.rasterize, static_argnames=("size", "cull", "perspective_correct", "tile", "window")
)


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
    """As `share_judged`, which must be nearly all of the frame."""
    found, share = share_judged(vertices, faces, size, **options)
    assert share > 0.98
    return found


def share_judged(vertices, faces, size, by_depth_ratio=False, **options):
    """What was found, and the share of pixels whose face rounding cannot change.

    Asserts that face ids are equal there, and barycentrics to 1e-5, or as slivers allow (with
    `by_depth_ratio` times the ratio of a face's depths, by which perspective-correct weights are divided).
    """
    conventions = {key: options[key] for key in ("cull", "perspective_correct") if key in options}
    expected = rasterize_oracle(vertices, faces, size, **conventions)
    found = jax.tree.map(np.asarray, rasterize(vertices, faces, size, **options))
    wrong = (found.face != expected.face) & expected.certain
    assert not wrong.any(), f"{wrong.sum()} pixels differ"
    background = found.face < 0
    assert (found.bary[background] == 0).all() and np.isinf(found.depth[background]).all()
    same = (found.face == expected.face) & ~background
    corners = np.asarray(vertices, np.float64)[np.asarray(faces)[found.face[same]]]
    sides = (corners - np.roll(corners, 1, axis=1))[..., :2]
    area = np.abs(sides[:, 0, 0] * sides[:, 1, 1] - sides[:, 0, 1] * sides[:, 1, 0])
    allowed = np.maximum(1e-5, 8 * EPSILON * (sides**2).sum(-1).max(-1) / area)
    if by_depth_ratio:
        allowed = allowed * corners[..., 2].max(1) / corners[..., 2].min(1)
    error = np.abs(found.bary[same] - expected.bary[same]).max(-1)
    assert (error <= allowed).all(), (error / allowed).max()
    spread = np.ptp(corners[..., 2], axis=1)
    depth_error = np.abs(found.depth[same] - expected.depth[same])
    assert (depth_error <= 4 * EPSILON * corners[..., 2].max(1) + 3 * allowed * spread).all()
    return found, expected.certain.mean()


@pytest.mark.parametrize("options", [{}, {"cull": False}, {"perspective_correct": True}, {"tile": 4}])
def test_sphere_matches_oracle(options):
    vertices, faces = sphere(12, 15)
    found = assert_matches_oracle(vertices, faces, SIZE, **options)
    assert 0.3 < (found.face >= 0).mean() < 0.45


N_VERTICES, N_FACES = 40, 90


def adversarial_mesh(kind, seed):
    """A random mesh of one awkward kind; all kinds have the same number of vertices and faces."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-1.2, 1.2, (N_VERTICES, 3))
    points[:, 2] = rng.uniform(0.5, 4, N_VERTICES)
    faces = rng.integers(0, N_VERTICES, (N_FACES, 3))  # some degenerate by repetition
    if kind == "sub-pixel":
        centres = rng.uniform(-1, 1, (N_VERTICES, 2))
        points[:, :2] = centres[:, :2]
        order = np.argsort(centres[:, 0])
        points = points[order]
        points[:, :2] = (
            np.repeat(points[::3, :2], 3, axis=0)[:N_VERTICES] + rng.normal(size=(N_VERTICES, 2)) * 1.5 / SIZE
        )
        faces = np.stack([np.arange(N_FACES) % 13 * 3 + k for k in range(3)], -1)
        faces = np.where(rng.random((N_FACES, 1)) < 0.5, faces, faces[:, ::-1])
    elif kind == "slivers":
        points[1::2, :2] = points[::2, :2] + rng.normal(size=(N_VERTICES // 2, 2)) * 1e-3
    elif kind == "large":
        points[:, :2] *= 10.0 ** rng.uniform(0, 3, (N_VERTICES, 1))
    elif kind == "grid":
        # Every vertex on a pixel centre or corner: edges run through centres.
        points[:, :2] = np.round(points[:, :2] * SIZE) / SIZE
        points[:, 2] = 1 + points[:, 0] * 0.1 + points[:, 1] * 0.2
    elif kind == "coplanar":
        points[:, 2] = 2
    elif kind == "broken":
        points[::9, 0] = np.nan
        points[1::9, 2] = np.inf
        points[2::9, 2] = rng.choice([-1.0, 0.0, 1e-9], len(points[2::9]))
        points[3::9, 1] = 1e30
    elif kind == "off-screen":
        points[:, 0] += 1.8
    elif kind == "frame-filling":
        points[:, :2] *= 40
    elif kind == "closed":
        points, faces = sphere(5, 8, radius=rng.uniform(0.3, 1.2))
        points = points + rng.normal(size=points.shape) * 0.08
        faces = np.pad(faces, ((0, N_FACES - len(faces)), (0, 0)))
    return points.astype(np.float32), faces.astype(np.int32)


# With the exact cases below, 300 meshes: ten kinds, thirty of each.
MESHES_OF_A_KIND = 30
CONVENTIONS = ({}, {"cull": False}, {"cull": False, "perspective_correct": True})


@pytest.mark.parametrize(
    "kind, least_certain",
    [
        ("plain", 0.97),
        ("sub-pixel", 0.97),
        ("slivers", 0.97),
        ("large", 0.8),
        ("broken", 0.97),
        ("off-screen", 0.97),
        ("frame-filling", 0.8),
        ("closed", 0.97),
    ],
)
def test_adversarial_meshes_match_oracle(kind, least_certain):
    covered, shares = [], []
    for seed in range(MESHES_OF_A_KIND):
        vertices, faces = adversarial_mesh(kind, seed)
        options = CONVENTIONS[seed % len(CONVENTIONS)]
        by_depth_ratio = options.get("perspective_correct", False)
        found, share = share_judged(vertices, faces, SIZE, by_depth_ratio, **options)
        covered.append((found.face >= 0).any())
        shares.append(share)
    assert np.mean(covered) > 0.9
    assert np.mean(shares) > least_certain


@pytest.mark.parametrize("cull", [True, False])
@pytest.mark.parametrize(
    "kind, least_certain",
    [
        ("plain", 0.97),
        ("sub-pixel", 0.97),
        ("slivers", 0.97),
        ("large", 0.8),
        ("broken", 0.97),
        ("off-screen", 0.97),
    ],
)
def test_first_meshes_leave_little_to_rounding(kind, least_certain, cull):
    """The share of pixels that the oracle judges, mesh by mesh."""
    covered = 0
    for seed in range(6):
        found, share = share_judged(*adversarial_mesh(kind, seed), SIZE, cull=cull)
        assert share > least_certain
        covered += (found.face >= 0).sum()
    assert covered > 5


@pytest.mark.parametrize("kind", ["grid", "coplanar"])
def test_ties_are_decided_as_stated(kind):
    """Exact coordinates: edges through pixel centres, equal depths; nothing is left to rounding."""
    for seed in range(MESHES_OF_A_KIND):
        vertices, faces = adversarial_mesh(kind, seed)
        vertices = np.round(vertices * 16 * 3) / 16 / 3 if kind == "coplanar" else vertices
        vertices[:, 2] = 2  # one plane: the lowest index wins wherever faces overlap
        size = 32  # a power of two: pixel centres are exact
        vertices[:, :2] = np.round(vertices[:, :2] * size) / size
        expected = rasterize_oracle(vertices, faces, size)
        found = rasterize(vertices, faces, size)
        np.testing.assert_array_equal(found.face, expected.face)
        assert (expected.face >= 0).mean() > 0.5


def test_shared_edges_belong_to_one_face():
    """Every pixel of a fan and of a grid of triangles is covered once: by exactly one face each."""
    size = 32
    rng = np.random.default_rng(0)
    line = np.linspace(-1.25, 1.25, 11)
    x, y = np.meshgrid(line, line)
    for jitter in (0.0, 0.09):  # with and without edges exactly through pixel centres
        points = np.stack([x, y, np.full_like(x, 2)], -1).reshape(-1, 3)
        points[:, :2] += rng.uniform(-jitter, jitter, (len(points), 2))
        points = points.astype(np.float32)
        i, j = np.meshgrid(np.arange(10), np.arange(10), indexing="ij")
        a = (i * 11 + j).ravel()
        faces = np.concatenate(
            [np.stack([a, a + 11, a + 1], -1), np.stack([a + 1, a + 11, a + 12], -1)]
        ).astype(np.int32)
        if np.asarray(rasterize(points, faces, size).face).max() < 0:
            faces = faces[:, ::-1].copy()
        count = np.zeros((size, size), int)
        # Faces one by one, as frames: the others' vertices are moved behind the camera.
        soup = points[faces]
        frames = np.tile(soup.reshape(1, -1, 3), (len(faces), 1, 1))
        hidden = np.repeat(~np.eye(len(faces), dtype=bool), 3, axis=1)
        frames[hidden, 2] = -1
        alone = rasterize(frames, np.arange(frames.shape[1], dtype=np.int32).reshape(-1, 3), size)
        count = (np.asarray(alone.face) >= 0).sum(0)
        np.testing.assert_array_equal(count, 1)


def test_public_conventions(golden):
    with np.load(golden / "raster_conventions.npz") as file:
        given = {key: file[key] for key in file.files}
    cases = sorted({key.split("/")[0] for key in given if key.endswith("/pix_to_face")})
    assert len(cases) == 11
    size = given["tri_order_012/pix_to_face"].shape[0]
    centre = 1 - (2 * np.arange(size) + 1) / size
    np.testing.assert_allclose(given["pixel_centre_x_of_col"], centre)
    np.testing.assert_allclose(given["pixel_centre_y_of_row"], centre)
    compared = 0
    for case in cases:
        verts, faces = given[f"{case}/verts"], given[f"{case}/faces"]
        # Padded to one size with a face that has no area, so that all share one compilation.
        verts = np.pad(verts, ((0, 6 - len(verts)), (0, 0)))
        faces = np.pad(faces, ((0, 2 - len(faces)), (0, 0)))
        found = jax.tree.map(np.asarray, rasterize(verts, faces, size))
        expected = given[f"{case}/pix_to_face"]
        seen = expected >= 0
        np.testing.assert_array_equal(found.face[seen], expected[seen], err_msg=case)
        np.testing.assert_allclose(found.depth[seen], given[f"{case}/zbuf"][seen], rtol=1e-6)
        np.testing.assert_allclose(found.bary[seen], given[f"{case}/bary"][seen], atol=1e-4)
        if not case.startswith("quad"):  # whose edges run through pixel centres
            np.testing.assert_array_equal(found.face >= 0, seen, err_msg=case)
        compared += seen.sum()
    assert compared > 500
    full = "quad_full_screen_diagonal_through_centres"
    ours = rasterize(np.pad(given[f"{full}/verts"], ((0, 2), (0, 0))), given[f"{full}/faces"], size).face
    assert (np.asarray(ours) >= 0).all() and (given[f"{full}/pix_to_face"] < 0).any()


def test_full_frame_and_empty_meshes():
    huge = np.float32([[-50, -50, 2], [50, -50, 2], [0, 90, 2]])
    for faces in ([[0, 1, 2]], [[0, 2, 1]]):  # both windings
        found = rasterize(huge, np.int32(faces), SIZE, cull=False)
        np.testing.assert_array_equal(found.face, 0)
        np.testing.assert_array_equal(found.depth, 2)
    for vertices, faces in (
        (huge, np.zeros((0, 3), np.int32)),
        (np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32)),
    ):
        found = rasterize(vertices, faces, SIZE)
        assert (np.asarray(found.face) == -1).all() and np.isinf(found.depth).all()
        image = raster.interpolate(found, faces, jnp.ones((len(vertices), 2)))
        np.testing.assert_array_equal(image, np.zeros((SIZE, SIZE, 2)))


def test_no_face_is_lost_however_many_overlap():
    """Many layers over the whole frame, with windows and tiles far too small to hold them at once."""
    rng = np.random.default_rng(1)
    n = 150
    soup = np.concatenate([rng.uniform(-3, 3, (n, 3, 2)), rng.uniform(1, 9, (n, 3, 1))], -1).astype(
        np.float32
    )
    soup = soup.reshape(-1, 3)
    faces = np.arange(3 * n, dtype=np.int32).reshape(-1, 3)
    usual = assert_matches_oracle(soup, faces, SIZE, cull=False)
    pairs = n * (SIZE // 8) ** 2
    for window in (37, pairs):
        found = rasterize(soup, faces, SIZE, cull=False, window=window)
        np.testing.assert_array_equal(found.face, usual.face)
    assert len(np.unique(usual.face)) > 8


def test_pairs_sort_alike_packed_or_not():
    """With very many faces, tile and face no longer fit one integer and are sorted as two."""
    rng = np.random.default_rng(4)
    tile, face = (
        jnp.asarray(rng.integers(0, 17, (2, 300)), jnp.int32),
        jnp.asarray(rng.integers(0, 99, (2, 300)), jnp.int32),
    )
    packed, plain = (_sort_pairs(tile, face, 99, packed=flag) for flag in (True, False))
    for a, b in zip(packed, plain, strict=True):
        np.testing.assert_array_equal(a, b)
    order = np.lexsort((np.asarray(face[0]), np.asarray(tile[0])))
    np.testing.assert_array_equal(packed[1][0], face[0][order])


def test_leading_axes_and_vmap_agree():
    vertices, faces = sphere(9, 10)
    rng = np.random.default_rng(2)
    batch = vertices + rng.normal(size=(2, 3, 1, 3)).astype(np.float32) * [0.2, 0.2, 0.05]
    batch = batch.astype(np.float32)
    folded = rasterize(batch, faces, SIZE)
    one = functools.partial(raster.rasterize, faces=faces, size=SIZE)
    mapped = jax.jit(jax.vmap(jax.vmap(one, in_axes=0), in_axes=1, out_axes=1))(batch)
    for a, b in zip(folded, mapped, strict=True):
        np.testing.assert_array_equal(a, b)
    for i, j in ((0, 0), (1, 2)):
        np.testing.assert_array_equal(rasterize(batch[i, j], faces, SIZE).face, folded.face[i, j])
    attributes = rng.normal(size=(2, 3, len(vertices), 4)).astype(np.float32)
    together = raster.interpolate(folded, faces, attributes)
    alone = raster.interpolate(jax.tree.map(lambda v: v[1, 2], folded), faces, attributes[1, 2])
    np.testing.assert_allclose(together[1, 2], alone, atol=1e-6)
    shared = raster.interpolate(folded, faces, attributes[0, 0])
    np.testing.assert_allclose(shared[0, 0], together[0, 0], atol=1e-6)


@pytest.mark.parametrize("perspective_correct", [False, True])
def test_interpolation_reproduces_positions(perspective_correct):
    vertices, faces = sphere(12, 15)
    found = rasterize(vertices, faces, SIZE, perspective_correct=perspective_correct)
    seen = np.asarray(found.face) >= 0
    if not perspective_correct:
        image = np.asarray(raster.interpolate(found, faces, vertices))
        centre = 1 - (2 * np.arange(SIZE) + 1) / SIZE
        x, y = np.meshgrid(centre, centre)
        np.testing.assert_allclose(image[seen][:, 0], x[seen], atol=1e-6)
        np.testing.assert_allclose(image[seen][:, 1], y[seen], atol=1e-6)
        np.testing.assert_allclose(image[seen][:, 2], found.depth[seen], rtol=1e-6)
        assert (image[~seen] == 0).all()
    else:
        # A point's perspective position: NDC times depth is linear on the face in space.
        space = vertices * np.stack([vertices[:, 2], vertices[:, 2], np.ones(len(vertices))], -1)
        image = np.asarray(raster.interpolate(found, faces, space.astype(np.float32)))[seen]
        centre = 1 - (2 * np.arange(SIZE) + 1) / SIZE
        x, y = np.meshgrid(centre, centre)
        np.testing.assert_allclose(image[:, 0] / image[:, 2], x[seen], atol=2e-6)
        np.testing.assert_allclose(image[:, 1] / image[:, 2], y[seen], atol=2e-6)
        np.testing.assert_allclose(image[:, 2], found.depth[seen], rtol=1e-6)


@pytest.mark.parametrize("perspective_correct", [False, True])
def test_gradients_match_finite_differences(perspective_correct):
    """Against central differences in float64 of the same pixels with their faces held fixed."""
    vertices, faces = sphere(7, 8)
    rng = np.random.default_rng(3)
    attributes = rng.normal(size=(len(vertices), 2)).astype(np.float32)
    weight = rng.normal(size=(SIZE, SIZE, 2)).astype(np.float32)

    def loss(vertices, attributes):
        found = raster.rasterize(vertices, faces, SIZE, perspective_correct=perspective_correct)
        depth = jnp.where(found.face >= 0, found.depth, 0.0)
        return jnp.sum(weight * raster.interpolate(found, faces, attributes)) + jnp.sum(
            weight[..., 0] * depth
        )

    by_vertex, by_attribute = jax.jit(jax.grad(loss, argnums=(0, 1)))(vertices, attributes)
    face = np.asarray(rasterize(vertices, faces, SIZE, perspective_correct=perspective_correct).face)
    row, column = np.nonzero(face >= 0)
    used = faces[face[row, column]]
    centre = 1 - (2 * np.arange(SIZE) + 1) / SIZE

    def exact(vertices, attributes):
        p = vertices[used]
        edge = [
            (p[:, k, 0] - centre[column]) * (p[:, m, 1] - centre[row])
            - (p[:, m, 0] - centre[column]) * (p[:, k, 1] - centre[row])
            for k, m in ((1, 2), (2, 0), (0, 1))
        ]
        bary = np.stack(edge, -1)
        if perspective_correct:
            bary = bary / p[..., 2]
        bary = bary / bary.sum(-1, keepdims=True)
        image = (bary[..., None] * attributes[used]).sum(1)
        return (weight[row, column] * image).sum() + (
            weight[row, column, 0] * (bary * p[..., 2]).sum(-1)
        ).sum()

    for found, start, which in ((by_vertex, vertices, 0), (by_attribute, attributes, 1)):
        expected = np.zeros(start.shape)
        for index in np.ndindex(start.shape):
            values = []
            for sign in (1, -1):
                moved = [vertices.astype(np.float64), attributes.astype(np.float64)]
                moved[which] = moved[which].copy()
                moved[which][index] += sign * 1e-6
                values.append(exact(*moved))
            expected[index] = (values[0] - values[1]) / 2e-6
        assert np.linalg.norm(expected) > 1
        assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


def test_gradients_stay_finite_around_broken_faces():
    vertices, faces = adversarial_mesh("broken", 0)

    def loss(vertices):
        found = raster.rasterize(vertices, faces, SIZE, cull=False)
        return jnp.sum(raster.interpolate(found, faces, vertices)[..., :2])

    gradient = np.asarray(jax.jit(jax.grad(loss))(vertices))
    sound = np.isfinite(vertices).all(-1) & (vertices[:, 2] > 0)
    assert np.isfinite(gradient[sound]).all() and np.abs(gradient[sound]).max() > 0


def test_differentiates_inside_scan_and_vmap():
    vertices, faces = sphere(5, 6)

    def loss(shift, vertices):
        def step(total, offset):
            found = raster.rasterize(vertices + shift * offset, faces, SIZE)
            return total + jnp.sum(raster.interpolate(found, faces, vertices[:, 2:])), None

        return jax.lax.scan(step, 0.0, jnp.array([0.5, 1.0]))[0]

    gradient = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None)))(
        jnp.array([[0.01, 0.0, 0.0], [0.0, 0.02, 0.0]]), vertices
    )
    assert gradient.shape == (2, 3) and np.isfinite(np.asarray(gradient)).all() and np.asarray(gradient).any()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_other_platforms(platform):
    _, faces = sphere(8, 9)
    shape = jax.ShapeDtypeStruct((2, faces.max() + 1, 3), jnp.float32)
    exported = jax.export.export(rasterize, platforms=[platform])(shape, jnp.asarray(faces), 32)
    assert exported.platforms == (platform,) and exported.out_avals[0].shape == (2, 32, 32)


def test_wrong_arguments_are_named(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the functions' own checks are meant
    vertices, faces = sphere(4, 4)
    with pytest.raises(ValueError, match=r"vertices must be \(\*b, V, 3\)"):
        raster.rasterize(vertices[:, :2], faces, SIZE)
    with pytest.raises(ValueError, match=r"faces must be \(F, 3\)"):
        raster.rasterize(vertices, faces[:, :2], SIZE)
    with pytest.raises(ValueError, match="size must be positive"):
        raster.rasterize(vertices, faces, 0)
    found = raster.Fragments(np.zeros((4, 4), np.int32), np.zeros((4, 4, 3)), np.zeros((4, 4)))
    with pytest.raises(ValueError, match="do not fit fragments"):
        raster.interpolate(found, faces, np.zeros((2, len(vertices), 1)))
