"""478 face landmarks, with confidence, from an image.

Three Apache-2.0 networks of the mediapipe 0.10.21 wheel (short-range face detector, 468-point face mesh,
iris; see `model_files`) run under ai-edge-litert; the mediapipe package itself is not needed. This module
does what surrounds the networks: anchors and suppression of the detector, crops turned upright by the eyes,
refinement of eyelids and irises. Method, section 12.

Coordinates are pixels with the origin at the image corner (the first pixel's centre is 0.5, 0.5), z on the
same scale, growing away from the camera, about zero at the head's middle. `points` has the order of the
points.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from loki_jax.fitting.lids import close_lids
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.fitting.points import IRIS_LEFT, IRIS_RIGHT, LIDS_LEFT, LIDS_RIGHT, N_POINTS, OUTER_EYE_CORNERS
from loki_jax.fitting.pose_bias import pose_bias
from loki_jax.fitting.task_file import (
    POINTS,
    POINTS_SIZE,
    SCORE_INPUTS,
    SCORE_NAMES,
    SCORES,
    STEM,
    read_task_file,
)


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

    @classmethod
    def around(cls, points: Float[np.ndarray, "n 2"], angle: float, scale: float) -> Region:
        """The square around the points' bounding box in a frame turned by `angle`, `scale` times as large."""
        cos, sin = np.cos(angle), np.sin(angle)
        upright = points @ np.array([[cos, -sin], [sin, cos]])
        low, high = upright.min(0), upright.max(0)
        centre = np.array([[cos, -sin], [sin, cos]]) @ ((low + high) / 2)
        return cls(float(centre[0]), float(centre[1]), float((high - low).max() * scale), float(angle))

    def image_from_crop(self, size: int, flip: bool = False) -> Float[np.ndarray, "2 3"]:
        """Affine map from continuous crop pixels (0..size) to continuous image pixels."""
        scale = self.side / size
        cos, sin = np.cos(self.angle) * scale, np.sin(self.angle) * scale
        linear = np.array([[cos, -sin], [sin, cos]])
        if flip:
            linear[:, 0] *= -1
        half = np.full(2, size / 2)
        return np.concatenate([linear, (np.array([self.x, self.y]) - linear @ half)[:, None]], axis=1)

    def points_in_image(
        self, points: Float[np.ndarray, "n 3"], size: int, flip: bool = False
    ) -> Float[np.ndarray, "n 3"]:
        """Points of a crop of `size` pixels, in pixels of the image; z takes the same scale."""
        matrix = self.image_from_crop(size, flip)
        xy = points[:, :2] @ matrix[:, :2].T + matrix[:, 2]
        return np.concatenate([xy, points[:, 2:] * (self.side / size)], axis=1).astype(np.float32)

    def cut(
        self, image: UInt8[np.ndarray, "h w 3"], size: int, flip: bool = False, replicate: bool = True
    ) -> UInt8[np.ndarray, "size size 3"]:
        """The region as a crop, mirrored if `flip`; outside the image its edge is repeated, or black."""
        import cv2

        matrix = self.image_from_crop(size, flip)
        # Bilinear sampling aliases when it skips pixels: shrink large faces by a whole factor first.
        factor = int(self.side // (2 * size))
        if factor > 1:
            height, width = (side // factor * factor for side in image.shape[:2])
            image = cv2.resize(
                image[:height, :width], (width // factor, height // factor), interpolation=cv2.INTER_AREA
            )
            matrix = matrix / factor
        # OpenCV puts the origin at the centre of the first pixel, we at its corner.
        matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5
        return cv2.warpAffine(
            image,
            matrix,
            (size, size),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE if replicate else cv2.BORDER_CONSTANT,
        )


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
    """Merge overlapping detections: the score-weighted mean of each group, best first.

    A box that is for the most part inside a better one, or has a better one inside, is dropped: it is a part
    or the surroundings of the same face.
    """
    remaining = np.argsort(-scores)
    merged = []
    while len(remaining):
        best = remaining[0]
        joined = np.array([box_overlap(boxes[best], boxes[i]) > overlap for i in remaining])
        nested = np.array([_nested(boxes[best], boxes[i]) for i in remaining])
        joined[0] = True
        group = remaining[joined]
        merged.append((np.average(values[group], axis=0, weights=scores[group]), float(scores[best])))
        remaining = remaining[~(joined | nested)]
    return merged


def _intersection(a: Float[np.ndarray, "4"], b: Float[np.ndarray, "4"]) -> float:
    inner = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return float(max(inner[0], 0) * max(inner[1], 0))


def _nested(a: Float[np.ndarray, "4"], b: Float[np.ndarray, "4"]) -> bool:
    smaller = min(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2]))
    return bool(_intersection(a, b) > 0.7 * smaller)


def box_overlap(a: Float[np.ndarray, "4"], b: Float[np.ndarray, "4"]) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    area = _intersection(a, b)
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - area
    return float(area / union) if union > 0 else 0.0


def _angle(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.arctan2(right[1] - left[1], right[0] - left[0]))


@contextlib.contextmanager
def _without_info() -> Iterator[None]:
    """Leave out the INFO lines that LiteRT, which has no option for it, writes to standard error."""
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            captured.seek(0)
            os.write(2, b"".join(line for line in captured if not line.startswith(b"INFO:")))


def eye_angle(face: FaceBox) -> float:
    """Angle of the line from eye to eye in radians, clockwise on screen; 0 for an upright face."""
    return _angle(face.keypoints[0], face.keypoints[1])


class Landmarker:
    """The three networks, ready to run on one image after another.

    Args:
      models: what `fetch_models` returns; with `with_task_file` the newer networks give lids and scores.
      threads: CPU threads of each network.

    Raises:
      LandmarkError: OpenCV or LiteRT is not installed, or a damaged `face_landmarker.task`.
    """

    n_scores = 0  # how many expression scores `second_look` gives
    _task: dict[str, Any] | None = None  # the newer networks by name

    def __init__(self, models: dict[str, Path], threads: int = 2):
        try:
            import cv2  # noqa: F401 (of the same extra: found missing here and not after the first image)
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise LandmarkError(
                f"Finding landmarks needs OpenCV and LiteRT ({error}). Run `pip install loki_jax[prep]`."
            ) from error

        def load(content: bytes) -> Interpreter:
            network = Interpreter(model_content=content, num_threads=threads)
            with _without_info():
                network.allocate_tensors()
            return network

        self._detector, self._mesh, self._iris = (
            load(models[stem].read_bytes())
            for stem in ("face_detection_short_range", "face_landmark", "iris_landmark")
        )
        if STEM in models:
            self.n_scores = len(SCORE_NAMES)
            self._task = {name: load(content) for name, content in read_task_file(models[STEM]).items()}
        self._anchors = ssd_anchors()

    def detect(self, image: UInt8[np.ndarray, "h w 3"], threshold: float = 0.5) -> list[FaceBox]:
        """Faces of an RGB image, largest first.

        Where the whole shows none, it is looked at from further away, since the network does not know faces
        that fill the picture, and then in ever smaller tiles.
        """
        height, width = image.shape[:2]
        side = max(height, width)
        found: list[FaceBox] = []
        for scale in (1, 1.5, 2):
            found = found or self._detect_in(
                image, Region(width / 2, height / 2, scale * side, 0.0), threshold
            )
        for parts in (2, 3, 4, 6, 8, 12, 16):
            if found or side / parts < (64 if parts <= 4 else 256):
                break
            step = side / (2 * parts)  # half-overlapping squares of side / parts
            for y in np.arange(step, height + step / 2, step):
                for x in np.arange(step, width + step / 2, step):
                    found += self._detect_in(image, Region(x, y, side / parts, 0.0), threshold)
        if not found:
            return []
        values = np.stack([np.concatenate([face.box, face.keypoints.ravel()]) for face in found])
        merged = suppress(values[:, :4], values, np.array([face.score for face in found]))
        faces = [FaceBox(value[:4], value[4:].reshape(6, 2), score) for value, score in merged]
        return sorted(faces, key=lambda face: -face.size)

    def _detect_in(self, image: np.ndarray, region: Region, threshold: float) -> list[FaceBox]:
        size = 128
        crop = region.cut(image, size, replicate=False)
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
        matrix = region.image_from_crop(size)
        points = points @ matrix[:, :2].T + matrix[:, 2]
        merged = suppress(points[:, :2].reshape(-1, 4), points.reshape(len(points), -1), scores[keep])
        return [FaceBox(value[:4], value[4:].reshape(6, 2), score) for value, score in merged]

    def face_region(self, face: FaceBox) -> Region:
        """Where the face network looks for the landmarks of a detected face."""
        angle = eye_angle(face)
        centre, side = (face.box[:2] + face.box[2:]) / 2, float((face.box[2:] - face.box[:2]).max())
        return Region(float(centre[0]), float(centre[1]), 1.5 * side, angle)

    def points_in(
        self, image: UInt8[np.ndarray, "h w 3"], region: Region
    ) -> tuple[Float[np.ndarray, "478 3"], Float[np.ndarray, "478"], float]:
        """Points, their confidence and the face score for one region of an RGB image."""
        size = 192
        crop = region.cut(image, size)
        raw, logit = _invoke(self._mesh, crop[None].astype(np.float32) / 255, (1404, 1))
        score = float(1 / (1 + np.exp(-np.clip(logit.item(), -80, 80))))
        points = np.empty((N_POINTS, 3), np.float32)
        points[:468] = region.points_in_image(raw.reshape(468, 3), size)
        confidence = np.full(N_POINTS, score, np.float32)
        for lids, iris, flip in ((LIDS_RIGHT, IRIS_RIGHT, False), (LIDS_LEFT, IRIS_LEFT, True)):
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
        crop = region.cut(image, size, flip)
        contour, iris = _invoke(self._iris, crop[None].astype(np.float32) / 255, (213, 15))
        contour = region.points_in_image(contour.reshape(71, 3)[:16], size, flip)
        iris = region.points_in_image(iris.reshape(5, 3), size, flip)
        openness = np.linalg.norm(contour[3:6, :2] - contour[11:14, :2], axis=1).mean() / max(width, 1e-6)
        return contour, iris, float(openness)

    def next_region(self, points: Float[np.ndarray, "478 3"]) -> Region:
        """The region of the next frame, from this frame's points."""
        left, right = OUTER_EYE_CORNERS
        return Region.around(points[:468, :2], _angle(points[left], points[right]), 1.5)

    def second_look(
        self, image: UInt8[np.ndarray, "h w 3"], points: Float[np.ndarray, "478 3"]
    ) -> tuple[Float[np.ndarray, "478 3"], Float[np.ndarray, " k"]]:
        """The points with the newer networks' lids, and their scores (`task_file`).

        Without `face_landmarker.task` the points as they are, and no scores.
        """
        if self._task is None:
            return points, np.zeros(0, np.float32)
        seen, scores = self.task_points(image, points)
        points = points.copy()
        lids = [*LIDS_RIGHT, *LIDS_LEFT]
        points[lids, :2] = seen[lids, :2]
        return points, scores

    def task_points(
        self, image: UInt8[np.ndarray, "h w 3"], points: Float[np.ndarray, "478 3"]
    ) -> tuple[Float[np.ndarray, "478 3"], Float[np.ndarray, "52"]]:
        """The newer networks' own points, found around `points`, and their scores.

        Raises:
          LandmarkError: made without `face_landmarker.task`.
        """
        network = self._newer()[POINTS]
        region = self.next_region(points)
        crop = region.cut(image, POINTS_SIZE)[None].astype(np.float32) / 255
        (raw,) = _invoke(network, crop, (1434,))
        seen = region.points_in_image(raw.reshape(N_POINTS, 3), POINTS_SIZE)
        return seen, self.expression_scores(seen)

    def expression_scores(self, points: Float[np.ndarray, "478 3"]) -> Float[np.ndarray, "52"]:
        """Expression scores (`task_file.SCORE_NAMES`) of points of the newer networks.

        Raises:
          LandmarkError: made without `face_landmarker.task`.
        """
        (scores,) = _invoke(self._newer()[SCORES], points[None, SCORE_INPUTS, :2], (52,))
        return scores.ravel()

    def _newer(self) -> dict[str, Any]:
        if self._task is None:
            raise LandmarkError("these landmark networks were loaded without face_landmarker.task")
        return self._task

    def correct(
        self,
        points: Float[np.ndarray, "n 478 3"],
        score: Float[np.ndarray, " n"],
        usual: Float[np.ndarray, " 2"] | None = None,
    ) -> Float[np.ndarray, "n 478 3"]:
        """Points of a clip, or of a portrait, without what the networks get wrong (`pose_bias`, `lids`).

        Args:
          usual: see `loki_jax.fitting.lids.close_lids`.
        """
        corrected = points.copy()
        for index in np.flatnonzero(score):
            corrected[index] = pose_bias().correct(points[index])
        return close_lids(corrected, score, usual)


def _invoke(network, value: np.ndarray, widths: tuple[int, ...]) -> list[np.ndarray]:
    """Outputs by their last dimension: the order in the file is not part of its contract."""
    network.set_tensor(network.get_input_details()[0]["index"], np.ascontiguousarray(value, np.float32))
    network.invoke()
    by_width = {int(d["shape"][-1]): network.get_tensor(d["index"]) for d in network.get_output_details()}
    return [by_width[width] for width in widths]
