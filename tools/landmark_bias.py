"""Measure what the face network gets wrong as a head nods, and write `loki_jax/fitting/landmark_bias.npz`.

    python -m tools.landmark_bias [--people 16] [--poses 48]      # 5 minutes on 2 cores

The built-in head is rendered as different people in random poses up to 36 degrees of yaw and pitch, most of
them with an expression; the landmark networks mark it. What the marks are off (in the upright face's axes and
units) is explained by one constant a person and landmark, a polynomial in the pitch that the network's own 3D
points have, and terms of yaw that are not used: those differ from head to head. Robust least squares (Huber),
made symmetric.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy.spatial.transform import Rotation

from data_prep.landmarks.marks import mirror_pairs
from loki_jax.face.asset import HeadAsset, write_npz
from loki_jax.face.builtin import builtin_head
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.skinning import landmark_positions, make_identity, template_vertices, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.fit import make_camera
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.model_files import LandmarkError, fetch_models
from loki_jax.fitting.points import LANDMARK_SET, N_POINTS
from loki_jax.fitting.pose_bias import FILE, PoseBias
from loki_jax.fitting.tracking import image_landmarks
from loki_jax.synthetic.appearance import Appearance, sample_appearance, sample_shape
from loki_jax.synthetic.clips import render_frames

SIZE = 512
_FACE_HEIGHT = 250.0  # pixels
_LARGEST_ANGLE, _LARGEST_ROLL = 36.0, 20.0  # degrees
_DEGREE = 2


class RawLandmarker(Landmarker):
    """The networks without any correction."""

    def correct(self, points, score):
        return points


class Posed(NamedTuple):
    """Renders (N, SIZE, SIZE, 3) of a person in known poses, and where its landmarks are."""

    frames: UInt8[np.ndarray, "N S S 3"]
    coefficients: Coefficients
    camera: Camera
    points: Float[np.ndarray, "N 478 2"]


def pose_person(
    head: HeadAsset,
    betas: Float[np.ndarray, " n_shape"],
    appearance: Appearance,
    rot: Float[np.ndarray, "N 3"],
    expression: Float[np.ndarray, "N n_expr"] | None = None,
) -> Posed:
    """A person turned by `rot` (rotation vectors) about the middle of the face, 1 m from the camera."""
    n = len(rot)
    neutral = make_identity(head, jnp.asarray(betas)).vertices
    marks = np.asarray(landmark_positions(head, neutral, LANDMARK_SET))[:468]
    zero = np.zeros((n, 3), np.float32)
    tra = [0, 0, -1] - Rotation.from_rotvec(rot).apply(marks.mean(axis=0))
    coefficients = Coefficients(
        betas=np.tile(betas, (n, 1)).astype(np.float32),
        expression=np.zeros((n, head.n_expression), np.float32) if expression is None else expression,
        rot=rot.astype(np.float32),
        tra=tra.astype(np.float32),
        neck=zero,
        jaw=zero,
        eyes=zero,
    )
    camera = make_camera((SIZE, SIZE), _FACE_HEIGHT / float(np.ptp(marks[:, 1])))
    whole = np.array([0, 0, SIZE, SIZE], np.float32)
    frames = render_frames(head, coefficients, camera, whole, appearance, SIZE)
    return Posed(frames, coefficients, camera, np.asarray(_pixels(head, coefficients, camera)))


@jax.jit
def _pixels(head: HeadAsset, coefficients: Coefficients, camera: Camera):
    world = world_vertices(head, make_identity(head, coefficients.betas[:1]), coefficients)
    return project(camera_from_world(landmark_positions(head, world, LANDMARK_SET), camera), camera)


def observe_people(
    landmarker: RawLandmarker, people: range, poses: int
) -> tuple[Float[np.ndarray, "M 478 3"], Float[np.ndarray, "M 478 2"], Int[np.ndarray, " M"]]:
    """Marks of the networks, the true landmarks, and whose they are, in all renders that show a face."""
    head = builtin_head()
    marked, true, owner = [], [], []
    for seed in people:
        rng = np.random.default_rng(seed)
        angles = rng.uniform(-1, 1, (poses, 3)) * [_LARGEST_ANGLE, _LARGEST_ANGLE, _LARGEST_ROLL]
        rot = Rotation.from_euler("YXZ", angles, degrees=True).as_rotvec()
        expression = np.abs(rng.standard_normal((poses, head.n_expression))) * head.expression_sigma / 4
        expression *= rng.random(expression.shape) < 0.3
        expression[: poses // 3] = 0
        person = pose_person(
            head, sample_shape(seed, head), sample_appearance(seed, head), rot, expression.astype(np.float32)
        )
        for frame, points in zip(person.frames, person.points, strict=True):
            try:
                marked.append(image_landmarks(landmarker, frame).points[0])
            except LandmarkError:
                continue
            true.append(points)
            owner.append(seed)
        print(f"person {seed}: {owner.count(seed)} of {poses} renders marked")
    return np.array(marked), np.array(true), np.array(owner)


def mean_face(points: Float[np.ndarray, "M 478 3"]) -> Float[np.ndarray, "468 3"]:
    """The symmetric mean of faces of all poses, which looks ahead; outer eye corners a unit apart."""
    faces = points[:, :468] * [1, -1, -1]
    faces = faces - faces.mean(axis=1, keepdims=True)
    head = builtin_head()
    mean = np.asarray(landmark_positions(head, template_vertices(head), LANDMARK_SET), np.float64)[:468]
    mean -= mean.mean(axis=0)
    pairs = mirror_pairs(mean)
    for _ in range(3):
        turned = [Rotation.align_vectors(mean, face)[0].apply(face) / np.linalg.norm(face) for face in faces]
        mean = np.mean(turned, axis=0)
        mean = (mean + mean[pairs] * [-1, 1, 1]) / 2
    return mean / np.linalg.norm(mean[33] - mean[263])


def measure_bias(
    marked: Float[np.ndarray, "M 478 3"],
    true: Float[np.ndarray, "M 478 2"],
    owner: Int[np.ndarray, " M"],
    degree: int = _DEGREE,
) -> PoseBias:
    """The bias as a polynomial of this degree."""
    face = mean_face(marked)
    known = PoseBias(face, np.zeros((0, N_POINTS, 2)))
    terms, errors = [], []
    for points, place in zip(marked, true, strict=True):
        pitch, roll, scale = known.pose(points)
        upright = Rotation.from_euler("z", -roll).as_matrix()
        errors.append(((points[:, :2] - place) / scale * [1, -1] @ upright[:2, :2].T).ravel())
        nose = upright @ ((points[1] - points[:468].mean(axis=0)) * [1, -1, -1])
        yaw = np.arctan2(nose[0], nose[2])
        terms.append([*(pitch ** np.arange(1, degree + 1)), yaw, yaw**2, yaw * pitch, yaw**3])
    rows = np.concatenate([np.array(terms), owner[:, None] == np.unique(owner)], axis=1)
    errors = np.array(errors)
    found = np.linalg.lstsq(rows, errors, rcond=None)[0]
    for _ in range(8):
        deviation = np.abs(errors - rows @ found)
        limit = 1.5 * 1.48 * np.median(deviation, axis=0)
        weight = np.minimum(1, limit / np.maximum(deviation, 1e-9))
        normal = np.einsum("mj,ma,mb->jab", weight, rows, rows)
        right = np.einsum("mj,ma,mj->ja", weight, rows, errors)
        found = np.linalg.solve(normal, right[..., None])[..., 0].T
    bias = found[:degree].reshape(degree, N_POINTS, 2)
    pairs = np.concatenate([mirror_pairs(face), np.roll(np.arange(468, 478), 5)])
    return PoseBias(face, (bias + bias[:, pairs] * [-1, 1]) / 2)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.landmark_bias", description=__doc__.split("\n")[0])
    parser.add_argument("--people", type=int, default=16, help="how many people are rendered")
    parser.add_argument("--poses", type=int, default=48, help="poses of each")
    args = parser.parse_args(argv)
    landmarker = RawLandmarker(fetch_models())
    observed = observe_people(landmarker, range(100, 100 + args.people), args.poses)
    found = measure_bias(*observed)
    write_npz(FILE, {name: value.astype(np.float32) for name, value in found._asdict().items()})
    print(f"wrote {FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
