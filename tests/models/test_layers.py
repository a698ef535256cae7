"""Initial values against Flax's own; the convolution's formulation for CPUs against XLA's, both ways."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.models import layers
from loki_jax.models.layers import conv3x3, kernel_init


@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (16, 16), (33, 1)])
def test_initial_values_are_lecun_normal(shape):
    key = jax.random.key(3)
    np.testing.assert_array_equal(kernel_init(key, shape), nn.initializers.lecun_normal()(key, shape))


def xla_conv(x, kernel, stride, padding):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, dimension_numbers=numbers)


def used_primitives(function, *args):
    return {equation.primitive.name for equation in jax.make_jaxpr(function)(*args).eqns}


@pytest.mark.parametrize(
    "stride, padding", [(1, ((1, 1), (1, 1))), (2, ((1, 1), (1, 1))), (2, ((0, 1), (0, 1)))]
)
@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_patches_are_the_convolution(stride, padding, size):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, *size, 5)), jax.random.normal(keys[1], (3, 3, 5, 4))
    expected, pullback = jax.vjp(lambda *a: xla_conv(*a, stride, padding), x, kernel)
    out, ours = jax.vjp(lambda *a: layers._conv3x3_of_patches(*a, stride, padding), x, kernel)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    cotangent = jax.random.normal(keys[2], out.shape)
    for gradient, wanted in zip(ours(cotangent), pullback(cotangent), strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=5e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="patches are for CPUs only")
@pytest.mark.parametrize("shape, patches", [
    ((1, 8, 8, 1280), True), ((1, 16, 16, 640), True), ((1, 32, 32, 640), False), ((16, 8, 8, 1280), False),
    ((1, 8, 8, 64), False),
])  # fmt: skip
def test_patches_only_for_few_pixels_of_many_channels(shape, patches):
    x, kernel = jnp.zeros(shape), jnp.zeros((3, 3, shape[-1], 8))
    used = used_primitives(lambda *a: conv3x3(*a, 1, ((1, 1), (1, 1))), x, kernel)
    assert ("conv_general_dilated" in used) != patches


def test_gradient_reaches_float32_kernels_under_bfloat16():
    module = layers.Conv3x3(4, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 512))
    params = module.init(jax.random.key(1), x)
    gradient = jax.grad(lambda p: module.apply(p, x).astype(jnp.float32).sum())(params)["params"]
    assert gradient["kernel"].dtype == jnp.float32
    assert float(jnp.abs(gradient["kernel"]).max()) > 0
