"""Flow between two poses of a head: identity, a float64 oracle, occlusion, gradients, invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loki_jax.face.builtin import EYEBALL, builtin_head, builtin_mesh
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.crop import crop_box
from loki_jax.face.skinning import (
    head_vertices,
    make_identity,
    mesh_faces,
    mesh_render_mask,
    world_vertices,
)
from loki_jax.face.types import Camera, Coefficients
from loki_jax.flow import FACING, flow_between, head_flow, head_parts, normalise_positions, pixel_positions
from tests.flow.oracle import flow_oracle, pose

SIZE = 64
HEAD = builtin_head()
CAMERA = Camera(jnp.array([500.0, 500.0, 200.0, 200.0]), jnp.eye(4))
flow = jax.jit(functools.partial(head_flow), static_argnames=("size", "portrait_size"))


def coefficients(yaw=0.0, pitch=0.0, frames=(), **changes):
    """A head 0.7 m before the camera, turned about the vertical and the horizontal axis (degrees)."""
    still = Coefficients(
        betas=jnp.zeros((*frames, HEAD.n_shape)), expression=jnp.zeros((*frames, HEAD.n_expression)),
        rot=jnp.broadcast_to(jnp.deg2rad(jnp.array([pitch, yaw, 0.0])), (*frames, 3)),
        tra=jnp.broadcast_to(jnp.array([0.0, 0.0, -0.7]), (*frames, 3)),
        neck=jnp.zeros((*frames, 3)), jaw=jnp.zeros((*frames, 3)), eyes=jnp.zeros((*frames, 3)),
    )  # fmt: skip
    return still._replace(**changes)


IDENTITY = make_identity(HEAD, jnp.zeros(HEAD.n_shape))


def box(*poses, camera=CAMERA, scale=1.2):
    """The box around the heads of all poses."""
    pixels = [
        project(camera_from_world(world_vertices(HEAD, IDENTITY, c), camera), camera)[mesh_render_mask(HEAD)]
        for c in poses
    ]
    return crop_box(jnp.concatenate(pixels), scale)


def own_places(crop, size=SIZE):
    """Picture pixels of the pixel centres of a box."""
    crop = np.asarray(crop, np.float64)
    return crop[:2] + (pixel_positions(size).astype(np.float64) + 1) / 2 * (crop[2:] - crop[:2])


def talking(seed, frames=()):
    rng = np.random.default_rng(seed)
    draw = lambda n, scale: jnp.asarray(rng.normal(size=(*frames, n)) * scale, jnp.float32)
    return coefficients(frames=frames)._replace(
        expression=jnp.asarray(rng.uniform(0, 0.6, (*frames, HEAD.n_expression)), jnp.float32),
        rot=draw(3, 0.25), tra=draw(3, 0.02) + jnp.array([0, 0, -0.7]), neck=draw(3, 0.1),
        jaw=jnp.abs(draw(3, 0.15)) * jnp.array([1.0, 0, 0]), eyes=draw(3, 0.1),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_equal_poses_give_the_identity_map(seed):
    given = talking(seed)
    crop = box(given)
    found = flow(HEAD, IDENTITY, given, given, CAMERA, crop, CAMERA, crop, size=128)
    np.testing.assert_allclose(found.position, own_places(crop, 128), atol=1e-4, rtol=0)
    covered = np.asarray(found.coverage) == 1
    assert 0.3 < covered.mean() < 0.7
    np.testing.assert_allclose(found.facing[..., 0], found.facing[..., 1], atol=1e-6)
    turned_to = covered & (np.asarray(found.facing[..., 0]) > FACING[1])
    assert turned_to.sum() > 0.85 * covered.sum()
    np.testing.assert_allclose(np.asarray(found.visibility)[turned_to], 1, atol=1e-3)
    assert not np.asarray(found.visibility)[~covered].any()
