from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.model_files import LandmarkError

# MediaPipe's contours, each from the subject's right to left (lids: from the outer corner).
LID_RIGHT_UPPER = (33, 246, 161, 160, 159, 158, 157, 173, 133)
LID_RIGHT_LOWER = (33, 7, 163, 144, 145, 153, 154, 155, 133)
LID_LEFT_UPPER = (263, 466, 388, 387, 386, 385, 384, 398, 362)
LID_LEFT_LOWER = (263, 249, 390, 373, 374, 380, 381, 382, 362)
LIP_OUTER_UPPER = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291)
LIP_OUTER_LOWER = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291)
LIP_INNER_UPPER = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308)
LIP_INNER_LOWER = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308)

IRIS_RIGHT, IRIS_LEFT = 468, 473

MIDLINE = (
    10, 151, 9, 8, 168, 6, 197, 195, 5, 4, 1, 19, 94, 2, 164,
    0, 11, 12, 13, 14, 15, 16, 17, 18, 200, 199, 175, 152,
)  # fmt: skip


def mark(landmarker: Landmarker, image: np.ndarray) -> tuple[np.ndarray, float] | None:
    """Landmarks (478, 2) in pixels and the face score, or None where no face is seen."""
    faces = landmarker.detect(image)
    if not faces:
        return None
    region = landmarker.face_region(faces[0])
    for _ in range(3):
        points, _, score = landmarker.points_in(image, region)
        region = landmarker.next_region(points)
    return points[:, :2], score


def mirror_pairs(points: np.ndarray) -> np.ndarray:
    """The permutation that exchanges left and right among 468 points."""
    pairs = np.full(468, -1)
    pairs[list(MIDLINE)] = MIDLINE
    for right, left in (
        (LID_RIGHT_UPPER, LID_LEFT_UPPER),
        (LID_RIGHT_LOWER, LID_LEFT_LOWER),
        *((row, row[::-1]) for row in (LIP_OUTER_UPPER, LIP_OUTER_LOWER, LIP_INNER_UPPER, LIP_INNER_LOWER)),
    ):
        for a, b in zip(right, left, strict=True):
            pairs[a], pairs[b] = b, a
    free = np.flatnonzero(pairs < 0)
    mirrored = points[free] * [-1, 1, 1]
    distance = ((mirrored[:, None] - points[free][None]) ** 2).sum(-1)
    _, match = linear_sum_assignment(distance + distance.T)
    pairs[free] = free[match]
    if not (pairs[pairs] == np.arange(468)).all():
        raise LandmarkError("the marks are not symmetric enough to pair left with right")
    return pairs
