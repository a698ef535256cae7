"""The light on a portrait, and how the skin brightens as the head turns in it (method, section 18).

The logarithm of the skin's brightness is fitted by spherical harmonics of the normal up to order two, which
suffice for a matt surface in distant light (Ramamoorthi and Hanrahan 2001, who state it for the brightness
itself). Skin of one colour is assumed; beards, brows and shadows of the nose are outliers of the fit.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from jaxtyping import Array, Bool, Float, UInt8

from loki_jax.arrays import ArrayLike

_PRIOR = 0.02  # of squared coefficients of order one and two beside the mean squared residual
_OUTLIER = 0.15  # residual of the logarithm from which on a point counts less
_LIMIT = 0.5  # change of the logarithm that is never reached: a factor of 1.65


class Light(NamedTuple):
    """The light of a portrait.

    Attributes:
      coefficients: of `harmonics`, for the logarithm of brightness.
      normals: of the vertices in the portrait, unit vectors in camera axes.
    """

    coefficients: Float[ArrayLike, " 9"]
    normals: Float[ArrayLike, "V 3"]


def fit_light(
    picture: UInt8[np.ndarray, "h w 3"],
    pixels: Float[np.ndarray, "V 2"],
    normals: Float[np.ndarray, "V 3"],
    skin: Bool[np.ndarray, " V"],
    radius: float,
) -> Light:
    """The light of a portrait, from the vertices of its head.

    Args:
      picture: RGB.
      pixels: of the vertices.
      normals: of the vertices, unit vectors in camera axes.
      skin: vertices that show skin to the camera. Fewer than 50 within the picture say nothing: the light
        then is the same from everywhere.
      radius: of the head, pixels.
    """
    grey = scipy.ndimage.gaussian_filter(picture.mean(-1, dtype=np.float32), 0.03 * radius)
    place = np.floor(pixels).astype(int)
    seen = skin & np.all((place >= 0) & (place < np.array(grey.shape[::-1])), axis=-1)
    if seen.sum() < 50:
        return Light(np.zeros(9, np.float32), normals)
    values = np.log(np.maximum(grey[place[seen, 1], place[seen, 0]], 8.0)).astype(np.float64)
    basis = np.asarray(harmonics(normals[seen]), np.float64)
    prior = _PRIOR * np.diag([0.0, *[1.0] * 8])
    weight = np.ones(len(values))
    for _ in range(5):
        weighted = basis * (weight / weight.sum())[:, None]
        coefficients = np.linalg.solve(weighted.T @ basis + prior, weighted.T @ values)
        residual = np.abs(values - basis @ coefficients)
        weight = np.minimum(1.0, _OUTLIER / np.maximum(residual, 1e-9))
    return Light(coefficients.astype(np.float32), normals)


def harmonics(normals: Float[ArrayLike, "*b 3"]) -> Float[Array, "*b 9"]:
    """Spherical harmonics of unit vectors up to order two, without their constant factors."""
    x, y, z = (jnp.asarray(normals)[..., k] for k in range(3))
    one = jnp.ones_like(x)
    return jnp.stack([one, x, y, z, x * y, y * z, x * z, x * x - y * y, 3 * z * z - 1], axis=-1)


def change_of_light(light: Light, normals: Float[Array, "V 3"]) -> Float[Array, " V"]:
    """Change of the logarithm of brightness, softly limited to half a unit either way.

    Args:
      normals: of the vertices in the target, unit vectors in camera axes.
    """
    change = (harmonics(normals) - harmonics(light.normals)) @ light.coefficients
    return _LIMIT * jnp.tanh(change / _LIMIT)
