"""From a rasterised head to the channels of the driver map (method, section 5).

The map of arm `full` has 45 channels, zero wherever the head is not seen:
  0..41   sines and cosines of the *canonical template position* of the surface point. For axis
          c = 0, 1, 2 and k = 0..6: channel 14 c + k is sin(2^k p_c), channel 14 c + 7 + k is
          cos(2^k p_c). The values identify the point of the head; pose decides where they appear.
  42..44  the point's displacement by expression, jaw and eyes, over 0.0104 m.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from loki_jax.arrays import ArrayLike
from loki_jax.face.asset import HeadAsset
from loki_jax.face.types import Camera, Coefficients
from loki_jax.flow import (
    MeshView,
    flow_between,
    head_parts,
    normalise_positions,
    pixel_positions,
    sample_image,
    view_cosines,
)
from loki_jax.raster.fragments import Fragments, interpolate

EXPRESSION_SCALE = 0.0104  # metres: standard deviation of the offsets, method, section 5

# In half sides of the crop: about the standard deviation of the displacement of heads in motion.
FLOW_SCALE = 0.1

FREQUENCIES = 7  # of the positional encoding, per axis

# For each channel of the encoding: its axis, the factor 2^k, and the quarter turns from sine to cosine.
_AXIS = np.repeat(np.arange(3), 2 * FREQUENCIES)
_FREQUENCY = np.tile(2.0 ** (np.arange(2 * FREQUENCIES) % FREQUENCIES), 3).astype(np.float32)
_QUARTER = np.tile(np.arange(2 * FREQUENCIES) // FREQUENCIES, 3).astype(np.float32)

# pi in three parts; products of the first with up to 2^14 halves are exact in float32.
_PI = (3.140625, 9.67502593994140625e-4, 1.5099579897537296e-7)


class ReferenceFrame(NamedTuple):
    """The portrait that is animated, for the arms that read it; leading axes are those of portraits.

    Attributes:
      coefficients, camera: of the portrait's picture.
      crop: the box x0, y0, x1, y1 of that picture which `image` shows.
      image: RGB; None where only latents are known.
    """

    coefficients: Coefficients
    camera: Camera
    crop: Float[ArrayLike, "*b 4"]
    image: UInt8[ArrayLike, "*b s s 3"] | None = None


class DriverInputs(NamedTuple):
    """What the `encode` of an arm may read. A field is None where the caller does not have it.

    Attributes:
      head: the head asset.
      coefficients: of each frame, metres and radians.
      faces: vertex indices of the whole mesh, inner mouth included.
      canonical: canonical positions of the vertices (`canonical_positions`).
      points: posed vertices in camera axes (+x right, +y down, +z away), metres.
      vertices: the same in the rasteriser's coordinates.
      offsets: displacement of the vertices by expression, jaw and eyes, head frame, metres.
      fragments: the rasterised frames, with faces outside of the render mask cleared.
      portrait: what the portrait shows of the same head, for arms that read it.
      image: the portrait's crop, RGB in [-1, 1], for arms that read its pixels.
    """

    head: HeadAsset | None = None
    coefficients: Coefficients | None = None
    faces: Int[Array | np.ndarray, "F 3"] | None = None
    canonical: Float[Array, "V 3"] | None = None
    points: Float[Array, "*b V 3"] | None = None
    vertices: Float[Array, "*b V 3"] | None = None
    offsets: Float[Array, "*b V 3"] | None = None
    fragments: Fragments | None = None
    portrait: MeshView | None = None
    image: Float[Array, "*b s s 3"] | None = None


def canonical_positions(vertices: Float[Array | np.ndarray, "V 3"]) -> Float[Array, "V 3"]:
    """Template vertices minus their mean, over the largest (signed) coordinate of all. No unit."""
    centred = vertices - jnp.mean(vertices, axis=0)
    return centred / jnp.max(centred)


def positional_encoding(positions: Float[Array | np.ndarray, "*b 3"]) -> Float[Array, "*b 42"]:
    """Per axis sin(2^k p), then cos(2^k p), k = 0..6, without a factor pi (method, section 5).

    Within 2e-7 of the float64 value for |p| below 100. One elementwise function of position and channel,
    which XLA writes in one pass; five times as fast on a CPU as its own sine and cosine, which are not
    vectorised there.
    """
    on_axis = [positions[..., axis : axis + 1] for axis in range(3)]
    chosen = jnp.where(_AXIS == 0, on_axis[0], jnp.where(_AXIS == 1, on_axis[1], on_axis[2]))
    return _sine(chosen * _FREQUENCY, _QUARTER)


def _sine(angle: Float[Array, "*b 42"], quarter: Float[np.ndarray, " 42"]) -> Float[Array, "*b 42"]:
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


def encode_map(
    inputs: DriverInputs, dtype: DTypeLike = jnp.float32, *, positions: bool = True, offsets: bool = True
) -> Float[Array, "*b S S C"]:
    """The paper's driver map, or its channels of `positions` or `offsets` alone: 45, 42 or 3.

    Attributes of vertices are interpolated, then encoded at the pixel.
    """
    fragments, parts = inputs.fragments, []
    if positions:
        # Under differentiation only three numbers a pixel are kept. The cosine of a zero is one.
        encode = jax.checkpoint(
            lambda p: jnp.where(fragments.covered[..., None], positional_encoding(p), 0.0).astype(dtype)
        )
        parts.append(encode(interpolate(fragments, inputs.faces, inputs.canonical)))
    if offsets:
        displacement = interpolate(fragments, inputs.faces, inputs.offsets)
        parts.append((displacement / EXPRESSION_SCALE).astype(dtype))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def flow_map(
    inputs: DriverInputs, dtype: DTypeLike = jnp.float32, *, pixels: bool = False
) -> Float[Array, "*b S S C"]:
    """`encode_map` and where each pixel comes from in the portrait: 48 channels, or 51 with its colour.

    0..44   as in `encode_map`.
    45, 46  displacement x, y from the pixel to the place of its surface point in the portrait, both in the
            normalised positions of their own crop (`loki_jax.flow`), over `FLOW_SCALE`.
    47      visibility of the point in the portrait.
    48..50  the portrait's colour there, in [-1, 1], times the visibility. Where neither frame nor portrait
            shows the head, the portrait's background: it stays where it is.
    """
    view, size = inputs.portrait, inputs.fragments.face.shape[-1]
    flow = flow_between(
        view, inputs.vertices, inputs.points[..., 2], view_cosines(inputs.points, inputs.faces),
        inputs.fragments, inputs.faces, head_parts(inputs.head),
    )  # fmt: skip
    place = normalise_positions(flow.position, view.crop)
    visibility = flow.visibility[..., None]
    covered = inputs.fragments.covered[..., None]
    displacement = jnp.where(covered, place - pixel_positions(size), 0.0)
    parts = [encode_map(inputs), displacement / FLOW_SCALE, visibility]
    if pixels:
        # Background keeps its place, so pixel and sample are at one position.
        known = jnp.where(covered, visibility, (view.shown[..., :1] == 0).astype(jnp.float32))
        parts.append(known * sample_image(inputs.image, place))
    return jnp.concatenate(parts, axis=-1).astype(dtype)


def flame_vector(inputs: DriverInputs, dtype: DTypeLike = jnp.float32) -> Float[Array, "*b C"]:
    """Expression, head rotation, neck, jaw and eyes as one float32 vector a frame, whatever `dtype`.

    C = n_expr + 12 numbers in metres and radians.

    Raises:
      ValueError: the number of expression coefficients is not the head's.
    """
    head, c = inputs.head, inputs.coefficients
    if c.expression.shape[-1:] != (head.n_expression,):
        raise ValueError(
            f"expression coefficients {tuple(c.expression.shape)} do not end in the "
            f"{head.n_expression} axes of head {head.name!r}"
        )
    return jnp.concatenate([c.expression, c.rot, c.neck, c.jaw, c.eyes], axis=-1)
