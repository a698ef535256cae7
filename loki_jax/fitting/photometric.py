"""Reads head coefficients back from frames of a head whose appearance is known.

The ruler of the built-in heads (method, section 10): identity, colours, camera and crop are given, the
coefficients of every frame are sought such that the rendered head looks like the frame. Nothing of
the driver enters: the first frame starts from the neutral, frontal head in the middle of the crop.

Method: robust Gauss-Newton on differences of blurred, contrast-normalised images (Lucas and Kanade; the
gradient is the mean of the rendered and the observed image's, as in Benhimane and Malis 2004, "efficient
second-order minimisation"). The Jacobian of a pixel is its image gradient times the screen motion of
the surface point it shows, interpolated from the vertices; pixels just outside the outline take the
motion of the nearest surface point, which makes the outline pull. From coarse to fine blur; frame t
starts from frame t - 1.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, ndc_from_camera, project
from loki_jax.face.crop import crop_box
from loki_jax.face.rotation import matrix_from_rotvec, rotvec_from_matrix
from loki_jax.face.skinning import Identity, make_identity, mesh_faces, mesh_render_mask, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.raster.api import rasterize
from loki_jax.synthetic.appearance import Appearance
from loki_jax.synthetic.shading import render

_PRECISION = jax.lax.Precision.HIGHEST

# In units of the local contrast (`contrast_features`).
_NOISE_FLOOR = 0.03

_MODEL_ERROR = 0.1  # differences beyond this are taken to be of the model, not of the pixel

_TRUST_ELSEWHERE = 0.1


class PhotometricPrior(NamedTuple):
    """Standard deviations of the coefficients: of a frame, and of its change since the last one.

    Radians and metres; expression in units of the head's `expression_sigma`. Rotation and
    translation are about the start pose, everything else about 0.
    """

    rot: float = 1.0
    tra: float = 0.08
    neck: float = 0.2
    jaw: tuple[float, float, float] = (0.2, 0.03, 0.03)
    eyes: float = 0.2
    expression: float = 0.6
    turn: float = 0.4  # change of rot per frame
    change: float = 0.35  # of all the others, as a share of the above, per frame


class Problem(NamedTuple):
    """What stays fixed while one clip is tracked. `trust`: weight of each vertex's surface."""

    head: HeadAsset
    identity: Identity
    shape: Float[Array, " n_shape"]
    appearance: Appearance
    camera: Camera
    crop: Float[Array, " 4"]
    mean: Coefficients  # centre of the prior
    sigma: Coefficients  # its standard deviations
    low: Float[Array, " n_expr"]
    high: Float[Array, " n_expr"]
    trust: Float[Array, " V_all"]


def _trust(head: HeadAsset) -> Float[Array, " V_all"]:
    """1 where expressions move the surface by a millimetre, `_TRUST_ELSEWHERE` where they never do.

    The face says where the head looks; hair, scalp, neck and shoulders are what a network that
    half remembers a person gets wrong first.
    """
    moved = jnp.linalg.norm(head.expression_basis * head.expression_sigma[:, None, None], axis=-1).max(0)
    inside = jnp.ones(mesh_render_mask(head).shape[0] - moved.shape[0])
    reach = jnp.concatenate([jnp.clip(moved / 5e-4, 0, 1), inside])
    return _TRUST_ELSEWHERE + (1 - _TRUST_ELSEWHERE) * reach


_FREE = ("rot", "tra", "neck", "jaw", "eyes", "expression")


def _coefficients(problem: Problem, unknowns: Float[Array, " k"]) -> Coefficients:
    """Coefficients of unknowns counted in standard deviations of the prior."""
    values, start = {"betas": problem.shape}, 0
    for field in _FREE:
        mean, sigma = getattr(problem.mean, field), getattr(problem.sigma, field)
        values[field] = mean + sigma * unknowns[start : start + len(mean)]
        start += len(mean)
    return Coefficients(**values)


def _within_bounds(problem: Problem, unknowns: Float[Array, " k"]) -> Float[Array, " k"]:
    n = len(problem.low)
    sigma = jnp.maximum(problem.sigma.expression, 1e-9)
    mean = problem.mean.expression
    return unknowns.at[-n:].set(
        jnp.clip(unknowns[-n:], (problem.low - mean) / sigma, (problem.high - mean) / sigma)
    )


def _screen(problem: Problem, unknowns: Float[Array, " k"]) -> Float[Array, "V 3"]:
    """Vertices in NDC."""
    world = world_vertices(problem.head, problem.identity, _coefficients(problem, unknowns))
    return ndc_from_camera(camera_from_world(world, problem.camera), problem.camera, problem.crop)


def _motion(problem: Problem, unknowns: Float[Array, " k"]) -> Float[Array, "V 2 k"]:
    """Screen motion (NDC) of every vertex per unit of each unknown."""
    return jax.jacfwd(lambda u: _screen(problem, u)[:, :2])(unknowns)


def _spread(face: Array, bary: Array, steps: int) -> tuple[Array, Array]:
    """Give background pixels up to `steps` away from the head the fragment of a covered neighbour."""

    def grow(_, state):
        face, bary = state
        for axis in (0, 1):
            for shift in (1, -1):
                # Rolling wraps round the image's edge; a head there is cut off anyway.
                other_face, other_bary = jnp.roll(face, shift, axis), jnp.roll(bary, shift, axis)
                take = (face < 0) & (other_face >= 0)
                face = jnp.where(take, other_face, face)
                bary = jnp.where(take[..., None], other_bary, bary)
        return face, bary

    return jax.lax.fori_loop(0, steps, grow, (face, bary))


def _blur_matrix(size: int, sigma: Float[Array, ""]) -> Float[Array, "s s"]:
    """Rows are Gaussian windows, normalised so that the image's edges keep their brightness."""
    index = jnp.arange(size)
    weights = jnp.exp(-0.5 * ((index[:, None] - index) / sigma) ** 2)
    return weights / weights.sum(1, keepdims=True)


def blur(image: Float[Array, "s s c"], sigma: Float[Array, ""]) -> Float[Array, "s s c"]:
    matrix = _blur_matrix(image.shape[0], sigma)
    return jnp.einsum("ij,jkc,lk->ilc", matrix, image, matrix)


def _gradient(image: Float[Array, "s s c"]) -> Float[Array, "s s c 2"]:
    """Central differences along NDC x (left) and y (up), per unit of NDC."""
    half = image.shape[0] / 2
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    along_columns = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    along_rows = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    return -half * jnp.stack([along_columns, along_rows], -1)


def contrast_features(image: Float[Array, "s s c"], sigma: Float[Array, ""]) -> Float[Array, "s s c"]:
    """Details of about `sigma` pixels and more, relative to the contrast around them.

    A difference of two blurs over its local root mean square: colours, light and sharpness that are a
    little wrong everywhere, as a network's are, cancel; edges and features count where they are.
    """
    per_pixel = image.shape[0] / 64
    band = blur(image, sigma) - blur(image, 3 * sigma + 4 * per_pixel)
    energy = blur((band**2).mean(-1, keepdims=True), 8 * per_pixel)
    return band / jnp.sqrt(energy + 0.03**2)


class _Step(NamedTuple):
    unknowns: Array
    residual: Array


def _step(problem, observed, previous, change, motion, unknowns, sigma, active):
    """One Gauss-Newton step at blur `sigma` pixels.

    Args:
      previous: unknowns of the last frame, towards which the solution is drawn; `change` (k,) is the
        standard deviation of the difference (infinite: no pull).
      motion: `_motion` at or near `unknowns`.
      active: (k,) 1 where an unknown may move.

    Returns:
      The new unknowns, and the robust residual before the step (RMS in units of the local contrast).
    """
    size = observed.shape[0]
    faces = mesh_faces(problem.head)
    fragments = rasterize(_screen(problem, unknowns), faces, size)
    rendered = render(
        problem.head,
        problem.identity,
        _coefficients(problem, unknowns),
        problem.camera,
        problem.crop,
        problem.appearance,
        size,
    )
    rendered, observed = contrast_features(rendered, sigma), contrast_features(observed, sigma)

    face, bary = _spread(fragments.face, fragments.bary, max(2, size // 16))
    inside = face >= 0
    corners = faces[jnp.maximum(face, 0)]
    flow = jnp.einsum("rcv,rcvxk->rcxk", bary * inside[..., None], motion[corners])

    trust = jnp.einsum("rcv,rcv->rc", bary, problem.trust[corners])

    difference = observed - rendered
    # Median absolute deviation as the scale of the noise; Huber weights beyond 1.5 of it.
    spread = jnp.nanmedian(jnp.where(inside[..., None], jnp.abs(difference), jnp.nan)) * 1.48
    noise = jnp.maximum(jnp.nan_to_num(spread), _NOISE_FLOOR)
    weight = (inside * trust)[..., None] * jnp.minimum(
        1, 1.5 * noise / jnp.maximum(jnp.abs(difference), 1e-6)
    )

    gradient = (_gradient(rendered) + _gradient(observed)) / 2
    # Neighbouring pixels of a blurred image repeat each other, and errors that are not noise (a face
    # that is not quite the known one) stretch over whole features: count independent ones.
    repeats = (1 + 4 * jnp.pi * sigma**2) * (1 + (noise / _MODEL_ERROR) ** 2)
    scale = 1 / (noise**2 * repeats)
    tensor = jnp.einsum("rcn,rcnx,rcny->rcxy", weight, gradient, gradient) * scale
    pull = jnp.einsum("rcn,rcnx,rcn->rcx", weight, gradient, difference) * scale
    # A point that moves by d shows at p what was at p - d: the image changes by -gradient . d.
    flow = -flow * active
    normal = jnp.einsum(
        "rcxk,rcxl->kl", flow, jnp.einsum("rcxy,rcyl->rcxl", tensor, flow), precision=_PRECISION
    )
    right = jnp.einsum("rcxk,rcx->k", flow, pull, precision=_PRECISION)

    inertia = 1 / change**2
    normal = normal + jnp.diag(1 + inertia + 1e-4 * jnp.diag(normal))
    right = right - unknowns * active - inertia * (unknowns - previous) * active
    step = jnp.linalg.solve(normal, right)
    # A step of more than one standard deviation leaves what the linearisation can see.
    step = step * jnp.minimum(1, 0.7 / jnp.maximum(jnp.abs(step).max(), 1e-9)) * active
    residual = jnp.sqrt((weight * difference**2).sum() / jnp.maximum(weight.sum(), 1))
    return _Step(_within_bounds(problem, unknowns + step), residual)


def _descend(problem, observed, previous, change, unknowns, sigmas, active):
    """One Gauss-Newton step for each entry of `sigmas` (n,) and `active` (n, k).

    Returns:
      The unknowns after all steps, and the robust residual before the last one.
    """

    def body(unknowns, item):
        sigma, active = item
        motion = _motion(problem, unknowns)
        step = _step(problem, observed, previous, change, motion, unknowns, sigma, active)
        return step.unknowns, step.residual

    unknowns, residuals = jax.lax.scan(body, unknowns, (sigmas, active))
    return unknowns, residuals[-1]


def start_pose(
    head: HeadAsset, identity: Identity, camera: Camera, crop: Float[Array, " 4"]
) -> tuple[Float[Array, " 3"], Float[Array, " 3"]]:
    """`rot` and `tra` of a head that faces the camera and fills the crop box as a fitted box would.

    The search for coefficients starts here, so that it knows nothing of what it looks for.
    """
    flip = jnp.diag(jnp.array([1.0, -1.0, -1.0]))
    # Camera axes = E flip R head axes, and a head that faces the camera has flip: R = flip E^T flip.
    to_camera = camera.extrinsics[:3, :3]
    rotation = flip @ to_camera.T @ flip
    rot = rotvec_from_matrix(rotation)
    mask = mesh_render_mask(head)
    neutral = _neutral(head, rot, jnp.zeros(3))
    middle = (crop[:2] + crop[2:]) / 2
    side = crop[2] - crop[0]
    focal = camera.intrinsics[:2]

    def refine(_, position):
        # `position` is the head's origin in camera axes.
        tra = flip @ (to_camera.T @ (position - camera.extrinsics[:3, 3]))
        points = camera_from_world(world_vertices(head, identity, neutral._replace(tra=tra)), camera)
        pixels = project(points, camera)
        box = crop_box(jnp.where(mask[:, None], pixels, pixels[jnp.argmax(mask)]))
        grow = (box[2] - box[0]) / side
        shift = (middle - (box[:2] + box[2:]) / 2) * position[2] / focal
        return (position + jnp.array([shift[0], shift[1], 0.0])) * grow

    # Far enough that the whole head lies in front of the camera at first.
    extent = jnp.ptp(identity.vertices, axis=0).max()
    far = extent * focal.mean() / side + extent
    position = jax.lax.fori_loop(0, 8, refine, jnp.array([0.0, 0.0, 1.0]) * far)
    return rot, flip @ (to_camera.T @ (position - camera.extrinsics[:3, 3]))


def _neutral(head: HeadAsset, rot: Float[Array, " 3"], tra: Float[Array, " 3"]) -> Coefficients:
    zero = jnp.zeros(3)
    return Coefficients(jnp.zeros(head.n_shape), jnp.zeros(head.n_expression), rot, tra, zero, zero, zero)


@functools.partial(jax.jit, static_argnames=("prior",))
def _track_clips(frames, head, shape, appearance, camera, crop, prior):
    """`fit_photometric` for a batch of clips: all arguments but head and prior have a leading axis."""
    size = frames.shape[-2]
    per_pixel = size / 64  # blurs below are for 64 pixels

    def clip(frames, shape, appearance, camera, crop):
        identity = make_identity(head, shape)
        rot, tra = start_pose(head, identity, jax.tree.map(lambda x: x[0], camera), crop[0])
        sigma = Coefficients(
            betas=jnp.zeros(head.n_shape),
            expression=prior.expression * jnp.asarray(head.expression_sigma),
            rot=jnp.full(3, prior.rot),
            tra=jnp.full(3, prior.tra),
            neck=jnp.full(3, prior.neck),
            jaw=jnp.array(prior.jaw),
            eyes=jnp.full(3, prior.eyes),
        )

        def problem(camera, crop):
            low, high = jnp.asarray(head.expression_bounds).T
            return Problem(
                head, identity, shape, appearance, camera, crop, _neutral(head, rot, tra), sigma, low, high,
                _trust(head),
            )  # fmt: skip

        k = 15 + head.n_expression
        rigid = (jnp.arange(k) < 6).astype(jnp.float32)
        first = problem(jax.tree.map(lambda x: x[0], camera), crop[0])

        # Frame 0, from several turns of the head: first the rigid motion alone, then everything.
        turns = jnp.radians(jnp.array([-30.0, -15.0, 0.0, 15.0, 30.0]))
        turned = jax.vmap(
            lambda angle: rotvec_from_matrix(
                matrix_from_rotvec(rot) @ matrix_from_rotvec(jnp.array([0.0, 1.0, 0.0]) * angle)
            )
        )(turns)
        starts = jnp.zeros((len(turns), k)).at[:, :3].set((turned - rot) / prior.rot)
        coarse, fine = [5, 4, 4, 3, 3, 2, 2], [2, 2, 1.5, 1.5, 1, 1, 1, 1, 1, 1]
        blurs = per_pixel * jnp.array(coarse + fine, jnp.float32)
        active = jnp.where(jnp.arange(len(blurs))[:, None] < len(coarse), rigid, 1.0)
        found, residual = jax.vmap(
            lambda start: _descend(first, frames[0], start, jnp.inf, start, blurs, active)
        )(starts)
        start = found[jnp.argmin(residual)]

        # From frame to frame; frame 0 again, so that all frames end alike.
        follow = per_pixel * jnp.array([2.5, 1.7, 1.2, 1.0])
        change = jnp.full(k, prior.change).at[:3].set(prior.turn / prior.rot)
        everything = jnp.ones((len(follow), k))

        def track(unknowns, item):
            frame, camera, crop = item
            unknowns, residual = _descend(
                problem(camera, crop), frame, unknowns, change, unknowns, follow, everything
            )
            return unknowns, (unknowns, residual)

        _, (unknowns, residual) = jax.lax.scan(track, start, (frames, camera, crop))
        return jax.vmap(lambda u: _coefficients(first, u))(unknowns), residual

    return jax.vmap(clip)(frames, shape, appearance, camera, crop)


def fit_photometric_clips(
    frames: Shaped[Array, "clips n s s 3"],
    head: HeadAsset,
    shape: Float[Array, "clips n_shape"],
    appearance: Appearance,
    camera: Camera,
    crop: Float[Array, "clips ... 4"],
    prior: PhotometricPrior = PhotometricPrior(),  # noqa: B008 (a NamedTuple: nobody can change it)
) -> tuple[Coefficients, Float[np.ndarray, "clips n"]]:
    """Fit many clips at once; see `fit_photometric`. Every argument gains a leading clip axis."""
    frames = jnp.asarray(frames)
    if frames.ndim != 5 or frames.shape[2] != frames.shape[3] or frames.shape[4] != 3:
        raise ValueError(
            f"fit_photometric_clips: frames have shape {frames.shape}, expected (clips, n, s, s, 3)"
        )
    if jnp.issubdtype(frames.dtype, jnp.integer):
        frames = frames.astype(jnp.float32) / 255
    clips, n = frames.shape[:2]

    def per_frame(value, item):
        value = jnp.asarray(value, jnp.float32)
        if value.ndim == 1 + item:
            value = value[:, None]
        return jnp.broadcast_to(value, (clips, n, *value.shape[2:]))

    camera = Camera(per_frame(camera.intrinsics, 1), per_frame(camera.extrinsics, 2))
    coefficients, residual = _track_clips(
        frames, head, jnp.asarray(shape), appearance, camera, per_frame(crop, 1), prior
    )
    return coefficients, np.asarray(residual)


def fit_photometric(
    frames: Shaped[Array, "n s s 3"],
    head: HeadAsset,
    shape: Float[Array, " n_shape"],
    appearance: Appearance,
    camera: Camera,
    crop: Float[Array, "... 4"],
    prior: PhotometricPrior = PhotometricPrior(),  # noqa: B008 (a NamedTuple: nobody can change it)
) -> tuple[Coefficients, Float[np.ndarray, " n"]]:
    """Read the coefficients of consecutive frames of a known head back from its pixels.

    Args:
      frames: cropped square frames, uint8 or float in [0, 1].
      head, shape, appearance: who is seen.
      camera: fields unbatched or (n, ...); intrinsics in pixels of the uncropped frame.
      crop: crop box (4,) or (n, 4): x0, y0, x1, y1 in those pixels.
      prior: how far coefficients stray from a neutral head, and from frame to frame.

    Returns:
      Coefficients with fields (n, ...), and the residual (n,): robust root mean square of the
      differences in units of the local contrast, 0 for a perfect fit, above 1 for unrelated images. How
      the total rotation R(rot) R(neck) splits between
      the two is not observable where no shoulders show; the total is.

    Raises:
      ValueError: frames are not (n, s, s, 3).
    """
    frames = jnp.asarray(frames)
    if frames.ndim != 4:
        raise ValueError(f"fit_photometric: frames have shape {frames.shape}, expected (n, s, s, 3)")
    coefficients, residual = fit_photometric_clips(
        *jax.tree.map(lambda x: jnp.asarray(x)[None], (frames,)),
        head,
        *jax.tree.map(lambda x: jnp.asarray(x)[None], (shape, appearance, camera, crop)),
        prior,
    )
    return jax.tree.map(lambda x: x[0], coefficients), residual[0]
