"""Pictures compared with renders by their local contrast, robustly.

What `photometric` (known appearance) and `refine` (look of points taken from the clip) share. Differences are
in units of the local contrast.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

NOISE_FLOOR = 0.03
_HUBER = 1.5  # differences beyond so many standard deviations of the noise count linearly


def blur(image: Float[Array, "s s c"], sigma: Float[Array, ""] | float) -> Float[Array, "s s c"]:
    """Gaussian blur by `sigma` pixels; windows are normalised, so that the edges keep their brightness."""
    index = jnp.arange(image.shape[0])
    weights = jnp.exp(-0.5 * ((index[:, None] - index) / sigma) ** 2)
    matrix = weights / weights.sum(1, keepdims=True)
    return jnp.einsum("ij,jkc,lk->ilc", matrix, image, matrix)


def contrast_features(image: Float[Array, "s s c"], sigma: Float[Array, ""] | float) -> Float[Array, "s s c"]:
    """Details of about `sigma` pixels and more, relative to the contrast around them.

    A difference of two blurs over its local root mean square. Colours, light and sharpness that are a
    little wrong everywhere, as a network's are, cancel; edges and features count where they are.
    """
    per_pixel = image.shape[0] / 64
    band = blur(image, sigma) - blur(image, 3 * sigma + 4 * per_pixel)
    energy = blur((band**2).mean(-1, keepdims=True), 8 * per_pixel)
    return band / jnp.sqrt(energy + NOISE_FLOOR**2)


def noise_level(difference: Float[Array, "s s c"], where: Bool[Array, "s s 1"]) -> Float[Array, ""]:
    """Standard deviation of the noise from the median absolute difference, at least `NOISE_FLOOR`."""
    spread = jnp.nanmedian(jnp.where(where, jnp.abs(difference), jnp.nan)) * 1.48
    return jnp.maximum(jnp.nan_to_num(spread), NOISE_FLOOR)


def huber_weight(difference: Float[Array, "s s c"], noise: Float[Array, ""]) -> Float[Array, "s s c"]:
    """Weights of the least squares problem whose gradient is that of Huber's cost."""
    return jnp.minimum(1, _HUBER * noise / jnp.maximum(jnp.abs(difference), 1e-6))


def repetitions(
    noise: Float[Array, ""],
    sigma: Float[Array, ""] | float,
    model_error: Float[Array, ""] | float,
    channels: int = 1,
) -> Float[Array, ""]:
    """How many differences carry the information of one.

    Neighbouring pixels of an image blurred by `sigma` pixels repeat each other, and so may the channels.
    Errors that are not noise (a face that is not quite the known one; beyond `model_error`) extend over
    whole features.
    """
    return channels * (1 + 4 * jnp.pi * sigma**2) * (1 + (noise / model_error) ** 2)
