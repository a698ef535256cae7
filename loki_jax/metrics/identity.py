"""Identity of the face in a frame, by a face recognition network (docs/metrics.md).

Faces are aligned by our own landmarks. dlib's network can be fetched by anyone; ArcFace is for those who have
one of its ONNX files, whose weights are licensed for research only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Float, UInt8

from loki_jax.downloads import IDENTITY, fetch_files
from loki_jax.fitting.landmarker import Region

SAME_PERSON_DISTANCE = 0.6  # of dlib's numbers, as its author sets it

# The embedding (d,) of the face with these landmarks (478, ...), pixels, in an RGB image.
Embed = Callable[[UInt8[np.ndarray, "h w 3"], Float[np.ndarray, "478 _"]], Float[np.ndarray, " d"]]

# Landmarks of the corners of the eyes (the subject's left outer, left inner, right outer, right inner) and of
# the base of the nose, and where dlib has them in a crop of unit size (`get_face_chip_details`, padding .25).
_DLIB_POINTS = ((263,), (362,), (33,), (133,), (2,))
_DLIB_PLACES = (
    np.array(
        [
            [0.8595674595992, 0.2134981538014],
            [0.6460604764104, 0.2289674387677],
            [0.1205750620789, 0.2137274526848],
            [0.3340850613712, 0.2290642403242],
            [0.4901123135679, 0.6277975316475],
        ]
    )
    + 0.25
) / 1.5
_DLIB_SIZE = 150

# Eyes (right, left), tip of the nose, corners of the mouth (right, left), and where ArcFace has them.
_ARCFACE_POINTS = ((33, 133), (362, 263), (1,), (61,), (291,))
_ARCFACE_SIZE = 112
_ARCFACE_PLACES = (
    np.array(
        [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
    )
    / _ARCFACE_SIZE
)


class IdentityError(ValueError):
    """A face recognition network that cannot be run; the message names the remedy."""


def aligned_region(points: Float[np.ndarray, "k 2"], places: Float[np.ndarray, "k 2"]) -> Region:
    """The square of an image in which `points`, in pixels, lie nearest (least squares) to `places` (0..1)."""
    source, target = (places - 0.5) @ (1, 1j), points @ (1, 1j)
    centred = source - source.mean()
    turn = np.vdot(centred, target) / np.vdot(centred, centred)
    centre = target.mean() - turn * source.mean()
    return Region(float(centre.real), float(centre.imag), float(abs(turn)), float(np.angle(turn)))


def dlib_chip(
    image: UInt8[np.ndarray, "h w 3"], points: Float[np.ndarray, "478 _"]
) -> UInt8[np.ndarray, "150 150 3"]:
    """The face as dlib's network takes it."""
    return _cut_face(image, points, _DLIB_POINTS, _DLIB_PLACES, _DLIB_SIZE)


def _cut_face(image, points, groups, places, size):
    means = np.stack([points[list(group), :2].mean(0) for group in groups]).astype(np.float64)
    return aligned_region(means, places).cut(image, size, replicate=False)


def load_identity() -> Embed:
    """dlib's face recognition network, 128 numbers, from the user's cache; fetched on first use.

    Raises:
      IdentityError: dlib is not installed.
      DownloadError: the network is not cached and pip cannot download it.
    """
    try:
        import dlib
    except ImportError as error:
        raise IdentityError(
            f"Identity needs dlib ({error}). Run `pip install loki_jax[identity]`."
        ) from error
    (path,) = fetch_files(IDENTITY).values()
    network = dlib.face_recognition_model_v1(str(path))

    def embed(image: UInt8[np.ndarray, "h w 3"], points: Float[np.ndarray, "478 _"]):
        return np.array(network.compute_face_descriptor(dlib_chip(image, points)))

    return embed


def load_arcface(path: str | os.PathLike) -> Embed:
    """ArcFace (Deng et al. 2019) from an ONNX file of the user's; its input is (1, 3, 112, 112).

    Raises:
      IdentityError: onnxruntime is not installed, or the file is not such a network.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise IdentityError(
            f"{path}: ArcFace needs onnxruntime ({error}). Run `pip install loki_jax[arcface]`."
        ) from error
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but this one
        raise IdentityError(
            f"{path}: not an ONNX file that onnxruntime can read ({error}). "
            "Give the recognition network, such as w600k_r50.onnx of insightface's buffalo_l."
        ) from error
    (given, *others) = session.get_inputs()
    if others or list(given.shape[1:]) != [3, _ARCFACE_SIZE, _ARCFACE_SIZE]:
        raise IdentityError(
            f"{path}: its input is {given.shape}, ArcFace's is (1, 3, {_ARCFACE_SIZE}, {_ARCFACE_SIZE}). "
            "Give the recognition network, such as w600k_r50.onnx of insightface's buffalo_l."
        )

    def embed(image: UInt8[np.ndarray, "h w 3"], points: Float[np.ndarray, "478 _"]):
        chip = _cut_face(image, points, _ARCFACE_POINTS, _ARCFACE_PLACES, _ARCFACE_SIZE)
        scaled = (chip.transpose(2, 0, 1)[None] / 127.5 - 1).astype(np.float32)
        return session.run(None, {given.name: scaled})[0].ravel()

    return embed


def embed_frames(
    embed: Embed,
    frames: Iterable[UInt8[np.ndarray, "h w 3"]],
    points: Float[np.ndarray, "n 478 _"],
    found: Bool[np.ndarray, " n"],
) -> Float[np.ndarray, "n d"]:
    """Embeddings of the faces of a clip; rows of NaN where none was found.

    Raises:
      IdentityError: no face in any frame.
    """
    if not found.any():
        raise IdentityError("no face in any frame, so that no identity can be told")
    rows = [
        embed(image, own) if seen else None for image, own, seen in zip(frames, points, found, strict=True)
    ]
    width = len(next(row for row in rows if row is not None))
    return np.stack([np.full(width, np.nan) if row is None else row for row in rows])


def cosine_similarity(
    embeddings: Float[np.ndarray, "*n d"], reference: Float[np.ndarray, " d"]
) -> Float[np.ndarray, "*n"]:
    """Cosine of the angle between each embedding and the reference's (CSIM); higher is better."""
    lengths = np.linalg.norm(embeddings, axis=-1) * np.linalg.norm(reference)
    return np.asarray(embeddings @ reference / lengths)


def embedding_distance(
    embeddings: Float[np.ndarray, "*n d"], reference: Float[np.ndarray, " d"]
) -> Float[np.ndarray, "*n"]:
    """Euclidean distance between each embedding and the reference's; dlib's, below 0.6: the same person."""
    return np.asarray(np.linalg.norm(embeddings - reference, axis=-1))
