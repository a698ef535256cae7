"""Refines a landmark fit by the pictures (`--photometric` in data_prep.build).

Landmark networks draw mouths that are nearly symmetric and lids that stay open. The pictures know better:
points of the head's surface keep their look from frame to frame. What each point looks like, in the sense of
`loki_jax.fitting.contrast`, is the median over frames spread over the clip, at the places where the landmark
fit has it. Then the problem of the landmark fit is solved again with these points as further observations
(`loki_jax.fitting.problem.Surface`), from coarse to fine, while landmarks of mouth and lids count less.

It sees what changes in a clip. It cannot correct what is wrong in all frames alike, because the look of the
points comes from the same fit.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from loki_jax.face.asset import HeadAsset, Landmarks
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.crop import crop_and_resize
from loki_jax.face.skinning import make_identity, mesh_faces, mesh_render_mask, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.clips import FittedClip
from loki_jax.fitting.contrast import contrast_features, noise_level, repetitions
from loki_jax.fitting.fit import DEFAULT_SETTINGS, inner_face_error, make_problem, reprojection_error
from loki_jax.fitting.points import LANDMARK_SET
from loki_jax.fitting.problem import FitSettings, Layout, Problem, Surface, pad_frames, point_head
from loki_jax.fitting.solver import optimise, surface_looks
from loki_jax.flow import head_parts, view_cosines
from loki_jax.raster.api import rasterize
from loki_jax.face.camera import ndc_from_camera

_CLOSER = 0.004  # metres that a point may lie behind what the rasteriser shows
_LEAST_VIEWS = 0.2  # share of the frames in which a point must be seen


@dataclasses.dataclass(frozen=True)
class PhotometricSettings:
    """What `refine` does.

    Attributes:
      size: side in pixels of the picture of the face that is compared.
      margin: that side over the longer extent of the landmarks.
      blurs: standard deviations in these pixels of the finest details compared, one stage after another.
      spacing: metres between points where expressions move the face, and elsewhere.
      texture_frames: frames that the look of the points comes from.
      doubt: share of an expression's usual displacement by which landmarks may be off.
      iterations: upper limit of steps a stage.
      model_error: differences in units of the local contrast that are the model's and not the pixel's.
    """

    size: int = 160
    margin: float = 1.25
    blurs: tuple[float, ...] = (4.0, 2.0, 1.0)
    spacing: tuple[float, float] = (0.0015, 0.005)
    texture_frames: int = 48
    doubt: float = 0.7
    iterations: int = 8
    model_error: float = 0.1


def surface_points(
    head: HeadAsset, spacing: tuple[float, float]
) -> tuple[Landmarks, Float[np.ndarray, " m"]]:
    """Points spread over the part of the head that is shown, without inner mouth, and the area of each, m^2.

    They are `spacing[0]` apart where expressions move the surface by a millimetre, and on eyeballs, and
    `spacing[1]` elsewhere.
    """
    faces, template = np.asarray(head.faces), np.asarray(head.template)
    a, b, c = (template[faces[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=-1) / 2
    moved = np.asarray(head.expression_basis) * np.asarray(head.expression_sigma)[:, None, None]
    moved = np.sqrt((moved**2).sum((0, 2)))[faces].max(1) > 1e-3
    eyeball, inside = np.asarray(head_parts(head))[: len(template)][faces].max(1).T > 0.5
    shown = np.asarray(head.render_mask)[faces].all(1) & ~inside
    cell = np.where(moved | eyeball, spacing[0], spacing[1]) ** 2
    # The n-th face gets as many points as whole cells are filled by it and the ones before it.
    filled = np.floor(np.cumsum(np.where(shown, area / cell, 0)) + 0.5).astype(int)
    face = np.repeat(np.arange(len(faces)), np.diff(filled, prepend=0))
    # Evenly spread pairs (the R2 sequence), folded into the triangle.
    u, v = np.modf((np.arange(len(face))[:, None] + 1) * [0.7548776662, 0.5698402910])[0].T
    fold = u + v > 1
    u, v = np.where(fold, 1 - u, u), np.where(fold, 1 - v, v)
    bary = np.stack([1 - u - v, u, v], axis=-1).astype(np.float32)
    return Landmarks(face.astype(np.int32), bary), cell[face].astype(np.float32)


def face_pictures(clip: FittedClip, settings: PhotometricSettings):
    """Square pictures (N, S, S, 3) in 0..1 around the face of each frame, their corners and scale."""
    points = clip.track.points[:, :468, :2]
    low, high = points.min(1), points.max(1)
    side = float(np.median((high - low).max(1))) * settings.margin
    corner = np.rint((low + high) / 2 - side / 2)
    size = settings.size
    pictures = [
        crop_and_resize(frame, np.array([*start, *(start + side)]), size)
        for frame, start in zip(clip.frames, corner, strict=True)
    ]
    return np.stack(pictures).astype(np.float32) / 255, corner.astype(np.float32), np.float32(size / side)


@jax.jit
def _views(head, marks, coefficients, camera, corner, scale, size_of):
    """Pixels of the points in each frame (N, m, 2), and how squarely each is seen (N, m; 0: not)."""
    faces = mesh_faces(head)
    parts = head_parts(head)
    size = size_of.shape[0]
    corners = jnp.asarray(head.faces)[marks.face]
    on_points = lambda values: jnp.einsum("mk,mkc->mc", marks.bary, values[corners])
    part = on_points(parts)[:, 0] > 0.5
    face_part = parts[faces].min(1)[:, 0] > 0.5

    def frame(item):
        coefficients, corner = item
        world = world_vertices(head, make_identity(head, coefficients.betas), coefficients)
        points = camera_from_world(world, camera)
        box = jnp.concatenate([corner, corner + size / scale])
        fragments = rasterize(ndc_from_camera(points, camera, box), faces, size)
        place = on_points(points)
        pixels = project(place, camera)
        column, row = jnp.clip(jnp.floor((pixels - corner) * scale).astype(int), 0, size - 1).T
        inside = jnp.all((pixels > corner + 2 / scale) & (pixels < corner + (size - 2) / scale), axis=-1)
        winner = fragments.face[row, column]
        seen = (winner >= 0) & (fragments.depth[row, column] > place[:, 2] - _CLOSER)
        seen &= face_part[jnp.maximum(winner, 0)] == part
        cosine = on_points(view_cosines(points, faces)[:, None])[:, 0]
        return pixels, jnp.where(seen & inside, jnp.maximum(cosine, 0), 0)

    return jax.lax.map(frame, (coefficients, corner))


def refine(
    clip: FittedClip,
    head: HeadAsset,
    settings: PhotometricSettings = PhotometricSettings(),
    fit_settings: FitSettings = DEFAULT_SETTINGS,
) -> FittedClip:
    """The clip with refined coefficients and its errors measured again; unchanged below 8 frames."""
    n = len(clip.frames)
    if n < 8:
        return clip
    fit, track = clip.fit, clip.track
    known = dataclasses.replace(
        head,
        template=np.asarray(make_identity(head, fit.coefficients.betas[0]).vertices)[: len(head.template)],
        shape_basis=np.zeros((0, *head.template.shape), np.float32),
        shape_sigma=np.zeros(0, np.float32),
        shape_names=(),
    )
    original = fit.coefficients._replace(betas=np.zeros((n, 0), np.float32))
    image_size = clip.frames[0].shape[:2]
    problem, layout, start, seen = make_problem(
        known, track.points[..., :2], track.confidence, image_size, float(fit.camera.intrinsics[0]),
        fit_settings, float(clip.fps), track.scores,
    )  # fmt: skip
    indices = np.flatnonzero(np.asarray(head.landmarks[LANDMARK_SET].face) >= 0)
    marked = point_head(
        known,
        Landmarks(
            *(
                np.asarray(f)[indices]
                for f in (head.landmarks[LANDMARK_SET].face, head.landmarks[LANDMARK_SET].bary)
            )
        ),
    )
    moved = (
        np.asarray(marked.expression_basis)[:, : len(indices)]
        * np.asarray(head.expression_sigma)[:, None, None]
    )
    reach = np.sqrt((moved**2).sum((0, 2)))
    weaker = np.hypot(1, settings.doubt * reach / fit_settings.noise).astype(np.float32)
    weaker = np.concatenate([weaker, np.ones(len(problem.pairs), np.float32)])
    marks, area = surface_points(head, settings.spacing)
    both = Landmarks(
        np.concatenate([np.asarray(head.landmarks[LANDMARK_SET].face)[indices], marks.face]),
        np.concatenate([np.asarray(head.landmarks[LANDMARK_SET].bary)[indices], marks.bary]),
    )
    pictures, corner, scale = face_pictures(clip, settings)
    pictures, corner = pad_frames(pictures), pad_frames(corner)
    x = pad_frames(layout.unknowns(original))
    scale_of = np.asarray(problem.sigma).min(1) / fit_settings.noise  # frame pixels per metre
    problem = problem._replace(
        head=point_head(known, both),
        sigma=problem.sigma * weaker,
    )
    sure = np.flatnonzero(fit.confidence >= np.median(fit.confidence))
    chosen = sure[np.linspace(0, len(sure) - 1, settings.texture_frames).round().astype(int)]
    resolution = np.zeros(settings.size)
    current = original
    for blur in settings.blurs:
        padded = Coefficients(*(pad_frames(field) for field in current))
        pixels, facing = _views(known, marks, padded, problem.camera, corner, scale, resolution)
        features = jax.lax.map(lambda p: contrast_features(p, blur), jnp.asarray(pictures))
        surface = Surface(features, corner, scale, None, facing, np.ones(len(corner), np.float32))
        looks = np.asarray(surface_looks(surface, pixels))[chosen]
        shown = np.asarray(facing)[chosen] > 0.3
        often = shown.mean(0) > _LEAST_VIEWS
        texture = np.nan_to_num(np.nanmedian(np.where(shown[..., None], looks, np.nan), axis=0)).astype(
            np.float32
        )
        difference = np.linalg.norm(np.asarray(surface_looks(surface, pixels)) - texture, axis=-1)
        visible = np.where(often, np.asarray(facing), 0)
        noise = np.nanmedian(np.where(visible > 0, difference, np.nan), axis=1)
        noise = np.maximum(np.nan_to_num(noise), 0.05).astype(np.float32)
        # Pixels that each point stands for, over those that repeat each other.
        span = area * (scale_of[:, None] * scale) ** 2
        weight = (
            visible * span / (1 + 4 * np.pi * blur**2) / (1 + (noise[:, None] / settings.model_error) ** 2)
        )
        weight = weight / noise[:, None] ** 2 * problem.real[:, None]
        problem = problem._replace(
            surface=surface._replace(texture=texture, weight=weight.astype(np.float32), noise=noise)
        )
        _, x, cost, steps = optimise(
            problem, layout, np.zeros(0, np.float32), x, settings.iterations, np.float32(1e-3)
        )
        current = layout.coefficients(np.asarray(x)[:n], original.betas)
    found = current._replace(betas=fit.coefficients.betas)
    lost = (fit.confidence <= 0)[:, None]
    found = Coefficients(
        *(np.where(lost, old, new) for old, new in zip(fit.coefficients, found, strict=True))
    )
    reprojection = reprojection_error(head, found, fit.camera, track.points)
    reprojection = np.where(np.isfinite(fit.reprojection), reprojection, np.nan)
    return clip._replace(fit=fit._replace(coefficients=found, reprojection=reprojection))
