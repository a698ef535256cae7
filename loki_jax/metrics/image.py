"""Image metrics of aligned frames: PSNR and SSIM (method, section 10)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from loki_jax.arrays import ArrayLike

_WINDOW, _SIGMA = 11, 1.5  # Wang et al. 2004
_BLOCK = 64  # lines that are blurred together


def psnr(
    prediction: Shaped[ArrayLike, "*b h w c"], target: Shaped[ArrayLike, "..."], max_value: float = 255.0
) -> Float[Array, " *b"]:
    """Peak signal-to-noise ratio of each image, dB; infinite for equal images.

    Args:
      prediction, target: images of any dtype, black at 0 and white at `max_value`.

    Raises:
      ValueError: the shapes differ.
    """
    _check(prediction, target)
    difference = jnp.asarray(prediction, jnp.float32) - jnp.asarray(target, jnp.float32)
    return 20 * jnp.log10(max_value) - 10 * jnp.log10(jnp.mean(difference**2, (-3, -2, -1)))


def ssim(
    prediction: Shaped[ArrayLike, "*b h w c"], target: Shaped[ArrayLike, "..."], max_value: float = 255.0
) -> Float[Array, " *b"]:
    """Structural similarity of each image: 11 x 11 Gaussian window of sigma 1.5, mean over channels.

    Windows lie wholly inside the image (Wang et al. 2004; K1 = 0.01, K2 = 0.03).

    Raises:
      ValueError: the shapes differ, or an edge is shorter than the window.
    """
    _check(prediction, target)
    if min(prediction.shape[-3:-1]) < _WINDOW:
        raise ValueError(
            f"ssim: images of {prediction.shape[-3:-1]} pixels are smaller than the {_WINDOW} px window"
        )
    # Centred values: the variances below are small differences of large numbers.
    x = jnp.asarray(prediction, jnp.float32) / max_value - 0.5
    y = jnp.asarray(target, jnp.float32) / max_value - 0.5
    mean_x, mean_y, square_x, square_y, product = _blur(jnp.stack([x, y, x * x, y * y, x * y]))
    var_x, var_y = square_x - mean_x**2, square_y - mean_y**2
    covariance = product - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean((-3, -2, -1))


def _blur(image):
    """Separable Gaussian window over the two image axes, without padding.

    As products of a band matrix with blocks of lines: XLA computes a sum of shifted images again for each of
    its uses.
    """
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    more = _WINDOW - 1
    band = sum(w * np.eye(_BLOCK, _BLOCK + more, k) for k, w in enumerate(weights / weights.sum()))
    for axis in (-3, -2):
        lines = jnp.moveaxis(image, axis, 0)
        size = len(lines) - more
        blocks = []
        for start in range(0, size, _BLOCK):
            n = min(_BLOCK, size - start)
            part = lines[start : start + n + more]
            blocks.append(jnp.tensordot(jnp.float32(band[:n, : n + more]), part, 1, precision="highest"))
        image = jnp.moveaxis(jnp.concatenate(blocks), 0, axis)
    return image


def _check(prediction, target):
    if prediction.shape != target.shape or prediction.ndim < 3:
        raise ValueError(
            f"image metrics compare (..., height, width, channels) of one shape, "
            f"found {prediction.shape} and {target.shape}"
        )
