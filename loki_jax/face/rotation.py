"""Rotation vectors and matrices, differentiable everywhere they are used, the identity included.

Rotation vectors are axis times angle in radians. Quaternions are (w, x, y, z).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from loki_jax.arrays import ArrayLike

# Below this squared angle the Taylor series of order 2 is exact to float32 and better conditioned
# than the closed form.
_SMALL_SQUARED_ANGLE = 1e-4


@functools.partial(jax.jit, inline=True)
def matrix_from_rotvec(rotvec: Float[ArrayLike, "*b 3"]) -> Float[Array, "*b 3 3"]:
    """Rotation matrices of rotation vectors (Rodrigues), with exact derivatives at zero."""
    squared = jnp.sum(rotvec * rotvec, axis=-1)[..., None, None]
    small = squared < _SMALL_SQUARED_ANGLE
    # The unused branch of `where` must stay finite, or its gradient would poison the other.
    angle = jnp.sqrt(jnp.where(small, 1.0, squared))
    sine = jnp.where(small, 1 - squared / 6 + squared**2 / 120, jnp.sin(angle) / angle)
    half = jnp.sin(0.5 * angle) / angle
    versine = jnp.where(small, 0.5 - squared / 24 + squared**2 / 720, 2 * half * half)
    x, y, z = rotvec[..., 0], rotvec[..., 1], rotvec[..., 2]
    zero = jnp.zeros_like(x)
    cross = jnp.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1)
    cross = cross.reshape(*rotvec.shape[:-1], 3, 3)
    outer = rotvec[..., :, None] * rotvec[..., None, :]
    identity = jnp.eye(3, dtype=rotvec.dtype)
    return identity + sine * cross + versine * (outer - squared * identity)


def quaternion_from_matrix(matrix: Float[ArrayLike, "*b 3 3"]) -> Float[Array, "*b 4"]:
    """Unit quaternions with w >= 0 of rotation matrices, accurate at every angle."""
    m = matrix
    m00, m11, m22 = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    a, b, c = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    d, e, f = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    # Row i is 4 q_i times the quaternion; the row with the largest q_i is the well-conditioned one.
    rows = jnp.stack(
        [
            jnp.stack([1 + m00 + m11 + m22, a, b, c], -1),
            jnp.stack([a, 1 + m00 - m11 - m22, d, e], -1),
            jnp.stack([b, d, 1 - m00 + m11 - m22, f], -1),
            jnp.stack([c, e, f, 1 - m00 - m11 + m22], -1),
        ],
        axis=-2,
    )
    best = jnp.argmax(jnp.diagonal(rows, axis1=-2, axis2=-1), axis=-1)
    q = jnp.take_along_axis(rows, best[..., None, None], axis=-2)[..., 0, :]
    q = q / jnp.sqrt(jnp.sum(q * q, axis=-1, keepdims=True))
    return jnp.where(q[..., :1] < 0, -q, q)


def _safe_norm(vector: Float[ArrayLike, "*b n"]) -> Float[Array, " *b"]:
    """Euclidean norm whose gradient at the origin is zero instead of NaN."""
    squared = jnp.sum(vector * vector, axis=-1)
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)


def rotvec_from_matrix(matrix: Float[ArrayLike, "*b 3 3"]) -> Float[Array, "*b 3"]:
    """Rotation vectors of length at most pi; exact derivatives everywhere but at the angle pi."""
    q = quaternion_from_matrix(matrix)
    w, v = q[..., :1], q[..., 1:]
    squared = jnp.sum(v * v, axis=-1, keepdims=True)
    small = squared < _SMALL_SQUARED_ANGLE
    sine = jnp.sqrt(jnp.where(small, 1.0, squared))
    w_safe = jnp.where(small, w, 1.0)
    ratio = squared / (w_safe * w_safe)
    series = 2 / w_safe * (1 - ratio / 3 + ratio**2 / 5)
    return v * jnp.where(small, series, 2 * jnp.arctan2(sine, w) / sine)


def geodesic_angle(a: Float[ArrayLike, "*#b 3 3"], b: Float[ArrayLike, "*#b 3 3"]) -> Float[Array, " *b"]:
    """Angle in radians of the rotation that takes `a` to `b`: 2 arccos |q_a . q_b|.

    Computed as an arctangent, since the arccosine loses half the digits near zero. The gradient at
    zero angle is zero.
    """
    relative = jnp.einsum("...ij,...kj->...ik", b, a, precision=jax.lax.Precision.HIGHEST)
    q = quaternion_from_matrix(relative)
    return 2 * jnp.arctan2(_safe_norm(q[..., 1:]), q[..., 0])
