"""Head-expression follow: parity with the public metric, and what it is meant to (not) see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.face.builtin import builtin_head
from loki_jax.face.camera import camera_from_world, ndc_from_camera, project
from loki_jax.face.crop import crop_box
from loki_jax.face.types import Camera, Coefficients
from loki_jax.metrics.hef import (
    expression_maps,
    head_expression_follow,
    masked_l1,
    offset_distance,
    offset_map,
)
from tests.face.public_flame_oracle import PublicFlame, rigid


@pytest.mark.parametrize("case", range(3))
def test_masked_l1_golden(golden, case):
    data = np.load(golden / "metrics.npz")
    prediction, target, mask, expected = (
        data[f"masked_l1/{case}/{name}"] for name in ("pred", "target", "mask", "out")
    )
    assert float(masked_l1(prediction, target, mask)) == pytest.approx(float(expected), rel=1e-6)


def public_meshes(golden, data, case):
    """World vertices, offsets and faces of the target's and the swapped mesh, in the public FLAME variant."""
    model, sphere = (
        np.load(golden / "flame_model.npz"),
        np.load(golden / "flame_io.npz")["mouth_sphere_vertices"],
    )

    def get(side, name):
        key = f"expr/{case}/{side}/{name}"
        return data[key] if key in data else np.zeros((len(data[f"expr/{case}/{side}/expr"]), 3), np.float32)

    length = int(data[f"expr/{case}/n_frames"])
    flame = PublicFlame(model, get("target", "shape"), blink=data["expr/blink"])
    mouth, _ = flame.mouth(sphere)

    def mesh(performer):
        posed = flame.posed(
            get(performer, "expr")[:length],
            get("target", "neck_rot")[:length],
            get(performer, "jaw_rot")[:length],
            get(performer, "eye_rot")[:length],
        )
        motion = get("target", "rot")[:length], get("target", "tra")[:length]
        world = np.concatenate([rigid(posed, *motion), rigid(mouth, *motion)], axis=1)
        offsets = np.concatenate([posed - flame.neutral, np.zeros((length, 200, 3))], axis=1)
        return world.astype(np.float32), offsets.astype(np.float32)

    intrinsics = np.concatenate([get("target", name)[0] for name in ("fx", "fy", "cx", "cy")])
    camera = Camera(
        np.broadcast_to(intrinsics, (length, 4)), np.broadcast_to(get("target", "extr")[0], (length, 4, 4))
    )
    return mesh("target"), mesh("pred"), camera


@pytest.mark.parametrize("case", range(3))
def test_golden(golden, case):
    data = np.load(golden / "metrics.npz")
    (target, target_offsets), (swapped, swapped_offsets), camera = public_meshes(golden, data, case)
    faces = data["expr/template_faces"]
    mask = np.isin(np.arange(target.shape[1]), data["expr/head_vertex_ids"])
    mask[-200:] = True  # the inner mouth always belongs to the head
    points = camera_from_world(target, camera)
    box = crop_box(project(points, camera)[:, mask], integer=True)
    np.testing.assert_array_equal(np.asarray(box[0]), data[f"expr/{case}/frame0/crop_box"])
    ndc = ndc_from_camera(points, camera, box)
    swapped_ndc = ndc_from_camera(camera_from_world(swapped, camera), camera, box)

    image, covered = jax.jit(offset_map, static_argnames="size")(
        ndc[0], target_offsets[0], faces, mask, size=96
    )
    expected = data[f"expr/{case}/frame0/deform_target"]
    np.testing.assert_allclose(image, expected, atol=1e-3)
    np.testing.assert_array_equal(covered, data[f"expr/{case}/frame0/mask_target"])

    distance, bare = jax.jit(offset_distance, static_argnames="size")(
        ndc, target_offsets, swapped_ndc, swapped_offsets, faces, mask, size=96
    )
    np.testing.assert_allclose(distance, data[f"expr/{case}/l1_per_frame"], rtol=1e-3)
    assert float(distance.mean()) == pytest.approx(float(data[f"expr/{case}/l1"]), rel=1e-3)
    public_bare = data[f"expr/{case}/frame0/mask_target"] & ~data[f"expr/{case}/frame0/mask_swapped"]
    assert float(bare[0]) == pytest.approx(public_bare.sum() / np.asarray(covered).sum(), abs=1e-6)


@pytest.fixture(scope="module")
def head():
    return jax.tree.map(jnp.asarray, builtin_head())


CAMERA = Camera(np.array([1300.0, 1300, 256, 256], np.float32), np.eye(4, dtype=np.float32))


def driving_clip(head, n=3, **weights):
    zeros = np.zeros((n, 3), np.float32)
    expression = np.zeros((n, head.n_expression), np.float32)
    for name, value in weights.items():
        expression[:, head.expression_names.index(name)] = value
    tra = zeros + np.float32([0, 0, -1.1])
    return Coefficients(np.zeros((n, head.n_shape), np.float32), expression, zeros, tra, zeros, zeros, zeros)


def follow(head, prediction, target, **options):
    return head_expression_follow(head, prediction, target, CAMERA, size=64, **options)


def test_equal_expressions_have_distance_zero(head):
    target = driving_clip(head, jawOpen=0.7, mouthSmileLeft=0.4)
    result = follow(head, target, target)
    assert result.distance == 0 and result.uncovered == 0 and result.n_frames == 3


def test_grows_with_the_error(head):
    target = driving_clip(head, jawOpen=0.8)
    distances = [follow(head, driving_clip(head, jawOpen=x), target).distance for x in (0.6, 0.4, 0.0)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_sees_jaw_and_eyes(head):
    target = driving_clip(head)
    opened = target._replace(jaw=target.jaw + np.float32([0.3, 0, 0]))
    glancing = target._replace(eyes=target.eyes + np.float32([0, 0.4, 0]))
    assert follow(head, opened, target).distance > 0.05
    assert follow(head, glancing, target).distance > 1e-3


def test_blind_to_pose_shape_and_neck(head):
    target = driving_clip(head, jawOpen=0.5, browInnerUp=0.6)
    other = target._replace(
        rot=target.rot + np.float32([0.2, -0.4, 0.1]),
        tra=target.tra * 1.5,
        neck=target.neck + np.float32(0.2),
        betas=target.betas + np.float32(0.8),
    )
    assert follow(head, other, target).distance == 0


def test_neck_of_the_target_does_not_enter_the_offsets(head):
    prediction, target = driving_clip(head), driving_clip(head, jawOpen=0.5)
    bent = target._replace(neck=target.neck + np.float32([0, 0.15, 0]))
    plain, turned = (follow(head, prediction, t).distance for t in (target, bent))
    # The same offsets seen from another side: with the neck inside they would be several times larger.
    assert turned == pytest.approx(plain, rel=0.25)


def test_frames_are_common_ones(head):
    long, short = driving_clip(head, n=5, jawOpen=0.5), driving_clip(head, n=2)
    assert follow(head, short, long).n_frames == 2
    assert follow(head, long, long, n_frames=4).n_frames == 4
    nothing = jax.tree.map(lambda x: x[:0], short)
    assert follow(head, nothing, long).distance is None


def test_foreign_coefficients_are_named(head):
    target = driving_clip(head)
    with pytest.raises(ValueError, match="prediction has expression"):
        follow(head, target._replace(expression=target.expression[:, :-1]), target)


def test_maps_are_what_hef_compares(head):
    prediction, target = driving_clip(head, mouthSmileLeft=0.5), driving_clip(head, jawOpen=0.8)
    maps = expression_maps(head, prediction, target, CAMERA, size=64)
    per_frame = [
        np.abs(swapped - wanted).mean(-1)[mask].mean() for wanted, swapped, mask in zip(*maps, strict=True)
    ]
    np.testing.assert_allclose(per_frame, follow(head, prediction, target).per_frame, rtol=1e-5)
    with pytest.raises(ValueError, match="no frame"):
        expression_maps(head, jax.tree.map(lambda x: x[:0], prediction), target, CAMERA, size=64)
