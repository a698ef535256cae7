"""Head coefficients from landmarks: one robust, jointly solved problem for a whole clip.

The unknowns are one shape for the clip and, for each frame, expression, rigid motion and, where the head
has the joints, jaw and eyes. The neck stays at rest: landmarks of the face alone cannot distinguish it from
the head's rotation. The cost, with r the landmark errors over their standard deviation, is

    sum_t sum_k c_tk huber(|r_tk|) + priors(shape, expression_t, jaw_t, eyes_t)
        + sum_t |second difference in time of frame t's unknowns / smoothness|^2 / 2

`solver` minimises it. Everything is float32; clips are padded to a few lengths, so that few are compiled.
Method, sections 3 and 8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from loki_jax.arrays import ArrayLike
from loki_jax.face.asset import HeadAsset, Landmarks
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.skinning import Identity, head_vertices, make_identity, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.points import LANDMARK_SET

HIGHEST = jax.lax.Precision.HIGHEST


class FitError(ValueError):
    """Landmarks and head do not fit together, or too few landmarks were seen; names the remedy."""


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """Standard deviations and limits of the fit. Metres and radians; times are frames.

    Attributes:
      fov: field of view of the longer image side, degrees, where no focal length is given. Portraits
        are mostly shot from afar and cropped, hence narrow.
      noise, contour_noise, iris_noise: standard deviation of a landmark at the face.
      gap_noise: standard deviation of the gap between the lids where it is 0, and what each metre of gap
        adds to it. A lid that the network puts a millimetre too low is shut all the same.
      huber: errors beyond so many standard deviations count linearly.
      score_noise: standard deviation of an expression axis about its score, where a network gives one.
      jaw, eyes: prior standard deviations of these rotations about x (up/down), y, z.
      smooth_*: standard deviation of the second difference in time, per frame squared.
      iterations: upper limit of Levenberg-Marquardt steps.
      tolerance: stop when a step lowers the cost by less than this part.
    """

    fov: float = 20.0
    noise: float = 0.001
    contour_noise: float = 0.005
    iris_noise: float = 0.001
    gap_noise: tuple[float, float] = (0.0003, 0.2)
    huber: float = 2.0
    score_noise: float = 0.15
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


class Layout(NamedTuple):
    """Which parts a frame's vector of unknowns has: expression, rot, tra, then jaw and eyes if any."""

    n_expression: int
    jaw: bool
    eyes: bool

    @property
    def size(self) -> int:
        return self.n_expression + 6 + 3 * self.jaw + 3 * self.eyes

    def coefficients(self, x: Float[ArrayLike, "*b p"], shape: Float[ArrayLike, "*b s"]) -> Coefficients:
        """Coefficients of a frame's unknowns and the clip's shape; what the layout lacks is 0."""
        still = 0 * x[..., :3]
        rest = [x[..., i : i + 3] for i in range(self.n_expression, self.size, 3)]
        rot, tra = rest[:2]
        jaw = rest[2] if self.jaw else still
        eyes = rest[-1] if self.eyes else still
        return Coefficients(shape, x[..., : self.n_expression], rot, tra, still, jaw, eyes)

    def unknowns(self, coefficients: Coefficients) -> Float[np.ndarray, "*b p"]:
        """The vector of unknowns of these coefficients."""
        parts = [coefficients.expression, coefficients.rot, coefficients.tra]
        parts += [coefficients.jaw] * self.jaw + [coefficients.eyes] * self.eyes
        return np.concatenate([np.asarray(part) for part in parts], axis=-1)


class Surface(NamedTuple):
    """Points of the head's surface whose look is known, and the pictures in which they are looked for.

    Attributes:
      pictures: what is compared (`loki_jax.fitting.contrast`), C channels of S x S pixels around the face.
      corner, scale: pixel of the frame at which each picture begins, and picture pixels per frame pixel.
      texture: what the points look like.
      weight: 1 / variance of a point's difference, over the number of points that repeat it; 0 where hidden.
      noise: standard deviation of the differences beyond which they count linearly.
    """

    pictures: Float[ArrayLike, "N S S C"]
    corner: Float[ArrayLike, "N 2"]
    scale: Float[ArrayLike, ""]
    texture: Float[ArrayLike, "m C"]
    weight: Float[ArrayLike, "N m"]
    noise: Float[ArrayLike, " N"]


class Problem(NamedTuple):
    """Everything but the unknowns. N frames, n observations, p unknowns a frame, s of the shape.

    Attributes:
      head: one vertex for each landmark and each point of `surface`, then the joints (`landmark_head`).
      observed, sigma: landmarks, then the differences of the pairs (first minus second), and their standard
        deviations, pixels.
      weight: confidence; 0 in padded frames.
      real: 1 for frames of the clip, 0 for padding.
      frame_prior, shape_prior: 1 / variance of the unknowns.
      frame_mean: the mean of that prior: expression scores where there are any, else 0.
      smoothness: 1 / variance of the second difference of a frame's unknowns.
      lower, upper: bounds of a frame's unknowns.
      huber: errors beyond so many standard deviations count linearly.
      pairs: landmarks whose difference is an observation of its own (lids: how far they are apart).
      surface: points that are compared with the pictures, or None.
    """

    head: HeadAsset
    camera: Camera
    observed: Float[ArrayLike, "N n 2"]
    weight: Float[ArrayLike, "N n"]
    sigma: Float[ArrayLike, "N n"]
    real: Float[ArrayLike, " N"]
    frame_prior: Float[ArrayLike, " p"]
    frame_mean: Float[ArrayLike, "N p"]
    shape_prior: Float[ArrayLike, " s"]
    smoothness: Float[ArrayLike, " p"]
    lower: Float[ArrayLike, " p"]
    upper: Float[ArrayLike, " p"]
    huber: Float[ArrayLike, ""]
    pairs: Int[ArrayLike, "k 2"] = np.zeros((0, 2), np.int32)  # noqa: RUF012 (nobody changes it)
    surface: Surface | None = None

    @property
    def n_landmarks(self) -> int:
        return self.observed.shape[-2] - len(self.pairs)

    def observables(self, points: Float[Array, "m ..."]) -> Float[Array, "n ..."]:
        """What is observed of the points of one frame, or of their Jacobians."""
        gaps = points[self.pairs[:, 0]] - points[self.pairs[:, 1]]
        return jnp.concatenate([points[: self.n_landmarks], gaps])


def padded_length(frames: int) -> int:
    """The length that a clip is padded to: 1, 16 or a larger power of two, so that few are compiled."""
    return 1 if frames == 1 else max(16, 1 << (frames - 1).bit_length())


def pad_frames(values: Real[ArrayLike, "N ..."]) -> Real[np.ndarray, "M ..."]:
    """Repeat the last frame up to `padded_length`, so that few lengths are compiled."""
    values = np.asarray(values)
    return np.concatenate([values, np.repeat(values[-1:], padded_length(len(values)) - len(values), axis=0)])


def landmark_head(head: HeadAsset, indices: np.ndarray, name: str = LANDMARK_SET) -> HeadAsset:
    """The head's landmarks `indices` of the set `name` as a head of their own (`point_head`)."""
    marks = head.landmarks[name]
    return point_head(head, Landmarks(np.asarray(marks.face)[indices], np.asarray(marks.bary)[indices]))


def with_shape(head: HeadAsset, betas: Float[ArrayLike, " n_shape"]) -> HeadAsset:
    """The head of one person, without shape axes."""
    vertices = np.asarray(make_identity(head, betas).vertices)[: len(head.template)]
    none = np.zeros((0, *vertices.shape), np.float32)
    return dataclasses.replace(
        head, template=vertices, shape_basis=none, shape_sigma=np.zeros(0, np.float32), shape_names=()
    )


def point_head(head: HeadAsset, marks: Landmarks) -> HeadAsset:
    """A head that consists of points of the surface only: vertex i is `marks` i.

    It takes the same coefficients, and its vertices are the points (exactly where a point is
    on one vertex; skinning weights are interpolated where it is inside a face). The joints need
    the whole mesh: they are further vertices, which the joint regressor selects.
    """
    corners = np.asarray(head.faces)[np.asarray(marks.face)]
    bary = np.asarray(marks.bary)
    regressor = np.asarray(head.joint_regressor)

    def reduce(field: ArrayLike) -> np.ndarray:  # (..., V, c) -> (..., n + J, c)
        field = np.asarray(field)
        on_landmarks = np.einsum("nk,...nkc->...nc", bary, field[..., corners, :])
        on_joints = np.einsum("jv,...vc->...jc", regressor, field)
        return np.concatenate([on_landmarks, on_joints], axis=-2).astype(np.float32)

    n, n_joints = len(corners), len(regressor)
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


def project_frame(
    problem: Problem, layout: Layout, vertices: Float[ArrayLike, "n_all 3"], x: Float[Array, " p"]
) -> Float[Array, "n 2"]:
    """Pixels of the points of one frame, given the identity's neutral vertices."""
    coefficients = layout.coefficients(x, jnp.zeros(problem.head.n_shape))
    identity = Identity(vertices, jnp.zeros((len(problem.head.joint_names), 3)))
    world = world_vertices(problem.head, identity, coefficients)[: -len(problem.head.joint_names)]
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
        shape_sigma=jnp.zeros(0),
        expression_sigma=jnp.zeros(0),
        expression_bounds=jnp.zeros((0, 2)),
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


def frame_linearisation(problem: Problem, layout: Layout, shape: Float[Array, " s"]) -> Callable:
    """A function of one frame's unknowns that returns pixels and Jacobians.

    With M_j the joints' maps, a landmark is at sum_j w_j M_j (p, 1) for its unposed place p. Only the
    few entries of M_j are left to automatic differentiation; the rest are products of small matrices,
    several times faster than pushing tangents through the skinning.

    Returns:
      x (p,) -> predicted pixels (n, 2), their Jacobian for the shape (n, 2, s) and for x (n, 2, p).
    """
    head = problem.head
    n_shape, n_expression, n_joints = head.n_shape, layout.n_expression, len(head.joint_names)
    n = len(head.template) - n_joints
    vertices = make_identity(head, shape).vertices
    # Shape and expression act alike on the unposed vertices, of which the last are the joints.
    bases = jnp.concatenate([head.shape_basis, head.expression_basis])
    own_basis = jnp.moveaxis(bases[:, :n], 0, -1)  # (n, 3, b)
    joint_basis = bases[:, n:].reshape(len(bases), -1)  # (b, 3 J)
    weights = head.skinning_weights[:n]
    has_correctives = head.pose_correctives.shape[0] > 0

    def product(spec, *args):
        return jnp.einsum(spec, *args, precision=HIGHEST)

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
        placed = unposed[:n] + add_correctives(motion)
        placed = jnp.concatenate([placed, jnp.ones((n, 1))], axis=-1)
        blended = product("nj,jm->nm", weights, joint_maps).reshape(n, 3, 4)
        tra = unpack(motion).tra
        world = sum(blended[..., k] * placed[:, k, None] for k in range(4)) + tra
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

        lever = (leverage.reshape(n, 2, -1, 1) * placed[:, None, None, :]).reshape(2 * n, -1)
        rigid = product("rq,qp->rp", lever, by_motion.reshape(12 * n_joints, -1)).reshape(n, 2, -1)
        rigid = rigid.at[..., 3:6].add(by_world)  # the layout's motion begins with rot, tra
        if has_correctives:
            bent = jax.jacfwd(add_correctives)(motion)
            rigid += sum(by_place[..., c, None] * bent[:, None, c] for c in range(3))
        by_frame = jnp.concatenate([linear[..., n_shape:], rigid], axis=-1)
        return predicted, linear[..., :n_shape], by_frame

    return frame
