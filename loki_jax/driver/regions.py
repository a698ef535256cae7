"""The driver arm `regions`: pixels of the driver's eyes with brows, nose and mouth, and nothing else.

Stable Video-Driven Portraits drives with such pixels (docs/svp.md). The regions are found by the landmarks of
the fitted head. A similarity, one for the whole clip, brings the driver's face to the place and size of the
face that it drives, so that neither jaw line nor width of the driver's face shows.

Positions are normalised ones of `loki_jax.flow`: x right, y down, -1 and 1 at the edges of a crop box.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PRNGKeyArray, UInt8

from loki_jax.arrays import ArrayLike
from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.ict import MEDIAPIPE_OF_IBUG
from loki_jax.face.skinning import landmark_positions, make_identity, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.flow import pixel_positions, sample_image

REGIONS = ("right eye", "left eye", "nose", "mouth")
SHAPES = ("polygon", "square")

# Points of the iBUG 68 of each region; a repeated point changes no outline.
_IBUG = (
    (*range(17, 22), *range(36, 42), 36),
    (*range(22, 27), *range(42, 48), 42),
    (*range(27, 36), 27, 27, 27),
    tuple(range(48, 60)),
)
_POINTS = MEDIAPIPE_OF_IBUG[np.array(_IBUG)]

_DIRECTIONS = 32  # in which the outline of a polygon is known
# Shares of the driver's face (root mean square distance of its points from their mean).
_MARGIN, _SOFTNESS = 0.12, 0.1
_SQUARE = 0.25  # half the side of a square: a quarter of the side of the crop (X-Portrait's local control)

# Largest perturbations of training at strength 1.
_SHIFT, _SCALE, _GAIN, _OFFSET, _DROP = 0.04, 0.06, 0.25, 0.15, 0.1


class DriverFrames(NamedTuple):
    """Frames of who drives, for arms that read their pixels; leading axes as in the coefficients.

    Attributes:
      image: what `crop` shows: RGB, or float in [-1, 1]; None where only the place is asked for.
      coefficients, camera: of the driver in these frames.
      crop: box x0, y0, x1, y1 in pixels of the driver's frame.
      view: the box of the driver's frame that takes the place of the driven crop (`aligned_view`).
      weights: of the `REGIONS`, from 0, where one is left out, to 1.
    """

    image: UInt8[ArrayLike, "*b s s 3"] | Float[Array, "*b s s 3"] | None
    coefficients: Coefficients
    camera: Camera
    crop: Float[ArrayLike, "*b 4"]
    view: Float[ArrayLike, "*b 4"]
    weights: Float[ArrayLike, "*b 4"] | None = None


def region_points(
    head: HeadAsset, coefficients: Coefficients, camera: Camera
) -> Float[Array, "*b regions points 2"]:
    """The outlines of the regions in pixels of the frame; the last leading axis is time.

    Raises:
      ValueError: the head has no landmarks "mediapipe478".
    """
    vertices = world_vertices(head, make_identity(head, coefficients.betas[..., :1, :]), coefficients)
    marks = landmark_positions(head, vertices, "mediapipe478")
    pixels = project(camera_from_world(marks, camera), camera)
    return pixels[..., _POINTS, :]


def aligned_view(
    driven: Float[Array, "*b regions points 2"],
    driver: Float[Array, "*b regions points 2"],
    crop: Float[ArrayLike, "*b 4"],
) -> Float[Array, "*b 4"]:
    """The box of the driver's frame in which the driver's face has the place and size of the driven one.

    Args:
      driven, driver: points of both faces in one frame, pixels of their own frames.
      crop: of the driven face, pixels of its own frame.
    """
    (to, to_size), (by, by_size) = (_place(points) for points in (driven, driver))
    corners = jnp.asarray(crop).reshape(*crop.shape[:-1], 2, 2)
    view = by[..., None, :] + (corners - to[..., None, :]) * (by_size / to_size)[..., None, None]
    return view.reshape(crop.shape)


def _place(points: Float[Array, "*b regions points 2"]) -> tuple[Float[Array, "*b 2"], Float[Array, "*b"]]:
    """Mean of a face's points, and their root mean square distance from it."""
    centre = points.mean((-3, -2))
    apart = points - centre[..., None, None, :]
    return centre, jnp.sqrt(jnp.square(apart).sum(-1).mean((-2, -1)))


def region_masks(
    points: Float[Array, "*b regions points 2"], size: int, shape: str = "polygon"
) -> Float[Array, "*b regions S S"]:
    """Soft masks of the regions, 1 inside and 0 outside.

    A polygon is the convex hull of a region's points with a margin; a square has their mean as its centre and
    a quarter of the crop's side as its own.

    Args:
      points: normalised positions.

    Raises:
      ValueError: unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape of regions {shape!r}; one of {', '.join(SHAPES)}")
    pixels, face = pixel_positions(size), _place(points)[1][..., None]
    over = lambda x: x[..., None, None]
    if shape == "square":
        centre = points.mean(-2)
        apart = jnp.abs(pixels - centre[..., None, None, :])
        depth = _SQUARE - apart.max(-1)
    else:
        depth = jnp.asarray(jnp.inf)
        for angle in 2 * np.pi * np.arange(_DIRECTIONS) / _DIRECTIONS:
            direction = np.array([np.cos(angle), np.sin(angle)], np.float32)
            reach = (points @ direction).max(-1) + _MARGIN * face
            depth = jnp.minimum(depth, over(reach) - pixels @ direction)
    return jnp.clip(depth / over(_SOFTNESS * face) + 0.5, 0, 1)


def regions_map(
    head: HeadAsset, driver: DriverFrames, size: int, dtype: DTypeLike = jnp.float32, shape: str = "polygon"
) -> Float[Array, "*b S S 4"]:
    """The driver's pixels in [-1, 1] times the mask of the regions, and the mask.

    Raises:
      ValueError: unknown shape, or a head without landmarks.
    """
    image = jnp.asarray(driver.image)
    if image.dtype == jnp.uint8:
        image = image.astype(jnp.float32) / 127.5 - 1
    normalised = lambda x, box: 2 * (x - box[..., :2]) / (box[..., 2:] - box[..., :2]) - 1
    view, crop = (jnp.asarray(box)[..., None, None, :] for box in (driver.view, driver.crop))
    points = normalised(region_points(head, driver.coefficients, driver.camera), view)
    masks = region_masks(points, size, shape)
    if driver.weights is not None:
        masks = masks * driver.weights[..., None, None]
    mask = masks.max(-3)[..., None]
    corner, side = view[..., :2], view[..., 2:] - view[..., :2]
    seen = sample_image(image, normalised(corner + (pixel_positions(size) + 1) / 2 * side, crop))
    return jnp.concatenate([mask * seen, mask], axis=-1).astype(dtype)


def perturb_driver(
    keys: Key[Array, " b"], driver: DriverFrames, strength: Float[ArrayLike, ""] | float
) -> DriverFrames:
    """Frames (B,T,...) as training shows them, each window changed in its own way, alike in all its frames.

    Colours, sharpness, place and size of the pixels change, and regions are left out, so that the network
    takes motion from them and nothing else. At strength 1 colours have gains of +-25 % and offsets of +-0.15,
    and sharpness falls to a quarter of the resolution; the view moves by 4 % of its side and is scaled by
    6 %; each region is lost in 10 % of the windows.
    """

    def window(key: PRNGKeyArray, image, view):
        place, gain, offset, blur, drop = jax.random.split(key, 5)
        image = image.astype(jnp.float32) / 127.5 - 1 if image.dtype == jnp.uint8 else image
        frames, side, _, channels = image.shape
        small = jax.image.resize(image, (frames, max(side // 4, 1), max(side // 4, 1), channels), "linear")
        soft = jax.image.resize(small, image.shape, "linear")
        image = image + strength * jax.random.uniform(blur) * (soft - image)
        gains = 1 + strength * _GAIN * jax.random.uniform(gain, (3,), minval=-1)
        offsets = strength * _OFFSET * jax.random.uniform(offset, (3,), minval=-1)
        image = jnp.clip(image * gains + offsets, -1, 1)
        moves = strength * jax.random.uniform(place, (3,), minval=-1)
        sides = view[:, 2:] - view[:, :2]
        centre = (view[:, 2:] + view[:, :2]) / 2 + _SHIFT * moves[:2] * sides
        half = sides / 2 * (1 + _SCALE * moves[2])
        weights = jax.random.uniform(drop, (len(REGIONS),)) >= strength * _DROP
        weights = jnp.broadcast_to(weights.astype(jnp.float32), (frames, len(REGIONS)))
        return image, jnp.concatenate([centre - half, centre + half], -1), weights

    image, view, weights = jax.vmap(window)(keys, jnp.asarray(driver.image), jnp.asarray(driver.view))
    return driver._replace(image=image, view=view, weights=weights)


def preview_regions(driver: Float[ArrayLike, "*b S S 4"]) -> UInt8[Array, "*b S S 3"]:
    """A map of `regions_map` as RGB, white where it shows nothing."""
    driver = jnp.asarray(driver, jnp.float32)
    mask = driver[..., 3:]
    return jnp.round(127.5 * (jnp.clip(driver[..., :3], -1, 1) + 2 - mask)).astype(jnp.uint8)
