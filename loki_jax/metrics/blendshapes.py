"""A second opinion on expression and pose: MediaPipe's 52 blendshapes and its head pose (docs/metrics.md).

Its networks, face model and procedure know nothing of the head models and the fit that drive and judge
elsewhere. They are in MediaPipe's `face_landmarker.task` (Apache-2.0), a file of the user's.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy.spatial.transform import Rotation

from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.fitting.task_file import SCORE_NAMES

BLENDSHAPE_NAMES = SCORE_NAMES[1:]  # without "neutral"

_GEOMETRY = "geometry_pipeline_metadata_landmarks.binarypb"  # its file in the bundle
_VIEW = np.radians(63)  # vertical field of view of the camera that MediaPipe assumes
_VERTEX_FLOATS = 5  # x, y, z, u, v


class CanonicalFace(NamedTuple):
    """Points of MediaPipe's face model that its pose is estimated from.

    Attributes:
      indices: which landmarks.
      positions: x to the subject's left, y up, z out of the face; centimetres.
      weights: of the points.
    """

    indices: Int[np.ndarray, " k"]
    positions: Float[np.ndarray, "k 3"]
    weights: Float[np.ndarray, " k"]


class BlendshapeReading(NamedTuple):
    """A clip as MediaPipe sees it; NaN in frames without a face.

    Attributes:
      scores: of `BLENDSHAPE_NAMES`, 0..1.
      rotation: rotation vectors of the head, radians, in the camera's axes with y up and z towards the
        viewer: those of `Coefficients.rot` under a camera that does not turn the world.
      valid: frames with a face.
    """

    scores: Float[np.ndarray, "n 51"]
    rotation: Float[np.ndarray, "n 3"]
    valid: Bool[np.ndarray, " n"]


def read_blendshapes(
    landmarker: Landmarker,
    face: CanonicalFace,
    frames: Iterable[UInt8[np.ndarray, "h w 3"]],
    points: Float[np.ndarray, "n 478 3"],
    found: Bool[np.ndarray, " n"],
) -> BlendshapeReading:
    """Scores and head rotations of a clip.

    Args:
      landmarker: with the networks of `face_landmarker.task` (`default_landmarker(path)`).
      face: from the same file (`load_canonical_face`).
      points, found: of the clip's track, which say where to look.

    Raises:
      LandmarkError: a landmarker without these networks.
    """
    if not landmarker.n_scores:
        raise LandmarkError(
            "Blendshapes need MediaPipe's face_landmarker.task: pass `default_landmarker(path of the file)`."
        )
    scores = np.full((len(points), len(BLENDSHAPE_NAMES)), np.nan)
    rotation = np.full((len(points), 3), np.nan)
    for index, (frame, near) in enumerate(zip(frames, points, strict=True)):
        if found[index]:
            seen, given = landmarker.task_points(frame, near)
            scores[index] = given[1:]
            rotation[index] = face_rotation(face, seen, frame.shape[:2])
    return BlendshapeReading(scores, rotation, np.asarray(found, bool))


def blendshape_distance(
    scores: Float[np.ndarray, "n 51"], other: Float[np.ndarray, "m 51"]
) -> Float[np.ndarray, " _"]:
    """Mean absolute difference of the scores in each common frame, 0 to 1; lower is better."""
    count = min(len(scores), len(other))
    return np.abs(np.asarray(scores, np.float64)[:count] - np.asarray(other, np.float64)[:count]).mean(1)


def face_rotation(
    face: CanonicalFace, points: Float[np.ndarray, "478 3"], size: tuple[int, int]
) -> Float[np.ndarray, "3"]:
    """Rotation vector of the head, radians, in axes with y up and z towards the viewer.

    MediaPipe's procedure: landmarks give x and y in perspective, and depth up to a scale and an offset. The
    scale is that of the similarity which fits the model's points to them, first without perspective, then
    with it; the rotation is that of the last fit.

    Args:
      points: x, y and z in pixels, z away from the camera.
      size: height and width of the picture in pixels.
    """
    height, width = size
    # A plane at distance 1 from the camera, y up.
    unit = 2 * np.tan(_VIEW / 2) / height
    flat = (points.astype(np.float64) - (width / 2, height / 2, 0)) * (unit, -unit, unit)
    middle = flat[:, 2].mean()
    flat = flat[face.indices]

    def in_space(scale: float) -> Float[np.ndarray, "k 3"]:
        depth = (flat[:, 2:] - middle + 1) / scale
        return np.concatenate([flat[:, :2] * depth, -depth], axis=1)

    scale = _fit(face, flat * (1, 1, -1))[0]
    scale *= _fit(face, in_space(scale))[0]
    return _fit(face, in_space(scale))[1].as_rotvec()


def _fit(face: CanonicalFace, points: Float[np.ndarray, "k 3"]) -> tuple[float, Rotation]:
    """Scale and rotation of the similarity from the model to the points, by weighted least squares."""
    model, seen = (x - np.average(x, axis=0, weights=face.weights) for x in (face.positions, points))
    rotation, _ = Rotation.align_vectors(seen, model, weights=face.weights)
    weights = face.weights[:, None]
    return float((weights * seen * rotation.apply(model)).sum() / (weights * model**2).sum()), rotation


def load_canonical_face(path: str | os.PathLike) -> CanonicalFace:
    """The points of MediaPipe's face model, from its `face_landmarker.task`.

    Raises:
      LandmarkError: the file is missing or another one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            fields = list(_fields(archive.read(_GEOMETRY)))
        (mesh,) = (value for number, value in fields if number == 1)
        floats = b"".join(value for number, value in _fields(mesh) if number == 3)
        vertices = np.frombuffer(floats, "<f4").reshape(-1, _VERTEX_FLOATS)[:, :3].astype(np.float64)
        basis = [dict(_fields(value)) for number, value in fields if number == 2]
        indices = np.array([entry.get(1, 0) for entry in basis])
        weights = np.array([struct.unpack("<f", entry[2])[0] for entry in basis])
        return CanonicalFace(indices, vertices[indices], weights)
    except (OSError, KeyError, ValueError, IndexError, struct.error, zipfile.BadZipFile) as error:
        raise LandmarkError(
            f"{path}: not MediaPipe's face_landmarker.task, or one without its face model ({error}). "
            "Download it again."
        ) from error


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a protocol buffer: their numbers with a whole number, or with the bytes of anything else."""
    position = 0

    def whole() -> int:
        nonlocal position
        value, shift = 0, 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        number, kind = divmod(whole(), 8)
        if kind == 0:
            yield number, whole()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"wire type {kind}")
        length = {1: 8, 5: 4}.get(kind) or whole()
        yield number, message[position : position + length]
        position += length
