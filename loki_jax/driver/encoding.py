"""From a rasterised head to the channels of the driver map (method, section 5).

The map of arm `full` has 45 channels, zero wherever the head is not seen:
  0..41   sines and cosines of the *canonical template position* of the surface point. For axis
          c = 0, 1, 2 and k = 0..6: channel 14 c + k is sin(2^k p_c), channel 14 c + 7 + k is
          cos(2^k p_c). The values identify the point of the head; pose decides where they appear.
  42..44  the point's displacement by expression, jaw and eyes, over 0.0104 m.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from loki_jax.arrays import ArrayLike
from loki_jax.face.asset import HeadAsset
from loki_jax.face.types import Camera, Coefficients
from loki_jax.flow import MeshView
from loki_jax.raster.fragments import Faces, Fragments, Vertices, interpolate

EXPRESSION_SCALE = 0.0104  # metres: standard deviation of the offsets, method, section 5

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
    """What the `encode` of an arm with a map may read besides the fragments.

    Attributes:
      faces: vertex indices of the whole mesh, inner mouth included.
      canonical: canonical positions of the vertices (`canonical_positions`).
      points: posed vertices in camera axes (+x right, +y down, +z away), metres.
      offsets: displacement of the vertices by expression, jaw and eyes, head frame, metres.
      head, coefficients: the asset, and its coefficients in each frame (metres and radians); None where
        the mesh is not a head's.
      vertices: the points in the rasteriser's coordinates, for arms that read the portrait.
      portrait: what the portrait shows of the same head, for the same arms.
      image: the portrait's crop, RGB in [-1, 1], for arms that read its pixels.
    """

    faces: Faces
    canonical: Float[ArrayLike, "V 3"]
    points: Float[ArrayLike, "*b V 3"]
    offsets: Float[ArrayLike, "*b V 3"]
    head: HeadAsset | None = None
    coefficients: Coefficients | None = None
    vertices: Vertices | None = None
    portrait: MeshView | None = None
    image: Float[ArrayLike, "*b s s 3"] | None = None


def canonical_positions(vertices: Float[ArrayLike, "V 3"]) -> Float[Array, "V 3"]:
    """Template vertices minus their mean, over the largest (signed) coordinate of all. No unit."""
    centred = jnp.asarray(vertices) - jnp.mean(vertices, axis=0)
    return centred / jnp.max(centred)


def positional_encoding(positions: Float[ArrayLike, "*b 3"]) -> Float[Array, "*b 42"]:
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


@functools.partial(jax.jit, static_argnames=("dtype", "positions", "offsets"), inline=True)
def encode_map(
    fragments: Fragments,
    inputs: DriverInputs,
    dtype: DTypeLike = jnp.float32,
    *,
    positions: bool = True,
    offsets: bool = True,
) -> Float[Array, "*b S S C"]:
    """The paper's driver map, or its channels of `positions` or `offsets` alone: 45, 42 or 3.

    Attributes of vertices are interpolated, then encoded at the pixel.
    """
    parts = []
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


def preview_map(
    driver: Float[ArrayLike, "*b S S C"], *, positions: bool = True, offsets: bool = True
) -> UInt8[Array, "*b S S 3"]:
    """A map of `encode_map` with the same options as RGB: position as colour, tinted by the offsets.

    Red, green and blue follow the sines of the canonical x, y and z at the lowest frequency. Where the
    surface is displaced (mouth, lids, brows), its offset is added to them. White where no head is seen.
    """
    driver = jnp.asarray(driver, jnp.float32)
    colour = jnp.full((*driver.shape[:-1], 3), 0.5)
    if positions:
        # Canonical coordinates are at most about 1, so half a turn at most.
        sines = [driver[..., 2 * FREQUENCIES * axis] for axis in range(3)]
        colour = colour + 0.5 * jnp.stack(sines, -1)
    if offsets:
        colour = colour + 0.15 * driver[..., -3:]
    covered = (driver != 0).any(-1, keepdims=True)
    return jnp.round(255 * jnp.clip(jnp.where(covered, colour, 1), 0, 1)).astype(jnp.uint8)


def flame_vector(head: HeadAsset, coefficients: Coefficients) -> Float[Array, "*b C"]:
    """Expression, head rotation, neck, jaw and eyes as one float32 vector a frame.

    C = n_expr + 12 numbers in metres and radians.

    Raises:
      ValueError: the number of expression coefficients is not the head's.
    """
    c = coefficients
    if c.expression.shape[-1:] != (head.n_expression,):
        raise ValueError(
            f"expression coefficients {tuple(c.expression.shape)} do not end in the "
            f"{head.n_expression} axes of head {head.name!r}"
        )
    return jnp.concatenate([c.expression, c.rot, c.neck, c.jaw, c.eyes], axis=-1)
