"""The light of a portrait, and skin that brightens as it turns."""

import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.geometry.light import Light, change_of_light, fit_light, harmonics


@pytest.fixture
def sphere():
    """A lit ball in a picture: its picture, the pixels, normals and brightness of points on its front."""
    rng = np.random.default_rng(0)
    coefficients = np.array([4.8, 0.2, -0.15, -0.1, 0.0, 0.03, 0.05, 0.0, -0.02])
    size, radius = 200, 80
    y, x = (np.mgrid[:size, :size] + 0.5 - size / 2) / radius
    depth = np.sqrt(np.clip(1 - x**2 - y**2, 0, 1))
    normals = np.stack([x, y, -depth], -1).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    grey = np.exp(np.asarray(harmonics(normals)) @ coefficients)
    picture = np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, -1)
    inside = np.argwhere(depth > 0.5)
    chosen = inside[rng.choice(len(inside), 600, replace=False)]
    return picture, chosen[:, ::-1] + np.float32(0.5), normals[tuple(chosen.T)], coefficients


def test_the_light_of_a_ball_is_found(sphere):
    picture, pixels, normals, true = sphere
    picture = picture.copy()
    picture[120:130, 60:140] = 10  # a moustache
    light = fit_light(picture, pixels, normals, np.ones(len(pixels), bool), 40.0)
    turned = normals[:, [0, 2, 1]] * np.array([1, -1, 1], np.float32)  # a quarter turn about x
    near = turned[:, 2] < -0.5  # those that a front view shows
    found = change_of_light(light, jnp.asarray(turned))
    expected = change_of_light(Light(true.astype(np.float32), normals), jnp.asarray(turned))
    assert np.abs(np.asarray(found - expected))[near].mean() < 0.06
    assert np.abs(np.asarray(expected))[near].mean() > 0.15


def test_nothing_changes_without_a_turn_or_without_skin(sphere):
    picture, pixels, normals, _ = sphere
    light = fit_light(picture, pixels, normals, np.ones(len(pixels), bool), 40.0)
    assert not np.asarray(change_of_light(light, jnp.asarray(normals))).any()
    for skin, shift in ((np.zeros(len(pixels), bool), 0.0), (np.ones(len(pixels), bool), 500.0)):
        unknown = fit_light(picture, pixels + np.float32(shift), normals, skin, 40.0)
        assert not np.asarray(change_of_light(unknown, jnp.asarray(-normals))).any()
