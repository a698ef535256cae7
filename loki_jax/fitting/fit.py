"""Head coefficients of a clip from its landmarks: prepares the problem, solves it, measures the errors."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.rotation import matrix_from_rotvec, rotvec_from_matrix
from loki_jax.face.skinning import landmark_positions, make_identity, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.points import (
    FACE_OVAL,
    IRISES,
    LANDMARK_SET,
    LIDS_LEFT,
    LIDS_RIGHT,
    N_POINTS,
    OUTER_EYE_CORNERS,
)
from loki_jax.fitting.problem import (
    HIGHEST,
    FitError,
    FitSettings,
    Layout,
    Problem,
    landmark_head,
    pad_frames,
)
from loki_jax.fitting.solver import optimise
from loki_jax.fitting.task_file import axis_scores

DEFAULT_SETTINGS = FitSettings()


class FitResult(NamedTuple):
    """The fit of a clip of N frames (numpy).

    Attributes:
      coefficients: fields (N, ...); the shape is repeated.
      camera: intrinsics (4,) and extrinsics (4, 4), the same for all frames.
      reprojection: distance in pixels between landmark and head, NaN where the head lacks the landmark
        or it was not seen.
      error: mean reprojection distance of the inner face (no contour, no iris) over the distance of
        the outer eye corners in the image, per frame.
      confidence: 0..1 per frame, from the landmarks' confidence and the error.
      iterations, cost: of the last stage.
    """

    coefficients: Coefficients
    camera: Camera
    reprojection: Float[np.ndarray, "N 478"]
    error: Float[np.ndarray, " N"]
    confidence: Float[np.ndarray, " N"]
    iterations: int
    cost: float


@jax.jit
def pose_from_points(
    model: Float[Array, "n 3"],
    pixels: Float[Array, "*b n 2"],
    weight: Float[Array, "*b n"],
    intrinsics: Float[Array, "4"],
) -> tuple[Float[Array, "*b 3"], Float[Array, "*b 3"], Float[Array, " *b"]]:
    """Rigid motion that puts `model` (metres, head frame) on `pixels`, by scaled orthography.

    The 2 x 3 affine map between the two is found by weighted least squares and replaced by the nearest
    pair of orthogonal rows of equal length, whose cross product completes the rotation.

    Returns:
      `rot` and `tra` of `Coefficients`, for identity extrinsics, and the scale in pixels per metre.
    """

    def mean(value, w):
        return jnp.einsum("...n,...nc->...c", w, value) / jnp.sum(w, axis=-1)[..., None]

    model = jnp.broadcast_to(model, (*pixels.shape[:-1], 3))
    centre_model, centre_pixel = mean(model, weight), mean(pixels, weight)
    offsets, shifts = model - centre_model[..., None, :], pixels - centre_pixel[..., None, :]
    moments = jnp.einsum("...n,...ni,...nj->...ij", weight, offsets, offsets, precision=HIGHEST)
    cross = jnp.einsum("...n,...ni,...nj->...ij", weight, shifts, offsets, precision=HIGHEST)
    affine = jnp.einsum("...ij,...jk->...ik", cross, jnp.linalg.inv(moments), precision=HIGHEST)
    left, lengths, right = jnp.linalg.svd(affine, full_matrices=False)
    rows = jnp.einsum("...ij,...jk->...ik", left, right, precision=HIGHEST)
    scale = jnp.mean(lengths, axis=-1)
    turned = jnp.concatenate([rows, jnp.cross(rows[..., 0, :], rows[..., 1, :])[..., None, :]], axis=-2)
    depth = jnp.mean(intrinsics[:2]) / scale
    lateral = (centre_pixel - intrinsics[2:]) * (depth[..., None] / intrinsics[:2])
    centre = jnp.concatenate([lateral, depth[..., None]], axis=-1)
    # Away from the image centre a head is seen along a slanted ray, not along the optical axis.
    ray = centre / jnp.linalg.norm(centre, axis=-1, keepdims=True)
    slant = jnp.stack([-ray[..., 1], ray[..., 0], jnp.zeros_like(depth)], axis=-1)
    turned = jnp.einsum("...ij,...jk->...ik", matrix_from_rotvec(slant), turned, precision=HIGHEST)
    # So far in camera axes (y down, z away); diag(1, -1, -1) turns them into the world's.
    flip = jnp.array([1.0, -1.0, -1.0])
    rotation = turned * flip[:, None]
    tra = centre * flip - jnp.einsum("...ij,...j->...i", rotation, centre_model, precision=HIGHEST)
    return rotvec_from_matrix(rotation), tra, scale


def make_camera(image_size: tuple[int, int], focal: float | None = None, fov: float = 20.0) -> Camera:
    """A camera in the middle of an image of `image_size` = (height, width), extrinsics the identity.

    The focal length in pixels is `focal`, or that of a field of view of `fov` degrees over the longer side.
    """
    height, width = image_size
    if focal is None:
        focal = 0.5 * max(height, width) / np.tan(np.radians(fov) / 2)
    intrinsics = np.array([focal, focal, width / 2, height / 2], np.float32)
    return Camera(intrinsics, np.eye(4, dtype=np.float32))


def fit_landmarks(
    head: HeadAsset,
    points: Float[np.ndarray, "..."],
    confidence: Float[np.ndarray, "..."],
    image_size: tuple[int, int],
    *,
    focal: float | None = None,
    settings: FitSettings = DEFAULT_SETTINGS,
    fps: float = 25.0,
    scores: Float[np.ndarray, "N k"] | None = None,
) -> FitResult:
    """Fit `head` to the landmarks of a clip (one frame: a portrait).

    Args:
      points: (N, 478, 2 or 3): x, y (and z, not used) in pixels.
      confidence: (N, 478), 0..1; frames without a face are 0 throughout and are filled in by smoothness.
      image_size: (height, width) in pixels.
      focal: focal length in pixels; None: from `settings.fov`.
      fps: frame rate; the smoothness of `settings` is stated for 25 frames a second.
      scores: expression scores (`loki_jax.fitting.task_file`), observations of the axes of
        their names; k is 52 or 0.

    Raises:
      FitError: no set of 478 landmarks on the head, wrong array shapes, or nothing seen.
    """
    points, confidence = np.asarray(points, np.float32), np.asarray(confidence, np.float32)
    if LANDMARK_SET not in head.landmarks:
        raise FitError(
            f"head {head.name!r} has no {LANDMARK_SET!r} landmarks, only {sorted(head.landmarks)}. "
            "Rebuild the asset with `python -m data_prep.head_asset`."
        )
    if points.ndim != 3 or points.shape[1] != N_POINTS or points.shape[2] not in (2, 3) or len(points) == 0:
        raise FitError(f"landmarks have shape {points.shape}, expected (N, {N_POINTS}, 2 or 3) with N > 0")
    if confidence.shape != points.shape[:2]:
        raise FitError(f"confidence has shape {confidence.shape}, expected {points.shape[:2]}")
    finite = np.isfinite(points[..., :2]).all(-1) & np.isfinite(confidence)
    confidence = np.where(finite, np.clip(confidence, 0, 1), 0)
    points = np.where(finite[..., None], points[..., :2], 0)
    problem, layout, start, seen = make_problem(
        head, points, confidence, image_size, focal, settings, fps, scores
    )
    mean_shape, tolerance = np.zeros(head.n_shape, np.float32), np.float32(settings.tolerance)
    shape, x, cost, steps = optimise(problem, layout, mean_shape, start, settings.iterations, tolerance)
    n_frames = len(points)
    shape, x = np.asarray(shape), np.asarray(x)[:n_frames]
    coefficients = layout.coefficients(x, np.broadcast_to(shape, (n_frames, len(shape))))
    reprojection = reprojection_error(head, coefficients, problem.camera, points)
    reprojection = np.where(seen[:, None] & (confidence > 0), reprojection, np.nan)
    error = np.full(n_frames, np.nan, np.float32)
    error[seen] = inner_face_error(reprojection[seen], points[seen])
    # Half of the confidence is lost at an error of 5 % of the outer eye corners' distance.
    trust = np.where(seen, confidence.max(1) / (1 + (np.nan_to_num(error) / 0.05) ** 2), 0)
    trust = trust.astype(np.float32)
    return FitResult(coefficients, problem.camera, reprojection, error, trust, int(steps), float(cost))


def make_problem(
    head: HeadAsset,
    points: Float[np.ndarray, "N 478 2"],
    confidence: Float[np.ndarray, "N 478"],
    image_size: tuple[int, int],
    focal: float | None,
    settings: FitSettings,
    fps: float,
    scores: Float[np.ndarray, "N k"] | None = None,
) -> tuple[Problem, Layout, Float[np.ndarray, "M p"], Bool[np.ndarray, " N"]]:
    """The problem, padded to M frames, its layout and start, and which of the N frames show the face."""
    indices = np.flatnonzero(np.asarray(head.landmarks[LANDMARK_SET].face) >= 0)
    is_inner = ~np.isin(indices, (*FACE_OVAL, *IRISES))
    seen = (confidence[:, indices[is_inner]] > 0.1).sum(1) >= min(12, is_inner.sum())
    if not seen.any() or is_inner.sum() < 6:
        raise FitError(
            f"no frame shows enough landmarks ({int(is_inner.sum())} of the inner face are on the head "
            f"{head.name!r}). Use a clip with a visible face."
        )
    n_frames = len(points)
    observed = pad_frames(_fill_gaps(points[:, indices], seen))
    # Just enough to hold interpolated frames, which nothing else would keep from drifting.
    confidence_used = pad_frames(np.where(seen[:, None], confidence[:, indices], 0.02))

    small = landmark_head(head, indices)
    layout = Layout(
        head.n_expression,
        jaw=head.joint("jaw") is not None,
        eyes=head.joint("left_eye") is not None and bool(np.isin(indices, IRISES).any()),
    )
    camera = make_camera(image_size, focal, settings.fov)
    rot, tra, scale = pose_from_points(
        jnp.asarray(small.template[: len(indices)]),
        jnp.asarray(observed),
        jnp.broadcast_to(is_inner.astype(np.float32), observed.shape[:2]),
        jnp.asarray(camera.intrinsics),
    )
    start = np.zeros((len(observed), layout.size), np.float32)
    start[:, layout.n_expression : layout.n_expression + 3] = rot
    start[:, layout.n_expression + 3 : layout.n_expression + 6] = tra

    pairs = lid_pairs(indices)
    seen_there = observations(indices, pairs, observed, confidence_used, np.asarray(scale), settings)

    terms = frame_terms(head, layout, settings, 25.0 / fps)
    mean = np.zeros_like(start)
    if scores is not None and scores.shape[1]:
        filled = _fill_gaps(np.asarray(scores, np.float32)[..., None], seen)[..., 0]
        for axis, values in axis_scores(head.expression_names, filled).items():
            mean[:, axis] = pad_frames(np.clip(values, terms["lower"][axis], terms["upper"][axis]))
            terms["frame_prior"][axis] = settings.score_noise**-2.0

    real = (np.arange(len(observed)) < n_frames).astype(np.float32)
    problem = Problem(
        head=small,
        camera=camera,
        pairs=pairs,
        observed=seen_there.observed,
        weight=seen_there.weight * real[:, None],
        sigma=seen_there.sigma,
        real=real,
        # A landmark that is off the head's own one is so in every frame: more frames show more
        # views of the shape, but do not make the landmarks more exact.
        shape_prior=n_frames * np.asarray(head.shape_sigma, np.float32) ** -2.0,
        huber=np.asarray(settings.huber, np.float32),
        frame_mean=mean,
        **terms,
    )
    return problem, layout, start, seen


class Observations(NamedTuple):
    """Fields of `Problem`: landmarks of N frames, then the gaps between the lids."""

    observed: Float[np.ndarray, "N n 2"]
    weight: Float[np.ndarray, "N n"]
    sigma: Float[np.ndarray, "N n"]


def observations(
    indices: Int[np.ndarray, " m"],
    pairs: Int[np.ndarray, "k 2"],
    points: Float[np.ndarray, "N m 2"],
    confidence: Float[np.ndarray, "N m"],
    scale: Float[np.ndarray, " N"],
    settings: FitSettings,
) -> Observations:
    """What is observed in frames.

    Args:
      indices: which of the 478 landmarks these are.
      pairs: `lid_pairs` of them.
      points: pixels.
      scale: pixels a metre at the face.
    """
    metres = np.where(np.isin(indices, FACE_OVAL), settings.contour_noise, settings.noise)
    metres = np.where(np.isin(indices, IRISES), settings.iris_noise, metres)
    gaps = points[:, pairs[:, 0]] - points[:, pairs[:, 1]]
    least, growth = settings.gap_noise
    gap_sigma = scale[:, None] * least + growth * np.linalg.norm(gaps, axis=-1)
    return Observations(
        np.concatenate([points, gaps], axis=1),
        np.concatenate([confidence, confidence[:, pairs].min(-1)], axis=1).astype(np.float32),
        np.concatenate([scale[:, None] * metres, gap_sigma], axis=1).astype(np.float32),
    )


def lid_pairs(indices: Int[np.ndarray, " n"]) -> Int[np.ndarray, "k 2"]:
    """Opposite landmarks of upper and lower lids among the landmarks `indices`, by their place in these."""
    place = {int(index): at for at, index in enumerate(indices)}
    pairs = [pair for lids in (LIDS_RIGHT, LIDS_LEFT) for pair in zip(lids[9:], lids[1:8], strict=True)]
    found = [(place[upper], place[lower]) for upper, lower in pairs if upper in place and lower in place]
    return np.array(found, np.int32).reshape(-1, 2)


def reprojection_error(
    head: HeadAsset, coefficients: Coefficients, camera: Camera, points: Float[np.ndarray, "N 478 _"]
) -> Float[np.ndarray, "N 478"]:
    """Distance in pixels of every landmark from the whole head's; NaN for those the head lacks."""
    padded = Coefficients(*(pad_frames(field) for field in coefficients))
    projected = np.asarray(_project_landmarks(head, padded, camera))[: len(points)]
    distance = np.linalg.norm(projected - np.asarray(points)[..., :2], axis=-1)
    return np.where(np.asarray(head.landmarks[LANDMARK_SET].face) >= 0, distance, np.nan)


def inner_face_error(
    reprojection: Float[np.ndarray, "N 478"], points: Float[np.ndarray, "N 478 _"]
) -> Float[np.ndarray, " N"]:
    """Mean over the inner face (no contour, no iris) over the outer eye corners' distance, per frame."""
    inner = np.setdiff1d(np.arange(N_POINTS), (*FACE_OVAL, *IRISES))
    left, right = (points[:, corner, :2] for corner in OUTER_EYE_CORNERS)
    width = np.maximum(np.linalg.norm(left - right, axis=-1), 1e-6)
    return np.nanmean(reprojection[:, inner], axis=1) / width


@jax.jit
def _project_landmarks(
    head: HeadAsset, coefficients: Coefficients, camera: Camera
) -> Float[Array, "N 478 2"]:
    def frame(coefficients):
        identity = make_identity(head, coefficients.betas)
        world = world_vertices(head, identity, coefficients)
        return project(camera_from_world(landmark_positions(head, world, LANDMARK_SET), camera), camera)

    # One frame after another: a batch of whole meshes would need gigabytes for a long clip.
    return jax.lax.map(frame, coefficients)


def frame_terms(head: HeadAsset, layout: Layout, settings: FitSettings, interval: float) -> dict:
    """Priors, smoothness and bounds of a frame's unknowns, in the order of `Layout`."""
    n = layout.n_expression
    free, none = np.zeros(6), np.full(6, np.inf)

    def joined(expression, motion, jaw, eyes):
        parts = [expression, motion, jaw if layout.jaw else (), eyes if layout.eyes else ()]
        return np.concatenate([np.asarray(part, np.float32) for part in parts]).astype(np.float32)

    smooth = joined(
        np.full(n, settings.smooth_expression),
        np.repeat([settings.smooth_rot, settings.smooth_tra], 3),
        np.full(3, settings.smooth_jaw),
        np.full(3, settings.smooth_eyes),
    )
    bounds = np.asarray(head.expression_bounds)
    return {
        "frame_prior": joined(
            np.asarray(head.expression_sigma) ** -2.0,
            free,
            np.square(settings.jaw) ** -1.0,
            np.square(settings.eyes) ** -1.0,
        ),
        # The second difference of a smooth motion grows with the square of the frame interval.
        "smoothness": (smooth * interval**2) ** -2.0,
        "lower": joined(bounds[:, 0], -none, (settings.jaw_limits[0], -np.inf, -np.inf), -none[:3]),
        "upper": joined(bounds[:, 1], none, (settings.jaw_limits[1], np.inf, np.inf), none[:3]),
    }


def _fill_gaps(
    observed: Float[np.ndarray, "N n c"], seen: Bool[np.ndarray, " N"]
) -> Float[np.ndarray, "N n c"]:
    """Frames without landmarks get interpolated ones, so that their pose starts somewhere sensible."""
    times = np.flatnonzero(seen)
    if len(times) == len(observed):
        return observed
    flat = observed.reshape(len(observed), -1)
    columns = [np.interp(np.arange(len(flat)), times, flat[times, c]) for c in range(flat.shape[1])]
    return np.stack(columns, axis=-1).reshape(observed.shape).astype(np.float32)
