"""The training objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.diffusion.loss import (
    diffusion_loss,
    min_snr_weights,
    prediction_target,
    q_sample,
    sample_timesteps,
)
from loki_jax.diffusion.schedule import make_schedule

SCHEDULE = make_schedule()


def test_timesteps_are_uniform_and_independent_for_each_frame():
    timesteps = np.asarray(sample_timesteps(jax.random.key(0), 4000, 4))
    assert timesteps.shape == (4000, 4)
    assert timesteps.min() == 0 and timesteps.max() == 999
    counts = np.histogram(timesteps, bins=10, range=(0, 1000))[0]
    assert np.abs(counts - 1600).max() < 200  # five standard deviations
    correlation = np.corrcoef(timesteps.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.08


def test_a_share_of_windows_has_one_timestep():
    timesteps = np.asarray(sample_timesteps(jax.random.key(0), 4000, 4, shared=0.75))
    together = (timesteps == timesteps[:, :1]).all(1)
    assert abs(together.mean() - 0.75) < 0.03
    counts = np.histogram(timesteps[together, 0], bins=10, range=(0, 1000))[0]
    assert np.abs(counts - counts.mean()).max() < 90  # five standard deviations
    # The other windows stay as they would have been.
    independent = np.asarray(sample_timesteps(jax.random.key(0), 4000, 4))
    np.testing.assert_array_equal(timesteps[~together], independent[~together])


def test_q_sample_mixes_each_frame_at_its_own_time():
    x0, noise = jax.random.normal(jax.random.key(0), (2, 2, 3, 4, 4, 5))
    timesteps = jnp.array([[0, 500, 999], [10, 20, 30]])
    x = q_sample(SCHEDULE, x0, timesteps, noise)
    for b in range(2):
        for t in range(3):
            alpha = SCHEDULE.alphas_cumprod[timesteps[b, t]]
            expected = np.sqrt(alpha) * x0[b, t] + np.sqrt(1 - alpha) * noise[b, t]
            np.testing.assert_allclose(x[b, t], expected, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_loss_of_a_known_prediction(prediction):
    x0 = jax.random.normal(jax.random.key(0), (3, 4, 4, 4, 2))
    seen = {}

    def zero(x, t):
        seen.update(x=x, t=t)
        return jnp.zeros_like(x)

    loss, aux = diffusion_loss(zero, x0, jax.random.key(1), SCHEDULE, prediction)
    # Recover the noise from what the network was shown.
    alpha = jnp.asarray(SCHEDULE.alphas_cumprod)[seen["t"]][..., None, None, None]
    noise = (seen["x"] - jnp.sqrt(alpha) * x0) / jnp.sqrt(1 - alpha)
    v = jnp.sqrt(alpha) * noise - jnp.sqrt(1 - alpha) * x0
    target = {"epsilon": noise, "v": v, "x0": x0}[prediction]
    np.testing.assert_allclose(aux["mse"], jnp.square(target).mean((2, 3, 4)), rtol=1e-3)
    np.testing.assert_allclose(loss, aux["mse"].mean(), rtol=1e-6)
    np.testing.assert_array_equal(aux["timesteps"], seen["t"])
    np.testing.assert_allclose(
        prediction_target(SCHEDULE, x0, seen["t"], noise, prediction), target, atol=1e-5
    )


def test_a_perfect_prediction_has_no_loss():
    x0 = jnp.ones((2, 3, 4, 4, 2))

    def perfect(x, t):
        alpha = jnp.asarray(SCHEDULE.alphas_cumprod)[t][..., None, None, None]
        return (x - jnp.sqrt(alpha)) / jnp.sqrt(1 - alpha)

    loss, _ = diffusion_loss(perfect, x0, jax.random.key(0), SCHEDULE)
    assert loss < 1e-8


def test_key_decides_everything():
    x0 = jnp.ones((2, 3, 4, 4, 2))
    run = lambda seed: diffusion_loss(lambda x, t: x, x0, jax.random.key(seed), SCHEDULE)[0]
    assert run(0) == run(0) != run(1)


def test_unknown_prediction():
    with pytest.raises(ValueError, match="unknown prediction 'score'"):
        diffusion_loss(lambda x, t: x, jnp.ones((1, 1, 2, 2, 1)), jax.random.key(0), SCHEDULE, "score")


def test_min_snr_weights_by_their_formulas():
    """Hang et al. 2023: min(SNR, gamma) / SNR, / (SNR + 1) and itself, at every timestep."""
    alpha = SCHEDULE.alphas_cumprod.astype(np.float64)
    snr = alpha / (1 - alpha)
    assert snr[0] > 50 and snr[-1] < 1e-8  # the bound acts on one side only
    for prediction, divisor in (("epsilon", snr), ("v", snr + 1), ("x0", 1.0)):
        weights = min_snr_weights(SCHEDULE, jnp.arange(1000), prediction, 5.0)
        np.testing.assert_allclose(weights, np.minimum(snr, 5.0) / divisor, rtol=1e-4)
    for prediction, limit in (("epsilon", 1.0), ("v", 0.0), ("x0", 0.0)):
        zero = make_schedule(max_beta=1.0)
        assert min_snr_weights(zero, jnp.array([999]), prediction, 5.0) == limit


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_min_snr_is_one_objective_for_all_predictions(prediction):
    """Weighted, the same wrong clean latents cost the same whatever the network is asked for."""
    schedule = make_schedule(shift_frames=None)
    x0, wrong = jax.random.normal(jax.random.key(0), (2, 3, 8, 4, 4, 2))
    x0 = x0 / 3
    key, seen = jax.random.key(1), {}

    def predict(x, t):
        """What a network answers that takes `wrong` for the clean latents."""
        seen["t"] = t
        alpha = jnp.asarray(schedule.alphas_cumprod)[t][..., None, None, None]
        noise = (x - jnp.sqrt(alpha) * wrong) / jnp.sqrt(1 - alpha)
        return prediction_target(schedule, wrong, t, noise, prediction)

    loss, aux = diffusion_loss(predict, x0, key, schedule, prediction, min_snr_gamma=5.0)
    alpha = schedule.alphas_cumprod.astype(np.float64)[np.asarray(seen["t"])]
    clean = np.square(np.asarray(wrong - x0, np.float64)).mean((2, 3, 4))
    expected = (np.minimum(alpha / (1 - alpha), 5.0) * clean).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-3)
    plain, plain_aux = diffusion_loss(predict, x0, key, schedule, prediction)
    np.testing.assert_array_equal(aux["mse"], plain_aux["mse"])
    np.testing.assert_allclose(plain, aux["mse"].mean(), rtol=1e-6)
    assert abs(plain - loss) > 1e-3
