"""Eyes: the eyeball behind moving lids (method, section 18).

Behind the lids is the eyeball of the portrait: where the portrait shows it, its own pixels; where lids hid
it, an iris completed from its rings and the white completed smoothly. Gaze moves the iris; the corners of
the eye stay, and so do reflections of lamps, which are where the cornea is and not where the iris looks.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from loki_jax.arrays import ArrayLike
from loki_jax.geometry.outline import (
    EYE_OUTLINES,
    distance_inside,
    fill_smoothly,
    nearest_on_line,
    paint_patch,
    patch_corner,
    patch_positions,
    smoothstep,
)
from loki_jax.geometry.warp import Texture, make_texture, sample

IRIS_CENTRES = (468, 473)
_CORNERS = (0, 8)  # of an outline
_UPPER = np.array([0, 15, 14, 13, 12, 11, 10, 9, 8])  # the upper lid, of an outline, from the outer corner
_SHINE = (25.0, 60.0)  # grey levels above the iris' own colour from which on a pixel is a reflection
LASHES = 0.1  # height of the lashes above the upper lid's edge, in widths of the eye


class Eye(NamedTuple):
    """One eye of a portrait.

    Attributes:
      ball: the eyeball without lids and reflections.
      still: the picture as it is; the fourth channel is what reflections add to the eyeball, grey levels.
      corner: x, y of both textures' first pixel in the picture.
      outline: of the opening, pixels.
      model_outline, model_iris: where the aligned head has outline and iris in the portrait, pixels.
      iris: centre of the iris.
      radius: of the iris.
    """

    ball: Texture
    still: Texture
    corner: Float[ArrayLike, " 2"]
    outline: Float[ArrayLike, "16 2"]
    model_outline: Float[ArrayLike, "16 2"]
    model_iris: Float[ArrayLike, " 2"]
    iris: Float[ArrayLike, " 2"]
    radius: Float[ArrayLike, ""]


def make_eye(
    picture: UInt8[np.ndarray, "h w 3"],
    marks: Float[np.ndarray, "478 2"],
    seen: Float[np.ndarray, "478 2"],
    side: int,
    size: tuple[int, int],
) -> Eye:
    """An eye of a portrait.

    Args:
      marks: landmarks of the aligned head in the portrait, pixels.
      seen: landmarks that the networks saw, or again those of the head.
      side: 0 the right eye, 1 the left one.
      size: height and width of the textures.
    """
    outline = marks[np.array(EYE_OUTLINES[side])]
    first = IRIS_CENTRES[side]
    rim = seen[first : first + 5]
    iris = rim[0]
    radius = np.linalg.norm(rim[1:] - iris, axis=1).mean()
    width = np.linalg.norm(outline[_CORNERS[1]] - outline[_CORNERS[0]])
    radius = float(np.clip(radius, 0.12 * width, 0.3 * width))
    middle = outline.mean(0)
    row, column = (int(x) for x in patch_corner(jnp.asarray(middle), size, picture.shape[1::-1]))
    crop = picture[row : row + size[0], column : column + size[1]]
    position = np.asarray(patch_positions((jnp.int32(row), jnp.int32(column)), size))
    ball, shine = _complete_ball(crop, position, outline, iris, radius)
    corner = np.array([column, row], np.float32)
    return Eye(
        make_texture(ball), make_texture(crop, shine), corner, outline, outline, marks[first],
        iris.astype(np.float32), np.asarray(radius, np.float32),
    )  # fmt: skip


def _complete_ball(
    crop, position, outline, iris, radius
) -> tuple[UInt8[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
    """The eyeball without lids and reflections over a crop of the picture, and the reflections in [0, 1]."""
    inside = np.asarray(distance_inside(position, outline))
    width = np.linalg.norm(outline[_CORNERS[1]] - outline[_CORNERS[0]])
    height = 2 * max(inside.max(), 0.5)
    shown = inside > max(0.8, 0.12 * height)
    offset = position - iris
    distance = np.linalg.norm(offset, axis=-1) / radius
    pixels = crop.astype(np.float64)

    white_seen = shown & (distance > 1.12)
    near_corner = (
        np.linalg.norm(position[..., None, :] - outline[list(_CORNERS)], axis=-1).min(-1) < 0.12 * width
    )
    white_known = white_seen & ~near_corner
    if white_known.sum() < 6:
        # Closed eyes show nothing of it: a plausible white in the light of the face.
        light = np.percentile(pixels.reshape(-1, 3), 85, axis=0)
        white = np.broadcast_to(0.75 * light + 0.25 * light.mean(), pixels.shape)
    else:
        values = pixels[white_known]
        bright = values.mean(-1) >= np.percentile(values.mean(-1), 40)
        known = white_known.copy()
        known[white_known] = bright
        white = fill_smoothly(pixels, known)
    iris_seen = shown & (distance < 1.0)
    if iris_seen.sum() < 12:
        profile = np.array([[25.0, 20, 20], [60, 45, 35], [50, 38, 30]]) * min(1.0, white.mean() / 160)
        knots = np.array([0.3, 0.6, 1.0])
    else:
        knots = np.linspace(0.1, 1.0, 8)
        profile = np.stack([_ring_colour(pixels, distance, iris_seen, knot) for knot in knots])
    rings = np.stack([np.interp(distance, knots, profile[:, k]) for k in range(3)], axis=-1)
    low, high = _SHINE
    excess = np.where(shown & (distance < 0.8), (pixels - rings).min(-1), 0.0)
    shine = excess * np.clip((excess - low) / (high - low), 0, 1)
    # The other half of the iris where it shows the missing part.
    mirrored = _mirror_rows(pixels - shine[..., None], shown, position, iris)
    ring = np.where(np.isnan(mirrored), rings, mirrored)
    share = np.clip((1.08 - distance) / 0.16, 0, 1)[..., None]
    full = white + share * (ring - white)
    own = np.clip((inside - 0.8) / max(0.12 * height, 0.8), 0, 1)[..., None]
    shine = own[..., 0] * shine
    ball = full + own * (pixels - full) - shine[..., None]
    return np.clip(np.rint(ball), 0, 255).astype(np.uint8), shine / 255


def _ring_colour(pixels, distance, seen, knot):
    weight = seen * np.exp(-(((distance - knot) / 0.12) ** 2)) + 1e-9 * seen
    # Brightest pixels are reflections, which are no part of the iris.
    bright = pixels.mean(-1)
    weight = weight * (bright <= np.percentile(bright[seen], 85))
    return (pixels * weight[..., None]).sum((0, 1)) / weight.sum()


def _mirror_rows(pixels, shown, position, iris):
    """Pixels from the same place below the iris' centre, for those above it; NaN where that is not shown."""
    height, width = shown.shape
    rows = np.rint(2 * iris[1] - position[:, 0, 1] - position[0, 0, 1]).astype(int)
    out = np.full(pixels.shape, np.nan)
    ok = (rows >= 0) & (rows < height)
    source, valid = pixels[rows[ok]], shown[rows[ok]]
    out[ok] = np.where(valid[..., None], source, np.nan)
    return out


def paint_eye(
    image: Float[Array, "h w 4"],
    eye: Eye,
    outline: Float[Array, "16 2"],
    iris: Float[Array, " 2"],
    turn: Float[Array, "2 2"],
    size: tuple[int, int],
) -> Float[Array, "h w 4"]:
    """The frame with the eyeball in the opening of the lids.

    Args:
      outline, iris: of the target, of the aligned head, pixels.
      turn: from directions in the target to those in the portrait, in the picture plane, with their scale.
      size: height and width of the patch that is painted.
    """
    height, width, _ = image.shape
    corner = patch_corner(jnp.mean(outline, 0), size, (width, height))
    position = patch_positions(corner, size)
    lids = distance_inside(position, outline)
    to_corners = _corner_map(outline, eye.model_outline, turn)
    still = to_corners(position)
    scale = jnp.sqrt(turn[0, 0] ** 2 + turn[1, 0] ** 2)
    shift = eye.iris - eye.model_iris
    centre = iris + jnp.linalg.inv(turn) @ shift
    offset = position - centre
    turned = eye.iris + jnp.einsum("ij,...j->...i", turn, offset)
    distance = jnp.sqrt(jnp.sum(offset**2, -1) + 1e-9) * scale / eye.radius
    follow = 1 - smoothstep(1.1, 2.2, distance)
    place = still + follow[..., None] * (turned - still) - eye.corner
    ball, own = sample(eye.ball, place), sample(eye.still, place)
    ball = ball + sample(eye.still, still - eye.corner)[..., 3:]
    # As long as nothing moves the picture is right as it is.
    span = jnp.linalg.norm(eye.outline[_CORNERS[1]] - eye.outline[_CORNERS[0]])
    lid_move = jnp.max(jnp.linalg.norm(to_corners(outline) - eye.model_outline, axis=-1))
    gaze_move = jnp.linalg.norm(to_corners(centre) - eye.iris)
    changed = smoothstep(0.01, 0.05, jnp.maximum(lid_move, gaze_move) / span)
    colour = own + changed * (ball - own)
    alpha = jnp.clip(0.5 + lids, 0.0, 1.0)
    image = paint_patch(image, colour, alpha, corner)

    # Lashes keep their size while the skin of the lid is stretched.
    edge, edge_there = nearest_on_line(position, outline[_UPPER], eye.model_outline[_UPPER])
    lashes = sample(eye.still, edge_there + jnp.einsum("ij,...j->...i", turn, position - edge) - eye.corner)
    height = above_lid(position, edge, outline) / (LASHES * span / scale)
    alpha = jnp.where(height >= 0, 1 - smoothstep(0.7, 1.0, height), 0.0) * (1 - alpha)
    return paint_patch(image, lashes, alpha, corner)


def above_lid(
    position: Float[ArrayLike, "*b 2"], edge: Float[ArrayLike, "*b 2"], outline: Float[ArrayLike, "16 2"]
) -> Float[Array, "*b"]:
    """Distance of positions from their nearest points on the upper lid's edge; negative below it."""
    outline = jnp.asarray(outline)
    along = outline[_CORNERS[1]] - outline[_CORNERS[0]]
    up = jnp.array([-along[1], along[0]])
    up = up * jnp.where(up[1] > 0, -1.0, 1.0)
    offset = jnp.asarray(position) - edge
    return jnp.sign(offset @ up) * jnp.sqrt(jnp.sum(offset**2, -1) + 1e-12)


def _corner_map(outline, portrait_outline, turn):
    """The map of the plane that takes the corners of the target's eye to the portrait's."""
    a, b = outline[_CORNERS[0]], outline[_CORNERS[1]]
    c, d = portrait_outline[_CORNERS[0]], portrait_outline[_CORNERS[1]]
    along, there = b - a, d - c
    length = jnp.sqrt(along @ along + 1e-9)
    across = jnp.array([-along[1], along[0]]) / length
    across_there = jnp.array([-there[1], there[0]]) / jnp.sqrt(there @ there + 1e-9)
    scale = jnp.sqrt(turn[0, 0] ** 2 + turn[1, 0] ** 2)
    matrix = jnp.outer(there / length, along / length) + scale * jnp.outer(across_there, across)
    return lambda x: c + jnp.einsum("ij,...j->...i", matrix, x - a)


def lash_share(
    position: Float[np.ndarray, "*b 2"], outline: Float[np.ndarray, "16 2"]
) -> Float[np.ndarray, "*b"]:
    """Share in [0, 1] to which positions of the portrait are lashes that `paint_eye` always paints over."""
    edge, _ = nearest_on_line(position, outline[_UPPER], outline[_UPPER])
    width = np.linalg.norm(outline[_CORNERS[1]] - outline[_CORNERS[0]])
    height = np.asarray(above_lid(position, edge, outline)) / (LASHES * width)
    return np.where(height >= 0, np.clip((0.7 - height) / 0.2, 0, 1), 0.0)
