"""The driver map: head coefficients as an image that the generation network reads (method, section 5)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from loki_jax.arrays import ArrayLike
from loki_jax.driver.encoding import DriverInputs, ReferenceFrame, canonical_positions
from loki_jax.driver.registry import ARMS, DEFAULT_ARM, find_arm
from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, ndc_from_camera, ndc_from_world
from loki_jax.face.skinning import (
    Identity,
    expression_offsets,
    mesh_faces,
    mesh_render_mask,
    template_vertices,
    world_vertices,
)
from loki_jax.face.types import Camera, Coefficients
from loki_jax.flow import view_head
from loki_jax.raster.fragments import Vertices, clear_hidden_faces, locate
from loki_jax.raster.search import nearest_faces

_PIXELS_AT_ONCE = 2**20

# Fields of `DriverInputs` that have the leading axes of the frames.
_PER_FRAME = ("coefficients", "points", "offsets", "vertices", "portrait", "image")


def ndc_vertices(
    head: HeadAsset,
    identity: Identity,
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[ArrayLike, "*#b 4"],
) -> Float[Array, "*b V_all 3"]:
    """The posed mesh in the rasteriser's coordinates for a crop box x0, y0, x1, y1 in pixels."""
    return ndc_from_world(world_vertices(head, identity, coefficients), camera, crop)


def driver_map(
    head: HeadAsset,
    identity: Identity,
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[ArrayLike, "*#b 4"],
    size: int,
    arm: str = DEFAULT_ARM,
    dtype: DTypeLike = jnp.float32,
    reference: ReferenceFrame | None = None,
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
      arm: name of an arm that has a map; see `loki_jax.driver.registry`.
      dtype: of the result; the arithmetic is float32 throughout.
      reference: the portrait, for arms that read it; leading axes broadcast against those of `coefficients`.

    Returns:
      C = `driver_channels(arm, head)` channels, exactly zero on the background but for the portrait's pixels.

    Raises:
      ValueError: unknown arm, an arm without a map, coefficients that are not the head's, or an arm that
        reads a portrait or pixels that are not given.
    """
    points = camera_from_world(world_vertices(head, identity, coefficients), camera)
    vertices = ndc_from_camera(points, camera, crop)
    batch = vertices.shape[:-2]
    inputs = DriverInputs(
        head=head,
        coefficients=jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, x.shape[-1])), coefficients),
        faces=mesh_faces(head),
        canonical=canonical_positions(template_vertices(head)),
        points=jnp.broadcast_to(points, vertices.shape),
        offsets=jnp.broadcast_to(expression_offsets(head, identity, coefficients), vertices.shape),
    )
    entry = find_arm(arm)
    if entry.portrait:
        if reference is None:
            raise ValueError(f"driver arm {arm!r} reads the portrait, which is not given")
        own = reference.coefficients, reference.camera, reference.crop
        portrait = view_head(head, identity, *own, size).broadcast_to(batch)
        inputs = inputs._replace(vertices=vertices, portrait=portrait)
    if entry.pixels:
        if reference is None or reference.image is None:
            raise ValueError(f"driver arm {arm!r} reads the portrait's pixels, which are not given")
        image = jnp.asarray(reference.image).astype(jnp.float32) / 127.5 - 1
        inputs = inputs._replace(image=jnp.broadcast_to(image, (*batch, *image.shape[-3:])))
    return map_of_mesh(vertices, mesh_render_mask(head), inputs, size, arm, dtype)


def map_of_mesh(
    vertices: Vertices,
    vertex_mask: Bool[ArrayLike, " V"],
    inputs: DriverInputs,
    size: int,
    arm: str = DEFAULT_ARM,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*b S S C"]:
    """The driver map of meshes in the rasteriser's coordinates; see `driver_map`.

    Args:
      vertices: as `ndc_vertices` gives them.
      vertex_mask: faces without a vertex in it occlude, but are cleared from the map.
      inputs: what the arm reads of the meshes; leading axes as in `vertices`.
      size, arm, dtype: as in `driver_map`.

    Raises:
      ValueError: unknown arm, or an arm without a map.
    """
    if not find_arm(arm).spatial or find_arm(arm).frames:
        maps = ", ".join(name for name, entry in ARMS.items() if entry.spatial and not entry.frames)
        raise ValueError(f"arm {arm!r} has no driver map of a head; arms with one: {maps}")
    encode, batch = find_arm(arm).encode, vertices.shape[:-2]
    face = nearest_faces(vertices, inputs.faces, size)

    def shade(vertices, face, per_frame):
        fragments = clear_hidden_faces(locate(vertices, inputs.faces, face), inputs.faces, vertex_mask)
        return encode(fragments, inputs._replace(**per_frame), dtype)

    frames = (vertices, face, {name: getattr(inputs, name) for name in _PER_FRAME})
    if face.size <= _PIXELS_AT_ONCE:
        return shade(*frames)
    # Frame after frame, so that the intermediate arrays stay small beside the map itself.
    frames = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(batch) :]), frames)
    maps = lax.map(lambda frame: shade(*frame), frames)
    return maps.reshape(*batch, *maps.shape[1:])
