"""Deterministic samplers with classifier-free guidance: DDIM and DPM-Solver++(2M). Method, section 7.

The sampler's arithmetic is float32 whatever the network computes in: at the noisiest steps an error
of the prediction is multiplied by 1 / sqrt(alpha_bar), which is about 240 at the first official step.
"""

from __future__ import annotations

from collections.abc import Callable
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
    solver: str = "ddim",
    steps: int = 50,
    guidance: float = 2.0,
    spacing: str = "leading",
    prediction: str = "epsilon",
    clip: float | None = None,
    blend: Blend | None = None,
    blended: PyTree = None,
) -> tuple[Float[Array, "b t h w c"], PyTree]:
    """Turns noise into latents in one `lax.scan`; traceable.

    Args:
      denoise: the network; its third argument is `conditional` or `unconditional`. With guidance it
        is called once a step on the doubled batch, the unconditional half first.
      x_T: Gaussian noise.
      conditional, unconditional: pytrees of arrays with leading axis B and the same structure, for
        example (condition, reference features), computed once before the loop.
      solver: one of SOLVERS; "ddim" is Song et al. 2021, equation 12, with eta 0, "dpm++" algorithm 2 of
        Lu et al. 2022 (DPM-Solver++).
      guidance: s in u + s (c - u), applied to the prediction; 1 runs only the conditional branch.
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
    guided = guidance != 1
    if guided and unconditional is None:
        raise ValueError(f"guidance {guidance} needs unconditional inputs")
    plan = solver_steps(schedule, solver, steps, spacing)
    if prediction == "epsilon" and plan.alpha[0] < _MIN_SIGNAL_POWER:
        raise ValueError(
            f"epsilon prediction cannot start at step {plan.timestep[0]}, where the signal power is "
            f"{plan.alpha[0]:.1e}; use spacing 'leading', fewer steps, or prediction 'v'"
        )
    if guided:
        inputs = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), unconditional, conditional)
    else:
        inputs = conditional

    def predict(x: Array, timestep: ArrayLike) -> Array:
        t = jnp.broadcast_to(timestep, x.shape[:2])
        if not guided:
            return denoise(x, t, inputs).astype(jnp.float32)
        twice = lambda a: jnp.concatenate([a, a])
        u, c = jnp.split(denoise(twice(x), twice(t), inputs).astype(jnp.float32), 2)
        return u + guidance * (c - u)

    def step(carry: tuple[Array, Array], scanned: tuple[SolverSteps, PyTree]):
        (x, before), (now, given) = carry, scanned
        x0 = clean_estimate(x, predict(x, now.timestep), now.alpha, prediction)
        if clip is not None:
            x0 = jnp.clip(x0, -clip, clip)
        x0, kept = (x0, None) if blend is None else blend(x0, given)
        return (now.decay * x + now.gain * (x0 + now.slope * (x0 - before)), x0), kept

    x_T = x_T.astype(jnp.float32)
    scanned = jax.tree.map(jnp.asarray, (plan, blended))
    (x, _), kept = jax.lax.scan(step, (x_T, jnp.zeros_like(x_T)), scanned)
    return x, kept


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
