"""HEF, head-expression follow: how well one clip's expression follows another's (method, section 10)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from loki_jax.arrays import ArrayLike
from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, ndc_from_world, project
from loki_jax.face.crop import crop_box
from loki_jax.face.skinning import (
    expression_offsets,
    make_identity,
    mesh_faces,
    mesh_render_mask,
    world_vertices,
)
from loki_jax.face.types import Camera, Coefficients
from loki_jax.raster.api import rasterize
from loki_jax.raster.fragments import interpolate

# Standard deviation of the expression offsets of the training data, metres (method, section 5).
OFFSET_SCALE = 0.0104


class HeadExpressionFollow(NamedTuple):
    """Result of `head_expression_follow`.

    Attributes:
      distance: mean over frames; None without a common frame.
      uncovered: mean share of the target's masked pixels that the swapped mesh does not cover, where
        the target's expression is compared with 0 (method, section 11, row 15).
      n_frames: number of frames compared.
      per_frame: distance of every compared frame.
    """

    distance: float | None
    uncovered: float | None
    n_frames: int
    per_frame: Float[np.ndarray, " n"]


class ExpressionMaps(NamedTuple):
    """Expression offsets in units of their standard deviation (`OFFSET_SCALE`), rendered for each frame.

    Attributes:
      target: of the target's mesh; 0 on the background.
      swapped: of the same with the prediction's expression, jaw and eyes.
      mask: the target's pixels that HEF counts.
    """

    target: Float[np.ndarray, "n s s 3"]
    swapped: Float[np.ndarray, "n s s 3"]
    mask: Bool[np.ndarray, "n s s"]


def masked_l1(
    prediction: Float[ArrayLike, "*b h w c"],
    target: Float[ArrayLike, "*b h w c"],
    mask: Bool[ArrayLike, "*b h w"],
) -> Float[Array, " *b"]:
    """Mean absolute difference over the channels, then over the pixels of `mask`; 0 if it is empty."""
    difference = jnp.abs(prediction - target).mean(-1)
    total = jnp.where(mask, difference, 0).sum((-2, -1))
    return total / jnp.maximum(mask.sum((-2, -1)), 1)


def offset_map(
    ndc: Float[ArrayLike, "*b V 3"],
    offsets: Float[ArrayLike, "*b V 3"],
    faces: Int[ArrayLike, "F 3"],
    render_mask: Bool[ArrayLike, " V"],
    size: int,
) -> tuple[Float[Array, "*b s s 3"], Bool[Array, "*b s s"]]:
    """Render expression offsets, in units of their standard deviation; 0 on the background.

    Returns:
      The map, not cleared by the render mask, and the mask of pixels whose face has a vertex in
      `render_mask`.
    """
    fragments = rasterize(ndc, faces, size)
    image = interpolate(fragments, faces, offsets / OFFSET_SCALE)
    belongs = jnp.asarray(render_mask)[faces].any(-1)
    return image, jnp.logical_and(fragments.face >= 0, belongs[jnp.maximum(fragments.face, 0)])


def offset_distance(
    target_ndc: Float[ArrayLike, "*b V 3"],
    target_offsets: Float[ArrayLike, "*b V 3"],
    swapped_ndc: Float[ArrayLike, "*b V 3"],
    swapped_offsets: Float[ArrayLike, "*b V 3"],
    faces: Int[ArrayLike, "F 3"],
    render_mask: Bool[ArrayLike, " V"],
    size: int,
) -> tuple[Float[Array, " *b"], Float[Array, " *b"]]:
    """HEF of posed meshes: the distance and the uncovered share of each frame.

    Args:
      target_ndc, swapped_ndc: vertices in the NDC of the target's crop box.
      target_offsets, swapped_offsets: expression offsets, metres.
    """
    target_map, target_mask = offset_map(target_ndc, target_offsets, faces, render_mask, size)
    swapped_map, swapped_mask = offset_map(swapped_ndc, swapped_offsets, faces, render_mask, size)
    bare = (target_mask & ~swapped_mask).sum((-2, -1)) / jnp.maximum(target_mask.sum((-2, -1)), 1)
    return masked_l1(swapped_map, target_map, target_mask), bare


def _posed(head, identity, target, swapped, camera, integer_box):
    """Vertices of a frame in the target's crop box, and offsets: the target's, then the swapped mesh's."""
    vertices = world_vertices(head, identity, target)
    pixels = project(camera_from_world(vertices, camera), camera)
    box = crop_box(pixels, integer=integer_box, mask=mesh_render_mask(head))
    return (
        ndc_from_world(vertices, camera, box),
        expression_offsets(head, identity, target),
        ndc_from_world(world_vertices(head, identity, swapped), camera, box),
        expression_offsets(head, identity, swapped),
    )


@functools.partial(jax.jit, static_argnames=("size", "integer_box"))
def _frame_distances(head, identity, target, swapped, camera, size, integer_box):
    """Distances and uncovered shares of frames, one after another to bound the memory."""
    faces, mask = mesh_faces(head), mesh_render_mask(head)

    def one(item):
        return offset_distance(*_posed(head, identity, *item, integer_box), faces, mask, size)

    return jax.lax.map(one, (target, swapped, camera))


@functools.partial(jax.jit, static_argnames="size")
def _frame_maps(head, identity, target, swapped, camera, size):
    faces, mask = mesh_faces(head), mesh_render_mask(head)

    def one(item):
        ndc, offsets, swapped_ndc, swapped_offsets = _posed(head, identity, *item, False)
        shown, inside = offset_map(ndc, offsets, faces, mask, size)
        return ExpressionMaps(shown, offset_map(swapped_ndc, swapped_offsets, faces, mask, size)[0], inside)

    return jax.lax.map(one, (target, swapped, camera))


def head_expression_follow(
    head: HeadAsset,
    prediction: Coefficients,
    target: Coefficients,
    camera: Camera,
    size: int = 512,
    n_frames: int | None = None,
    integer_box: bool = False,
) -> HeadExpressionFollow:
    """Head-expression follow: how well a prediction follows a target; lower is better (method, section 10).

    Two renders of the expression-offset map are compared: the target's mesh, and the target's mesh
    with the prediction's expression, jaw and eyes. Pose, neck, shape and camera are the target's in
    both, so that only the expression counts.

    Args:
      head: the head both sets of coefficients belong to.
      prediction: fields (n_pred, ...).
      target: fields (n_target, ...); `betas` may be (n_shape,), shared by all frames.
      camera: the target's, fields (n_target, ...) or unbatched.
      size: edge of the square renders in pixels.
      n_frames: at most so many frames; default all common ones.
      integer_box: truncate the crop box to integers, as the public code does.

    Raises:
      ValueError: the coefficients do not fit the head.
    """
    swap = _swap(head, prediction, target, camera, n_frames)
    if swap is None:
        return HeadExpressionFollow(None, None, 0, np.zeros(0))
    distance, bare = _frame_distances(head, *swap, size, integer_box)
    per_frame = np.asarray(distance, np.float64)
    return HeadExpressionFollow(float(per_frame.mean()), float(np.mean(bare)), len(per_frame), per_frame)


def expression_maps(
    head: HeadAsset, prediction: Coefficients, target: Coefficients, camera: Camera, size: int = 512
) -> ExpressionMaps:
    """The maps that HEF compares, to look at; arguments and errors as `head_expression_follow`.

    HEF of a frame is the mean over its mask of `abs(swapped - target).mean(-1)`.

    Raises:
      ValueError: also without a common frame.
    """
    swap = _swap(head, prediction, target, camera, None)
    if swap is None:
        raise ValueError("expression_maps: no frame in both prediction and target")
    return jax.tree.map(np.asarray, _frame_maps(head, *swap, size))


def _swap(head, prediction, target, camera, n_frames):
    """Identity, target, the target with the prediction's expression, and cameras of the common frames."""
    for name, value in (("prediction", prediction), ("target", target)):
        if value.expression.ndim != 2 or value.expression.shape[1] != head.n_expression:
            raise ValueError(
                f"head_expression_follow: {name} has expression {value.expression.shape}, "
                f"but head {head.name!r} expects (frames, {head.n_expression})"
            )
    length = min(len(prediction.expression), len(target.expression))
    length = length if n_frames is None else min(length, n_frames)
    if length == 0:
        return None
    betas = jnp.asarray(target.betas)
    betas = betas if betas.ndim == 1 else betas[0]
    identity = make_identity(head, betas)
    target = target._replace(betas=jnp.broadcast_to(betas, (len(target.expression), *betas.shape)))
    target = jax.tree.map(lambda x: jnp.asarray(x)[:length], target)
    swapped = target._replace(
        **{field: jnp.asarray(getattr(prediction, field))[:length] for field in ("expression", "jaw", "eyes")}
    )
    camera = Camera(
        jnp.broadcast_to(_rows(camera.intrinsics, 1, length), (length, 4)),
        jnp.broadcast_to(_rows(camera.extrinsics, 2, length), (length, 4, 4)),
    )
    return identity, target, swapped, camera


def _rows(value, unbatched_ndim, length):
    value = jnp.asarray(value)
    return value if value.ndim == unbatched_ndim or len(value) == 1 else value[:length]
