"""The driver map against the public implementation and its own promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax import driver, raster
from loki_jax.face.builtin import builtin_head
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.crop import crop_box
from loki_jax.face.skinning import (
    expression_offsets,
    make_identity,
    mesh_faces,
    mesh_render_mask,
    template_vertices,
    world_vertices,
)
from loki_jax.face.types import Camera, Coefficients

SIZE = 48
rasterize = jax.jit(raster.rasterize, static_argnames="size")


def load(golden, name):
    with np.load(golden / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("size", [64, 128])
def test_golden_driver_maps(golden, size):
    given = load(golden, f"driver_map_{size}_inputs")
    fragments = load(golden, f"driver_map_{size}_fragments")
    n_frames = fragments["mask"].shape[0]
    vertices = given["driver_verts"].reshape(n_frames, -1, 3)
    offsets = given["driver_deform"].reshape(vertices.shape)
    faces = given["faces"]
    canonical = driver.canonical_positions(given["template_verts"])
    np.testing.assert_allclose(canonical, given["props"], atol=1e-6)
    mask = np.zeros(vertices.shape[1], bool)
    mask[given["head_vertex_ids"]] = True
    mask[-200:] = True  # the inner mouth always shows
    np.testing.assert_array_equal(mask[faces].any(-1), given["face_mask"])

    found = jax.tree.map(np.asarray, rasterize(vertices, faces, size))
    sure = fragments["unambiguous"]
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(found.face[sure], fragments["pix_to_face_local"][sure])
    seen = sure & (found.face >= 0)
    np.testing.assert_allclose(found.bary[seen], fragments["bary"][seen], atol=1e-4)
    np.testing.assert_allclose(found.depth[seen], fragments["zbuf"][seen], rtol=1e-6)

    shown = raster.clear_hidden_faces(found, faces, mask)
    np.testing.assert_array_equal(np.asarray(shown.face >= 0)[sure], fragments["mask"][sure])
    inputs = driver.DriverInputs(faces, canonical, vertices, offsets)
    image = np.asarray(driver.encode_map(shown, inputs))
    assert image.shape == (n_frames, size, size, 45)
    encoded = load(golden, f"driver_map_{size}_posenc42")["spatial_cond_0_42"]
    expected = encoded.reshape(n_frames, size // 4, size // 4, 42)  # every fourth pixel
    some, sure_some = image[:, ::4, ::4, :42], sure[:, ::4, ::4]
    np.testing.assert_allclose(some[sure_some], expected[sure_some], atol=1e-4)  # 2e-3 would be allowed
    deform = fragments["deform_map"].reshape(n_frames, size, size, 3)
    np.testing.assert_allclose(image[sure][:, 42:], deform[sure], atol=1e-4)
    assert (image[~np.asarray(shown.face >= 0)] == 0).all()


def test_golden_encoding_of_points(golden):
    with np.load(golden / "raster_conventions.npz") as file:
        points, expected = file["posenc/in"], file["posenc/out"]
    np.testing.assert_allclose(driver.positional_encoding(points), expected, atol=2e-6)


@pytest.fixture(scope="module")
def head():
    return builtin_head()


@pytest.fixture(scope="module")
def scene(head):
    """Identity, coefficients (2, 3, ...), camera and crop of talking, turning heads."""
    rng = np.random.default_rng(0)
    draw = lambda n, scale: jnp.asarray(rng.normal(size=(2, 3, n)) * scale, jnp.float32)
    coefficients = Coefficients(
        betas=jnp.tile(draw(head.n_shape, 0.5)[:, :1], (1, 3, 1)),
        expression=jnp.asarray(rng.uniform(0, 0.5, (2, 3, head.n_expression)), jnp.float32),
        rot=draw(3, 0.2),
        tra=draw(3, 0.01) + jnp.array([0, 0, -1.0]),
        neck=draw(3, 0.1),
        jaw=jnp.abs(draw(3, 0.1)) * jnp.array([1.0, 0, 0]),
        eyes=draw(3, 0.1),
    )
    camera = Camera(jnp.array([300.0, 300.0, 100.0, 100.0]), jnp.eye(4))
    identity = make_identity(head, coefficients.betas[:, :1])
    pixels = project(camera_from_world(world_vertices(head, identity, coefficients), camera), camera)
    crop = crop_box(pixels[:, :, mesh_render_mask(head)].reshape(-1, 2))
    return identity, coefficients, camera, crop


@functools.partial(jax.jit, static_argnames=("size", "arm", "dtype"))
def drawn(head, identity, coefficients, camera, crop, size=SIZE, arm="full", dtype=jnp.float32):
    return driver.driver_map(head, identity, coefficients, camera, crop, size, arm, dtype)


def test_arms_are_parts_of_the_full_map(head, scene):
    full = np.asarray(drawn(head, *scene))
    assert full.shape == (2, 3, SIZE, SIZE, 45) and full.dtype == np.float32
    np.testing.assert_array_equal(drawn(head, *scene, arm="no_posenc"), full[..., 42:])
    np.testing.assert_array_equal(drawn(head, *scene, arm="no_deform"), full[..., :42])
    for arm, channels in (("full", 45), ("no_posenc", 3), ("no_deform", 42)):
        assert driver.driver_channels(arm, head) == channels
    half = drawn(head, *scene, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), full, rtol=2**-8, atol=1e-6)


def test_background_is_zero_and_the_hidden_neck_occludes(head, scene):
    identity, coefficients, camera, crop = scene
    full = np.asarray(drawn(head, *scene))
    fragments = rasterize(driver.ndc_vertices(head, *scene), mesh_faces(head), SIZE)
    face, mask = np.asarray(fragments.face), np.asarray(mesh_render_mask(head))
    shown = (face >= 0) & mask[np.asarray(mesh_faces(head))].any(-1)[face]
    assert 0.2 < shown.mean() < 0.8 and (shown != (face >= 0)).any()
    assert (full[~shown] == 0).all()
    np.testing.assert_array_equal((full[..., :42] != 0).any(-1), shown)
    # Sines and cosines of one angle.
    seen = full[shown]
    for axis in range(3):
        sine, cosine = seen[:, 14 * axis : 14 * axis + 7], seen[:, 14 * axis + 7 : 14 * axis + 14]
        np.testing.assert_allclose(sine**2 + cosine**2, 1, atol=1e-5)


def test_values_name_the_point_and_not_pose_or_identity(head, scene):
    """A point's channels stay with it: found again where the moved vertex projects."""
    identity, coefficients, camera, crop = scene
    ndc = np.asarray(driver.ndc_vertices(head, *scene))
    canonical = np.asarray(driver.canonical_positions(jnp.asarray(head.template)))
    image = np.asarray(drawn(head, *scene, size=192))
    tip = int(np.argmax(head.template[:, 2]))
    expected = np.stack([np.sin(canonical[tip]), np.cos(canonical[tip])])
    rows = np.clip(((1 - ndc[..., tip, 1]) * 96).astype(int), 0, 191)
    columns = np.clip(((1 - ndc[..., tip, 0]) * 96).astype(int), 0, 191)
    places = set()
    for b in range(2):
        for t in range(3):
            pixel = image[b, t, rows[b, t], columns[b, t]]
            np.testing.assert_allclose([pixel[0:42:14], pixel[7:42:14]], expected, atol=0.05)
            places.add((rows[b, t], columns[b, t]))
    assert len(places) > 3


def test_neck_moves_the_map_but_not_its_offsets(head, scene):
    identity, coefficients, camera, crop = scene
    bent = coefficients._replace(neck=coefficients.neck + jnp.array([0.0, 0.35, 0.0]))
    before, after = (np.asarray(drawn(head, identity, c, camera, crop)) for c in (coefficients, bent))
    assert ((before != 0).any(-1) != (after != 0).any(-1)).mean() > 0.01
    rest = coefficients._replace(
        expression=jnp.zeros_like(coefficients.expression),
        jaw=jnp.zeros_like(coefficients.jaw),
        eyes=jnp.zeros_like(coefficients.eyes),
    )
    offsets = np.asarray(drawn(head, identity, rest, camera, crop, arm="no_posenc"))
    np.testing.assert_allclose(offsets, 0, atol=2e-4)
    assert np.abs(before[..., 42:]).max() > 0.2


def test_gradients_reach_the_coefficients(head, scene):
    identity, coefficients, camera, crop = scene
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(SIZE, SIZE, 45)), jnp.float32)

    def loss(coefficients):
        return jnp.sum(weight * drawn(head, identity, coefficients, camera, crop))

    gradient = jax.jit(jax.grad(loss))(coefficients)
    for field in ("expression", "rot", "tra", "neck", "jaw", "eyes"):
        value = np.asarray(getattr(gradient, field))
        assert np.isfinite(value).all() and (value != 0).any(-1).all(), field


def test_flame_vector(head, scene):
    _, coefficients, _, _ = scene
    vector = driver.flame_vector(head, coefficients)
    n = head.n_expression
    assert vector.shape == (2, 3, n + 12) and driver.driver_channels("flame_vector", head) == n + 12
    for field, start in (("rot", n), ("neck", n + 3), ("jaw", n + 6), ("eyes", n + 9)):
        np.testing.assert_array_equal(vector[..., start : start + 3], getattr(coefficients, field))
    np.testing.assert_array_equal(vector[..., :n], coefficients.expression)


def test_inner_mouth_shows_even_where_the_mask_is_empty(head, scene):
    hidden = dataclasses.replace(head, render_mask=np.zeros(len(head.template), bool))
    shown = (np.asarray(drawn(hidden, *scene)) != 0).any(-1).mean()
    nothing = dataclasses.replace(hidden, inner_mouth=np.zeros(len(head.template), bool))
    assert 0 < shown < 0.2
    assert not np.asarray(drawn(nothing, *scene)).any()


def test_wrong_arguments_are_named(head, scene):
    with pytest.raises(
        ValueError, match="'flame_vector' has no .*; arms with one: full, no_posenc, no_deform"
    ):
        driver.driver_map(head, *scene, SIZE, arm="flame_vector")
    with pytest.raises(ValueError, match="unknown driver arm 'posenc'; one of full, .*, flame_vector"):
        driver.driver_channels("posenc", head)
    short = scene[1]._replace(expression=scene[1].expression[..., :-1])
    with pytest.raises(ValueError, match="do not end in the"):
        driver.flame_vector(head, short)


def test_frame_after_frame_gives_the_same_map(head, scene, monkeypatch):
    """Large batches are shaded one frame at a time; here the limit is small instead."""
    identity, coefficients, camera, crop = scene
    canonical = driver.canonical_positions(template_vertices(head))
    vertices = jax.jit(driver.ndc_vertices)(head, *scene)
    offsets = expression_offsets(head, identity, coefficients)
    offsets = jnp.broadcast_to(offsets, vertices.shape)
    inputs = driver.DriverInputs(mesh_faces(head), canonical, vertices, offsets)
    draw = lambda: jax.jit(lambda v, i: driver.map_of_mesh(v, mesh_render_mask(head), i, SIZE))(
        vertices, inputs
    )
    at_once = np.asarray(draw())
    assert (at_once != 0).any()
    monkeypatch.setattr(driver.map, "_PIXELS_AT_ONCE", 1)
    np.testing.assert_allclose(draw(), at_once, atol=2e-6)
