"""Normals of meshes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from loki_jax.arrays import ArrayLike


@functools.partial(jax.jit, inline=True)
def vertex_normals(
    vertices: Float[ArrayLike, "*b V 3"], faces: Int[ArrayLike, "F 3"]
) -> Float[Array, "*b V 3"]:
    """Unit normals: the mean of the adjacent faces' normals, weighted by their area.

    They point out of a mesh whose faces are counter-clockwise seen from outside; zero without a face.
    """
    a, b, c = (vertices[..., faces[:, k], :] for k in range(3))
    face_normals = jnp.cross(b - a, c - a)
    total = jnp.zeros_like(vertices)
    for k in range(3):
        total = total.at[..., faces[:, k], :].add(face_normals)
    return total * jax.lax.rsqrt(jnp.sum(total * total, axis=-1, keepdims=True) + 1e-24)
