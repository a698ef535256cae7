"""Blendshapes and linear blend skinning of a head asset (method, section 3).

Everything that depends on the identity alone is computed once, in `make_identity`. The leading axes
of an identity broadcast against those of the coefficients as in NumPy: one identity with no leading
axis serves any batch, an identity (B, 1) serves coefficients (B, T).

All meshes here hold V_all vertices: the asset's own V, followed by the 200 of FLAME's inner-mouth
half-sphere where `head.lip_vertex >= 0`. All contractions ask for full float32 precision: the
bfloat16 default of TPU matrix units would displace vertices by a millimetre.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from loki_jax.arrays import ArrayLike
from loki_jax.face.asset import HeadAsset
from loki_jax.face.rotation import matrix_from_rotvec
from loki_jax.face.types import Coefficients

_HIGHEST = jax.lax.Precision.HIGHEST
_MOUTH_RINGS, _MOUTH_SECTORS = 10, 20
_MOUTH_SETBACK = 0.005  # metres behind the lip vertex, method, section 3
_ROTATION_OF_JOINT = {"neck": "neck", "jaw": "jaw", "left_eye": "eyes", "right_eye": "eyes"}


class Identity(NamedTuple):
    """The parts of a head that its shape coefficients alone decide.

    Attributes:
      vertices: neutral vertices (no expression, no pose) in metres, inner mouth included.
      joints: joints of the neutral head in metres.
    """

    vertices: Float[ArrayLike, "*b V_all 3"]
    joints: Float[ArrayLike, "*b J 3"]


def _mouth_sphere(jaw: Float[Array, "*b 3"], lip: Float[Array, "*b 3"]) -> Float[Array, "*b 200 3"]:
    """Half-sphere behind the lips: ten rings of twenty vertices about the axis jaw -> lip."""
    axis = lip - jaw
    length = jnp.sqrt(jnp.sum(axis * axis, axis=-1, keepdims=True))
    pole = axis / length
    radius = length / 4
    centre = lip - (radius + _MOUTH_SETBACK) * pole
    # Any frame about the pole would do for the surface; this one also gives the public order.
    up = jnp.array([0.0, 1.0, 0.0], pole.dtype)
    side = jnp.cross(up, pole)
    side = side / jnp.sqrt(jnp.sum(side * side, axis=-1, keepdims=True))
    forward = jnp.cross(pole, side)
    polar = np.linspace(0, np.pi, 2 * _MOUTH_RINGS)[:_MOUTH_RINGS]
    azimuth = np.linspace(0, 2 * np.pi, _MOUTH_SECTORS)
    local = np.stack(
        [
            np.sin(polar)[:, None] * np.cos(azimuth),
            -np.sin(polar)[:, None] * np.sin(azimuth),
            np.broadcast_to(np.cos(polar)[:, None], (_MOUTH_RINGS, _MOUTH_SECTORS)),
        ],
        axis=-1,
    ).reshape(-1, 3)
    frame = jnp.stack([side, forward, pole], axis=-2)
    points = jnp.einsum("nk,...kc->...nc", local.astype(np.float32), frame, precision=_HIGHEST)
    return centre[..., None, :] + radius[..., None, :] * points


def _mouth_sphere_faces() -> Int[np.ndarray, "340 3"]:
    """Triangles of `_mouth_sphere`, seen from the open side, in the public order."""
    here = np.arange(_MOUTH_SECTORS)
    following = (here + 1) % _MOUTH_SECTORS
    below, below_following = here + _MOUTH_SECTORS, following + _MOUTH_SECTORS
    towards_pole = np.stack([here, below_following, below], axis=-1)
    pairs = np.stack([towards_pole, np.stack([here, following, below_following], axis=-1)], axis=1)
    rings = [pairs.reshape(-1, 3) + _MOUTH_SECTORS * ring for ring in range(1, _MOUTH_RINGS - 1)]
    return np.concatenate([towards_pole, *rings]).astype(np.int32)


def _has_mouth_sphere(head: HeadAsset) -> bool:
    if head.lip_vertex >= 0 and head.joint("jaw") is None:
        raise ValueError(f"head {head.name!r} has a lip vertex but no jaw joint to hang the mouth on")
    return head.lip_vertex >= 0


def mesh_faces(head: HeadAsset) -> Int[ArrayLike, "F_all 3"]:
    """Triangles of the whole mesh: the asset's, then those of the inner-mouth half-sphere."""
    if not _has_mouth_sphere(head):
        return head.faces
    return jnp.concatenate([head.faces, _mouth_sphere_faces() + head.template.shape[0]])


def mesh_render_mask(head: HeadAsset) -> Bool[Array, " V_all"]:
    """Vertices that the driver map shows; inner-mouth vertices always do."""
    mask = jnp.asarray(head.render_mask) | jnp.asarray(head.inner_mouth)
    if not _has_mouth_sphere(head):
        return mask
    return jnp.concatenate([mask, jnp.ones(_MOUTH_RINGS * _MOUTH_SECTORS, bool)])


@functools.partial(jax.jit, inline=True)
def make_identity(head: HeadAsset, shape: Float[ArrayLike, "*b n_shape"]) -> Identity:
    """Neutral mesh and joints of the identity with the given shape coefficients.

    Raises:
      ValueError: the number of coefficients is not the head's.
    """
    if shape.shape[-1:] != (head.n_shape,):
        raise ValueError(
            f"shape coefficients {tuple(shape.shape)} do not end in the {head.n_shape} axes of head "
            f"{head.name!r}"
        )
    vertices = jnp.asarray(head.template) + jnp.einsum(
        "...s,svc->...vc", shape, head.shape_basis, precision=_HIGHEST
    )
    joints = jnp.einsum("jv,...vc->...jc", head.joint_regressor, vertices, precision=_HIGHEST)
    if _has_mouth_sphere(head):
        mouth = _mouth_sphere(joints[..., head.joint("jaw"), :], vertices[..., head.lip_vertex, :])
        vertices = jnp.concatenate([vertices, mouth], axis=-2)
    return Identity(vertices, joints)


def template_vertices(head: HeadAsset) -> Float[Array, "V_all 3"]:
    """Neutral vertices of the mean identity, inner mouth included."""
    return jnp.asarray(make_identity(head, jnp.zeros(head.n_shape, jnp.float32)).vertices)


def _joint_rotations(
    head: HeadAsset, coefficients: Coefficients, with_neck: bool
) -> Float[Array, "*b J 3 3"]:
    """Rotation of every joint relative to its parent; the root never turns."""
    batch = jnp.broadcast_shapes(*(getattr(coefficients, f).shape[:-1] for f in ("neck", "jaw", "eyes")))
    still = jnp.zeros((*batch, 3), coefficients.jaw.dtype)
    rotvecs = []
    for name in head.joint_names:
        field = _ROTATION_OF_JOINT.get(name)
        if field is None or (field == "neck" and not with_neck):
            rotvecs.append(still)
        else:
            rotvecs.append(jnp.broadcast_to(getattr(coefficients, field), still.shape))
    return matrix_from_rotvec(jnp.stack(rotvecs, axis=-2))


def _world_transforms(
    parents: tuple[int, ...], rotations: Float[ArrayLike, "*b J 3 3"], joints: Float[ArrayLike, "*b J 3"]
) -> tuple[Float[Array, "*b J 3 3"], Float[Array, "*b J 3"]]:
    """Per joint the map x -> R x + t from the rest pose, composed along the kinematic chain."""
    turned, moved = [], []
    for index, parent in enumerate(parents):
        joint = joints[..., index, :]
        rotation = rotations[..., index, :, :]
        if parent < 0:
            turned.append(rotation)
            moved.append(joint)
            continue
        step = joint - joints[..., parent, :]
        turned.append(jnp.einsum("...ij,...jk->...ik", turned[parent], rotation, precision=_HIGHEST))
        moved.append(moved[parent] + jnp.einsum("...ij,...j->...i", turned[parent], step, precision=_HIGHEST))
    rotation, places = jnp.stack(turned, axis=-3), jnp.stack(jnp.broadcast_arrays(*moved), axis=-2)
    return rotation, places - jnp.einsum("...jik,...jk->...ji", rotation, joints, precision=_HIGHEST)


def skin(
    head: HeadAsset,
    identity: Identity,
    expression: Float[ArrayLike, "*b n_expr"],
    rotations: Float[ArrayLike, "*b J 3 3"],
) -> Float[Array, "*b V_all 3"]:
    """Linear blend skinning with a rotation for every joint, relative to its parent.

    The root turns about its own joint, as in `smplx.FLAME`; the package's rigid motion does not use it
    (see `world_vertices`). The inner mouth follows the neck.

    Raises:
      ValueError: the number of expression coefficients is not the head's.
    """
    n_vertices = head.template.shape[0]
    if expression.shape[-1:] != (head.n_expression,):
        raise ValueError(
            f"expression coefficients {tuple(expression.shape)} do not end in the "
            f"{head.n_expression} axes of head {head.name!r}"
        )
    neutral, mouth = identity.vertices[..., :n_vertices, :], identity.vertices[..., n_vertices:, :]
    # As in FLAME, joints follow the mesh with its expression.
    joint_basis = jnp.einsum("jv,evc->ejc", head.joint_regressor, head.expression_basis, precision=_HIGHEST)
    joints = jnp.einsum("jv,...vc->...jc", head.joint_regressor, neutral, precision=_HIGHEST)
    joints = joints + jnp.einsum("...e,ejc->...jc", expression, joint_basis, precision=_HIGHEST)
    basis, weights = head.expression_basis, expression
    if head.pose_correctives.shape[0]:
        feature = (rotations[..., 1:, :, :] - jnp.eye(3)).reshape(*rotations.shape[:-3], -1)
        basis = jnp.concatenate([basis, head.pose_correctives])
        weights = jnp.concatenate(
            [jnp.broadcast_to(expression, (*feature.shape[:-1], expression.shape[-1])), feature], axis=-1
        )
    posed = neutral + jnp.einsum("...e,evc->...vc", weights, basis, precision=_HIGHEST)
    rotation, offset = _world_transforms(head.parents, rotations, joints)
    # Elementwise and so fused: a matrix product over five joints would have to be written out and
    # transposed, a batched 3 x 3 product even more so.
    maps = jnp.concatenate([rotation, offset[..., None]], axis=-1)[..., None, :, :, :]
    weight = jnp.asarray(head.skinning_weights)[..., None, None]
    blended = sum((weight[:, j] * maps[..., j, :, :] for j in range(maps.shape[-3])), jnp.zeros(()))
    vertices = blended[..., 3] + sum(blended[..., k] * posed[..., k, None] for k in range(3))
    if mouth.shape[-2] == 0:
        return vertices
    neck = head.joint("neck")
    if neck is not None:
        turned = jnp.einsum("...ik,...vk->...vi", rotation[..., neck, :, :], mouth, precision=_HIGHEST)
        mouth = turned + offset[..., neck, None, :]
    mouth = jnp.broadcast_to(mouth, (*vertices.shape[:-2], *mouth.shape[-2:]))
    return jnp.concatenate([vertices, mouth], axis=-2)


@functools.partial(jax.jit, inline=True)
def head_vertices(
    head: HeadAsset, identity: Identity, coefficients: Coefficients
) -> Float[Array, "*b V_all 3"]:
    """Vertices with expression, jaw, eyes and neck, in the head frame (root unrotated), metres.

    `coefficients.betas`, `rot` and `tra` are not used: the shape is in `identity`, the rigid motion
    in `world_vertices`.

    Raises:
      ValueError: the number of expression coefficients is not the head's.
    """
    rotations = _joint_rotations(head, coefficients, with_neck=True)
    return skin(head, identity, coefficients.expression, rotations)


@functools.partial(jax.jit, inline=True)
def expression_offsets(
    head: HeadAsset, identity: Identity, coefficients: Coefficients
) -> Float[Array, "*b V_all 3"]:
    """Displacement by expression, jaw and eyes, with root and neck unrotated, in metres.

    Zero on inner-mouth vertices (method, section 3).
    """
    rotations = _joint_rotations(head, coefficients, with_neck=False)
    offsets = skin(head, identity, coefficients.expression, rotations) - identity.vertices
    n_vertices = head.template.shape[0]
    extra = identity.vertices.shape[-2] - n_vertices
    inner = jnp.concatenate([jnp.asarray(head.inner_mouth), jnp.ones(extra, bool)])
    return jnp.where(inner[:, None], 0.0, offsets)


@functools.partial(jax.jit, inline=True)
def world_vertices(
    head: HeadAsset, identity: Identity, coefficients: Coefficients
) -> Float[Array, "*b V_all 3"]:
    """Vertices after the rigid motion `R(rot) x + tra`, metres, y up."""
    vertices = head_vertices(head, identity, coefficients)
    rotation = matrix_from_rotvec(coefficients.rot)
    turned = jnp.einsum("...ik,...vk->...vi", rotation, vertices, precision=_HIGHEST)
    return turned + coefficients.tra[..., None, :]


@functools.partial(jax.jit, static_argnames="name", inline=True)
def landmark_positions(
    head: HeadAsset, vertices: Float[ArrayLike, "*b V_all 3"], name: str
) -> Float[Array, "*b n 3"]:
    """Positions of the landmark set `name` on the given vertices.

    Landmarks that the head lacks (`head.landmarks[name].face < 0`) come out as zeros.

    Raises:
      ValueError: the head has no such landmark set.
    """
    if name not in head.landmarks:
        raise ValueError(f"head {head.name!r} has no landmarks {name!r}, only {sorted(head.landmarks)}")
    marks = head.landmarks[name]
    present = jnp.asarray(marks.face) >= 0
    corners = jnp.asarray(head.faces)[jnp.maximum(marks.face, 0)]
    weights = jnp.where(present[:, None], marks.bary, 0.0)
    vertices = jnp.asarray(vertices)
    return sum((vertices[..., corners[:, k], :] * weights[:, k, None] for k in range(3)), jnp.zeros(()))
