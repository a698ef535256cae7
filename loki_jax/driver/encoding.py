from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from loki_jax.driver.registry import driver_channels
from loki_jax.face.asset import HeadAsset
from loki_jax.face.types import Coefficients
from loki_jax.raster.fragments import Fragments, interpolate

EXPRESSION_SCALE = 0.0104  # metres: standard deviation of the offsets, method, section 5

# Of each channel of the encoding: its axis, the factor 2^k, and the quarter turns that make a sine a cosine.
_AXIS = np.repeat(np.arange(3), 14)

_FREQUENCY = np.tile(2.0 ** (np.arange(14) % 7), 3).astype(np.float32)

_QUARTER = np.tile(np.arange(14) // 7, 3).astype(np.float32)

# pi in three parts; products of the first with up to 2^14 halves are exact in float32.
_PI = (3.140625, 9.67502593994140625e-4, 1.5099579897537296e-7)


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
