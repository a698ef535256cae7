"""DDIM with guidance against the public sampler, and against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.diffusion.sampler import ddim_sample, estimates
from loki_jax.diffusion.schedule import make_schedule


@pytest.mark.parametrize("case", "abcd")
def test_public_sampler(golden, case):
    """The toy network of the reference vectors: eps = 0.1 x + sin(t / 1000) cond + 0.05 ref."""
    data = np.load(golden / "ddim_cfg.npz")
    size, frames, steps, guidance = data[f"{case}/params_image_size_nframes_steps_cfg"]
    steps = int(steps)
    last = lambda x: np.moveaxis(x, 2, -1)  # (B,T,C,h,w) -> (B,T,h,w,C)
    condition, reference = jnp.asarray(last(data[f"{case}/cond"])), jnp.asarray(data[f"{case}/ref_z"])
    times, trajectory = [], []

    def denoise(x, t, inputs):
        condition, reference = inputs
        jax.debug.callback(lambda t: times.append(np.asarray(t)), t, ordered=True)
        jax.debug.callback(lambda x: trajectory.append(np.asarray(x)), x[1:], ordered=True)
        phase = jnp.sin(t.astype(jnp.float32) / 1000)[..., None, None, None]
        return 0.1 * x + phase * condition + 0.05 * reference[:, None, None, None, :]

    x0 = jax.jit(
        lambda x: ddim_sample(
            denoise,
            x,
            make_schedule(latent_size=int(size), shift_frames=int(frames) - 1),
            conditional=(condition, reference),
            unconditional=(jnp.zeros_like(condition), jnp.zeros_like(reference)),
            steps=steps,
            guidance=float(guidance),
            spacing="official",
        )
    )(jnp.asarray(last(data[f"{case}/x_T"])))
    jax.effects_barrier()
    expected_trajectory = np.moveaxis(data[f"{case}/x_before_each_step"], 3, -1)
    for step in range(steps):
        expected = expected_trajectory[step]
        assert np.abs(trajectory[step] - expected).max() < 2e-5 * expected.std(), step
    expected = np.moveaxis(data[f"{case}/x_0"], 1, -1)
    assert np.abs(x0[0] - expected).max() < 2e-5 * expected.std()
    # One call a step on the doubled batch, every frame at the same time.
    assert len(times) == steps
    assert all(t.shape == (2, condition.shape[1]) and (t == t[0, 0]).all() for t in times)
    np.testing.assert_array_equal([t[0, 0] for t in times], data[f"{case}/t_sequence_uncond_and_cond"][::2])


def gaussian_denoiser(schedule, mean, std, prediction):
    """The exact prediction for data distributed as N(mean, std^2)."""

    def denoise(x, t, inputs):
        alpha = jnp.asarray(schedule.alphas_cumprod)[t][..., None, None, None]
        variance = alpha * std**2 + 1 - alpha
        epsilon = jnp.sqrt(1 - alpha) * (x - jnp.sqrt(alpha) * mean) / variance
        x0 = mean + jnp.sqrt(alpha) * std**2 * (x - jnp.sqrt(alpha) * mean) / variance
        v = jnp.sqrt(alpha) * epsilon - jnp.sqrt(1 - alpha) * x0
        return {"epsilon": epsilon, "v": v, "x0": x0}[prediction]

    return denoise


@pytest.mark.parametrize(
    "prediction, spacing",
    [("epsilon", "leading"), ("v", "leading"), ("v", "trailing"), ("v", "linspace"), ("x0", "trailing")],
)
def test_samples_a_gaussian(prediction, spacing):
    """With a perfect network noise becomes samples of the data, to the error of 500 steps."""
    schedule = make_schedule()
    noise = jax.random.normal(jax.random.key(0), (4, 8, 8, 8, 4))
    out = ddim_sample(
        gaussian_denoiser(schedule, 0.7, 0.3, prediction),
        noise,
        schedule,
        conditional=None,
        guidance=1.0,
        steps=500,
        spacing=spacing,
        prediction=prediction,
    )
    assert abs(out.mean() - 0.7) < 0.02
    assert abs(out.std() - 0.3) < 0.02
    # The flow of a Gaussian is affine: each sample keeps its rank.
    assert jnp.corrcoef(out.ravel(), noise.ravel())[0, 1] > 0.9999


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("steps", [1, 5, 50])
def test_zero_terminal_snr_reaches_any_brightness(prediction, steps):
    """Lin et al. 2024: from pure noise, trailing steps end at the data's mean, however few they are."""
    schedule = make_schedule(max_beta=1.0)
    noise = jax.random.normal(jax.random.key(0), (4, 8, 8, 8, 4))
    run = lambda spacing: ddim_sample(
        gaussian_denoiser(schedule, 3.0, 0.05, prediction),
        noise,
        schedule,
        conditional=None,
        guidance=1.0,
        steps=steps,
        spacing=spacing,
        prediction=prediction,
    )
    out = run("trailing")
    assert jnp.isfinite(out).all() and abs(out.mean() - 3.0) < 0.01
    if steps == 1:  # one leading step is the least noisy one: it takes the noise for a picture
        assert abs(run("leading").mean() - 3.0) > 1


def test_guidance_extrapolates_and_one_skips_the_unconditional_branch():
    schedule = make_schedule()
    noise = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 1))
    batches = []

    def denoise(x, t, c):
        batches.append(x.shape[0])
        return jnp.broadcast_to(c[:, None, None, None, None], x.shape)

    c, u = jnp.array([0.3, 0.4]), jnp.array([0.1, -0.2])
    run = lambda guidance, conditional, unconditional: ddim_sample(
        denoise,
        noise,
        schedule,
        conditional=conditional,
        unconditional=unconditional,
        steps=4,
        guidance=guidance,
    )
    plain = run(1.0, c, None)
    assert set(batches) == {2}
    batches.clear()
    guided = run(2.5, c, u)
    assert set(batches) == {4}
    np.testing.assert_allclose(guided, run(1.0, u + 2.5 * (c - u), None), rtol=1e-5, atol=1e-5)
    assert jnp.abs(guided - plain).max() > 1e-2


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_estimates_invert_the_forward_process(prediction):
    x0, noise = jax.random.normal(jax.random.key(0), (2, 5, 4))
    alpha = jnp.float32(0.3)
    x = jnp.sqrt(alpha) * x0 + jnp.sqrt(1 - alpha) * noise
    v = jnp.sqrt(alpha) * noise - jnp.sqrt(1 - alpha) * x0
    target = {"epsilon": noise, "v": v, "x0": x0}[prediction]
    for estimate, expected in zip(estimates(x, target, alpha, prediction), (x0, noise), strict=True):
        np.testing.assert_allclose(estimate, expected, atol=1e-5)


def test_clip_bounds_the_result():
    schedule = make_schedule()
    noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 1))
    denoise = gaussian_denoiser(schedule, 3.0, 0.1, "v")
    run = lambda clip: ddim_sample(
        denoise,
        noise,
        schedule,
        conditional=None,
        guidance=1.0,
        steps=10,
        spacing="trailing",
        prediction="v",
        clip=clip,
    )
    assert run(None).min() > 2
    np.testing.assert_allclose(run(1.0), 1.0, atol=1e-5)


def test_errors():
    schedule, x = make_schedule(), jnp.zeros((1, 1, 2, 2, 1))
    run = lambda **options: ddim_sample(lambda x, t, c: x, x, schedule, conditional=None, **options)
    with pytest.raises(ValueError, match=r"guidance 2.0 needs unconditional inputs"):
        run()
    with pytest.raises(ValueError, match="unknown prediction 'score'"):
        run(guidance=1.0, prediction="score")
    with pytest.raises(ValueError, match="cannot start at step 999"):
        run(guidance=1.0, spacing="trailing")
    with pytest.raises(ValueError, match="cannot start at step 999"):
        ddim_sample(
            lambda x, t, c: x,
            x,
            make_schedule(max_beta=1.0),
            conditional=None,
            guidance=1.0,
            spacing="trailing",
        )
