"""Properties of rotations, cameras and crops that hold for every input (hypothesis searches for others)."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation

from loki_jax.face.camera import camera_from_world, ndc_from_camera, ndc_from_world, project
from loki_jax.face.crop import crop_and_resize, crop_box
from loki_jax.face.rotation import (
    geodesic_angle,
    matrix_from_rotvec,
    quaternion_from_matrix,
    rotvec_from_matrix,
)
from loki_jax.face.types import Camera

fast = settings(max_examples=40, deadline=None, derandomize=True)

to_matrix, to_rotvec, to_quaternion, angle_between = map(
    jax.jit, (matrix_from_rotvec, rotvec_from_matrix, quaternion_from_matrix, geodesic_angle)
)
to_ndc, world_to_ndc, to_camera = map(jax.jit, (ndc_from_camera, ndc_from_world, camera_from_world))
round_trip_jacobian = jax.jit(jax.jacobian(lambda v: rotvec_from_matrix(matrix_from_rotvec(v))))


def numbers(low: float, high: float):
    """float32 numbers without denormals, which XLA may flush to zero."""
    low, high = float(np.float32(low)), float(np.float32(high))
    return st.floats(low, high, width=32, allow_subnormal=False)


@st.composite
def rotvecs(draw, largest: float = np.pi - 0.01):
    """Rotation vectors at all scales: angles of 1e-12 to `largest` radians, and 0."""
    axis = draw(arrays(np.float64, 3, elements=st.floats(-1, 1).filter(lambda x: abs(x) > 1e-3)))
    angle = draw(st.just(0.0) | st.floats(-12, 0).map(lambda e: 10.0**e) | st.floats(0, largest))
    return (axis / np.linalg.norm(axis) * angle).astype(np.float32)


@fast
@given(rotvecs())
def test_matrices_are_rotations_and_invert(vector):
    matrix = np.asarray(to_matrix(vector))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(matrix.astype(np.float64)) > 0
    np.testing.assert_allclose(to_matrix(-vector), matrix.T, atol=1e-6)
    np.testing.assert_allclose(matrix, Rotation.from_rotvec(vector.astype(float)).as_matrix(), atol=1e-6)
    np.testing.assert_allclose(to_rotvec(matrix), vector, atol=1e-5 / (np.pi - np.linalg.norm(vector)))


@fast
@given(rotvecs(np.pi / 2), rotvecs(np.pi / 2))
def test_products_of_matrices_compose_rotations(a, b):
    product = np.asarray(to_matrix(a)) @ np.asarray(to_matrix(b))
    expected = Rotation.from_rotvec(a.astype(float)) * Rotation.from_rotvec(b.astype(float))
    np.testing.assert_allclose(product, expected.as_matrix(), atol=2e-6)
    quaternion = expected.as_quat(canonical=True, scalar_first=True)
    found = np.asarray(to_quaternion(product))
    assert abs(found @ quaternion) > 1 - 1e-5 and found[0] >= 0
    np.testing.assert_allclose(angle_between(jnp.eye(3), product), expected.magnitude(), atol=1e-5)


@fast
@given(rotvecs(np.pi / 2), rotvecs(np.pi / 2), rotvecs(np.pi / 2))
def test_the_geodesic_angle_is_a_metric_that_rotations_keep(a, b, turn):
    a, b, turn = (np.asarray(to_matrix(vector)) for vector in (a, b, turn))
    angle = float(angle_between(a, b))
    np.testing.assert_allclose(angle_between(b, a), angle, atol=1e-5)
    np.testing.assert_allclose(angle_between(turn @ a, turn @ b), angle, atol=1e-5)
    assert float(angle_between(a, turn)) + float(angle_between(turn, b)) >= angle - 1e-5


@fast
@given(rotvecs(3.0))
def test_the_round_trip_has_the_identity_as_derivative(vector):
    np.testing.assert_allclose(round_trip_jacobian(vector), np.eye(3), atol=2e-4)


@st.composite
def cameras(draw):
    intrinsics = [
        draw(numbers(100, 3000)),
        draw(numbers(100, 3000)),
        draw(numbers(0, 900)),
        draw(numbers(0, 900)),
    ]
    extrinsics = np.eye(4, dtype=np.float32)
    extrinsics[:3, :3] = Rotation.from_rotvec(draw(rotvecs()).astype(float)).as_matrix()
    extrinsics[:3, 3] = draw(arrays(np.float32, 3, elements=numbers(-0.2, 0.2)))
    return Camera(np.array(intrinsics, np.float32), extrinsics)


# In camera axes, half a metre to five metres in front of it.
points_in_view = st.builds(
    lambda xy, z: np.concatenate([xy * z, z], axis=1),
    arrays(np.float32, (6, 2), elements=numbers(-0.4, 0.4)),
    arrays(np.float32, (6, 1), elements=numbers(0.5, 5)),
)

boxes = st.builds(
    lambda x, y, side: np.array([x, y, x + side, y + side], np.float32),
    numbers(-300, 600),
    numbers(-300, 600),
    numbers(20, 900),
)


@fast
@given(cameras(), points_in_view, boxes)
def test_ndc_are_pixels_of_the_crop_box_turned_round(camera, points, box):
    pixels, ndc = np.asarray(project(points, camera)), np.asarray(to_ndc(points, camera, box))
    side = box[2] - box[0]
    back = box[:2] + (1 - ndc[:, :2]) / 2 * side
    np.testing.assert_allclose(back, pixels, atol=1e-3 + 2e-6 * np.abs(pixels).max())
    depth = ndc[:, 2]
    assert (depth > 0).all()
    np.testing.assert_allclose(depth.mean(), camera.intrinsics[:2].mean(), rtol=1e-4)
    # Nearer stays nearer; the crop box does not change the depth.
    order = np.argsort(points[:, 2], kind="stable")
    assert (np.diff(depth[order]) >= 0).all()
    np.testing.assert_array_equal(to_ndc(points, camera, box + np.float32(7))[:, 2], depth)


@fast
@given(cameras(), points_in_view, boxes)
def test_world_points_and_a_camera_moved_together_look_the_same(camera, points, box):
    turn, shift = camera.extrinsics[:3, :3], camera.extrinsics[:3, 3]
    world = ((points - shift) @ turn) * [1, -1, -1]
    world = world.astype(np.float32)
    seen = np.asarray(to_camera(world, camera))
    np.testing.assert_allclose(seen, points, atol=1e-5)
    np.testing.assert_allclose(
        world_to_ndc(world, camera, box), to_ndc(seen, camera, box), rtol=1e-4, atol=1e-3
    )


@fast
@given(points_in_view, boxes, st.floats(0.3, 3), numbers(-200, 200))
def test_scaling_and_shifting_image_and_box_changes_nothing(points, box, scale, shift):
    camera = Camera(np.array([900, 800, 300, 200], np.float32), np.eye(4, dtype=np.float32))
    intrinsics = camera.intrinsics * np.float32(scale)
    intrinsics[2:] += shift
    moved = camera._replace(intrinsics=intrinsics)
    before = np.asarray(to_ndc(points, camera, box))
    after = np.asarray(to_ndc(points, moved, box * np.float32(scale) + shift))
    np.testing.assert_allclose(after[:, :2], before[:, :2], atol=1e-2, rtol=1e-4)
    np.testing.assert_allclose(after[:, 2], before[:, 2] * scale, rtol=1e-5)


@fast
@given(arrays(np.float32, (8, 2), elements=numbers(0, 500)), st.floats(1, 2))
def test_crop_boxes_are_square_centred_and_hold_the_points(pixels, scale):
    box = np.asarray(crop_box(pixels, scale))
    extent = np.ptp(pixels, axis=0).max()
    np.testing.assert_allclose(box[2:] - box[:2], extent * scale, atol=1e-3)
    np.testing.assert_allclose((box[:2] + box[2:]) / 2, (pixels.min(0) + pixels.max(0)) / 2, atol=1e-3)
    assert (pixels >= box[:2] - 1e-3).all() and (pixels <= box[2:] + 1e-3).all()


@fast
@given(boxes, st.integers(4, 40), st.integers(0, 255))
def test_crops_do_not_depend_on_the_frame_around_them(box, size, value):
    """A constant image gives a constant crop, and padding an image with the fill moves nothing."""
    # The same box for both crops: a corner at -1e-33 rounds to a whole pixel where 40 is added to it.
    box = (box.astype(np.float64) + 40) - 40
    flat = np.full((30, 50, 3), value, np.uint8)
    inside = crop_and_resize(flat, box, size, fill=float(value))
    assert inside.shape == (size, size, 3) and inside.dtype == np.uint8 and (inside == value).all()
    image = (np.add.outer(np.arange(30) * 5, np.arange(50) * 2) % 256).astype(np.uint8)[..., None]
    padded = np.pad(image, [(40, 40), (40, 40), (0, 0)], constant_values=255)
    crop = crop_and_resize(image, box, size)
    again = crop_and_resize(padded, box + 40, size)
    assert np.abs(crop.astype(int) - again.astype(int)).max() <= 1
