"""Flow between two poses of a head: identity, a float64 oracle, occlusion, gradients, invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.face.builtin import EYEBALL, builtin_head, builtin_mesh
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.crop import crop_box
from loki_jax.face.rotation import matrix_from_rotvec, rotvec_from_matrix
from loki_jax.face.skinning import (
    head_vertices,
    make_identity,
    mesh_faces,
    mesh_render_mask,
    world_vertices,
)
from loki_jax.face.types import Camera, Coefficients
from loki_jax.flow import (
    DEPTH_TOLERANCE,
    FACING,
    head_flow,
    head_parts,
    normalise_positions,
    pixel_positions,
    sample_image,
)
from tests.flow.oracle import flow_oracle, pose

SIZE = 64
HEAD = builtin_head()
CAMERA = Camera(jnp.array([500.0, 500.0, 200.0, 200.0]), jnp.eye(4))
flow = jax.jit(functools.partial(head_flow), static_argnames=("size", "portrait_size"))


def coefficients(yaw=0.0, pitch=0.0, frames=(), **changes):
    """A head 0.7 m before the camera, turned about the vertical and the horizontal axis (degrees)."""
    still = Coefficients(
        betas=jnp.zeros((*frames, HEAD.n_shape)), expression=jnp.zeros((*frames, HEAD.n_expression)),
        rot=jnp.broadcast_to(jnp.deg2rad(jnp.array([pitch, yaw, 0.0])), (*frames, 3)),
        tra=jnp.broadcast_to(jnp.array([0.0, 0.0, -0.7]), (*frames, 3)),
        neck=jnp.zeros((*frames, 3)), jaw=jnp.zeros((*frames, 3)), eyes=jnp.zeros((*frames, 3)),
    )  # fmt: skip
    return still._replace(**changes)


IDENTITY = make_identity(HEAD, jnp.zeros(HEAD.n_shape))


def box(*poses, camera=CAMERA, scale=1.2):
    """The box around the heads of all poses."""
    pixels = [
        project(camera_from_world(world_vertices(HEAD, IDENTITY, c), camera), camera)[mesh_render_mask(HEAD)]
        for c in poses
    ]
    return crop_box(jnp.concatenate(pixels), scale)


def own_places(crop, size=SIZE):
    """Picture pixels of the pixel centres of a box."""
    crop = np.asarray(crop, np.float64)
    return crop[:2] + (pixel_positions(size).astype(np.float64) + 1) / 2 * (crop[2:] - crop[:2])


def talking(seed, frames=()):
    rng = np.random.default_rng(seed)
    draw = lambda n, scale: jnp.asarray(rng.normal(size=(*frames, n)) * scale, jnp.float32)
    return coefficients(frames=frames)._replace(
        expression=jnp.asarray(rng.uniform(0, 0.6, (*frames, HEAD.n_expression)), jnp.float32),
        rot=draw(3, 0.25), tra=draw(3, 0.02) + jnp.array([0, 0, -0.7]), neck=draw(3, 0.1),
        jaw=jnp.abs(draw(3, 0.15)) * jnp.array([1.0, 0, 0]), eyes=draw(3, 0.1),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_equal_poses_give_the_identity_map(seed):
    given = talking(seed)
    crop = box(given)
    found = flow(HEAD, IDENTITY, given, given, CAMERA, crop, CAMERA, crop, size=128)
    np.testing.assert_allclose(found.position, own_places(crop, 128), atol=1e-4, rtol=0)
    covered = np.asarray(found.coverage) == 1
    assert 0.3 < covered.mean() < 0.7
    np.testing.assert_allclose(found.facing[..., 0], found.facing[..., 1], atol=1e-6)
    turned_to = covered & (np.asarray(found.facing[..., 0]) > FACING[1])
    assert turned_to.sum() > 0.85 * covered.sum()
    np.testing.assert_allclose(np.asarray(found.visibility)[turned_to], 1, atol=1e-3)
    assert not np.asarray(found.visibility)[~covered].any()


def test_the_float64_oracle_agrees():
    """Every pixel of a small picture by rays and triangles; portrait and target have nothing in common."""
    portrait, target = talking(1), talking(2)
    portrait = portrait._replace(rot=portrait.rot + jnp.array([0.0, 0.7, 0.0]))
    closer = Camera(jnp.array([300.0, 330.0, 130.0, 120.0]), jnp.eye(4))
    crop, portrait_crop = box(target), box(portrait, camera=closer)
    size = 40
    found = flow(
        HEAD, IDENTITY, portrait, target, closer, portrait_crop, CAMERA, crop, size=size, portrait_size=160
    )
    meshes = [pose(head_vertices(HEAD, IDENTITY, c), c.rot, c.tra) for c in (portrait, target)]
    truth = flow_oracle(
        *meshes, np.asarray(mesh_faces(HEAD)), CAMERA.intrinsics, closer.intrinsics, np.asarray(crop), size
    )
    face = np.asarray(found.fragments.face)
    masked = np.asarray(mesh_render_mask(HEAD))[np.asarray(mesh_faces(HEAD))].any(-1)
    expected = (truth.face >= 0) & masked[truth.face]
    assert (np.asarray(found.coverage) != expected).mean() < 0.01
    same = (face == truth.face) & (face >= 0)
    assert same.sum() > 0.98 * expected.sum()
    inside = same & (truth.margin > 0.01)
    np.testing.assert_allclose(np.asarray(found.position)[inside], truth.position[inside], atol=2e-3, rtol=0)
    # Hidden or turned away, and well beyond the tolerances: not visible; well within: visible.
    visibility, part = np.asarray(found.visibility), np.asarray(found.eyeball + found.inner_mouth)
    hidden = inside & ((truth.behind > 3 * DEPTH_TOLERANCE) | (truth.facing < -0.3))
    shown = inside & (truth.behind < 1e-5) & (truth.facing > 0.5) & (part == 0)
    assert hidden.sum() > 50 and shown.sum() > 200
    assert (visibility[hidden] < 0.05).mean() > 0.98
    assert (visibility[shown] > 0.95).mean() > 0.98


def test_a_head_turned_by_60_degrees_hides_its_far_cheek():
    portrait, target = coefficients(yaw=60), coefficients()
    crop, portrait_crop = box(target), box(portrait)
    found = flow(HEAD, IDENTITY, portrait, target, CAMERA, portrait_crop, CAMERA, crop, size=SIZE)
    visibility, covered = np.asarray(found.visibility), np.asarray(found.coverage) == 1
    # The face turns to the subject's left, the picture's right, and so does the cheek on that side: away.
    x = (own_places(crop, SIZE)[..., 0] - 200) / 500 * 0.7
    far, near = covered & (x > 0.04), covered & (x < -0.04)
    assert far.sum() > 100 and near.sum() > 100
    assert visibility[far].mean() < 0.1 and visibility[near].mean() > 0.9


@pytest.mark.parametrize("yaw", [25, 40])
def test_the_nose_hides_cheek_that_faces_the_camera(yaw):
    """Occlusion by depth, not by angle: points that face the portrait's camera behind the nose."""
    portrait, target = coefficients(yaw=yaw), coefficients()
    found = flow(HEAD, IDENTITY, portrait, target, CAMERA, box(portrait), CAMERA, box(target), size=128)
    towards = np.asarray(found.facing[..., 0]) > 0.35
    skin = np.asarray(found.eyeball + found.inner_mouth) == 0
    hidden = (np.asarray(found.visibility) < 0.1) & towards & skin & (np.asarray(found.coverage) == 1)
    assert hidden.sum() >= (20 if yaw == 40 else 0)
    assert hidden.sum() < 0.05 * found.coverage.sum()


def test_parts_hidden_by_lids_and_lips_are_not_visible():
    parts = np.asarray(head_parts(HEAD))
    mesh = builtin_mesh()
    np.testing.assert_array_equal(parts[:, 0] == 1, mesh.part == EYEBALL)
    np.testing.assert_array_equal(parts[:, 1] == 1, np.asarray(HEAD.inner_mouth))

    shut = jnp.array(["blink" in name.lower() for name in HEAD.expression_names], jnp.float32)
    assert shut.sum() >= 2
    asleep, awake = coefficients(expression=shut), coefficients(jaw=jnp.array([0.35, 0.0, 0.0]))
    crop = box(asleep, awake)
    closed_to_open = flow(HEAD, IDENTITY, asleep, awake, CAMERA, crop, CAMERA, crop, size=192)
    eyeball, mouth = (np.asarray(x) > 0.9 for x in (closed_to_open.eyeball, closed_to_open.inner_mouth))
    assert eyeball.sum() > 100 and mouth.sum() > 100
    visibility = np.asarray(closed_to_open.visibility)
    assert visibility[eyeball].mean() < 0.05 and visibility[mouth].mean() < 0.1
    open_to_open = flow(HEAD, IDENTITY, awake, awake, CAMERA, crop, CAMERA, crop, size=192)
    visibility = np.asarray(open_to_open.visibility)
    assert visibility[eyeball].mean() > 0.95 and visibility[mouth].mean() > 0.6


@pytest.mark.slow
def test_batches_are_loops():
    """Leading axes of the target, a portrait for each clip, and `jax.vmap` agree with one frame at a time."""
    portraits, targets = talking(3, (2, 1)), talking(4, (2, 3))
    crops = jnp.stack([box(coefficients(), scale=s) for s in (1.3, 1.5)])[:, None]
    one = lambda p, t, crop: head_flow(HEAD, IDENTITY, p, t, CAMERA, crop, CAMERA, crop, 32)
    pick = lambda tree, *at: jax.tree.map(lambda x: x[at], tree)
    one_by_one = jax.jit(one)
    together = jax.jit(one)(portraits, targets, crops)
    mapped = jax.jit(jax.vmap(jax.vmap(one, (None, 0, None))))(
        pick(portraits, slice(None), 0), targets, crops[:, 0]
    )
    for b in range(2):
        for t in range(3):
            alone = one_by_one(pick(portraits, b, 0), pick(targets, b, t), crops[b, 0])
            for many in (together, mapped):
                many = pick(many, b, t)
                assert (many.fragments.face == alone.fragments.face).mean() > 0.998
                same = np.asarray(many.fragments.face == alone.fragments.face)
                for name in ("position", "visibility", "coverage", "inner_mouth", "eyeball", "facing"):
                    x, y = (np.asarray(getattr(v, name))[same] for v in (many, alone))
                    np.testing.assert_allclose(x, y, atol=2e-4, err_msg=name)


def test_gradients_are_those_of_finite_differences():
    """By every field of portrait and target: weighted sums over pixels whose face stays the same."""
    given = {"portrait": talking(5), "target": talking(6)}
    crops = {name: box(c, scale=1.4) for name, c in given.items()}
    rng = np.random.default_rng(7)
    steps = {"expression": 1e-3, "rot": 1e-3, "tra": 2e-4, "jaw": 4e-3, "eyes": 1e-2}
    directions = [
        (side, field, jnp.asarray(rng.normal(size=getattr(c, field).shape), jnp.float32))
        for side, c in given.items()
        for field in steps
    ]

    @jax.jit
    def values(amounts):
        moved = dict(given)
        for amount, (side, field, direction) in zip(amounts, directions, strict=True):
            there = getattr(moved[side], field) + amount * direction
            moved[side] = moved[side]._replace(**{field: there})
        found = head_flow(
            HEAD, IDENTITY, moved["portrait"], moved["target"], CAMERA, crops["portrait"], CAMERA,
            crops["target"], 48,
        )  # fmt: skip
        return jnp.concatenate([found.position, found.facing], -1), found.fragments.face

    slopes = jax.jit(jax.grad(lambda amounts, weight: jnp.sum(weight * values(amounts)[0])))
    still = jnp.zeros(len(directions))
    middle = values(still)[1]
    for index, (side, field, _) in enumerate(directions):
        step = still.at[index].set(steps[field])
        (low, face_low), (high, face_high) = values(-step), values(step)
        steady = (face_low == middle) & (face_high == middle) & (middle >= 0)
        assert steady.mean() > 0.2
        weight = jnp.asarray(rng.normal(size=low.shape), jnp.float32) * steady[..., None]
        expected = float(jnp.sum(weight * (high - low))) / (2 * steps[field])
        found = float(slopes(still, weight)[index])
        np.testing.assert_allclose(found, expected, rtol=2e-2, err_msg=f"{side} {field}")


@pytest.mark.slow
def test_visibility_has_finite_gradients_that_follow_the_portrait():
    portrait, target = coefficients(yaw=40), coefficients(yaw=5)
    crops = box(portrait, scale=1.4), box(target)

    def total(yaw):
        turned = portrait._replace(rot=portrait.rot + jnp.array([0.0, 1.0, 0.0]) * yaw)
        found = head_flow(HEAD, IDENTITY, turned, target, CAMERA, crops[0], CAMERA, crops[1], 64)
        return jnp.sum(found.visibility)

    slope = float(jax.jit(jax.grad(total))(0.0))
    assert np.isfinite(slope) and slope < 0  # turning further away shows less
    difference = (jax.jit(total)(0.05) - jax.jit(total)(-0.05)) / 0.1
    np.testing.assert_allclose(slope, float(difference), rtol=0.25)


def test_crops_and_cameras_change_the_view_and_not_the_correspondence():
    portrait, target = coefficients(yaw=20), coefficients(yaw=-10, pitch=5)
    crop, portrait_crop = box(target), box(portrait)
    plain = flow(HEAD, IDENTITY, portrait, target, CAMERA, portrait_crop, CAMERA, crop, size=SIZE)
    covered = np.asarray(plain.coverage) == 1

    # Another box of the portrait leaves positions in its picture alone.
    wider = portrait_crop + jnp.array([-17.0, -31.0, 12.0, 9.0])
    other = flow(HEAD, IDENTITY, portrait, target, CAMERA, wider, CAMERA, crop, size=SIZE)
    np.testing.assert_allclose(
        np.asarray(other.position)[covered], np.asarray(plain.position)[covered], atol=2e-3
    )
    # A camera of twice the focal length, with a picture and boxes of twice the size: all doubles.
    double = Camera(2 * CAMERA.intrinsics, CAMERA.extrinsics)
    zoomed = flow(HEAD, IDENTITY, portrait, target, double, 2 * portrait_crop, double, 2 * crop, size=SIZE)
    np.testing.assert_allclose(zoomed.position, 2 * np.asarray(plain.position), atol=2e-3)
    np.testing.assert_allclose(zoomed.visibility, plain.visibility, atol=1e-3)
    # The world may be turned and moved as long as the camera goes along.
    turn = jnp.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    flip = jnp.diag(jnp.array([1.0, -1.0, -1.0]))
    extrinsics = jnp.eye(4).at[:3, :3].set(flip @ turn @ flip).at[:3, 3].set(jnp.array([0.1, 0.2, 0.3]))

    def carried(c):
        """The coefficients whose head the turned camera sees as the plain camera sees the head of `c`."""
        rotation = turn.T @ matrix_from_rotvec(c.rot)
        return c._replace(
            rot=rotvec_from_matrix(rotation), tra=turn.T @ (c.tra - flip @ jnp.array([0.1, 0.2, 0.3]))
        )

    moved_camera = Camera(CAMERA.intrinsics, extrinsics)
    moved = flow(
        HEAD, IDENTITY, carried(portrait), carried(target), moved_camera, portrait_crop, moved_camera, crop,
        size=SIZE,
    )  # fmt: skip
    same = np.asarray(moved.fragments.face == plain.fragments.face)
    assert same.mean() > 0.99
    np.testing.assert_allclose(np.asarray(moved.position)[same], np.asarray(plain.position)[same], atol=5e-3)


def test_what_is_outside_the_portraits_box_is_not_visible():
    portrait, target = coefficients(), coefficients(yaw=5)
    crop = box(portrait, target)
    half = jnp.array([crop[0], crop[1], 200.0, crop[1] + 200.0 - crop[0]])  # the left half of the picture
    found = flow(HEAD, IDENTITY, portrait, target, CAMERA, half, CAMERA, crop, size=SIZE)
    normalised = np.asarray(normalise_positions(found.position, half))
    outside = (np.abs(normalised) > 1.05).any(-1)
    assert outside.sum() > 500 and not np.asarray(found.visibility)[outside].any()
    inside = (np.abs(normalised) < 0.8).all(-1) & (np.asarray(found.facing) > 0.4).all(-1)
    assert inside.sum() > 100 and np.asarray(found.visibility)[inside].mean() > 0.95


def test_background_keeps_its_place():
    crop, portrait_crop = jnp.array([0.0, 0.0, 400.0, 400.0]), jnp.array([50.0, 60.0, 350.0, 360.0])
    found = flow(
        HEAD, IDENTITY, coefficients(), coefficients(yaw=30), CAMERA, portrait_crop, CAMERA, crop, size=SIZE
    )
    nothing = np.asarray(found.coverage) == 0
    places = np.asarray(normalise_positions(found.position, portrait_crop))
    np.testing.assert_allclose(places[nothing], pixel_positions(SIZE)[nothing], atol=1e-6)
    for part in (found.visibility, found.eyeball, found.inner_mouth):
        assert not np.asarray(part)[nothing].any()


def test_samples_are_bilinear_and_zero_outside():
    image = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 2)), jnp.float32)
    centres = lambda n: (2 * np.arange(n) + 1 - n) / n
    x, y = np.meshgrid(centres(6), centres(4))
    np.testing.assert_allclose(sample_image(image, jnp.asarray(np.stack([x, y], -1))), image, atol=1e-6)
    between = jnp.array([centres(6)[2:4].mean(), centres(4)[1:3].mean()])
    np.testing.assert_allclose(
        sample_image(image, between[None, None])[0, 0], image[1:3, 2:4].mean((0, 1)), atol=1e-6
    )
    far = jnp.array([[-1.2, 0.0], [0.0, 1.3], [5.0, 5.0]])
    assert not np.asarray(sample_image(image, far[None])).any()
