"""Clips longer than a window: windows that share frames and agree on them. Method, section 7."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Real

from loki_jax.arrays import ArrayLike


def blend_windows(
    x0: Float[Array, "bm t h w c"],
    earlier: Float[Array, "b o h w c"],
    first: Bool[ArrayLike, ""],
    windows: int,
) -> tuple[Float[Array, "bm t h w c"], Float[Array, "b o h w c"]]:
    """Estimates of consecutive windows made one where the windows share frames: `blend` of a sampler.

    The weight of the later window rises linearly over the shared frames, by 1 / O a frame, so that
    ramps which meet in the middle of a window make no larger step there. Windows whose shared frames start
    from the same noise then keep the same latents there.

    Args:
      x0: of B clips with `windows` consecutive windows each, window by window.
      earlier: what the windows before them estimated for the O frames that they share, at most T / 2.
      first: there are none before them; `earlier` is not used.

    Returns:
      the estimates to go on with, and those of the last O frames, for the windows that come next.
    """
    shared = earlier.shape[1]
    later = ((np.arange(shared, dtype=np.float32) + 0.5) / max(shared, 1))[:, None, None, None]
    by_clip = x0.reshape(-1, windows, *x0.shape[1:])
    start = by_clip.shape[2] - shared
    earlier = jnp.where(first, by_clip[:, 0, :shared], earlier)
    before = jnp.concatenate([earlier[:, None], by_clip[:, :-1, start:]], axis=1)
    agreed = before + later * (by_clip[:, :, :shared] - before)
    by_clip = by_clip.at[:, :, :shared].set(agreed).at[:, :-1, start:].set(agreed[:, 1:])
    return by_clip.reshape(x0.shape), by_clip[:, -1, start:]


def join_windows(x: Real[Array, "bm t *rest"], windows: int, shared: int) -> Real[Array, "b n *rest"]:
    """The frames of consecutive windows in a row, shared ones once."""
    by_clip = x.reshape(-1, windows, *x.shape[1:])
    start = x.shape[1] - shared
    fresh = by_clip[:, :, :start].reshape(by_clip.shape[0], windows * start, *x.shape[2:])
    return jnp.concatenate([fresh, by_clip[:, -1, start:]], axis=1)
