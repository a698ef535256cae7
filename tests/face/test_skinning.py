"""Skinning against smplx.FLAME (golden vectors) and, through an oracle, the public variant."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.face.asset import Landmarks
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.rotation import matrix_from_rotvec
from loki_jax.face.skinning import (
    expression_offsets,
    head_vertices,
    landmark_positions,
    make_identity,
    mesh_faces,
    mesh_render_mask,
    skin,
    template_vertices,
    world_vertices,
)
from loki_jax.face.types import Camera, Coefficients
from tests.face.golden_flame import LIP_VERTEX, head_of, read
from tests.face.public_flame_oracle import PublicFlame, rigid, rotation

METRES = 2e-6  # the golden README's tolerance

# One compilation each instead of one per operation.
expression_offsets, head_vertices, skin, world_vertices = map(
    jax.jit, (expression_offsets, head_vertices, skin, world_vertices)
)


@pytest.fixture(scope="module")
def model(golden):
    return read(golden, "flame_model")


@pytest.fixture(scope="module")
def io(golden):
    return read(golden, "flame_io")


@pytest.fixture(scope="module")
def head(model):
    return head_of(model)


def coefficients(io, **used):
    """Golden's inputs, those not named zero."""
    zero = jnp.zeros_like(io["in/neck"])
    pick = lambda field, key: jnp.asarray(io[f"in/{key}"]) if used.get(field) else zero
    return Coefficients(
        betas=jnp.tile(io["in/betas"], (3, 1)),
        expression=jnp.asarray(io["in/expression"]),
        rot=pick("rot", "global_orient"),
        tra=pick("tra", "transl"),
        neck=pick("neck", "neck"),
        jaw=pick("jaw", "jaw"),
        eyes=pick("eyes", "eye"),
    )


@pytest.mark.parametrize(
    "case, used",
    [
        ("neutral_pose", ()),
        ("jaw_only", ("jaw",)),
        ("neck_only", ("neck",)),
        ("same_eye", ("eyes",)),
        ("jaw_eye", ("jaw", "eyes")),
        ("neck_jaw_eye", ("neck", "jaw", "eyes")),
    ],
)
def test_head_vertices_match_smplx(head, io, case, used):
    given = coefficients(io, **dict.fromkeys(used, True))
    vertices = head_vertices(head, make_identity(head, given.betas), given)
    np.testing.assert_allclose(vertices[:, :502], io[f"smplx/{case}"], atol=METRES)


@pytest.mark.parametrize(
    "case, keys",
    [
        ("global_only", ("global_orient", None, None, None, None)),
        ("jaw_eye_global", ("global_orient", None, "jaw", "eye", "eye")),
        ("eyes_only", (None, None, None, "leye", "reye")),
        ("full", ("global_orient", "neck", "jaw", "leye", "reye")),
    ],
)
def test_every_joint_matches_smplx(head, io, case, keys):
    rotvecs = np.stack([io[f"in/{key}"] if key else np.zeros((3, 3), np.float32) for key in keys], axis=1)
    rotations = matrix_from_rotvec(jnp.asarray(rotvecs))
    identity = make_identity(head, jnp.asarray(io["in/betas"]))
    vertices = skin(head, identity, jnp.asarray(io["in/expression"]), rotations)[:, :502]
    if case == "full":
        vertices = vertices + io["in/transl"][:, None]
    np.testing.assert_allclose(vertices, io[f"smplx/{case}"], atol=METRES)


def test_joints_match_smplx(head, io):
    # smplx reports the joints of the mesh with its expression.
    identity = make_identity(head, jnp.asarray(io["in/betas"]))
    moved = np.einsum("jv,evc->ejc", head.joint_regressor, head.expression_basis)
    joints = identity.joints + np.einsum("be,ejc->bjc", io["in/expression"], moved)
    np.testing.assert_allclose(joints, io["smplx/neutral_pose_joints"], atol=METRES)


def test_rigid_motion_is_about_the_origin(head, io):
    given = coefficients(io, rot=True, tra=True, neck=True, jaw=True, eyes=True)
    identity = make_identity(head, given.betas)
    expected = rigid(np.asarray(head_vertices(head, identity, given), np.float64), given.rot, given.tra)
    np.testing.assert_allclose(world_vertices(head, identity, given), expected, atol=METRES)


def test_offsets_ignore_the_neck_and_spare_the_mouth(head, io):
    still, turned = (
        coefficients(io, jaw=True, eyes=True),
        coefficients(io, jaw=True, eyes=True, neck=True, rot=True),
    )
    identity = make_identity(head, still.betas)
    offsets = expression_offsets(head, identity, turned)
    expected = head_vertices(head, identity, still) - identity.vertices
    np.testing.assert_allclose(offsets[:, :502], expected[:, :502], atol=1e-7)
    assert float(jnp.abs(offsets[:, :502]).max()) > 1e-3
    np.testing.assert_array_equal(offsets[:, 502:], 0)
    at_rest = still._replace(expression=jnp.zeros((3, 65)), jaw=jnp.zeros((3, 3)), eyes=jnp.zeros((3, 3)))
    np.testing.assert_allclose(expression_offsets(head, identity, at_rest), 0, atol=1e-7)
    inner = dataclasses.replace(head, inner_mouth=np.arange(502) < 7)
    np.testing.assert_array_equal(expression_offsets(inner, identity, still)[:, :7], 0)
    assert np.asarray(mesh_render_mask(dataclasses.replace(inner, render_mask=np.zeros(502, bool))))[:7].all()


def test_mouth_sphere(head, model, io):
    oracle = PublicFlame(model, io["in/betas"])
    expected, _ = oracle.mouth(io["mouth_sphere_vertices"])
    identity = make_identity(head, jnp.asarray(io["in/betas"]))
    np.testing.assert_allclose(identity.vertices[502:], expected, atol=METRES)
    np.testing.assert_array_equal(np.asarray(mesh_faces(head))[1000:] - 502, io["mouth_sphere_faces"])
    assert template_vertices(head).shape == (702, 3) and mesh_render_mask(head).shape == (702,)
    # Ours follows the neck joint, which the public one does not.
    given = coefficients(io, neck=True)
    joints = np.asarray(identity.joints, np.float64) + np.einsum(
        "be,jv,evc->bjc", io["in/expression"], head.joint_regressor, head.expression_basis
    )
    pivot = joints[:, 1][:, None]
    turned = np.einsum("bik,bvk->bvi", rotation(io["in/neck"]), expected - pivot) + pivot
    np.testing.assert_allclose(head_vertices(head, identity, given)[:, 502:], turned, atol=METRES)
    without = dataclasses.replace(head, lip_vertex=-1)
    assert make_identity(without, jnp.asarray(io["in/betas"])).vertices.shape == (502, 3)
    assert len(mesh_faces(without)) == 1000


def test_leading_axes_broadcast(head, io):
    given = coefficients(io, neck=True, jaw=True, eyes=True, rot=True, tra=True)
    flat = world_vertices(head, make_identity(head, given.betas), given)
    window = Coefficients(*(jnp.stack([field, field[::-1]]) for field in given))
    one = world_vertices(head, make_identity(head, window.betas[:, :1]), window)
    np.testing.assert_allclose(one[0], flat, atol=1e-7)
    np.testing.assert_allclose(one[1], flat[::-1], atol=1e-7)


def test_a_traced_head_gives_the_same(head, io):
    given = coefficients(io, neck=True, jaw=True, eyes=True)
    whole = lambda head, given: head_vertices(head, make_identity(head, given.betas), given)
    np.testing.assert_allclose(jax.jit(whole)(head, given), whole(head, given), atol=1e-6)


def test_gradients_are_finite_at_rest(head):
    rest = Coefficients(*(jnp.zeros(n) for n in (150, 65, 3, 3, 3, 3, 3)))
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(702, 3)), jnp.float32)

    def value(given):
        return jnp.sum(weight * world_vertices(head, make_identity(head, given.betas), given))

    gradient, value = jax.jit(jax.grad(value))(rest), jax.jit(value)
    for field in Coefficients._fields:
        assert (
            np.isfinite(np.asarray(getattr(gradient, field))).all()
            and np.asarray(getattr(gradient, field)).any()
        )
    step = 1e-3 * jnp.eye(3)[1]
    for field in ("neck", "jaw", "rot"):
        ahead, behind = (rest._replace(**{field: sign * step}) for sign in (1, -1))
        slope = (value(ahead) - value(behind)) / 2e-3
        np.testing.assert_allclose(getattr(gradient, field)[1], slope, rtol=2e-2, atol=2e-2)


def test_landmarks(head, io):
    marks = Landmarks(np.array([3, -1], np.int32), np.float32([[0.2, 0.3, 0.5], [0, 0, 0]]))
    marked = dataclasses.replace(head, landmarks={"some": marks})
    vertices = make_identity(marked, jnp.asarray(io["in/betas"])).vertices
    found = landmark_positions(marked, vertices[None], "some")
    corners = np.asarray(vertices)[np.asarray(head.faces)[3]]
    np.testing.assert_allclose(found[0, 0], np.float32([0.2, 0.3, 0.5]) @ corners, rtol=1e-5)
    np.testing.assert_array_equal(found[0, 1], 0)
    with pytest.raises(ValueError, match="no landmarks 'other'"):
        landmark_positions(marked, vertices, "other")


def test_wrong_sizes_are_named(head):
    with pytest.raises(ValueError, match="150 axes"):
        make_identity(head, jnp.zeros(10))
    given = Coefficients(*(jnp.zeros(n) for n in (150, 64, 3, 3, 3, 3, 3)))
    with pytest.raises(ValueError, match="65 axes"):
        head_vertices(head, make_identity(head, given.betas), given)


# The public variant, reproduced by the oracle under tests/ alone (method, section 11, row 10).

PUBLIC = {
    "neutral": (),
    "neck": ("neck",),
    "jaw": ("jaw",),
    "eye": ("eye",),
    "rigid": ("global_orient", "transl"),
    "train": ("eye", "global_orient", "transl"),
    "jaw_eye_global": ("jaw", "eye", "global_orient"),
    "full": ("neck", "jaw", "eye", "global_orient", "transl"),
}


@pytest.mark.parametrize("case", PUBLIC)
def test_public_skinners(model, io, case):
    oracle = PublicFlame(model, io["in/betas"])
    used = {key: io[f"in/{key}"] if key in PUBLIC[case] else np.zeros((3, 3)) for key in PUBLIC["full"]}
    for prefix, suffix, neck_joint in (("skinner", "", 1), ("skinner_ext", "_verts", 0)):
        posed = oracle.posed(io["in/expression"], used["neck"], used["jaw"], used["eye"], neck_joint)
        found = rigid(posed, used["global_orient"], used["transl"])
        np.testing.assert_allclose(found, io[f"{prefix}/{case}{suffix}"], atol=METRES)
        if prefix == "skinner_ext":
            np.testing.assert_allclose(posed - oracle.neutral, io[f"skinner_ext/{case}_offsets"], atol=METRES)


def test_public_gaze_and_transforms(io):
    turn = rotation(io["in/global_orient"])
    gaze = np.einsum("bij,bjk,k->bi", turn, rotation(io["in/eye"]), [0, 0, 1])
    np.testing.assert_allclose(io["skinner/train_gaze_dirs"], np.tile(gaze[:, None], (1, 2, 1)), atol=METRES)
    expected = np.tile(np.eye(4), (3, 1, 1, 1))
    expected[:, 0, :3, :3], expected[:, 0, :3, 3] = turn, io["in/transl"]
    np.testing.assert_allclose(
        io["skinner_ext/full_transforms_v0_7"], np.tile(expected, (1, 8, 1, 1)), atol=METRES
    )


def test_public_mouth_and_blink(model, io):
    oracle = PublicFlame(model, io["in/betas"], blink=io["in/blink"])
    rot, tra = io["in/global_orient"], io["in/transl"]
    mouth, jaw = oracle.mouth(io["mouth_sphere_vertices"])
    turn = rotation(io["in/expression"] @ io["in/jaw_regressor"])
    lower = np.einsum("bik,vk->bvi", turn, mouth - jaw) + jaw
    posed = oracle.posed(io["in/expression"], io["in/neck"], io["in/jaw"], io["in/eye"])
    found = np.concatenate([rigid(posed, rot, tra), rigid(mouth, rot, tra), rigid(lower, rot, tra)], axis=1)
    np.testing.assert_allclose(found, io["skinner_ext_mouthjaw_blink/full_verts"], atol=METRES)
    offsets = np.concatenate([posed - oracle.neutral, np.zeros((3, 200, 3)), lower - mouth], axis=1)
    np.testing.assert_allclose(offsets, io["skinner_ext_mouthjaw_blink/full_offsets"], atol=METRES)


def test_public_compute_flame(model, io):
    oracle = PublicFlame(model, io["in/betas"], blink=io["in/blink"], lip_vertex=LIP_VERTEX)
    rot, tra = io["in/global_orient"], io["in/transl"]
    mouth, _ = oracle.mouth(io["mouth_sphere_vertices"])
    posed = oracle.posed(io["in/expression"], io["in/neck"], np.zeros((3, 3)), io["in/eye"])
    world = np.concatenate([rigid(posed, rot, tra), rigid(mouth, rot, tra)], axis=1)
    np.testing.assert_allclose(world, io["compute_flame/verts_3d"], atol=METRES)
    offsets = np.pad(posed - oracle.neutral, ((0, 0), (0, 200), (0, 0)))
    np.testing.assert_allclose(offsets, io["compute_flame/offsets_3d"], atol=METRES)
    np.testing.assert_allclose(world * [1, -1, -1], io["compute_flame/verts_3d_cv"], atol=METRES)
    intrinsics = np.concatenate([io[f"compute_flame/in_{key}"] for key in ("fx", "fy", "cx", "cy")])
    camera = Camera(jnp.asarray(intrinsics), jnp.asarray(io["compute_flame/in_extr"][0]))
    pixels = project(camera_from_world(jnp.asarray(world, jnp.float32), camera), camera)
    np.testing.assert_allclose(pixels, io["compute_flame/verts_2d"][0, ..., :2], rtol=2e-6, atol=2e-4)
