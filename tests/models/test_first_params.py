"""Parameters drawn array by array are those of the whole program, up to rounding."""

import jax
import numpy as np

from configs.demo import get_config
from loki_jax.face.builtin import builtin_head
from loki_jax.networks import build_networks, draw_params, random_params


def test_draws_equal_those_of_one_program():
    config = get_config("tiny")
    config.model.unet.update({"attention_levels": (), "context_dim": 8})
    config.model.remat = True  # arrays are drawn within recomputed blocks
    networks, key = build_networks(config, builtin_head()), jax.random.key(5)
    shapes = jax.eval_shape(lambda: random_params(networks, key))
    drawn = draw_params(networks, key)
    assert jax.tree.map(np.shape, drawn) == jax.tree.map(np.shape, shapes)

    reference = jax.jit(lambda key: random_params(networks, key)["reference"])(key)
    # Two programs may round the last bit differently, as a processor's instructions allow.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), drawn["reference"], reference)

    some = draw_params(networks, key, given=("reference", "null_prompt"))
    assert some.keys() == shapes.keys() - {"reference", "null_prompt"}
    jax.tree.map(np.testing.assert_array_equal, some["generation"], drawn["generation"])
