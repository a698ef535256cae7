"""Driver maps as RGB pictures, for panels and reports; white where the head is not seen."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from loki_jax.driver.encoding import FREQUENCIES

_GREY = 0.5


def preview_positions(driver: Float[Array, "*b S S 42"]) -> UInt8[Array, "*b S S 3"]:
    """Red, green and blue follow the sines of the canonical x, y and z at the lowest frequency."""
    driver = driver.astype(jnp.float32)
    return _picture(driver, _position_colour(driver))


def preview_offsets(driver: Float[Array, "*b S S 3"]) -> UInt8[Array, "*b S S 3"]:
    """Grey, tinted where the surface is displaced (mouth, lids, brows)."""
    driver = driver.astype(jnp.float32)
    return _picture(driver, _GREY + 0.15 * driver)


def preview_positions_and_offsets(driver: Float[Array, "*b S S 45"]) -> UInt8[Array, "*b S S 3"]:
    """The colours of `preview_positions` with the tint of `preview_offsets`."""
    driver = driver.astype(jnp.float32)
    return _picture(driver, _position_colour(driver) + 0.15 * driver[..., -3:])


def _position_colour(driver: Float[Array, "*b S S c"]) -> Float[Array, "*b S S 3"]:
    # Canonical coordinates are at most about 1, so the lowest frequency has the most even contrast.
    sines = [driver[..., 2 * FREQUENCIES * axis] for axis in range(3)]
    return _GREY + 0.5 * jnp.stack(sines, -1)


def _picture(driver: Float[Array, "*b S S c"], colour: Float[Array, "*b S S 3"]) -> UInt8[Array, "*b S S 3"]:
    covered = (driver != 0).any(-1, keepdims=True)
    return jnp.round(255 * jnp.clip(jnp.where(covered, colour, 1), 0, 1)).astype(jnp.uint8)
