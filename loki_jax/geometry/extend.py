"""Motion beyond the face: hair, neck, shoulders and background (method, section 18).

Around the head the picture follows a similarity: the head's centre, its turn in the picture plane and its
scale. What the face does beyond that is carried outwards by push-pull (Gortler et al. 1996), weaker at
coarser scales, so that it fades. Towards shoulders and the distant background everything comes to rest.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_KERNEL = np.array([1.0, 3.0, 3.0, 1.0]) / 8
_STRETCH = 0.35  # pixels of the picture that a pixel of the result stands for at the border, at least


def push_pull(
    values: Float[Array, "s s C"], weight: Float[Array, "s s"], keep: float = 0.8, levels: int = 6
) -> Float[Array, "s s C"]:
    """Values where `weight` is 1, carried on smoothly to where it is 0.

    Args:
      weight: confidence in [0, 1].
      keep: share of a coarser level's values that a finer one takes over: below 1 they fade with distance.
      levels: the coarsest grid has s / 2^levels values a side.
    """
    pyramid = [(values * weight[..., None], weight)]
    for _ in range(levels):
        total, amount = pyramid[-1]
        merged = _shrink(jnp.concatenate([total, amount[..., None]], -1))
        # Full confidence needs a quarter of the pixels: so a thin border of known values is enough.
        gain = jnp.minimum(4.0, 1.0 / jnp.maximum(merged[..., -1:], 1e-6))
        merged = merged * gain
        pyramid.append((merged[..., :-1], merged[..., -1]))
    total, amount = pyramid[-1]
    result = total
    for total, amount in reversed(pyramid[:-1]):
        result = total + (1 - amount)[..., None] * keep * _grow(result, total.shape[0])
    return result


def _shrink(values):
    """Half the resolution by the kernel 1 3 3 1; outside everything is zero."""
    size = values.shape[0]
    for axis in (0, 1):
        padded = jnp.pad(values, [(1, 1) if a == axis else (0, 0) for a in range(values.ndim)])
        values = sum(
            float(w) * jax.lax.slice_in_dim(padded, k, k + size - 1, 2, axis) for k, w in enumerate(_KERNEL)
        )
    return values


def _grow(values, size):
    return jax.image.resize(values, (size, size, values.shape[-1]), "linear")


def keep_border(
    position: Float[Array, "*b 2"], shift: Float[Array, "*b 2"], extent: tuple[int, int]
) -> Float[Array, "*b 2"]:
    """Displacements that leave the picture's border where it is and never reach beyond it.

    At a distance d from a border a displacement m across it becomes m r / (r^4 + m^4)^(1/4) with r = 0.65 d:
    nearly all of it from 2 m on, and never so much that the picture folds. The outermost pixels, often a thin
    frame, are stretched threefold at most. Along the border displacements stay, but at the lower one, where
    shoulders are cut off.

    Args:
      extent: width and height of the picture.
    """
    limit = jnp.array(extent, jnp.float32)
    near = jnp.minimum(position, limit - position) - 0.5  # from the outermost pixels' centres
    near = jnp.maximum(near, 0.0)
    bottom = jnp.maximum(limit[1] - position[..., 1] - 0.5, 0.0)
    near = near.at[..., 0].min(2 * bottom)
    return shift * soft_share((1 - _STRETCH) * near, jnp.abs(shift))


def soft_share(room: Float[Array, "*b"], amount: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Factor by which `amount` has to be multiplied so that it stays below `room`."""
    room, amount = room + 1e-3, amount + 1e-6
    ratio = room / jnp.maximum(room, amount)
    return ratio / jnp.sqrt(jnp.sqrt(ratio**4 + (amount / jnp.maximum(room, amount)) ** 4))
