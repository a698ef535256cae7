"""The geometry renderer as an `Animator`: `--checkpoint geometry`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from loki_jax.driver.map import driver_map
from loki_jax.driver.preview import preview_map
from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import builtin_head
from loki_jax.face.skinning import make_identity
from loki_jax.face.types import Camera, Coefficients
from loki_jax.geometry.renderer import make_scene, render_frames
from loki_jax.pipeline import Window, retarget_clip
from loki_jax.sources import DrivingClip, Portrait

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

    Frames have the size of the portrait's whole picture, of at most 2,048 pixels a side. Of a portrait without
    its picture, as from a dataset, they have that of its crop.

    Attributes:
      head: the head that portraits and clips must be fitted with.
      size: edge in pixels of the crops of portraits and clips, which are for display.
    """

    def __init__(self, head: HeadAsset | None = None, size: int = 512):
        self.head = builtin_head() if head is None else head
        self.size = size
        self._head = jax.tree.map(jnp.asarray, self.head)

    def windows(self, portrait: Portrait, clip: DrivingClip, *, mode: str = "relative") -> Iterator[Window]:
        """The animation of `portrait` by `clip`, 16 frames at a time: memory does not grow with its length.

        Args:
          mode: "relative": the head turns from the portrait's pose by the driver's increments; "absolute": it
            takes the driver's pose.

        Yields:
          Windows: frames (T, H, W, 3) and maps (T, 128, 128, 3); the last may be shorter.

        Raises:
          ValueError: unknown mode.
        """
        target = retarget_clip(self.head, clip, portrait, mode)
        render = self.prepare(portrait)
        camera, crop = jax.tree.map(jnp.asarray, (portrait.camera, np.asarray(portrait.crop, np.float32)))
        length = target.rot.shape[0]

        def generate() -> Iterator[Window]:
            for start in range(0, length, _WINDOW):
                # The last window is filled with its last frame.
                index = np.minimum(np.arange(start, start + _WINDOW), length - 1)
                chosen = jax.tree.map(lambda x: jnp.asarray(x)[index], target)
                maps, frames = _preview(self._head, chosen, camera, crop), render(chosen)
                yield Window(frames[: length - start], np.asarray(maps)[: length - start])

        return generate()

    def __call__(self, portrait: Portrait, clip: DrivingClip, **options: Any) -> UInt8[np.ndarray, "n h w 3"]:
        """All frames of `windows`, with its options and errors: one for each frame of the clip, RGB."""
        return np.concatenate([window.frames for window in self.windows(portrait, clip, **options)])

    def prepare(self, portrait: Portrait) -> Callable[[Coefficients], UInt8[np.ndarray, "n h w 3"]]:
        """The portrait made ready: a function from coefficients (n, ...) of its head to frames.

        Each n is compiled once for each size of picture.
        """
        whole = _whole_picture(portrait)
        picture, (rows, columns) = whole.picture, _moving_part(whole)
        part = _cut(whole, rows, columns)
        scene, layout = make_scene(
            self._head, part.picture, part.coefficients, part.camera, part.crop, part.landmarks
        )

        def render(target: Coefficients) -> UInt8[np.ndarray, "n h w 3"]:
            moving = np.asarray(render_frames(self._head, scene, target, layout))
            frames = np.broadcast_to(picture, (len(moving), *picture.shape)).copy()
            frames[:, rows, columns] = moving
            return frames

        return render


@jax.jit
def _preview(
    head: HeadAsset, coefficients: Coefficients, camera: Camera, crop: Float[Array, " 4"]
) -> UInt8[Array, "n s s 3"]:
    identity = make_identity(head, coefficients.betas[:1])
    return preview_map(driver_map(head, identity, coefficients, camera, crop, _MAP_SIZE))


def _whole_picture(portrait: Portrait) -> Portrait:
    """The portrait with a picture of at most `LARGEST` pixels a side: its own, or else its crop."""
    crop = np.asarray(portrait.crop, np.float64)
    if portrait.picture is None:
        factor = portrait.image.shape[0] / (crop[2:] - crop[:2]).mean()
        portrait = _shifted(portrait, crop[:2])._replace(picture=portrait.image)
        return _scaled(portrait, factor)
    factor = LARGEST / max(portrait.picture.shape[:2])
    if factor >= 1:
        return portrait
    height, width = (round(side * factor) for side in portrait.picture.shape[:2])
    reduced = np.asarray(Image.fromarray(portrait.picture).resize((width, height), Image.Resampling.BOX))
    return _scaled(portrait, factor)._replace(picture=reduced)


def _shifted(portrait: Portrait, corner: Float[np.ndarray, " 2"]) -> Portrait:
    """The portrait in pixels that are counted from another corner."""
    move = lambda x, y: np.asarray(np.asarray(x) - y, np.float32)
    intrinsics = np.asarray(portrait.camera.intrinsics)
    return portrait._replace(
        camera=portrait.camera._replace(intrinsics=move(intrinsics, np.array([0, 0, *corner]))),
        crop=move(portrait.crop, np.tile(corner, 2)),
        landmarks=None if portrait.landmarks is None else move(portrait.landmarks, corner),
    )


def _scaled(portrait: Portrait, factor: float) -> Portrait:
    """The portrait in pixels of another size."""
    scale = lambda x: np.asarray(np.asarray(x) * factor, np.float32)
    return portrait._replace(
        camera=portrait.camera._replace(intrinsics=scale(portrait.camera.intrinsics)),
        crop=scale(portrait.crop),
        landmarks=None if portrait.landmarks is None else scale(portrait.landmarks),
    )


def _moving_part(portrait: Portrait) -> tuple[slice, slice]:
    """Rows and columns of the picture that move: around the head, or all of it if that is not much more."""
    limit = np.array(portrait.picture.shape[1::-1])
    crop = np.asarray(portrait.crop)
    centre, half = (crop[:2] + crop[2:]) / 2, _REGION * (crop[2:] - crop[:2]).max() / 2
    low = np.clip(32 * np.floor((centre - half) / 32), 0, limit).astype(int)
    high = np.clip(32 * np.ceil((centre + half) / 32), 0, limit).astype(int)
    if (high - low).prod() > _WORTH_A_REGION * limit.prod():
        return slice(0, limit[1]), slice(0, limit[0])
    return slice(low[1], high[1]), slice(low[0], high[0])


def _cut(portrait: Portrait, rows: slice, columns: slice) -> Portrait:
    """The portrait with a part of its picture as the picture."""
    part = _shifted(portrait, np.array([columns.start, rows.start], np.float64))
    return part._replace(picture=portrait.picture[rows, columns])
