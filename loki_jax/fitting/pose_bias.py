"""What the face network gets wrong as a head nods, and its correction.

The network draws a face that looks up or down too much like one that looks ahead: chin and brows move towards
where they are in a frontal face. A fit of such landmarks has four fifths of the head's pitch. How far each
landmark is off is known from renders of the built-in head (`tools/landmark_bias.py`) as a polynomial in the
pitch of the network's own 3D points, in units of the face. It is nearly the same for other heads and people.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from loki_jax.fitting.points import N_POINTS

FILE = Path(__file__).with_name("landmark_bias.npz")

# Pixels and the network's depths (y down, z away) to x right, y up, z towards the viewer.
_FLIP = np.array([1.0, -1.0, -1.0])


class FacePose(NamedTuple):
    """How the 3D points of a face are turned: pitch in radians (positive: down), the angle in the image
    (counter-clockwise) by which the upright face is turned, and pixels per unit of the mean face."""

    pitch: float
    roll: float
    scale: float


class PoseBias(NamedTuple):
    """The mean face, eye corners a unit apart, and the bias of each landmark.

    `bias[k]` is what the upright face's (x right, y up) landmarks are off for a pitch^(k+1), in radians.
    """

    face: Float[np.ndarray, "468 3"]
    bias: Float[np.ndarray, "degree 478 2"]

    def pose(self, points: Float[np.ndarray, "478 3"]) -> FacePose:
        """Pose of the network's points, by the best rotation of the mean face onto them."""
        found = points[: len(self.face)] * _FLIP
        found = found - found.mean(axis=0)
        turn = Rotation.align_vectors(found, self.face)[0].as_matrix()
        roll = np.arctan2(turn[1, 0], turn[0, 0])
        upright = Rotation.from_euler("z", -roll).as_matrix() @ turn
        pitch = np.arcsin(np.clip(-upright[1, 2], -1, 1))
        return FacePose(float(pitch), float(roll), float(np.linalg.norm(found) / np.linalg.norm(self.face)))

    def correct(self, points: Float[np.ndarray, "478 3"]) -> Float[np.ndarray, "478 3"]:
        """Points of one face without the bias; z as it was."""
        pitch, roll, scale = self.pose(points)
        powers = pitch ** np.arange(1, len(self.bias) + 1)
        offset = np.tensordot(powers, self.bias, 1) @ Rotation.from_euler("z", roll).as_matrix()[:2, :2].T
        corrected = points.copy()
        corrected[:, :2] -= offset * scale * _FLIP[:2]
        return corrected


@functools.cache
def pose_bias() -> PoseBias:
    """The bias of the network of the mediapipe 0.10.21 wheel."""
    with np.load(FILE) as stored:
        found = PoseBias(stored["face"].astype(np.float64), stored["bias"].astype(np.float64))
    if found.face.shape != (468, 3) or found.bias.shape[1:] != (N_POINTS, 2):
        raise ValueError(f"{FILE}: damaged. Run `python -m tools.landmark_bias` again.")
    return found
