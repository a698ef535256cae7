"""From world to camera axes, pixels and the rasteriser's coordinates (method, sections 3 and 4)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from loki_jax.arrays import ArrayLike
from loki_jax.face.types import Camera

_HIGHEST = jax.lax.Precision.HIGHEST

# Turns the world's axes (y up, z towards the viewer) into OpenCV's (y down, z away).
_OPENCV_FROM_WORLD = np.array([1.0, -1.0, -1.0], np.float32)
_SMALLEST_DEPTH = 1e-8


@functools.partial(jax.jit, inline=True)
def camera_from_world(points: Float[ArrayLike, "*b n 3"], camera: Camera) -> Float[Array, "*b n 3"]:
    """World points in OpenCV camera axes: diag(1, -1, -1), then the extrinsics. Metres."""
    rotation, offset = camera.extrinsics[..., :3, :3], camera.extrinsics[..., :3, 3]
    turned = jnp.einsum("...ik,...nk->...ni", rotation, points * _OPENCV_FROM_WORLD, precision=_HIGHEST)
    return turned + offset[..., None, :]


@functools.partial(jax.jit, inline=True)
def project(points: Float[ArrayLike, "*b n 3"], camera: Camera) -> Float[Array, "*b n 2"]:
    """Pixels (x right, y down, origin at the image's top-left corner) of points in camera axes.

    Points in the camera plane are moved off it by 1e-8 m, so that the result stays finite; points
    behind the camera give mirrored pixels and are the caller's to drop.
    """
    depth = points[..., 2:]
    depth = jnp.where(jnp.abs(depth) < _SMALLEST_DEPTH, _SMALLEST_DEPTH, depth)
    intrinsics = camera.intrinsics[..., None, :]
    return jnp.asarray(points[..., :2] / depth) * intrinsics[..., :2] + intrinsics[..., 2:]


@functools.partial(jax.jit, inline=True)
def ndc_from_camera(
    points: Float[ArrayLike, "*#b V 3"], camera: Camera, crop: Float[ArrayLike, "*#b 4"]
) -> Float[Array, "*b V 3"]:
    """The rasteriser's coordinates of mesh vertices given in camera axes.

    x and y are +left and +up, [-1, 1] over the crop box (x0, y0, x1, y1 in pixels); the third is the
    depth over its mean over the mesh times the mean focal length, positive in front of the camera.
    """
    pixels = project(points, camera)
    crop = crop[..., None, :]
    corner, size = crop[..., :2], crop[..., 2:] - crop[..., :2]
    position = -((pixels - corner) / size * 2 - 1)
    depth = points[..., 2:]
    focal = jnp.mean(camera.intrinsics[..., :2], axis=-1)[..., None, None]
    return jnp.concatenate([position, depth / jnp.mean(depth, axis=-2, keepdims=True) * focal], axis=-1)


def ndc_from_world(
    points: Float[ArrayLike, "*#b V 3"], camera: Camera, crop: Float[ArrayLike, "*#b 4"]
) -> Float[Array, "*b V 3"]:
    """`ndc_from_camera` of mesh vertices in the world frame, metres."""
    return ndc_from_camera(camera_from_world(points, camera), camera, crop)
