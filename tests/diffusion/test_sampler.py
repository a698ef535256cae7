"""DDIM with guidance against the public sampler; both solvers against closed forms and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.diffusion.sampler import SOLVERS, clean_estimate, sample_latents, sampling_path, solver_steps
from loki_jax.diffusion.schedule import SPACINGS, Schedule, make_schedule


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
        lambda x: sample_latents(
            denoise,
            x,
            make_schedule(latent_size=int(size), shift_frames=int(frames) - 1),
            conditional=(condition, reference),
            unconditional=(jnp.zeros_like(condition), jnp.zeros_like(reference)),
            steps=steps,
            guidance=float(guidance),
            spacing="official",
        )[0]
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
@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_a_gaussian(prediction, spacing, solver):
    """With a perfect network noise becomes samples of the data, to the error of 500 steps."""
    schedule = make_schedule()
    noise = jax.random.normal(jax.random.key(0), (4, 8, 8, 8, 4))
    out, _ = sample_latents(
        gaussian_denoiser(schedule, 0.7, 0.3, prediction),
        noise,
        schedule,
        conditional=None,
        guidance=1.0,
        solver=solver,
        steps=500,
        spacing=spacing,
        prediction=prediction,
    )
    assert abs(out.mean() - 0.7) < 0.02
    assert abs(out.std() - 0.3) < 0.02
    # The flow of a Gaussian is affine: each sample keeps its rank.
    assert jnp.corrcoef(out.ravel(), noise.ravel())[0, 1] > 0.9999


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize(
    "solver, steps", [("ddim", 1), ("ddim", 5), ("ddim", 50), ("dpm++", 2), ("dpm++", 12)]
)
def test_zero_terminal_snr_reaches_any_brightness(prediction, solver, steps):
    """Lin et al. 2024: from pure noise, trailing steps end at the data's mean, however few they are."""
    schedule = make_schedule(max_beta=1.0)
    noise = jax.random.normal(jax.random.key(0), (4, 8, 8, 8, 4))
    run = lambda spacing: sample_latents(
        gaussian_denoiser(schedule, 3.0, 0.05, prediction),
        noise,
        schedule,
        conditional=None,
        guidance=1.0,
        steps=steps,
        solver=solver,
        spacing=spacing,
        prediction=prediction,
    )[0]
    out = run("trailing")
    assert jnp.isfinite(out).all() and abs(out.mean() - 3.0) < 0.01
    if steps == 1:  # one leading step is the least noisy one: it takes the noise for a picture
        assert abs(run("leading").mean() - 3.0) > 1


def exact_flow(path, x, mean, std):
    """Where the probability flow of N(mean, std^2) takes `x`, from the first to the last alpha_bar."""
    scale = np.sqrt(path[-1] * std**2 + 1 - path[-1]) / np.sqrt(path[0] * std**2 + 1 - path[0])
    return np.sqrt(path[-1]) * mean + scale * (x - np.sqrt(path[0]) * mean)


@pytest.mark.parametrize("solver, order", [("ddim", 1), ("dpm++", 2)])
def test_order_of_convergence(solver, order):
    """Twice the steps, a half or a quarter of the error (Lu et al. 2022, DPM-Solver++, section 4.2).

    Steps are even in the logarithm of the signal-to-noise ratio here; the exact solution is known.
    """
    alpha_bar = 1 / (1 + np.exp(-2 * np.linspace(3.0, -1.0, 961)))
    fields = (alpha_bar, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    schedule = Schedule(*(field.astype(np.float32) for field in fields))
    x = np.linspace(-2, 2, 64, dtype=np.float32).reshape(1, 1, 8, 8, 1)
    errors = []
    for steps in (24, 48, 96):
        out, _ = sample_latents(
            gaussian_denoiser(schedule, 0.7, 0.5, "x0"), jnp.asarray(x), schedule, conditional=None,
            solver=solver, guidance=1.0, steps=steps, spacing="official", prediction="x0",
        )  # fmt: skip
        path = sampling_path(schedule, steps, "official")[1]
        errors.append(np.abs(out - exact_flow(path, x, 0.7, 0.5)).max())
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert np.abs(orders - order).max() < 0.1, (errors, orders)


def dpm_oracle(path, estimate, x):
    """Algorithm 2 of the paper in its own terms, float64; a last step to clean latents is first-order."""
    alpha, sigma = np.sqrt(path), np.sqrt(1 - path)
    half_log_snr = np.full(len(path), np.inf)
    half_log_snr[path < 1] = np.log(np.maximum(alpha, 1e-300) / np.maximum(sigma, 1e-300))[path < 1]
    estimates = []
    for i in range(1, len(path)):
        estimates.append(estimate(x, path[i - 1]))
        h = half_log_snr[i] - half_log_snr[i - 1]
        direction = estimates[-1]
        if i > 1 and np.isfinite(h):
            r = (half_log_snr[i - 1] - half_log_snr[i - 2]) / h
            direction = (1 + 1 / (2 * r)) * estimates[-1] - 1 / (2 * r) * estimates[-2]
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * (np.exp(-h) - 1) * direction
    return x


@pytest.mark.parametrize("max_beta", [0.99, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_dpm_is_the_papers_algorithm(spacing, max_beta):
    """On two Gaussians, whose flow is not affine, and from pure noise (max_beta = 1) too."""
    schedule = make_schedule(max_beta=max_beta)

    def estimate(module, x, alpha):
        variance = alpha * 0.2**2 + 1 - alpha
        towards = module.tanh(module.sqrt(alpha) * x / variance)
        return towards + module.sqrt(alpha) * 0.2**2 * (x - module.sqrt(alpha) * towards) / variance

    def denoise(x, t, inputs):
        return estimate(jnp, x, jnp.asarray(schedule.alphas_cumprod)[t][..., None, None, None])

    x = np.linspace(-3, 3, 64).reshape(1, 1, 8, 8, 1)
    for steps in (1, 2, 12):
        out, _ = sample_latents(
            denoise, jnp.asarray(x, jnp.float32), schedule, conditional=None, solver="dpm++", guidance=1.0,
            steps=steps, spacing=spacing, prediction="x0",
        )  # fmt: skip
        path = sampling_path(schedule, steps, spacing)[1]
        np.testing.assert_allclose(out, dpm_oracle(path, lambda *at: estimate(np, *at), x), atol=2e-5)


def test_steps_of_dpm_at_the_ends_of_the_schedule():
    """The first two and the last one are those of DDIM where the schedule starts at pure noise."""
    schedule = make_schedule(max_beta=1.0)
    dpm = solver_steps(schedule, "dpm++", 12, "trailing")
    assert dpm.alpha[0] == 0 and all(np.isfinite(field).all() for field in dpm)
    np.testing.assert_array_equal(dpm.slope[[0, 1, -1]], 0)
    assert (dpm.slope[2:-1] > 0).all()
    ddim = solver_steps(schedule, "ddim", 12, "trailing")
    assert not ddim.slope.any()
    np.testing.assert_array_equal(dpm.decay, ddim.decay)
    np.testing.assert_array_equal(dpm.gain, ddim.gain)


def test_an_estimate_can_be_replaced_in_every_step():
    """`blend` sees each estimate with what is given for the step; all estimates replaced fix the result."""
    schedule, steps = make_schedule(), 5
    wanted = jax.random.normal(jax.random.key(1), (1, 2, 2, 2, 1))
    given = jnp.arange(steps, dtype=jnp.float32)
    for solver in SOLVERS:
        out, kept = sample_latents(
            gaussian_denoiser(schedule, 0.7, 0.3, "v"), jnp.ones((1, 2, 2, 2, 1)), schedule, conditional=None,
            solver=solver, guidance=1.0, steps=steps, prediction="v",
            blend=lambda x0, number: (wanted, (number, x0.mean())), blended=given,
        )  # fmt: skip
        np.testing.assert_allclose(out, wanted, atol=1e-6)
        np.testing.assert_array_equal(kept[0], given)
        assert kept[1].shape == (steps,)


def test_guidance_extrapolates_and_one_skips_the_unconditional_branch():
    schedule = make_schedule()
    noise = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 1))
    batches = []

    def denoise(x, t, c):
        batches.append(x.shape[0])
        return jnp.broadcast_to(c[:, None, None, None, None], x.shape)

    c, u = jnp.array([0.3, 0.4]), jnp.array([0.1, -0.2])
    run = lambda guidance, conditional, unconditional: sample_latents(
        denoise,
        noise,
        schedule,
        conditional=conditional,
        unconditional=unconditional,
        steps=4,
        guidance=guidance,
    )[0]
    plain = run(1.0, c, None)
    assert set(batches) == {2}
    batches.clear()
    guided = run(2.5, c, u)
    assert set(batches) == {4}
    np.testing.assert_allclose(guided, run(1.0, u + 2.5 * (c - u), None), rtol=1e-5, atol=1e-5)
    assert jnp.abs(guided - plain).max() > 1e-2


NESTED = (2.0, 2.5, 1.0)


@pytest.mark.parametrize(
    "scales, weights",
    [
        (NESTED, (-1.0, -0.5, 1.5, 1.0)),
        ((3.0, 3.0, 3.0), (-2.0, 0, 0, 3.0)),  # collapses to plain guidance
        ((1.0, 1.0, 1.0), (0, 0, 0, 1.0)),
        ((2.0, 2.5, 0.0), (-1.0, -0.5, 2.5, 0)),
    ],
)
def test_nested_guidance_is_one_call_for_the_inputs_with_a_weight(scales, weights):
    """u + l_s (s - u) + l_d (d - s) + l_p (p - d), written out by its weights."""
    schedule, noise = make_schedule(), jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 1))
    inputs, batches = jnp.array([[0.1, -0.2], [0.4, 0.3], [-0.5, 0.2], [0.7, 0.6]]), []

    def denoise(x, t, c):
        batches.append(x.shape[0])
        return jnp.broadcast_to(c[:, None, None, None, None], x.shape)

    u, s, d, p = inputs
    run = lambda conditional, **options: sample_latents(
        denoise, noise, schedule, conditional=conditional, steps=4, **options
    )[0]
    nested = run(p, unconditional=u, between=[s, d], guidance=scales)
    assert set(batches) == {2 * np.count_nonzero(weights)}
    np.testing.assert_allclose(nested, run(jnp.array(weights) @ inputs, guidance=1.0), rtol=1e-5, atol=1e-5)


def test_only_some_steps_are_guided():
    schedule, noise = make_schedule(), jax.random.normal(jax.random.key(0), (1, 1, 2, 2, 1))
    seen = []

    def denoise(x, t, c):
        jax.debug.callback(lambda t: seen.append((t.shape[0], int(t[0, 0]))), t, ordered=True)
        return jnp.broadcast_to(c[:, None, None, None, None], x.shape)

    run = lambda **options: sample_latents(
        denoise, noise, schedule, conditional=jnp.ones(1), unconditional=jnp.zeros(1), steps=10,
        blend=lambda x0, number: (x0, number), blended=jnp.arange(10), **options,
    )  # fmt: skip
    out, kept = run(guided_steps=(0.2, 0.7))
    jax.effects_barrier()
    assert [count for count, _ in seen] == [1, 1, *[2] * 5, 1, 1, 1]
    assert [time for _, time in seen] == [100 * i for i in range(9, -1, -1)]
    np.testing.assert_array_equal(kept, np.arange(10))
    assert (out != run()[0]).all() and (out != run(guidance=1.0)[0]).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_estimate_inverts_the_forward_process(prediction):
    x0, noise = jax.random.normal(jax.random.key(0), (2, 5, 4))
    alpha = jnp.float32(0.3)
    x = jnp.sqrt(alpha) * x0 + jnp.sqrt(1 - alpha) * noise
    v = jnp.sqrt(alpha) * noise - jnp.sqrt(1 - alpha) * x0
    target = {"epsilon": noise, "v": v, "x0": x0}[prediction]
    np.testing.assert_allclose(clean_estimate(x, target, alpha, prediction), x0, atol=1e-5)


def test_clip_bounds_the_result():
    schedule = make_schedule()
    noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 1))
    denoise = gaussian_denoiser(schedule, 3.0, 0.1, "v")
    run = lambda clip: sample_latents(
        denoise,
        noise,
        schedule,
        conditional=None,
        guidance=1.0,
        steps=10,
        spacing="trailing",
        prediction="v",
        clip=clip,
    )[0]
    assert run(None).min() > 2
    np.testing.assert_allclose(run(1.0), 1.0, atol=1e-5)


def test_errors():
    schedule, x = make_schedule(), jnp.zeros((1, 1, 2, 2, 1))
    run = lambda **options: sample_latents(lambda x, t, c: x, x, schedule, conditional=None, **options)
    with pytest.raises(ValueError, match=r"guidance 2.0 needs unconditional inputs"):
        run()
    with pytest.raises(ValueError, match="3 scales of guidance for 1 differences"):
        run(guidance=NESTED)
    with pytest.raises(ValueError, match="unknown prediction 'score'"):
        run(guidance=1.0, prediction="score")
    with pytest.raises(ValueError, match="unknown solver 'euler'; one of ddim, dpm"):
        run(guidance=1.0, solver="euler")
    with pytest.raises(ValueError, match="cannot start at step 999"):
        run(guidance=1.0, spacing="trailing")
    with pytest.raises(ValueError, match="cannot start at step 999"):
        sample_latents(
            lambda x, t, c: x,
            x,
            make_schedule(max_beta=1.0),
            conditional=None,
            guidance=1.0,
            spacing="trailing",
        )
