"""One face followed through a clip, or found in a portrait: the landmarks of every frame."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from loki_jax.fitting.landmarker import FaceBox, Landmarker, Region, box_overlap, eye_angle
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.fitting.points import N_POINTS
from loki_jax.video import Frames, InputWarning, LazyFrames

_CHOOSE = "Choose one with `--face INDEX` (of animate's driver: `--driver-face INDEX`)."

# A face: its number, 0 the largest; "left" or "right" in the picture; or "X,Y", the nearest to these pixels.
FaceChoice = int | str


class Track(NamedTuple):
    """Landmarks of one face through a clip; frames without the face have zero confidence.

    Attributes:
      points: x, y, z in pixels.
      confidence: 0..1 per point.
      score: 0..1, the face network's score of the frame.
      faces: how many faces the detector saw at once.
      cuts: frames that begin another shot, or show another person.
      scores: expression scores (`task_file.SCORE_NAMES`); k is 0, or None, where no network gives them.
    """

    points: Float[np.ndarray, "n 478 3"]
    confidence: Float[np.ndarray, "n 478"]
    score: Float[np.ndarray, " n"]
    faces: int
    cuts: Int[np.ndarray, " cuts"] = np.zeros(0, np.int64)
    scores: Float[np.ndarray, "n k"] | None = None


def find_face(
    landmarker: Landmarker, frames: Frames, face: FaceChoice | None = None, name: str = "clip"
) -> tuple[Frames, Track]:
    """The frames, turned where they lie or are upside down, and the landmarks of one face in them.

    Warns (`InputWarning`) where the frames are turned, and where one of several faces is chosen.

    Args:
      face: the wanted one (`FaceChoice`); None: the largest (of a picture: the only, or by far the largest).
      name: what messages call the frames.

    Raises:
      LandmarkError: as `clip_landmarks` and `image_landmarks`.
    """
    turns = upright_turns(landmarker, [frames[index] for index in _spread(len(frames), 4)])
    if turns:
        warnings.warn(
            f"{name}: lies on its side or is upside down; turned by {90 * turns} degrees counter-clockwise.",
            InputWarning,
            stacklevel=2,
        )
        frames = turn_frames(frames, turns)
    track = clip_landmarks(landmarker, frames, face, name)
    if face is None and track.faces > 1:
        shown = int(np.argmax(track.score))
        left, top = track.points[shown, :468, :2].min(0)
        right, bottom = track.points[shown, :468, :2].max(0)
        warnings.warn(
            f"{name}: {track.faces} faces; took the one of {right - left:.0f} x {bottom - top:.0f} pixels at "
            f"({(left + right) / 2:.0f}, {(top + bottom) / 2:.0f}) in frame {shown}. {_CHOOSE}",
            InputWarning,
            stacklevel=2,
        )
    return frames, track


def upright_turns(landmarker: Landmarker, images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> int:
    """Counter-clockwise quarter turns after which the face in these pictures of one scene is upright.

    The detector also finds faces that lie or are upside down, but with lower scores or eyes above each
    other. Without a clear answer the pictures stay as they are.
    """

    def evidence(turns: int) -> float:
        faces = [landmarker.detect(np.ascontiguousarray(np.rot90(image, turns))) for image in images]
        best = [max((f.score * np.cos(eye_angle(f)) for f in found), default=0.0) for found in faces]
        return float(np.mean(best))

    upright = evidence(0)
    if upright >= 0.85:
        return 0
    others = {turns: evidence(turns) for turns in (1, 2, 3)}
    best = max(others, key=lambda turns: others[turns])
    return best if others[best] > upright + 0.15 else 0


def turn_frames(frames: Frames, turns: int) -> Frames:
    """Frames after counter-clockwise quarter turns."""
    if isinstance(frames, np.ndarray):
        return np.rot90(frames, turns, (1, 2))
    if isinstance(frames, LazyFrames):
        return frames.map(lambda frame: np.ascontiguousarray(np.rot90(frame, turns)))
    return [np.ascontiguousarray(np.rot90(frame, turns)) for frame in frames]


def _spread(count: int, probes: int) -> Int[np.ndarray, " n"]:
    """Up to `probes` of `count` indices, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(probes, count)).round().astype(int))


def image_landmarks(
    landmarker: Landmarker,
    image: UInt8[np.ndarray, "h w 3"],
    face: FaceChoice | None = None,
    name: str = "image",
) -> Track:
    """Landmarks of a portrait, as a track of one frame.

    Args:
      face: the wanted one (`FaceChoice`); None: the only, or by far the largest, face.
      name: what error messages call the image.

    Raises:
      LandmarkError: no face, no face of that index, or two faces of about the same size and no index.
    """
    faces = landmarker.detect(image)
    if not faces:
        raise LandmarkError(
            f"{name}: no face found in this {image.shape[1]} x {image.shape[0]} image. Use a picture with a "
            "visible face; a head in a large scene is found when the picture is cropped to its surroundings."
        )
    if face is None and len(faces) > 1 and faces[1].size > 0.7 * faces[0].size:
        raise LandmarkError(f"{name}: {_describe(faces)}. {_CHOOSE[:-1]}, or crop the picture.")
    chosen = faces[_face_index(face, faces, name)]
    points, confidence, score = _precise_points(landmarker, image, landmarker.face_region(chosen))
    if score < 0.5:
        raise LandmarkError(
            f"{name}: something like a face was found, but no landmarks on it (score {score:.2f}). "
            "Use a picture with a visible, upright face."
        )
    points, scores = landmarker.second_look(image, points)
    points = landmarker.correct(points[None], np.array([score]))
    return Track(points, confidence[None], np.array([score], np.float32), len(faces), scores=scores[None])


def clip_landmarks(
    landmarker: Landmarker,
    frames: Frames,
    face: FaceChoice | None = None,
    name: str = "clip",
    probes: int = 8,
) -> Track:
    """Landmarks of one face through a clip.

    The face is chosen on `probes` frames spread over the clip: the largest steady one, or the one of them
    that `face` names. From a frame that shows it, it is followed forwards and backwards: the region of each
    frame comes from the points of the frame before. Where it is lost it is detected again.

    Raises:
      LandmarkError: no face in any probed frame, or no face of that index.
    """
    if len(frames) == 1:
        return image_landmarks(landmarker, frames[0], face, name)
    indices = _spread(len(frames), probes)
    tracks: list[list[tuple[int, FaceBox]]] = []
    faces = 0
    for index in indices:
        seen = landmarker.detect(frames[index])
        faces = max(faces, len(seen))
        for found in seen:
            near = [t for t in tracks if box_overlap(t[-1][1].box, found.box) > 0.2 and t[-1][0] != index]
            near[0].append((index, found)) if near else tracks.append([(index, found)])
    if not tracks:
        raise LandmarkError(
            f"{name}: no face found in {len(indices)} frames looked at. Use a clip with a visible face."
        )
    # Steadiness times size: a face seen in every probe beats a larger one that passes by.
    tracks.sort(key=lambda t: -sum(found.size for _, found in t))
    largest = [max(t, key=lambda item: item[1].score) for t in tracks]
    start, first = largest[_face_index(face, [found for _, found in largest], name)]
    points = np.zeros((len(frames), N_POINTS, 3), np.float32)
    confidence = np.zeros((len(frames), N_POINTS), np.float32)
    score = np.zeros(len(frames), np.float32)
    scores = np.zeros((len(frames), landmarker.n_scores), np.float32)
    scenes = np.zeros((len(frames), 18, 32, 3), np.uint8)
    patches = np.full((len(frames), 24 * 24), np.nan, np.float32)
    found = _precise_points(landmarker, frames[start], landmarker.face_region(first))
    first_points, confidence[start], score[start] = found
    points[start], scores[start] = landmarker.second_look(frames[start], first_points)
    scenes[start] = _thumbnail(frames[start])
    patches[start] = _face_patch(landmarker, frames[start], first_points)
    for order in (range(start + 1, len(frames)), range(start - 1, -1, -1)):
        last, found_before = first_points, True
        for index in order:
            frame = frames[index]
            followed = follow_face(landmarker, frame, last, found_before)
            found_before = followed is not None
            scenes[index] = _thumbnail(frame)
            if followed is not None:
                last, confidence[index], score[index] = followed
                points[index], scores[index] = landmarker.second_look(frame, last)
                patches[index] = _face_patch(landmarker, frame, last)
    cuts = _find_cuts(scenes, patches)
    return Track(landmarker.correct(points, score), confidence, score, faces, cuts, scores)


def _thumbnail(frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "18 32 3"]:
    import cv2

    return cv2.resize(np.ascontiguousarray(frame), (32, 18), interpolation=cv2.INTER_AREA)


def _face_patch(
    landmarker: Landmarker, frame: UInt8[np.ndarray, "h w 3"], points: Float[np.ndarray, "478 3"]
) -> Float[np.ndarray, "576"]:
    """The upright face in a few grey pixels of mean 0 and norm 1; NaN where it has no contrast."""
    grey = landmarker.next_region(points).cut(frame, 24).mean(-1).ravel()
    grey = grey - grey.mean()
    norm = np.linalg.norm(grey)
    return grey / norm if norm > 24 else np.full(len(grey), np.nan)


def _find_cuts(
    scenes: UInt8[np.ndarray, "n 18 32 3"], patches: Float[np.ndarray, "n 576"]
) -> Int[np.ndarray, " cuts"]:
    """Frames that begin another shot, by thumbnails, or show another person, by patches of the face.

    At a cut the picture changes several times as much as around it, in contrast to pans, flashes and
    flicker. From one frame to the next patches of one person correlate by .8 or more, of two people by .6 or
    less (ten clips of tests/fitting/test_real_clips.py).
    """
    pairs = zip(scenes[1:].astype(np.int16), scenes[:-1], strict=True)
    change = np.array([np.abs(after - before).mean() for after, before in pairs])
    moving = np.flatnonzero(change > 0.2)  # pictures that are shown for several frames count once
    change = change[moving]
    padded = np.pad(change, 3)
    around = np.max([np.roll(padded, shift) for shift in (-3, -2, -1, 1, 2, 3)], axis=0)[3 : 3 + len(change)]
    shot = moving[(change > 8) & (change > 3 * around) & (around > 0)]
    person = np.flatnonzero(np.sum(patches[1:] * patches[:-1], axis=1) < 0.7)
    return np.union1d(shot, person).astype(np.int64) + 1


def steady_run(track: Track, longest_gap: int = 2) -> tuple[int, int]:
    """[start, stop) of the longest run of frames that show the face, without cut or jump.

    Gaps of up to `longest_gap` frames are bridged. A jump is a shift of the face by more than half its
    size from one frame to the next.
    """
    runs = shots(track, longest_gap)
    longest = max(runs, key=len, default=np.zeros(0, int))
    return (int(longest[0]), int(longest[-1]) + 1) if len(longest) else (0, 0)


def shots(track: Track, longest_gap: int | None = None) -> list[Int[np.ndarray, " frames"]]:
    """The frames that show the face, apart where there is a cut, a jump or a gap of more frames than that."""
    present = np.flatnonzero(track.score >= 0.5)
    if len(present) == 0:
        return []
    face = track.points[present, :468, :2]
    centre, size = face.mean(1), np.ptp(face, axis=1).max(1)
    shift = np.linalg.norm(np.diff(centre, axis=0), axis=1) / np.minimum(size[1:], size[:-1])
    growth = np.abs(np.log(size[1:] / size[:-1]))
    # The face may have moved while it was not seen.
    jumps = ((shift > 0.5) | (growth > np.log(1.5))) & ((np.diff(present) == 1) | (longest_gap is not None))
    cut = np.searchsorted(track.cuts, present[:-1], "right") < np.searchsorted(
        track.cuts, present[1:], "right"
    )
    gaps = np.diff(present) > (len(track.score) if longest_gap is None else longest_gap) + 1
    return np.split(present, np.flatnonzero(jumps | cut | gaps) + 1)


def choose_frames(
    track: Track, name: str = "clip", all_shots: bool = False, allow_lost: bool = False
) -> tuple[int, int]:
    """[start, stop) of the frames to use: of several shots with the face the longest, else everything.

    Warns (`InputWarning`) of shots that are left out and of frames without the face.

    Args:
      all_shots: take all frames, also over cuts.
      allow_lost: accept frames of which more than half do not show the face.

    Raises:
      LandmarkError: the face is not visible in more than half of the frames.
    """
    runs = shots(track)
    start, stop = 0, len(track.score)
    if len(runs) > 1 and not all_shots:
        longest = max(runs, key=len)
        start, stop = int(longest[0]), int(longest[-1]) + 1
        warnings.warn(
            f"{name}: {len(runs)} shots; took the longest, frames {start} to {stop - 1} of "
            f"{len(track.score)} (all of them: `--all-shots`).",
            InputWarning,
            stacklevel=2,
        )
    count = stop - start
    lost = int((track.score[start:stop] < 0.5).sum())
    if 2 * lost > count and not allow_lost:
        raise LandmarkError(
            f"{name}: the face is visible in {count - lost} of {count} frames; at least half are needed. "
            "Use a clip that shows it, or have its motion invented (`--allow-lost`)."
        )
    if lost:
        warnings.warn(
            f"{name}: the face is not visible in {lost} of {count} frames; its motion there is interpolated.",
            InputWarning,
            stacklevel=2,
        )
    return start, stop


def cut_track(track: Track, start: int, stop: int) -> Track:
    """Frames [start, stop) of a track."""
    cuts = track.cuts[(track.cuts > start) & (track.cuts < stop)] - start
    part = slice(start, stop)
    scores = None if track.scores is None else track.scores[part]
    return Track(track.points[part], track.confidence[part], track.score[part], track.faces, cuts, scores)


def follow_face(
    landmarker: Landmarker,
    image: UInt8[np.ndarray, "h w 3"],
    last: Float[np.ndarray, "478 3"],
    found_before: bool,
) -> tuple[Float[np.ndarray, "478 3"], Float[np.ndarray, "478"], float] | None:
    """Uncorrected landmarks of the face last seen at `last`, confidence and score; None: it is not there.

    Args:
      found_before: `last` are the points of the frame before.
    """
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


def faces_of_picture(
    landmarker: Landmarker, image: UInt8[np.ndarray, "h w 3"], name: str = "image"
) -> list[int]:
    """Numbers of the faces of a picture, from left to right; without those much smaller than the largest.

    Raises:
      LandmarkError: no face.
    """
    faces = landmarker.detect(image)
    if not faces:
        raise LandmarkError(f"{name}: no face found. Use a picture with visible faces.")
    large = [index for index, face in enumerate(faces) if face.size > 0.4 * faces[0].size]
    return sorted(large, key=lambda index: float(faces[index].box[0]))


def _face_index(face: FaceChoice | None, faces: Sequence[FaceBox], name: str) -> int:
    if face is None:
        return 0
    centres = np.array([(found.box[:2] + found.box[2:]) / 2 for found in faces])
    if face == "left":
        return int(np.argmin(centres[:, 0]))
    if face == "right":
        return int(np.argmax(centres[:, 0]))
    try:
        numbers = [float(part) for part in str(face).split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 2 and np.isfinite(numbers).all():
        return int(np.argmin(np.linalg.norm(centres - numbers, axis=1)))
    if len(numbers) != 1 or not numbers[0].is_integer():
        raise LandmarkError(f"{name}: no face {face!r}. Give a number, left, right, or pixels X,Y.")
    if not 0 <= numbers[0] < len(faces):
        raise LandmarkError(f"{name}: no face number {face}: {_describe(faces)}. {_CHOOSE}")
    return int(numbers[0])


def _describe(faces: Sequence[FaceBox]) -> str:
    centres = [(face.box[:2] + face.box[2:]) / 2 for face in faces]
    boxes = ", ".join(
        f"{i}: {face.size:.0f} px at ({centre[0]:.0f}, {centre[1]:.0f})"
        for i, (face, centre) in enumerate(zip(faces[:6], centres, strict=False))
    )
    return f"{len(faces)} face{'s' if len(faces) > 1 else ''} ({boxes})"
