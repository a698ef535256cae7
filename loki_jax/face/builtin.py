"""The built-in procedural head, read from its shipped arrays.

`tools/builtin_head` makes the arrays from analytic curves and writes them to `builtin.npz`: a head asset
with the labels of its vertices beside it. The constants here are what the generator and the painting of
appearances (`loki_jax.synthetic`) share.

FROZEN: the shipped demo model was trained on exactly these vertices, faces, bases and weights, and its
file refuses another head. A change to any of them needs a new demo model (docs/demo_model.md).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from scipy.interpolate import PchipInterpolator

from loki_jax.face.asset import HeadAsset, load_head, read_npz

NAME = "builtin"

# Anatomy of the mean head: metres, head frame.
EYE = np.array([0.0315, 0.0100, 0.0680])  # centre of the left eyeball
EYE_RADIUS = 0.0125
IRIS_DEGREES = 26.0  # the iris's edge, from the pupil's centre
MOUTH_Y = -0.0590

# Centre line (x, y) of the left brow.
BROW = np.array([(0.0110, 0.0285), (0.0200, 0.0325), (0.0320, 0.0350), (0.0430, 0.0335), (0.0520, 0.0285)])

# Parts of the mesh.
SKIN, EYEBALL, LID_RIM, CAVITY, UPPER_TEETH, LOWER_TEETH, EAR = range(7)
FILE = Path(__file__).with_name("builtin.npz")


@dataclasses.dataclass(frozen=True)
class BuiltinMesh:
    """The built-in head's mesh with what its own code needs to know of each vertex.

    Attributes:
      vertices: template positions.
      faces: counter-clockwise seen from outside.
      part: SKIN, EYEBALL, LID_RIM, CAVITY, UPPER_TEETH, LOWER_TEETH or EAR.
      phi, v: surface parameters (0 where a part is not on the loft).
      eye_ring: 0 on the lid's edge, growing outwards to 4; -1 elsewhere.
      lip: height across the lips: 0 no lip; +-1 inner contour, +-2 middle, +-3 border, +-4 and +-5
        skin rings outside; positive on the upper lip.
      depth: row within a part: rings of the eyeball (from the pupil), of the cavity (from the lips),
        of the teeth (from the gum), of the ear.
      left: +1 for the subject's left half, -1 right, 0 on the midline.
    """

    vertices: Float[np.ndarray, "V 3"]
    faces: Int[np.ndarray, "F 3"]
    part: Int[np.ndarray, " V"]
    phi: Float[np.ndarray, " V"]
    v: Float[np.ndarray, " V"]
    eye_ring: Int[np.ndarray, " V"]
    lip: Int[np.ndarray, " V"]
    depth: Int[np.ndarray, " V"]
    left: Int[np.ndarray, " V"]


def smoothstep(low, high, x):
    """Cubic step from 0 at `low` to 1 at `high`."""
    t = np.clip((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def bump(x, y, x0, y0, sx, sy):
    """Gaussian bump at (+-x0, y0): one bump if x0 is 0, a mirrored pair otherwise."""
    across = np.exp(-0.5 * ((x - x0) / sx) ** 2)
    if x0 != 0:
        across = across + np.exp(-0.5 * ((x + x0) / sx) ** 2)
    return across * np.exp(-0.5 * ((y - y0) / sy) ** 2)


def hairline(phi: Float[np.ndarray, " V"]) -> Float[np.ndarray, " V"]:
    """Ring parameter v of the hairline at azimuth phi: forehead, temple, round the ear, nape."""
    return PchipInterpolator(
        [0.0, 0.50, 0.85, 1.08, 1.25, 1.42, 1.75, 1.95, 2.40, np.pi],
        [0.089, 0.087, 0.076, 0.055, 0.022, 0.008, 0.010, -0.030, -0.070, -0.078],
    )(phi)


def builtin_head() -> HeadAsset:
    """The built-in head: joints root, neck, jaw, left_eye and right_eye, named bases, landmark sets
    "ibug68" and "mediapipe478".

    Metres; frame as in `loki_jax.face.types`. Method, section 3. Every call reads the file again.
    """
    return load_head(FILE)


def builtin_mesh() -> BuiltinMesh:
    """Vertices, faces and per-vertex labels of the built-in head, in the order of `builtin_head()`."""
    stored = read_npz(FILE)
    fields = (field.name for field in dataclasses.fields(BuiltinMesh))
    return BuiltinMesh(**{name: stored["faces" if name == "faces" else f"mesh_{name}"] for name in fields})
