from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, ndc_from_camera
from loki_jax.face.skinning import Identity, mesh_faces, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.raster.api import rasterize
from loki_jax.raster.fragments import interpolate
from loki_jax.synthetic.appearance import Appearance

_HIGHEST = jax.lax.Precision.HIGHEST


def vertex_normals(vertices: Float[Array, "*b V 3"], faces) -> Float[Array, "*b V 3"]:
    """Unit normals: the mean of the adjacent faces' normals, weighted by their area."""
    a, b, c = (vertices[..., faces[:, k], :] for k in range(3))
    face_normals = jnp.cross(b - a, c - a)
    total = jnp.zeros_like(vertices)
    for k in range(3):
        total = total.at[..., faces[:, k], :].add(face_normals)
    return total * jax.lax.rsqrt(jnp.sum(total * total, axis=-1, keepdims=True) + 1e-24)


def render(
    head: HeadAsset,
    identity: Identity,
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[Array, "*b 4"],
    appearance: Appearance,
    size: int,
    supersample: int = 2,
) -> Float[Array, "*b S S 3"]:
    """Lambertian renders of the whole head, neck and shoulders, in [0, 1].

    All leading axes `*b` must broadcast to those of the coefficients. Shading is computed at the
    vertices of the posed mesh and interpolated; pixels are means over `supersample`^2 samples.
    Differentiable in coefficients and appearance, except through silhouettes (see `raster`).

    Args:
      crop: box (x0, y0, x1, y1) in pixels of the uncropped frame that becomes the image.

    Raises:
      ValueError: the appearance belongs to a mesh with another number of vertices.
    """
    faces = mesh_faces(head)
    vertices = world_vertices(head, identity, coefficients)
    if appearance.albedo.shape[-2] != vertices.shape[-2]:
        raise ValueError(
            f"appearance has {appearance.albedo.shape[-2]} vertex colours, "
            f"head {head.name!r} has {vertices.shape[-2]} vertices"
        )
    batch = vertices.shape[:-2]
    colour = _shade(vertices, faces, appearance)
    camera = Camera(
        jnp.broadcast_to(camera.intrinsics, (*batch, 4)), jnp.broadcast_to(camera.extrinsics, (*batch, 4, 4))
    )
    crop = jnp.broadcast_to(crop, (*batch, 4))
    ndc = ndc_from_camera(camera_from_world(vertices, camera), camera, crop)
    fine = size * supersample
    fragments = rasterize(ndc, faces, fine)
    foreground = interpolate(fragments, faces, jnp.broadcast_to(colour, vertices.shape))
    covered = (fragments.face >= 0)[..., None]
    image = jnp.where(covered, foreground, _background(appearance, fine))
    image = image.reshape(*batch, size, supersample, size, supersample, 3).mean((-4, -2))
    return jnp.clip(image, 0.0, 1.0)


def _shade(vertices, faces, appearance):
    normals = vertex_normals(vertices, faces)
    facing = jnp.einsum("...vi,...i->...v", normals, appearance.light, precision=_HIGHEST)
    # Light from everywhere is a little stronger from above.
    sky = 0.88 + 0.12 * normals[..., 1:2]
    light = (
        appearance.ambient[..., None, :] * sky
        + appearance.diffuse[..., None, :] * jnp.maximum(facing, 0.0)[..., None]
    )
    return appearance.albedo * light


def _background(appearance, size):
    axis = 1.0 - (2.0 * jnp.arange(size) + 1.0) / size
    wave = appearance.background_wave[..., None, None, :]
    blend = 0.5 + 0.5 * jnp.sin(wave[..., 0] * axis[None, :] + wave[..., 1] * axis[:, None] + wave[..., 2])
    first, second = (appearance.background[..., k, None, None, :] for k in range(2))
    return first + blend[..., None] * (second - first)
