"""Driver maps as RGB pictures, for panels and reports."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from loki_jax.driver.encoding import FLOW_SCALE, FREQUENCIES


def preview_map(
    driver: Float[Array, "*b S S C"], *, positions: bool = True, offsets: bool = True
) -> UInt8[Array, "*b S S 3"]:
    """A map of `encode_map` with the same options as RGB: position as colour, tinted by the offsets.

    Red, green and blue follow the sines of the canonical x, y and z at the lowest frequency. Where the
    surface is displaced (mouth, lids, brows), its offset is added to them. White where no head is seen.
    """
    driver = driver.astype(jnp.float32)
    colour = jnp.full((*driver.shape[:-1], 3), 0.5)
    if positions:
        # Canonical coordinates are at most about 1, so half a turn at most.
        sines = [driver[..., 2 * FREQUENCIES * axis] for axis in range(3)]
        colour = colour + 0.5 * jnp.stack(sines, -1)
    if offsets:
        colour = colour + 0.15 * driver[..., -3:]
    covered = (driver != 0).any(-1, keepdims=True)
    return jnp.round(255 * jnp.clip(jnp.where(covered, colour, 1), 0, 1)).astype(jnp.uint8)


def preview_flow(driver: Float[Array, "*b S S C"], *, pixels: bool = False) -> UInt8[Array, "*b S S 3"]:
    """A map of `flow_map` as RGB: the portrait's colours where the map has them, else its displacement.

    Displacement to the right is red and downwards green, half a side of the crop from black to full; what the
    portrait shows is blue. White where no head is seen.
    """
    driver = driver.astype(jnp.float32)
    if pixels:
        return jnp.round(127.5 * (jnp.clip(driver[..., 48:], -1, 1) + 1)).astype(jnp.uint8)
    colour = jnp.concatenate([0.5 + FLOW_SCALE * driver[..., 45:47], driver[..., 47:48]], -1)
    covered = (driver[..., :45] != 0).any(-1, keepdims=True)
    return jnp.round(255 * jnp.clip(jnp.where(covered, colour, 1), 0, 1)).astype(jnp.uint8)
