"""Deterministic samplers with guidance: DDIM and DPM-Solver++(2M). Method, section 7.

The sampler's arithmetic is float32 whatever the network computes in: at the noisiest steps an error
of the prediction is multiplied by 1 / sqrt(alpha_bar), which is about 240 at the first official step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from loki_jax.arrays import ArrayLike
from loki_jax.diffusion.loss import check_prediction
from loki_jax.diffusion.schedule import Schedule, sampling_timesteps

SOLVERS = ("ddim", "dpm++")

# At a lower signal power, epsilon prediction divides by almost nothing.
_MIN_SIGNAL_POWER = 1e-8

Blend = Callable[[Float[Array, "b t h w c"], PyTree], tuple[Float[Array, "b t h w c"], PyTree]]


# The scale of classifier-free guidance, or those of nested guidance.
Guidance = float | tuple[float, ...]


class SolverSteps(NamedTuple):
    """The steps of a sampler, noisiest first; each goes from latents x with the estimate x0 to

        decay x + gain (x0 + slope (x0 - x0 of the step before)).

    Attributes:
      timestep, alpha: where the network is called, and alpha_bar there.
      decay, gain: with slope 0 they make a DDIM step, which is a first-order step of DPM-Solver++.
      slope: how far the estimate is extrapolated by the last two.
    """

    timestep: Int[np.ndarray, " steps"]
    alpha: Float[np.ndarray, " steps"]
    decay: Float[np.ndarray, " steps"]
    gain: Float[np.ndarray, " steps"]
    slope: Float[np.ndarray, " steps"]


def sample_latents(
    denoise: Callable[[Float[Array, "b t h w c"], Int[Array, "b t"], PyTree], Float[Array, "b t h w c"]],
    x_T: Float[Array, "b t h w c"],
    schedule: Schedule,
    *,
    conditional: PyTree,
    unconditional: PyTree = None,
    between: Sequence[PyTree] = (),
    solver: str = "ddim",
    steps: int = 50,
    guidance: Guidance = 2.0,
    guided_steps: tuple[float, float] = (0.0, 1.0),
    spacing: str = "leading",
    prediction: str = "epsilon",
    clip: float | None = None,
    blend: Blend | None = None,
    blended: PyTree = None,
) -> tuple[Float[Array, "b t h w c"], PyTree]:
    """Turns noise into latents in one `lax.scan`; traceable.

    Args:
      denoise: the network; its third argument is `conditional` or another of the inputs below. With guidance
        it is called once a step for all of them, joined to one batch, `unconditional` first.
      x_T: Gaussian noise.
      conditional, unconditional: pytrees of arrays with leading axis B and the same structure, for
        example (condition, reference features), computed once before the loop.
      between: inputs of nested guidance that know more and more, from `unconditional` to `conditional`.
      solver: one of SOLVERS; "ddim" is Song et al. 2021, equation 12, with eta 0, "dpm++" algorithm 2 of
        Lu et al. 2022 (DPM-Solver++).
      guidance: s in u + s (c - u), applied to the prediction; or a scale for each difference of neighbours
        among u, `between` and c: u + s_1 (b_1 - u) + s_2 (b_2 - b_1) + ... Inputs whose weight in this is
        zero are left out: 1 runs only the conditional branch.
      guided_steps: part of the steps that is guided, from the noisiest, 0, to the last, 1. The others run the
        conditional branch (Kynkäänniemi et al. 2024, who leave out the noisiest and the last).
      spacing: see `schedule.sampling_timesteps`. The last step of "official" ends at alpha_bar[0] as in
        the public code, that of the others at the estimate of the clean latents.
      clip: bound on the estimate of the clean latents at every step; None for none.
      blend: changes the estimate of every step: `blend(x0, given)` returns what to use instead and what to
        return of this step. `blended` holds what is `given`, with a leading axis of steps.

    Returns:
      the latents, and what `blend` returned, with a leading axis of steps.

    Raises:
      ValueError: unknown options; guidance other than 1 without `unconditional`; a spacing that asks
        for epsilon prediction where the schedule has no signal left.
    """
    check_prediction(prediction)
    scales = guidance if isinstance(guidance, tuple) else (guidance,)
    branches, scales = _needed([unconditional, *between, conditional], scales)
    if scales and branches[0] is None:
        raise ValueError(f"guidance {guidance} needs unconditional inputs")
    plan = solver_steps(schedule, solver, steps, spacing)
    if prediction == "epsilon" and plan.alpha[0] < _MIN_SIGNAL_POWER:
        raise ValueError(
            f"epsilon prediction cannot start at step {plan.timestep[0]}, where the signal power is "
            f"{plan.alpha[0]:.1e}; use spacing 'leading', fewer steps, or prediction 'v'"
        )

    def predict(branches: Sequence[PyTree], scales: Sequence[float], x: Array, timestep: ArrayLike) -> Array:
        t = jnp.broadcast_to(timestep, x.shape[:2])
        copies = lambda a: jnp.concatenate([a] * len(branches))
        inputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), *branches)
        parts = jnp.split(denoise(copies(x), copies(t), inputs).astype(jnp.float32), len(branches))
        guided = parts[0]
        for scale, less, more in zip(scales, parts[:-1], parts[1:], strict=True):
            guided = guided + scale * (more - less)
        return guided

    def step(predict: Callable, carry: tuple[Array, Array], scanned: tuple[SolverSteps, PyTree]):
        (x, before), (now, given) = carry, scanned
        x0 = clean_estimate(x, predict(x, now.timestep), now.alpha, prediction)
        if clip is not None:
            x0 = jnp.clip(x0, -clip, clip)
        x0, kept = (x0, None) if blend is None else blend(x0, given)
        return (now.decay * x + now.gain * (x0 + now.slope * (x0 - before)), x0), kept

    x_T = x_T.astype(jnp.float32)
    scanned = jax.tree.map(jnp.asarray, (plan, blended))
    guided = functools.partial(predict, branches, scales)
    plain = functools.partial(predict, branches[-1:], ())
    first, last = (round(share * steps) for share in guided_steps)
    carry, kept = (x_T, jnp.zeros_like(x_T)), []
    for begin, end, predicted in ((0, first, plain), (first, last, guided), (last, steps, plain)):
        if begin < end:
            part = jax.tree.map(lambda x, begin=begin, end=end: x[begin:end], scanned)
            carry, of_part = jax.lax.scan(functools.partial(step, predicted), carry, part)
            kept.append(of_part)
    return carry[0], jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)


def check_guidance(guidance: Guidance, guided_steps: tuple[float, float]) -> None:
    """Raises ValueError unless these are one scale, or those of source, motion and history, and a part."""
    scales = guidance if isinstance(guidance, tuple) else (guidance,)
    if len(scales) not in (1, 3) or not all(math.isfinite(scale) for scale in scales):
        raise ValueError(
            f"guidance is {guidance}, expected a finite number, or three: of source, motion and history"
        )
    if len(guided_steps) != 2 or not 0 <= guided_steps[0] <= guided_steps[1] <= 1:
        raise ValueError(f"guided_steps is {guided_steps}, expected two ascending numbers from 0 to 1")


def _needed(branches: list[PyTree], scales: tuple[float, ...]) -> tuple[list[PyTree], tuple[float, ...]]:
    """The inputs with a weight in nested guidance, and the scales of the differences between them.

    The weight of input i is scale i - scale i + 1, where the first scale is 1 and none is after the last.

    Raises:
      ValueError: other than one scale for each difference.
    """
    if len(scales) != len(branches) - 1:
        raise ValueError(f"{len(scales)} scales of guidance for {len(branches) - 1} differences")
    bounds = (1, *scales, 0)
    used = [i for i in range(len(branches)) if bounds[i] != bounds[i + 1]]
    return [branches[i] for i in used], tuple(bounds[i] for i in used[1:])


def solver_steps(schedule: Schedule, solver: str, steps: int, spacing: str) -> SolverSteps:
    """What a solver does in each step; computed in float64.

    Steps that begin at pure noise (alpha_bar = 0) or end at clean latents are infinitely long in the
    logarithm of the signal-to-noise ratio, in which DPM-Solver++ extrapolates. A step from pure noise has no
    step before it, the next one extrapolates by 0, the limit, and the last one is first-order.

    Raises:
      ValueError: unknown solver or spacing, or too many steps.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; one of {', '.join(SOLVERS)}")
    timesteps, path = sampling_path(schedule, steps, spacing)
    signal, sigma = np.sqrt(path), np.sqrt(1 - path)
    decay = sigma[1:] / sigma[:-1]
    gain = signal[1:] - signal[:-1] * decay
    slope = np.zeros(steps)
    if solver == "dpm++":
        with np.errstate(divide="ignore", invalid="ignore"):
            length = np.diff(np.log(signal) - np.log(sigma))
            ratio = length[1:] / length[:-1]
        slope[1:] = np.where(np.isfinite(ratio), ratio / 2, 0)
    scalars = (values.astype(np.float32) for values in (path[:-1], decay, gain, slope))
    return SolverSteps(timesteps, *scalars)


def sampling_path(
    schedule: Schedule, steps: int, spacing: str
) -> tuple[Int[np.ndarray, " steps"], Float[np.ndarray, " steps+1"]]:
    """Timesteps in the order of sampling (noisiest first); alpha_bar at each and where the last step ends.

    Raises:
      ValueError: unknown spacing, or too many steps.
    """
    ascending = sampling_timesteps(steps, spacing, len(schedule.alphas_cumprod))
    alpha_bar = np.asarray(schedule.alphas_cumprod, np.float64)
    final = alpha_bar[0] if spacing == "official" else 1
    return ascending[::-1].astype(np.int32), np.append(alpha_bar[ascending[::-1]], final)


def clean_estimate(
    x: Float[Array, "*b"], prediction: Float[Array, "*b"], alpha: Float[ArrayLike, "*#b"], kind: str
) -> Float[Array, "*b"]:
    """Clean latents implied by an "epsilon", "v" or "x0" prediction at signal power `alpha`."""
    signal, sigma = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
    if kind == "epsilon":
        return (x - sigma * prediction) / signal
    return prediction if kind == "x0" else signal * x - sigma * prediction
