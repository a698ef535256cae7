"""Portraits animated by the flow of the fitted head, without a trained network (method, section 18)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from loki_jax.face.asset import HeadAsset
from loki_jax.face.skinning import Identity, make_identity
from loki_jax.face.types import Camera, Coefficients
from loki_jax.geometry.align import Alignment, align, aligned_identity, no_alignment
from loki_jax.geometry.motion import Rig, head_motion, make_rig, source_positions
from loki_jax.geometry.warp import (
    Texture,
    make_texture,
    region_positions,
    sample,
    shrinkage,
    to_uint8,
)


class Scene(NamedTuple):
    """A portrait made ready for animation: pytree of arrays."""

    identity: Identity
    alignment: Alignment
    rig: Rig
    coefficients: Coefficients
    camera: Camera
    skin: Texture


def make_scene(
    head: HeadAsset,
    picture: UInt8[np.ndarray, "h w 3"],
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[np.ndarray, " 4"],
    points: Float[np.ndarray, "478 _"] | None,
) -> Scene:
    coefficients = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), coefficients)
    camera = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), camera)
    identity = make_identity(head, coefficients.betas)
    if points is None:
        alignment = no_alignment(identity.vertices.shape[0])
    else:
        alignment = align(head, identity, coefficients, camera, points)
    aligned = aligned_identity(head, identity, alignment, coefficients)
    rig = make_rig(head, aligned, coefficients, camera, crop)
    return jax.tree.map(jnp.asarray, Scene(identity, alignment, rig, coefficients, camera, make_texture(picture)))


@functools.partial(jax.jit, static_argnames=("size", "extent"))
def render_frames(
    head: HeadAsset, scene: Scene, target: Coefficients, size: int, extent: tuple[int, int]
) -> UInt8[Array, "n h w 3"]:
    def one(target):
        identity = aligned_identity(head, scene.identity, scene.alignment, target)
        motion = head_motion(
            head, identity, scene.rig, scene.coefficients, target, scene.camera, size, extent
        )
        position = region_positions(extent[1], extent[0])
        place, hidden, mirrored = source_positions(motion, scene.rig, position, extent)
        image = sample(scene.skin, place, shrinkage(place))
        other = sample(scene.skin, mirrored)
        image = image + hidden[..., None] * (other - image)
        return to_uint8(image[..., :3])

    return jax.lax.map(one, target)
