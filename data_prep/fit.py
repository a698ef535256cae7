"""Head coefficients from landmarks: one robust, jointly solved problem for a whole clip.

Unknowns are one shape for the clip and, for each frame, expression, rigid motion and, where the head
has the joints, jaw and eyes; the neck stays at rest, because landmarks of the face alone cannot
tell it from the head's rotation. What is minimised, with r the landmark errors over their standard
deviation:

    sum_t sum_k c_tk huber(|r_tk|) + priors(shape, expression_t, jaw_t, eyes_t)
        + sum_t |second difference in time of frame t's unknowns / smoothness|^2 / 2

Levenberg-Marquardt with bounds. Its normal equations are an arrow (shape against frames) plus a band
in time: conjugate gradients, preconditioned by the exact Cholesky solution of the arrow, cost linear
in the number of frames. Everything is float32 in one jitted function; clips are padded to a few
lengths so that it is compiled rarely. Design sections 3 and 8.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from loki_jax.head.asset import HeadAsset
from loki_jax.head.camera import camera_from_world, project
from loki_jax.head.rotation import matrix_from_rotvec, rotvec_from_matrix
from loki_jax.head.skinning import (
    Identity,
    head_vertices,
    landmark_positions,
    make_identity,
    world_vertices,
)
from loki_jax.head.types import Camera, Coefficients

LANDMARK_SET = "mediapipe478"
_N_POINTS = 478
_OUTER_EYE_CORNERS = (33, 263)
# The face oval of the MediaPipe mesh: where it lies on the head depends on the head model, and under
# rotation the network slides it along the silhouette.
_CONTOUR = (
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152),
    *(148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
)
_IRISES = tuple(range(468, 478))
_HIGHEST = jax.lax.Precision.HIGHEST
_ACTIVE_SET_ROUNDS = 4
_CPU_CHUNK = 4  # frames linearised at a time where the cache is small


class FitError(ValueError):
    """Landmarks and head do not fit together, or too few landmarks were seen; names the mend."""


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """Standard deviations and limits of the fit. Metres and radians; times are frames.

    Attributes:
      fov: field of view of the longer image side, degrees, where no focal length is given. Portraits
        are mostly shot from afar and cropped, hence narrow.
      noise, contour_noise, iris_noise: standard deviation of a landmark at the face.
      huber: errors beyond so many standard deviations count linearly.
      jaw, eyes: prior standard deviations of these rotations about x (up/down), y, z.
      smooth_*: standard deviation of the second difference in time, per frame squared.
      iterations: upper limit of Levenberg-Marquardt steps.
      tolerance: stop when a step lowers the cost by less than this part.
    """

    fov: float = 20.0
    noise: float = 0.001
    contour_noise: float = 0.005
    iris_noise: float = 0.001
    huber: float = 2.0
    jaw: tuple[float, float, float] = (0.2, 0.03, 0.03)
    eyes: tuple[float, float, float] = (0.3, 0.4, 0.01)
    jaw_limits: tuple[float, float] = (-0.05, 0.7)
    smooth_rot: float = 0.06
    smooth_tra: float = 0.003
    smooth_expression: float = 0.5
    smooth_jaw: float = 0.1
    smooth_eyes: float = 0.2
    iterations: int = 20
    tolerance: float = 2e-3


DEFAULT_SETTINGS = FitSettings()


class FitResult(NamedTuple):
    """The fit of a clip of N frames (numpy).

    Attributes:
      coefficients: fields (N, ...); the shape is repeated.
      camera: intrinsics (4,) and extrinsics (4, 4), the same for all frames.
      reprojection: distance in pixels between landmark and head, NaN where the head lacks the landmark
        or it was not seen.
      error: mean reprojection distance of the inner face (no contour, no iris) over the distance of
        the outer eye corners in the image, per frame.
      confidence: 0..1 per frame, from the landmarks' confidence and the error.
      iterations, cost: of the last stage.
    """

    coefficients: Coefficients
    camera: Camera
    reprojection: Float[np.ndarray, "N 478"]
    error: Float[np.ndarray, " N"]
    confidence: Float[np.ndarray, " N"]
    iterations: int
    cost: float


# --- the problem -----------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """Which parts a frame's vector of unknowns has: expression, rot, tra, then jaw and eyes if any."""

    n_expression: int
    jaw: bool
    eyes: bool

    @property
    def size(self) -> int:
        return self.n_expression + 6 + 3 * self.jaw + 3 * self.eyes

    def coefficients(self, x: Float[Array, "*b p"], shape: Float[Array, "*b s"]) -> Coefficients:
        still = 0 * x[..., :3]
        rest = [x[..., i : i + 3] for i in range(self.n_expression, self.size, 3)]
        rot, tra = rest[:2]
        jaw = rest[2] if self.jaw else still
        eyes = rest[-1] if self.eyes else still
        return Coefficients(shape, x[..., : self.n_expression], rot, tra, still, jaw, eyes)


class _Problem(NamedTuple):
    """Everything but the unknowns. N frames, n landmarks, p unknowns a frame, s of the shape.

    `head` has one vertex for each landmark. `weight` is confidence over variance in 1 / pixel^2,
    `real` 0 marks padding.
    """

    head: HeadAsset
    camera: Camera
    observed: Float[Array, "N n 2"]
    weight: Float[Array, "N n"]
    sigma: Float[Array, "N n"]
    real: Float[Array, " N"]
    frame_prior: Float[Array, " p"]  # 1 / variance
    shape_prior: Float[Array, " s"]
    smoothness: Float[Array, " p"]  # 1 / variance of the second difference
    lower: Float[Array, " p"]
    upper: Float[Array, " p"]
    huber: Float[Array, ""]


def landmark_head(head: HeadAsset, indices: np.ndarray, name: str = LANDMARK_SET) -> HeadAsset:
    """A head that consists of landmarks only: vertex i is landmark `indices[i]` of the set `name`.

    It takes the same coefficients, and its vertices are the landmarks (exactly where a landmark lies
    on one vertex; skinning weights are interpolated where it lies inside a face). The joints need
    the whole mesh: they ride along as further vertices that the joint regressor selects.
    """
    marks = head.landmarks[name]
    corners = np.asarray(head.faces)[np.asarray(marks.face)[indices]]
    bary = np.asarray(marks.bary)[indices]
    regressor = np.asarray(head.joint_regressor)

    def reduce(field: np.ndarray) -> np.ndarray:  # (..., V, c) -> (..., n + J, c)
        field = np.asarray(field)
        return np.concatenate(
            [
                np.einsum("nk,...nkc->...nc", bary, field[..., corners, :]),
                np.einsum("jv,...vc->...jc", regressor, field),
            ],
            axis=-2,
        ).astype(np.float32)

    n, n_joints = len(indices), len(regressor)
    correctives = reduce(head.pose_correctives)
    correctives[:, n:] = 0  # joints are regressed before the correctives
    weights = np.concatenate([reduce(head.skinning_weights)[:n], np.eye(n_joints, dtype=np.float32)])
    return dataclasses.replace(
        head,
        template=reduce(head.template),
        faces=np.zeros((0, 3), np.int32),
        shape_basis=reduce(head.shape_basis),
        expression_basis=reduce(head.expression_basis),
        pose_correctives=correctives,
        joint_regressor=np.eye(n_joints, n + n_joints, k=n, dtype=np.float32),
        skinning_weights=weights,
        render_mask=np.ones(n + n_joints, bool),
        inner_mouth=np.zeros(n + n_joints, bool),
        landmarks={},
        lip_vertex=-1,
    )


def _project_frame(problem: _Problem, layout: _Layout, vertices, x) -> Float[Array, "n 2"]:
    """Pixels of the landmarks of one frame, given the identity's neutral landmark vertices."""
    coefficients = layout.coefficients(x, jnp.zeros(problem.head.n_shape))
    identity = Identity(vertices, jnp.zeros((len(problem.head.joint_names), 3)))
    world = world_vertices(problem.head, identity, coefficients)[: problem.observed.shape[1]]
    return project(camera_from_world(world, problem.camera), problem.camera)


def _small_head(head: HeadAsset, weights, regressor, correctives) -> HeadAsset:
    """A head with the joints of `head` and V other vertices, without shape or expression axes."""
    n = len(weights)
    return dataclasses.replace(
        head,
        template=jnp.zeros((n, 3)),
        shape_basis=jnp.zeros((0, n, 3)),
        expression_basis=jnp.zeros((0, n, 3)),
        pose_correctives=correctives,
        joint_regressor=regressor,
        skinning_weights=weights,
        inner_mouth=jnp.zeros(n, bool),
        render_mask=jnp.ones(n, bool),
    )


def _joint_maps(head: HeadAsset, joints: Float[Array, "J 3"], still: Coefficients) -> Float[Array, "J 3 4"]:
    """The map x -> M (x, 1) that each joint applies, rigid rotation included and translation left out.

    Read off four probe points a joint: the origin and the three unit vectors.
    """
    n = len(joints)
    points = jnp.tile(jnp.concatenate([jnp.zeros((1, 3)), jnp.eye(3)]), (n, 1))
    weights = jnp.concatenate([jnp.repeat(jnp.eye(n), 4, axis=0), jnp.eye(n)])
    probes = _small_head(head, weights, jnp.eye(n, 5 * n, k=4 * n), jnp.zeros((0, 5 * n, 3)))
    coefficients = still._replace(expression=jnp.zeros(0), tra=0 * still.tra)
    moved = world_vertices(probes, Identity(jnp.concatenate([points, joints]), joints), coefficients)
    moved = moved[: 4 * n].reshape(n, 4, 3)
    return jnp.concatenate([jnp.moveaxis(moved[:, 1:] - moved[:, :1], 1, 2), moved[:, 0, :, None]], axis=-1)


def _correctives(head: HeadAsset, n: int, coefficients: Coefficients) -> Float[Array, "n 3"]:
    """What the pose correctives add to the n landmarks before skinning: seen where nothing turns them."""
    n_joints = head.skinning_weights.shape[1]
    on_root = jnp.zeros((n, n_joints)).at[:, 0].set(1.0)
    small = _small_head(head, on_root, jnp.zeros((n_joints, n)), head.pose_correctives[:, :n])
    at_origin = Identity(jnp.zeros((n, 3)), jnp.zeros((n_joints, 3)))
    return head_vertices(small, at_origin, coefficients._replace(expression=jnp.zeros(0)))


def _linearise(problem: _Problem, layout: _Layout, shape, x):
    """Residuals (N, n, 2) in pixels and their Jacobians for a frame's unknowns and for the shape."""
    predicted, by_shape, by_frame = jax.vmap(_frame_linearisation(problem, layout, shape))(x)
    return predicted - problem.observed, by_frame, by_shape


def _frame_linearisation(problem: _Problem, layout: _Layout, shape):
    """A function of one frame's unknowns: pixels (n, 2) and their Jacobians for the shape and for it.

    With M_j the joints' maps, a landmark lies at sum_j w_j M_j (p, 1) for its unposed place p. Only the
    few entries of M_j are left to automatic differentiation; the rest are products of small matrices,
    several times faster than pushing tangents through the skinning.
    """
    head, n = problem.head, problem.observed.shape[1]
    n_shape, n_expression, n_joints = head.n_shape, layout.n_expression, len(head.joint_names)
    vertices = make_identity(head, shape).vertices
    # Shape and expression act alike on the unposed vertices, of which the last are the joints.
    bases = jnp.concatenate([head.shape_basis, head.expression_basis])
    own_basis = jnp.moveaxis(bases[:, :n], 0, -1)  # (n, 3, b)
    joint_basis = bases[:, n:].reshape(len(bases), -1)  # (b, 3 J)
    weights = head.skinning_weights[:n]
    has_correctives = head.pose_correctives.shape[0] > 0

    def product(spec, *args):
        return jnp.einsum(spec, *args, precision=_HIGHEST)

    def frame(x):
        expression, motion = x[:n_expression], x[n_expression:]
        unposed = vertices + product("e,evc->vc", expression, head.expression_basis)

        def unpack(motion):
            return layout.coefficients(jnp.concatenate([expression, motion]), shape)

        def maps(motion, joints):
            return _joint_maps(head, joints.reshape(-1, 3), unpack(motion)).reshape(n_joints, 12)

        def add_correctives(motion):
            return _correctives(head, n, unpack(motion)) if has_correctives else jnp.zeros((n, 3))

        joints = unposed[n:].reshape(-1)
        joint_maps = maps(motion, joints)
        by_motion, by_joints = jax.jacfwd(maps, argnums=(0, 1))(motion, joints)
        place = unposed[:n] + add_correctives(motion)
        place = jnp.concatenate([place, jnp.ones((n, 1))], axis=-1)
        blended = product("nj,jm->nm", weights, joint_maps).reshape(n, 3, 4)
        tra = unpack(motion).tra
        world = sum(blended[..., k] * place[:, k, None] for k in range(4)) + tra
        # Pixels by world coordinates (n, 2, 3), and by the landmark's own unposed place.
        predicted, push = jax.linearize(
            lambda w: project(camera_from_world(w, problem.camera), problem.camera), world
        )
        by_world = jnp.stack([push(jnp.broadcast_to(axis, world.shape)) for axis in jnp.eye(3)], axis=-1)
        by_place = sum(by_world[..., c, None] * blended[:, None, c, :3] for c in range(3))

        linear = sum(by_place[..., c, None] * own_basis[:, None, c] for c in range(3))
        # Joints that a basis moves shift the landmarks: only the last column of each map depends on them.
        shift = by_joints.reshape(n_joints, 3, 4, -1)[:, :, 3]
        shift = product("jcq,bq->jcb", shift, joint_basis).reshape(3 * n_joints, -1)
        leverage = (weights[:, None, :, None] * by_world[:, :, None, :]).reshape(2 * n, -1)
        linear += product("rq,qb->rb", leverage, shift).reshape(n, 2, -1)

        lever = (leverage.reshape(n, 2, -1, 1) * place[:, None, None, :]).reshape(2 * n, -1)
        rigid = product("rq,qp->rp", lever, by_motion.reshape(12 * n_joints, -1)).reshape(n, 2, -1)
        rigid = rigid.at[..., 3:6].add(by_world)  # the layout's motion begins with rot, tra
        if has_correctives:
            bent = jax.jacfwd(add_correctives)(motion)
            rigid += sum(by_place[..., c, None] * bent[:, None, c] for c in range(3))
        by_frame = jnp.concatenate([linear[..., n_shape:], rigid], axis=-1)
        return predicted, linear[..., :n_shape], by_frame

    return frame


def _normal_equations(problem: _Problem, layout: _Layout, shape, x):
    """Residuals (N, n, 2) and, of the robustly weighted ones, J^T J (N, s + p, s + p) and J^T r (N, s + p).

    On a CPU a few frames at a time: their Jacobians stay in the cache and are never written out.
    """
    chunk = min(len(x), _CPU_CHUNK) if jax.default_backend() == "cpu" else len(x)
    linearise = _frame_linearisation(problem, layout, shape)

    def frame(item):
        x, observed, confidence, sigma = item
        predicted, by_shape, by_frame = linearise(x)
        residual = predicted - observed
        deviation = jnp.linalg.norm(residual, axis=-1) / sigma
        weight = confidence * jnp.minimum(1.0, problem.huber / jnp.maximum(deviation, 1e-6)) / sigma**2
        rows = jnp.concatenate([by_shape, by_frame, residual[..., None]], axis=-1)
        rows = (rows * jnp.sqrt(weight)[:, None, None]).reshape(-1, rows.shape[-1])
        gram = jnp.einsum("ra,rb->ab", rows, rows, precision=_HIGHEST)
        return residual, gram[:-1, :-1], gram[:-1, -1]

    items = x, problem.observed, problem.weight, problem.sigma
    return jax.lax.map(frame, items, batch_size=chunk)


def _second_difference(x: Float[Array, "N p"], real: Float[Array, " N"]) -> Float[Array, "M p"]:
    inside = real[2:] * real[1:-1] * real[:-2]
    return (x[2:] - 2 * x[1:-1] + x[:-2]) * inside[:, None]


def _smoothing(problem: _Problem, x: Float[Array, "N p"]) -> Float[Array, "N p"]:
    """Gradient of the smoothness term: a band of five frames, applied without building it."""
    bent = _second_difference(x, problem.real) * problem.smoothness
    bent = bent * (problem.real[2:] * problem.real[1:-1] * problem.real[:-2])[:, None]
    return (
        jnp.pad(bent, ((0, 2), (0, 0)))
        - 2 * jnp.pad(bent, ((1, 1), (0, 0)))
        + jnp.pad(bent, ((2, 0), (0, 0)))
    )


def _residual(problem: _Problem, layout: _Layout, shape, x) -> Float[Array, "N n 2"]:
    vertices = make_identity(problem.head, shape).vertices
    predicted = jax.vmap(lambda x: _project_frame(problem, layout, vertices, x))(x)
    return predicted - problem.observed


def _cost(problem: _Problem, residual: Float[Array, "N n 2"], shape, x) -> Float[Array, ""]:
    deviation = jnp.linalg.norm(residual, axis=-1) / problem.sigma
    huber = problem.huber
    robust = jnp.where(deviation < huber, 0.5 * deviation**2, huber * deviation - 0.5 * huber**2)
    data = jnp.sum(problem.weight * robust)
    prior = jnp.sum(problem.real[:, None] * problem.frame_prior * x**2) + jnp.sum(
        problem.shape_prior * shape**2
    )
    smooth = 0.0
    if len(x) > 2:
        smooth = jnp.sum(problem.smoothness * _second_difference(x, problem.real) ** 2)
    return data + 0.5 * (prior + smooth)


def _inverse(matrix: Float[Array, "*b n n"]) -> Float[Array, "*b n n"]:
    """Inverse of symmetric positive definite matrices.

    XLA's CPU backend solves batches of triangular systems a hundred times slower than it multiplies
    them. So the Cholesky factor is inverted by products alone: the inverses of the diagonal blocks of
    size b give those of size 2b.
    """
    n = matrix.shape[-1]
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
        below = -jnp.matmul(jnp.matmul(second, below, precision=_HIGHEST), first, precision=_HIGHEST)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([upper, jnp.concatenate([below, second], axis=-1)], axis=-2)
        size *= 2
    inverse = inverse.reshape(*factor.shape)[..., :n, :n]
    return jnp.einsum("...ka,...kb->...ab", inverse, inverse, precision=_HIGHEST)


def _step(problem: _Problem, layout: _Layout, shape, x, damping):
    """The cost, and the damped Gauss-Newton step within the bounds (the quadratic model's minimiser there).

    Which unknowns lie at a bound is found by the primal-dual active set method: solve with a guess,
    release those whose multiplier has the wrong sign, hold those that left the box, a few times.
    """
    residual, gram, gradient = _normal_equations(problem, layout, shape, x)
    cost = _cost(problem, residual, shape, x)
    n_shape = len(shape)

    def product(spec, *args):
        return jnp.einsum(spec, *args, precision=_HIGHEST)

    prior = problem.frame_prior * problem.real[:, None]
    banded = len(x) > 2  # shorter clips have no second difference
    gradient_x = gradient[:, n_shape:] + prior * x
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
def _optimise(problem: _Problem, layout: _Layout, shape, x, iterations: int, tolerance):
    """Levenberg-Marquardt from (shape, x); returns both, the cost and the number of steps."""

    def proceed(state):
        _, _, _, _, step, done = state
        return (step < iterations) & ~done

    def body(state):
        shape, x, _, damping, step, _ = state
        cost, step_s, step_x = _step(problem, layout, shape, x, damping)
        new_shape = shape + step_s
        new_x = jnp.clip(x + step_x, problem.lower, problem.upper)
        new_cost = _cost(problem, _residual(problem, layout, new_shape, new_x), new_shape, new_x)
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


# --- closed-form start --------------------------------------------------------------------------


@jax.jit
def pose_from_points(
    model: Float[Array, "n 3"],
    pixels: Float[Array, "*b n 2"],
    weight: Float[Array, "*b n"],
    intrinsics: Float[Array, "4"],
) -> tuple[Float[Array, "*b 3"], Float[Array, "*b 3"], Float[Array, " *b"]]:
    """Rigid motion that puts `model` (metres, head frame) on `pixels`, by scaled orthography.

    The 2 x 3 affine map between the two is found by weighted least squares and replaced by the nearest
    pair of orthogonal rows of equal length, whose cross product completes the rotation.

    Returns:
      `rot` and `tra` of `Coefficients`, for identity extrinsics, and the scale in pixels per metre.
    """

    def mean(value, w):
        return jnp.einsum("...n,...nc->...c", w, value) / jnp.sum(w, axis=-1)[..., None]

    model = jnp.broadcast_to(model, (*pixels.shape[:-1], 3))
    centre_model, centre_pixel = mean(model, weight), mean(pixels, weight)
    offsets, shifts = model - centre_model[..., None, :], pixels - centre_pixel[..., None, :]
    moments = jnp.einsum("...n,...ni,...nj->...ij", weight, offsets, offsets, precision=_HIGHEST)
    cross = jnp.einsum("...n,...ni,...nj->...ij", weight, shifts, offsets, precision=_HIGHEST)
    affine = jnp.einsum("...ij,...jk->...ik", cross, jnp.linalg.inv(moments), precision=_HIGHEST)
    left, lengths, right = jnp.linalg.svd(affine, full_matrices=False)
    rows = jnp.einsum("...ij,...jk->...ik", left, right, precision=_HIGHEST)
    scale = jnp.mean(lengths, axis=-1)
    turned = jnp.concatenate([rows, jnp.cross(rows[..., 0, :], rows[..., 1, :])[..., None, :]], axis=-2)
    depth = jnp.mean(intrinsics[:2]) / scale
    lateral = (centre_pixel - intrinsics[2:]) * (depth[..., None] / intrinsics[:2])
    centre = jnp.concatenate([lateral, depth[..., None]], axis=-1)
    # Away from the image centre a head is seen along a slanted ray, not along the optical axis.
    ray = centre / jnp.linalg.norm(centre, axis=-1, keepdims=True)
    slant = jnp.stack([-ray[..., 1], ray[..., 0], jnp.zeros_like(depth)], axis=-1)
    turned = jnp.einsum("...ij,...jk->...ik", matrix_from_rotvec(slant), turned, precision=_HIGHEST)
    # So far in camera axes (y down, z away); diag(1, -1, -1) turns them into the world's.
    flip = jnp.array([1.0, -1.0, -1.0])
    rotation = turned * flip[:, None]
    tra = centre * flip - jnp.einsum("...ij,...j->...i", rotation, centre_model, precision=_HIGHEST)
    return rotvec_from_matrix(rotation), tra, scale


# --- the fit -----------------------------------------------------------------------------------------


def make_camera(image_size: tuple[int, int], focal: float | None = None, fov: float = 20.0) -> Camera:
    """A camera in the middle of an image of `image_size` = (height, width), extrinsics the identity.

    The focal length in pixels is `focal`, or that of a field of view of `fov` degrees over the longer side.
    """
    height, width = image_size
    if focal is None:
        focal = 0.5 * max(height, width) / np.tan(np.radians(fov) / 2)
    intrinsics = np.array([focal, focal, width / 2, height / 2], np.float32)
    return Camera(intrinsics, np.eye(4, dtype=np.float32))


def fit_landmarks(
    head: HeadAsset,
    points: Float[np.ndarray, "N 478 _"],
    confidence: Float[np.ndarray, "N 478"],
    image_size: tuple[int, int],
    *,
    focal: float | None = None,
    settings: FitSettings = DEFAULT_SETTINGS,
    fps: float = 25.0,
) -> FitResult:
    """Fit `head` to the landmarks of a clip (one frame: a portrait).

    Args:
      points: x, y (and z, not used) in pixels.
      confidence: 0..1; frames without a face are 0 throughout and are filled in by smoothness.
      image_size: (height, width) in pixels.
      focal: focal length in pixels; None: from `settings.fov`.
      fps: frame rate; the smoothness of `settings` is stated for 25 frames a second.

    Raises:
      FitError: no set of 478 landmarks on the head, wrong array shapes, or nothing seen.
    """
    points, confidence = np.asarray(points, np.float32), np.asarray(confidence, np.float32)
    if LANDMARK_SET not in head.landmarks:
        raise FitError(
            f"head {head.name!r} has no {LANDMARK_SET!r} landmarks, only {sorted(head.landmarks)}. "
            "Rebuild the asset with `python -m data_prep.head_asset`."
        )
    if points.ndim != 3 or points.shape[1] != _N_POINTS or points.shape[2] not in (2, 3) or len(points) == 0:
        raise FitError(f"landmarks have shape {points.shape}, expected (N, {_N_POINTS}, 2 or 3) with N > 0")
    if confidence.shape != points.shape[:2]:
        raise FitError(f"confidence has shape {confidence.shape}, expected {points.shape[:2]}")
    finite = np.isfinite(points[..., :2]).all(-1) & np.isfinite(confidence)
    confidence = np.where(finite, np.clip(confidence, 0, 1), 0)
    points = np.where(finite[..., None], points[..., :2], 0)
    problem, layout, start, seen = _prepare(head, points, confidence, image_size, focal, settings, fps)
    shape, x, cost, steps = _optimise(
        problem,
        layout,
        np.zeros(head.n_shape, np.float32),
        start,
        settings.iterations,
        np.float32(settings.tolerance),
    )
    n_frames = len(points)
    shape, x = np.asarray(shape), np.asarray(x)[:n_frames]
    coefficients = layout.coefficients(x, np.broadcast_to(shape, (n_frames, len(shape))))
    return _result(head, coefficients, problem.camera, points, confidence, seen, int(steps), float(cost))


def _prepare(
    head: HeadAsset,
    points: Float[np.ndarray, "N 478 2"],
    confidence: Float[np.ndarray, "N 478"],
    image_size: tuple[int, int],
    focal: float | None,
    settings: FitSettings,
    fps: float,
) -> tuple[_Problem, _Layout, Float[np.ndarray, "M p"], Bool[np.ndarray, " N"]]:
    """The problem, padded to M frames, its layout and start, and which of the N frames show the face."""
    indices = np.flatnonzero(np.asarray(head.landmarks[LANDMARK_SET].face) >= 0)
    is_inner = ~np.isin(indices, (*_CONTOUR, *_IRISES))
    seen = (confidence[:, indices[is_inner]] > 0.1).sum(1) >= min(12, is_inner.sum())
    if not seen.any() or is_inner.sum() < 6:
        raise FitError(
            f"no frame shows enough landmarks ({int(is_inner.sum())} of the inner face are on the head "
            f"{head.name!r}). Use a clip with a visible face."
        )
    n_frames = len(points)
    observed = pad_frames(_fill_gaps(points[:, indices], confidence[:, indices], seen))
    # Just enough to hold interpolated frames, which nothing else would keep from drifting.
    confidence_used = np.where(seen[:, None], confidence[:, indices], 0.02)

    small = landmark_head(head, indices)
    layout = _Layout(
        head.n_expression,
        jaw=head.joint("jaw") is not None,
        eyes=head.joint("left_eye") is not None and bool(np.isin(indices, _IRISES).any()),
    )
    camera = make_camera(image_size, focal, settings.fov)
    rot, tra, scale = pose_from_points(
        jnp.asarray(small.template[: len(indices)]),
        jnp.asarray(observed),
        jnp.broadcast_to(is_inner.astype(np.float32), observed.shape[:2]),
        jnp.asarray(camera.intrinsics),
    )
    start = np.zeros((len(observed), layout.size), np.float32)
    start[:, layout.n_expression : layout.n_expression + 3] = rot
    start[:, layout.n_expression + 3 : layout.n_expression + 6] = tra

    metres = np.where(is_inner, settings.noise, settings.contour_noise)
    metres = np.where(np.isin(indices, _IRISES), settings.iris_noise, metres)

    real = (np.arange(len(observed)) < n_frames).astype(np.float32)
    problem = _Problem(
        head=small,
        camera=camera,
        observed=observed,
        weight=pad_frames(confidence_used.astype(np.float32)) * real[:, None],
        sigma=(np.asarray(scale)[:, None] * metres).astype(np.float32),
        real=real,
        # A landmark that lies off the head's own one does so in every frame: more frames show more
        # views of the shape, but do not make the landmarks more exact.
        shape_prior=n_frames * np.asarray(head.shape_sigma, np.float32) ** -2.0,
        huber=np.float32(settings.huber),
        **_per_frame_terms(head, layout, settings, 25.0 / fps),
    )
    return problem, layout, start, seen


def padded_length(frames: int) -> int:
    """The length that a clip is padded to: 1, 16 or a larger power of two, so that few are compiled."""
    return 1 if frames == 1 else max(16, 1 << (frames - 1).bit_length())


def pad_frames(values: Float[np.ndarray, "N ..."]) -> Float[np.ndarray, "M ..."]:
    """Repeat the last frame up to `padded_length`, so that few lengths are compiled."""
    values = np.asarray(values)
    return np.concatenate([values, np.repeat(values[-1:], padded_length(len(values)) - len(values), axis=0)])


def reprojection_error(
    head: HeadAsset,
    coefficients: Coefficients,
    camera: Camera,
    points: Float[np.ndarray, "N 478 _"],
) -> Float[np.ndarray, "N 478"]:
    """Distance in pixels of every landmark from the whole head's; NaN for those the head lacks."""
    padded = Coefficients(*(pad_frames(field) for field in coefficients))
    projected = np.asarray(_project_landmarks(head, padded, camera))[: len(points)]
    distance = np.linalg.norm(projected - np.asarray(points)[..., :2], axis=-1)
    return np.where(np.asarray(head.landmarks[LANDMARK_SET].face) >= 0, distance, np.nan)


def inner_face_error(
    reprojection: Float[np.ndarray, "N 478"], points: Float[np.ndarray, "N 478 _"]
) -> Float[np.ndarray, " N"]:
    """Mean over the inner face (no contour, no iris) over the outer eye corners' distance, per frame."""
    inner = np.setdiff1d(np.arange(_N_POINTS), (*_CONTOUR, *_IRISES))
    left, right = (points[:, corner, :2] for corner in _OUTER_EYE_CORNERS)
    width = np.maximum(np.linalg.norm(left - right, axis=-1), 1e-6)
    return np.nanmean(reprojection[:, inner], axis=1) / width


@jax.jit
def _project_landmarks(
    head: HeadAsset, coefficients: Coefficients, camera: Camera
) -> Float[Array, "N 478 2"]:
    def frame(coefficients):
        identity = make_identity(head, coefficients.shape)
        world = world_vertices(head, identity, coefficients)
        return project(camera_from_world(landmark_positions(head, world, LANDMARK_SET), camera), camera)

    # One frame after another: a batch of whole meshes would need gigabytes for a long clip.
    return jax.lax.map(frame, coefficients)


def _per_frame_terms(head: HeadAsset, layout: _Layout, settings: FitSettings, interval: float) -> dict:
    """Priors, smoothness and bounds of a frame's unknowns, in the order of `_Layout`."""
    n = layout.n_expression
    free, none = np.zeros(6), np.full(6, np.inf)

    def joined(expression, motion, jaw, eyes):
        parts = [expression, motion, jaw if layout.jaw else (), eyes if layout.eyes else ()]
        return np.concatenate([np.asarray(part, np.float32) for part in parts]).astype(np.float32)

    smooth = joined(
        np.full(n, settings.smooth_expression),
        np.repeat([settings.smooth_rot, settings.smooth_tra], 3),
        np.full(3, settings.smooth_jaw),
        np.full(3, settings.smooth_eyes),
    )
    bounds = np.asarray(head.expression_bounds)
    return {
        "frame_prior": joined(
            np.asarray(head.expression_sigma) ** -2.0,
            free,
            np.square(settings.jaw) ** -1.0,
            np.square(settings.eyes) ** -1.0,
        ),
        # The second difference of a smooth motion grows with the square of the frame interval.
        "smoothness": (smooth * interval**2) ** -2.0,
        "lower": joined(bounds[:, 0], -none, (settings.jaw_limits[0], -np.inf, -np.inf), -none[:3]),
        "upper": joined(bounds[:, 1], none, (settings.jaw_limits[1], np.inf, np.inf), none[:3]),
    }


def _fill_gaps(
    observed: Float[np.ndarray, "N n 2"], confidence: Float[np.ndarray, "N n"], seen: Bool[np.ndarray, " N"]
) -> Float[np.ndarray, "N n 2"]:
    """Frames without landmarks get interpolated ones, so that their pose starts somewhere sensible."""
    times = np.flatnonzero(seen)
    if len(times) == len(observed):
        return observed
    flat = observed.reshape(len(observed), -1)
    columns = [np.interp(np.arange(len(flat)), times, flat[times, c]) for c in range(flat.shape[1])]
    return np.stack(columns, axis=-1).reshape(observed.shape).astype(np.float32)


def _result(head, coefficients, camera, points, confidence, seen, steps, cost) -> FitResult:
    reprojection = reprojection_error(head, coefficients, camera, points)
    reprojection = np.where(seen[:, None] & (confidence > 0), reprojection, np.nan)
    error = np.full(len(points), np.nan, np.float32)
    error[seen] = inner_face_error(reprojection[seen], points[seen])
    # Half of the confidence is lost at an error of 5 % of the outer eye corners' distance.
    trust = np.where(seen, confidence.max(1) / (1 + (np.nan_to_num(error) / 0.05) ** 2), 0)
    return FitResult(coefficients, camera, reprojection, error, trust.astype(np.float32), steps, cost)
