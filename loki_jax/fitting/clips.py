"""From frames to a fitted head: landmarks, fit and crop box in one call, for clips and portraits.

The user level of `loki_jax.fitting`: `fit_image` and `fit_video`.
"""

from __future__ import annotations

import functools
import os
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.crop import crop_box
from loki_jax.face.skinning import make_identity, mesh_render_mask, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.fit import DEFAULT_SETTINGS, FitResult, fit_landmarks
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.model_files import fetch_models
from loki_jax.fitting.problem import FitSettings, pad_frames
from loki_jax.fitting.task_file import with_task_file
from loki_jax.fitting.tracking import FaceChoice, Track, choose_frames, cut_track, find_face
from loki_jax.video import Frames, LazyFrames, read_image

CROP_FACTOR = 1.2


class FittedClip(NamedTuple):
    """A clip (or, with one frame, a portrait) and the head fitted to it.

    Attributes:
      frames: uncropped RGB frames; of a file decoded when they are asked for.
      fps: frame rate; of a portrait 25, which then means nothing.
      track: its landmarks.
      fit: coefficients (N, ...), camera and errors.
      crop: one box x0, y0, x1, y1 for the whole clip, in pixels of the uncropped frame; may reach
        beyond it.
      name: file, or what errors call it.
      start: number of the first of these frames in the video.
    """

    frames: Frames
    fps: Fraction
    track: Track
    fit: FitResult
    crop: Float[np.ndarray, " 4"]
    name: str
    start: int = 0


@functools.cache
def default_landmarker(task: Path | None = None) -> Landmarker:
    """The landmark networks from the user's cache, downloaded on first use; loaded once a process.

    Args:
      task: MediaPipe's `face_landmarker.task`, whose lids and expression scores are then used, too.

    Raises:
      LandmarkError: no networks, or another file.
    """
    return Landmarker(with_task_file(fetch_models(), task))


def fit_image(
    image: str | os.PathLike | UInt8[np.ndarray, "H W 3"],
    head: HeadAsset,
    *,
    landmarker: Landmarker | None = None,
    face: FaceChoice | None = None,
    focal: float | None = None,
    crop_factor: float = CROP_FACTOR,
    settings: FitSettings = DEFAULT_SETTINGS,
    name: str | None = None,
) -> FittedClip:
    """Fit a portrait, given as a file or as an RGB array; fields of the result have one frame.

    Args:
      landmarker: default `default_landmarker()`.
      face: which face (`FaceChoice`); default the only or by far the largest one.
      focal: focal length in pixels; default that of `settings.fov`.
      crop_factor: side of the crop box over the longer side of the projected head.
      name: what error messages call the image.

    Raises:
      MediaError, LandmarkError, FitError: the picture cannot be read, has no (single) face, or the
        head has no landmarks.
    """
    if isinstance(image, np.ndarray):
        pixels, name = image, name or "image"
    else:
        pixels, name = read_image(image), name or str(image)
    frames, track = find_face(landmarker or default_landmarker(), pixels[None], face, name)
    return fit_track(
        frames, Fraction(25), track, head,
        focal=focal, crop_factor=crop_factor, settings=settings, name=name,
    )  # fmt: skip


def fit_video(
    video: str | os.PathLike | Frames,
    head: HeadAsset,
    *,
    fps: Fraction | None = None,
    landmarker: Landmarker | None = None,
    face: FaceChoice | None = None,
    all_shots: bool = False,
    allow_lost: bool = False,
    focal: float | None = None,
    crop_factor: float = CROP_FACTOR,
    settings: FitSettings = DEFAULT_SETTINGS,
    name: str | None = None,
) -> FittedClip:
    """Fit the longest shot of a clip, given as a file or as RGB frames.

    Every frame of the shot gets coefficients: where the face is lost they are interpolated, with confidence
    0.

    Args:
      fps: of frames their rate (required); of a file the rate to resample to (None: its own).
      all_shots, allow_lost: see `loki_jax.fitting.tracking.choose_frames`.
      landmarker, face, focal, crop_factor, settings, name: as for `fit_image`.

    Raises:
      MediaError, LandmarkError, FitError: the file cannot be read, the face is not visible in most frames, or
        the head has no landmarks.
      ValueError: frames without `fps`.
    """
    frames: Frames
    if isinstance(video, str | os.PathLike):
        frames, name = LazyFrames(video, fps), name or str(video)
        fps = frames.fps
    elif fps is None:
        raise ValueError("frames that are no file need their frame rate: pass fps")
    else:
        frames, name = video, name or "clip"
    frames, track = find_face(landmarker or default_landmarker(), frames, face, name)
    start, stop = choose_frames(track, name, all_shots, allow_lost)
    fitted = fit_track(
        frames[start:stop], fps, cut_track(track, start, stop), head,
        focal=focal, crop_factor=crop_factor, settings=settings, name=name,
    )  # fmt: skip
    return fitted._replace(start=start)


def clip_crop_box(
    head: HeadAsset, coefficients: Coefficients, camera: Camera, factor: float = CROP_FACTOR
) -> Float[np.ndarray, " 4"]:
    """One square box around the projected head over all frames, `factor` times its longer side.

    The head are the vertices of the render mask; shoulders and neck base do not widen the box.
    """
    low, high = head_extent(head, coefficients, camera)
    corners = jnp.stack([jnp.min(low, axis=0), jnp.max(high, axis=0)])
    return np.asarray(crop_box(corners, factor))


def head_extent(
    head: HeadAsset, coefficients: Coefficients, camera: Camera
) -> tuple[Float[np.ndarray, "N 2"], Float[np.ndarray, "N 2"]]:
    """Smallest and largest pixel coordinates of the projected head (render mask), for each of N frames.

    The camera may be one for all frames, or one a frame.
    """
    n = len(coefficients.expression)
    padded = Coefficients(*(pad_frames(np.asarray(field)) for field in coefficients))
    cameras = Camera(
        pad_frames(np.broadcast_to(camera.intrinsics, (n, 4))),
        pad_frames(np.broadcast_to(camera.extrinsics, (n, 4, 4))),
    )
    low, high = _extent(head, padded, cameras)
    return np.asarray(low)[:n], np.asarray(high)[:n]


@jax.jit
def _extent(head: HeadAsset, coefficients: Coefficients, camera: Camera) -> tuple[Array, Array]:
    mask = mesh_render_mask(head)[:, None]

    def frame(values):
        coefficients, camera = values
        identity = make_identity(head, coefficients.betas)
        pixels = project(camera_from_world(world_vertices(head, identity, coefficients), camera), camera)
        low = jnp.min(pixels, axis=0, where=mask, initial=jnp.inf)
        return low, jnp.max(pixels, axis=0, where=mask, initial=-jnp.inf)

    return jax.lax.map(frame, (coefficients, camera))


def fit_track(
    frames: Frames,
    fps: Fraction,
    track: Track,
    head: HeadAsset,
    *,
    focal: float | None = None,
    crop_factor: float = CROP_FACTOR,
    settings: FitSettings = DEFAULT_SETTINGS,
    name: str = "clip",
) -> FittedClip:
    """Fit frames whose landmarks are known; arguments as for `fit_video`."""
    fit = fit_landmarks(
        head,
        track.points,
        track.confidence,
        frames[0].shape[:2],
        focal=focal,
        settings=settings,
        fps=float(fps),
        scores=track.scores,
    )
    crop = clip_crop_box(head, fit.coefficients, fit.camera, crop_factor)
    return FittedClip(frames, fps, track, fit, crop, name)
