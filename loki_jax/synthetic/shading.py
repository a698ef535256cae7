"""Pictures of meshes: one shader, and the renderer of painted heads.

Light is computed at the vertices and interpolated. Everything is differentiable, except through
silhouettes (see `loki_jax.raster`). Vertices are in the world frame (metres, +y up).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from loki_jax.arrays import ArrayLike
from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import ndc_from_world
from loki_jax.face.normals import vertex_normals
from loki_jax.face.skinning import Identity, mesh_faces, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.raster import downsample, interpolate, rasterize
from loki_jax.raster.fragments import Faces
from loki_jax.synthetic.appearance import Appearance

_HIGHEST = jax.lax.Precision.HIGHEST


def lambert(normals: Float[Array, "*b V 3"], light: Float[ArrayLike, "*#b 3"]) -> Float[Array, "*b V"]:
    """Share of a lamp's light that a surface receives, in [0, 1]; `light` is the unit vector to the lamp."""
    facing = jnp.einsum("...vi,...i->...v", normals, light, precision=_HIGHEST)
    return jnp.maximum(facing, 0.0)


def plain_shade(
    vertices: Float[ArrayLike, "*b V 3"], faces: Faces, light: tuple[float, float, float]
) -> Float[Array, "*b V"]:
    """Grey of a white mesh in [0.25, 1]: one lamp in the direction `light`, a quarter from everywhere."""
    direction = jnp.asarray(light)
    normals = vertex_normals(vertices, faces)
    return 0.25 + 0.75 * lambert(normals, direction / jnp.linalg.norm(direction))


def shade_mesh(
    vertices: Float[ArrayLike, "*b V 3"],
    faces: Faces,
    colour: Float[ArrayLike, "*#b V C"],
    camera: Camera,
    crop: Float[ArrayLike, "*#b 4"],
    size: int,
    supersample: int = 2,
    background: Float[ArrayLike, "*#b fine fine C"] | float = 0.0,
) -> Float[Array, "*b S S C"]:
    """A mesh with the given colours of its vertices over a background.

    Args:
      vertices: world frame, metres.
      colour, camera, crop: leading axes broadcast to those of `vertices`.
      crop: box (x0, y0, x1, y1) in pixels of the uncropped frame that becomes the image.
      size: S, side of the image in pixels; pixels are means over `supersample`^2 samples.
      background: of the samples, fine = S `supersample`.

    Raises:
      ValueError: sizes are not positive.
    """
    batch = vertices.shape[:-2]
    camera = Camera(
        jnp.broadcast_to(camera.intrinsics, (*batch, 4)), jnp.broadcast_to(camera.extrinsics, (*batch, 4, 4))
    )
    crop = jnp.broadcast_to(crop, (*batch, 4))
    ndc = ndc_from_world(vertices, camera, crop)
    fragments = rasterize(ndc, faces, size * supersample)
    colour = jnp.broadcast_to(colour, (*vertices.shape[:-1], colour.shape[-1]))
    foreground = interpolate(fragments, faces, colour)
    return downsample(jnp.where(fragments.covered[..., None], foreground, background), supersample)


def render(
    head: HeadAsset,
    identity: Identity,
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[ArrayLike, "*#b 4"],
    appearance: Appearance,
    size: int,
    supersample: int = 2,
) -> Float[Array, "*b S S 3"]:
    """Lambertian renders of the whole head, neck and shoulders, in [0, 1].

    All leading axes `*b` must broadcast to those of the coefficients. Differentiable in coefficients and
    appearance, except through silhouettes.

    Args:
      crop: box (x0, y0, x1, y1) in pixels of the uncropped frame that becomes the image.
      size: S, side of the image in pixels; pixels are means over `supersample`^2 samples.

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
    colour = _lit_colour(vertices, faces, appearance)
    background = _background(appearance, size * supersample)
    image = shade_mesh(vertices, faces, colour, camera, crop, size, supersample, background)
    return jnp.clip(image, 0.0, 1.0)


def _lit_colour(vertices, faces, appearance: Appearance) -> Float[ArrayLike, "*b V 3"]:
    normals = vertex_normals(vertices, faces)
    direct = lambert(normals, appearance.light)
    # Light from everywhere is a little stronger from above.
    sky = 0.88 + 0.12 * normals[..., 1:2]
    light = appearance.ambient[..., None, :] * sky + appearance.diffuse[..., None, :] * direct[..., None]
    return appearance.albedo * light


def _background(appearance: Appearance, size: int) -> Float[ArrayLike, "*b size size 3"]:
    axis = 1.0 - (2.0 * jnp.arange(size) + 1.0) / size
    wave = appearance.background_wave[..., None, None, :]
    blend = 0.5 + 0.5 * jnp.sin(wave[..., 0] * axis[None, :] + wave[..., 1] * axis[:, None] + wave[..., 2])
    first, second = (appearance.background[..., k, None, None, :] for k in range(2))
    return first + blend[..., None] * (second - first)
