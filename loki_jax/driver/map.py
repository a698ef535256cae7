"""The driver map: head coefficients as an image the generation network can read (method, section 5).

Channels of the full map, zero wherever the head is not seen:
  0..41   sines and cosines of the *canonical template position* of the surface point. For axis
          c = 0, 1, 2 and k = 0..6: channel 14 c + k is sin(2^k p_c), channel 14 c + 7 + k is
          cos(2^k p_c). The values name the point of the head; pose shows in where they land.
  42..44  the point's displacement by expression, jaw and eyes, over 0.0104 m.

Ablation arms: "full" (45 channels), "no_posenc" (the last 3), "no_deform" (the first 42). The fourth
arm has no map: `flame_vector` gives its numbers.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from loki_jax.driver.encoding import canonical_positions, encode_fragments
from loki_jax.driver.registry import driver_channels
from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, ndc_from_camera
from loki_jax.face.skinning import (
    Identity,
    expression_offsets,
    mesh_faces,
    mesh_render_mask,
    template_vertices,
    world_vertices,
)
from loki_jax.face.types import Camera, Coefficients
from loki_jax.raster.fragments import clear_hidden_faces, locate
from loki_jax.raster.search import nearest_faces

_PIXELS_AT_ONCE = 2**20


def ndc_vertices(
    head: HeadAsset,
    identity: Identity,
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[Array, "*b 4"],
) -> Float[Array, "*b V_all 3"]:
    """The posed mesh in the rasteriser's coordinates for a crop box x0, y0, x1, y1 in pixels."""
    world = world_vertices(head, identity, coefficients)
    return ndc_from_camera(camera_from_world(world, camera), camera, crop)


def driver_map(
    head: HeadAsset,
    identity: Identity,
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[Array, "*b 4"],
    size: int,
    arm: str = "full",
    dtype=jnp.float32,
) -> Float[Array, "*b S S C"]:
    """The driver map of every frame in the leading axes of `coefficients`.

    The whole mesh is rasterised so that it occludes; faces without a vertex in the render mask are
    then cleared.

    Args:
      head: the head asset.
      identity: from `make_identity`; its leading axes broadcast against those of `coefficients`.
      coefficients: expression, pose and rigid motion, metres and radians.
      camera: of the uncropped frame; leading axes broadcast.
      crop: box x0, y0, x1, y1 in pixels that fills the map; leading axes broadcast.
      size: S, side of the map in pixels.
      arm: "full", "no_posenc" or "no_deform".
      dtype: of the result; the arithmetic is float32 throughout.

    Returns:
      C = `driver_channels(arm)` channels, exactly zero on the background.

    Raises:
      ValueError: unknown arm, or coefficients that are not the head's.
    """
    driver_channels(arm)
    vertices = ndc_vertices(head, identity, coefficients, camera, crop)
    offsets = jnp.broadcast_to(expression_offsets(head, identity, coefficients), vertices.shape)
    canonical = canonical_positions(template_vertices(head))
    mesh = mesh_faces(head), mesh_render_mask(head)
    return map_of_mesh(vertices, *mesh, canonical, offsets, size, arm, dtype)


def map_of_mesh(
    vertices: Float[Array, "*b V 3"],
    faces: Int[Array, "F 3"],
    vertex_mask: Bool[Array, " V"],
    canonical: Float[Array, "V 3"],
    offsets: Float[Array, "*b V 3"],
    size: int,
    arm: str = "full",
    dtype=jnp.float32,
) -> Float[Array, "*b S S C"]:
    """The driver map of meshes in the rasteriser's coordinates; see `driver_map`.

    Args:
      vertices: as `ndc_vertices` gives them.
      faces, vertex_mask: of the whole mesh; faces without a vertex in the mask occlude and are cleared.
      canonical: what channels 0..41 encode, from `canonical_positions`.
      offsets: displacement by expression in metres, leading axes as in `vertices`.
      size, arm, dtype: as in `driver_map`.
    """
    batch = vertices.shape[:-2]
    face = nearest_faces(vertices, faces, size)

    def shade(frame):
        vertices, offsets, face = frame
        fragments = clear_hidden_faces(locate(vertices, faces, face), faces, vertex_mask)
        return encode_fragments(fragments, faces, canonical, offsets, arm, dtype)

    if face.size <= _PIXELS_AT_ONCE:
        return shade((vertices, offsets, face))
    # Frame after frame, so that the intermediate arrays stay small beside the map itself.
    frames = (vertices.reshape(-1, *vertices.shape[-2:]), offsets.reshape(-1, *offsets.shape[-2:]))
    maps = lax.map(shade, (*frames, face.reshape(-1, size, size)))
    return maps.reshape(*batch, *maps.shape[1:])
