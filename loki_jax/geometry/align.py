"""A fitted head moved onto the landmarks of its portrait (method, section 18).

A parametric head is a few pixels off the eyes and lips of a picture. That is nothing for a pose, but
whoever moves the picture's pixels by the head needs lids and lips exactly. So the vertices are displaced,
smoothly, until their landmarks are where the landmark networks saw them. Lids and lips are displaced
together where they are off together, and apart from each other in proportion to how far they are open, so
that they still close.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.interpolate
import scipy.spatial
from jaxtyping import Array, Float

from loki_jax.arrays import ArrayLike
from loki_jax.face.asset import HeadAsset
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.retarget import head_rotation
from loki_jax.face.skinning import Identity, head_vertices, landmark_positions, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.points import FACE_OVAL, IRISES, LANDMARK_SET, LIDS_LEFT, LIDS_RIGHT

# Upper and lower points of what opens: the inner lips, the lids of the right and of the left eye.
_INNER_LIPS = (
    *((191, 95), (80, 88), (81, 178), (82, 87), (13, 14), (312, 317), (311, 402), (310, 318), (415, 324)),
)
_RIGHT_LIDS = tuple(zip(LIDS_RIGHT[9:], LIDS_RIGHT[1:8], strict=True))
_LEFT_LIDS = tuple(zip(LIDS_LEFT[9:], LIDS_LEFT[1:8], strict=True))
OPENINGS = tuple(np.array(pairs).T for pairs in (_INNER_LIPS, _RIGHT_LIDS, _LEFT_LIDS))

_REACH = 0.02  # metres from the nearest landmark within which a displacement fades by 1/e
_CLOSED = 0.0004  # metres: an opening smaller than this is closed
_BLINK = (
    0.2,
    0.6,
)  # of the neutral opening: below the first lids are shut, from the second on as the model says
# Metres, the same for lips: fits of closed ones are 1 mm apart, because the networks see them so.
_LIPS = (0.0014, 0.005)
_ROUNDS = 3


class Alignment(NamedTuple):
    """Displacements of a head's vertices onto the landmarks of a portrait, metres.

    Attributes:
      common: of all poses.
      opening: further ones for lips, right and left lids, at the openings of the portrait.
      gaps: those openings of the model (`openings`), metres.
      closing: displacement that closes right and left lids, per metre between them.
      lips: upward displacement that closes each of the pairs of points of the lips, per metre between them.
      limits: openings below the first are shut, from the second on they are as the model says; metres.
    """

    common: Float[ArrayLike, "V 3"]
    opening: Float[ArrayLike, "3 V 3"]
    gaps: Float[ArrayLike, " 3"]
    closing: Float[ArrayLike, "2 V 3"]
    lips: Float[ArrayLike, "9 V"]
    limits: Float[ArrayLike, "2 3"]


def no_alignment(n_vertices: int) -> Alignment:
    """The head as it was fitted."""
    zero = np.zeros((3, n_vertices, 3), np.float32)
    return Alignment(
        zero[0], zero, np.ones(3, np.float32), zero[1:], np.zeros((len(_INNER_LIPS), n_vertices), np.float32),
        np.array([[0.0] * 3, [1e-6] * 3], np.float32),
    )  # fmt: skip


def align(
    head: HeadAsset,
    identity: Identity,
    coefficients: Coefficients,
    camera: Camera,
    points: Float[np.ndarray, "478 _"],
) -> Alignment:
    """Displacements that bring the head's landmarks to `points`, in pixels of the portrait.

    Args:
      coefficients: of the portrait, without leading axes.
    """
    marks = head.landmarks[LANDMARK_SET]
    present = np.asarray(marks.face) >= 0
    n_vertices = np.asarray(identity.vertices).shape[-2]
    domain = _open_mouth(head, identity, coefficients)
    canonical = np.asarray(landmark_positions(head, domain, LANDMARK_SET), np.float64)
    used = present & ~np.isin(np.arange(len(present)), IRISES)
    # Of landmarks at one place of the head, those of the openings count.
    order = np.concatenate([np.concatenate(OPENINGS, axis=None), np.arange(len(present))])
    order = order[np.sort(np.unique(order, return_index=True)[1])]
    _, first = np.unique(np.round(canonical[order], 4), axis=0, return_index=True)
    used &= np.isin(np.arange(len(present)), order[first])
    # The network slides the face oval along the silhouette.
    trust = np.where(np.isin(np.arange(len(present)), FACE_OVAL), 0.5, 1.0)
    neutral = np.asarray(landmark_positions(head, jnp.asarray(identity.vertices), LANDMARK_SET), np.float64)
    wide = np.asarray(openings(head, jnp.asarray(identity.vertices)))
    # The upper lid comes down to the lower one, lips meet half-way.
    shut = np.zeros((2, len(present), 3))
    for k, (upper, lower) in enumerate(OPENINGS[1:]):
        shut[k, upper] = _toward(neutral[lower] - neutral[upper])
    meet = np.zeros((len(present), len(_INNER_LIPS)))
    for k, (upper, lower) in enumerate(_INNER_LIPS):
        meet[upper, k], meet[lower, k] = -0.5, 0.5
    alignment = no_alignment(n_vertices)._replace(
        closing=np.stack([_spread(domain, canonical, x, used) for x in shut]),
        lips=_spread(domain, canonical, meet, used).T,
        limits=np.array([[low, *(_BLINK[j] * wide[1:])] for j, low in enumerate(_LIPS)], np.float32),
    )
    gaps = openings(head, head_vertices(head, identity, coefficients))
    alignment = alignment._replace(gaps=np.asarray(_blinked(alignment, gaps)))
    for _ in range(_ROUNDS):
        residual = trust[:, None] * _residual(head, identity, coefficients, camera, alignment, points)
        apart = np.zeros((3, len(present), 3))
        for k, (upper, lower) in enumerate(OPENINGS):
            half = (residual[upper] - residual[lower]) / 2
            apart[k, upper], apart[k, lower] = half, -half
        together = residual - apart.sum(0)
        alignment = alignment._replace(
            common=alignment.common + _spread(domain, canonical, together, used),
            opening=alignment.opening + np.stack([_spread(domain, canonical, x, used) for x in apart]),
        )
    return alignment


def openings(head: HeadAsset, vertices: Float[ArrayLike, "*b V 3"]) -> Float[Array, "*b 3"]:
    """How far lips, right and left lids are open, metres: the mean height of the upper points of the lips
    above the lower ones, the mean distance between those of the lids.
    """
    lips, *lids = _offsets(head, jnp.asarray(vertices))
    distance = [jnp.maximum(jnp.mean(lips[..., 1], axis=-1), 0.0)]
    distance += [jnp.mean(jnp.linalg.norm(x, axis=-1), axis=-1) for x in lids]
    return jnp.stack(distance, axis=-1)


def _offsets(head: HeadAsset, vertices: Float[Array, "*b V 3"]) -> list[Float[Array, "*b n 3"]]:
    """From lower to upper points of lips, right and left lids, metres."""
    points = landmark_positions(head, vertices, LANDMARK_SET)
    return [points[..., upper, :] - points[..., lower, :] for upper, lower in OPENINGS]


def aligned_identity(
    head: HeadAsset, identity: Identity, alignment: Alignment, coefficients: Coefficients
) -> Identity:
    """The identity with its vertices (*b, V, 3) displaced for the openings of `coefficients` (*b)."""
    vertices = head_vertices(head, identity, coefficients)
    gaps = openings(head, vertices)
    blinked = _blinked(alignment, gaps)
    share = jnp.clip((blinked + _CLOSED) / (alignment.gaps + _CLOSED), 0.0, 1.0)
    opened = jnp.einsum("...k,kvc->...vc", share, alignment.opening)
    shut = jnp.einsum("...k,kvc->...vc", (gaps - blinked)[..., 1:], alignment.closing)
    # Lips of fits are apart in the middle more than at their corners.
    height = jnp.maximum(_offsets(head, vertices)[0][..., 1], 0.0)
    meet = (1 - blinked[..., :1] / jnp.maximum(gaps[..., :1], 1e-6)) * height
    shut = shut.at[..., 1].add(jnp.einsum("...k,kv->...v", meet, alignment.lips))
    return identity._replace(vertices=identity.vertices + alignment.common + opened + shut)


def _blinked(alignment: Alignment, gaps: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
    """Openings where those that are nearly closed are shut: fits of blinks and of closed lips stop short."""
    shut, full = alignment.limits
    return jnp.where(gaps < full, jnp.maximum(gaps - shut, 0.0) * full / (full - shut), gaps)


def _toward(offset: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """Offsets from upper to lower points over their mean length; straight down where they hardly differ."""
    length = np.linalg.norm(offset, axis=-1).mean()
    return offset / length if length > _CLOSED else np.broadcast_to([0.0, -1.0, 0.0], offset.shape)


def _residual(head, identity, coefficients, camera, alignment, points) -> Float[np.ndarray, "478 3"]:
    """What the landmarks lack to `points`, in the head's own axes, metres."""
    moved = aligned_identity(head, identity, alignment, coefficients)
    world = world_vertices(head, moved, coefficients)
    place = np.asarray(camera_from_world(landmark_positions(head, world, LANDMARK_SET), camera), np.float64)
    pixels = np.asarray(project(jnp.asarray(place, jnp.float32), camera))
    lateral = (points[:, :2] - pixels) * (place[:, 2:] / np.asarray(camera.intrinsics)[:2])
    in_camera = np.concatenate([lateral, np.zeros((len(lateral), 1))], axis=1)
    in_world = in_camera @ np.asarray(camera.extrinsics)[:3, :3] * np.array([1.0, -1.0, -1.0])
    return in_world @ np.asarray(head_rotation(coefficients))


def _open_mouth(head: HeadAsset, identity: Identity, coefficients: Coefficients) -> Float[Array, "V 3"]:
    """The neutral head with its mouth open, where upper and lower lip are far from each other; metres."""
    still = jax.tree.map(jnp.zeros_like, coefficients)
    if head.joint("jaw") is not None:
        return head_vertices(head, identity, still._replace(jaw=jnp.array([0.4, 0.0, 0.0])))
    axis = np.array([name.lower() == "jawopen" for name in head.expression_names], np.float32)
    return head_vertices(head, identity, still._replace(expression=jnp.asarray(axis)))


def _spread(domain, canonical, values, used) -> Float[np.ndarray, "V n"]:
    """Values at landmarks, smoothly interpolated to all vertices, fading away from the landmarks."""
    vertices = np.asarray(domain, np.float64)
    smooth = scipy.interpolate.RBFInterpolator(
        canonical[used], values[used], kernel="linear", smoothing=2e-4, degree=0
    )
    distance, _ = scipy.spatial.cKDTree(canonical[used]).query(vertices)
    fade = np.exp(-((distance / _REACH) ** 2))
    return (smooth(vertices) * fade[:, None]).astype(np.float32)
