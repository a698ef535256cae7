"""Levenberg-Marquardt with bounds for the problem of `loki_jax.fitting.problem`.

The normal equations are an arrow (shape against frames) plus a band in time. They are solved by conjugate
gradients, preconditioned by the exact Cholesky solution of the arrow; the cost is linear in the number of
frames. All of it is one jitted function. Method, section 8.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from loki_jax.arrays import ArrayLike
from loki_jax.face.skinning import make_identity
from loki_jax.fitting.problem import HIGHEST, Layout, Problem, Surface, frame_linearisation, project_frame

_ACTIVE_SET_ROUNDS = 4
PIXEL_HUBER = 1.5  # differences of surface points beyond so many standard deviations count linearly
_CPU_CHUNK = 4  # frames linearised at a time where the cache is small


class _Frame(NamedTuple):
    """What is observed in one frame: fields of `Problem`, without the leading axis."""

    observed: Float[ArrayLike, "n 2"]
    weight: Float[ArrayLike, " n"]
    sigma: Float[ArrayLike, " n"]
    surface: Surface | None


def _normal_equations(problem: Problem, layout: Layout, shape, x):
    """Cost of the data, and of the robustly weighted residuals J^T J (N, s + p, s + p) and J^T r (N, s + p).

    On a CPU a few frames at a time: their Jacobians stay in the cache and are never written out.
    """
    chunk = min(len(x), _CPU_CHUNK) if jax.default_backend() == "cpu" else len(x)
    linearise = frame_linearisation(problem, layout, shape)

    def frame(item):
        x, seen = item
        predicted, by_shape, by_frame = linearise(x)
        jacobian, n = jnp.concatenate([by_shape, by_frame], axis=-1), problem.n_landmarks
        residual = problem.observables(predicted) - seen.observed
        deviation = jnp.linalg.norm(residual, axis=-1) / seen.sigma
        weight = seen.weight * jnp.minimum(1.0, problem.huber / jnp.maximum(deviation, 1e-6)) / seen.sigma**2
        rows = jnp.concatenate([problem.observables(jacobian), residual[..., None]], axis=-1)
        rows = (rows * jnp.sqrt(weight)[:, None, None]).reshape(-1, rows.shape[-1])
        gram = jnp.einsum("ra,rb->ab", rows, rows, precision=HIGHEST)
        gram, gradient = gram[:-1, :-1], gram[:-1, -1]
        cost = jnp.sum(seen.weight * _huber(deviation, problem.huber))
        if seen.surface is not None:
            own, tensor, pull = _look(seen.surface, predicted[n:])
            cost += own
            pushed = sum(tensor[:, :, j, None] * jacobian[n:, None, j] for j in range(2))
            pushed = pushed.reshape(-1, pushed.shape[-1])
            flat = jacobian[n:].reshape(pushed.shape)
            gram += jnp.matmul(flat.T, pushed, precision=HIGHEST)
            gradient += jnp.matmul(flat.T, pull.reshape(-1), precision=HIGHEST)
        return cost, gram, gradient

    cost, gram, gradient = jax.lax.map(frame, (x, _frames(problem)), batch_size=chunk)
    return jnp.sum(cost) + _prior_cost(problem, shape, x), gram, gradient


def _second_difference(x: Float[Array, "N p"], real: Float[ArrayLike, " N"]) -> Float[Array, "M p"]:
    inside = real[2:] * real[1:-1] * real[:-2]
    return (x[2:] - 2 * x[1:-1] + x[:-2]) * inside[:, None]


def _smoothing(problem: Problem, x: Float[Array, "N p"]) -> Float[Array, "N p"]:
    """Gradient of the smoothness term: a band of five frames, applied without building it."""
    bent = _second_difference(x, problem.real) * problem.smoothness
    bent = bent * (problem.real[2:] * problem.real[1:-1] * problem.real[:-2])[:, None]
    return (
        jnp.pad(bent, ((0, 2), (0, 0)))
        - 2 * jnp.pad(bent, ((1, 1), (0, 0)))
        + jnp.pad(bent, ((2, 0), (0, 0)))
    )


def residuals(
    problem: Problem, layout: Layout, shape: Float[Array, " s"], x: Float[Array, "N p"]
) -> Float[Array, "N n 2"]:
    """Errors in pixels of the observations for a shape and the unknowns of every frame."""
    return jax.vmap(problem.observables)(_predicted(problem, layout, shape, x)) - problem.observed


def _predicted(problem: Problem, layout: Layout, shape, x) -> Float[Array, "N m 2"]:
    vertices = make_identity(problem.head, shape).vertices
    return jax.vmap(lambda x: project_frame(problem, layout, vertices, x))(x)


def _huber(deviation: Array, limit: Float[ArrayLike, ""] | float) -> Array:
    return jnp.where(deviation < limit, 0.5 * deviation**2, limit * deviation - 0.5 * limit**2)


def _frames(problem: Problem) -> _Frame:
    """What is observed, with a leading axis of frames."""
    surface = problem.surface
    if surface is not None:
        shared = {name: getattr(surface, name) for name in ("texture", "scale")}
        wide = {k: jnp.broadcast_to(v, (len(problem.observed), *jnp.shape(v))) for k, v in shared.items()}
        surface = surface._replace(**wide)
    return _Frame(problem.observed, problem.weight, problem.sigma, surface)


def _look(surface: Surface, pixels: Float[Array, "m 2"]):
    """Of the points at `pixels` in one frame: robust cost, and J^T J (m, 2, 2) and J^T r (m, 2) by pixels."""
    place = (pixels - surface.corner) * surface.scale - 0.5
    look = lambda shift: _bilinear(surface.pictures, place + shift)
    steps = jnp.array([[1.0, 0.0], [0.0, 1.0]]) / 2
    slope = jnp.stack([look(step) - look(-step) for step in steps], axis=-1) * surface.scale
    difference = look(jnp.zeros(2)) - surface.texture
    size = jnp.linalg.norm(difference, axis=-1) / surface.noise
    weight = surface.weight * jnp.minimum(1.0, PIXEL_HUBER / jnp.maximum(size, 1e-6))
    tensor = jnp.einsum("m,mci,mcj->mij", weight, slope, slope)
    pull = jnp.einsum("m,mci,mc->mi", weight, slope, difference)
    return jnp.sum(surface.weight * surface.noise**2 * _huber(size, PIXEL_HUBER)), tensor, pull


def surface_looks(
    pictures: Float[Array, "N S S C"],
    corner: Float[Array, "N 2"],
    scale: Float[ArrayLike, ""],
    pixels: Float[Array, "N m 2"],
) -> Float[Array, "N m C"]:
    """What the pictures (`Surface`) show at these pixels of the frames."""

    def frame(item):
        picture, corner, pixels = item
        return _bilinear(picture, (pixels - corner) * scale - 0.5)

    return jax.lax.map(frame, (pictures, corner, pixels))


def _bilinear(picture: Float[ArrayLike, "s s c"], place: Float[Array, "m 2"]) -> Float[Array, "m c"]:
    """The picture between its pixels (column, row), held beyond its edge."""
    size = picture.shape[0]
    place = jnp.clip(place, 0.0, size - 1.001)
    low = place.astype(jnp.int32)
    right, down = (place - low)[:, :1], (place - low)[:, 1:]
    flat = picture.reshape(size * size, -1)
    start = low[:, 1] * size + low[:, 0]
    above = flat[start] * (1 - right) + flat[start + 1] * right
    below = flat[start + size] * (1 - right) + flat[start + size + 1] * right
    return above * (1 - down) + below * down


def _cost(problem: Problem, layout: Layout, shape, x) -> Float[Array, ""]:
    def frame(item):
        predicted, seen = item
        deviation = jnp.linalg.norm(problem.observables(predicted) - seen.observed, axis=-1) / seen.sigma
        cost = jnp.sum(seen.weight * _huber(deviation, problem.huber))
        if seen.surface is not None:
            cost += _look(seen.surface, predicted[problem.n_landmarks :])[0]
        return cost

    data = jnp.sum(jax.vmap(frame)((_predicted(problem, layout, shape, x), _frames(problem))))
    return data + _prior_cost(problem, shape, x)


def _prior_cost(problem: Problem, shape, x) -> Float[Array, ""]:
    prior = jnp.sum(problem.real[:, None] * problem.frame_prior * (x - problem.frame_mean) ** 2)
    prior += jnp.sum(problem.shape_prior * shape**2)
    bent = _second_difference(x, problem.real) if len(x) > 2 else jnp.zeros_like(x)
    return 0.5 * (prior + jnp.sum(problem.smoothness * bent**2))


def _inverse(matrix: Float[Array, "*b n n"]) -> Float[Array, "*b n n"]:
    """Inverse of symmetric positive definite matrices.

    XLA's CPU backend solves batches of triangular systems a hundred times slower than it multiplies
    them. So the Cholesky factor is inverted by products alone: the inverses of the diagonal blocks of
    size b give those of size 2b.
    """
    n = matrix.shape[-1]
    if n == 0:  # a known shape
        return matrix
    full = 1 << (n - 1).bit_length()
    factor = jnp.linalg.cholesky(matrix)
    padding = [(0, 0)] * (matrix.ndim - 2) + [(0, full - n)] * 2
    factor = jnp.pad(factor, padding) + jnp.diag((jnp.arange(full) >= n).astype(matrix.dtype))
    inverse = 1 / jnp.diagonal(factor, axis1=-2, axis2=-1)[..., None, None]  # (..., full / b, b, b)
    size = 1
    while size < full:
        pairs = full // (2 * size)
        tiles = factor.reshape(*factor.shape[:-2], pairs, 2 * size, pairs, 2 * size)
        below = jnp.moveaxis(jnp.diagonal(tiles, axis1=-4, axis2=-2), -1, -3)[..., size:, :size]
        inverse = inverse.reshape(*factor.shape[:-2], pairs, 2, size, size)
        first, second = inverse[..., 0, :, :], inverse[..., 1, :, :]
        below = -jnp.matmul(jnp.matmul(second, below, precision=HIGHEST), first, precision=HIGHEST)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([upper, jnp.concatenate([below, second], axis=-1)], axis=-2)
        size *= 2
    inverse = inverse.reshape(*factor.shape)[..., :n, :n]
    return jnp.einsum("...ka,...kb->...ab", inverse, inverse, precision=HIGHEST)


def _step(problem: Problem, layout: Layout, shape, x, damping):
    """The cost, and the damped Gauss-Newton step within the bounds (the quadratic model's minimiser there).

    Which unknowns lie at a bound is found by the primal-dual active set method: solve with a guess,
    release those whose multiplier has the wrong sign, hold those that left the box, a few times.
    """
    cost, gram, gradient = _normal_equations(problem, layout, shape, x)
    n_shape = len(shape)

    def product(spec, *args):
        return jnp.einsum(spec, *args, precision=HIGHEST)

    prior = problem.frame_prior * problem.real[:, None]
    banded = len(x) > 2  # shorter clips have no second difference
    gradient_x = gradient[:, n_shape:] + prior * (x - problem.frame_mean)
    gradient_s = gradient[:, :n_shape].sum(0) + problem.shape_prior * shape
    diagonal_smooth = jnp.zeros_like(x)
    if banded:
        gradient_x += _smoothing(problem, x)
        inside = problem.real[2:] * problem.real[1:-1] * problem.real[:-2]
        counts = jnp.pad(inside, (0, 2)) + 4 * jnp.pad(inside, 1) + jnp.pad(inside, (2, 0))
        diagonal_smooth = counts[:, None] * problem.smoothness

    block_x, block_xs = gram[:, n_shape:, n_shape:], gram[:, n_shape:, :n_shape]
    block_s = gram[:, :n_shape, :n_shape].sum(0) + jnp.diag(problem.shape_prior)
    diagonal_x = jnp.diagonal(block_x, axis1=1, axis2=2) + prior + diagonal_smooth
    # Padded frames have no term at all: a unit diagonal keeps them where they are.
    block_x += jax.vmap(jnp.diag)(prior + damping * diagonal_x + (1 - problem.real[:, None]))
    block_s += damping * jnp.diag(jnp.diag(block_s))

    def multiply(value_x, value_s):
        result_x = product("nab,nb->na", block_x, value_x) + product("nas,s->na", block_xs, value_s)
        if banded:
            result_x += _smoothing(problem, value_x)
        return result_x, product("nas,na->s", block_xs, value_x) + product("st,t->s", block_s, value_s)

    def solve(free, fixed, guess):
        """Step with the unknowns outside `free` moved by `fixed`."""
        blocks = (block_x + jax.vmap(jnp.diag)(diagonal_smooth)) * free[:, :, None] * free[:, None, :]
        inverse_x = _inverse(blocks + jax.vmap(jnp.diag)(1 - free))
        coupling = block_xs * free[..., None]
        inverse_xs = product("nab,nbs->nas", inverse_x, coupling)
        inverse_s = _inverse(block_s - product("nas,nat->st", coupling, inverse_xs))

        def solve_arrow(value):
            value_x, value_s = value
            solution_s = product("st,t->s", inverse_s, value_s - product("nas,na->s", inverse_xs, value_x))
            solution_x = product("nab,nb->na", inverse_x, value_x) - product(
                "nas,s->na", inverse_xs, solution_s
            )
            return solution_x, solution_s

        def multiply_free(value):
            result_x, result_s = multiply(value[0] * free, value[1])
            return result_x * free + value[0] * (1 - free), result_s

        moved_x, moved_s = multiply(fixed, jnp.zeros_like(shape))
        target = (-(gradient_x + moved_x) * free, -(gradient_s + moved_s))
        start = (guess[0] * free, guess[1])
        (step_x, step_s), _ = jax.scipy.sparse.linalg.cg(
            multiply_free, target, x0=start, tol=1e-3, maxiter=20, M=solve_arrow
        )
        return step_x * free + fixed, step_s

    lower, upper = problem.lower - x, problem.upper - x

    def refine(_, state):
        step_x, step_s, multiplier = state
        reach = step_x + multiplier / diagonal_x
        low, high = reach < lower, reach > upper
        fixed = jnp.where(low, lower, jnp.where(high, upper, 0.0))
        step_x, step_s = solve(1.0 - (low | high), fixed, (step_x, step_s))
        multiplier = -(gradient_x + multiply(step_x, step_s)[0]) * (low | high)
        return step_x, step_s, multiplier

    # The first guess of the active set: bounds that the gradient alone pushes against.
    start = (
        jnp.zeros_like(x),
        jnp.zeros_like(shape),
        jnp.where((lower >= 0) | (upper <= 0), -gradient_x, 0.0),
    )
    step_x, step_s, _ = jax.lax.fori_loop(0, _ACTIVE_SET_ROUNDS, refine, start)
    return cost, step_s, step_x


@functools.partial(jax.jit, static_argnames=("layout", "iterations"))
def optimise(
    problem: Problem,
    layout: Layout,
    shape: Float[Array, " s"],
    x: Float[Array, "N p"],
    iterations: int,
    tolerance: Float[Array, ""],
) -> tuple[Float[Array, " s"], Float[Array, "N p"], Float[Array, ""], Int[Array, ""]]:
    """Levenberg-Marquardt from (shape, x) within the bounds.

    Args:
      iterations: upper limit of steps.
      tolerance: stop when a step lowers the cost by less than this part.

    Returns:
      shape and x at the minimum, the cost there and the number of steps.
    """

    def proceed(state):
        _, _, _, _, step, done = state
        return (step < iterations) & ~done

    def body(state):
        shape, x, _, damping, step, _ = state
        cost, step_s, step_x = _step(problem, layout, shape, x, damping)
        new_shape = shape + step_s
        new_x = jnp.clip(x + step_x, problem.lower, problem.upper)
        new_cost = _cost(problem, layout, new_shape, new_x)
        better = new_cost < cost  # false for NaN
        small = better & (cost - new_cost < tolerance * cost)
        # Steps that fail against heavy damping mean that float32 has nothing left to give.
        stuck = ~better & (damping > 1e3)
        return (
            jnp.where(better, new_shape, shape),
            jnp.where(better, new_x, x),
            jnp.where(better, new_cost, cost),
            jnp.clip(jnp.where(better, damping / 5, damping * 8), 1e-6, 1e6),
            step + 1,
            small | stuck,
        )

    start = (shape, x, jnp.float32(jnp.inf), jnp.float32(1e-3), jnp.int32(0), jnp.bool_(False))
    shape, x, cost, _, step, _ = jax.lax.while_loop(proceed, body, start)
    return shape, x, cost, step
