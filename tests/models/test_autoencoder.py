"""The interface both autoencoders share. Parity of the VAE is in test_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from loki_jax.models.autoencoder import make_autoencoder, sample_posterior


def config(**options):
    return ConfigDict(dict(latent_channels=options.pop("latent_channels", 48), autoencoder=options))


def test_pixel_autoencoder_inverts_exactly():
    model = make_autoencoder(config(kind="pixel", patch=4, scale=0.5))
    images = jax.random.uniform(jax.random.key(0), (2, 16, 24, 3), minval=-1, maxval=1)
    assert not jax.tree.leaves(model.init(jax.random.key(0), images))
    mean, logvar = model.apply({}, images, method="encode")
    assert mean.shape == logvar.shape == (2, 4, 6, 48)
    np.testing.assert_array_equal(model.apply({}, mean, method="decode"), images)
    # A latent holds the pixels of its own patch, row by row, times the scale.
    np.testing.assert_array_equal(mean[1, 2, 3], 0.5 * images[1, 8:12, 12:16].reshape(-1))
    # Deterministic: a draw from the posterior is the mean.
    draw = sample_posterior(jax.random.key(1), mean, logvar)
    np.testing.assert_allclose(draw, mean, atol=3e-6)


def test_posterior_sample_has_the_posterior_moments():
    mean, logvar = jnp.full((1, 64, 64, 4), 2.0), jnp.full((1, 64, 64, 4), np.log(0.25))
    draw = sample_posterior(jax.random.key(0), mean, logvar)
    assert abs(draw.mean() - 2) < 0.02 and abs(draw.std() - 0.5) < 0.02


def test_errors():
    with pytest.raises(ValueError, match="'vq'"):
        make_autoencoder(config(kind="vq"))
    with pytest.raises(ValueError, match="latent_channels is 4.* makes 48"):
        make_autoencoder(config(kind="pixel", patch=4, scale=1.0, latent_channels=4))
    pixel = make_autoencoder(config(kind="pixel", patch=4, scale=1.0))
    with pytest.raises(ValueError, match="patch size 4"):
        pixel.apply({}, jnp.zeros((1, 18, 16, 3)), method="encode")
    kl = make_autoencoder(
        config(kind="kl", latent_channels=4, widths=(8, 8, 8), num_res_blocks=1, scale=1.0, norm_groups=4)
    )
    assert kl.stride == 4
    with pytest.raises(ValueError, match="not divisible by 4"):
        jax.eval_shape(lambda key: kl.init(key, jnp.zeros((1, 18, 16, 3))), jax.random.key(0))
