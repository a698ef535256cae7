"""Training objective: mean squared error of the predicted noise, v or clean latents (method, section 7)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from loki_jax.diffusion.schedule import Schedule

Latents = Float[Array, "*n h w c"]
PREDICTIONS = ("epsilon", "v", "x0")


def sample_timesteps(
    key: PRNGKeyArray, batch: int, frames: int, num_timesteps: int = 1000, shared: float = 0.0
) -> Int[Array, "b t"]:
    """Uniform timesteps in [0, num_timesteps), independent for each frame or shared by a window's frames.

    Args:
      shared: probability that all frames of a window have one timestep, as in sampling. Where timesteps
        are independent, a noisy frame can take its colours from cleaner ones; a small network trained
        on such windows alone does not learn to take them from the reference.
    """
    timesteps = jax.random.randint(key, (batch, frames), 0, num_timesteps)
    if shared == 0:
        return timesteps
    together = jax.random.bernoulli(jax.random.fold_in(key, 1), shared, (batch, 1))
    return jnp.where(together, timesteps[:, :1], timesteps)


def q_sample(schedule: Schedule, x0: Latents, timesteps: Int[Array, "*n"], noise: Latents) -> Latents:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (Ho et al. 2020, equation 4)."""
    signal, sigma = _coefficients(schedule, timesteps)
    return signal * x0 + sigma * noise


def prediction_target(
    schedule: Schedule,
    x0: Latents,
    timesteps: Int[Array, "*n"],
    noise: Latents,
    prediction: str = "epsilon",
) -> Latents:
    """What the network should predict: noise, v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0, or x_0.

    Raises:
      ValueError: unknown prediction.
    """
    check_prediction(prediction)
    if prediction == "epsilon":
        return noise
    if prediction == "x0":
        return x0
    signal, sigma = _coefficients(schedule, timesteps)
    return signal * noise - sigma * x0


def diffusion_loss(
    predict: Callable[[Float[Array, "b t h w c"], Int[Array, "b t"]], Float[Array, "b t h w c"]],
    x0: Float[Array, "b t h w c"],
    key: PRNGKeyArray | Key[Array, " b"],
    schedule: Schedule,
    prediction: str = "epsilon",
    shared_timesteps: float = 0.0,
    min_snr_gamma: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean squared error over all frames at random timesteps.

    Args:
      predict: the network as a function of noisy latents and timesteps.
      x0: clean latents.
      key: randomness of timesteps and noise; one key, or one for each window (B,), so that a window's
        draws do not depend on the rest of the batch.
      prediction: "epsilon", "v" or "x0".
      shared_timesteps: see `sample_timesteps`.
      min_snr_gamma: gamma of the `min_snr_weights` of the frames' errors; 0: equal weights.

    Returns:
      The loss, and {"mse": error of each frame (B,T), not weighted, "timesteps": (B,T)}.

    Raises:
      ValueError: unknown prediction.
    """
    x0 = x0.astype(jnp.float32)

    def draw(key: PRNGKeyArray) -> tuple[Array, Array]:
        key_time, key_noise = jax.random.split(key)
        steps = len(schedule.alphas_cumprod)
        timesteps = sample_timesteps(key_time, 1, x0.shape[1], steps, shared_timesteps)[0]
        return timesteps, jax.random.normal(key_noise, x0.shape[1:])

    timesteps, noise = jax.vmap(draw)(jax.random.split(key, x0.shape[0]) if key.ndim == 0 else key)
    target = prediction_target(schedule, x0, timesteps, noise, prediction)
    error = predict(q_sample(schedule, x0, timesteps, noise), timesteps).astype(jnp.float32) - target
    mse = jnp.square(error).mean((2, 3, 4))
    weighted = mse * min_snr_weights(schedule, timesteps, prediction, min_snr_gamma) if min_snr_gamma else mse
    return weighted.mean(), {"mse": mse, "timesteps": timesteps}


def min_snr_weights(
    schedule: Schedule, timesteps: Int[Array, "*n"], prediction: str, gamma: float
) -> Float[Array, "*n"]:
    """Min-SNR-gamma weights of the squared error.

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"; their gamma is 5. The
    error of the clean latents is weighted by min(SNR, gamma), SNR = alpha_bar / (1 - alpha_bar). In terms of
    what the network predicts that is min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v
    and min(SNR, gamma) for x0. Where no signal is left the weight is 1 for epsilon (its limit) and 0
    for v and x0: at true zero terminal SNR the last step, where sampling starts, is never trained.

    Raises:
      ValueError: unknown prediction.
    """
    check_prediction(prediction)
    alpha = jnp.asarray(schedule.alphas_cumprod)[timesteps]
    snr = alpha / (1 - alpha)
    bounded = jnp.minimum(snr, gamma)
    if prediction == "x0":
        return bounded
    if prediction == "v":
        return bounded / (snr + 1)
    return jnp.minimum(1.0, gamma / jnp.maximum(snr, 1e-30))


def check_prediction(prediction: str) -> None:
    """Raises ValueError unless `prediction` is one of `PREDICTIONS`."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; one of {', '.join(PREDICTIONS)}")


def _coefficients(schedule: Schedule, timesteps: Array) -> tuple[Array, Array]:
    take = lambda a: jnp.asarray(a)[timesteps][..., None, None, None]
    return take(schedule.sqrt_alphas_cumprod), take(schedule.sqrt_one_minus_alphas_cumprod)
