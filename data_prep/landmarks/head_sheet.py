"""A sheet of pictures of a head: a turntable, the joints, identity and expression axes, the landmarks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageDraw

from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.crop import crop_box
from loki_jax.face.skinning import (
    landmark_positions,
    make_identity,
    mesh_faces,
    mesh_render_mask,
    template_vertices,
    world_vertices,
)
from loki_jax.face.types import Camera, Coefficients
from loki_jax.io import atomic_path
from loki_jax.synthetic.shading import plain_shade, shade_mesh

_DISTANCE = 1.2  # metres
_LIGHT = (0.35, 0.4, 0.85)  # direction of the lamp, world frame
_IDENTITY_AXES = 10
_COLUMNS = 10
_SKIN = np.array([0.86, 0.72, 0.62], np.float32)
_HIDDEN = np.array([0.55, 0.57, 0.62], np.float32)  # what the driver map does not show
_INNER = np.array([0.62, 0.25, 0.25], np.float32)
_CAPTION = 14  # pixels


class Picture(NamedTuple):
    """One cell of the sheet: a caption and the coefficients (without leading axes) it shows."""

    caption: str
    coefficients: Coefficients


def still_coefficients(head: HeadAsset) -> Coefficients:
    """The mean head at rest, a portrait's distance in front of the camera."""
    zero = np.zeros(3, np.float32)
    return Coefficients(
        betas=np.zeros(head.n_shape, np.float32),
        expression=np.zeros(head.n_expression, np.float32),
        rot=zero,
        tra=np.array([0, 0, -_DISTANCE], np.float32),
        neck=zero,
        jaw=zero,
        eyes=zero,
    )


def sheet_pictures(head: HeadAsset) -> list[Picture]:
    """What the sheet shows of `head`, in reading order."""
    still = still_coefficients(head)
    turn = lambda axis, degrees: np.deg2rad(degrees).astype(np.float32) * np.eye(3, dtype=np.float32)[axis]
    pictures = [
        Picture(f"turned {yaw:+d}", still._replace(rot=turn(1, yaw))) for yaw in (-80, -40, 0, 40, 80)
    ]
    pictures += [Picture(f"pitch {p:+d}", still._replace(rot=turn(0, p))) for p in (-25, 25)]
    joints = [
        ("neck", "neck", 1, 25),
        ("neck", "neck", 0, 20),
        ("jaw", "jaw", 0, 18),
        ("left_eye", "eyes", 1, 25),
    ]
    for joint, field, axis, degrees in joints:
        if head.joint(joint) is not None:
            pictures.append(
                Picture(f"{field} {'xyz'[axis]} {degrees}", still._replace(**{field: turn(axis, degrees)}))
            )
    for axis in range(min(_IDENTITY_AXES, head.n_shape)):
        for sign in (-2, 2):
            shape = np.zeros(head.n_shape, np.float32)
            shape[axis] = sign * head.shape_sigma[axis]
            pictures.append(Picture(f"{head.shape_names[axis]} {sign:+d}s", still._replace(betas=shape)))
    for axis in range(head.n_expression):
        expression = np.zeros(head.n_expression, np.float32)
        bound = float(head.expression_bounds[axis, 1])
        expression[axis] = bound if np.isfinite(bound) and bound > 0 else 2 * head.expression_sigma[axis]
        pictures.append(Picture(head.expression_names[axis], still._replace(expression=expression)))
    return pictures


@functools.partial(jax.jit, static_argnames="size")
def shaded_heads(
    head: HeadAsset, coefficients: Coefficients, camera: Camera, crop: Float[Array, " 4"], size: int
) -> Float[Array, "n size size 3"]:
    """Pictures in [0, 1], on white, of the heads with the given coefficients (n, ...)."""
    faces = jnp.asarray(mesh_faces(head))
    vertices = world_vertices(head, make_identity(head, coefficients.betas), coefficients)
    n_own = head.template.shape[0]
    colour = jnp.where(mesh_render_mask(head)[:, None], _SKIN, _HIDDEN)
    inner = jnp.concatenate([head.inner_mouth, jnp.ones(colour.shape[0] - n_own, bool)])
    colour = jnp.where(inner[:, None], _INNER, colour)
    colour = plain_shade(vertices, faces, _LIGHT)[..., None] * colour
    return shade_mesh(vertices, faces, colour, camera, crop, size, background=1.0)


def head_sheet(head: HeadAsset, cell: int = 160, batch: int = 10) -> UInt8[np.ndarray, "height width 3"]:
    """The sheet of pictures of a head; `cell` is the side of a picture in pixels."""
    pictures = sheet_pictures(head)
    camera = Camera(jnp.array([1000.0, 1000.0, 500.0, 500.0]), jnp.eye(4))
    rest = template_vertices(head) + jnp.array([0, 0, -_DISTANCE])
    shown = rest[np.asarray(mesh_render_mask(head))]
    box = crop_box(project(camera_from_world(shown, camera), camera), scale=1.25)

    parts = []
    for start in range(0, len(pictures), batch):
        part = [p.coefficients for p in pictures[start : start + batch]]
        part += [part[-1]] * (batch - len(part))  # one compiled size for all
        stacked = jax.tree.map(lambda *fields: jnp.stack(fields), *part)
        parts.append(np.asarray(shaded_heads(head, stacked, camera, box, cell)))
    images = np.concatenate(parts)[: len(pictures)]
    cells = [(p.caption, image) for p, image in zip(pictures, images, strict=True)]

    frontal = next(image for caption, image in cells if caption == "turned +0")
    for name, marks in sorted(head.landmarks.items()):
        points = landmark_positions(head, rest, name)[np.asarray(marks.face) >= 0]
        pixels = np.asarray(
            (project(camera_from_world(points, camera), camera) - box[:2]) / (box[2:] - box[:2])
        )
        cells.append((f"{name} ({len(points)})", _dotted(frontal, pixels * cell)))

    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + _CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (caption, image) in enumerate(cells):
        corner = (index % columns * cell, index // columns * (cell + _CAPTION))
        sheet.paste(
            Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)),
            (corner[0], corner[1] + _CAPTION),
        )
        draw.text((corner[0] + 2, corner[1] + 1), caption[: cell // 6], fill="black")
    return np.asarray(sheet)


def save_sheet(path: Path, head: HeadAsset) -> None:
    """Write the sheet as a PNG, atomically."""
    with atomic_path(path) as partial:
        Image.fromarray(head_sheet(head)).save(partial, format="PNG")


def _dotted(
    image: Float[np.ndarray, "size size 3"], pixels: Float[np.ndarray, "n 2"]
) -> Float[np.ndarray, "size size 3"]:
    marked = image.copy()
    for x, y in np.floor(pixels).astype(int):
        if 0 <= x < image.shape[1] and 0 <= y < image.shape[0]:
            marked[y, x] = (0.0, 0.2, 0.9)
    return marked
