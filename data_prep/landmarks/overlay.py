"""Pictures that show whether a fit sits on the face: the crop beside the crop with mesh and landmarks."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.crop import crop_and_resize
from loki_jax.face.ict import MEDIAPIPE_OF_IBUG
from loki_jax.face.skinning import landmark_positions, make_identity, mesh_faces, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.clips import FittedClip
from loki_jax.fitting.points import LANDMARK_SET
from loki_jax.synthetic.shading import plain_shade, shade_mesh

_PUPILS = 468, 473

_SEEN, _MODEL = (60, 255, 60), (255, 50, 50)  # landmarks found in the image; the same points of the mesh


def overlay_frames(
    clip: FittedClip, head: HeadAsset, size: int = 256, opacity: float = 0.55
) -> Iterator[UInt8[np.ndarray, "S 2*S 3"]]:
    """For each frame a picture (size, 2 size, 3): the crop, and the crop under the shaded mesh.

    The 68 landmarks and pupils that were found are green, those of the mesh red.

    Args:
      clip: frames, landmarks and fit of one clip.
      head: the head that was fitted.
      size: side of one half in pixels.
      opacity: of the mesh.
    """
    fit = clip.fit
    crop = jnp.asarray(clip.crop)
    # All 478 landmarks would hide the lids and lips of the mesh.
    held = np.flatnonzero(np.asarray(head.landmarks[LANDMARK_SET].face) >= 0)
    drawn = np.intersect1d(held, (*MEDIAPIPE_OF_IBUG, *_PUPILS))
    origin, scale = clip.crop[:2], size / (clip.crop[2] - clip.crop[0])
    for index, frame in enumerate(clip.frames):
        coefficients = Coefficients(*(jnp.asarray(field[index]) for field in fit.coefficients))
        shade, covered, marks = _render(head, coefficients, fit.camera, crop, size)
        plain = crop_and_resize(frame, clip.crop, size)
        alpha = opacity * np.asarray(covered)[..., None]
        drawing = plain * (1 - alpha) + np.asarray(shade)[..., None] * (255 * alpha)
        drawing = np.ascontiguousarray(np.clip(drawing, 0, 255).astype(np.uint8))
        seen = (clip.track.points[index, :, :2] - origin) * scale
        mesh = (np.asarray(marks) - origin) * scale
        for point in drawn:
            if clip.track.confidence[index, point] > 0:
                _dot(drawing, seen[point], _SEEN)
            _dot(drawing, mesh[point], _MODEL)
        yield np.concatenate([plain, drawing], axis=1)


def _dot(picture: np.ndarray, centre: np.ndarray, colour: tuple[int, int, int]) -> None:
    radius = max(1, picture.shape[0] // 256)
    cv2.circle(picture, tuple(int(round(float(c))) for c in centre), radius, colour, -1, cv2.LINE_AA)


@functools.partial(jax.jit, static_argnames="size")
def _render(
    head: HeadAsset, coefficients: Coefficients, camera: Camera, crop: Float[Array, "4"], size: int
) -> tuple[Float[Array, "S S"], Float[Array, "S S"], Float[Array, "478 2"]]:
    """Shading in 0..1, coverage and the mesh's landmarks in pixels of the uncropped frame."""
    faces = mesh_faces(head)
    world = world_vertices(head, make_identity(head, coefficients.betas), coefficients)
    # Light from the upper left of the viewer, so that lips and lids stand out.
    shade = plain_shade(world, faces, (-0.4, 0.5, 0.77))
    # The second channel is the coverage.
    attributes = jnp.stack([shade, jnp.ones_like(shade)], axis=-1)
    image = shade_mesh(world, faces, attributes, camera, crop, size, supersample=1)
    marks = landmark_positions(head, world, LANDMARK_SET)
    return image[..., 0], image[..., 1], project(camera_from_world(marks, camera), camera)
