"""The geometry renderer as an `Animator`: `--checkpoint geometry`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real, UInt8

from loki_jax.driver.encoding import preview_map
from loki_jax.driver.map import driver_map
from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import builtin_head
from loki_jax.face.controls import Controls, Slider
from loki_jax.face.skinning import make_identity
from loki_jax.face.types import Camera, Coefficients
from loki_jax.geometry.renderer import make_scene, render_frames
from loki_jax.pipeline import Window, retarget_clip
from loki_jax.sources import DrivingClip, Portrait
from loki_jax.video.image import reduce_picture

LARGEST = 2048  # pixels of a picture's longer side; larger pictures are reduced
_WINDOW = 16  # frames rendered by one call
_MAP_SIZE = 128
_REGION = 2.6  # half the side of the part that moves, in those of the portrait's crop
_WORTH_A_REGION = 0.7  # share of the picture below which only this part is rendered


class GeometryPipeline:
    """Animates portraits by the flow of the fitted head; nothing is trained. An `Animator`.

        pipeline = GeometryPipeline()
        portrait = fit_portrait("portrait.jpg", pipeline.head, pipeline.size)
        clip = fit_clip("clip.mp4", pipeline.head, pipeline.size)
        frames = pipeline(portrait, clip)

    Frames have the size of the portrait's whole picture, of at most 2,048 pixels a side. Of a portrait
    without its picture, as from a dataset, they have that of its crop.

    Attributes:
      head: the head that portraits and clips must be fitted with.
      size: edge in pixels of the crops of portraits and clips, which are for display.
    """

    def __init__(self, head: HeadAsset | None = None, size: int = 512):
        self.head = builtin_head() if head is None else head
        self.size = size
        self._head = jax.tree.map(jnp.asarray, self.head)

    def windows(
        self,
        portrait: Portrait,
        clip: DrivingClip,
        *,
        mode: str = "relative",
        controls: Controls | None = None,
        sliders: Mapping[str, Slider] | None = None,
        relight: bool = False,
    ) -> Iterator[Window]:
        """The animation of `portrait` by `clip`, 16 frames at a time: memory does not grow with its length.

        Args:
          mode: "relative": the head turns from the portrait's pose by the driver's increments; "absolute": it
            takes the driver's pose.
          controls, sliders: see `loki_jax.pipeline.retarget_clip`.
          relight: see `prepare`.

        Yields:
          Windows: frames (T, H, W, 3) and maps (T, 128, 128, 3); the last may be shorter.

        Raises:
          ValueError: unknown mode, or as `apply_controls`.
        """
        target = retarget_clip(self.head, clip, portrait, mode, controls=controls, sliders=sliders)
        render = self.prepare(portrait, relight)
        camera, crop = jax.tree.map(jnp.asarray, (portrait.camera, np.asarray(portrait.crop, np.float32)))
        length = target.rot.shape[0]

        def generate() -> Iterator[Window]:
            for start in range(0, length, _WINDOW):
                # The last window is filled with its last frame.
                index = np.minimum(np.arange(start, start + _WINDOW), length - 1)
                chosen = jax.tree.map(lambda x, index=index: jnp.asarray(x)[index], target)
                maps, frames = _preview(self._head, chosen, camera, crop), render(chosen)
                yield Window(frames[: length - start], np.asarray(maps)[: length - start])

        return generate()

    def __call__(self, portrait: Portrait, clip: DrivingClip, **options: Any) -> UInt8[np.ndarray, "n h w 3"]:
        """All frames of `windows`, with its options and errors: one for each frame of the clip, RGB."""
        return np.concatenate([window.frames for window in self.windows(portrait, clip, **options)])

    def prepare(
        self, portrait: Portrait, relight: bool = False, grid: int | None = None
    ) -> Callable[[Coefficients], UInt8[np.ndarray, "n h w 3"]]:
        """The portrait made ready: a function from coefficients (n, ...) of its head to frames.

        Each n is compiled once for each size of picture.

        Args:
          relight: the skin brightens and darkens as it turns in the portrait's light, which is fitted.
          grid: side of the grid of the motion, a multiple of 64. A small one is fast: 256 is enough for
            pictures of 512 pixels. None: by the size of the head.
        """
        whole = _subject(portrait)
        rows, columns = _moving_part(whole)
        part = whole.shifted(np.array([columns.start, rows.start]))
        scene, layout = make_scene(
            self._head,
            whole.picture[rows, columns],
            part.coefficients,
            part.camera,
            part.crop,
            part.landmarks,
            relight,
            grid,
        )

        def render(target: Coefficients) -> UInt8[np.ndarray, "n h w 3"]:
            moving = np.asarray(render_frames(self._head, scene, target, layout))
            frames = np.broadcast_to(whole.picture, (len(moving), *whole.picture.shape)).copy()
            frames[:, rows, columns] = moving
            return frames

        return render


@jax.jit
def _preview(
    head: HeadAsset, coefficients: Coefficients, camera: Camera, crop: Float[Array, " 4"]
) -> UInt8[Array, "n s s 3"]:
    identity = make_identity(head, coefficients.betas[:1])
    return preview_map(driver_map(head, identity, coefficients, camera, crop, _MAP_SIZE))


class _Subject(NamedTuple):
    """Who is animated: a portrait with the picture that is rendered; positions are in its pixels."""

    picture: UInt8[np.ndarray, "h w 3"]
    coefficients: Coefficients
    camera: Camera
    crop: Float[np.ndarray, " 4"]
    landmarks: Float[np.ndarray, "478 2"] | None

    def shifted(self, corner: Real[np.ndarray, " 2"]) -> _Subject:
        """All positions counted from another corner; the picture stays."""
        intrinsics = np.asarray(self.camera.intrinsics) - np.array([0, 0, *corner])
        return self._replace(
            camera=self.camera._replace(intrinsics=intrinsics.astype(np.float32)),
            crop=(self.crop - np.tile(corner, 2)).astype(np.float32),
            landmarks=None if self.landmarks is None else (self.landmarks - corner).astype(np.float32),
        )

    def scaled(self, factor: float) -> _Subject:
        """All positions in pixels of another size; the picture stays."""
        intrinsics = np.asarray(self.camera.intrinsics) * factor
        return self._replace(
            camera=self.camera._replace(intrinsics=intrinsics.astype(np.float32)),
            crop=(self.crop * factor).astype(np.float32),
            landmarks=None if self.landmarks is None else (self.landmarks * factor).astype(np.float32),
        )


def _subject(portrait: Portrait) -> _Subject:
    """The portrait with its own picture, of at most `LARGEST` pixels a side, or else with its crop."""
    crop = np.asarray(portrait.crop, np.float32)
    picture = portrait.image if portrait.picture is None else portrait.picture
    subject = _Subject(picture, portrait.coefficients, portrait.camera, crop, portrait.landmarks)
    if portrait.picture is None:
        return subject.shifted(crop[:2]).scaled(picture.shape[0] / float((crop[2:] - crop[:2]).mean()))
    factor = LARGEST / max(picture.shape[:2])
    if factor >= 1:
        return subject
    return subject.scaled(factor)._replace(picture=reduce_picture(picture, LARGEST))


def _moving_part(subject: _Subject) -> tuple[slice, slice]:
    """Rows and columns of the picture that move: around the head, or all of it if that is not much more."""
    limit, crop = np.array(subject.picture.shape[1::-1]), subject.crop
    centre, half = (crop[:2] + crop[2:]) / 2, _REGION * (crop[2:] - crop[:2]).max() / 2
    low = np.clip(32 * np.floor((centre - half) / 32), 0, limit).astype(int)
    high = np.clip(32 * np.ceil((centre + half) / 32), 0, limit).astype(int)
    if (high - low).prod() > _WORTH_A_REGION * limit.prod():
        return slice(0, limit[1]), slice(0, limit[0])
    return slice(low[1], high[1]), slice(low[0], high[0])
