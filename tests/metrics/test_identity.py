"""Identity: the alignment against dlib's own, the networks run, frames without a face."""

import sys
from pathlib import Path

import numpy as np
import pytest

from loki_jax.downloads import IDENTITY, DownloadError, cached_files
from loki_jax.fitting.landmarker import Region
from loki_jax.fitting.tracking import image_landmarks
from loki_jax.metrics.identity import (
    SAME_PERSON_DISTANCE,
    IdentityError,
    aligned_region,
    cosine_similarity,
    dlib_chip,
    embed_frames,
    embedding_distance,
    load_arcface,
    load_identity,
)
from loki_jax.video import read_video

FAULTS = Path(__file__).parents[1] / "faults"


@pytest.fixture(scope="module")
def embed():
    try:
        return load_identity()
    except (IdentityError, DownloadError) as error:
        pytest.skip(str(error))


CORNERS_AND_NOSE = [263, 362, 33, 133, 2]  # in dlib's order


def dlib_detection(dlib, points):
    whole = [dlib.point(*(int(value) for value in points[index, :2])) for index in CORNERS_AND_NOSE]
    return dlib.full_object_detection(dlib.rectangle(0, 0, 9, 9), whole)


def eye_and_nose_points():
    """478 landmarks of which those of dlib's five are set, in whole pixels of a 320 x 300 picture."""
    points = np.zeros((478, 3), np.float32)
    points[CORNERS_AND_NOSE, :2] = (205, 101), (177, 106), (100, 110), (130, 111), (158, 165)
    points += 0.5  # the centres of these pixels
    return points


def smooth_picture():
    y, x = np.mgrid[:300, :320] / 25
    return (127 + 120 * np.sin(x[..., None] + np.array([0, 1, 2]) + 0.7 * y[..., None])).astype(np.uint8)


def test_a_similarity_is_found_again():
    places = np.random.default_rng(0).uniform(size=(5, 2))
    region = Region(120.0, 80.0, 64.0, 0.7)
    cos, sin = np.cos(region.angle), np.sin(region.angle)
    points = (places - 0.5) @ np.array([[cos, sin], [-sin, cos]]) * region.side + (region.x, region.y)
    np.testing.assert_allclose(aligned_region(points, places), region, atol=1e-9)


def test_faces_are_aligned_as_dlib_aligns_them():
    dlib = pytest.importorskip("dlib")
    points, image = eye_and_nose_points(), smooth_picture()
    theirs = dlib.get_face_chip(image, dlib_detection(dlib, points), size=150, padding=0.25)
    # The rounding of both; dlib samples a smaller picture where it shrinks.
    assert np.abs(dlib_chip(image, points).astype(int) - theirs).mean() < 1.5


def test_embedding_is_that_of_dlib(embed, landmarker):
    pictures = pytest.importorskip(
        "skimage.data", reason="needs scikit-image (the eval extra) for a portrait"
    )
    dlib = pytest.importorskip("dlib")
    (path,) = cached_files(IDENTITY).values()
    network = dlib.face_recognition_model_v1(str(path))
    embeddings = []
    for image in (pictures.astronaut(), read_video(FAULTS / "scene_cut_zoom.mp4").frames[0]):
        points = image_landmarks(landmarker, image).points[0]
        own = embed(image, points)
        theirs = network.compute_face_descriptor(image, dlib_detection(dlib, points))
        # dlib takes landmarks in whole pixels.
        assert embedding_distance(own, np.array(theirs)) < 0.1
        embeddings.append(own)
    assert embedding_distance(*embeddings) > SAME_PERSON_DISTANCE


def test_frames_without_a_face_have_no_identity():
    embed = lambda image, points: points[:3, 0].astype(np.float64)
    points = np.arange(3 * 478 * 3, dtype=np.float32).reshape(3, 478, 3)
    found = np.array([True, False, True])
    embeddings = embed_frames(embed, np.zeros((3, 4, 4, 3), np.uint8), points, found)
    assert np.isnan(embeddings).all(1).tolist() == [False, True, False]
    cosine = cosine_similarity(embeddings, embeddings[0])
    assert cosine[0] == pytest.approx(1) and np.isnan(cosine[1])
    assert embedding_distance(embeddings, embeddings[0])[0] == 0
    assert cosine_similarity(np.array([0.0, 2]), np.array([3.0, 3])) == pytest.approx(np.sqrt(0.5))
    with pytest.raises(IdentityError, match="no face in any frame"):
        embed_frames(embed, np.zeros((3, 4, 4, 3), np.uint8), points, np.zeros(3, bool))


# --- ArcFace ----------------------------------------------------------------------------------------


def field(number, value):
    """A field of a protocol buffer: a whole number, text, or a message."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    data = value.encode() if isinstance(value, str) else value
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def onnx_of_means(size):
    """An ONNX file whose output is the mean of each channel of its input, (1, 3, size, size)."""

    def tensor(name, *shape):
        dimensions = b"".join(field(1, field(1, n)) for n in shape)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dimensions)))

    node = field(1, "x") + field(2, "y") + field(4, "GlobalAveragePool")
    graph = (
        field(1, node) + field(2, "g") + field(11, tensor("x", 1, 3, size, size))
        + field(12, tensor("y", 1, 3, 1, 1))
    )  # fmt: skip
    return field(1, 8) + field(7, graph) + field(8, field(2, 13))


def test_arcface_takes_a_file_of_the_users(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "arcface.onnx"
    path.write_bytes(onnx_of_means(112))
    image = np.broadcast_to(np.array([255, 0, 51], np.uint8), (300, 320, 3)).copy()
    points = np.full((478, 3), 150, np.float32)
    points[[33, 133, 362, 263, 1, 61, 291], :2] = (
        (110, 110), (140, 110), (180, 110), (210, 110), (160, 150), (130, 190), (190, 190)
    )  # fmt: skip
    np.testing.assert_allclose(load_arcface(path)(image, points), [1, -1, -0.6], atol=1e-4)
    path.write_bytes(onnx_of_means(64))
    with pytest.raises(IdentityError, match="arcface.onnx: its input is"):
        load_arcface(path)
    with pytest.raises(IdentityError, match="none.onnx: not an ONNX file"):
        load_arcface(tmp_path / "none.onnx")


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "dlib", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(IdentityError, match=r"loki_jax\[identity\]"):
        load_identity()
    with pytest.raises(IdentityError, match=r"loki_jax\[arcface\]"):
        load_arcface(tmp_path / "arcface.onnx")
