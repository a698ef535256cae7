"""Controls change what they name and nothing else."""

import dataclasses
import json

import jax
import jaxtyping
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from loki_jax.face.builtin import builtin_head
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.controls import (
    ControlError,
    Controls,
    apply_controls,
    check_sliders,
    find_axes,
    gaze_at_camera,
    last_keyframe,
    parse_sliders,
    part_of,
    read_sliders,
)
from loki_jax.face.ict import head_from_ict
from loki_jax.face.retarget import neck_joint
from loki_jax.face.skinning import landmark_positions, make_identity, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.points import IRIS_LEFT, IRIS_RIGHT, LANDMARK_SET, LIDS_LEFT, LIDS_RIGHT

N, FPS = 7, 25.0
CAMERA = Camera(np.array([800, 800, 256, 256], np.float32), np.eye(4, dtype=np.float32))


def motion(head, seed, *batch):
    rng = np.random.default_rng(seed)
    draw = lambda n, scale: (rng.normal(size=(*batch, n)) * scale).astype(np.float32)
    expression = np.clip(np.abs(draw(head.n_expression, 0.3)), 0, 1)
    tra = draw(3, 0.02) + np.array([0, 0, -0.7], np.float32)
    return Coefficients(
        draw(head.n_shape, 0.5), expression, draw(3, 0.2), tra, draw(3, 0.1), draw(3, 0.1), draw(3, 0.2)
    )


@pytest.fixture(scope="module")
def head():
    return builtin_head()


@pytest.fixture(scope="module")
def flame(head):
    """The built-in head with mixed and unnamed axes, as FLAME has them."""
    mix = np.linalg.qr(np.random.default_rng(0).normal(size=(head.n_expression, head.n_expression)))[0]
    return dataclasses.replace(
        head,
        name="mixed",
        expression_basis=np.einsum("ij,jvc->ivc", mix, head.expression_basis).astype(np.float32),
        expression_names=tuple(f"axis_{i:03d}" for i in range(head.n_expression)),
        expression_bounds=np.tile(np.array([-np.inf, np.inf], np.float32), (head.n_expression, 1)),
    )


def changed(head, controls=None, sliders=None, fps=FPS):
    """A motion before and after controls, and the portrait's coefficients."""
    moved, own = motion(head, 1, N), motion(head, 2)
    moved = moved._replace(betas=np.tile(own.betas, (N, 1)))
    result = apply_controls(head, moved, own, CAMERA, fps, controls or Controls(), sliders)
    return moved, result, own


def equal_fields(a, b):
    return {name for name in a._fields if np.array_equal(getattr(a, name), getattr(b, name))}


ALL = set(Coefficients._fields)


@pytest.mark.parametrize(
    "sliders",
    [{}, {"smile": 0.0, "yaw": 0, "gazeYaw": 0.0}, {"blink": [[0, 0.0], [9, 0.0]], "roll": [[0, 0], [1, 0]]}],
)
def test_controls_at_their_defaults_and_sliders_at_zero_change_no_bit(head, sliders):
    moved, result, _ = changed(head, Controls(), sliders)
    assert equal_fields(moved, result) == ALL


# Which fields and parts of the expression each scale names.
NAMED = {
    "expression": (set(), {"expression", "mouth"}),
    "jaw": ({"jaw"}, {"jaw"}),
    "lids": (set(), {"left", "right"}),
    "left_lids": (set(), {"left"}),
    "right_lids": (set(), {"right"}),
    "gaze": ({"eyes"}, set()),
    "pose": ({"rot", "tra", "neck"}, set()),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kind", ["builtin", "ict"])
def test_a_scale_of_zero_freezes_exactly_what_it_names(head, ict_path, name, kind):
    head = head if kind == "builtin" else head_from_ict(ict_path)
    fields, parts = NAMED[name]
    moved, result, own = changed(head, Controls(**{name: 0.0}))
    part = np.array([part_of(axis) for axis in head.expression_names])
    frozen = np.isin(part, list(parts))
    np.testing.assert_array_equal(result.expression[:, frozen], np.tile(own.expression[frozen], (N, 1)))
    np.testing.assert_array_equal(result.expression[:, ~frozen], moved.expression[:, ~frozen])
    assert equal_fields(moved, result) == ALL - fields - ({"expression"} if frozen.any() else set())
    for field in fields:
        np.testing.assert_array_equal(getattr(result, field), np.tile(getattr(own, field), (N, 1)))


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_scales_between_and_beyond(head, scale):
    moved, result, own = changed(head, Controls(pose=scale, gaze=scale, expression=scale, lids=scale))
    np.testing.assert_allclose(result.tra, own.tra + scale * (moved.tra - own.tra), atol=1e-6)
    np.testing.assert_allclose(result.eyes, own.eyes + scale * (moved.eyes - own.eyes), atol=1e-6)
    total = lambda c: Rotation.from_rotvec(c.rot) * Rotation.from_rotvec(c.neck)
    angle = lambda c: (total(c) * total(own).inv()).magnitude()
    np.testing.assert_allclose(angle(result), scale * angle(moved), atol=1e-5)
    lids = np.array([part_of(axis) in ("left", "right") for axis in head.expression_names])
    mouth = np.array([part_of(axis) == "mouth" for axis in head.expression_names])
    line = own.expression + scale * (moved.expression - own.expression)
    np.testing.assert_allclose(result.expression[:, mouth], line[:, mouth], atol=1e-6)
    np.testing.assert_allclose(result.expression[:, lids], np.clip(line, 0, 1)[:, lids], atol=1e-6)


def test_regions_follow_alone(head):
    part = np.array([part_of(axis) for axis in head.expression_names])
    cases = {
        "lips": (["mouth", "jaw"], {"jaw"}),
        "eyes": (["left", "right"], {"eyes"}),
        "pose": ([], {"rot", "tra", "neck"}),
        "expression": (["expression", "mouth", "jaw", "left", "right"], {"jaw", "eyes"}),
    }
    for region, (parts, fields) in cases.items():
        moved, result, own = changed(head, Controls(region=region))
        follows = np.isin(part, parts)
        np.testing.assert_array_equal(result.expression[:, follows], moved.expression[:, follows])
        still = np.tile(own.expression, (N, 1))
        np.testing.assert_array_equal(result.expression[:, ~follows], still[:, ~follows])
        for field in ("rot", "tra", "neck", "jaw", "eyes"):
            expected = getattr(moved, field) if field in fields else np.tile(getattr(own, field), (N, 1))
            np.testing.assert_array_equal(getattr(result, field), expected)


def marks_of(head, coefficients):
    identity = make_identity(head, coefficients.betas[:1])
    return np.asarray(landmark_positions(head, world_vertices(head, identity, coefficients), LANDMARK_SET))


def test_gaze_leaves_the_lids_and_lids_leave_the_gaze(head, ict_path):
    """Each moves the other by less than 1 % of the other's own range."""
    stand_in = ict_path.parent.name != "heads"  # its gaze axes move the irises less
    for asset, moved in ((head, 0.005), (head_from_ict(ict_path), 0.003 if stand_in else 0.005)):
        assert_apart(asset, moved)


def assert_apart(head, moved):
    still = np.zeros
    own = Coefficients(
        still(head.n_shape), still(head.n_expression), still(3), np.array([0, 0, -0.7]), still(3), still(3),
        still(3),
    )  # fmt: skip
    rest = Coefficients(*(np.tile(field.astype(np.float32), (2, 1)) for field in own))
    run = lambda sliders: marks_of(head, apply_controls(head, rest, own, CAMERA, 1.0, Controls(), sliders))
    lids_marks = [i for i in (*LIDS_LEFT, *LIDS_RIGHT) if head.landmarks[LANDMARK_SET].face[i] >= 0]
    irises = [i for i in (IRIS_RIGHT.start, IRIS_LEFT.start)]
    largest = lambda marks, chosen: np.abs(marks[1] - marks[0])[chosen].max()
    gaze, lids = run({"gazeYaw": [[0, -20], [1, 20]]}), run({"blink": [[0, 0], [1, 1]]})
    assert largest(gaze, irises) > moved and largest(lids, lids_marks) > 0.003
    assert largest(gaze, lids_marks) < 0.01 * largest(lids, lids_marks)
    assert largest(lids, irises) < 0.01 * largest(gaze, irises)


def test_offsets_turn_the_head_as_they_say(head):
    """In the picture: yaw to its right, pitch up, roll clockwise, about the neck."""
    own = jax.tree.map(np.zeros_like, motion(head, 0))._replace(tra=np.array([0, 0, -0.7], np.float32))
    rest = Coefficients(*(field[None] for field in own))

    def seen(**offsets):
        turned = apply_controls(head, rest, own, CAMERA, FPS, Controls(**offsets))
        points = marks_of(head, turned)
        pivot = np.asarray(neck_joint(head, own.betas))
        moved = Rotation.from_rotvec(turned.rot[0]).apply(pivot) + turned.tra[0]
        np.testing.assert_allclose(moved, pivot + own.tra, atol=1e-6)
        return np.asarray(project(camera_from_world(points, CAMERA), CAMERA))[0]

    before = seen()
    nose, chin, brow = 1, 152, 10
    assert seen(yaw=10.0)[nose, 0] > before[nose, 0] + 10
    assert seen(pitch=10.0)[nose, 1] < before[nose, 1] - 10
    assert seen(roll=10.0)[brow, 0] > before[brow, 0] + 5 > before[chin, 0]
    turned = apply_controls(head, rest, own, CAMERA, FPS, Controls(yaw=10.0, pitch=-5.0), {"yaw": 5})
    yaw, pitch, roll = Rotation.from_rotvec(turned.rot[0]).as_euler("YXZ", degrees=True)
    np.testing.assert_allclose([yaw, -pitch, -roll], [15, -5, 0], atol=1e-4)


def test_gaze_at_the_camera_meets_the_lens(head):
    rng = np.random.default_rng(5)
    turn = Rotation.from_euler("YXZ", [20, -10, 5], degrees=True).as_matrix()
    extrinsics = np.eye(4)
    extrinsics[:3, :3], extrinsics[:3, 3] = turn, [0.05, -0.02, 0.1]
    camera = CAMERA._replace(extrinsics=extrinsics.astype(np.float32))
    facing = np.diag([1.0, -1, -1]) @ turn.T @ np.diag([1.0, -1, -1])
    moved = motion(head, 3, N)
    rot = Rotation.from_matrix(facing) * Rotation.from_rotvec(0.15 * rng.normal(size=(N, 3)))
    moved = moved._replace(rot=rot.as_rotvec().astype(np.float32), neck=0.1 * moved.neck)
    own = motion(head, 2)
    moved = moved._replace(betas=np.tile(own.betas, (N, 1)), expression=0 * moved.expression)
    result = apply_controls(head, moved, own, camera, FPS, Controls(gaze="camera"))
    assert equal_fields(moved, result) == ALL - {"eyes"}
    # The pupils are on the line from between the eyes to the lens: seen in the picture, they are where
    # the centres of the eyeballs are, moved by the same vector as with parallel eyes.
    marks = marks_of(head, result)
    pupils = marks[:, [IRIS_RIGHT.start, IRIS_LEFT.start]].mean(1)
    lens = np.diag([1.0, -1, -1]) @ turn.T @ -extrinsics[:3, 3]
    identity = make_identity(head, own.betas)
    joints = np.asarray(identity.joints)
    middle = (joints[head.joint("left_eye")] + joints[head.joint("right_eye")]) / 2
    pivot = np.asarray(neck_joint(head, own.betas))
    place = Rotation.from_rotvec(moved.neck).apply(middle - pivot) + pivot
    place = Rotation.from_rotvec(moved.rot).apply(place) + moved.tra
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    off = np.degrees(np.arccos(np.sum(unit(pupils - place) * unit(lens - place), -1)))
    assert off.max() < 3.0  # the pupils' landmarks are not exactly on the axes of the eyes
    # Eyes turn no further than they can.
    away = moved._replace(rot=np.tile(np.array([0, 1.5, 0], np.float32), (N, 1)))
    assert np.degrees(np.linalg.norm(gaze_at_camera(head, away, CAMERA), axis=-1)).max() < 44


def test_sliders_follow_their_keyframes_within_the_bounds(head):
    name = head.expression_names.index
    moved, result, _ = changed(head, None, {"smile": [[0.04, 0.0], [0.12, 0.4]], "eyeBlinkLeft": 5}, 25.0)
    ramp = np.array([0, 0, 0.2, 0.4, 0.4, 0.4, 0.4])
    for side in ("mouthSmileLeft", "mouthSmileRight"):
        expected = np.clip(moved.expression[:, name(side)] + ramp, 0, 1)
        np.testing.assert_allclose(result.expression[:, name(side)], expected, atol=1e-6)
    assert (result.expression[:, name("eyeBlinkLeft")] == 1).all()
    touched = [name(n) for n in ("mouthSmileLeft", "mouthSmileRight", "eyeBlinkLeft")]
    others = np.delete(np.arange(head.n_expression), touched)
    np.testing.assert_array_equal(result.expression[:, others], moved.expression[:, others])


def test_slider_names_are_the_same_on_every_head(head, ict_path):
    ict = head_from_ict(ict_path)
    for name in ("mouthSmileLeft", "mouthSmile_L", "mouthsmileleft"):
        for one in (head, ict):
            moved, result, _ = changed(one, None, {name: 0.01})
            axes = np.flatnonzero((moved.expression != result.expression).any(0))
            assert [one.expression_names[i][:10] for i in axes] == ["mouthSmile"]
    check_sliders(ict, {"blink": 1, "jawOpen": 1, "jawLeft": 1, "yaw": 1, "browInnerUp": 1})


def test_unnamed_axes_get_fitted_directions(head, flame):
    axes = find_axes(flame)
    assert axes.fitted and axes.names == head.expression_names
    moves = lambda one, weights: np.tensordot(weights, one.expression_basis, 1)
    smile = head.expression_names.index("mouthSmileLeft")
    true = head.expression_basis[smile]
    # The mixture can do all that the built-in axes do; the jaw's joint takes its part of jawOpen.
    error = np.linalg.norm(moves(flame, axes.expression[smile]) - true) / np.linalg.norm(true)
    assert error < 0.15
    # Frozen lids stay, the rest still follows.
    moved, result, own = changed(flame, Controls(lids=0.0))
    lids = marks_displacement(flame, result.expression - own.expression, [159, 386])
    free = marks_displacement(flame, moved.expression - own.expression, [159, 386])
    assert lids < 0.25 * free
    mouth = marks_displacement(flame, result.expression - moved.expression, [61, 291, 13, 14])
    assert mouth < 0.05 * marks_displacement(flame, moved.expression - own.expression, [61, 291, 13, 14])


def marks_displacement(head, expression, chosen):
    marks = head.landmarks[LANDMARK_SET]
    corners = np.einsum("ne,evc->nvc", expression, head.expression_basis)[:, head.faces[marks.face[chosen]]]
    return np.linalg.norm(np.einsum("mk,nmkc->nmc", marks.bary[chosen], corners), axis=-1).mean()


def test_a_head_without_names_and_landmarks_says_what_it_lacks(flame):
    bare = dataclasses.replace(flame, landmarks={})
    with pytest.raises(ControlError, match="embed_landmarks"):
        changed(bare, Controls(lids=0.5))
    with pytest.raises(ControlError, match="embed_landmarks"):
        check_sliders(bare, {"smile": 0.5})
    changed(bare, Controls(pose=0.5, gaze=0.0), {"yaw": 3})


def test_what_is_wrong_with_controls_is_said(head, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for field, value in (("pose", -1), ("lids", float("nan")), ("yaw", float("inf")), ("smooth", -5)):
        with pytest.raises(ControlError, match=field):
            Controls(**{field: value})
    with pytest.raises(ControlError, match="region is 'nose'"):
        Controls(region="nose")
    with pytest.raises(ControlError, match="no slider 'mouthSmyle'.*mouthSmile"):
        check_sliders(head, {"mouthSmyle": 1})
    with pytest.raises(ControlError, match="no slider 'mouth'"):
        check_sliders(head, {"mouth": 1})
    for text in ("smile", "smile=much", "smile=nan"):
        with pytest.raises(ControlError, match="smile"):
            parse_sliders([text])
    assert parse_sliders(["smile=0.5", "yaw=-3"]) == {"smile": 0.5, "yaw": -3.0}
    blind = dataclasses.replace(head, joint_names=("root", "neck", "jaw", "a", "b"))
    with pytest.raises(ControlError, match="no joints of the eyes"):
        changed(blind, Controls(gaze="camera"))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "not a readable JSON"),
        ("{", "not a readable JSON"),
        ("[1, 2]", "expected an object"),
        ('{"smile": "much"}', "expected a number or keyframes"),
        ('{"smile": true}', "expected a number or keyframes"),
        ('{"smile": []}', "expected a number or keyframes"),
        ('{"smile": [[0, 1, 2]]}', "expected a number or keyframes"),
        ('{"smile": [[0, NaN]]}', "expected a number or keyframes"),
        ('{"smile": [[1, 0], [1, 1]]}', "do not rise"),
    ],
)
def test_bad_files_of_sliders_give_one_clear_error(tmp_path, content, message):
    path = tmp_path / "sliders.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ControlError, match=message) as error:
        read_sliders(path)
    assert str(path) in str(error.value)


def test_a_file_of_sliders(tmp_path):
    sliders = {"smile": 0.5, "yaw": [[0, 0], [2.5, 10]]}
    (tmp_path / "s.json").write_text(json.dumps(sliders))
    read = read_sliders(tmp_path / "s.json")
    assert read == sliders and last_keyframe(read) == 2.5 and last_keyframe({"smile": 1}) == 0
