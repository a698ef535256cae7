"""A tiny model of random parameters, for tests of programs and pipelines."""

import jax
import numpy as np

from configs.demo import get_config
from loki_jax.face.builtin import builtin_head
from loki_jax.networks import build_networks, draw_params
from loki_jax.training.model_file import Checkpoint


def random_model(**changes) -> Checkpoint:
    """configs/demo.py:tiny with attention in the middle alone, and `changes` of its keys."""
    config, head = get_config("tiny"), builtin_head()
    config.update_from_flattened_dict({"model.unet.attention_levels": ()} | changes)
    params = draw_params(build_networks(config, head), jax.random.key(0))
    # Output layers start at zero, which would make every frame alike.
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), params)
    return Checkpoint(config, noisy, head, 0)
