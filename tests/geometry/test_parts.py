"""Parts of the geometry renderer by themselves: textures, outlines, extension of motion."""

import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.geometry.extend import keep_border, push_pull, soft_share
from loki_jax.geometry.outline import (
    distance_inside,
    fill_smoothly,
    nearest_on_line,
    paint_patch,
    patch_corner,
)
from loki_jax.geometry.warp import make_texture, region_positions, sample, sample_grid


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


def test_texture_gives_its_pixels_back(picture):
    texture = make_texture(picture, np.full((24, 40), 0.4))
    values = np.asarray(sample(texture, region_positions(24, 40)))
    assert np.array_equal(values[..., :3], picture)
    assert np.all(values[..., 3] == 102)


def test_texture_continues_beyond_the_border(picture):
    texture = make_texture(picture)
    outside = jnp.array([[-5.0, -3.0], [60.0, 12.5], [10.5, 99.0]])
    expected = picture[[0, 12, 23], [0, 39, 10]].astype(float)
    assert np.abs(np.asarray(sample(texture, outside))[:, :3] - expected).max() <= 40
    assert np.array_equal(np.asarray(sample(texture, outside[:1]))[0, :3], expected[0])


def test_between_pixels_a_smooth_picture_is_interpolated_closely():
    x, y = np.meshgrid(np.arange(48), np.arange(32))
    wave = lambda x, y: 128 + 80 * np.sin(0.5 * x) * np.cos(0.4 * y)
    texture = make_texture(np.repeat(np.rint(wave(x, y)).astype(np.uint8)[..., None], 3, -1))
    place = np.random.default_rng(1).uniform((6, 6), (40, 26), (200, 2)).astype(np.float32)
    found = np.asarray(sample(texture, jnp.asarray(place)))[:, 0]
    truth = wave(place[:, 0] - 0.5, place[:, 1] - 0.5)
    assert np.abs(found - truth).max() < 4


def test_shrinking_smooths(picture):
    texture, position = make_texture(picture), region_positions(24, 40)
    sharp, soft = (np.asarray(sample(texture, position, jnp.full((24, 40), s))) for s in (1.0, 2.0))
    assert np.array_equal(sharp[..., :3], picture)
    assert soft[..., :3].std() < 0.6 * sharp[..., :3].std()


def test_grid_is_interpolated_in_its_box():
    x, y = np.meshgrid(np.arange(8) + 0.5, np.arange(8) + 0.5)
    grid = jnp.asarray(np.stack([10 + 2 * x, 20 + 3 * y], -1), jnp.float32)  # positions in a box 10 20 26 44
    place = jnp.array([[13.0, 25.0], [20.5, 40.1]])
    assert np.allclose(sample_grid(grid, jnp.array([10.0, 20.0, 26.0, 44.0]), place), place, atol=1e-4)


def test_distance_to_an_outline():
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    circle = 5 * np.stack([np.cos(angle), np.sin(angle)], -1) + 10
    place = np.random.default_rng(2).uniform(0, 20, (300, 2))
    expected = 5 - np.linalg.norm(place - 10, axis=-1)
    for outline in (circle, circle[::-1]):
        assert np.abs(np.asarray(distance_inside(place, outline)) - expected).max() < 0.02


def test_nearest_point_of_a_line_and_of_another():
    line, other = np.array([[0.0, 0], [2, 0], [2, 2]]), np.array([[0.0, 5], [4, 5], [4, 9]])
    here, there = nearest_on_line(np.array([[1.0, -1], [3, 1]]), line, other)
    assert np.allclose(here, [[1, 0], [2, 1]], atol=1e-5) and np.allclose(there, [[2, 5], [4, 7]], atol=1e-5)


def test_patches_are_painted_inside_the_picture():
    image = jnp.zeros((20, 30, 4))
    corner = patch_corner(jnp.array([1.0, 19.0]), (8, 8), (30, 20))
    assert tuple(int(x) for x in corner) == (12, 0)
    painted = np.asarray(paint_patch(image, jnp.ones((8, 8, 4)), jnp.full((8, 8), 0.5), corner))
    assert painted[12:, :8].min() == painted.max() == 0.5 and painted.sum() == 0.5 * 8 * 8 * 4


def test_unknown_pixels_are_filled_from_near_ones():
    values = np.zeros((16, 16, 1))
    values[:, :4], values[:, 12:] = 10, 50
    known = np.zeros((16, 16), bool)
    known[:, :4] = known[:, 12:] = True
    filled = fill_smoothly(values, known)[..., 0]
    assert np.allclose(filled[known], values[known, 0])
    assert (np.diff(filled[8, 3:13]) > -1e-6).all() and 20 < filled[8, 8] < 40


def test_extension_keeps_what_is_known_and_fades():
    weight = np.zeros((64, 64), np.float32)
    weight[24:40, 24:40] = 1
    values = jnp.full((64, 64, 2), 7.0)
    found = np.asarray(push_pull(values, jnp.asarray(weight)))
    assert np.allclose(found[24:40, 24:40], 7, atol=1e-4)
    assert 4 < found[22, 32, 0] <= 7.01 and abs(found[2, 2, 0]) < 3
    assert found.max() < 7.01


def test_border_stays_and_the_picture_does_neither_fold_nor_stretch():
    x = np.linspace(0.5, 99.5, 400)
    for shift in (-60.0, -5.0, 5.0, 60.0):
        place = jnp.asarray(np.stack([x, np.full(400, 50.0)], -1), jnp.float32)
        moved = np.asarray(keep_border(place, jnp.full((400, 2), shift), (100, 100)))
        source = x + moved[:, 0]
        assert np.isclose(source[0], 0.5, atol=0.01) and np.isclose(source[-1], 99.5, atol=0.01)
        assert source.min() > 0.49 and source.max() < 99.51 and np.diff(source).min() > 0.33 * (x[1] - x[0])
        if abs(shift) == 5.0:
            assert np.allclose(moved[100:300, 0], shift, rtol=0.01)


def test_soft_limit():
    amount = jnp.linspace(0.0, 100.0, 101)
    limited = np.asarray(amount * soft_share(jnp.full(101, 20.0), amount))
    assert (np.diff(limited) > -1e-4).all() and limited.max() < 20.1
    assert np.allclose(limited[:8], np.arange(8), rtol=0.01)
