"""Models, and baselines that show where a scale begins and ends."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.crop import crop_and_resize
from loki_jax.face.skinning import landmark_positions, make_identity, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.clips import FittedClip, fit_video
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.points import LANDMARK_SET
from loki_jax.framing import frame_animation
from loki_jax.geometry.pipeline import GeometryPipeline
from loki_jax.pipeline import LokiPipeline, retarget_clip
from loki_jax.protocols.inputs import driver_file, reference_file, truth_file
from loki_jax.protocols.manifest import Manifest, Sample
from loki_jax.sources import DrivingClip, Portrait, driving_clip, fit_portrait
from loki_jax.video import LazyFrames, read_image

BASELINES = ("still", "aligned", "refit", "geometry", "demo")

Frames = Iterable[UInt8[np.ndarray, "h w 3"]]
# The frames of a sample's animation.
System = Callable[[Sample], Frames]

_KEPT = 32  # fitted clips


class Fits:
    """Portraits and drivers of a manifest, fitted when they are asked for, the last ones kept."""

    def __init__(self, manifest: Manifest, folder: Path, head: HeadAsset, size: int, landmarker: Landmarker):
        self.manifest, self.folder, self.head, self.size = manifest, folder, head, size
        self._landmarker = landmarker
        self.fitted = functools.lru_cache(_KEPT)(self._fitted)
        self.portrait = functools.lru_cache(_KEPT)(self._portrait)

    def _fitted(self, source: str) -> FittedClip:
        """The driver of a source."""
        return fit_video(
            driver_file(self.folder, source), self.head,
            landmarker=self._landmarker, all_shots=True, allow_lost=True, name=source,
        )  # fmt: skip

    def _portrait(self, source: str) -> Portrait:
        """The portrait of a source, fitted."""
        path = reference_file(self.folder, source)
        return fit_portrait(path, self.head, self.size, landmarker=self._landmarker, name=source)

    def pair(self, sample: Sample) -> tuple[Portrait, DrivingClip]:
        """Portrait and driver of a sample, which have the same pose in the driver's neutral frame.

        Where the portrait is the driver's first frame, or one of a rendered head at the same rest, that is
        the first; else the frame nearest to rest.
        """
        clip = driving_clip(self.fitted(sample.driver), self.size)
        return self.portrait(sample.reference), clip.with_neutral(
            self.head, None if sample.protocol == "cross" else 0
        )


def still(fits: Fits) -> System:
    """The portrait, again and again: what a method that does nothing scores."""

    def animate(sample: Sample) -> Frames:
        picture = read_image(reference_file(fits.folder, sample.reference))
        return [picture] * fits.manifest.sources[sample.driver].frames

    return animate


def aligned(fits: Fits) -> System:
    """The portrait moved as a flat picture: in each frame the similarity that brings the landmarks of its
    head nearest to where they should be. What can be had without any turn in depth and any expression.
    """

    def animate(sample: Sample) -> Iterator[np.ndarray]:
        portrait, clip = fits.pair(sample)
        picture = read_image(reference_file(fits.folder, sample.reference))
        moved = retarget_clip(fits.head, clip, portrait)
        own = Coefficients(*(np.asarray(field)[None] for field in portrait.coefficients))
        rest = _landmarks(fits.head, own, portrait.camera)[0]
        for points in _landmarks(fits.head, moved, portrait.camera):
            yield warp_similarly(picture, rest, points)

    return animate


def _landmarks(head: HeadAsset, coefficients: Coefficients, camera: Camera) -> Float[np.ndarray, "n k 2"]:
    """Projected landmarks in pixels of those that the head has."""
    identity = make_identity(head, jnp.asarray(coefficients.betas[0]))
    vertices = world_vertices(head, identity, Coefficients(*(jnp.asarray(x) for x in coefficients)))
    pixels = project(camera_from_world(landmark_positions(head, vertices, LANDMARK_SET), camera), camera)
    return np.asarray(pixels)[:, np.asarray(head.landmarks[LANDMARK_SET].face) >= 0]


def warp_similarly(
    picture: UInt8[np.ndarray, "h w 3"], points: Float[np.ndarray, "k 2"], wanted: Float[np.ndarray, "k 2"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture turned, scaled and shifted so that `points` come nearest (least squares) to `wanted`.

    What comes from outside continues the picture's edge.
    """
    source, target = points @ (1, 1j), wanted @ (1, 1j)
    centred = target - target.mean()
    back = np.vdot(centred, source) / np.vdot(centred, centred)  # from the result to the picture
    shift = source.mean() - back * target.mean()
    height, width = picture.shape[:2]
    # Pillow's positions count from the corner of a pixel, as ours do from its centre.
    half = 0.5 + 0.5j
    shift = shift - back * half + half
    margin = max(height, width)
    wide = np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    matrix = (back.real, -back.imag, shift.real + margin, back.imag, back.real, shift.imag + margin)
    moved = Image.fromarray(wide).transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
    )
    return np.asarray(moved)


def refit(fits: Fits) -> System:
    """The truth, and where nobody knows it the driver itself: what is left of a perfect result."""

    def animate(sample: Sample) -> Frames:
        truth = truth_file(fits.manifest, fits.folder, sample)
        return LazyFrames(driver_file(fits.folder, sample.driver) if truth is None else truth)

    return animate


def geometry(fits: Fits) -> System:
    """The geometry renderer (method, section 18)."""
    pipeline = GeometryPipeline(fits.head, fits.size)

    def animate(sample: Sample) -> Iterator[np.ndarray]:
        for window in pipeline.windows(*fits.pair(sample)):
            yield from window.frames

    return animate


class ModelSettings(NamedTuple):
    """How models sample; None: as their config says."""

    steps: int | None = None
    guidance: float | None = None
    seed: int = 0


DEFAULT_SETTINGS = ModelSettings()


def model(
    source: str | os.PathLike,
    manifest: Manifest,
    folder: Path,
    landmarker: Landmarker,
    settings: ModelSettings = DEFAULT_SETTINGS,
) -> System:
    """A trained model; its frames, which show the head alone, are laid into the portrait's picture.

    Raises:
      CheckpointError: no model there.
    """
    pipeline = LokiPipeline.from_checkpoint(source)
    fits = Fits(manifest, folder, pipeline.head, pipeline.size, landmarker)
    options: dict[str, Any] = {"steps": settings.steps, "guidance": settings.guidance, "mode": "relative"}

    def animate(sample: Sample) -> Iterator[np.ndarray]:
        portrait, clip = fits.pair(sample)
        moved = retarget_clip(fits.head, clip, portrait, "relative", pipeline.config.driver.neck)
        framed, _ = frame_animation(fits.head, portrait, moved)
        picture = read_image(reference_file(folder, sample.reference))
        for window in pipeline.windows(portrait, clip, seed=settings.seed, **options):
            for frame in window.frames:
                yield paste(picture, frame, framed.crop)

    return animate


def paste(
    picture: UInt8[np.ndarray, "h w 3"], frame: UInt8[np.ndarray, "s s 3"], box: Float[np.ndarray, " 4"]
) -> UInt8[np.ndarray, "h w 3"]:
    """A picture whose box (x0, y0, x1, y1, pixels) shows a frame."""
    corner, side = np.round(box[:2]).astype(int), int(np.round(box[2] - box[0]))
    whole = crop_and_resize(frame, np.array([0, 0, *frame.shape[1::-1]]), side)
    low = np.maximum(corner, 0)
    high = np.minimum(corner + side, picture.shape[1::-1])
    result = picture.copy()
    (x0, y0), (x1, y1) = low - corner, high - corner
    result[low[1] : high[1], low[0] : high[0]] = whole[y0:y1, x0:x1]
    return result


def make_baseline(
    name: str, fits: Fits, landmarker: Landmarker, settings: ModelSettings = DEFAULT_SETTINGS
) -> System:
    """One of `BASELINES`.

    Raises:
      ValueError: another name.
    """
    makers: dict[str, Callable[[Fits], System]] = {
        "still": still, "aligned": aligned, "refit": refit, "geometry": geometry,
        "demo": lambda fits: model("demo", fits.manifest, fits.folder, landmarker, settings),
    }  # fmt: skip
    if name not in makers:
        raise ValueError(f"no baseline {name!r}: expected some of {', '.join(makers)}")
    return makers[name](fits)
