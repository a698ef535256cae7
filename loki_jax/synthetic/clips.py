"""Synthetic clips with known truth: a random identity of the built-in head with speech-like motion.

An identity is one integer, and so is a clip: appearance, shape, motion, camera and crop follow from them
through numpy's PCG64, so they are the same on every machine. `python -m data_prep.synth` writes datasets
of such clips.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import BuiltinMesh
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.crop import crop_box
from loki_jax.face.skinning import make_identity, mesh_render_mask, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.synthetic.appearance import Appearance, sample_appearance, sample_shape
from loki_jax.synthetic.motion import synth_motion
from loki_jax.synthetic.shading import render

_FRAME_SIZE = 512  # pixels of the uncropped frame that camera and crop refer to

_CHUNK = 16  # frames rendered at a time


class SynthClip(NamedTuple):
    """One clip with everything it was made of.

    Attributes:
      frames: the rendered crop.
      coefficients: fields (N, n), float32.
      camera: intrinsics (4,), extrinsics (4, 4); constant in a clip.
      crop: (4,) box x0, y0, x1, y1 in pixels of the 512 x 512 uncropped frame; constant in a clip.
      appearance: that of the identity.
    """

    frames: UInt8[np.ndarray, "N S S 3"]
    coefficients: Coefficients
    camera: Camera
    crop: Float[np.ndarray, " 4"]
    appearance: Appearance


def synth_clip(
    head: HeadAsset,
    identity_seed: int,
    clip_seed: int,
    n_frames: int,
    size: int,
    supersample: int = 2,
    mesh: BuiltinMesh | None = None,
) -> SynthClip:
    """Render one clip; equal arguments give equal coefficients, camera and crop everywhere.

    `mesh` is `builtin_mesh()`, for callers that make many clips and build it once.

    Raises:
      ValueError: `head` is not the built-in head.
    """
    motion = synth_motion(head, clip_seed, n_frames)
    betas = np.broadcast_to(sample_shape(identity_seed, head), (n_frames, head.n_shape))
    coefficients = motion._replace(betas=np.ascontiguousarray(betas))
    camera = synth_camera(clip_seed)
    crop = clip_crop(head, coefficients, camera)
    appearance = sample_appearance(identity_seed, head, mesh)
    frames = render_frames(head, coefficients, camera, crop, appearance, size, supersample)
    return SynthClip(frames, coefficients, camera, crop, appearance)


def synth_camera(clip_seed: int) -> Camera:
    """A camera about 1 m in front of the head with a field of view of 20 to 25 degrees."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([int(clip_seed), 8])))
    focal = 0.5 * _FRAME_SIZE / np.tan(0.5 * np.deg2rad(rng.uniform(20.0, 25.0)))
    extrinsics = np.eye(4)
    extrinsics[:3, 3] = rng.uniform(-0.02, 0.02), rng.uniform(-0.02, 0.02), rng.uniform(0.92, 1.12)
    centre = 0.5 * _FRAME_SIZE
    return Camera(np.array([focal, focal, centre, centre], np.float32), extrinsics.astype(np.float32))


def clip_crop(
    head: HeadAsset, coefficients: Coefficients, camera: Camera, scale: float = 1.2
) -> Float[np.ndarray, " 4"]:
    """One box for the clip, `scale` times the box of the head's vertices over all its frames."""
    pixels = np.asarray(_head_pixels(head, coefficients, camera))
    return np.asarray(crop_box(pixels.reshape(-1, 2), scale), np.float32)


@jax.jit
def _head_pixels(head, coefficients, camera):
    vertices = world_vertices(head, make_identity(head, coefficients.betas[..., :1, :]), coefficients)
    in_time = lambda x: jnp.broadcast_to(x, (vertices.shape[0], *x.shape))
    camera = jax.tree.map(in_time, camera)
    pixels = project(camera_from_world(vertices, camera), camera)
    # Vertices outside the mask are replaced by one inside, so that the shape stays fixed.
    mask = mesh_render_mask(head)
    inside = pixels[:, jnp.argmax(mask)]
    return jnp.where(mask[:, None], pixels, inside[:, None])


def render_frames(
    head: HeadAsset,
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[np.ndarray, " 4"],
    appearance: Appearance,
    size: int,
    supersample: int = 2,
) -> UInt8[np.ndarray, "N S S 3"]:
    """Frames of one person (the shape of the first frame is used for all), any number of them.

    Rendered in chunks of one fixed length, so that clips of different lengths share one compilation.
    """
    n = len(coefficients.expression)
    frames = []
    for start in range(0, n, _CHUNK):
        index = np.minimum(np.arange(start, start + _CHUNK), n - 1)
        chunk = Coefficients(*(np.asarray(field)[index] for field in coefficients))
        image = _render_chunk(head, chunk, camera, crop, appearance, size, supersample)
        frames.append(np.asarray(image)[: n - start])
    return np.concatenate(frames)


@functools.partial(jax.jit, static_argnames=("size", "supersample"))
def _render_chunk(head, coefficients, camera, crop, appearance, size, supersample):
    identity = make_identity(head, coefficients.betas[:1])
    image = render(head, identity, coefficients, camera, crop, appearance, size, supersample)
    return (image * 255.0 + 0.5).astype(jnp.uint8)
