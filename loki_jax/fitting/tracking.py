"""One face followed through a clip, or found in a portrait: the landmarks of every frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from loki_jax.fitting.landmarker import FaceBox, Landmarker, Region, box_overlap
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.fitting.points import N_POINTS

# Uncropped RGB frames: an array or any sequence of them.
Frames = Sequence[UInt8[np.ndarray, "h w 3"]] | UInt8[np.ndarray, "n h w 3"]


class Track(NamedTuple):
    """Landmarks of one face through a clip; frames without the face have zero confidence.

    Attributes:
      points: x, y, z in pixels.
      confidence: 0..1 per point.
      score: 0..1, the face network's score of the frame.
      faces: how many faces the detector saw in the frame the track starts from.
      scores: expression scores (`task_file.SCORE_NAMES`); k is 0, or None, where no network gives them.
    """

    points: Float[np.ndarray, "n 478 3"]
    confidence: Float[np.ndarray, "n 478"]
    score: Float[np.ndarray, " n"]
    faces: int
    scores: Float[np.ndarray, "n k"] | None = None


def image_landmarks(
    landmarker: Landmarker,
    image: UInt8[np.ndarray, "h w 3"],
    face: int | None = None,
    name: str = "image",
) -> Track:
    """Landmarks of a portrait, as a track of one frame.

    Args:
      face: index of the wanted face, largest first; None: the only, or by far the largest, face.
      name: what error messages call the image.

    Raises:
      LandmarkError: no face, no face of that index, or two faces of about the same size and no index.
    """
    faces = landmarker.detect(image)
    if not faces:
        raise LandmarkError(
            f"{name}: no face found in this {image.shape[1]} x {image.shape[0]} image. Use a picture with an "
            "upright, visible face, cropped so that it fills at least a tenth of the height."
        )
    if face is None and len(faces) > 1 and faces[1].size > 0.7 * faces[0].size:
        raise LandmarkError(
            f"{name}: {_describe(faces)}. Choose one with `--face INDEX`, or crop the picture."
        )
    chosen = faces[_face_index(face, faces, name)]
    points, confidence, score = _precise_points(landmarker, image, landmarker.face_region(chosen))
    if score < 0.5:
        raise LandmarkError(
            f"{name}: something like a face was found, but no landmarks on it (score {score:.2f}). "
            "Use a picture with a visible, upright face."
        )
    points, scores = landmarker.second_look(image, points)
    points = landmarker.correct(points[None], np.array([score]))
    return Track(points, confidence[None], np.array([score], np.float32), len(faces), scores[None])


def clip_landmarks(
    landmarker: Landmarker,
    frames: Frames,
    face: int | None = None,
    name: str = "clip",
    probes: int = 8,
) -> Track:
    """Landmarks of one face through a clip.

    The face is chosen on `probes` frames spread over the clip: the largest steady one, or number
    `face` of them. From a frame that shows it, it is followed forwards and backwards: the region of each
    frame comes from the points of the frame before. Where it is lost it is detected again.

    Raises:
      LandmarkError: no face in any probed frame, or no face of that index.
    """
    if len(frames) == 1:
        return image_landmarks(landmarker, frames[0], face, name)
    indices = np.unique(np.linspace(0, len(frames) - 1, min(probes, len(frames))).round().astype(int))
    tracks: list[list[tuple[int, FaceBox]]] = []
    for index in indices:
        for found in landmarker.detect(frames[index]):
            near = [t for t in tracks if box_overlap(t[-1][1].box, found.box) > 0.2 and t[-1][0] != index]
            near[0].append((index, found)) if near else tracks.append([(index, found)])
    if not tracks:
        raise LandmarkError(
            f"{name}: no face found in {len(indices)} frames looked at. Use a clip with an upright, "
            "visible face."
        )
    # Steadiness times size: a face seen in every probe beats a larger one that passes by.
    tracks.sort(key=lambda t: -sum(found.size for _, found in t))
    largest = [max(t, key=lambda item: item[1].score) for t in tracks]
    start, first = largest[_face_index(face, [found for _, found in largest], name)]
    points = np.zeros((len(frames), N_POINTS, 3), np.float32)
    confidence = np.zeros((len(frames), N_POINTS), np.float32)
    score = np.zeros(len(frames), np.float32)
    scores = np.zeros((len(frames), landmarker.n_scores), np.float32)
    found = _precise_points(landmarker, frames[start], landmarker.face_region(first))
    first_points, confidence[start], score[start] = found
    points[start], scores[start] = landmarker.second_look(frames[start], first_points)
    for order in (range(start + 1, len(frames)), range(start - 1, -1, -1)):
        last, found_before = first_points, True
        for index in order:
            found = _follow(landmarker, frames[index], last, found_before)
            found_before = found is not None
            if found is not None:
                last, confidence[index], score[index] = found
                points[index], scores[index] = landmarker.second_look(frames[index], last)
    return Track(landmarker.correct(points, score), confidence, score, len(tracks), scores)


def steady_run(track: Track, longest_gap: int = 2) -> tuple[int, int]:
    """[start, stop) of the longest run of frames that show the face, without jump.

    Gaps of up to `longest_gap` frames are bridged. A jump is a shift of the face by more than half its
    size from one frame to the next: a cut, or another person.
    """
    present = np.flatnonzero(track.score >= 0.5)
    if len(present) == 0:
        return 0, 0
    face = track.points[present, :468, :2]
    centre, size = face.mean(1), np.ptp(face, axis=1).max(1)
    shift = np.linalg.norm(np.diff(centre, axis=0), axis=1) / np.minimum(size[1:], size[:-1])
    growth = np.abs(np.log(size[1:] / size[:-1]))
    breaks = (np.diff(present) > longest_gap + 1) | (shift > 0.5) | (growth > np.log(1.5))
    runs = np.split(present, np.flatnonzero(breaks) + 1)
    longest = max(runs, key=len)
    return int(longest[0]), int(longest[-1]) + 1


def cut_track(track: Track, start: int, stop: int) -> Track:
    """Frames [start, stop) of a track."""
    part = slice(start, stop)
    scores = None if track.scores is None else track.scores[part]
    return Track(track.points[part], track.confidence[part], track.score[part], track.faces, scores)


def _follow(landmarker: Landmarker, image: np.ndarray, last: np.ndarray, found_before: bool):
    """Landmarks of the face last seen at `last`, or None if it is not there."""
    if found_before:
        points, confidence, score = landmarker.points_in(image, landmarker.next_region(last))
        if score >= 0.5:
            return points, confidence, score
    box = np.concatenate([last[:468, :2].min(0), last[:468, :2].max(0)])
    faces = landmarker.detect(image)
    near = [face for face in faces if box_overlap(face.box, box) > 0.1]
    # Elsewhere a face is taken for the lost one only if there is no other to confuse it with.
    candidates = near or (faces if len(faces) == 1 else [])
    if not candidates:
        return None
    best = max(candidates, key=lambda face: box_overlap(face.box, box))
    points, confidence, score = _precise_points(landmarker, image, landmarker.face_region(best))
    return (points, confidence, score) if score >= 0.5 else None


def _precise_points(landmarker: Landmarker, image: np.ndarray, region: Region):
    # The detector's region is coarse: search again around the points found.
    points, confidence, score = landmarker.points_in(image, region)
    for _ in range(2):
        if score < 0.5:
            break
        points, confidence, score = landmarker.points_in(image, landmarker.next_region(points))
    return points, confidence, score


def _face_index(face: int | None, faces: Sequence[FaceBox], name: str) -> int:
    if face is not None and not 0 <= face < len(faces):
        raise LandmarkError(f"{name}: no face number {face}: {_describe(faces)}. Choose with `--face INDEX`.")
    return face or 0


def _describe(faces: Sequence[FaceBox]) -> str:
    centres = [(face.box[:2] + face.box[2:]) / 2 for face in faces]
    boxes = ", ".join(
        f"{i}: {face.size:.0f} px at ({centre[0]:.0f}, {centre[1]:.0f})"
        for i, (face, centre) in enumerate(zip(faces[:6], centres, strict=False))
    )
    return f"{len(faces)} face{'s' if len(faces) > 1 else ''} ({boxes})"
