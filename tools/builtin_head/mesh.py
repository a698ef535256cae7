"""The surface of the built-in head, made from analytic curves alone.

How it is made (all lengths in metres, head frame: x to the subject's left, y up, z out of the face):

1. A *loft*: closed rings from the crown over face, chin and throat to the shoulders. A surface point
   has the ring parameter v (the height of the ring's front point while on the face) and the azimuth
   phi (0 at the face's midline, pi at the back).
2. Points in the unrolled half-domain: concentric rings round eye opening and mouth, rows along the
   brow, nose points, and graded fill points, triangulated by Delaunay; eye opening and mouth slit are
   cut out. Only x >= 0 is built; the other half is its exact mirror image.
3. Smooth bumps sculpt nose, sockets, cheeks, lips and chin; the lids are laid on the eyeball.
4. Eyeballs, lid rims, ears, the mouth's cavity and two rows of teeth are added.

Everything is deterministic: no random numbers, and no tie in the triangulation (fill points come from a
low-discrepancy sequence and are relaxed), so every machine gets the same arrays.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int
from scipy.interpolate import PchipInterpolator
from scipy.spatial import Delaunay, cKDTree

from data_prep.landmarks.surface import locate
from loki_jax.face.asset import Landmarks
from loki_jax.face.builtin import (
    BROW,
    CAVITY,
    EAR,
    EYE,
    EYE_RADIUS,
    EYEBALL,
    LID_RIM,
    LOWER_TEETH,
    MOUTH_Y,
    SKIN,
    UPPER_TEETH,
    BuiltinMesh,
    bump,
    smoothstep,
)

LID_THICKNESS = 0.0009

MOUTH_HALF_WIDTH = 0.0250

# v, front (y, z), side (y, z), back (y, z), half-width: the loft's control rings, crown to shoulders.
_RINGS = np.array(
    [
        (0.1900, 0.1265, -0.012, 0.1265, -0.012, 0.1265, -0.0120, 0.0000),
        (0.1750, 0.1255, 0.008, 0.1252, -0.012, 0.1240, -0.0360, 0.0170),
        (0.1550, 0.1210, 0.032, 0.1190, -0.012, 0.1130, -0.0640, 0.0355),
        (0.1300, 0.1090, 0.056, 0.1050, -0.012, 0.0900, -0.0860, 0.0540),
        (0.1050, 0.0920, 0.0725, 0.0880, -0.012, 0.0660, -0.0975, 0.0660),
        (0.0800, 0.0740, 0.0830, 0.0680, -0.012, 0.0460, -0.1020, 0.0732),
        (0.0550, 0.0535, 0.0895, 0.0460, -0.011, 0.0280, -0.1025, 0.0765),
        (0.0350, 0.0350, 0.0920, 0.0260, -0.010, 0.0100, -0.0995, 0.0760),
        (0.0120, 0.0120, 0.0900, 0.0060, -0.009, -0.0100, -0.0930, 0.0740),
        (-0.0100, -0.0100, 0.0895, -0.0130, -0.009, -0.0260, -0.0845, 0.0715),
        (-0.0350, -0.0350, 0.0905, -0.0350, -0.009, -0.0420, -0.0735, 0.0680),
        (-0.0590, -0.0590, 0.0905, -0.0560, -0.008, -0.0560, -0.0655, 0.0635),
        (-0.0800, -0.0800, 0.0850, -0.0720, -0.005, -0.0680, -0.0605, 0.0580),
        (-0.0980, -0.0980, 0.0785, -0.0840, -0.002, -0.0780, -0.0580, 0.0535),
        (-0.1120, -0.1085, 0.0680, -0.0930, -0.003, -0.0860, -0.0570, 0.0505),
        (-0.1300, -0.1130, 0.0510, -0.1020, -0.006, -0.0950, -0.0570, 0.0485),
        (-0.1500, -0.1200, 0.0330, -0.1130, -0.010, -0.1060, -0.0575, 0.0480),
        (-0.1750, -0.1410, 0.0270, -0.1320, -0.014, -0.1220, -0.0600, 0.0495),
        (-0.2000, -0.1620, 0.0290, -0.1500, -0.017, -0.1380, -0.0640, 0.0580),
        (-0.2200, -0.1760, 0.0350, -0.1620, -0.018, -0.1500, -0.0700, 0.0850),
        (-0.2450, -0.1920, 0.0470, -0.1740, -0.018, -0.1620, -0.0780, 0.1350),
        (-0.2700, -0.2200, 0.0560, -0.1980, -0.018, -0.1850, -0.0830, 0.1700),
        (-0.2950, -0.2500, 0.0620, -0.2400, -0.018, -0.2200, -0.0850, 0.1800),
    ]
)[::-1]

_RING_CURVES = PchipInterpolator(_RINGS[:, 0], _RINGS[:, 1:])

_V_TOP, _V_BOTTOM = 0.1850, -0.2950

# Eye opening around EYE: half-widths towards nose and temple, heights of the upper and lower lid.
_EYE_IN, _EYE_OUT, _EYE_UP, _EYE_DOWN = 0.0150, 0.0150, 0.0058, 0.0048

_EYE_RINGS = (0.0, 0.0014, 0.0032, 0.0058, 0.0092)  # distance from the opening

_EYE_POINTS = 20

# Mouth: heights of the vermilion border above and below the mouth line.
_LIP_UP, _LIP_DOWN = 0.0080, 0.0100

_LIP_POINTS = 10


def _loft(phi, v):
    """Surface points (n, 3) of the unsculpted head at azimuth `phi` and ring `v`."""
    front_y, front_z, side_y, side_z, back_y, back_z, width = _RING_CURVES(v).T
    c, s = np.cos(phi), np.sin(phi)
    forward, backward = np.maximum(c, 0.0), np.maximum(-c, 0.0)
    x = np.where((phi == 0) | (phi == np.pi), 0.0, width * s)
    y = side_y + forward * (front_y - side_y) + backward * (back_y - side_y)
    z = side_z + forward * (front_z - side_z) + backward * (back_z - side_z)
    return np.stack([x, y, z], -1)


def _face_parameters(x, y):
    """The (phi, v) on the front half at which the loft passes through frontal position (x, y)."""
    v = np.asarray(y, float).copy()
    for _ in range(12):
        phi = np.arcsin(np.clip(x / _RING_CURVES(v)[..., 6], 0.0, 1.0))
        v = v + (y - _loft(phi, v)[..., 1])
    return np.stack([np.where(np.asarray(x) == 0, 0.0, phi), v], -1)


_NOSE_HEIGHT = PchipInterpolator(
    [-0.049, -0.043, -0.0385, -0.0345, -0.0300, -0.0250, -0.0160, -0.0040, 0.0140, 0.0300],
    [0.0, 0.0015, 0.0040, 0.0120, 0.0215, 0.0240, 0.0185, 0.0105, 0.0015, 0.0],
    extrapolate=False,
)

_NOSE_WIDTH = PchipInterpolator(
    [-0.05, -0.036, -0.026, -0.015, 0.0, 0.03], [0.0100, 0.0100, 0.0096, 0.0078, 0.0062, 0.0070]
)


def _sculpt(points, phi):
    """Add nose, sockets, brow, cheeks, lips and chin to loft points; returns new points."""
    x, y = points[:, 0], points[:, 1]
    front = smoothstep(-0.05, 0.35, np.cos(phi))
    nose = np.nan_to_num(_NOSE_HEIGHT(y)) * np.exp(
        -((np.abs(x) / _NOSE_WIDTH(np.clip(y, -0.05, 0.03))) ** 2.2)
    )
    upper_lip = np.exp(-0.5 * ((y - MOUTH_Y - 0.0048) / 0.0034) ** 2) * np.clip(1 - (x / 0.027) ** 2, 0, None)
    lower_lip = np.exp(-0.5 * ((y - MOUTH_Y + 0.0060) / 0.0038) ** 2) * np.clip(1 - (x / 0.025) ** 2, 0, None)
    dz = (
        nose
        + 0.0070 * bump(x, y, 0.0128, -0.0310, 0.0040, 0.0048)  # wings of the nose
        - 0.0065 * bump(x, y, 0.0300, 0.0080, 0.0140, 0.0110)  # eye sockets
        - 0.0030 * bump(x, y, 0.0140, 0.0120, 0.0050, 0.0080)
        + 0.0035 * bump(x, y, 0.0260, 0.0310, 0.0190, 0.0065)  # brow ridge
        + 0.0015 * bump(x, y, 0.0, 0.0280, 0.0100, 0.0070)
        + 0.0040 * bump(x, y, 0.0440, -0.0150, 0.0140, 0.0120)  # cheekbones
        - 0.0025 * bump(x, y, 0.0420, -0.0530, 0.0120, 0.0160)  # below them
        - 0.0015 * bump(x, y, 0.0660, 0.0400, 0.0100, 0.0200)  # temples
        + 0.0035 * bump(x, y, 0.0, -0.0570, 0.0200, 0.0160)  # round of the teeth
        + 0.0042 * upper_lip
        + 0.0055 * lower_lip
        - 0.0022 * bump(x, y, 0.0265, MOUTH_Y, 0.0040, 0.0045)  # corners
        - 0.0012 * bump(x, y, 0.0, -0.0470, 0.0030, 0.0040)  # philtrum
        - 0.0045 * bump(x, y, 0.0, -0.0780, 0.0170, 0.0045)  # fold above the chin
        + 0.0060 * bump(x, y, 0.0, -0.0940, 0.0150, 0.0100)  # chin
    )
    dx = np.sign(x) * (
        0.0020 * bump(x, y, 0.0580, -0.0120, 0.0120, 0.0120)
        + 0.0030 * np.exp(-0.5 * ((np.abs(x) - 0.058) / 0.015) ** 2 - 0.5 * ((y + 0.066) / 0.014) ** 2)
    )
    return points + np.stack([front * dx, np.zeros_like(dz), front * dz], -1)


def _eye_ring(offset, count):
    """Frontal (x, y) of one ring round the left eye opening; the first point is the outer corner.

    Points 0 .. count/2 run over the upper lid to the inner corner, the rest along the lower lid.
    """
    angle = 2 * np.pi * np.arange(count) / count
    c, s = np.cos(angle), np.sin(angle)
    across = np.where(c > 0, _EYE_OUT, _EYE_IN) + offset
    power = 1.15 if offset == 0 else 1.0
    tall = np.where(s > 0, _EYE_UP, _EYE_DOWN) + offset
    # The outer corner lies a little higher than the inner one.
    y = tall * np.sign(s) * np.abs(s) ** power + 0.0010 * c
    return np.stack([EYE[0] + across * c, EYE[1] + y], -1)


def lid_edges():
    """Frontal curves (n, 2) of the left eye's upper and lower lid edge, both from nose to temple."""
    ring = _eye_ring(0.0, _EYE_POINTS)
    half = _EYE_POINTS // 2
    return ring[half::-1], np.concatenate([ring[half:], ring[:1]])


def _lip_rows():
    """Frontal rows of the half mouth: list of (lip tag, xy (n, 2)), from the midline to the corner."""
    s = np.linspace(0.0, 1.0, _LIP_POINTS + 1)
    s = np.sin(s * np.pi / 2) * 0.7 + s * 0.3  # denser towards the corner
    lens = (1 - s**2) ** 0.5
    bow = 1.0 - 0.16 * np.exp(-0.5 * (s / 0.10) ** 2) - 0.25 * smoothstep(0.2, 1.0, s)  # cupid's bow
    rows = []
    for side, height in ((1, _LIP_UP), (-1, _LIP_DOWN)):
        profile = lens * (bow if side > 0 else 1.0)
        for tag, out, rise in (
            (1, 0.0, 0.0012 / height),
            (2, 0.0, 0.5),
            (3, 0.0003, 1.0),
            (4, 0.0028, 1.0),
            (5, 0.0068, 1.0),
        ):
            width = MOUTH_HALF_WIDTH + out
            y = MOUTH_Y + side * (rise * height * profile + out * lens**0.5)
            xy = np.stack([width * s, y], -1)
            # Corners are shared: inner, middle and border rows end in one point, kept by the inner row.
            keep = slice(None) if (side > 0 and tag in (1, 4, 5)) else slice(None, -1)
            if tag in (2, 3):
                keep = slice(None, -1)
            rows.append((side * tag, xy[keep]))
    return rows


def _brow_points():
    """Frontal points of five rows along the left brow."""
    curve = PchipInterpolator(BROW[:, 0], BROW[:, 1])
    x = np.linspace(BROW[0, 0], BROW[-1, 0], 11)
    rows = [
        np.stack([x + shift, curve(np.clip(x, BROW[0, 0], BROW[-1, 0])) + rise], -1)
        for rise, shift in ((-0.0052, 0.0012), (-0.0022, 0.0), (0.0016, 0.0012), (0.0046, 0.0))
    ]
    return np.concatenate(rows)


_NOSE_POINTS = np.array(
    [
        *[(0.0035 + 0.0010 * k, 0.016 - 0.0062 * k) for k in range(5)],
        *[(0.0085 + 0.0012 * k, 0.010 - 0.0068 * k) for k in range(4)],
        (0.0062, -0.0195), (0.0058, -0.0250), (0.0050, -0.0300), (0.0105, -0.0230), (0.0100, -0.0280),
        (0.0150, -0.0240), (0.0172, -0.0285), (0.0180, -0.0330), (0.0160, -0.0370), (0.0138, -0.0310),
        (0.0120, -0.0350), (0.0112, -0.0385), (0.0070, -0.0345), (0.0066, -0.0385), (0.0035, -0.0350),
        (0.0205, -0.0270), (0.0215, -0.0340), (0.0190, -0.0400), (0.0130, -0.0420), (0.0090, -0.0330),
    ]
)  # fmt: skip

_FRONT_MIDLINE = np.concatenate(
    [
        np.linspace(0.172, 0.100, 7),
        np.linspace(0.091, 0.044, 7),
        [0.037, 0.031, 0.025, 0.019, 0.0135, 0.008, 0.002, -0.004, -0.010, -0.0155, -0.0205, -0.0250],
        [-0.0285, -0.0315, -0.0345, -0.0380, -0.0425],
        [-0.0825, -0.0880, -0.0935, -0.0990, -0.105, -0.112, -0.121, -0.132, -0.146, -0.162],
        [-0.180, -0.198, -0.215, -0.232, -0.250, -0.272],
    ]
)

_BACK_MIDLINE = np.concatenate([np.linspace(0.165, -0.13, 16), np.linspace(-0.155, -0.27, 6)])


def _unroll(parameters):
    """(phi, v) -> planar points whose distances are close to those on the surface."""
    phi, v = parameters[..., 0], parameters[..., 1]
    width = np.clip(_RING_CURVES(v)[..., 6], 0.022, 0.085)
    return np.stack([phi * width, v], -1)


def _spacing(phi, v):
    """Wanted distance between neighbouring points."""
    side = smoothstep(0.55, 1.5, phi)
    back = smoothstep(1.7, 2.6, phi)
    high = smoothstep(0.045, 0.100, v)
    low = smoothstep(-0.098, -0.150, v)
    face = 0.0068 + 0.0040 * side + 0.0085 * back
    return face + 0.0034 * high * (1 - 0.7 * back) + 0.009 * low + 0.012 * smoothstep(-0.20, -0.28, v)


def _half_points():
    """Points of the half-domain: parameters (n, 2), eye ring (n,), lip tag (n,), how many are fixed."""
    groups = []  # (parameters, eye_ring, lip)
    for ring, offset in enumerate(_EYE_RINGS):
        xy = _eye_ring(offset, _EYE_POINTS)
        groups.append((_face_parameters(xy[:, 0], xy[:, 1]), ring, 0))
    for tag, xy in _lip_rows():
        groups.append((_face_parameters(xy[:, 0], xy[:, 1]), -1, tag))
    groups.append((_face_parameters(*_NOSE_POINTS.T), -1, 0))
    groups.append((np.stack([np.zeros_like(_FRONT_MIDLINE), _FRONT_MIDLINE], -1), -1, 0))
    groups.append((np.stack([np.full_like(_BACK_MIDLINE, np.pi), _BACK_MIDLINE], -1), -1, 0))
    for v, count in ((_V_TOP, 7), (_V_BOTTOM, 13)):
        phi = np.linspace(0.0, np.pi, count)
        groups.append((np.stack([phi, np.full(count, v)], -1), -1, 0))
    structural = np.concatenate([g[0] for g in groups])
    # Brow rows are dropped where they come too close to the eye's outermost ring.
    brow = _face_parameters(*_brow_points().T)
    gap, _ = cKDTree(_unroll(structural)).query(_unroll(brow))
    groups.append((brow[gap > 0.0022], -1, 0))
    parameters = np.concatenate([g[0] for g in groups])
    eye_ring = np.concatenate([np.full(len(g[0]), g[1]) for g in groups])
    lip = np.concatenate([np.full(len(g[0]), g[2]) for g in groups])

    # Fill: a low-discrepancy sequence, each candidate kept unless something is too near (fine first).
    index = np.arange(1, 24001)
    phi = np.pi * np.mod(0.5 + index * 0.7548776662466927, 1.0)
    v = _V_BOTTOM + (_V_TOP - _V_BOTTOM) * np.mod(0.5 + index * 0.5698402909980532, 1.0)
    candidates, wanted = np.stack([phi, v], -1), _spacing(phi, v)
    plane = _unroll(candidates)
    fixed_plane = _unroll(parameters)
    gap, _ = cKDTree(fixed_plane).query(plane)
    inside = _inside(plane, _eye_polygon()) | _inside(plane, _mouth_polygon())
    margin = np.minimum(plane[:, 0], _unroll(np.stack([np.full_like(v, np.pi), v], -1))[:, 0] - plane[:, 0])
    possible = (gap > 0.72 * wanted) & ~inside & (margin > 0.55 * wanted)
    kept = np.zeros((0, 2))
    accepted = []
    for i in np.flatnonzero(possible):
        if len(kept) == 0 or ((kept - plane[i]) ** 2).sum(-1).min() > (0.86 * wanted[i]) ** 2:
            kept = np.concatenate([kept, plane[i : i + 1]])
            accepted.append(i)
    n_fixed = len(parameters)
    parameters = np.concatenate([parameters, candidates[accepted]])
    pad = len(parameters) - n_fixed
    return parameters, np.pad(eye_ring, (0, pad), constant_values=-1), np.pad(lip, (0, pad)), n_fixed


def _eye_polygon():
    xy = _eye_ring(0.0, _EYE_POINTS)
    return _unroll(_face_parameters(xy[:, 0], xy[:, 1]))


def _mouth_polygon():
    rows = dict(_lip_rows())
    xy = np.concatenate([rows[1], rows[-1][::-1]])
    return _unroll(_face_parameters(xy[:, 0], xy[:, 1]))


def _inside(points, polygon):
    """Even-odd test of (n, 2) points against a closed polygon (m, 2)."""
    a, b = polygon, np.roll(polygon, -1, axis=0)
    x, y = points[:, :1], points[:, 1:]
    crosses = (a[:, 1] > y) != (b[:, 1] > y)
    rise = np.where(b[:, 1] == a[:, 1], 1.0, b[:, 1] - a[:, 1])
    at = a[:, 0] + (y - a[:, 1]) / rise * (b[:, 0] - a[:, 0])
    return (crosses & (x < at)).sum(-1) % 2 == 1


def _triangulate(parameters):
    """Counter-clockwise Delaunay faces of the half-domain, before holes are cut."""
    plane = _unroll(parameters)
    faces = Delaunay(plane).simplices
    a, b, c = plane[faces[:, 0]], plane[faces[:, 1]], plane[faces[:, 2]]
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    faces = np.where(area[:, None] > 0, faces, faces[:, ::-1])
    # The back's boundary is curved in the plane: drop what lies outside it and flat slivers.
    centroid = plane[faces].mean(1)
    limit = _unroll(np.stack([np.full(len(faces), np.pi), centroid[:, 1]], -1))[:, 0]
    on_back = (parameters[faces, 0] == np.pi).all(-1)
    faces = faces[(np.abs(area) > 1e-10) & ~on_back & (centroid[:, 0] < limit)]
    # One order whatever the library's version: smallest index first in a face, faces sorted.
    first = np.argmin(faces, axis=1)
    faces = np.take_along_axis(faces, (first[:, None] + np.arange(3)) % 3, axis=1)
    return faces[np.lexsort(faces.T[::-1])]


def _relax(parameters, n_fixed, rounds):
    """Move the fill points towards the mean of their neighbours."""
    parameters = parameters.copy()
    for _ in range(rounds):
        faces = _triangulate(parameters)
        plane = _unroll(parameters)
        edges = np.unique(
            np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), -1), axis=0
        )
        total, degree = np.zeros_like(plane), np.zeros(len(plane))
        for i, j in (edges.T, edges.T[::-1]):
            np.add.at(total, i, plane[j])
            np.add.at(degree, i, 1)
        moved = plane + 0.5 * (total / np.maximum(degree, 1)[:, None] - plane)
        scale = _unroll(np.stack([np.ones(len(plane)), moved[:, 1]], -1))[:, 0]
        new = np.stack([moved[:, 0] / scale, moved[:, 1]], -1)
        parameters[n_fixed:] = new[n_fixed:]
    return parameters


class _Half:
    """The growing half mesh: lists of vertices with tags, and faces."""

    def __init__(self):
        self.rows = {key: [] for key in ("xyz", "part", "phi", "v", "eye_ring", "lip", "depth")}
        self.faces = []
        self.count = 0

    def add(self, xyz, part, faces=None, phi=0.0, v=0.0, eye_ring=-1, lip=0, depth=0):
        """Append vertices (n, 3); returns their indices."""
        n = len(xyz)
        tags = {"part": part, "phi": phi, "v": v, "eye_ring": eye_ring, "lip": lip, "depth": depth}
        self.rows["xyz"].append(np.asarray(xyz, float))
        for key, value in tags.items():
            self.rows[key].append(np.broadcast_to(value, (n,)))
        index = self.count + np.arange(n)
        self.count += n
        if faces is not None:
            self.faces.append(index[faces])
        return index

    def strip(self, a, b, closed=False, flip=False):
        """Join two equally long vertex rows; counter-clockwise if b lies left of a's direction."""
        a, b = np.asarray(a), np.asarray(b)
        if closed:
            a, b = np.append(a, a[0]), np.append(b, b[0])
        faces = np.concatenate([np.stack([a[:-1], a[1:], b[1:]], -1), np.stack([a[:-1], b[1:], b[:-1]], -1)])
        self.faces.append(faces[:, ::-1] if flip else faces)

    def fan(self, ring, apex, flip=False):
        ring = np.asarray(ring)
        faces = np.stack([ring[:-1], ring[1:], np.full(len(ring) - 1, apex)], -1)
        self.faces.append(faces[:, ::-1] if flip else faces)


def lid_z(x, y, radius):
    """Front z of a sphere of `radius` round the left eyeball's centre, clamped at its equator."""
    return EYE[2] + np.sqrt(np.maximum(radius**2 - (x - EYE[0]) ** 2 - (y - EYE[1]) ** 2, 1e-6))


LID_WEIGHT = np.array([1.0, 1.0, 1.0, 0.45, 0.0])  # how firmly each eye ring lies on the eyeball


def _add_skin(half):
    """Loft, sculpted, with eye and mouth holes; returns indices of eye edge and lip contours."""
    parameters, eye_ring, lip, n_fixed = _half_points()
    parameters = _relax(parameters, n_fixed, 8)
    faces = _triangulate(parameters)
    plane = _unroll(parameters)
    centroid = plane[faces].mean(1)
    inner_lip = np.abs(lip) == 1
    hole = ((eye_ring[faces] == 0).all(-1) & _inside(centroid, _eye_polygon())) | (
        inner_lip[faces].all(-1) & _inside(centroid, _mouth_polygon())
    )
    faces = faces[~hole]
    phi, v = parameters.T
    xyz = _sculpt(_loft(phi, v), phi)
    # Lids lie on the eyeball.
    ring = eye_ring >= 0
    weight = np.where(ring, LID_WEIGHT[np.maximum(eye_ring, 0)], 0.0)
    on_ball = lid_z(xyz[:, 0], xyz[:, 1], EYE_RADIUS + LID_THICKNESS)
    xyz[:, 2] += weight * (on_ball - xyz[:, 2])
    upper = ring & (xyz[:, 1] > EYE[1] + 0.001)
    xyz[:, 2] -= np.where(upper & (eye_ring == 2), 0.0003, 0.0)  # crease of the upper lid
    xyz[:, 2] += np.where(upper & (eye_ring == 3), 0.0009, 0.0)
    # The lips' inner contours meet and lie a little deeper.
    xyz[:, 1] = np.where(inner_lip, MOUTH_Y, xyz[:, 1])
    xyz[:, 2] -= np.where(inner_lip, 0.0022, 0.0)
    index = half.add(xyz, SKIN, faces, phi=phi, v=v, eye_ring=eye_ring, lip=lip)
    top = index[np.flatnonzero(v == _V_TOP)]
    pole = half.add(_loft(np.zeros(1), np.array([0.19])), SKIN, phi=0.0, v=0.19)
    half.fan(top[np.argsort(phi[v == _V_TOP])], pole[0])
    edge = index[np.flatnonzero(eye_ring == 0)]
    upper_lip, lower_lip = index[np.flatnonzero(lip == 1)], index[np.flatnonzero(lip == -1)]
    return edge, upper_lip, lower_lip


def _add_eye(half, edge):
    """Rim of the lids (the lid's thickness) and the left eyeball."""
    rim = half.rows["xyz"][0][edge] - EYE
    rim = EYE + rim * ((EYE_RADIUS - 0.0012) / np.linalg.norm(rim, axis=-1, keepdims=True))
    rim_index = half.add(rim, LID_RIM, eye_ring=0)
    half.strip(edge, rim_index, closed=True)  # the edge runs counter-clockwise, the rim lies inside
    segments = 16
    pole = half.add(EYE[None] + [[0, 0, EYE_RADIUS]], EYEBALL)
    previous = None
    for row, degrees in enumerate((9.0, 12.0, 24.0, 28.5, 40.0, 58.0, 80.0, 105.0), start=1):
        t = np.deg2rad(degrees)
        a = 2 * np.pi * np.arange(segments) / segments
        ring = np.stack([np.sin(t) * np.cos(a), np.sin(t) * np.sin(a), np.full(segments, np.cos(t))], -1)
        index = half.add(EYE + EYE_RADIUS * ring, EYEBALL, depth=row)
        if previous is None:
            half.fan(np.append(index, index[0]), pole[0])
        else:
            half.strip(index, previous, closed=True)
        previous = index


def _add_mouth(half, upper, lower):
    """Cavity behind the lips and two rows of teeth; contours run from the midline to the corner."""
    xyz = half.rows["xyz"][0]
    corner = upper[-1]
    chain = np.concatenate([upper, lower[::-1]])  # midline above, corner, midline below
    side = np.concatenate([np.ones(len(upper) - 1), [0.0], -np.ones(len(lower))])
    lips = xyz[chain]
    assert chain[len(upper) - 1] == corner
    s = np.clip(lips[:, 0] / MOUTH_HALF_WIDTH, 0, 1)
    tall = side * np.sqrt(np.clip(1 - s**4, 0, 1))
    arch = 1 - s**2
    previous = chain
    for row, (wide, rise, z0, z1) in enumerate(
        (
            (0.98, 0.0022, -0.0035, 0.0),
            (1.02, 0.0105, -0.0070, 0.0),
            (0.98, 0.0150, -0.0180, 0.004),
            (0.62, 0.0120, -0.0420, 0.0),
        ),
        start=1,
    ):
        ring = np.stack([lips[:, 0] * wide, MOUTH_Y + rise * tall, lips[:, 2] + z0 + z1 * arch], -1)
        ring[[0, -1], 0] = 0.0
        index = half.add(ring, CAVITY, depth=row, lip=side.astype(int))
        half.strip(previous, index, flip=True)
        previous = index
    throat = half.add([[0.0, MOUTH_Y, 0.035]], CAVITY, depth=5)
    half.fan(previous, throat[0], flip=True)
    # Teeth: gum line, neck, edge, back of the edge. Columns from the midline outwards.
    a = np.linspace(0.0, 1.0, 8)
    for part, sign, front in ((UPPER_TEETH, 1.0, 0.0), (LOWER_TEETH, -1.0, -0.0018)):
        x = 0.0200 * np.sin(a * np.pi / 2)
        z = xyz[upper[0], 2] - 0.0082 + front - 0.0250 * (1 - np.cos(a * np.pi / 2))
        rows = []
        base = -0.0014 if sign > 0 else 0.0018
        for row, (rise, back) in enumerate(
            ((0.0100, 0.0002), (0.0078, 0.0), (0.0, 0.0002), (0.0004, -0.0035))
        ):
            points = np.stack(
                [x, np.full_like(x, MOUTH_Y) + sign * (rise + base), z + back * np.ones_like(x)], -1
            )
            rows.append(half.add(points, part, depth=row))
        for first, second in zip(rows[:-1], rows[1:], strict=True):
            half.strip(second, first, flip=sign < 0)


def _add_ear(half):
    """A dished shell over the side of the head, its front edge sunk into it."""
    segments, centre = 14, np.array([0.0715, 0.0020, -0.0160])
    # Ear plane: `up` leans back a little, `out` is the rim's direction away from the head.
    up = np.array([0.04, 0.97, -0.22])
    back = np.array([0.55, 0.18, -0.82])
    up, back = up / np.linalg.norm(up), back / np.linalg.norm(back)
    normal = np.cross(up, back)
    normal *= np.sign(normal[0])
    a = 2 * np.pi * np.arange(segments) / segments
    # Wider above than at the lobe.
    along, across = np.sin(a), np.cos(a)
    wide = 0.0165 * (1.0 + 0.22 * along)
    outline = 0.031 * along[:, None] * up + (0.010 + wide * across)[:, None] * back
    rings = []
    for row, (scale, lift) in enumerate(
        ((1.0, -0.0040), (1.02, 0.0010), (0.80, 0.0022), (0.62, -0.0020), (0.30, -0.0048))
    ):
        middle = 0.008 * back
        ring = centre + middle + (outline - middle) * scale + lift * normal
        rings.append(half.add(ring, EAR, depth=row))
    apex = half.add(centre[None] + 0.006 * back - 0.0045 * normal, EAR, depth=5)
    back_apex = half.add(centre[None] + 0.006 * back - 0.0100 * normal, EAR, depth=0)
    flip = np.dot(np.cross(outline[1] - outline[0], outline[2] - outline[1]), normal) < 0
    for first, second in zip(rings[:-1], rings[1:], strict=True):
        half.strip(first, second, closed=True, flip=flip)
    half.fan(np.append(rings[-1], rings[-1][0]), apex[0], flip=flip)
    half.fan(np.append(rings[0], rings[0][0]), back_apex[0], flip=not flip)


def on_grid(values):
    """Round to 1e-8: removes last-bit differences between math libraries."""
    return np.round(values, 8) + 0.0


def _crown_patch(faces, crown, middle):
    """The two faces that close the crown: where the midline turns back, Delaunay leaves out one on each side.

    They come after all others, so that no landmark's face index moves.
    """
    directed = {
        tuple(edge)
        for edge in np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).tolist()
    }
    # A new face runs along the hole's border the other way.
    following = {b: a for a, b in directed if (b, a) not in directed and crown[a] and crown[b]}
    start = min(vertex for vertex in following if middle[vertex])
    loop = [start]
    while following[loop[-1]] != start:
        loop.append(following[loop[-1]])
    if len(loop) != 4 or not middle[loop[2]]:
        raise AssertionError(f"the crown's hole is not a quadrilateral across the midline: vertices {loop}")
    a, b, c, d = loop
    return np.array([[a, b, c], [a, c, d]])


def build_mesh() -> BuiltinMesh:
    """Template, faces and per-vertex tags of the built-in head (see `BuiltinMesh`)."""
    half = _Half()
    edge, upper, lower = _add_skin(half)
    _add_eye(half, edge)
    _add_mouth(half, upper, lower)
    _add_ear(half)
    rows = {key: np.concatenate(value) for key, value in half.rows.items()}
    faces = np.concatenate(half.faces)
    # Mirror: midline vertices are shared.
    xyz = rows.pop("xyz")
    middle = xyz[:, 0] == 0
    other = np.cumsum(~middle) - 1 + len(xyz)
    partner = np.where(middle, np.arange(len(xyz)), other)
    mirrored = xyz[~middle] * [-1, 1, 1]
    rows = {key: np.concatenate([value, value[~middle]]) for key, value in rows.items()}
    left = np.concatenate([np.where(middle, 0, 1), np.full(len(mirrored), -1)])
    faces = np.concatenate([faces, partner[faces][:, ::-1]])
    vertices = on_grid(np.concatenate([xyz, mirrored]))
    crown = (rows["part"] == SKIN) & (rows["v"] > 0.15)
    faces = np.concatenate([faces, _crown_patch(faces, crown, vertices[:, 0] == 0)])
    integer = {key: rows[key].astype(np.int32) for key in ("part", "eye_ring", "lip", "depth")}
    return BuiltinMesh(
        vertices=vertices,
        faces=faces.astype(np.int32),
        phi=rows["phi"],
        v=rows["v"],
        left=left.astype(np.int32),
        **integer,
    )


def _vertex_landmark(faces, vertices_index):
    """Landmarks that sit on mesh vertices: the first face that holds each, one-hot barycentrics."""
    face, bary = [], []
    for vertex in vertices_index:
        row, column = np.argwhere(faces == vertex)[0]
        face.append(row)
        bary.append(np.eye(3)[column])
    return np.array(face, np.int32), np.array(bary, np.float32)


def _on_face(mesh, xy):
    """Landmarks on the sculpted face (skin only) at frontal positions (n, 2)."""
    xy = np.asarray(xy, float)
    phi, v = _face_parameters(np.abs(xy[:, 0]), xy[:, 1]).T
    points = _sculpt(_loft(phi, v), phi) * np.where(xy[:, :1] < 0, [[-1.0, 1.0, 1.0]], 1.0)
    skin = np.flatnonzero((mesh.part[mesh.faces] == SKIN).all(-1))
    face, bary = locate(mesh.vertices, mesh.faces[skin], points)
    return skin[face].astype(np.int32), bary


def mirror_vertices(mesh: BuiltinMesh) -> Int[np.ndarray, " V"]:
    """For each vertex the index of its mirror image (itself on the midline)."""
    partner = np.arange(len(mesh.left))
    partner[mesh.left > 0], partner[mesh.left < 0] = (
        np.flatnonzero(mesh.left < 0),
        np.flatnonzero(mesh.left > 0),
    )
    return partner


def lid_vertices(mesh, left):
    """Lid-edge vertices of one eye from outer corner over the upper lid, then back below."""
    index = np.flatnonzero((mesh.part == SKIN) & (mesh.eye_ring == 0) & (mesh.left == (1 if left else -1)))
    return index  # both halves keep the order of `_eye_ring`


def lip_vertices(mesh, tag):
    """Vertices of one lip row ordered from the subject's right to left; inner rows own the corners."""
    index = np.flatnonzero((mesh.part == SKIN) & (mesh.lip == tag))
    return index[np.argsort(mesh.vertices[index, 0], kind="stable")]


def ibug68(mesh):
    """The 68 landmarks in iBUG order (subject's right first)."""

    def nearest(tag, x):
        row = lip_vertices(mesh, tag)
        return [row[np.argmin(np.abs(mesh.vertices[row, 0] - at))] for at in x]

    width = MOUTH_HALF_WIDTH
    right, left = lid_vertices(mesh, False), lid_vertices(mesh, True)
    n = _EYE_POINTS
    lids = [0, 3, n // 2 - 3, n // 2, n // 2 + 3, n - 3]  # outer, upper x 2, inner, lower x 2
    right_eye = [right[k] for k in lids]
    left_eye = [left[k] for k in (n // 2, n // 2 - 3, 3, 0, n - 3, n // 2 + 3)]
    corners = lip_vertices(mesh, 1)[[0, -1]]
    outer_up = nearest(3, width * np.array([-0.62, -0.25, 0.0, 0.25, 0.62]))
    outer_down = nearest(-3, width * np.array([0.62, 0.28, 0.0, -0.28, -0.62]))
    inner_up = nearest(1, width * np.array([-0.40, 0.0, 0.40]))
    inner_down = nearest(-1, width * np.array([0.40, 0.0, -0.40]))
    # Inside corners lie one vertex inwards of the outer ones.
    row = lip_vertices(mesh, 1)
    mouth = [corners[0], *outer_up, corners[1], *outer_down, row[1], *inner_up, row[-2], *inner_down]

    contour_v = np.array([-0.005, -0.022, -0.040, -0.058, -0.076, -0.090, -0.100, -0.106, -0.108])
    contour_phi = np.array([1.36, 1.34, 1.31, 1.25, 1.14, 0.95, 0.65, 0.32, 0.0])
    jaw = _sculpt(_loft(contour_phi, contour_v), contour_phi)
    jaw = np.concatenate([jaw * [-1, 1, 1], jaw[-2::-1]])
    skin = np.flatnonzero((mesh.part[mesh.faces] == SKIN).all(-1))
    jaw_face, jaw_bary = locate(mesh.vertices, mesh.faces[skin], jaw)
    brow = np.array(
        [(0.0515, 0.0300), (0.0430, 0.0352), (0.0325, 0.0370), (0.0215, 0.0345), (0.0125, 0.0300)]
    )
    nose = [(0, 0.014), (0, 0.001), (0, -0.012), (0, -0.0250)]
    under = [(-0.0135, -0.0365), (-0.0070, -0.0385), (0, -0.0385), (0.0070, -0.0385), (0.0135, -0.0365)]
    face_face, face_bary = _on_face(mesh, np.concatenate([brow * [-1, 1], brow[::-1], nose, under]))
    mark_face, mark_bary = _vertex_landmark(mesh.faces, [*right_eye, *left_eye, *mouth])
    return Landmarks(
        np.concatenate([skin[jaw_face], face_face, mark_face]).astype(np.int32),
        np.round(np.concatenate([jaw_bary, face_bary, mark_bary]).astype(np.float64), 5).astype(np.float32),
    )
