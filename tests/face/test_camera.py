"""Projection, crop boxes and image crops against the public code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.face.camera import camera_from_world, ndc_from_camera, project
from loki_jax.face.crop import crop_and_resize, crop_box
from loki_jax.face.types import Camera


@pytest.fixture(scope="module")
def given(golden):
    with np.load(golden / "projection_crop.npz") as file:
        return {key: file[key] for key in file.files}


def camera(given, index):
    intrinsics = np.concatenate([given[f"project/{key}"][index] for key in ("fx", "fy", "cx", "cy")])
    return Camera(jnp.asarray(intrinsics), jnp.asarray(given["project/extr"][index]))


@pytest.mark.parametrize("index", [0, 1])
def test_projection_and_ndc(given, index):
    view = camera(given, index)
    points = camera_from_world(jnp.asarray(given["project/verts_3d"]), view)
    expected = given["project/verts_2d"][index]
    pixels = project(points, view)
    np.testing.assert_allclose(pixels, expected[..., :2], rtol=1e-6, atol=1e-4)

    boxes = given["bbox/boxes"][index].astype(np.float32)
    ndc = ndc_from_camera(points, view, jnp.asarray(boxes))
    np.testing.assert_allclose(ndc, given["bbox/verts_ndc"][index], rtol=1e-6, atol=1e-6)

    head = np.asarray(expected)[..., :2][:, given["bbox/head_vert_ids"]]
    np.testing.assert_array_equal(crop_box(jnp.asarray(head), integer=True), boxes)


def test_axes_turn_the_world_over():
    view = Camera(jnp.array([100.0, 100.0, 50.0, 50.0]), jnp.eye(4))
    point = jnp.array([[0.1, 0.2, -2.0]])  # to the subject's left, up, two metres away
    seen = camera_from_world(point, view)
    np.testing.assert_allclose(seen, [[0.1, -0.2, 2.0]], rtol=1e-6)
    np.testing.assert_allclose(project(seen, view), [[55.0, 40.0]], rtol=1e-6)


def test_integer_boxes(given):
    corners = given["square_bbox/in_f64"].reshape(-1, 2, 2).astype(np.float32)
    found = crop_box(jnp.asarray(corners), integer=True)
    np.testing.assert_array_equal(found, given["square_bbox/out_margin0.2_max"])


def test_floating_boxes_are_square_and_move_with_the_head():
    pixels = jnp.asarray(np.random.default_rng(0).uniform(0, 300, (2, 40, 2)), jnp.float32)
    box = np.asarray(crop_box(pixels))
    width, height = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
    longer = np.ptp(np.asarray(pixels), axis=1).max(-1)
    np.testing.assert_allclose(width, 1.2 * longer, rtol=1e-5)
    np.testing.assert_allclose(height, width, rtol=1e-5)
    np.testing.assert_allclose(crop_box(pixels + 0.37), box + 0.37, atol=1e-4)


def test_points_in_the_camera_plane_stay_finite():
    view = Camera(jnp.array([100.0, 100.0, 50.0, 50.0]), jnp.eye(4))
    points = jnp.array([[0.1, 0.1, 0.0], [0.1, 0.1, 1.0]])
    assert np.isfinite(np.asarray(project(points, view))).all()
    gradient = jax.grad(lambda p: project(p, view)[1].sum())(points)
    assert np.isfinite(np.asarray(gradient)).all() and np.asarray(gradient)[1].any()


@pytest.mark.parametrize("index", range(6))
def test_image_crops(given, index):
    image, box = given["crop/image_u8"], given["crop/boxes_x0y0x1y1"][index]
    side = int(box[2] - box[0])
    np.testing.assert_array_equal(crop_and_resize(image, box, side), given[f"crop/{index}_crop"])
    for size in (32, 64, 128):
        found = crop_and_resize(image, box, size).astype(int)
        assert np.abs(found - given[f"crop/{index}_rescale{size}"]).max() <= 1  # OpenCV's fixed point
    for size, step in ((32, 1), (128, 2)):  # of the larger crop, every second pixel was kept
        found = crop_and_resize(image.astype(np.float32), box, size)[::step, ::step]
        np.testing.assert_allclose(found, given[f"crop/{index}_rescale{size}_f32"], atol=1e-3)


@pytest.mark.parametrize("size", [16, 60])
def test_fractional_crops_follow_a_linear_ramp(size):
    ramp = np.broadcast_to(np.arange(50, dtype=np.float32)[None, :, None] + 0.5, (50, 50, 1))
    x0, x1 = 7.3, 31.9
    found = crop_and_resize(ramp, np.array([x0, 5.1, x1, 29.7]), size)
    expected = x0 + (np.arange(size) + 0.5) * (x1 - x0) / size  # the ramp's value is its position
    inside = slice(2, -2)
    # The area filter takes pixels for constant squares, which moves its mean a little.
    atol = 0.13 if size < x1 - x0 else 1e-4
    np.testing.assert_allclose(found[:, inside, 0], np.tile(expected[inside], (size, 1)), atol=atol)
    whole = crop_and_resize(ramp, np.array([x0, 5.1, x1, 29.7]) + 1, size)
    np.testing.assert_allclose(whole[:, inside], found[:, inside] + 1, atol=1e-3)


def test_crop_outside_the_image_is_white_and_empty_boxes_are_refused():
    image = np.zeros((8, 8, 3), np.uint8)
    assert (crop_and_resize(image, np.array([-40, -40, -20, -20]), 4) == 255).all()
    assert (crop_and_resize(image, np.array([100, 0, 120, 20]), 4) == 255).all()
    with pytest.raises(ValueError, match="cannot crop box"):
        crop_and_resize(image, np.array([5, 5, 5, 9]), 4)
