"""Noise schedule of the diffusion process and the timesteps a sampler visits. Method, section 7.

alpha_bar_t is the signal power at step t: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise.
Everything is computed in float64 with numpy and cast once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

SPACINGS = ("leading", "trailing", "linspace", "official")


class Schedule(NamedTuple):
    """float32 arrays indexed by the timestep, 0 (least noise) to N - 1; numpy, hence jit constants."""

    alphas_cumprod: Float[np.ndarray, " n"]
    sqrt_alphas_cumprod: Float[np.ndarray, " n"]
    sqrt_one_minus_alphas_cumprod: Float[np.ndarray, " n"]


def alphas_cumprod(
    num_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    rescale_zero_snr: bool = True,
    max_beta: float = 0.99,
    shift_frames: int | None = 15,
    latent_size: int = 64,
    base_size: int = 64,
) -> Float[np.ndarray, " n"]:
    """alpha_bar of the published schedule, float64.

    Betas are Stable Diffusion's "scaled linear"; rescaled to zero terminal SNR (Lin et al. 2024,
    algorithm 1) and clipped at `max_beta`; then the signal-to-noise ratio is multiplied by
    sqrt(base_size^2 / (latent_size^2 shift_frames)), because a window of many similar frames at a
    higher resolution hides less under the same noise.

    Args:
      max_beta: 0.99 as published, so that the last step keeps a trace of signal (alpha_bar about 5e-10);
        1 makes the last step pure noise, as Lin et al. intend. Then the network must predict v or x0,
        because pure noise and epsilon do not determine the clean latents.
      shift_frames: n of the shift; the published schedule has 15 although windows have 16 frames
        (method, section 11, row 16). None leaves the ratio alone.
      latent_size: side of the latents.
    """
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2
    if rescale_zero_snr:
        root = np.sqrt(np.cumprod(1.0 - betas))
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        alpha_bar = root**2
        alphas = np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
        betas = np.minimum(1.0 - alphas, max_beta)
    alpha_bar = np.cumprod(1.0 - betas)
    if shift_frames is not None:
        ratio = np.sqrt(base_size**2 / (latent_size**2 * shift_frames))
        snr = ratio * alpha_bar / (1.0 - alpha_bar)
        alpha_bar = snr / (1.0 + snr)
    return alpha_bar


def make_schedule(**options) -> Schedule:
    """The `Schedule` of `alphas_cumprod(**options)`."""
    alpha_bar = alphas_cumprod(**options)
    return Schedule(*(a.astype(np.float32) for a in (alpha_bar, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))))


def sampling_timesteps(
    steps: int, spacing: str = "leading", num_timesteps: int = 1000
) -> Int[np.ndarray, " steps"]:
    """The timesteps of a sampler with `steps` steps, ascending, counted from 0.

    "leading"  floor(i N / n): equal steps from 0, the last one below N - 1.
    "trailing" ends at N - 1, the step of pure noise (needs v-prediction, Lin et al. 2024).
    "linspace" from 0 to N - 1.
    "official" the public code's (range(0, N, N // n) + 1)[:n]: as leading but shifted by one; where
               n does not divide N it drops the noisiest steps.

    Raises:
      ValueError: unknown spacing, or a number of steps the spacing has no room for.
    """
    n, total = steps, num_timesteps
    if not 1 <= n <= total:
        raise ValueError(f"{n} sampling steps; the schedule has {total}")
    if spacing == "leading":
        return np.arange(n) * total // n
    if spacing == "trailing":
        return np.round(np.arange(1, n + 1) * (total / n)).astype(int) - 1
    if spacing == "linspace":
        return np.round(np.linspace(0, total - 1, n)).astype(int) if n > 1 else np.array([total - 1])
    if spacing == "official":
        timesteps = np.arange(0, total, total // n)[:n] + 1
        if timesteps[-1] >= total:
            raise ValueError(f"spacing 'official' has no room for {n} steps in {total}")
        return timesteps
    raise ValueError(f"unknown spacing {spacing!r}; one of {', '.join(SPACINGS)}")
