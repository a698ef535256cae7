"""Painted heads: determinism, variety, shading, gradients, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.face import builtin
from loki_jax.face.builtin import builtin_head, builtin_mesh
from loki_jax.face.normals import vertex_normals
from loki_jax.face.skinning import make_identity
from loki_jax.face.types import Camera, Coefficients
from loki_jax.synthetic.appearance import sample_appearance, sample_shape
from loki_jax.synthetic.shading import render

SIZE = 40


@pytest.fixture(scope="module")
def head():
    return builtin_head()


@pytest.fixture(scope="module")
def mesh():
    return builtin_mesh()


@pytest.fixture(scope="module")
def camera():
    extrinsics = np.eye(4, dtype=np.float32)
    extrinsics[2, 3] = 1.0
    return Camera(np.array([900.0, 900.0, 128.0, 128.0], np.float32), extrinsics)


CROP = np.array([0, 0, 256, 256], np.float32)


def _coefficients(head, **fields):
    values = {name: np.zeros(3, np.float32) for name in ("rot", "tra", "neck", "jaw", "eyes")}
    values |= {
        "betas": np.zeros(head.n_shape, np.float32),
        "expression": np.zeros(head.n_expression, np.float32),
    }
    return Coefficients(**(values | {k: np.asarray(v, np.float32) for k, v in fields.items()}))


@pytest.fixture(scope="module")
def draw(head, camera):
    @jax.jit
    def image(coefficients, appearance):
        return render(
            head, make_identity(head, coefficients.betas), coefficients, camera, CROP, appearance, SIZE
        )

    return lambda coefficients, appearance: np.asarray(image(coefficients, appearance))


def test_same_seed_same_look_other_seed_other_look(head):
    first, again, other = sample_appearance(3, head), sample_appearance(3, head), sample_appearance(4, head)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.abs(first.albedo - other.albedo).max() > 0.1
    np.testing.assert_array_equal(sample_shape(3, head), sample_shape(3, head))
    # Pinned numbers: PCG64 streams are the same on every machine.
    np.testing.assert_allclose(sample_shape(0, head)[:3], [0.102968, -0.980527, -0.817478], atol=1e-5)


def test_identities_differ_in_skin_hair_and_background(head, mesh):
    cheek = np.argmin(np.linalg.norm(mesh.vertices - [0.045, -0.03, 0.07], axis=-1))
    crown = np.argmax(mesh.vertices[:, 1])
    looks = [sample_appearance(seed, head, mesh) for seed in range(24)]
    for vertex in (cheek, crown):
        colours = np.stack([look.albedo[vertex] for look in looks])
        assert colours.mean(-1).std() > 0.12
    assert np.stack([look.background for look in looks]).std(0).min() > 0.1
    for look in looks:
        assert look.albedo.min() >= 0 and look.albedo.max() <= 1
        np.testing.assert_allclose(np.linalg.norm(look.light), 1, atol=1e-6)


def test_eyes_lips_and_teeth_are_told_apart(head, mesh):
    """Sclera is lighter than iris, iris than pupil; teeth than the cavity."""
    for seed in range(6):
        value = sample_appearance(seed, head, mesh).albedo.mean(-1)
        ball = mesh.part == builtin.EYEBALL
        pupil, iris, white = (
            value[ball & np.isin(mesh.depth, rows)].mean() for rows in ((0, 1), (2,), (5, 6))
        )
        assert pupil < 0.05 < iris < white - 0.15
        enamel = np.isin(mesh.part, [builtin.UPPER_TEETH, builtin.LOWER_TEETH]) & (mesh.depth > 0)
        assert value[enamel].mean() > value[mesh.part == builtin.CAVITY].mean() + 0.3


def test_volume_belongs_to_the_hair_cut(head, mesh):
    """Long hair swells the neck in the shape and is painted there in the appearance, from one seed."""
    nape = (mesh.part == 0) & (mesh.phi > 2.0) & (mesh.v > -0.09) & (mesh.v < -0.05)
    crown = np.argmax(mesh.vertices[:, 1])
    lengths, differences = [], []
    for seed in range(40):
        look = sample_appearance(seed, head, mesh)
        lengths.append(sample_shape(seed, head)[head.shape_names.index("hair_length")])
        differences.append(np.abs(look.albedo[nape].mean(0) - look.albedo[crown]).max())
    lengths, differences = np.array(lengths), np.array(differences)
    assert (lengths > 1).sum() >= 5 and (lengths < 0).sum() >= 10
    assert np.median(differences[lengths > 1]) < 0.08 < np.median(differences[lengths < 0])


def test_a_face_is_drawn_where_it_should_be(head, draw):
    look = sample_appearance(1, head)
    image = draw(_coefficients(head), look)
    assert image.shape == (SIZE, SIZE, 3) and image.min() >= 0 and image.max() <= 1
    # The corners above the shoulders show the background exactly.
    axis = 1 - (2 * np.arange(2 * SIZE) + 1) / (2 * SIZE)
    wx, wy, phase = look.background_wave
    blend = 0.5 + 0.5 * np.sin(wx * axis[None] + wy * axis[:, None] + phase)
    expected = look.background[0] + blend[..., None] * (look.background[1] - look.background[0])
    expected = expected.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3))
    np.testing.assert_allclose(image[:5, :5], expected[:5, :5], atol=2e-5)
    np.testing.assert_allclose(image[:5, -5:], expected[:5, -5:], atol=2e-5)
    assert np.abs(image[SIZE // 2, SIZE // 2] - expected[SIZE // 2, SIZE // 2]).max() > 0.05


def test_motion_shows(head, draw):
    """Blinking changes the eyes only, the jaw the lower face only; yaw moves the picture's mass."""
    look = sample_appearance(3, head)
    neutral = draw(_coefficients(head), look)
    expression = np.zeros(head.n_expression)
    for side in ("Left", "Right"):
        expression[head.expression_names.index(f"eyeBlink{side}")] = 1
    rows = np.abs(draw(_coefficients(head, expression=expression), look) - neutral).max((1, 2))
    eye_row = SIZE / 2 - 0.01 * 900 * SIZE / 256
    assert rows.max() > 0.1 and abs(np.argmax(rows) - eye_row) < 3
    assert rows[int(eye_row) + 6 :].max() < 0.02
    rows = np.abs(draw(_coefficients(head, jaw=(0.25, 0, 0)), look) - neutral).max((1, 2))
    assert rows[SIZE // 2 :].max() > 0.15 and rows[: int(eye_row) - 2].max() < 0.02
    turned = draw(_coefficients(head, rot=(0, 0.5, 0)), look)
    assert np.abs(turned - neutral).mean() > 0.02


def test_the_lamp_lights_the_side_it_is_on(head, draw):
    look = sample_appearance(1, head)
    look = look._replace(albedo=np.full_like(look.albedo, 0.8))
    cheeks = []
    for x in (0.9, -0.9):
        light = np.array([x, 0.1, 0.42]) / np.linalg.norm([x, 0.1, 0.42])
        image = draw(_coefficients(head), look._replace(light=light.astype(np.float32)))
        row = image[SIZE // 2 + 5]
        cheeks.append((row[SIZE // 2 + 7].mean(), row[SIZE // 2 - 8].mean()))
    # +x is the subject's left, on the image's right.
    assert cheeks[0][0] > cheeks[0][1] + 0.1 and cheeks[1][1] > cheeks[1][0] + 0.1
    np.testing.assert_allclose(cheeks[0], cheeks[1][::-1], atol=0.02)


def test_normals_of_a_sphere(mesh):
    ball = (mesh.part == builtin.EYEBALL) & (mesh.left > 0)
    normals = np.asarray(vertex_normals(jnp.asarray(mesh.vertices, jnp.float32), mesh.faces))
    radial = (mesh.vertices[ball] - builtin.EYE) / builtin.EYE_RADIUS
    inner = mesh.depth[ball] < 8  # the open rim has faces on one side only
    assert (np.sum(normals[ball] * radial, -1)[inner] > 0.98).all()


def test_gradient_with_respect_to_coefficients_matches_differences(head, camera):
    """Only through shading and interpolation, so the test keeps away from silhouettes: smile, inner crop."""
    look = sample_appearance(3, head)
    crop = np.array([100, 120, 156, 176], np.float32)
    index = head.expression_names.index("mouthPucker")
    target = 0.5 + 0.3 * np.sin(np.arange(24))[:, None, None]

    @jax.jit
    def loss(weight):
        c = _coefficients(head)
        c = c._replace(expression=jnp.zeros(head.n_expression).at[index].set(weight))
        image = render(head, make_identity(head, c.betas), c, camera, crop, look, 24, supersample=1)
        return jnp.mean((image - target) ** 2)

    gradient = float(jax.grad(loss)(0.2))
    difference = (float(loss(0.2 + 2e-3)) - float(loss(0.2 - 2e-3))) / 4e-3
    assert np.isfinite(gradient) and gradient * difference > 0
    assert abs(gradient - difference) < 0.35 * abs(difference) + 1e-4


def test_wrong_heads_are_refused(head, camera):
    with pytest.raises(ValueError, match="built-in head only"):
        sample_appearance(0, dataclasses.replace(head, name="flame"))
    with pytest.raises(ValueError, match="built-in head only"):
        sample_shape(0, dataclasses.replace(head, name="flame"))
    look = sample_appearance(0, head)
    short = look._replace(albedo=look.albedo[:-1])
    c = _coefficients(head)
    with pytest.raises(ValueError, match="vertex colours"):
        render(head, make_identity(head, jnp.asarray(c.betas)), c, camera, CROP, short, 16)
