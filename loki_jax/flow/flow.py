"""Flow from a portrait to a target, from the posed meshes of one head (method, section 17).

Per target pixel: where its surface point is in the portrait, and whether the portrait shows it. The
correspondence is exact up to the mesh: points of a face keep their barycentrics from one pose to the other.
Nothing is learned, and no pixel is read.

Positions are of two kinds. *Picture pixels* have their origin at the top-left corner of the uncropped
picture, x right, y down (`loki_jax.face.types`). *Normalised* positions have x right and y down too, and -1
and 1 at the edges of a crop box: they are the rasteriser's x and y with the opposite sign.

All functions are traceable and differentiable, but for the face that a pixel shows (`loki_jax.raster`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from loki_jax.arrays import ArrayLike
from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, ndc_from_camera
from loki_jax.face.normals import vertex_normals
from loki_jax.face.skinning import Identity, mesh_faces, mesh_render_mask, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.raster import Fragments, clear_hidden_faces, interpolate, rasterize

# Cosines of the angle between the normal and the way to the camera: up to the first the portrait does not
# show a point, from the second on it does. 0.25 is 75 degrees, where a pixel covers four times its own area.
FACING = (0.05, 0.25)

# Metres. A point this far behind the surface that the portrait shows is hidden by half; it is not hidden up
# to half of this, and fully hidden from one and a half times this on. A smaller value would hide parts of
# curved surfaces, whose depth is interpolated between the portrait's pixels.
DEPTH_TOLERANCE = 0.003


class MeshView(NamedTuple):
    """A posed mesh as a camera sees it, with all that a portrait has to be asked about it.

    Attributes:
      vertices: in the rasteriser's coordinates of a crop box (`loki_jax.raster`).
      depth: of the vertices along the optical axis, metres.
      facing: cosine of the angle between the vertices' normals and the way to the camera.
      crop: the box x0, y0, x1, y1 in pixels of the picture.
      shown: what the box shows at pixel centres: inverse depth (1/m) of the nearest surface and its flags of
        `head_parts`; zero on the background.
    """

    vertices: Float[Array, "*b V 3"]
    depth: Float[Array, "*b V"]
    facing: Float[Array, "*b V"]
    crop: Float[Array, "*b 4"]
    shown: Float[Array, "*b s s 3"]

    def broadcast_to(self, batch: tuple[int, ...]) -> MeshView:
        """The view with leading axes `batch`."""
        own = (2, 1, 1, 1, 3)  # axes of the fields of one view
        wide = (jnp.broadcast_to(x, (*batch, *x.shape[x.ndim - n :])) for x, n in zip(self, own, strict=True))
        return MeshView(*wide)


class Flow(NamedTuple):
    """Per pixel of a target's crop: the place of its surface point in the portrait.

    Attributes:
      position: in pixels of the portrait's picture. Where the target shows no head: the pixel's own place,
        its normalised position in the portrait's crop instead of the target's.
      visibility: share in [0, 1] to which the portrait shows the point: it faces the portrait's camera
        (`FACING`), nothing is in front of it (`DEPTH_TOLERANCE`), and it is inside the portrait's crop.
        Points of eyeballs and inner mouth are visible only where the portrait shows the same part, since lids
        and lips are thinner than the tolerance. Zero where the target shows no head.
      coverage: 1 where the target shows the head (its render mask), else 0.
      inner_mouth, eyeball: share in [0, 1] to which the point belongs to the part, from the vertices' flags.
      facing: `view_cosines` in the portrait and in the target; negative where the surface is turned away. The
        first over the second is how much of the target's detail the portrait has there.
      fragments: the rasterised target, faces outside the render mask cleared; affine barycentrics.
    """

    position: Float[Array, "*b S S 2"]
    visibility: Float[Array, "*b S S"]
    coverage: Float[Array, "*b S S"]
    inner_mouth: Float[Array, "*b S S"]
    eyeball: Float[Array, "*b S S"]
    facing: Float[Array, "*b S S 2"]
    fragments: Fragments


def head_parts(head: HeadAsset) -> Float[Array, "V_all 2"]:
    """Flags of the mesh's vertices, 0 or 1: belongs to an eyeball, to the inner mouth.

    Eyeballs are what follows the eye joints; a head without them has none.
    """
    eyes = [joint for name in ("left_eye", "right_eye") if (joint := head.joint(name)) is not None]
    eyeball = jnp.asarray(head.skinning_weights)[:, np.array(eyes, int)].sum(-1) > 0.5
    inner_mouth = jnp.asarray(head.inner_mouth)
    sphere = mesh_render_mask(head).shape[0] - inner_mouth.shape[0]  # FLAME's, of the inner mouth
    parts = jnp.stack([eyeball & ~inner_mouth, inner_mouth], axis=-1)
    return jnp.concatenate([parts, jnp.tile(jnp.array([[False, True]]), (sphere, 1))]).astype(jnp.float32)


def pixel_positions(size: int) -> Float[np.ndarray, "size size 2"]:
    """Normalised positions of the pixel centres of a size x size image."""
    axis = (2 * np.arange(size) + 1 - size) / size
    return np.stack(np.meshgrid(axis, axis), axis=-1).astype(np.float32)


def normalise_positions(
    position: Float[Array, "*b S S 2"], crop: Float[ArrayLike, "*#b 4"]
) -> Float[Array, "*b S S 2"]:
    """Positions in picture pixels as normalised ones: -1 and 1 at the edges of the crop box."""
    corner, side = crop[..., None, None, :2], (crop[..., 2:] - crop[..., :2])[..., None, None, :]
    return 2 * (position - corner) / side - 1


def sample_image(
    image: Float[ArrayLike, "*#b h w C"], position: Float[Array, "*b H W 2"]
) -> Float[Array, "*b H W C"]:
    """Images at normalised positions of their own box: bilinear, zero outside.

    Between the outermost pixel centres and half a pixel beyond the edge it fades to zero.
    """
    batch, (height, width, channels) = position.shape[:-3], image.shape[-3:]
    place = (position + 1) * (jnp.array([width, height]) / 2) - 0.5
    low = jnp.floor(jax.lax.stop_gradient(place))
    share = place - low
    column, row = (low[..., k].astype(jnp.int32) for k in range(2))
    look = lambda image, i, j: image[i, j]
    for _ in batch:
        look = jax.vmap(look)
    image = jnp.broadcast_to(image, (*batch, height, width, channels))
    total = jnp.zeros((*row.shape, channels))
    for right in range(2):
        for down in range(2):
            weight = jnp.abs(1 - right - share[..., 0]) * jnp.abs(1 - down - share[..., 1])
            i, j = row + down, column + right
            inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
            pixel = look(image, jnp.clip(i, 0, height - 1), jnp.clip(j, 0, width - 1))
            total = total + jnp.where(inside, weight, 0.0)[..., None] * pixel
    return total


def view_cosines(points: Float[ArrayLike, "*b V 3"], faces: Int[ArrayLike, "F 3"]) -> Float[Array, "*b V"]:
    """Cosine between the normal of each vertex, given in camera axes, and the way to the camera."""
    distance = jnp.sqrt(jnp.sum(points * points, axis=-1))
    return -jnp.sum(vertex_normals(points, faces) * points, axis=-1) / distance


def view_mesh(
    points: Float[Array, "*b V 3"],
    faces: Int[ArrayLike, "F 3"],
    parts: Float[Array, "V 2"],
    camera: Camera,
    crop: Float[ArrayLike, "*#b 4"],
    size: int,
) -> MeshView:
    """What a camera sees of a mesh.

    Args:
      points: vertices in camera axes (x right, y down, z away), metres.
      faces: counter-clockwise seen from outside.
      parts: flags of the vertices, as of `head_parts`.
      camera, crop: of the picture and its box; leading axes broadcast to those of `points`.
      size: s, side in pixels of the image of `MeshView.shown`.
    """
    vertices = ndc_from_camera(points, camera, crop)
    depth = points[..., 2]
    # Inverse depth is affine on the screen, so interpolation loses nothing.
    attributes = jnp.concatenate([1 / depth[..., None], jnp.broadcast_to(parts, (*depth.shape, 2))], -1)
    shown = interpolate(rasterize(vertices, faces, size), faces, attributes)
    crop = jnp.broadcast_to(crop, (*depth.shape[:-1], 4))
    return MeshView(vertices, depth, view_cosines(points, faces), crop, shown)


def view_head(
    head: HeadAsset,
    identity: Identity,
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[ArrayLike, "*#b 4"],
    size: int,
) -> MeshView:
    """`view_mesh` of a head; arguments as of `head_flow`."""
    points = camera_from_world(world_vertices(head, identity, coefficients), camera)
    return view_mesh(points, mesh_faces(head), head_parts(head), camera, crop, size)


def flow_between(
    portrait: MeshView,
    vertices: Float[ArrayLike, "*b V 3"],
    depth: Float[ArrayLike, "*b V"],
    facing: Float[ArrayLike, "*b V"],
    fragments: Fragments,
    faces: Int[ArrayLike, "F 3"],
    parts: Float[Array, "V 2"],
) -> Flow:
    """Flow of rasterised target meshes; `head_flow` explains the rest.

    Args:
      portrait: the same mesh in the portrait; leading axes broadcast to those of the target.
      vertices, depth, facing: of the target, as in `MeshView`.
      fragments: of the target, with affine barycentrics; what is cleared from them is background.
      faces, parts: as in `view_mesh`.
    """
    batch, size = vertices.shape[:-2], fragments.face.shape[-1]
    portrait = portrait.broadcast_to(batch)
    # With affine barycentrics a_k at the target's pixel u, depths z_k and z'_k of the corners in target and
    # portrait, and r_k = z'_k / z_k, the point is at sum(a_k r_k x'_k) / sum(a_k r_k) in the portrait. As
    # u = sum(a_k x_k), the numerator is u + sum(a_k (r_k x'_k - x_k)), which is exactly u for equal poses.
    ratio = portrait.depth / depth
    moved = ratio[..., None] * portrait.vertices[..., :2] - vertices[..., :2]
    attributes = [
        ratio[..., None], moved, 1 / depth[..., None], portrait.facing[..., None], facing[..., None],
        jnp.broadcast_to(parts, (*batch, *parts.shape)),
    ]  # fmt: skip
    values = interpolate(fragments, faces, jnp.concatenate(attributes, -1))
    ratio, moved, inverse, towards, flags = jnp.split(values, (1, 3, 4, 6), axis=-1)
    covered = jnp.asarray(fragments.covered)
    pixels = pixel_positions(size)
    ratio = jnp.where(covered[..., None], ratio, 1.0)
    position = (jnp.asarray(pixels) - moved) / ratio  # the rasteriser's axes point the other way
    depth_there = ratio[..., 0] / jnp.where(covered, inverse[..., 0], 1.0)

    inside = jnp.ones_like(portrait.shown[..., :1])
    seen = sample_image(jnp.concatenate([portrait.shown, inside], -1), position)
    # Metres behind the surface that the portrait shows, to first order; a background is infinitely far.
    behind = depth_there * (depth_there * seen[..., 0] - 1)
    in_front = 1 - _smoothstep(0.5 * DEPTH_TOLERANCE, 1.5 * DEPTH_TOLERANCE, behind)
    same_part = jnp.prod(1 - flags * (1 - seen[..., 1:3]), axis=-1)
    visibility = _smoothstep(*FACING, towards[..., 0]) * in_front * same_part * seen[..., 3]
    visibility = jnp.clip(jnp.where(covered, visibility, 0.0), 0.0, 1.0)
    crop = portrait.crop[..., None, None, :]
    picture = crop[..., :2] + (position + 1) / 2 * (crop[..., 2:] - crop[..., :2])
    return Flow(
        picture, visibility, covered.astype(jnp.float32), flags[..., 1], flags[..., 0], towards, fragments
    )


def head_flow(
    head: HeadAsset,
    identity: Identity,
    portrait: Coefficients,
    target: Coefficients,
    portrait_camera: Camera,
    portrait_crop: Float[ArrayLike, "*#b 4"],
    target_camera: Camera,
    target_crop: Float[ArrayLike, "*#b 4"],
    size: int,
    portrait_size: int | None = None,
) -> Flow:
    """From every pixel of the target's crop to the portrait, for all frames in the leading axes of `target`.

    Args:
      head: the head asset.
      identity: whose head it is, of `make_identity`; serves portrait and target.
      portrait, target: coefficients, metres and radians. Leading axes of the portrait broadcast against those
        of the target: one portrait serves all frames.
      portrait_camera, portrait_crop: of the portrait's picture, and a box in its pixels. Occlusion is judged
        inside of the box, and what is outside of it is not visible.
      target_camera, target_crop: of the target's picture, and the box that fills the result.
      size: S, side of the result in pixels.
      portrait_size: side in pixels of the image by which occlusion is judged; default `size`.
    """
    view = view_head(head, identity, portrait, portrait_camera, portrait_crop, portrait_size or size)
    points = camera_from_world(world_vertices(head, identity, target), target_camera)
    vertices, faces = ndc_from_camera(points, target_camera, target_crop), mesh_faces(head)
    fragments = clear_hidden_faces(rasterize(vertices, faces, size), faces, mesh_render_mask(head))
    return flow_between(
        view, vertices, points[..., 2], view_cosines(points, faces), fragments, faces, head_parts(head)
    )


def _smoothstep(low: float, high: float, x: Array) -> Array:
    """Cubic step from 0 at `low` to 1 at `high`."""
    t = jnp.clip((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3 - 2 * t)
