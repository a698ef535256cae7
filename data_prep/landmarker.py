"""478 face landmarks, with confidence, from images and clips: `python -m data_prep.landmarker`.

Three Apache-2.0 networks of the mediapipe 0.10.21 wheel (short-range face detector, 468-point face
mesh, iris) run under ai-edge-litert; the mediapipe package itself is never installed. This module
fetches them once, checks their SHA-256, and does what surrounds the networks: anchors and
suppression of the detector, crops turned upright by the eyes, refinement of eyelids and irises, and
tracking through a clip. Design section 12.

Point order: 0..467 is the MediaPipe face mesh; 468..472 the iris of the subject's right eye and
473..477 that of the left one (centre, then the rim towards the nose, above, away from it, below).
Coordinates are pixels with the origin at the image corner (the first pixel's centre is 0.5, 0.5), z on
the same scale, growing away from the camera, about zero at the head's middle.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8

WHEEL = "mediapipe==0.10.21"
_PIP_DOWNLOAD = (
    *("download", WHEEL, "--no-deps", "--only-binary=:all:", "--python-version", "3.11"),
    *("--platform", "manylinux_2_28_x86_64"),
)
# Path in the wheel -> SHA-256.
_MODELS = {
    "mediapipe/modules/face_detection/face_detection_short_range.tflite": (
        "bbff11cebd1eb27a1e004cae0b0e63ec8c551cbf34a4451148b4908b8db3eca8"
    ),
    "mediapipe/modules/face_landmark/face_landmark.tflite": (
        "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814"
    ),
    "mediapipe/modules/iris_landmark/iris_landmark.tflite": (
        "d1744d2a09c25f501d39eba4faff47e53ecca8852c5ce19bce8eeac39357521f"
    ),
}
N_POINTS = 478
OUTER_EYE_CORNERS = (33, 263)
# Eyelid points of the mesh in the order of the iris network's first 16 contour points (lower lid from
# the outer to the inner corner, then the upper lid), and their mirror images of the left eye.
_LIDS_RIGHT = (33, 7, 163, 144, 145, 153, 154, 155, 133, 246, 161, 160, 159, 158, 157, 173)
_LIDS_LEFT = (263, 249, 390, 373, 374, 380, 381, 382, 362, 466, 388, 387, 386, 385, 384, 398)
_IRIS_RIGHT, _IRIS_LEFT = slice(468, 473), slice(473, 478)


class LandmarkError(RuntimeError):
    """The landmark models cannot be had, or an image has no (single) face; says how to mend it."""


class FaceBox(NamedTuple):
    """A detected face: box x0, y0, x1, y1, six key points (eyes first) in pixels, and its score."""

    box: Float[np.ndarray, "4"]
    keypoints: Float[np.ndarray, "6 2"]
    score: float

    @property
    def size(self) -> float:
        return float(np.sqrt(max(0.0, self.box[2] - self.box[0]) * max(0.0, self.box[3] - self.box[1])))


class Region(NamedTuple):
    """A square of the image, turned by `angle` radians (clockwise on screen) about its centre."""

    x: float
    y: float
    side: float
    angle: float


class Track(NamedTuple):
    """Landmarks of one face through a clip; frames without the face have zero confidence.

    Attributes:
      points: x, y, z in pixels.
      confidence: 0..1 per point.
      score: 0..1, the face network's score of the frame.
      faces: how many faces the detector saw in the frame the track starts from.
    """

    points: Float[np.ndarray, "n 478 3"]
    confidence: Float[np.ndarray, "n 478"]
    score: Float[np.ndarray, " n"]
    faces: int


# --- getting the models -------------------------------------------------------------------------


def cache_dir() -> Path:
    """The user's cache folder for the landmark models (honours XDG_CACHE_HOME)."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        root = Path(base)
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        root = Path.home() / ".cache"
    return root / "loki_jax" / "landmarks"


def cached_models(folder: Path | None = None) -> dict[str, Path] | None:
    """Paths of the three models by stem if `folder` (default: the user's cache) holds them, else None."""
    folder = cache_dir() if folder is None else Path(folder)
    files = {folder / Path(member).name: digest for member, digest in _MODELS.items()}
    if not all(_has_sha256(path, digest) for path, digest in files.items()):
        return None
    return {path.stem: path for path in files}


def fetch_models(wheel: str | os.PathLike | None = None, folder: Path | None = None) -> dict[str, Path]:
    """Paths of the three models by stem, unpacked into `folder` (default: the user's cache) if needed.

    Cached files with the right SHA-256 are used without network. Otherwise they come from `wheel`,
    or from the wheel that pip downloads.

    Raises:
      LandmarkError: no wheel and no way to download it, or a file with another checksum.
    """
    folder = cache_dir() if folder is None else Path(folder)
    if (cached := cached_models(folder)) is not None:
        return cached
    paths = {Path(member).stem: folder / Path(member).name for member in _MODELS}
    if wheel is not None:
        _unpack(Path(wheel), folder)
        return paths
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", *_PIP_DOWNLOAD, "--quiet", "--retries", "1", "-d", scratch]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(Path(scratch).glob("mediapipe-*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
            raise LandmarkError(
                f"The landmark models are not in {folder} and pip could not download {WHEEL} "
                f"({reason[0]}). With a network run `python -m data_prep.landmarker`; without one fetch the "
                f"wheel elsewhere (`pip {' '.join(_PIP_DOWNLOAD)}`) and run "
                "`python -m data_prep.landmarker --wheel FILE.whl`."
            )
        _unpack(wheels[0], folder)
    return paths


def _unpack(wheel: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            contents = {member: archive.read(member) for member in _MODELS}
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise LandmarkError(
            f"{wheel}: not the wheel of {WHEEL} ({error}). Fetch it with `pip {' '.join(_PIP_DOWNLOAD)}`."
        ) from error
    for member, digest in _MODELS.items():
        found = hashlib.sha256(contents[member]).hexdigest()
        if found != digest:
            raise LandmarkError(
                f"{wheel}: {member} has SHA-256 {found}, expected {digest}. Fetch the wheel of {WHEEL} "
                f"again with `pip {' '.join(_PIP_DOWNLOAD)}`."
            )
    folder.mkdir(parents=True, exist_ok=True)
    for member in _MODELS:
        target = folder / Path(member).name
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(contents[member])
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def _has_sha256(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


# --- geometry around the networks ----------------------------------------------------------------


def ssd_anchors() -> Float[np.ndarray, "896 2"]:
    """Anchor centres (x, y in 0..1) of the short-range detector's 128 x 128 input.

    Two anchors in each cell of a 16 x 16 grid, then six in each cell of an 8 x 8 grid (three layers
    of two share that resolution); all have unit size, so only the centres matter.
    """
    anchors = []
    for cells, repeats in ((16, 2), (8, 6)):
        centres = (np.arange(cells) + 0.5) / cells
        y, x = np.meshgrid(centres, centres, indexing="ij")
        anchors.append(np.repeat(np.stack([x, y], -1).reshape(-1, 2), repeats, axis=0))
    return np.concatenate(anchors).astype(np.float32)


def suppress(
    boxes: Float[np.ndarray, "n 4"],
    values: Float[np.ndarray, "n d"],
    scores: Float[np.ndarray, " n"],
    overlap: float = 0.3,
) -> list[tuple[Float[np.ndarray, " d"], float]]:
    """Merge overlapping detections: the score-weighted mean of each group, best first."""
    remaining = np.argsort(-scores)
    merged = []
    while len(remaining):
        best = remaining[0]
        joined = np.array([box_overlap(boxes[best], boxes[i]) > overlap for i in remaining])
        joined[0] = True
        group = remaining[joined]
        merged.append((np.average(values[group], axis=0, weights=scores[group]), float(scores[best])))
        remaining = remaining[~joined]
    return merged


def box_overlap(a: Float[np.ndarray, "4"], b: Float[np.ndarray, "4"]) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    inner = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    area = max(inner[0], 0) * max(inner[1], 0)
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - area
    return float(area / union) if union > 0 else 0.0


def _image_from_crop(region: Region, size: int, flip: bool) -> Float[np.ndarray, "2 3"]:
    """Affine map from continuous crop pixels (0..size) to continuous image pixels."""
    scale = region.side / size
    cos, sin = np.cos(region.angle) * scale, np.sin(region.angle) * scale
    linear = np.array([[cos, -sin], [sin, cos]])
    if flip:
        linear[:, 0] *= -1
    half = np.full(2, size / 2)
    return np.concatenate([linear, (np.array([region.x, region.y]) - linear @ half)[:, None]], axis=1)


def _cut(image: np.ndarray, region: Region, size: int, flip: bool, border: int) -> np.ndarray:
    matrix = _image_from_crop(region, size, flip)
    # Bilinear sampling aliases when it skips pixels: shrink large faces by a whole factor first.
    factor = int(region.side // (2 * size))
    if factor > 1:
        height, width = (side // factor * factor for side in image.shape[:2])
        image = cv2.resize(
            image[:height, :width], (width // factor, height // factor), interpolation=cv2.INTER_AREA
        )
        matrix = matrix / factor
    # OpenCV puts the origin at the centre of the first pixel, we at its corner.
    matrix = matrix.copy()
    matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5
    return cv2.warpAffine(
        image, matrix, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=border
    )


def _region_of_points(points: Float[np.ndarray, "n 2"], angle: float, scale: float) -> Region:
    """The square around the points' bounding box in a frame turned by `angle`, `scale` times as large."""
    cos, sin = np.cos(angle), np.sin(angle)
    upright = points @ np.array([[cos, -sin], [sin, cos]])
    low, high = upright.min(0), upright.max(0)
    centre = np.array([[cos, -sin], [sin, cos]]) @ ((low + high) / 2)
    return Region(float(centre[0]), float(centre[1]), float((high - low).max() * scale), float(angle))


def _angle(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.arctan2(right[1] - left[1], right[0] - left[0]))


# --- the networks ---------------------------------------------------------------------------------


class Landmarker:
    """The three networks, ready to run on one image after another.

    Args:
      models: what `fetch_models` returns.
      threads: CPU threads of each network.
    """

    def __init__(self, models: dict[str, Path], threads: int = 2):
        from ai_edge_litert.interpreter import Interpreter  # an extra: only this class needs it

        def load(stem: str) -> Interpreter:
            network = Interpreter(model_content=models[stem].read_bytes(), num_threads=threads)
            network.allocate_tensors()
            return network

        self._detector = load("face_detection_short_range")
        self._mesh = load("face_landmark")
        self._iris = load("iris_landmark")
        self._anchors = ssd_anchors()

    def detect(self, image: UInt8[np.ndarray, "h w 3"], threshold: float = 0.5) -> list[FaceBox]:
        """Faces of an RGB image, largest first; looks at enlarged parts if the whole shows none."""
        height, width = image.shape[:2]
        side = max(height, width)
        found = self._detect_in(image, Region(width / 2, height / 2, side, 0.0), threshold)
        parts = 2
        while not found and parts <= 4 and side / parts >= 64:
            step = side / (2 * parts)  # half-overlapping squares of side / parts
            for y in np.arange(step, height + step / 2, step):
                for x in np.arange(step, width + step / 2, step):
                    found += self._detect_in(image, Region(x, y, side / parts, 0.0), threshold)
            parts += 1
        if not found:
            return []
        values = np.stack([np.concatenate([face.box, face.keypoints.ravel()]) for face in found])
        merged = suppress(values[:, :4], values, np.array([face.score for face in found]))
        faces = [FaceBox(value[:4], value[4:].reshape(6, 2), score) for value, score in merged]
        return sorted(faces, key=lambda face: -face.size)

    def _detect_in(self, image: np.ndarray, region: Region, threshold: float) -> list[FaceBox]:
        size = 128
        crop = _cut(image, region, size, flip=False, border=cv2.BORDER_CONSTANT)
        regressors, logits = _invoke(self._detector, crop[None].astype(np.float32) / 127.5 - 1, (16, 1))
        scores = 1 / (1 + np.exp(-np.clip(logits.reshape(-1), -80, 80)))
        keep = scores >= threshold
        if not keep.any():
            return []
        # 16 numbers an anchor: box centre and size, then six points; all but the size are offsets
        # from the anchor, in pixels of the crop.
        raw = regressors.reshape(-1, 8, 2)[keep]
        anchors = self._anchors[keep][:, None] * size
        centre, extent, keypoints = raw[:, :1] + anchors, raw[:, 1:2], raw[:, 2:] + anchors
        points = np.concatenate([centre - extent / 2, centre + extent / 2, keypoints], axis=1)
        matrix = _image_from_crop(region, size, flip=False)
        points = points @ matrix[:, :2].T + matrix[:, 2]
        merged = suppress(points[:, :2].reshape(-1, 4), points.reshape(len(points), -1), scores[keep])
        return [FaceBox(value[:4], value[4:].reshape(6, 2), score) for value, score in merged]

    def face_region(self, face: FaceBox) -> Region:
        """Where the face network looks for the landmarks of a detected face."""
        angle = _angle(face.keypoints[0], face.keypoints[1])
        centre, side = (face.box[:2] + face.box[2:]) / 2, float((face.box[2:] - face.box[:2]).max())
        return Region(float(centre[0]), float(centre[1]), 1.5 * side, angle)

    def points_in(
        self, image: UInt8[np.ndarray, "h w 3"], region: Region
    ) -> tuple[Float[np.ndarray, "478 3"], Float[np.ndarray, "478"], float]:
        """Points, their confidence and the face score for one region of an RGB image."""
        size = 192
        crop = _cut(image, region, size, flip=False, border=cv2.BORDER_REPLICATE)
        raw, logit = _invoke(self._mesh, crop[None].astype(np.float32) / 255, (1404, 1))
        score = float(1 / (1 + np.exp(-np.clip(logit.item(), -80, 80))))
        points = np.empty((N_POINTS, 3), np.float32)
        points[:468] = _to_image(raw.reshape(468, 3), region, size, flip=False)
        confidence = np.full(N_POINTS, score, np.float32)
        for lids, iris, flip in ((_LIDS_RIGHT, _IRIS_RIGHT, False), (_LIDS_LEFT, _IRIS_LEFT, True)):
            lid_points, iris_points, openness = self._eye(image, points[list(lids)], flip)
            points[list(lids), :2] = lid_points[:, :2]
            points[iris] = iris_points
            points[iris, 2] += points[list(lids), 2].mean()
            # A closed eye shows no iris; the network then guesses.
            confidence[iris] = score * np.clip((openness - 0.08) / 0.1, 0, 1)
        height, width = image.shape[:2]
        outside = (points[:, :2] < 0).any(1) | (points[:, 0] > width) | (points[:, 1] > height)
        confidence[outside] *= 0.1
        return points, confidence, score

    def _eye(
        self, image: np.ndarray, lids: Float[np.ndarray, "16 3"], flip: bool
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Lid contour and iris of one eye, and its opening over its width."""
        size = 64
        outer, inner = lids[0, :2], lids[8, :2]
        centre, width = (outer + inner) / 2, float(np.linalg.norm(outer - inner))
        angle = _angle(inner, outer) if flip else _angle(outer, inner)
        region = Region(float(centre[0]), float(centre[1]), max(2.3 * width, 4.0), angle)
        crop = _cut(image, region, size, flip, border=cv2.BORDER_REPLICATE)
        contour, iris = _invoke(self._iris, crop[None].astype(np.float32) / 255, (213, 15))
        contour = _to_image(contour.reshape(71, 3)[:16], region, size, flip)
        iris = _to_image(iris.reshape(5, 3), region, size, flip)
        openness = np.linalg.norm(contour[3:6, :2] - contour[11:14, :2], axis=1).mean() / max(width, 1e-6)
        return contour, iris, float(openness)

    def next_region(self, points: Float[np.ndarray, "478 3"]) -> Region:
        """The region of the next frame, from this frame's points."""
        left, right = OUTER_EYE_CORNERS
        return _region_of_points(points[:468, :2], _angle(points[left], points[right]), 1.5)


def _to_image(points: np.ndarray, region: Region, size: int, flip: bool) -> Float[np.ndarray, "n 3"]:
    matrix = _image_from_crop(region, size, flip)
    xy = points[:, :2] @ matrix[:, :2].T + matrix[:, 2]
    return np.concatenate([xy, points[:, 2:] * (region.side / size)], axis=1).astype(np.float32)


def _invoke(network, value: np.ndarray, widths: tuple[int, ...]) -> list[np.ndarray]:
    """Outputs by their last dimension: the order in the file is not part of its contract."""
    network.set_tensor(network.get_input_details()[0]["index"], np.ascontiguousarray(value, np.float32))
    network.invoke()
    by_width = {int(d["shape"][-1]): network.get_tensor(d["index"]) for d in network.get_output_details()}
    return [by_width[width] for width in widths]


# --- images and clips ------------------------------------------------------------------------------


def image_landmarks(
    landmarker: Landmarker, image: UInt8[np.ndarray, "h w 3"], face: int | None = None, name: str = "image"
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
    points, confidence, score = _settle(landmarker, image, landmarker.face_region(chosen))
    if score < 0.5:
        raise LandmarkError(
            f"{name}: something like a face was found, but no landmarks on it (score {score:.2f}). "
            "Use a picture with a visible, upright face."
        )
    return Track(points[None], confidence[None], np.array([score], np.float32), len(faces))


def clip_landmarks(
    landmarker: Landmarker,
    frames: Sequence[UInt8[np.ndarray, "h w 3"]],
    face: int | None = None,
    name: str = "clip",
    probes: int = 8,
) -> Track:
    """Landmarks of one face through a clip.

    The face is chosen on `probes` frames spread over the clip: the largest steady one, or number
    `face` of them. From a frame that shows it, it is followed forwards and backwards, each frame
    looking where the points of the frame before lay, and detected anew where it is lost.

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
    points[start], confidence[start], score[start] = _settle(
        landmarker, frames[start], landmarker.face_region(first)
    )
    for order in (range(start + 1, len(frames)), range(start - 1, -1, -1)):
        last, found_before = points[start], True
        for index in order:
            found = _follow(landmarker, frames[index], last, found_before)
            found_before = found is not None
            if found is not None:
                points[index], confidence[index], score[index] = found
                last = points[index]
    return Track(points, confidence, score, len(tracks))


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
    points, confidence, score = _settle(landmarker, image, landmarker.face_region(best))
    return (points, confidence, score) if score >= 0.5 else None


def _settle(landmarker: Landmarker, image: np.ndarray, region: Region):
    # The detector's region is coarse: look again where the points turned out to be.
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.landmarker", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--wheel", help="the mediapipe 0.10.21 wheel, if it shall not be downloaded")
    parser.add_argument("--cache", type=Path, help=f"where the models are kept (default {cache_dir()})")
    args = parser.parse_args(argv)
    try:
        for path in fetch_models(args.wheel, args.cache).values():
            print(f"{path}  {path.stat().st_size / 1e6:.1f} MB, checksum right")
    except LandmarkError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
