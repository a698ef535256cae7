"""The built-in head: topology, symmetry, anatomy, axes, skinning and landmarks."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.face import builtin
from loki_jax.face.asset import load_head, save_head
from loki_jax.face.builtin import builtin_head, builtin_mesh
from loki_jax.face.skinning import head_vertices, landmark_positions, make_identity
from loki_jax.face.types import Coefficients
from tools.builtin_head.mesh import lid_vertices, mirror_vertices


@pytest.fixture(scope="module")
def head():
    return builtin_head()


@pytest.fixture(scope="module")
def mesh():
    return builtin_mesh()


def _coefficients(head, shape=None, **named):
    """Coefficients with the given expression axes ("blink" names set both sides), jaw, eyes, neck."""
    rotations = {key: named.pop(key, (0.0, 0.0, 0.0)) for key in ("rot", "tra", "neck", "jaw", "eyes")}
    expression = np.zeros(head.n_expression, np.float32)
    for name, value in named.items():
        for full in (name, f"{name}Left", f"{name}Right"):
            if full in head.expression_names:
                expression[head.expression_names.index(full)] = value
    shape = np.zeros(head.n_shape, np.float32) if shape is None else np.asarray(shape, np.float32)
    return Coefficients(shape, expression, **{key: np.asarray(v, np.float32) for key, v in rotations.items()})


def _pose(head, shape=None, **named):
    c = _coefficients(head, shape, **named)
    return np.asarray(head_vertices(head, make_identity(head, jnp.asarray(c.betas)), c))


def _edges(faces):
    return np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)


def test_same_arrays_on_every_call_and_through_the_file(head, tmp_path):
    again = builtin_head()
    for field in (
        "template",
        "faces",
        "shape_basis",
        "expression_basis",
        "skinning_weights",
        "joint_regressor",
    ):
        np.testing.assert_array_equal(getattr(head, field), getattr(again, field))
    assert save_head(tmp_path / "a.npz", head) == save_head(tmp_path / "b.npz", again)
    np.testing.assert_array_equal(load_head(tmp_path / "a.npz").template, head.template)


def test_size_and_budget(head):
    assert 2000 <= len(head.template) <= 2600 and 4000 <= len(head.faces) <= 5200
    assert head.n_shape >= 20 and head.n_expression >= 30
    assert len(set(head.shape_names)) == head.n_shape and len(set(head.expression_names)) == head.n_expression
    shown = head.template[head.render_mask]
    width, height, depth = shown.max(0) - shown.min(0)
    assert 0.21 < height < 0.26 and 0.14 < width < 0.19 and 0.18 < depth < 0.24
    assert head.joint_names == ("root", "neck", "jaw", "left_eye", "right_eye") and head.lip_vertex == -1


def test_mesh_is_an_oriented_surface(mesh):
    """No edge has more than two faces, the two run opposite ways, and only known rims are open."""
    directed = np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])
    assert len(np.unique(directed, axis=0)) == len(directed)
    edges, count = np.unique(_edges(mesh.faces), axis=0, return_counts=True)
    assert count.max() == 2
    open_vertices = np.unique(edges[count == 1])
    skin = open_vertices[mesh.part[open_vertices] == builtin.SKIN]
    # Of the skin only the bust's lower rim is open.
    np.testing.assert_allclose(mesh.v[skin], mesh.v.min())
    closed = {builtin.EAR, builtin.CAVITY}
    assert not closed & set(mesh.part[open_vertices].tolist())
    assert len(np.unique(mesh.faces)) == len(mesh.vertices)


def test_faces_are_neither_flat_nor_inside_out(head, mesh):
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    normal = np.cross(b - a, c - a)
    assert np.linalg.norm(normal, axis=-1).min() > 1e-9
    # Outward everywhere on skull and eyeballs; the face has folds (nostrils, lids), so look at its mean.
    skull = (mesh.part[mesh.faces] == builtin.SKIN).all(-1) & (mesh.v[mesh.faces] > 0.06).all(-1)
    assert (np.sum(normal * (a - [0, 0.02, -0.01]), -1)[skull] > 0).all()
    ball = (mesh.part[mesh.faces] == builtin.EYEBALL).all(-1) & (mesh.left[mesh.faces[:, 0]] > 0)
    assert (np.sum(normal * (a - builtin.EYE), -1)[ball] > 0).all()
    cavity = (mesh.part[mesh.faces] == builtin.CAVITY).all(-1)
    to_axis = np.array([0.0, builtin.MOUTH_Y, 0.06]) - (a + b + c) / 3
    assert (np.sum(normal * to_axis, -1)[cavity] > 0).all()  # the mouth is seen from inside


def test_template_and_faces_are_exactly_symmetric(mesh):
    partner = mirror_vertices(mesh)
    np.testing.assert_array_equal(mesh.vertices[partner], mesh.vertices * [-1, 1, 1])
    mirrored = {tuple(sorted(f)) for f in partner[mesh.faces].tolist()}
    assert mirrored == {tuple(sorted(f)) for f in mesh.faces.tolist()}


def test_left_and_right_expressions_mirror_each_other(head, mesh):
    partner = mirror_vertices(mesh)
    pairs = [n for n in head.expression_names if n.endswith("Left")]
    assert len(pairs) >= 12
    for name in pairs:
        left = head.expression_basis[head.expression_names.index(name)]
        right = head.expression_basis[head.expression_names.index(name[:-4] + "Right")]
        np.testing.assert_allclose(right[partner], left * [-1, 1, 1], atol=2e-8, err_msg=name)
        if not name.startswith(("jaw", "mouthLeft")):
            # "Left" is the subject's left, +x.
            moved = np.abs(left).sum(-1)
            assert moved[mesh.left > 0].sum() > 3 * moved[mesh.left < 0].sum(), name


def test_identity_and_expression_axes_have_natural_size(head):
    for name, axis in zip(head.shape_names, head.shape_basis, strict=True):
        assert 5e-4 < np.linalg.norm(axis, axis=-1).max() < 0.015, name
    for name, axis in zip(head.expression_names, head.expression_basis, strict=True):
        assert 1e-3 < np.linalg.norm(axis, axis=-1).max() < 0.016, name
    np.testing.assert_array_equal(head.expression_bounds, np.tile([0, 1], (head.n_expression, 1)))


def test_joints_follow_the_identity(head, mesh):
    """The eye joints are the eyeballs' centres for any identity, so that eyes turn in place."""
    np.testing.assert_allclose(head.joint_regressor.sum(1), 1, atol=1e-5)
    for shape in (np.zeros(head.n_shape), np.random.default_rng(0).standard_normal(head.n_shape)):
        vertices = head.template + np.einsum("n,nvx->vx", shape, head.shape_basis)
        joints = head.joint_regressor @ vertices
        for side, joint in ((1, head.joint("left_eye")), (-1, head.joint("right_eye"))):
            ball = vertices[(mesh.part == builtin.EYEBALL) & (mesh.left == side)]
            radius = np.linalg.norm(ball - joints[joint], axis=-1)
            assert radius.std() < 2e-5 and abs(radius.mean() - builtin.EYE_RADIUS) < 0.2 * builtin.EYE_RADIUS
        assert joints[head.joint("jaw")][2] < vertices[mesh.lip == 1][:, 2].min()


def test_blink_closes_the_lids_on_the_eyeball(head, mesh):
    """Upper and lower lid meet, and no lid vertex is inside the ball, open or closed, for any identity."""
    rng = np.random.default_rng(1)
    # From the upper lid to the lower one at the same place, corners left out.
    upper = lid_vertices(mesh, left=True)[1:10]
    lower = lid_vertices(mesh, left=True)[:10:-1]
    lids = np.flatnonzero(
        (mesh.part == builtin.SKIN) & (mesh.eye_ring >= 0) & (mesh.eye_ring <= 2) & (mesh.left > 0)
    )
    for shape in (np.zeros(head.n_shape), np.clip(rng.standard_normal(head.n_shape), -2, 2)):
        opened, closed = _pose(head, shape), _pose(head, shape, eyeBlink=1.0)
        ball = np.flatnonzero((mesh.part == builtin.EYEBALL) & (mesh.left > 0))
        centre = head.joint_regressor[head.joint("left_eye")] @ opened
        radius = np.linalg.norm(opened[ball] - centre, axis=-1).mean()
        gap_open = (opened[upper] - opened[lower])[:, 1]
        gap_closed = (closed[upper] - closed[lower])[:, 1]
        assert gap_open.max() > 0.007
        assert np.abs(gap_closed).max() < 0.0012
        for vertices in (opened, closed):
            assert (np.linalg.norm(vertices[lids] - centre, axis=-1) > radius).all()
        # "exactly over the eyeball": the closed lid's edge lies within two millimetres above it.
        assert np.linalg.norm(closed[upper] - centre, axis=-1).max() < radius + 0.0022


def test_jaw_opens_the_mouth_and_carries_the_lower_teeth(head, mesh):
    neutral, opened = _pose(head), _pose(head, jaw=(0.25, 0, 0), jawOpen=1.0)
    middle = mesh.left == 0
    upper, lower = middle & (mesh.lip == 1) & (mesh.part == 0), middle & (mesh.lip == -1) & (mesh.part == 0)
    assert abs(neutral[upper][0, 1] - neutral[lower][0, 1]) < 1e-6  # lips closed
    assert 0.015 < opened[upper][0, 1] - opened[lower][0, 1] < 0.035
    moved = np.linalg.norm(opened - neutral, axis=-1)
    assert moved[mesh.part == builtin.LOWER_TEETH].min() > 0.008
    for part in (builtin.UPPER_TEETH, builtin.EYEBALL, builtin.EAR):
        assert moved[mesh.part == part].max() < 1e-6
    assert moved[(mesh.part == 0) & (mesh.v > 0.02)].max() < 1e-3
    chin = middle & (mesh.part == 0) & (np.abs(mesh.v + 0.095) < 0.006) & (mesh.phi == 0)
    assert (neutral[chin] - opened[chin])[:, 1].min() > 0.012


def test_teeth_and_cavity_stay_behind_closed_lips(head, mesh):
    lips = head.template[(mesh.part == 0) & (np.abs(mesh.lip) == 1) & (np.abs(head.template[:, 0]) < 0.015)]
    teeth = head.template[np.isin(mesh.part, [builtin.UPPER_TEETH, builtin.LOWER_TEETH])]
    assert teeth[:, 2].max() < lips[:, 2].min()


def test_skinning_is_smooth_and_complete(head, mesh):
    weights = head.skinning_weights
    assert weights.min() >= -1e-6
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(weights[mesh.v < -0.25][:, 0], 1, atol=1e-6)
    # Neighbours differ little except across the mouth slit.
    skin_edges = np.unique(_edges(mesh.faces), axis=0)
    on_skin = (mesh.part[skin_edges] == 0).all(-1) & (mesh.lip[skin_edges] == 0).all(-1)
    step = np.abs(weights[skin_edges[:, 0]] - weights[skin_edges[:, 1]]).max(-1)
    assert step[on_skin].max() < 0.75  # at the mouth's corners


def test_turned_eyes_stay_in_place_and_neck_turns_the_whole_head(head, mesh):
    neutral, looking = _pose(head), _pose(head, eyes=(0.0, 0.3, 0.0))
    assert np.abs(looking - neutral)[mesh.part != builtin.EYEBALL].max() < 1e-6
    pole = np.flatnonzero((mesh.part == builtin.EYEBALL) & (mesh.depth == 0))
    assert (looking[pole] - neutral[pole])[:, 0].min() > 0.003  # towards the subject's left
    turned = _pose(head, neck=(0.0, 0.4, 0.0))
    above = mesh.v > -0.05
    centre = head.joint_regressor[head.joint("neck")] @ neutral
    before, after = neutral[above & (mesh.part == 0)] - centre, turned[above & (mesh.part == 0)] - centre
    c, s = np.cos(0.4), np.sin(0.4)
    rotation = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    np.testing.assert_allclose(after, before @ rotation.T, atol=1e-5)


def test_render_mask_is_the_head_without_shoulders(head, mesh):
    assert head.render_mask[mesh.v > -0.10].all() and head.render_mask[mesh.part != 0].all()
    assert not head.render_mask[(mesh.part == 0) & (mesh.v < -0.15)].any()
    inside = np.isin(mesh.part, [builtin.CAVITY, builtin.UPPER_TEETH, builtin.LOWER_TEETH])
    np.testing.assert_array_equal(head.inner_mouth, inside)


@pytest.mark.parametrize("name, count", [("mediapipe478", 478), ("ibug68", 68)])
def test_landmarks_lie_on_the_surface(head, name, count):
    marks = head.landmarks[name]
    assert marks.face.shape == (count,) and (marks.face >= 0).all()
    assert marks.bary.min() >= 0
    np.testing.assert_allclose(marks.bary.sum(1), 1, atol=5e-5)


def test_mediapipe_landmarks_are_symmetric_and_on_the_contours(head, mesh):
    points = np.asarray(landmark_positions(head, jnp.asarray(head.template), "mediapipe478"))
    # The midline of MediaPipe's mesh, forehead to chin.
    midline = [
        10,
        151,
        9,
        8,
        168,
        6,
        197,
        195,
        5,
        4,
        1,
        19,
        94,
        2,
        164,
        0,
        11,
        12,
        13,
        14,
        15,
        16,
        17,
        18,
        200,
        199,
        175,
        152,
    ]
    np.testing.assert_allclose(points[midline, 0], 0, atol=1e-6)
    assert (np.diff(points[midline, 1]) < 1e-4).all()
    mirrored = points[:468] * [-1, 1, 1]
    nearest = np.linalg.norm(mirrored[:, None] - points[None, :468], axis=-1).min(1)
    assert nearest.max() < 2e-6
    # Lid contours use lid-edge vertices only, lip contours the lips' rows; upper and lower apart.
    marks = head.landmarks["mediapipe478"]
    corners = head.faces[marks.face]
    used = [set(c[b > 0].tolist()) for c, b in zip(corners, marks.bary, strict=True)]
    edge = set(np.flatnonzero(mesh.eye_ring == 0).tolist())
    for index in (33, 133, 159, 158, 145, 153, 362, 263, 386, 374):
        assert used[index] <= edge, index
    for tag, indices in ((1, (82, 13, 312)), (-1, (87, 14, 317)), (3, (37, 0, 267)), (-3, (84, 17, 314))):
        row = set(np.flatnonzero(mesh.lip == tag).tolist())
        for index in indices:
            assert used[index] <= row, index
    for upper, lower in ((159, 145), (386, 374)):
        assert points[upper, 1] - points[lower, 1] > 0.006
    np.testing.assert_allclose(
        points[[33, 263], 0], [-0.0465, 0.0465], atol=1e-3
    )  # outer corners, right and left
    # 468..472 are the subject's right iris, 473..477 the left; the ring is the painted iris's edge.
    for first, side in ((468, -1), (473, 1)):
        np.testing.assert_allclose(points[first, :2], [side * builtin.EYE[0], builtin.EYE[1]], atol=1e-4)
        ring = np.linalg.norm(points[first + 1 : first + 5, :2] - points[first, :2], axis=-1)
        np.testing.assert_allclose(
            ring, builtin.EYE_RADIUS * np.sin(np.deg2rad(builtin.IRIS_DEGREES)), rtol=0.05
        )


def test_blink_moves_the_lid_landmarks_together(head):
    points = np.asarray(landmark_positions(head, jnp.asarray(_pose(head, eyeBlink=1.0)), "mediapipe478"))
    for upper, lower in ((159, 145), (386, 374), (160, 144), (387, 373)):
        assert abs(points[upper, 1] - points[lower, 1]) < 0.0015


def test_head_is_a_frozen_asset(head):
    with pytest.raises(dataclasses.FrozenInstanceError):
        head.name = "other"
