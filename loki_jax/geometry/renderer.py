"""Portraits animated by the flow of the fitted head, without a trained network (method, section 18)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.normals import vertex_normals
from loki_jax.face.skinning import Identity, landmark_positions, make_identity, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.points import LANDMARK_SET
from loki_jax.geometry.align import Alignment, align, aligned_identity, no_alignment
from loki_jax.geometry.eyes import IRIS_CENTRES, LASHES, Eye, lash_share, make_eye, paint_eye
from loki_jax.geometry.light import fit_light
from loki_jax.geometry.motion import (
    Motion,
    Rig,
    head_motion,
    limit_motion,
    make_rig,
    skull_pose,
    source_positions,
)
from loki_jax.geometry.mouth import Mouth, make_mouth, paint_mouth
from loki_jax.geometry.outline import (
    EYE_OUTLINES,
    INNER_LIPS,
    distance_inside,
    fill_smoothly,
    patch_size,
    region_box,
)
from loki_jax.geometry.warp import Texture, make_texture, region_positions, sample, shrinkage, to_uint8

_CHIN = 152


class Scene(NamedTuple):
    """A portrait made ready for animation."""

    identity: Identity
    alignment: Alignment
    rig: Rig
    coefficients: Coefficients
    camera: Camera
    skin: Texture
    eyes: tuple[Eye, Eye]
    mouth: Mouth


class Layout(NamedTuple):
    """Sizes that a compiled frame depends on, pixels.

    Attributes:
      extent: width and height of the picture.
      grid: side of the grid of the motion.
      eye, mouth: height and width of their patches.
    """

    extent: tuple[int, int]
    grid: int
    eye: tuple[int, int]
    mouth: tuple[int, int]


def make_scene(
    head: HeadAsset,
    picture: UInt8[np.ndarray, "h w 3"],
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[np.ndarray, " 4"],
    seen: Float[np.ndarray, "478 _"] | None,
    relight: bool = False,
    grid: int | None = None,
) -> tuple[Scene, Layout]:
    """A portrait made ready, and the sizes of its frames.

    Args:
      picture: RGB.
      coefficients: of the portrait, without leading axes.
      camera, crop: of the picture; the head's box in its pixels.
      seen: landmarks in the picture, pixels; None: those of the head.
      relight: the skin brightens and darkens as it turns in the portrait's light.
      grid: side of the grid of the motion, a multiple of 64; None: by the size of the head.
    """
    as_arrays = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    coefficients, camera = as_arrays(coefficients), as_arrays(camera)
    identity = make_identity(head, coefficients.betas)
    if seen is None:
        alignment = no_alignment(identity.vertices.shape[0])
    else:
        alignment = align(head, identity, coefficients, camera, seen)
    aligned = aligned_identity(head, identity, alignment, coefficients)
    world = world_vertices(head, aligned, coefficients)
    places = camera_from_world(landmark_positions(head, world, LANDMARK_SET), camera)
    marks = np.asarray(project(places, camera))
    seen = marks if seen is None else seen[:, :2]
    neutral = np.asarray(landmark_positions(head, jnp.asarray(aligned.vertices), LANDMARK_SET))

    limit = picture.shape[:2]
    widths = [np.linalg.norm(marks[o[8]] - marks[o[0]]) for o in EYE_OUTLINES]
    eye_patch = patch_size(1.7 * float(max(widths)), limit)
    mouth_patch = patch_size(2.0 * float(np.linalg.norm(marks[78] - marks[308])), limit)
    eyes = [make_eye(picture, marks, seen, side, eye_patch) for side in (0, 1)]
    white = np.mean([_white(picture, marks, eye) for eye in eyes], axis=0)
    rig = make_rig(head, aligned, coefficients, camera, crop)
    points = camera_from_world(world, camera)
    if relight:
        normals = np.asarray(vertex_normals(points, rig.faces))
        skin = (np.asarray(rig.view.facing) > 0.3) & (np.asarray(rig.face) > 0.5)
        pixels = np.asarray(project(points, camera))
        rig = rig._replace(light=fit_light(picture, pixels, normals, skin, float(rig.radius)))
    skull = np.asarray(skull_pose(rig, points))
    mouth = make_mouth(picture, camera, skull, neutral, marks, np.asarray(places[_CHIN]), white, mouth_patch)
    texture = make_texture(_without_openings(picture, marks, float(mouth.margin)))
    scene = Scene(identity, alignment, rig, coefficients, camera, texture, (eyes[0], eyes[1]), mouth)
    radius = float(rig.radius)
    grid = grid or (256 if radius < 90 else 384 if radius < 250 else 512)
    layout = Layout((limit[1], limit[0]), grid, eye_patch, mouth_patch)
    return jax.tree.map(jnp.asarray, scene), layout


def _white(picture, marks, eye: Eye) -> Float[np.ndarray, " 3"]:
    """White of an eye, or where it shows none the light skin of the face."""
    x, y, radius = *np.asarray(eye.iris, float), float(eye.radius)
    height, width, _ = picture.shape
    rows, columns = np.mgrid[:height, :width]
    reach = slice(max(0, int(y - 4 * radius)), int(y + 4 * radius) + 1)
    across = slice(max(0, int(x - 4 * radius)), int(x + 4 * radius) + 1)
    position = np.stack([columns[reach, across] + 0.5, rows[reach, across] + 0.5], -1).astype(np.float32)
    inside = np.asarray(distance_inside(position, np.asarray(eye.outline)))
    away = np.linalg.norm(position - np.array([x, y]), axis=-1) > 1.2 * radius
    values = picture[reach, across][(inside > 1) & away].astype(np.float64)
    cheeks = np.clip(marks[[50, 280, 9]].astype(int), 0, [width - 1, height - 1])
    skin = picture[cheeks[:, 1], cheeks[:, 0]].astype(np.float64)
    skin = skin[np.argmax(skin.mean(-1))]
    plain = np.minimum(255, 1.05 * (0.6 * skin + 0.4 * skin.mean()))
    if len(values) < 10:
        return plain
    bright = values[values.mean(-1) >= np.percentile(values.mean(-1), 70)].mean(0)
    return bright * max(1.0, 0.9 * plain.mean() / bright.mean())


def _without_openings(picture, marks, lip_margin: float) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with skin in place of eyes and inner mouth."""
    result = picture.copy()
    for outline in (*EYE_OUTLINES, INNER_LIPS):
        points = marks[np.array(outline)]
        rows, columns = region_box(points, 0.6, picture.shape[:2])
        y, x = np.mgrid[rows, columns]
        position = np.stack([x, y], -1).astype(np.float32) + 0.5
        inside = np.asarray(distance_inside(position, points))
        part = result[rows, columns].astype(np.float64)
        width = np.ptp(points[:, 0])
        if outline is INNER_LIPS:
            inside = inside + lip_margin * width
        if inside.max() < 1.5:
            continue
        # What is just outside is lashes and shadow; the skin is beyond.
        beyond = inside < -0.05 * width
        if outline is not INNER_LIPS:
            beyond = inside < -LASHES * width
        filled = fill_smoothly(part, beyond)
        share = np.clip(inside - 1.0, 0, 1)[..., None]
        if outline is not INNER_LIPS:
            share = np.maximum(share, lash_share(position, points)[..., None])
        result[rows, columns] = np.rint(part + share * (filled - part)).astype(np.uint8)
    return result


def render_frames(
    head: HeadAsset, scene: Scene, target: Coefficients, layout: Layout
) -> UInt8[Array, "n h w 3"]:
    """Frames of a scene for coefficients (n, ...), one after another."""
    # Two programs: the first one is the same for pictures of all sizes.
    poses = _pose_frames(
        head, scene.identity, scene.alignment, scene.rig, scene.coefficients, scene.camera, target,
        layout.grid, jnp.array(layout.extent, jnp.float32),
    )  # fmt: skip
    return _draw_frames(scene, poses, layout)


class Pose(NamedTuple):
    """The head of one frame.

    Attributes:
      motion: where pixels come from.
      marks: landmarks, picture pixels.
      skull: affine map (3, 4) from the head's axes to the camera's, of what moves with the skull.
      chin: landmark 152 in camera axes, metres.
    """

    motion: Motion
    marks: Float[Array, "*b 478 2"]
    skull: Float[Array, "*b 3 4"]
    chin: Float[Array, "*b 3"]


@functools.partial(jax.jit, static_argnames=("grid",))
def _pose_frames(
    head: HeadAsset, identity: Identity, alignment: Alignment, rig: Rig, portrait: Coefficients,
    camera: Camera, target: Coefficients, grid: int, extent: Float[Array, " 2"],
) -> Pose:  # fmt: skip
    def pose(target: Coefficients) -> Pose:
        limited = limit_motion(rig, portrait, target, camera, extent)
        aligned = aligned_identity(head, identity, alignment, limited)
        world = world_vertices(head, aligned, limited)
        points = camera_from_world(world, camera)
        places = camera_from_world(landmark_positions(head, world, LANDMARK_SET), camera)
        motion = head_motion(head, points, rig, portrait, limited, camera, grid)
        return Pose(motion, project(places, camera), skull_pose(rig, points), places[_CHIN])

    return jax.lax.map(pose, target)


@functools.partial(jax.jit, static_argnames=("layout",))
def _draw_frames(scene: Scene, poses: Pose, layout: Layout) -> UInt8[Array, "n h w 3"]:
    width, height = layout.extent

    def draw(pose: Pose) -> UInt8[Array, "h w 3"]:
        source = source_positions(pose.motion, scene.rig, region_positions(height, width), layout.extent)
        image = sample(scene.skin, source.place, shrinkage(source.place))
        other = sample(scene.skin, source.mirrored)
        image = image + source.hidden[..., None] * (other - image)
        if scene.rig.light is not None:
            image = image * source.light
        lips = pose.marks[jnp.array(INNER_LIPS)]
        image = paint_mouth(image, scene.mouth, lips, pose.skull, pose.chin, scene.camera, layout.mouth)
        for eye, outline, iris in zip(scene.eyes, EYE_OUTLINES, IRIS_CENTRES, strict=True):
            lids = pose.marks[jnp.array(outline)]
            image = paint_eye(image, eye, lids, pose.marks[iris], pose.motion.turn, layout.eye)
        return to_uint8(image[..., :3])

    return jax.lax.map(draw, poses)
