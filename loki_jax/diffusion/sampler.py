"""DDIM sampling (eta 0) with classifier-free guidance. Method, section 7.

The sampler's arithmetic is float32 whatever the network computes in: at the noisiest steps an error
of the prediction is multiplied by 1 / sqrt(alpha_bar), which is about 240 at the first official step.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from loki_jax.diffusion.loss import check_prediction
from loki_jax.diffusion.schedule import Schedule, ddim_timesteps

# At a lower signal power, epsilon prediction divides by almost nothing.
_MIN_SIGNAL_POWER = 1e-8


def ddim_sample(
    denoise: Callable[[Float[Array, "b t h w c"], Int[Array, "b t"], PyTree], Float[Array, "b t h w c"]],
    x_T: Float[Array, "b t h w c"],
    schedule: Schedule,
    *,
    conditional: PyTree,
    unconditional: PyTree = None,
    steps: int = 50,
    guidance: float = 2.0,
    spacing: str = "leading",
    prediction: str = "epsilon",
    clip: float | None = None,
) -> Float[Array, "b t h w c"]:
    """Turns noise into latents in one `lax.scan`; traceable.

    Args:
      denoise: the network; its third argument is `conditional` or `unconditional`. With guidance it
        is called once a step on the doubled batch, the unconditional half first.
      x_T: Gaussian noise.
      conditional, unconditional: pytrees of arrays with leading axis B and the same structure, for
        example (condition, reference features), computed once before the loop.
      guidance: s in u + s (c - u), applied to the prediction; 1 runs only the conditional branch.
      spacing: see `schedule.ddim_timesteps`. The last step of "official" ends at alpha_bar[0] as in
        the public code, that of the others at the estimate of the clean latents.
      clip: bound on the estimate of the clean latents at every step; None for none.

    Raises:
      ValueError: unknown options; guidance other than 1 without `unconditional`; a spacing that asks
        for epsilon prediction where the schedule has no signal left.
    """
    check_prediction(prediction)
    guided = guidance != 1
    if guided and unconditional is None:
        raise ValueError(f"guidance {guidance} needs unconditional inputs")
    timesteps, alpha, alpha_prev = ddim_alphas(schedule, steps, spacing)
    if prediction == "epsilon" and alpha[0] < _MIN_SIGNAL_POWER:
        raise ValueError(
            f"epsilon prediction cannot start at step {timesteps[0]}, where the signal power is "
            f"{alpha[0]:.1e}; use spacing 'leading', fewer steps, or prediction 'v'"
        )
    if guided:
        inputs = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), unconditional, conditional)
    else:
        inputs = conditional

    def predict(x: Array, timestep: Array) -> Array:
        t = jnp.broadcast_to(timestep, x.shape[:2])
        if not guided:
            return denoise(x, t, inputs).astype(jnp.float32)
        twice = lambda a: jnp.concatenate([a, a])
        u, c = jnp.split(denoise(twice(x), twice(t), inputs).astype(jnp.float32), 2)
        return u + guidance * (c - u)

    def step(x: Array, scalars: tuple[Array, Array, Array]) -> tuple[Array, None]:
        timestep, a, a_prev = scalars
        x0, epsilon = estimates(x, predict(x, timestep), a, prediction)
        if clip is not None:
            x0 = jnp.clip(x0, -clip, clip)
            epsilon = (x - jnp.sqrt(a) * x0) / jnp.sqrt(1 - a)
        x_next = jnp.sqrt(a_prev) * x0 + jnp.sqrt(1 - a_prev) * epsilon
        return x_next, None

    visited = jax.tree.map(jnp.asarray, (timesteps, alpha, alpha_prev))
    return jax.lax.scan(step, x_T.astype(jnp.float32), visited)[0]


def ddim_alphas(
    schedule: Schedule, steps: int, spacing: str
) -> tuple[Int[np.ndarray, " steps"], Float[np.ndarray, " steps"], Float[np.ndarray, " steps"]]:
    """Timesteps in the order of sampling (noisiest first), alpha_bar there and where each step ends.

    Raises:
      ValueError: unknown spacing, or too many steps.
    """
    ascending = ddim_timesteps(steps, spacing, len(schedule.alphas_cumprod))
    alpha_bar = np.asarray(schedule.alphas_cumprod)
    alpha = alpha_bar[ascending]
    final = alpha_bar[0] if spacing == "official" else np.float32(1)
    previous = np.concatenate([[final], alpha[:-1]]).astype(np.float32)
    return ascending[::-1].astype(np.int32), alpha[::-1].copy(), previous[::-1].copy()


def estimates(
    x: Float[Array, "*b"], prediction: Float[Array, "*b"], alpha: Float[Array, "*#b"], kind: str
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Clean latents and noise implied by an "epsilon", "v" or "x0" prediction at signal power `alpha`."""
    signal, sigma = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
    if kind == "epsilon":
        return (x - sigma * prediction) / signal, prediction
    if kind == "x0":
        return prediction, (x - signal * prediction) / sigma
    return signal * x - sigma * prediction, signal * prediction + sigma * x
