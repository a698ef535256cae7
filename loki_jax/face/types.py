"""The value types that travel between fitting, data, rasterisation, training and metrics.

Frames and units everywhere in the package (method, section 3): metres and radians; the head's own
frame has +x to the subject's left, +y up and +z out of the face; `x_world = R(rot) x + tra`; the
camera frame is OpenCV's (+x right, +y down, +z away from the camera), reached from the world by
diag(1, -1, -1) and then the extrinsics. Pixels have their origin at the top-left corner of the
image, so the centre of the first pixel is at (0.5, 0.5).
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float

from loki_jax.arrays import ArrayLike


class Coefficients(NamedTuple):
    """Parametric-head coefficients; leading axes `*b` (clip, time) are shared by all fields.

    Rotations are rotation vectors (axis times angle, radians). An asset without the joint in
    question ignores that rotation. One `eyes` rotation serves both eyes.
    """

    betas: Float[ArrayLike, "*b n_shape"]
    expression: Float[ArrayLike, "*b n_expr"]
    rot: Float[ArrayLike, "*b 3"]  # global head rotation about the origin
    tra: Float[ArrayLike, "*b 3"]  # global translation, metres
    neck: Float[ArrayLike, "*b 3"]
    jaw: Float[ArrayLike, "*b 3"]
    eyes: Float[ArrayLike, "*b 3"]


class Camera(NamedTuple):
    """A pinhole camera: `intrinsics` are fx, fy, cx, cy in pixels of the uncropped frame."""

    intrinsics: Float[ArrayLike, "*b 4"]
    extrinsics: Float[ArrayLike, "*b 4 4"]
