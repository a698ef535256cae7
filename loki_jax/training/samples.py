"""Pictures of what the model does with fixed held-out windows, during training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, UInt8
from ml_collections import ConfigDict

from loki_jax.head.asset import HeadAsset
from loki_jax.networks import Networks, driver_input, portrait_features, sample_from_features


def make_sampler(config: ConfigDict, networks: Networks):
    """sample(params, head, batch) -> (B,T,S,S,3) uint8: the batch's windows, always from the same noise."""

    @jax.jit
    def sample(params: PyTree, head: HeadAsset, batch: dict[str, Any]):
        driver = driver_input(config, head, batch["coefficients"], batch["camera"], batch["crop"])
        # One camera and one crop a clip; the reference frame is of the same clip.
        camera, crop = jax.tree.map(lambda x: x[:, 0], (batch["camera"], batch["crop"]))
        features = portrait_features(
            config, networks, params, head, batch["reference"], batch["reference_coefficients"], camera, crop
        )
        return sample_from_features(
            config, networks, params, features, driver, jax.random.key(0), steps=config.sample.steps,
            guidance=config.sample.guidance, spacing=config.sample.spacing,
        )

    return sample


def sample_sheet(
    reference: UInt8[np.ndarray, "b s s 3"], truth: UInt8[np.ndarray, "b t s s 3"], sampled: UInt8[np.ndarray, "b t s s 3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """For each window a row of true frames over a row of sampled ones, the reference in front of both."""
    rows = []
    for portrait, true_frames, new_frames in zip(reference, truth, sampled, strict=True):
        rows += [np.concatenate([portrait, *true_frames], 1), np.concatenate([portrait, *new_frames], 1)]
    return np.concatenate(rows, 0)


def take_windows(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """The first `count` windows of a batch, as host arrays of this process."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[:count]), batch)
