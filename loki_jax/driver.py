"""The driver map: head coefficients as an image the generation network can read (design section 5).

Channels of the full map, zero wherever the head is not seen:
  0..41   sines and cosines of the *canonical template position* of the surface point. For axis
          c = 0, 1, 2 and k = 0..6: channel 14 c + k is sin(2^k p_c), channel 14 c + 7 + k is
          cos(2^k p_c). The values name the point of the head; pose shows in where they land.
  42..44  the point's displacement by expression, jaw and eyes, over 0.0104 m.

Ablation arms: "full" (45 channels), "no_posenc" (the last 3), "no_deform" (the first 42). The fourth
arm has no map: `flame_vector` gives its numbers.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from loki_jax.head.asset import HeadAsset
from loki_jax.head.camera import camera_from_world, ndc_from_camera
from loki_jax.head.skinning import (
    Identity,
    expression_offsets,
    mesh_faces,
    mesh_render_mask,
    template_vertices,
    world_vertices,
)
from loki_jax.head.types import Camera, Coefficients
from loki_jax.raster import Fragments, clear_hidden_faces, interpolate, locate, nearest_faces

EXPRESSION_SCALE = 0.0104  # metres: standard deviation of the offsets, design section 5
_PIXELS_AT_ONCE = 2**20
_CHANNELS = {"full": 45, "no_posenc": 3, "no_deform": 42}

# Of each channel of the encoding: its axis, the factor 2^k, and the quarter turns that make a sine a cosine.
_AXIS = np.repeat(np.arange(3), 14)
_FREQUENCY = np.tile(2.0 ** (np.arange(14) % 7), 3).astype(np.float32)
_QUARTER = np.tile(np.arange(14) // 7, 3).astype(np.float32)
# pi in three parts; products of the first with up to 2^14 halves are exact in float32.
_PI = (3.140625, 9.67502593994140625e-4, 1.5099579897537296e-7)


def driver_channels(arm: str) -> int:
    """Channels of the driver map of an ablation arm.

    Raises:
      ValueError: there is no such arm, or it has no map.
    """
    if arm not in _CHANNELS:
        hint = " (its numbers come from `flame_vector`)" if arm == "flame_vector" else ""
        raise ValueError(f"arm {arm!r} has no driver map{hint}; arms with one: {', '.join(_CHANNELS)}")
    return _CHANNELS[arm]


def canonical_positions(vertices: Float[Array, "V 3"]) -> Float[Array, "V 3"]:
    """Template vertices minus their mean, over the largest (signed) coordinate of all."""
    centred = vertices - jnp.mean(vertices, axis=0)
    return centred / jnp.max(centred)


def positional_encoding(positions: Float[Array, "*b 3"]) -> Float[Array, "*b 42"]:
    """Per axis sin(2^k p), then cos(2^k p), k = 0..6, without a factor pi.

    Within 2e-7 of the float64 value for |p| below 100. One elementwise function of position and channel,
    which XLA writes in one pass; five times as fast on a CPU as its own sine and cosine, which are not
    vectorised there.
    """
    on_axis = [positions[..., axis : axis + 1] for axis in range(3)]
    chosen = jnp.where(_AXIS == 0, on_axis[0], jnp.where(_AXIS == 1, on_axis[1], on_axis[2]))
    return _sine(chosen * _FREQUENCY, _QUARTER)


def _sine(angle: Float[Array, "*b"], quarter: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """sin(angle + quarter pi / 2): reduction to [-pi/2, pi/2], then the Taylor series to 1e-9."""
    turns = lax.stop_gradient(jnp.round(angle * np.float32(1 / np.pi) + quarter / 2))
    rest = angle
    for part in _PI:
        rest = rest - (turns - quarter / 2) * np.float32(part)
    square = rest * rest
    series = jnp.zeros_like(rest)
    for k in range(13, 1, -2):
        series = square * (series + np.float32((-1) ** (k // 2) / math.factorial(k)))
    value = rest + rest * series
    return jnp.where(turns.astype(jnp.int32) & 1, -value, value)


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


def encode_fragments(
    fragments: Fragments,
    faces: Int[Array, "F 3"],
    canonical: Float[Array, "V 3"],
    offsets: Float[Array, "*b V 3"],
    arm: str = "full",
    dtype=jnp.float32,
) -> Float[Array, "*b S S C"]:
    """The driver map of rasterised fragments: 3 + 3 interpolated numbers, encoded at the pixel."""
    driver_channels(arm)
    parts = []
    if arm != "no_posenc":
        # Under differentiation only three numbers a pixel are kept. The cosine of a zero is one.
        encode = jax.checkpoint(
            lambda p: jnp.where(fragments.covered[..., None], positional_encoding(p), 0.0).astype(dtype)
        )
        parts.append(encode(interpolate(fragments, faces, canonical)))
    if arm != "no_deform":
        parts.append((interpolate(fragments, faces, offsets) / EXPRESSION_SCALE).astype(dtype))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


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


def flame_vector(head: HeadAsset, coefficients: Coefficients) -> Float[Array, "*b n_expr+12"]:
    """Expression, head rotation, neck, jaw and eyes as one vector a frame (the vector arm).

    Raises:
      ValueError: the number of expression coefficients is not the head's.
    """
    if coefficients.expression.shape[-1:] != (head.n_expression,):
        raise ValueError(
            f"expression coefficients {tuple(coefficients.expression.shape)} do not end in the "
            f"{head.n_expression} axes of head {head.name!r}"
        )
    c = coefficients
    return jnp.concatenate([c.expression, c.rot, c.neck, c.jaw, c.eyes], axis=-1)
