"""Clips whose landmarks are known, and a stand-in for the networks that reads them off the frames."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np

from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.skinning import landmark_positions, make_identity, world_vertices
from loki_jax.face.types import Coefficients
from loki_jax.fitting.fit import make_camera
from loki_jax.fitting.landmarker import FaceBox, Landmarker, Region

N = 16
HEIGHT, WIDTH = 96, 128
RATE = Fraction(25)


def true_coefficients(head) -> Coefficients:
    """A turning, nodding, speaking head of 16 frames."""
    time = np.arange(N) / 25
    still = np.zeros((N, 3), np.float32)
    return Coefficients(
        betas=np.zeros((N, head.n_shape), np.float32),
        expression=np.zeros((N, head.n_expression), np.float32),
        rot=np.stack([0.1 * np.sin(5 * time), 0.4 * np.sin(4 * time), 0 * time], 1).astype(np.float32),
        tra=np.tile(np.array([0.0, 0.06, -1.2], np.float32), (N, 1)),
        neck=still,
        jaw=np.stack([0.1 * np.abs(np.sin(9 * time)), 0 * time, 0 * time], 1).astype(np.float32),
        eyes=still,
    )


def true_points(head, true) -> np.ndarray:
    """(N, 478, 3) landmarks in pixels of frames of HEIGHT x WIDTH."""
    camera = make_camera((HEIGHT, WIDTH))
    world = world_vertices(head, make_identity(head, jnp.asarray(true.betas)), true)
    pixels = project(camera_from_world(landmark_positions(head, world, "mediapipe478"), camera), camera)
    return np.concatenate([np.asarray(pixels), np.zeros((N, 478, 1))], axis=-1).astype(np.float32)


class KnownFace(Landmarker):
    """The networks' interface. A frame's grey value says which points it shows, 8 (index + 1); black and
    white frames show nobody."""

    def __init__(self, points: np.ndarray):
        self.points = points

    def _index(self, image) -> int:
        index = int(round(float(image.mean()) / 8)) - 1
        return index if index < len(self.points) else -1

    def detect(self, image):
        index = self._index(image)
        if index < 0:
            return []
        found = self.points[index, :468, :2]
        return [FaceBox(np.concatenate([found.min(0), found.max(0)]), np.zeros((6, 2)), 0.9)]

    def face_region(self, face):
        return Region(0.0, 0.0, 1.0, 0.0)

    def next_region(self, points):
        return Region(0.0, 0.0, 1.0, 0.0)

    def second_look(self, image, points):
        return points, np.zeros(0, np.float32)

    def correct(self, points, score, usual=None):
        return points

    def points_in(self, image, region):
        index = self._index(image)
        if index < 0:
            return np.zeros((478, 3), np.float32), np.zeros(478, np.float32), 0.0
        return self.points[index], np.ones(478, np.float32), 0.95


def frames_showing(indices) -> np.ndarray:
    """Grey frames that `KnownFace` takes for these ones; -1: nobody."""
    grey = np.array([8 * (index + 1) for index in indices], np.uint8)
    return np.broadcast_to(grey[:, None, None, None], (len(grey), HEIGHT, WIDTH, 3))
