from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree, UInt8
from ml_collections import ConfigDict

from loki_jax.face.asset import HeadAsset
from loki_jax.face.retarget import retarget, size_ratio
from loki_jax.face.types import Camera, Coefficients
from loki_jax.networks import (
    Networks,
    driver_input,
    driver_preview,
    initial_noise,
    portrait_features,
    sample_from_features,
)
from loki_jax.sources import DrivingClip, Portrait


def retarget_clip(
    head: HeadAsset, driver: DrivingClip, reference: Portrait, mode: str = "relative"
) -> Coefficients:
    """The coefficients (N, ...) with which `reference` performs `driver` (method, section 9)."""
    scale = size_ratio(
        head, jnp.asarray(reference.coefficients.betas), jnp.asarray(driver.coefficients.betas[0])
    )
    as_arrays = functools.partial(jax.tree.map, jnp.asarray)
    return retarget(
        as_arrays(driver.coefficients),
        as_arrays(reference.coefficients),
        mode,
        scale=scale,
        driver_camera=as_arrays(driver.camera),
        reference_camera=as_arrays(reference.camera),
    )


class Animator(NamedTuple):
    """Compiled functions of one model: `prepare` gives a reference's features, `animate` one window."""

    prepare: object
    animate: object
    window: int


def make_animator(
    config: ConfigDict, networks: Networks, *, steps: int, guidance: float, spacing: str
) -> Animator:
    """Compile-once functions that `animate_clip` calls for each clip and window."""

    @jax.jit
    def prepare(
        params: PyTree, head: HeadAsset, image: UInt8[np.ndarray, "b s s 3"], coefficients, camera, crop
    ):
        return portrait_features(config, networks, params, head, image, coefficients, camera, crop)

    @jax.jit
    def animate(params: PyTree, head: HeadAsset, features, coefficients, camera, crop, key):
        """One window of B clips: frames and pictures of the driver maps, both (B,T,S,S,3) uint8."""
        driver = driver_input(config, head, coefficients, camera, crop)
        noise = initial_noise(networks, key, *driver.shape[:2])
        frames = sample_from_features(
            config, networks, params, features, driver, noise, steps=steps, guidance=guidance, spacing=spacing
        )
        return frames, driver_preview(config, head, driver, coefficients, camera, crop)

    return Animator(prepare, animate, config.window)


def animate_windows(
    animator: Animator,
    params: PyTree,
    head: HeadAsset,
    portraits: Portrait,
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[np.ndarray, "b 4"],
    seed: int = 0,
) -> Iterator[tuple[UInt8[np.ndarray, "b t s s 3"], UInt8[np.ndarray, "b t s s 3"]]]:
    """Animate B references, one window of all clips after another.

    Args:
      portraits: who is shown (`stack_portraits`).
      coefficients: fields (B, N, ...), already those of the references (`transfer`).
      camera, crop: of the result, (B, ...), constant in time; those of the portraits, as a rule.
      seed: of the sampler's noise.

    Yields:
      Frames and driver-map pictures of each window; the last one may be shorter.
    """
    as_arrays = functools.partial(jax.tree.map, functools.partial(jnp.asarray, dtype=jnp.float32))
    own = as_arrays((portraits.coefficients, portraits.camera, portraits.crop))
    features = animator.prepare(params, head, jnp.asarray(portraits.image), *own)
    length, window = coefficients.expression.shape[1], animator.window
    batch = len(portraits.image)

    def in_time(value):
        value = jnp.asarray(value, jnp.float32)
        return jnp.broadcast_to(value[:, None], (batch, window, *value.shape[1:]))

    camera, crop = jax.tree.map(in_time, camera), in_time(crop)
    key = jax.random.key(seed)
    for start in range(0, length, window):
        index = np.minimum(np.arange(start, start + window), length - 1)
        part = jax.tree.map(lambda x, index=index: jnp.asarray(x)[:, index], coefficients)
        frames, maps = animator.animate(
            params, head, features, part, camera, crop, jax.random.fold_in(key, start // window)
        )
        count = min(window, length - start)
        yield np.asarray(frames)[:, :count], np.asarray(maps)[:, :count]


def animate_clips(
    animator: Animator,
    params: PyTree,
    head: HeadAsset,
    portraits: Portrait,
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[np.ndarray, "b 4"],
    seed: int = 0,
) -> tuple[UInt8[np.ndarray, "b n s s 3"], UInt8[np.ndarray, "b n s s 3"]]:
    """All windows of `animate_windows` joined in time."""
    parts = list(animate_windows(animator, params, head, portraits, coefficients, camera, crop, seed))
    frames, maps = (np.concatenate(side, axis=1) for side in zip(*parts, strict=True))
    return frames, maps
