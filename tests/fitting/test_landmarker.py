"""The landmark networks' surroundings, and, where the networks can be had, what they find."""

from __future__ import annotations

import subprocess
import sys

import cv2
import numpy as np
import pytest

from loki_jax.fitting.landmarker import FaceBox, Landmarker, Region, ssd_anchors, suppress
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.fitting.points import LIDS_LEFT, LIDS_RIGHT
from loki_jax.fitting.tracking import Track, clip_landmarks, image_landmarks

# --- without the networks ---------------------------------------------------------------------------


def test_anchors_are_the_centres_of_two_grids():
    anchors = ssd_anchors()
    assert anchors.shape == (896, 2)
    np.testing.assert_allclose(anchors[:3], [[1 / 32, 1 / 32], [1 / 32, 1 / 32], [3 / 32, 1 / 32]])
    np.testing.assert_allclose(anchors[511], [31 / 32, 31 / 32])
    np.testing.assert_allclose(
        anchors[[512, 517, 518]], [[1 / 16, 1 / 16], [1 / 16, 1 / 16], [3 / 16, 1 / 16]]
    )
    # Every cell has as many anchors as any other, so the centres average to the middle.
    np.testing.assert_allclose(anchors.mean(0), 0.5, atol=1e-6)


def test_suppression_merges_overlapping_boxes_by_score():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]], float)
    merged = suppress(boxes, boxes, np.array([0.6, 0.9, 0.7]))
    assert [score for _, score in merged] == [0.9, 0.7]
    np.testing.assert_allclose(merged[0][0], [0.6, 0, 10.6, 10])
    np.testing.assert_allclose(merged[1][0], boxes[2])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("side", [150.0, 700.0])
def test_crop_and_its_map_agree(flip, side):
    """A bright spot in the crop lies where the map says, also when large crops are shrunk first."""
    target = np.array([430.5, 360.5])
    image = np.zeros((700, 800, 3), np.uint8)
    cv2.circle(image, (430, 360), 9, (255, 255, 255), -1)
    region = Region(420.0, 340.0, side, 0.4)
    crop = region.cut(image, 192, flip, replicate=False)[..., 0].astype(float)
    y, x = np.mgrid[:192, :192] + 0.5
    spot = np.array([(crop * x).sum(), (crop * y).sum()]) / crop.sum()
    matrix = region.image_from_crop(192, flip)
    np.testing.assert_allclose(matrix[:, :2] @ spot + matrix[:, 2], target, atol=0.02 * side / 192 + 0.1)


def test_region_encloses_turned_points():
    angle = 0.5
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    square = np.array([[-10, -20], [10, -20], [10, 20], [-10, 20]], float)
    region = Region.around(square @ turn.T + (100, 50), angle, 1.5)
    np.testing.assert_allclose(region, (100, 50, 60, angle), atol=1e-9)


class OneFace(Landmarker):
    """In place of the networks: a face at the centre of mass of a frame's bright pixels."""

    def __init__(self):
        self.detections = 0

    def detect(self, image):
        self.detections += 1
        if image.max() < 128:
            return []
        y, x = np.nonzero(image[..., 0] > 128)
        return [FaceBox(np.array([x.min(), y.min(), x.max(), y.max()], float), np.zeros((6, 2)), 0.9)]

    def face_region(self, face):
        return self._region(*((face.box[:2] + face.box[2:]) / 2))

    def next_region(self, points):
        return self._region(*points[:468, :2].mean(0))

    @staticmethod
    def _region(x, y):
        return Region(float(x), float(y), 40.0, 0.0)

    def points_in(self, image, region):
        x, y = int(region.x), int(region.y)
        near = image[max(y - 20, 0) : y + 20, max(x - 20, 0) : x + 20, 0] > 128
        if not near.any():
            return np.zeros((478, 3), np.float32), np.zeros(478, np.float32), 0.1
        found = np.argwhere(near).mean(0)
        centre = np.array([max(x - 20, 0) + found[1], max(y - 20, 0) + found[0], 0])
        spread = np.stack([np.cos(np.arange(478)), np.sin(np.arange(478)), np.zeros(478)], 1) * 10
        return (centre + spread).astype(np.float32), np.ones(478, np.float32), 0.9


def spot_frames(positions) -> list[np.ndarray]:
    frames = []
    for position in positions:
        frame = np.zeros((120, 200, 3), np.uint8)
        if position is not None:
            cv2.circle(frame, position, 10, (255, 255, 255), -1)
        frames.append(frame)
    return frames


def test_tracking_follows_loses_and_finds_again():
    positions = (
        [(30 + 4 * i, 60) for i in range(10)]
        + [None] * 3
        + [(150, 40)]
        + [(150 - 3 * i, 40) for i in range(6)]
    )
    networks = OneFace()
    track = clip_landmarks(networks, spot_frames(positions), probes=5)
    seen = track.score >= 0.5
    np.testing.assert_array_equal(seen, [position is not None for position in positions])
    centres = track.points[seen, :468, :2].mean(1)
    np.testing.assert_allclose(centres, np.array([p for p in positions if p], float), atol=1.0)
    assert (track.confidence[10:13] == 0).all()
    assert networks.detections < 5 + 12  # the detector runs on probes and on frames without the face only


def test_clip_without_face_is_refused():
    with pytest.raises(LandmarkError, match="street.mp4: no face found"):
        clip_landmarks(OneFace(), spot_frames([None] * 6), name="street.mp4")


# --- with the networks ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    """The astronaut Eileen Collins (NASA, public domain), face and shoulders; comes with scikit-image."""
    data = pytest.importorskip("skimage.data", reason="needs scikit-image (the eval extra) for a portrait")
    return np.ascontiguousarray(data.astronaut()[:256, 80:368])


@pytest.fixture(scope="module")
def found(landmarker, portrait) -> Track:
    return image_landmarks(landmarker, portrait)


def eye_width(points: np.ndarray) -> float:
    return float(np.linalg.norm(points[33, :2] - points[263, :2]))


def test_portrait_points_lie_where_a_face_has_them(found, portrait):
    points = found.points[0]
    assert points.shape == (478, 3) and found.score[0] > 0.95 and found.faces == 1
    inside = (points[:, :2] >= 0).all() and (points[:, :2] <= portrait.shape[1::-1]).all()
    assert inside
    # Subject's right eye on the image's left; brow above eye above nose above lips above chin.
    heights = points[[105, 159, 1, 13, 14, 152], 1]
    assert (np.diff(heights) > 0).all() and points[33, 0] < points[133, 0] < points[362, 0] < points[263, 0]
    for lids, iris in ((LIDS_RIGHT, 468), (LIDS_LEFT, 473)):
        contour = points[list(lids), :2].astype(np.float32)
        order = [*range(9), *range(15, 8, -1)]
        assert cv2.pointPolygonTest(contour[order], tuple(map(float, points[iris, :2])), True) > 0
        radius = np.linalg.norm(points[iris + 1 : iris + 5, :2] - points[iris, :2], axis=1)
        np.testing.assert_allclose(radius / np.linalg.norm(contour[0] - contour[8]), 0.2, atol=0.06)
    assert found.confidence[0].min() > 0.5


@pytest.mark.parametrize("degrees", [-25, 25])
def test_points_turn_with_the_picture(landmarker, portrait, found, degrees):
    centre = (portrait.shape[1] / 2, portrait.shape[0] / 2)
    matrix = cv2.getRotationMatrix2D(centre, degrees, 1.0)
    turned = cv2.warpAffine(portrait, matrix, portrait.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
    points = image_landmarks(landmarker, turned).points[0]
    expected = found.points[0, :, :2] @ matrix[:, :2].T + matrix[:, 2]
    error = np.linalg.norm(points[:, :2] - expected, axis=1).mean() / eye_width(points)
    assert error < 0.04


def test_points_mirror_with_the_picture(landmarker, portrait, found):
    points = image_landmarks(landmarker, np.ascontiguousarray(portrait[:, ::-1])).points[0]
    for left, right in ((33, 263), (61, 291), (468, 473), (159, 386), (1, 1)):
        mirrored = (portrait.shape[1] - points[left, 0], points[left, 1])
        assert np.linalg.norm(mirrored - found.points[0, right, :2]) < 0.05 * eye_width(points)


def test_small_face_in_a_large_picture(landmarker, portrait, found):
    canvas = np.full((1200, 1600, 3), 200, np.uint8)
    small = cv2.resize(portrait, (144, 128), interpolation=cv2.INTER_AREA)
    canvas[700:828, 1100:1244] = small
    points = image_landmarks(landmarker, canvas).points[0]
    expected = found.points[0, :, :2] * 0.5 + (1100, 700)
    assert np.linalg.norm(points[:, :2] - expected, axis=1).mean() < 0.06 * eye_width(points)


def test_two_faces_need_a_choice(landmarker, portrait):
    pair = np.concatenate([portrait, portrait[:, ::-1]], axis=1)
    with pytest.raises(LandmarkError, match=r"pair.png: 2 faces \(0: .* px at .*1: .*`--face INDEX`"):
        image_landmarks(landmarker, pair, name="pair.png")
    centres = [image_landmarks(landmarker, pair, face=i).points[0, 1, 0] for i in (0, 1)]
    assert abs(centres[0] - centres[1]) > portrait.shape[1] / 2
    with pytest.raises(LandmarkError, match="no face number 2"):
        image_landmarks(landmarker, pair, face=2)


def test_picture_without_face(landmarker):
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)
    with pytest.raises(LandmarkError, match="wall.jpg: no face found in this 300 x 200 image"):
        image_landmarks(landmarker, noise, name="wall.jpg")


def test_clip_of_a_moving_face(landmarker, portrait, found):
    """Sub-pixel motion of the picture comes back as motion of the points."""
    shifts = np.stack([np.linspace(0, 12, 7), np.linspace(0, -5, 7)], 1)
    frames = [
        cv2.warpAffine(
            portrait, np.array([[1, 0, x], [0, 1, y]]), portrait.shape[1::-1], borderMode=cv2.BORDER_REPLICATE
        )
        for x, y in shifts
    ]
    track = clip_landmarks(landmarker, frames)
    moved = (track.points[:, :, :2] - track.points[:1, :, :2]).mean(1)
    np.testing.assert_allclose(moved, shifts, atol=0.5)
    assert (track.score > 0.9).all()


def test_loading_the_networks_prints_nothing(landmarker):
    program = (
        "from loki_jax.fitting.landmarker import Landmarker\n"
        "from loki_jax.fitting.model_files import fetch_models\n"
        "Landmarker(fetch_models())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
