"""The driver maps with flow: where each pixel comes from in the portrait (method, section 17)."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from loki_jax.arrays import ArrayLike
from loki_jax.driver.encoding import DriverInputs, encode_map
from loki_jax.flow import (
    flow_between,
    head_parts,
    normalise_positions,
    pixel_positions,
    sample_image,
    view_cosines,
)
from loki_jax.raster.fragments import Fragments

# In half sides of the crop: about the standard deviation of the displacement of heads in motion.
FLOW_SCALE = 0.1


def flow_map(
    fragments: Fragments, inputs: DriverInputs, dtype: DTypeLike = jnp.float32, *, pixels: bool = False
) -> Float[Array, "*b S S C"]:
    """`encode_map` and where each pixel comes from in the portrait: 48 channels, or 51 with its colour.

    0..44   as in `encode_map`.
    45, 46  displacement x, y from the pixel to the place of its surface point in the portrait, both in the
            normalised positions of their own crop (`loki_jax.flow`), over `FLOW_SCALE`.
    47      visibility of the point in the portrait.
    48..50  the portrait's colour there, in [-1, 1], times the visibility. Where neither frame nor portrait
            shows the head, the portrait's background: it stays where it is.

    Raises:
      ValueError: the inputs lack the head, the portrait or its pixels.
    """
    view = inputs.portrait
    if inputs.head is None or inputs.vertices is None or view is None:
        raise ValueError("the flow needs the head and the portrait")
    flow = flow_between(
        view, inputs.vertices, inputs.points[..., 2], view_cosines(inputs.points, inputs.faces), fragments,
        inputs.faces, head_parts(inputs.head),
    )  # fmt: skip
    place = normalise_positions(flow.position, view.crop)
    visibility, covered = flow.visibility[..., None], fragments.covered[..., None]
    displacement = jnp.where(covered, place - pixel_positions(fragments.face.shape[-1]), 0.0)
    parts = [encode_map(fragments, inputs), displacement / FLOW_SCALE, visibility]
    if pixels:
        if inputs.image is None:
            raise ValueError("the warped portrait needs the portrait's pixels")
        # Background keeps its place, so pixel and sample are at one position.
        known = jnp.where(covered, visibility, (view.shown[..., :1] == 0).astype(jnp.float32))
        parts.append(known * sample_image(inputs.image, place))
    return jnp.concatenate(parts, axis=-1).astype(dtype)


def preview_flow(driver: Float[ArrayLike, "*b S S C"], *, pixels: bool = False) -> UInt8[Array, "*b S S 3"]:
    """A map of `flow_map` as RGB: the portrait's colours where the map has them, else its displacement.

    Displacement to the right is red and downwards green, half a side of the crop from black to full; what the
    portrait shows is blue. White where no head is seen.
    """
    driver = jnp.asarray(driver, jnp.float32)
    if pixels:
        return jnp.round(127.5 * (jnp.clip(driver[..., 48:], -1, 1) + 1)).astype(jnp.uint8)
    colour = jnp.concatenate([0.5 + FLOW_SCALE * driver[..., 45:47], driver[..., 47:48]], -1)
    covered = (driver[..., :45] != 0).any(-1, keepdims=True)
    return jnp.round(255 * jnp.clip(jnp.where(covered, colour, 1), 0, 1)).astype(jnp.uint8)
