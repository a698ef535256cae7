"""Refines the rigid motion of a landmark fit by the pictures (`--photometric` in data_prep.build).

For a clip one colour a vertex and one lighting (spherical harmonics up to degree 2, Ramamoorthi and
Hanrahan 2001, section 3, on the normals in the world frame) are estimated from frames spread over it. Then
each frame's head is moved, six numbers, until its render through the rasteriser looks like the frame, in the
sense of `loki_jax.fitting.contrast`; the landmark fit is the prior. Gauss-Newton; the
Jacobian is that of the render (forward mode through the interpolation; outlines are left out). A frame keeps
its landmark pose where the picture gets no closer. Shape, expression, jaw and eyes stay as they are.

It helps where landmarks tremble, because all frames are compared with one texture of the clip. It cannot
correct a constant offset, because the texture comes from the same poses.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import ndc_from_world
from loki_jax.face.crop import crop_and_resize
from loki_jax.face.normals import vertex_normals
from loki_jax.face.rotation import matrix_from_rotvec, rotvec_from_matrix
from loki_jax.face.skinning import make_identity, mesh_faces, mesh_render_mask, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.clips import FittedClip
from loki_jax.fitting.contrast import contrast_features, huber_cost, huber_weight, noise_level, repetitions
from loki_jax.fitting.fit import reprojection_error
from loki_jax.fitting.problem import HIGHEST, pad_frames
from loki_jax.raster.api import rasterize
from loki_jax.raster.fragments import interpolate


@dataclasses.dataclass(frozen=True)
class PhotometricSettings:
    """What `refine` does.

    Attributes:
      size: side in pixels of the crop that is compared.
      blur: standard deviation in these pixels of the finest details compared.
      texture_frames: frames that colours and light come from.
      rounds: how often texture and poses are estimated in turn.
      steps: Gauss-Newton steps of each frame and round.
      window: frames; only what changes faster than their moving average is corrected, because what is slow
        is as wrong in the texture as in the poses.
      model_error: differences in units of the local contrast that are the model's and not the pixel's.
    """

    size: int = 128
    blur: float = 1.0
    texture_frames: int = 24
    rounds: int = 2
    steps: int = 2
    window: int = 5
    model_error: float = 0.1


class ClipAppearance(NamedTuple):
    """Colours of one clip: `albedo` of every vertex, whether it was seen, and the light's coefficients."""

    albedo: Float[Array, "V 3"]
    known: Bool[Array, " V"]
    light: Float[Array, "9 3"]


def harmonics(normals: Float[Array, "*b 3"]) -> Float[Array, "*b 9"]:
    """Real spherical harmonics of degree 0, 1 and 2 at unit vectors."""
    x, y, z = normals[..., 0], normals[..., 1], normals[..., 2]
    return jnp.stack(
        [
            0.282095 * jnp.ones_like(x), 0.488603 * y, 0.488603 * z, 0.488603 * x,
            1.092548 * x * y, 1.092548 * y * z, 0.315392 * (3 * z * z - 1), 1.092548 * x * z,
            0.546274 * (x * x - y * y),
        ],
        axis=-1,
    )  # fmt: skip


def steadiness(head: HeadAsset) -> Float[Array, " V_all"]:
    """1 for surface that only the head's motion moves, 1/2 where expressions move it by about a millimetre.

    A slightly wrong expression would otherwise be taken for the head's motion. Eyeballs have 0.
    """
    reach = jnp.sum((head.expression_basis * head.expression_sigma[:, None, None]) ** 2, axis=(0, 2))
    steady = 1 / (1 + reach / 1e-3**2)
    for name in ("left_eye", "right_eye"):
        if head.joint(name) is not None:
            steady *= head.skinning_weights[:, head.joint(name)] < 0.5
    extra = mesh_render_mask(head).shape[0] - len(steady)  # an inner mouth
    return jnp.concatenate([steady * ~head.inner_mouth, jnp.zeros(extra)])


@jax.jit
def _samples(head: HeadAsset, coefficients: Coefficients, camera: Camera, crop, images):
    """For each frame and vertex the picture's colour, the harmonics, and how squarely it is seen (0: not)."""
    faces = mesh_faces(head)
    shown = mesh_render_mask(head)
    size = images.shape[1]

    def frame(item):
        coefficients, image = item
        world = world_vertices(head, make_identity(head, coefficients.betas), coefficients)
        normals = vertex_normals(world, faces)
        ndc = ndc_from_world(world, camera, crop)
        winner = rasterize(ndc, faces, size).face
        seen = (
            jnp.zeros(len(world))
            .at[faces[jnp.maximum(winner, 0)]]
            .max((winner >= 0)[..., None].astype(float))
        )
        column, row = ((1 - ndc[:, k]) * size / 2 - 0.5 for k in (0, 1))
        colour = jnp.stack(
            [jax.scipy.ndimage.map_coordinates(image[..., c], [row, column], order=1) for c in range(3)], -1
        )
        # The camera of a fit is at the world's origin.
        towards = -world / jnp.linalg.norm(world, axis=-1, keepdims=True)
        square = jnp.maximum(jnp.sum(normals * towards, -1), 0)
        return colour, harmonics(normals), jnp.where(shown, seen * square**2, 0)

    return jax.lax.map(frame, (coefficients, images))


@jax.jit
def solve_appearance(
    colour: Float[Array, "n V 3"], basis: Float[Array, "n V 9"], weight: Float[Array, "n V"]
) -> ClipAppearance:
    """Albedo and light in turn, each by least squares given the other.

    Args:
      colour, basis, weight: of every frame and vertex the picture's colour, the harmonics and the weight.
    """
    ambient = jnp.zeros((9, 3)).at[0].set(1 / 0.282095)

    def albedo_of(light):
        shade = jnp.maximum(jnp.einsum("nvh,hc->nvc", basis, light, precision=HIGHEST), 0.05)
        above = jnp.einsum("nv,nvc,nvc->vc", weight, shade, colour)
        below = jnp.einsum("nv,nvc,nvc->vc", weight, shade, shade)
        return above / jnp.maximum(below, 1e-4)

    def improve(_, light):
        albedo = albedo_of(light)

        def channel(albedo, colour, start):
            rows = basis * albedo[:, None]
            normal = jnp.einsum("nv,nvh,nvk->hk", weight, rows, rows, precision=HIGHEST)
            right = jnp.einsum("nv,nvh,nv->h", weight, rows, colour, precision=HIGHEST)
            ridge = 0.02 * jnp.trace(normal)
            return jnp.linalg.solve(normal + ridge * jnp.eye(9), right + ridge * start)

        return jax.vmap(channel, in_axes=(-1, -1, -1), out_axes=-1)(albedo, colour, ambient)

    light = jax.lax.fori_loop(0, 3, improve, ambient)
    return ClipAppearance(albedo_of(light), weight.sum(0) > 0.05, light)


def _centre(head: HeadAsset, coefficients: Coefficients) -> Float[Array, "3"]:
    """The middle of the shown part of the posed head, world frame."""
    world = world_vertices(head, make_identity(head, coefficients.betas), coefficients)
    mask = mesh_render_mask(head)
    return jnp.sum(jnp.where(mask[:, None], world, 0), 0) / mask.sum()


@jax.jit
def _apply(head: HeadAsset, coefficients: Coefficients, changes: Float[Array, "N 6"]) -> Coefficients:
    def frame(item):
        coefficients, change = item
        return _moved(coefficients, _centre(head, coefficients), change)

    return jax.lax.map(frame, (coefficients, changes))


def trembling(values: Float[np.ndarray, "N k"]) -> Float[np.ndarray, " k"]:
    """Standard deviation of the noise on smooth columns, from their fourth differences.

    White noise of variance v has fourth differences of variance 70 v; a swing of 1 Hz at 25 frames a second
    keeps 0.4 % of its amplitude in them.
    """
    return 1.4826 * np.median(np.abs(np.diff(values, n=4, axis=0)), axis=0) / np.sqrt(70)


def fast_part(changes: Float[np.ndarray, "N k"], window: int) -> Float[np.ndarray, "N k"]:
    """What is left of `changes` without its moving average (shorter at the ends)."""
    kernel = np.ones(window)
    counts = np.convolve(np.ones(len(changes)), kernel, "same")[:, None]
    slow = np.stack([np.convolve(column, kernel, "same") for column in changes.T], -1)
    return changes - slow / counts


def _moved(coefficients: Coefficients, centre, change) -> Coefficients:
    """The head turned by change[:3] about `centre` (world) and moved by change[3:]."""
    turn = matrix_from_rotvec(change[:3])
    rot = rotvec_from_matrix(jnp.matmul(turn, matrix_from_rotvec(coefficients.rot), precision=HIGHEST))
    tra = jnp.matmul(turn, coefficients.tra - centre, precision=HIGHEST) + centre + change[3:]
    return coefficients._replace(rot=rot, tra=tra)


@functools.partial(jax.jit, static_argnames=("blur", "steps"))
def _changes(
    head,
    coefficients,
    camera,
    crop,
    appearance: ClipAppearance,
    images,
    sigma,
    model_error,
    blur: float,
    steps: int,
) -> Float[Array, "N 6"]:
    """Turn and shift of each frame about its `_centre`; a step counts only if it lowers the cost."""
    faces = mesh_faces(head)
    size = images.shape[1]
    trust = steadiness(head)
    usable = appearance.known & mesh_render_mask(head) & (trust > 0)

    def frame(item):
        start, stored = item
        image = stored.astype(jnp.float32) / 255
        centre = _centre(head, start)
        observed = contrast_features(image, blur)

        def picture(change):
            moved = _moved(start, centre, change)
            world = world_vertices(head, make_identity(head, start.betas), moved)
            shade = jnp.matmul(harmonics(vertex_normals(world, faces)), appearance.light, precision=HIGHEST)
            fragments = rasterize(ndc_from_world(world, camera, crop), faces, size)
            drawn = interpolate(fragments, faces, appearance.albedo * jnp.maximum(shade, 0.05))
            # Outside the head the observed picture is used: no difference, no edge.
            inside = (fragments.face >= 0) & usable[faces[jnp.maximum(fragments.face, 0)]].all(-1)
            weight = inside * interpolate(fragments, faces, trust[:, None])[..., 0]
            return jnp.where(inside[..., None], drawn, image), jax.lax.stop_gradient(weight)

        def difference(change):
            drawn, weight = picture(change)
            return (contrast_features(drawn, blur) - observed) * jnp.sqrt(weight)[..., None]

        first = difference(jnp.zeros(6))
        noise = noise_level(first, jnp.any(first != 0, -1, keepdims=True))
        repeats = repetitions(noise, blur, model_error, channels=3)

        def cost(change):
            robust = huber_cost(difference(change), noise)
            return jnp.sum(robust) / repeats + 0.5 * jnp.sum((change / sigma) ** 2)

        def step(_, change):
            residual = difference(change)
            slope = jax.jacfwd(difference)(change).reshape(-1, 6)
            weight = huber_weight(residual, noise) / (noise**2 * repeats)
            weighted = slope * weight.reshape(-1, 1)
            normal = jnp.matmul(weighted.T, slope, precision=HIGHEST) + jnp.diag(1 / sigma**2)
            right = jnp.matmul(weighted.T, residual.reshape(-1), precision=HIGHEST) + change / sigma**2
            proposed = change - jnp.linalg.solve(normal, right)
            return jnp.where(cost(proposed) < cost(change), proposed, change)

        return jax.lax.fori_loop(0, steps, step, jnp.zeros(6))

    return jax.lax.map(frame, (coefficients, images))


def refine(
    clip: FittedClip, head: HeadAsset, settings: PhotometricSettings = PhotometricSettings()
) -> FittedClip:
    """The clip with `rot` and `tra` refined and its errors measured again; unchanged below 8 frames."""
    n = len(clip.frames)
    if n < 8:  # too few views: a texture would repeat the poses that it is to correct
        return clip
    fit = clip.fit
    images = np.stack([crop_and_resize(frame, clip.crop, settings.size) for frame in clip.frames])
    images = pad_frames(images)  # bytes: numbers of four would take a third of a GB a minute
    camera, crop = jax.tree.map(jnp.asarray, fit.camera), jnp.asarray(clip.crop)
    original = Coefficients(*(pad_frames(np.asarray(field)) for field in fit.coefficients))
    # Sure frames, spread over the clip; their number is fixed, so that one size is compiled.
    sure = np.flatnonzero(fit.confidence >= np.median(fit.confidence))
    chosen = sure[np.linspace(0, len(sure) - 1, settings.texture_frames).round().astype(int)]
    # How far the landmark poses tremble is how far a correction may go.
    centres = np.asarray(jax.lax.map(functools.partial(_centre, head), fit.coefficients))
    tremble = trembling(np.concatenate([fit.coefficients.rot, centres], axis=-1))
    sigma = jnp.maximum(jnp.asarray(tremble, jnp.float32), 1e-5)
    current = original
    for _ in range(settings.rounds):
        some = Coefficients(*(field[chosen] for field in current))
        appearance = solve_appearance(*_samples(head, some, camera, crop, images[chosen] / np.float32(255)))
        changes = _changes(
            head, original, camera, crop, appearance, images, sigma, settings.model_error, settings.blur,
            settings.steps,
        )  # fmt: skip
        fast = fast_part(np.asarray(changes)[:n], settings.window)
        current = jax.tree.map(np.asarray, _apply(head, original, pad_frames(fast)))
    # Frames without a face have no picture to follow.
    lost = (fit.confidence <= 0)[:, None]
    found = Coefficients(*(field[:n] for field in current))
    found = found._replace(
        rot=np.where(lost, fit.coefficients.rot, found.rot),
        tra=np.where(lost, fit.coefficients.tra, found.tra),
    )
    reprojection = reprojection_error(head, found, fit.camera, clip.track.points)
    reprojection = np.where(np.isfinite(fit.reprojection), reprojection, np.nan)
    return clip._replace(fit=fit._replace(coefficients=found, reprojection=reprojection))
