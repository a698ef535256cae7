"""MediaPipe's blendshapes and head pose: against MediaPipe itself, and known motions."""

import zipfile

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.model_files import LandmarkError, fetch_models
from loki_jax.fitting.task_file import with_task_file
from loki_jax.fitting.tracking import image_landmarks
from loki_jax.metrics.blendshapes import (
    CanonicalFace,
    blendshape_distance,
    face_rotation,
    load_canonical_face,
    read_blendshapes,
)

# A face model of a few points, as the real one is not free to look at in tests without its file.
FACE = CanonicalFace(
    np.arange(7),
    np.array([[0, 0, 7.0], [-4, 3, 4], [4, 3, 4], [-3, -4, 4], [3, -4, 4], [0, 7, 5], [0, -7, 5]]),
    np.array([0.3, 0.1, 0.1, 0.05, 0.05, 0.2, 0.2]),
)


def seen_points(turn, size, distance=60.0):
    """Landmarks of `FACE` as MediaPipe's camera sees them: depth is relative, at the scale of x and y."""
    height, width = size
    places = turn.apply(FACE.positions) + (3, -2, -distance)
    focal = height / 2 / np.tan(np.radians(63) / 2)
    points = np.zeros((478, 3))
    points[:7, 0] = width / 2 + focal * places[:, 0] / -places[:, 2]
    points[:7, 1] = height / 2 - focal * places[:, 1] / -places[:, 2]
    points[:7, 2] = focal / distance * (-places[:, 2] - distance)
    # What is left of the landmarks lies at the mean depth, which is that of all.
    points[7:, 2] = points[:7, 2].mean()
    return points


@pytest.mark.parametrize("degrees", [(0, 0, 0), (20, 0, 0), (0, -35, 0), (5, 15, 25)])
def test_known_rotations_are_found(degrees):
    turn = Rotation.from_euler("xyz", degrees, degrees=True)
    found = Rotation.from_rotvec(face_rotation(FACE, seen_points(turn, (480, 640)), (480, 640)))
    # The procedure is exact for depths in true proportion; the offset of the model's origin is not known.
    assert np.degrees((found.inv() * turn).magnitude()) < 1.5


def test_distance_is_the_mean_difference():
    one, other = np.zeros((3, 51)), np.zeros((2, 51))
    other[1, :17] = 0.3
    np.testing.assert_allclose(blendshape_distance(one, other), [0, 0.1])
    other[0] = np.nan
    assert np.isnan(blendshape_distance(one, other)[0])


@pytest.fixture(scope="module")
def newer(landmarker, task_file):
    return Landmarker(with_task_file(fetch_models(), task_file), threads=1)


@pytest.fixture(scope="module")
def portrait():
    data = pytest.importorskip("skimage.data", reason="needs scikit-image (the eval extra) for a portrait")
    return data.astronaut()


def test_readings_are_those_of_mediapipe_and_turn_with_the_picture(golden, newer, task_file, portrait):
    expected = np.load(golden / "mediapipe_face.npz")
    matrix, face = expected["matrix"][:3, :3], load_canonical_face(task_file)

    def degrees_off(rotation):
        return np.degrees((Rotation.from_rotvec(rotation).inv() * Rotation.from_matrix(matrix)).magnitude())

    # From the same points, up to float32.
    assert degrees_off(face_rotation(face, expected["points"], portrait.shape[:2])) < 1e-3
    np.testing.assert_allclose(newer.expression_scores(expected["points"]), expected["scores"], atol=1e-5)
    # From the picture: the crop in which the points are found is another one, and so are they.
    near = image_landmarks(newer, portrait).points
    reading = read_blendshapes(newer, face, portrait[None], near, np.ones(1, bool))
    assert np.abs(reading.scores[0] - expected["scores"][1:]).mean() < 0.02
    assert degrees_off(reading.rotation[0]) < 2
    # A turned picture turns the head, and frames without a face have no numbers.
    turned = np.ascontiguousarray(np.rot90(portrait[:, :448]))
    frames = [portrait, portrait, turned]
    tracks = [image_landmarks(newer, frame).points[0] for frame in frames]
    reading = read_blendshapes(newer, face, frames, np.stack(tracks), np.array([True, False, True]))
    assert np.isnan(reading.scores[1]).all() and np.isnan(reading.rotation[1]).all()
    first, _, last = Rotation.from_rotvec(np.nan_to_num(reading.rotation))
    assert np.degrees((last * first.inv()).magnitude()) == pytest.approx(90, abs=4)
    assert blendshape_distance(reading.scores[2:], reading.scores[:1])[0] < 0.05


def test_other_files_and_landmarkers_are_refused(landmarker, tmp_path):
    with pytest.raises(LandmarkError, match="none.task: not MediaPipe's"):
        load_canonical_face(tmp_path / "none.task")
    for name, content in (("empty", b""), ("cut", b"\x0a\x7f\x1d"), ("text", b"no buffer at all")):
        with zipfile.ZipFile(tmp_path / f"{name}.task", "w") as archive:
            archive.writestr("geometry_pipeline_metadata_landmarks.binarypb", content)
        with pytest.raises(LandmarkError, match=f"{name}.task: not MediaPipe's"):
            load_canonical_face(tmp_path / f"{name}.task")
    with pytest.raises(LandmarkError, match="pass `default_landmarker"):
        read_blendshapes(landmarker, FACE, [], np.zeros((0, 478, 3)), np.zeros(0, bool))
