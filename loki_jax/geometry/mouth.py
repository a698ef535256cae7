"""The inner mouth: what parted lips show (method, section 18).

Teeth are rows on an arch in the head's own axes. The upper row is fixed to the skull, the lower one to the
jaw, the tongue lies behind the lower one, all else is dark. A pixel between the lips is a ray that meets
the arch. Its place there says what to paint and, where the mouth of the portrait is open, which of the
portrait's own pixels shows the same place.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from loki_jax.arrays import ArrayLike
from loki_jax.face.types import Camera
from loki_jax.geometry.outline import (
    INNER_LIPS,
    distance_inside,
    paint_patch,
    patch_corner,
    patch_positions,
    smoothstep,
)
from loki_jax.geometry.warp import Texture, make_texture, sample

# Distances on the arch are in millimetres of a mouth 50 mm wide.
_MOUTH_WIDTH = 0.050
_SETBACK = 7.0  # of the front teeth behind the lips
_ARCH = 22.0  # radius of the arch where it is roundest
_UPPER_EDGE, _UPPER_GUM = -3.0, 8.0  # of the front teeth, above the line of the closed lips
_LOWER_EDGE, _LOWER_GUM = -1.5, -9.5
_UPPER_GAPS = (0.0, 8.5, 15.0, 22.5, 29.5)  # between teeth, from the middle
_LOWER_GAPS = (0.0, 5.3, 11.2, 18.0, 25.0)
MARGIN = 0.035  # of the width of the mouth, around open lips: their edges are blurred with the teeth
_TOP, _BOTTOM, _CHIN, _RIGHT, _LEFT = 13, 14, 152, 78, 308


class Mouth(NamedTuple):
    """The mouth of a portrait.

    Attributes:
      inner: the picture around the mouth; the fourth channel is 1 where the open mouth is seen.
      corner: x, y of the texture's first pixel in the picture.
      outline: of the inner lips in the portrait, pixels.
      line: x, y, z of the middle of the closed lips in the head's axes, metres.
      unit: metres that stand for a millimetre of the arch.
      pose: the skull's map from the head's axes to the camera's in the portrait.
      jaw: the chin in the head's axes in the portrait, metres.
      jaw_rest: the chin of the neutral head.
      upper_edge: of the upper front teeth, above `line`, millimetres of the arch.
      open: share to which the portrait's mouth is open wide.
      gap: between the lips, in widths of the mouth.
      margin: around the inner lips, in widths of the mouth, that counts as open mouth while that gap is open.
      colours: of teeth, gums and dark, in [0, 255].
    """

    inner: Texture
    corner: Float[ArrayLike, " 2"]
    outline: Float[ArrayLike, "20 2"]
    line: Float[ArrayLike, " 3"]
    unit: Float[ArrayLike, ""]
    pose: Float[ArrayLike, "3 4"]
    jaw: Float[ArrayLike, " 3"]
    jaw_rest: Float[ArrayLike, " 3"]
    upper_edge: Float[ArrayLike, ""]
    open: Float[ArrayLike, ""]
    gap: Float[ArrayLike, ""]
    margin: Float[ArrayLike, ""]
    colours: Float[ArrayLike, "3 3"]


def make_mouth(
    picture: UInt8[np.ndarray, "h w 3"],
    camera: Camera,
    skull: Float[np.ndarray, "3 4"],
    neutral: Float[np.ndarray, "478 3"],
    marks: Float[np.ndarray, "478 2"],
    chin: Float[np.ndarray, " 3"],
    white: Float[np.ndarray, " 3"],
    size: tuple[int, int],
) -> Mouth:
    """The mouth of a portrait.

    Args:
      skull: `skull_pose` of the portrait.
      neutral, marks: landmarks of the neutral head, metres, and in the portrait, pixels.
      chin: landmark 152 in the portrait in camera axes.
      white: of the eyes, [0, 255]: the light that falls into the mouth.
      size: height and width of the texture.
    """
    outline = marks[np.array(INNER_LIPS)]
    width = np.linalg.norm(marks[_LEFT] - marks[_RIGHT])
    row, column = (int(x) for x in patch_corner(jnp.asarray(outline.mean(0)), size, picture.shape[1::-1]))
    crop = picture[row : row + size[0], column : column + size[1]]
    position = np.asarray(patch_positions((jnp.int32(row), jnp.int32(column)), size))
    inside = np.asarray(distance_inside(position, outline))
    gap = 2 * inside.max() / width
    is_open = np.clip((gap - 0.03) / 0.03, 0, 1)
    # With the blurred edge of the lips.
    seen = is_open * np.clip((inside + (MARGIN + 0.01) * width) / (0.01 * width + 0.5), 0, 1)

    jaw = np.linalg.solve(skull[:, :3], chin - skull[:, 3])
    unit = np.linalg.norm(neutral[_LEFT] - neutral[_RIGHT]) / _MOUTH_WIDTH / 1000
    line = (neutral[_TOP] + neutral[_BOTTOM]) / 2

    middle = (marks[[0, 17, 37, 267, 84, 314]] + marks[[13, 14, 82, 312, 87, 317]]) / 2
    lips = np.clip(middle, 0, np.array(picture.shape[1::-1]) - 1).astype(int)
    lip = picture[lips[:, 1], lips[:, 0]].astype(np.float64).mean(0)
    white = white * max(1.0, 0.9 * lip.max() / white.max())
    teeth = 0.95 * white + 0.06 * (lip - white)
    upper_edge = _UPPER_EDGE
    camera = jax.tree.map(np.asarray, camera)
    if is_open > 0:
        middle = marks[_TOP] + np.linspace(0.1, 0.9, 9)[:, None] * (marks[_BOTTOM] - marks[_TOP])
        columns_, rows_ = np.clip(middle.astype(int) - [column, row], 0, np.array(size[::-1]) - 1).T
        shown = crop[rows_, columns_].astype(np.float64)
        bright = shown.mean(-1) > 0.55 * teeth.mean()
        if bright[:6].mean() > 0.6:
            teeth = np.median(shown[bright], axis=0) / 0.92
        if bright[-3:].all():
            # The upper teeth reach down to the lower lip.
            below = _meet_arch(marks[_BOTTOM][None], line, unit, skull, camera)[0, 1]
            upper_edge = min(upper_edge, (float(below) - line[1]) / unit - 0.7)
    gums = 0.62 * lip + 0.1 * white
    dark = 0.13 * lip
    return Mouth(
        make_texture(crop, seen),
        np.array([column, row], np.float32),
        outline,
        line.astype(np.float32),
        np.asarray(unit, np.float32),
        skull.astype(np.float32),
        jaw.astype(np.float32),
        neutral[_CHIN].astype(np.float32),
        np.asarray(upper_edge, np.float32),
        np.asarray(np.clip((gap - 0.12) / 0.15, 0, 1), np.float32),
        np.asarray(np.linalg.norm(outline[15] - outline[5]) / width, np.float32),
        np.asarray(MARGIN * is_open, np.float32),
        np.stack([teeth, gums, dark]).astype(np.float32),
    )


def paint_mouth(
    image: Float[Array, "h w 4"],
    mouth: Mouth,
    outline: Float[Array, "20 2"],
    pose: Float[Array, "3 4"],
    chin: Float[Array, " 3"],
    camera: Camera,
    size: tuple[int, int],
) -> Float[Array, "h w 4"]:
    """The frame with what is between its lips.

    Args:
      outline: of the inner lips in the target, pixels.
      pose: `skull_pose` of the target.
      chin: landmark 152 of the target in camera axes.
      size: height and width of the patch that is painted.
    """
    height, width, _ = image.shape
    corner = patch_corner(jnp.mean(outline, 0), size, (width, height))
    position = patch_positions(corner, size)
    inside = distance_inside(position, outline)
    place = _meet_arch(position, mouth.line, mouth.unit, pose, camera)
    jaw = jnp.linalg.solve(pose[:, :3], chin - pose[:, 3])

    # The lips' own edges are blurred with what is behind them; closed lips have nothing behind them.
    gap = jnp.linalg.norm(outline[15] - outline[5])
    span = jnp.sqrt(jnp.sum((outline[10] - outline[0]) ** 2) + 1e-6)
    pixel = mouth.unit * 1000 * _MOUTH_WIDTH / span  # metres
    margin = mouth.margin * span * jnp.clip(gap / (mouth.gap * span + 1e-6), 0.0, 1.0)
    colour = _paint_arch(place, inside * pixel / mouth.unit, mouth, jaw, pixel / mouth.unit)

    # The portrait's own teeth: those of the upper jaw, towards the lower lip those of the lower one.
    upper = _project_with(mouth.pose, place, camera)
    lower = _project_with(mouth.pose, place - (jaw - mouth.jaw), camera)
    edges = _meet_arch(outline[jnp.array([15, 5])], mouth.line, mouth.unit, pose, camera)[..., 1]
    down = (edges[0] - place[..., 1]) / jnp.maximum(edges[0] - edges[1], 1e-4)
    share = mouth.open * smoothstep(0.35, 0.85, down)[..., None]
    own = sample(mouth.inner, upper + share * (lower - upper) - mouth.corner)
    seen = own[..., 3:] / 255
    painted = colour + seen * (own[..., :3] - colour)

    # As long as nothing moves the picture is right as it is.
    there = _project_with(mouth.pose, _meet_arch(outline, mouth.line, mouth.unit, pose, camera), camera)
    moved = jnp.max(jnp.linalg.norm(there - mouth.outline, axis=-1))
    changed = smoothstep(0.01, 0.05, moved / span)
    still = sample(mouth.inner, upper - mouth.corner)[..., :3]
    result = still + changed * (painted - still)
    result = jnp.concatenate([result, jnp.zeros_like(result[..., :1])], -1)
    # Lips that meet show no line of teeth; at rest all is as it is.
    parted = jnp.clip((gap + 1e-6) / (span * jnp.minimum(0.015, mouth.gap) + 1e-6), 0.0, 1.0)
    return paint_patch(image, result, parted * jnp.clip(0.5 + inside + margin, 0.0, 1.0), corner)


def _meet_arch(position, line, unit, pose, camera: Camera):
    """Where the rays of pixels meet the arch of the teeth, in the head's axes, metres."""
    ray = (position - camera.intrinsics[2:]) / camera.intrinsics[:2]
    ray = jnp.concatenate([ray, jnp.ones_like(ray[..., :1])], -1)
    inverse = jnp.linalg.inv(pose[:, :3])
    start = -inverse @ pose[:, 3]
    direction = jnp.einsum("ij,...j->...i", inverse, ray)
    depth = jnp.full(position.shape[:-1], line[2] - _SETBACK * unit)
    for _ in range(3):
        point = start + ((depth - start[2]) / direction[..., 2])[..., None] * direction
        across = (point[..., 0] - line[0]) / unit
        depth = line[2] - _SETBACK * unit - unit * jnp.minimum(across**2 / (2 * _ARCH), 25.0)
    return point


def _project_with(pose, place, camera: Camera):
    point = jnp.einsum("ij,...j->...i", pose[:, :3], place) + pose[:, 3]
    return point[..., :2] / point[..., 2:] * camera.intrinsics[:2] + camera.intrinsics[2:]


def _paint_arch(place, inside, mouth: Mouth, jaw, pixel):
    """Colours of places on the arch. In its millimetres: `inside` from the lips, `pixel` the size of one."""
    x = jnp.abs(place[..., 0] - mouth.line[0]) / mouth.unit
    y = (place[..., 1] - mouth.line[1]) / mouth.unit
    drop = (jaw[1] - mouth.jaw_rest[1]) / mouth.unit
    below = y - drop
    teeth, gums, dark = mouth.colours
    blur = jnp.maximum(0.5, 0.6 * pixel)

    def above(level, value):
        return jnp.clip(0.5 + (value - level) / (2 * blur), 0.0, 1.0)

    def row(gaps):
        between = sum(jnp.exp(-(((x - gap) / (0.35 + 0.3 * blur)) ** 2)) for gap in gaps)
        return 1 - 0.15 * between / (1 + 0.4 * blur)

    side = 1 - 0.7 * jnp.clip(x / 28, 0, 1) ** 2
    # Edges of teeth are round, canines are a little longer.
    upper_edge = mouth.upper_edge + 0.05 * jnp.maximum(x - 6, 0)
    lower_edge = _LOWER_EDGE - 0.03 * x
    is_upper = above(upper_edge, y) * (x < 30)
    is_lower = (1 - above(lower_edge, below)) * (x < 27)
    up = row(_UPPER_GAPS) * (0.93 + 0.07 * smoothstep(-2.0, 3.0, y))
    low = row(_LOWER_GAPS) * 0.82
    upper = gums + above(-_UPPER_GUM, -y)[..., None] * (up[..., None] * teeth - gums)
    lower = gums + above(_LOWER_GUM, below)[..., None] * (low[..., None] * teeth - gums)
    # The tongue, behind the lower teeth.
    tongue_top = 2.0 - 0.012 * x**2
    tongue = smoothstep(-5.0, 5.0, tongue_top - below)
    back = dark + (0.62 * tongue)[..., None] * (gums - dark)
    colour = back + is_lower[..., None] * (lower - back)
    colour = colour + is_upper[..., None] * (upper - colour)
    lit = side * (0.84 + 0.16 * smoothstep(0.0, 2.5, inside))
    return dark + lit[..., None] * (colour - dark)
