"""Refines a landmark fit by the pictures (`--photometric` in data_prep.build).

Landmark networks draw mouths that are nearly symmetric. The pictures know better: points of the head's
surface keep their look from frame to frame. What each point looks like, in the sense of
`loki_jax.fitting.contrast`, is the median over frames spread over the clip, at the places where the landmark
fit has it. Then the problem of the landmark fit is solved again with these points as further observations
(`loki_jax.fitting.problem.Surface`), from coarse to fine, while landmarks that expressions move count less.
The shape stays as it is.

It sees what changes in a clip. It cannot correct what is wrong in most frames alike, because the look of the
points comes from the same fit.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from loki_jax.face.asset import HeadAsset, Landmarks
from loki_jax.face.camera import camera_from_world, ndc_from_camera, project
from loki_jax.face.crop import crop_and_resize
from loki_jax.face.skinning import make_identity, mesh_faces, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.clips import FittedClip
from loki_jax.fitting.contrast import NOISE_FLOOR, contrast_features, repetitions
from loki_jax.fitting.fit import DEFAULT_SETTINGS, make_problem, reprojection_error
from loki_jax.fitting.lids import relative_openings
from loki_jax.fitting.points import LANDMARK_SET
from loki_jax.fitting.problem import FitSettings, Surface, pad_frames, point_head, with_shape
from loki_jax.fitting.solver import optimise, surface_looks
from loki_jax.flow import head_parts, view_cosines
from loki_jax.raster.api import rasterize

_DEPTH_TOLERANCE = 0.004  # metres that a point may lie behind what the rasteriser shows
_FACING = 0.3  # cosine from which the look of a point is used
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
      doubt: how far landmarks may be off, as a share of how far expressions usually move them.
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


def refine(
    clip: FittedClip,
    head: HeadAsset,
    settings: PhotometricSettings = PhotometricSettings(),
    fit_settings: FitSettings = DEFAULT_SETTINGS,
) -> FittedClip:
    """The clip with refined coefficients and its errors measured again; unchanged below 8 frames.

    Args:
      fit_settings: those of the landmark fit.
    """
    n = len(clip.frames)
    if n < 8:  # too few views: their look would repeat the fit that it is to correct
        return clip
    fit, track = clip.fit, clip.track
    known = with_shape(head, fit.coefficients.betas[0])
    problem, layout, _, _ = make_problem(
        known, track.points[..., :2], track.confidence, clip.frames[0].shape[:2],
        float(fit.camera.intrinsics[0]), fit_settings, float(clip.fps), track.scores,
    )  # fmt: skip
    points, area = surface_points(head, settings.spacing)
    marks, part = head.landmarks[LANDMARK_SET], ("face", "bary")
    present = np.asarray(marks.face) >= 0
    both = Landmarks(*(np.concatenate([getattr(marks, f)[present], getattr(points, f)]) for f in part))
    small = point_head(known, both)
    moved = np.asarray(small.expression_basis) * np.asarray(head.expression_sigma)[:, None, None]
    reach = np.sqrt((moved**2).sum((0, 2)))[: present.sum()]
    doubt = np.hypot(1, settings.doubt * reach / fit_settings.noise)
    # The gaps between the lids are not doubted.
    doubt = np.concatenate([doubt, np.ones(len(problem.pairs))]).astype(np.float32)
    problem = problem._replace(head=small, sigma=problem.sigma * doubt)

    pictures, corner, scale = face_pictures(clip, settings)
    pictures, corner = pad_frames(pictures), pad_frames(corner)
    sure = np.flatnonzero(fit.confidence >= np.median(fit.confidence))
    chosen = sure[np.linspace(0, len(sure) - 1, settings.texture_frames).round().astype(int)]
    current = fit.coefficients._replace(betas=np.zeros((n, 0), np.float32))
    # How many picture pixels each point stands for, where it is seen squarely.
    metre = scale * fit.camera.intrinsics[0] / np.abs(pad_frames(current.tra)[:, 2])
    trust = (area * metre[:, None] ** 2 * problem.real[:, None]).astype(np.float32)
    trust *= pad_frames(_open_eyes(head, points, track.points, track.score))
    x = pad_frames(layout.unknowns(current))
    for blur in settings.blurs:
        padded = Coefficients(*(pad_frames(field) for field in current))
        views = point_views(known, points, padded, problem.camera, corner, scale, settings.size)
        surface = _surface(pictures, corner, scale, *views, trust, chosen, blur, settings.model_error)
        _, x, _, _ = optimise(
            problem._replace(surface=surface), layout, np.zeros(0, np.float32), x, settings.iterations,
            np.float32(fit_settings.tolerance),
        )  # fmt: skip
        current = layout.coefficients(np.asarray(x)[:n], current.betas)
    # Frames without a face have no picture to follow.
    lost = (fit.confidence <= 0)[:, None]
    found = current._replace(betas=fit.coefficients.betas)
    pairs = zip(fit.coefficients, found, strict=True)
    found = Coefficients(*(np.where(lost, before, after) for before, after in pairs))
    reprojection = reprojection_error(head, found, fit.camera, track.points)
    reprojection = np.where(np.isfinite(fit.reprojection), reprojection, np.nan)
    return clip._replace(fit=fit._replace(coefficients=found, reprojection=reprojection))


def surface_points(
    head: HeadAsset, spacing: tuple[float, float]
) -> tuple[Landmarks, Float[np.ndarray, " m"]]:
    """Points spread over what is shown of the head, without inner mouth, and the area of each, m^2.

    They are `spacing[0]` apart on eyeballs and where expressions move the surface by a millimetre, and
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


def face_pictures(
    clip: FittedClip, settings: PhotometricSettings
) -> tuple[UInt8[np.ndarray, "N S S 3"], Float[np.ndarray, "N 2"], np.float32]:
    """Square pictures around the face of each frame, their corners, and their scale (`Surface`)."""
    points = clip.track.points[:, :468, :2]
    low, high = points.min(1), points.max(1)
    side = float(np.median((high - low).max(1))) * settings.margin
    corners = np.rint((low + high) / 2 - side / 2).astype(np.float32)
    pictures = [
        crop_and_resize(frame, np.concatenate([corner, corner + side]), settings.size)
        for frame, corner in zip(clip.frames, corners, strict=True)
    ]
    # Bytes: numbers of four would take a quarter of a GB a minute.
    return np.stack(pictures), corners, np.float32(settings.size / side)


def _open_eyes(
    head: HeadAsset,
    points: Landmarks,
    landmarks: Float[np.ndarray, "N 478 3"],
    seen: Float[np.ndarray, " N"],
) -> Float[np.ndarray, "N m"]:
    """1 for each point and frame; towards 0 for points of eyeballs that lids hide."""
    corners = np.asarray(head.faces)[points.face]
    eyeball = np.asarray(head_parts(head))[corners, 0].max(1) > 0.5
    left = np.asarray(head.template)[corners, 0].mean(1) > 0
    shown = np.clip((relative_openings(landmarks, seen) - 0.4) / 0.3, 0, 1)
    return np.where(eyeball, np.where(left, shown[:, 1:], shown[:, :1]), 1).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("size",))
def point_views(
    head: HeadAsset, marks: Landmarks, coefficients: Coefficients, camera: Camera, corner, scale, size: int
) -> tuple[Float[Array, "N m 2"], Float[Array, "N m"]]:
    """Pixels of the points in each frame, and how squarely each is seen (0: hidden)."""
    faces, parts = mesh_faces(head), head_parts(head)
    corners = jnp.asarray(head.faces)[marks.face]
    on_points = lambda values: jnp.einsum("mk,mkc->mc", marks.bary, values[corners])
    eyeball = on_points(parts)[:, 0] > 0.5
    face_eyeball = parts[faces].min(1)[:, 0] > 0.5

    def frame(item):
        coefficients, corner = item
        world = world_vertices(head, make_identity(head, coefficients.betas), coefficients)
        vertices = camera_from_world(world, camera)
        box = jnp.concatenate([corner, corner + size / scale])
        fragments = rasterize(ndc_from_camera(vertices, camera, box), faces, size)
        place = on_points(vertices)
        pixels = project(place, camera)
        within = (pixels - corner) * scale
        inside = jnp.all((within > 2) & (within < size - 2), axis=-1)
        column, row = jnp.clip(within.astype(int), 0, size - 1).T
        winner = fragments.face[row, column]
        # Lids are thinner than the tolerance: an eyeball is seen where an eyeball is shown.
        seen = (winner >= 0) & (face_eyeball[winner] == eyeball)
        seen &= fragments.depth[row, column] > place[:, 2] - _DEPTH_TOLERANCE
        cosine = on_points(view_cosines(vertices, faces)[:, None])[:, 0]
        return pixels, jnp.where(seen & inside, jnp.maximum(cosine, 0), 0)

    return jax.lax.map(frame, (coefficients, corner))


@jax.jit
def _surface(pictures, corner, scale, pixels, facing, trust, chosen, blur, model_error) -> Surface:
    """The look of the points in the `chosen` frames, and how much each counts in every frame."""
    features = jax.lax.map(lambda picture: contrast_features(picture / 255.0, blur), pictures)
    looks = surface_looks(features, corner, scale, pixels)
    shown = (facing > _FACING)[chosen]
    texture = jnp.nan_to_num(jnp.nanmedian(jnp.where(shown[..., None], looks[chosen], jnp.nan), axis=0))
    visible = jnp.where(shown.mean(0) > _LEAST_VIEWS, facing, 0)
    difference = jnp.linalg.norm(looks - texture, axis=-1)
    noise = jnp.nanmedian(jnp.where(visible > 0, difference, jnp.nan), axis=1)
    noise = jnp.maximum(jnp.nan_to_num(noise), NOISE_FLOOR)
    weight = visible * trust / (noise**2 * repetitions(noise, blur, model_error))[:, None]
    return Surface(features, corner, scale, texture, weight, noise)
