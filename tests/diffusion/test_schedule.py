"""The noise schedule and the sampler's timesteps against the public code."""

import numpy as np
import pytest

from loki_jax.diffusion.sampler import sampling_path
from loki_jax.diffusion.schedule import alphas_cumprod, make_schedule, sampling_timesteps


@pytest.fixture(scope="module")
def reference(golden):
    return np.load(golden / "noise_schedule.npz")


@pytest.mark.parametrize("size", [64, 32])
@pytest.mark.parametrize("frames", [16, 8])
def test_schedule(reference, size, frames):
    name = f"img{size}_nf{frames}_"
    options = dict(latent_size=size, shift_frames=frames - 1)
    alpha_bar = alphas_cumprod(**options)
    assert alpha_bar.dtype == np.float64
    np.testing.assert_allclose(alpha_bar, reference[name + "alphas_cumprod_f64"], rtol=1e-6)
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    np.testing.assert_allclose(betas, reference[name + "betas_f64"][1:], rtol=1e-6)
    shift = alpha_bar / (1 - alpha_bar)
    plain = alphas_cumprod(shift_frames=None)
    np.testing.assert_allclose(shift / (plain / (1 - plain)), reference[name + "shift_ratio_f64"], rtol=1e-9)
    schedule = make_schedule(**options)
    for field, array in schedule._asdict().items():
        assert array.dtype == np.float32 and array.shape == (1000,)
        # The public arrays went through float32 on the way; near the end, alpha_bar is about 1e-9.
        np.testing.assert_allclose(array, reference[name + field], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(schedule.alphas_cumprod, reference[name + "alphas_cumprod_f64"], rtol=1e-6)


def test_before_the_shift(reference):
    alpha_bar = alphas_cumprod(shift_frames=None)
    expected = reference["base_zsnr_clamped_alphas_cumprod_f32"]
    np.testing.assert_allclose(alpha_bar, expected, rtol=2e-6, atol=1e-9)
    betas = np.concatenate([[1 - alpha_bar[0]], 1 - alpha_bar[1:] / alpha_bar[:-1]])
    np.testing.assert_allclose(betas, reference["base_zsnr_clamped_betas_f32"], rtol=1e-4)
    assert betas[-1] == pytest.approx(0.99)


@pytest.mark.parametrize("shift", [None, 15])
def test_true_zero_terminal_snr(shift):
    """Lin et al. 2024, algorithm 1: no signal at the last step, the first and the shape kept."""
    zero = alphas_cumprod(max_beta=1.0, shift_frames=shift)
    assert zero[-1] == 0 and (np.diff(zero) < 0).all()
    published = alphas_cumprod(shift_frames=shift)
    assert 0 < published[-1] < 1e-7
    np.testing.assert_allclose(zero[:-1], published[:-1], rtol=1e-12)
    # Their algorithm in its own words: shift sqrt(alpha_bar) so that it ends at 0, scale it to its start.
    root = np.sqrt(alphas_cumprod(rescale_zero_snr=False, shift_frames=None))
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    if shift is None:
        np.testing.assert_allclose(zero, expected, rtol=1e-9, atol=1e-15)
    schedule = make_schedule(max_beta=1.0, shift_frames=shift)
    assert schedule.sqrt_alphas_cumprod[-1] == 0 and schedule.sqrt_one_minus_alphas_cumprod[-1] == 1


def test_without_the_rescaling_it_is_stable_diffusions():
    alpha_bar = alphas_cumprod(rescale_zero_snr=False, shift_frames=None)
    betas = np.linspace(np.sqrt(0.00085), np.sqrt(0.012), 1000) ** 2
    np.testing.assert_allclose(alpha_bar, np.cumprod(1 - betas), rtol=1e-12)
    assert 0.0046 < alpha_bar[-1] < 0.0047


@pytest.mark.parametrize("size, frames", [(64, 16), (64, 8), (32, 16), (32, 8)])
@pytest.mark.parametrize("steps", [50, 20, 10])
def test_official_timesteps(reference, size, frames, steps):
    name = f"img{size}_nf{frames}_ddim{steps}_"
    schedule = make_schedule(latent_size=size, shift_frames=frames - 1)
    timesteps, path = sampling_path(schedule, steps, "official")
    alpha, previous = path[:-1], path[1:]
    np.testing.assert_array_equal(timesteps[::-1], reference[name + "timesteps"])
    np.testing.assert_allclose(alpha[::-1], reference[name + "alphas"], rtol=1e-6)
    np.testing.assert_allclose(previous[::-1], reference[name + "alphas_prev"], rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(1 - alpha[::-1]), reference[name + "sqrt_one_minus_alphas"], rtol=2e-6)


@pytest.mark.parametrize(
    "spacing, first, last", [("leading", 0, None), ("trailing", None, 999), ("linspace", 0, 999)]
)
@pytest.mark.parametrize("steps", [2, 3, 7, 15, 50, 333, 600, 999, 1000])
def test_spacings_cover_the_schedule_for_every_number_of_steps(spacing, first, last, steps):
    timesteps = sampling_timesteps(steps, spacing)
    gaps = np.diff(timesteps)
    assert len(timesteps) == steps and timesteps[0] >= 0 and timesteps[-1] <= 999
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1  # equal but for rounding
    if first is not None:
        assert timesteps[0] == first
    if last is not None:
        assert timesteps[-1] == last
    # Neither end is cut short by more than one step.
    assert timesteps[0] <= 1000 / steps and 999 - timesteps[-1] <= 1000 / steps


def test_official_spacing_drops_the_noisiest_steps():
    assert sampling_timesteps(600, "official")[-1] == 600
    assert sampling_timesteps(600, "leading")[-1] > 990


def test_the_last_step():
    schedule = make_schedule()
    assert sampling_path(schedule, 50, "official")[1][-1] == schedule.alphas_cumprod[0]
    for spacing in ("leading", "trailing", "linspace"):
        path = sampling_path(schedule, 50, spacing)[1]
        assert path[-1] == 1 and (np.diff(path) > 0).all()  # every step removes noise


def test_errors():
    with pytest.raises(ValueError, match="unknown spacing 'even'"):
        sampling_timesteps(10, "even")
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"{steps} sampling steps"):
            sampling_timesteps(steps)
    with pytest.raises(ValueError, match="no room for 1000 steps"):
        sampling_timesteps(1000, "official")
