"""Where each pixel of a frame comes from in the portrait: the flow of the head and its extension."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.spatial
from jaxtyping import Array, Float, Int

from loki_jax.arrays import ArrayLike
from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, ndc_from_camera, project
from loki_jax.face.normals import vertex_normals
from loki_jax.face.retarget import head_rotation
from loki_jax.face.rotation import matrix_from_rotvec, rotvec_from_matrix
from loki_jax.face.skinning import (
    Identity,
    landmark_positions,
    mesh_faces,
    mesh_render_mask,
    template_vertices,
    world_vertices,
)
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.points import FACE_OVAL, IRISES, LANDMARK_SET
from loki_jax.flow import MeshView, flow_between, head_parts, view_cosines, view_mesh
from loki_jax.geometry.extend import keep_border, push_pull, soft_share
from loki_jax.geometry.light import Light, change_of_light
from loki_jax.geometry.outline import EYE_OUTLINES, INNER_LIPS, OUTER_LIPS
from loki_jax.geometry.warp import sample_grid
from loki_jax.raster import clear_hidden_faces, interpolate, rasterize

_FACE_REACH = (
    0.012,
    0.035,
)  # metres from the landmarks where the face's own motion begins and ceases to count
_CHIN, _LIP = 152, 13
_FOLDS = np.array([*INNER_LIPS, *OUTER_LIPS, *EYE_OUTLINES[0], *EYE_OUTLINES[1]])
_FOLD_REACH = (0.005, 0.012)  # metres
TURN_LIMIT = np.radians(45.0)


class Rig(NamedTuple):
    """What the motion of a portrait's head is computed from; made once a portrait.

    Attributes:
      view: the head in the portrait.
      faces: of the skin: eyeballs and inner mouth are drawn otherwise.
      mirror: vertex on the other side of the head.
      face: share in [0, 1] to which a vertex belongs to the face.
      lips: share in [0, 1] to which a vertex belongs to lips or lids, whose folds open and close.
      steady: vertices that move with the skull alone.
      inverse: (n, 4) takes their positions in camera axes to the skull's affine map from the head's axes.
      centre: of the head, in the head's axes, metres.
      radius: half the width of the head in the portrait, pixels.
      chin: distance of the chin from the centre, in radii.
      light: that changes as the head turns; None: pixels keep their brightness.
    """

    view: MeshView
    faces: Int[ArrayLike, "F 3"]
    mirror: Int[ArrayLike, " V"]
    face: Float[ArrayLike, " V"]
    lips: Float[ArrayLike, " V"]
    steady: Int[ArrayLike, " n"]
    inverse: Float[ArrayLike, "n 4"]
    centre: Float[ArrayLike, " 3"]
    radius: Float[ArrayLike, ""]
    chin: Float[ArrayLike, ""]
    light: Light | None = None


class Motion(NamedTuple):
    """Motion of one frame, on a grid of s x s points over a box of the picture.

    Attributes:
      box: x0, y0, x1, y1.
      residual: displacement beyond that of the surroundings, pixels; with a light, the change of the
        logarithm of brightness as a third channel.
      hidden: share to which the other side of the head serves better.
      mirrored: position of the same point on the other side of the head, picture pixels.
      turn, origin, rest: the similarity of the surroundings: a target point x is at turn (x - origin) + rest
        in the portrait.
      reach: where the surroundings come to rest, in radii.
    """

    box: Float[Array, " 4"]
    residual: Float[Array, "s s _"]
    hidden: Float[Array, "s s"]
    mirrored: Float[Array, "s s 2"]
    turn: Float[Array, "2 2"]
    origin: Float[Array, " 2"]
    rest: Float[Array, " 2"]
    reach: Float[Array, ""]


def make_rig(
    head: HeadAsset,
    identity: Identity,
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[ArrayLike, " 4"],
) -> Rig:
    """The rig of a portrait: `identity` is the aligned one, coefficients have no leading axes."""
    template = np.asarray(template_vertices(head), np.float64)
    points = camera_from_world(world_vertices(head, identity, coefficients), camera)
    faces = _skin_faces(head)
    view = view_mesh(points, faces, head_parts(head), camera, jnp.asarray(crop, jnp.float32), 512)
    _, mirror = scipy.spatial.cKDTree(template).query(template * np.array([-1.0, 1.0, 1.0]))
    marks = np.asarray(landmark_positions(head, jnp.asarray(template, jnp.float32), LANDMARK_SET))
    present = np.asarray(head.landmarks[LANDMARK_SET].face) >= 0
    distance, _ = scipy.spatial.cKDTree(marks[present]).query(template)
    low, high = _FACE_REACH
    face = 1 - np.clip((distance - low) / (high - low), 0, 1)

    folds, _ = scipy.spatial.cKDTree(marks[_FOLDS]).query(template)
    low, high = _FOLD_REACH
    lips = (1 - np.clip((folds - low) / (high - low), 0, 1)).astype(np.float32)

    neutral = np.asarray(landmark_positions(head, jnp.asarray(identity.vertices), LANDMARK_SET))
    oval = neutral[np.array(FACE_OVAL)]
    eyes = neutral[np.array(IRISES)].mean(0)
    # Between the ears: behind the eyes at half their height over the chin.
    centre = np.array([oval[:, 0].mean(), eyes[1], oval[:, 2].mean() - 0.02], np.float32)
    rotation = np.asarray(head_rotation(coefficients))
    world = neutral @ rotation.T + np.asarray(coefficients.tra)
    pixels = np.asarray(project(camera_from_world(jnp.asarray(world), camera), camera))
    width = np.ptp(neutral[np.array(FACE_OVAL), 0])
    middle = np.asarray(
        camera_from_world(jnp.asarray((rotation @ centre + np.asarray(coefficients.tra))[None]), camera)
    )
    radius = 0.6 * width * np.asarray(camera.intrinsics)[0] / middle[0, 2]
    place = np.asarray(project(jnp.asarray(middle), camera))[0]
    chin = np.linalg.norm(pixels[_CHIN] - place) / radius
    steady = _steady_vertices(head, neutral)
    columns = np.concatenate(
        [np.asarray(identity.vertices, np.float64)[steady], np.ones((len(steady), 1))], 1
    )
    inverse = np.linalg.pinv(columns).T.astype(np.float32)
    return Rig(
        view, faces, mirror.astype(np.int32), face.astype(np.float32), lips, steady, inverse, centre,
        np.asarray(radius, np.float32), np.asarray(chin, np.float32),
    )  # fmt: skip


def skull_pose(rig: Rig, points: Float[Array, "V 3"]) -> Float[Array, "3 4"]:
    """The affine map from the head's axes to the camera's of what moves with the skull, from vertices (m)."""
    return points[rig.steady].T @ rig.inverse


def _steady_vertices(head: HeadAsset, neutral: Float[np.ndarray, "478 3"]) -> Int[np.ndarray, " n"]:
    """Vertices above the mouth that no expression and no joint below the skull moves."""
    moved = np.abs(np.asarray(head.expression_basis)).max(axis=(0, 2))
    neck = head.joint("neck")
    rigid = np.asarray(head.skinning_weights)[:, neck if neck is not None else 0] > 0.99
    above = np.asarray(head.template)[:, 1] > neutral[_LIP, 1]
    score = np.where(rigid & above, moved, np.inf)
    return np.argsort(score, kind="stable")[:64].astype(np.int32)


def head_motion(
    head: HeadAsset,
    points: Float[Array, "V 3"],
    rig: Rig,
    portrait: Coefficients,
    target: Coefficients,
    camera: Camera,
    size: int,
) -> Motion:
    """Motion of one frame.

    Args:
      points: vertices of the target in camera axes.
      portrait, target: coefficients without leading axes.
      camera: of the portrait and the result.
      size: s, of the grid; a multiple of 64.
    """
    faces = rig.faces
    origin, depth = _centre(rig, target, camera)
    rest, depth_there = _centre(rig, portrait, camera)
    scale = depth / depth_there
    half = 2.0 * rig.radius / scale
    box = jnp.concatenate([origin - half, origin + half])
    vertices, cosines = ndc_from_camera(points, camera, box), view_cosines(points, faces)
    fragments = clear_hidden_faces(rasterize(vertices, faces, size), faces, mesh_render_mask(head))
    flow = flow_between(rig.view, vertices, points[..., 2], cosines, fragments, faces, head_parts(head))

    there = rig.view.crop[:2] + (1 - rig.view.vertices[..., :2]) / 2 * (rig.view.crop[2:] - rig.view.crop[:2])
    seen = jnp.clip(4 * rig.view.facing, 0.0, 1.0)
    attributes = jnp.concatenate(
        [there[rig.mirror], seen[rig.mirror, None], rig.face[:, None], rig.lips[:, None]], axis=-1
    )
    if rig.light is not None:
        change = change_of_light(rig.light, vertex_normals(points, faces))
        attributes = jnp.concatenate([attributes, change[:, None]], axis=-1)
    mirrored = interpolate(fragments, faces, attributes)
    skin = flow.coverage * mirrored[..., 3]

    turn = scale * _turn(portrait, target, camera)
    motion = Motion(
        box, jnp.zeros((size, size, 2)), jnp.zeros((size, size)), mirrored[..., :2],
        turn, origin, rest, _reach(rig, origin - rest, turn),
    )  # fmt: skip
    axis = (jnp.arange(size) + 0.5) / size * 2 * half
    grid = jnp.stack(jnp.broadcast_arrays(box[0] + axis[None], box[1] + axis[:, None]), -1)
    around = surroundings(motion, rig, grid)
    # The portrait's folds of lips and lids hide what they have to give when they move.
    weight = skin * jnp.maximum(flow.visibility, mirrored[..., 4])
    edge = 1 - jnp.max(jnp.abs(grid - origin), -1) / half
    weight = weight * jnp.clip(8 * edge, 0.0, 1.0)
    residual = flow.position - grid - around
    residual = push_pull(jnp.concatenate([residual, mirrored[..., 5:]], axis=-1), weight)
    residual = residual * jnp.clip(8 * edge, 0.0, 1.0)[..., None]
    # What the target shows better than the portrait did, and the other side of the portrait too.
    turned = jnp.clip(flow.facing[..., 1] / 0.3, 0.0, 1.0) - jnp.clip(flow.facing[..., 0] / 0.3, 0.0, 1.0)
    hidden = skin * jnp.clip(turned, 0.0, 1.0) * (1 - flow.visibility) * mirrored[..., 2]
    return motion._replace(residual=residual, hidden=hidden)


def _skin_faces(head: HeadAsset) -> Int[np.ndarray, "F 3"]:
    """Faces without vertices of eyeballs and inner mouth."""
    faces = np.asarray(mesh_faces(head))
    other = np.asarray(head_parts(head)).sum(-1) > 0
    return faces[~np.any(np.take(other, faces), axis=-1)]


def limit_motion(
    rig: Rig, portrait: Coefficients, target: Coefficients, camera: Camera, extent: Float[ArrayLike, " 2"]
) -> Coefficients:
    """The target within what one portrait can show: turned from it by less than 45 degrees (`TURN_LIMIT`),
    and moved by less than half of the way to the picture's border. Small motions are hardly changed.
    """
    there = head_rotation(portrait)
    turn = rotvec_from_matrix(head_rotation(target) @ there.T)
    angle = jnp.sqrt(jnp.sum(turn**2) + 1e-12)
    limited = matrix_from_rotvec(turn * soft_share(jnp.float32(TURN_LIMIT), angle)) @ there
    rot = rotvec_from_matrix(limited @ matrix_from_rotvec(target.neck).T)
    before = head_rotation(target) @ rig.centre + target.tra
    # The head turns about its centre where its turn is limited.
    target = target._replace(rot=rot, tra=before - limited @ rig.centre)

    origin, depth = _centre(rig, target, camera)
    rest, _ = _centre(rig, portrait, camera)
    shift, limit = origin - rest, jnp.asarray(extent, jnp.float32)
    # Near the border the picture is squeezed: the face keeps away from it.
    room = (jnp.where(shift > 0, limit - rest, rest) - 0.9 * rig.radius) / 2
    excess = shift * (soft_share(jnp.maximum(room, 0.0), jnp.abs(shift)) - 1)
    in_camera = jnp.append(excess * depth / camera.intrinsics[:2], 0.0)
    flip = jnp.array([1.0, -1.0, -1.0])
    return target._replace(tra=target.tra + flip * (camera.extrinsics[:3, :3].T @ in_camera))


def surroundings(motion: Motion, rig: Rig, position: Float[Array, "*b 2"]) -> Float[Array, "*b 2"]:
    """Displacement of the head's surroundings, pixels: that of its centre plane, none far from it."""
    from_head = jnp.einsum("ij,...j->...i", motion.turn, position - motion.origin)
    shift = from_head + motion.rest - position
    x, y = from_head[..., 0] / rig.radius, from_head[..., 1] / rig.radius
    distance = jnp.sqrt(x * x + y * y + 1e-6)
    # Shoulders are near below the chin, the background is far above and beside the head.
    below = jnp.clip(y / distance, 0.0, 1.0) ** 2
    start = 1.1 + below * (rig.chin - 1.1)
    stop = motion.reach * (1 - below) + below * (rig.chin + 0.55 * (motion.reach - 1.1))
    t = jnp.clip((distance - start) / (stop - start), 0.0, 1.0)
    return shift * (1 - t * t * (3 - 2 * t))[..., None]


class Source(NamedTuple):
    """Where pixels come from.

    Attributes:
      place: picture pixels.
      hidden: share to which the other side of the head serves better.
      mirrored: position there, picture pixels.
      light: factor of the brightness, (*b 1), or nothing where light does not change, (*b 0).
    """

    place: Float[Array, "*b 2"]
    hidden: Float[Array, "*b"]
    mirrored: Float[Array, "*b 2"]
    light: Float[Array, "*b _"]


def source_positions(
    motion: Motion, rig: Rig, position: Float[Array, "*b 2"], extent: tuple[int, int]
) -> Source:
    """Where the pixels at `position` come from."""
    grid = jnp.concatenate([motion.hidden[..., None], motion.mirrored, motion.residual], axis=-1)
    values = sample_grid(grid, motion.box, position)
    shift = surroundings(motion, rig, position) + values[..., 3:5]
    place = position + keep_border(position, shift, extent)
    return Source(place, values[..., 0], values[..., 1:3], jnp.exp(values[..., 5:]))


def _centre(
    rig: Rig, coefficients: Coefficients, camera: Camera
) -> tuple[Float[Array, " 2"], Float[Array, ""]]:
    """Pixel and depth of the head's centre."""
    world = head_rotation(coefficients) @ rig.centre + coefficients.tra
    point = camera_from_world(world[None], camera)
    return project(point, camera)[0], point[0, 2]


def _turn(portrait: Coefficients, target: Coefficients, camera: Camera) -> Float[Array, "2 2"]:
    """Rotation in the picture plane from the target to the portrait."""
    flip = jnp.array([1.0, -1.0, -1.0])
    axes = camera.extrinsics[:3, :3] * flip
    turned = axes @ head_rotation(portrait) @ head_rotation(target).T @ axes.T
    cosine, sine = turned[0, 0] + turned[1, 1], turned[1, 0] - turned[0, 1]
    norm = jnp.sqrt(cosine**2 + sine**2 + 1e-12)
    return jnp.array([[cosine, -sine], [sine, cosine]]) / norm


def _reach(rig: Rig, shift: Float[Array, " 2"], turn: Float[Array, "2 2"]) -> Float[Array, ""]:
    """Far enough for a displacement not to fold the picture."""
    around = jnp.sqrt(jnp.sum((turn - jnp.eye(2)) ** 2) + 1e-9)
    return 2.2 + 2.0 * (jnp.sqrt(jnp.sum(shift**2) + 1e-6) / rig.radius + 1.5 * around)
