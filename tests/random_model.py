"""A tiny model of random parameters, for tests of programs and pipelines."""

import jax

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
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return Checkpoint(config, jax.tree.unflatten(structure, noisy), head, 0)
