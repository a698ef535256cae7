"""Head coefficients from frames of a head whose appearance is known.

The photometric estimator of the built-in heads (method, section 10): identity, colours, camera and crop are
given; the coefficients of every frame are those with which the rendered head looks like the frame. Nothing of
the driver enters: the first frame starts from the neutral, frontal head in the middle of the crop.

Method: robust Gauss-Newton on differences of blurred, contrast-normalised images (Lucas and Kanade; the
gradient is the mean of the rendered and the observed image's, as in Benhimane and Malis 2004, "efficient
second-order minimisation"). The Jacobian of a pixel is its image gradient times the screen motion of
the surface point it shows, interpolated from the vertices; pixels just outside the outline take the
motion of the nearest surface point, so that the outline counts. From coarse to fine blur; frame t
starts from frame t - 1.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from loki_jax.arrays import ArrayLike
from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, ndc_from_world, project
from loki_jax.face.crop import crop_box
from loki_jax.face.rotation import matrix_from_rotvec, rotvec_from_matrix
from loki_jax.face.skinning import Identity, make_identity, mesh_faces, mesh_render_mask, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.contrast import contrast_features, huber_weight, noise_level, repetitions
from loki_jax.raster.api import rasterize
from loki_jax.synthetic.appearance import Appearance
from loki_jax.synthetic.shading import render

_HIGHEST = jax.lax.Precision.HIGHEST
_MODEL_ERROR = 0.1  # differences beyond this are taken to be of the model, not of the pixel
_TRUST_ELSEWHERE = 0.1
_FREE = ("rot", "tra", "neck", "jaw", "eyes", "expression")  # the order of the unknowns


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


class _Scene(NamedTuple):
    """What is known of a frame."""

    head: HeadAsset
    identity: Identity
    betas: Float[Array, " n_shape"]
    appearance: Appearance
    camera: Camera
    crop: Float[Array, " 4"]
    mean: Coefficients  # centre of the prior
    sigma: Coefficients  # its standard deviations
    trust: Float[Array, " V_all"]  # weight of each vertex's surface


def _trust(head: HeadAsset) -> Float[Array, " V_all"]:
    """1 where expressions move the surface by a millimetre, `_TRUST_ELSEWHERE` where they never do.

    The face shows where the head looks; hair, scalp, neck and shoulders are what a network that remembers a
    person badly gets wrong first.
    """
    moved = jnp.linalg.norm(head.expression_basis * head.expression_sigma[:, None, None], axis=-1).max(0)
    inside = jnp.ones(mesh_render_mask(head).shape[0] - moved.shape[0])
    reach = jnp.concatenate([jnp.clip(moved / 5e-4, 0, 1), inside])
    return _TRUST_ELSEWHERE + (1 - _TRUST_ELSEWHERE) * reach


def _coefficients(scene: _Scene, unknowns: Float[Array, " k"]) -> Coefficients:
    """Coefficients of unknowns counted in standard deviations of the prior."""
    values, start = {"betas": scene.betas}, 0
    for field in _FREE:
        mean, sigma = getattr(scene.mean, field), getattr(scene.sigma, field)
        values[field] = mean + sigma * unknowns[start : start + len(mean)]
        start += len(mean)
    return Coefficients(**values)


def _within_bounds(scene: _Scene, unknowns: Float[Array, " k"]) -> Float[Array, " k"]:
    low, high = jnp.asarray(scene.head.expression_bounds).T
    n = len(low)
    sigma = jnp.maximum(scene.sigma.expression, 1e-9)
    mean = scene.mean.expression
    return unknowns.at[-n:].set(jnp.clip(unknowns[-n:], (low - mean) / sigma, (high - mean) / sigma))


def _screen(scene: _Scene, unknowns: Float[Array, " k"]) -> Float[Array, "V 3"]:
    """Vertices in NDC."""
    world = world_vertices(scene.head, scene.identity, _coefficients(scene, unknowns))
    return ndc_from_world(world, scene.camera, scene.crop)


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


def _gradient(image: Float[Array, "s s c"]) -> Float[Array, "s s c 2"]:
    """Central differences along NDC x (left) and y (up), per unit of NDC."""
    half = image.shape[0] / 2
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    along_columns = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    along_rows = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    return -half * jnp.stack([along_columns, along_rows], -1)


def _step(scene, observed, previous, change, unknowns, sigma, active):
    """One Gauss-Newton step at blur `sigma` pixels.

    Args:
      previous: unknowns of the last frame, towards which the solution is drawn; `change` (k,) is the
        standard deviation of the difference (infinite: no pull).
      active: (k,) 1 where an unknown may move.

    Returns:
      The new unknowns, and the robust residual before the step (RMS in units of the local contrast).
    """
    size = observed.shape[0]
    # Screen motion (NDC) of every vertex per unit of each unknown, (V, 2, k).
    motion = jax.jacfwd(lambda u: _screen(scene, u)[:, :2])(unknowns)
    faces = mesh_faces(scene.head)
    fragments = rasterize(_screen(scene, unknowns), faces, size)
    rendered = render(
        scene.head,
        scene.identity,
        _coefficients(scene, unknowns),
        scene.camera,
        scene.crop,
        scene.appearance,
        size,
    )
    rendered, observed = contrast_features(rendered, sigma), contrast_features(observed, sigma)

    face, bary = _spread(fragments.face, fragments.bary, max(2, size // 16))
    inside = face >= 0
    corners = faces[jnp.maximum(face, 0)]
    flow = jnp.einsum("rcv,rcvxk->rcxk", bary * inside[..., None], motion[corners])

    trust = jnp.einsum("rcv,rcv->rc", bary, scene.trust[corners])

    difference = observed - rendered
    noise = noise_level(difference, inside[..., None])
    weight = (inside * trust)[..., None] * huber_weight(difference, noise)

    gradient = (_gradient(rendered) + _gradient(observed)) / 2
    scale = 1 / (noise**2 * repetitions(noise, sigma, _MODEL_ERROR))
    tensor = jnp.einsum("rcn,rcnx,rcny->rcxy", weight, gradient, gradient) * scale
    pull = jnp.einsum("rcn,rcnx,rcn->rcx", weight, gradient, difference) * scale
    # A point that moves by d shows at p what was at p - d: the image changes by -gradient . d.
    flow = -flow * active
    normal = jnp.einsum(
        "rcxk,rcxl->kl", flow, jnp.einsum("rcxy,rcyl->rcxl", tensor, flow), precision=_HIGHEST
    )
    right = jnp.einsum("rcxk,rcx->k", flow, pull, precision=_HIGHEST)

    inertia = 1 / change**2
    normal = normal + jnp.diag(1 + inertia + 1e-4 * jnp.diag(normal))
    right = right - unknowns * active - inertia * (unknowns - previous) * active
    step = jnp.linalg.solve(normal, right)
    # The linearisation does not hold for steps of more than about one standard deviation.
    step = step * jnp.minimum(1, 0.7 / jnp.maximum(jnp.abs(step).max(), 1e-9)) * active
    residual = jnp.sqrt((weight * difference**2).sum() / jnp.maximum(weight.sum(), 1))
    return _within_bounds(scene, unknowns + step), residual


def _descend(scene, observed, previous, change, unknowns, sigmas, active):
    """One Gauss-Newton step for each entry of `sigmas` (n,) and `active` (n, k).

    Returns:
      The unknowns after all steps, and the robust residual before the last one.
    """
    step = lambda unknowns, item: _step(scene, observed, previous, change, unknowns, *item)
    unknowns, residuals = jax.lax.scan(step, unknowns, (sigmas, active))
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
        box = crop_box(pixels, mask=mask)
        grow = (box[2] - box[0]) / side
        shift = (middle - (box[:2] + box[2:]) / 2) * position[2] / focal
        return (position + jnp.array([shift[0], shift[1], 0.0])) * grow

    # Far enough that the whole head is in front of the camera at first.
    extent = jnp.ptp(identity.vertices, axis=0).max()
    far = extent * focal.mean() / side + extent
    position = jax.lax.fori_loop(0, 8, refine, jnp.array([0.0, 0.0, 1.0]) * far)
    return rot, flip @ (to_camera.T @ (position - camera.extrinsics[:3, 3]))


def _neutral(head: HeadAsset, rot: Float[Array, " 3"], tra: Float[Array, " 3"]) -> Coefficients:
    zero = jnp.zeros(3)
    return Coefficients(jnp.zeros(head.n_shape), jnp.zeros(head.n_expression), rot, tra, zero, zero, zero)


def _in_unit_range(frame: Shaped[Array, "s s 3"]) -> Float[Array, "s s 3"]:
    """A frame of bytes as floats: one at a time, which takes a quarter of the memory of a clip of floats."""
    return frame.astype(jnp.float32) / 255 if jnp.issubdtype(frame.dtype, jnp.integer) else frame


@functools.partial(jax.jit, static_argnames=("prior",))
def _track_clips(frames, head, betas, appearance, camera, crop, prior):
    """`fit_photometric` for a batch of clips: all arguments but head and prior have a leading axis."""
    size = frames.shape[-2]
    per_pixel = size / 64  # blurs below are for 64 pixels

    def clip(frames, betas, appearance, camera, crop):
        identity = make_identity(head, betas)
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

        def scene(camera, crop):
            neutral = _neutral(head, rot, tra)
            return _Scene(head, identity, betas, appearance, camera, crop, neutral, sigma, _trust(head))

        k = 15 + head.n_expression
        rigid = (jnp.arange(k) < 6).astype(jnp.float32)
        first = scene(jax.tree.map(lambda x: x[0], camera), crop[0])

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
            lambda start: _descend(first, _in_unit_range(frames[0]), start, jnp.inf, start, blurs, active)
        )(starts)
        start = found[jnp.argmin(residual)]

        # From frame to frame; frame 0 again, so that all frames end alike.
        follow = per_pixel * jnp.array([2.5, 1.7, 1.2, 1.0])
        change = jnp.full(k, prior.change).at[:3].set(prior.turn / prior.rot)
        everything = jnp.ones((len(follow), k))

        def track(unknowns, item):
            frame, camera, crop = item
            unknowns, residual = _descend(
                scene(camera, crop), _in_unit_range(frame), unknowns, change, unknowns, follow, everything
            )
            return unknowns, (unknowns, residual)

        _, (unknowns, residual) = jax.lax.scan(track, start, (frames, camera, crop))
        return jax.vmap(lambda u: _coefficients(first, u))(unknowns), residual

    return jax.vmap(clip)(frames, betas, appearance, camera, crop)


def fit_photometric_clips(
    frames: Shaped[ArrayLike, "..."],
    head: HeadAsset,
    betas: Float[ArrayLike, "clips n_shape"],
    appearance: Appearance,
    camera: Camera,
    crop: Float[ArrayLike, "clips *n 4"],
    prior: PhotometricPrior = PhotometricPrior(),  # noqa: B008 (a NamedTuple: nobody can change it)
) -> tuple[Coefficients, Float[np.ndarray, "clips n"]]:
    """Fit many clips at once: `fit_photometric` with a leading clip axis on all arrays.

    Raises:
      ValueError: frames are not (clips, n, s, s, 3).
    """
    frames = jnp.asarray(frames)
    if frames.ndim != 5 or frames.shape[2] != frames.shape[3] or frames.shape[4] != 3:
        raise ValueError(
            f"fit_photometric_clips: frames have shape {frames.shape}, expected (clips, n, s, s, 3)"
        )
    clips, n = frames.shape[:2]

    def per_frame(value, item):
        value = jnp.asarray(value, jnp.float32)
        if value.ndim == 1 + item:
            value = value[:, None]
        return jnp.broadcast_to(value, (clips, n, *value.shape[2:]))

    camera = Camera(per_frame(camera.intrinsics, 1), per_frame(camera.extrinsics, 2))
    coefficients, residual = _track_clips(
        frames, head, jnp.asarray(betas), appearance, camera, per_frame(crop, 1), prior
    )
    return coefficients, np.asarray(residual)


def fit_photometric(
    frames: Shaped[ArrayLike, "..."],
    head: HeadAsset,
    betas: Float[ArrayLike, " n_shape"],
    appearance: Appearance,
    camera: Camera,
    crop: Float[ArrayLike, "*n 4"],
    prior: PhotometricPrior = PhotometricPrior(),  # noqa: B008 (a NamedTuple: nobody can change it)
) -> tuple[Coefficients, Float[np.ndarray, " n"]]:
    """Estimate the coefficients of consecutive frames of a known head from their pixels.

    Args:
      frames: (n, s, s, 3), cropped, uint8 or float in [0, 1].
      head, betas, appearance: the head that is seen.
      camera: fields unbatched or (n, ...); intrinsics in pixels of the uncropped frame.
      crop: crop box (4,) or (n, 4): x0, y0, x1, y1 in those pixels.
      prior: how far coefficients are from a neutral head, and change from frame to frame.

    Returns:
      Coefficients with fields (n, ...), and the residual (n,): robust root mean square of the differences
      in units of the local contrast, 0 for a perfect fit, above 1 for unrelated images. The total rotation
      R(rot) R(neck) is observable; how it splits between the two is not where no shoulders show.

    Raises:
      ValueError: frames are not (n, s, s, 3).
    """
    frames = jnp.asarray(frames)
    if frames.ndim != 4:
        raise ValueError(f"fit_photometric: frames have shape {frames.shape}, expected (n, s, s, 3)")
    one_clip = lambda tree: jax.tree.map(lambda x: jnp.asarray(x)[None], tree)
    coefficients, residual = fit_photometric_clips(
        frames[None], head, one_clip(betas), one_clip(appearance), one_clip(camera), one_clip(crop), prior
    )
    return jax.tree.map(lambda x: x[0], coefficients), residual[0]
