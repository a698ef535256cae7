"""The ICT-FaceKit arrays (MIT licence) as a head asset (method, section 3).

ICT-FaceKit is a set of linear shapes without joints. Jaw and lids stay linear shapes; a root and a
neck joint with smooth weights are added so that the head can turn on its shoulders, and one joint in
each eyeball, which none of its gaze shapes moves (they shape the lids alone).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from loki_jax.face.asset import HeadAsset, HeadAssetError, Landmarks, read_npz, reading, validate_head
from loki_jax.io import file_sha256

_METRES_PER_UNIT = 0.01

# MediaPipe's numbers of the 68 iBUG landmarks, in iBUG's order (method, section 3). The contour, the
# first 17, corresponds only roughly.
MEDIAPIPE_OF_IBUG = np.array(
    """162 234 93 58 172 136 149 148 152 377 378 365 397 288 323 454 389 71 63 105 66 107 336 296 334 293
    301 168 197 5 4 75 97 2 326 305 33 160 158 133 153 144 362 385 387 263 373 380 61 39 37 0 267 269 291
    405 314 17 84 181 78 82 13 312 308 317 14 87""".split(),
    np.int64,
)

_N_MEDIAPIPE = 478
_PUPILS = {468: "eyeball_r", 473: "eyeball_l"}
_JOINTS = ("root", "neck", "left_eye", "right_eye")
_EYEBALLS = {"left_eye": "eyeball_l", "right_eye": "eyeball_r"}

# In ICT units (0.01 m), read off the neutral mesh: the base of the skull; and the band over which the
# neck joint takes over from the root, along an axis tilted so that the chin belongs to the head while
# the nape at the same height still bends.
_NECK_JOINT = np.array([0.0, -5.5, -1.0])
_ROOT_JOINT = np.array([0.0, -16.0, -2.0])
_NECK_TILT = 0.35
_NECK_BAND = (-13.0, -5.0)

# ARKit weights are activations from 0 to 1, most of them near 0 at any moment.
_EXPRESSION_SIGMA = 0.3
_KEYS = ("neutral", "faces", "identity_modes", "expr_deltas", "expr_names", "landmarks68", "region_id")


def _centroid_regressor(
    points: Float[np.ndarray, "V 3"], target: Float[np.ndarray, " 3"], reach: float
) -> Float[np.ndarray, " V"]:
    """Weights summing to 1 that average the vertices near `target` to `target`, as evenly as they can."""
    near = np.exp(-0.5 * np.sum((points - target) ** 2, -1) / reach**2)
    # Least change of the bell-shaped weights that meets the four conditions exactly.
    near /= near.sum()
    conditions = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    missing = np.append(target, 1.0) - near @ conditions
    return near + near * (conditions @ np.linalg.solve((conditions.T * near) @ conditions, missing))


def _neck_weight(points: Float[np.ndarray, "V 3"]) -> Float[np.ndarray, " V"]:
    height = points[:, 1] + _NECK_TILT * (points[:, 2] - _NECK_JOINT[2])
    low, high = _NECK_BAND
    t = np.clip((height - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _vertex_landmarks(faces: Int[np.ndarray, "F 3"], vertices: Int[np.ndarray, " n"]) -> Landmarks:
    """Landmarks that sit on vertices: any face that has the vertex, with all weight on it."""
    chosen, bary = np.zeros(len(vertices), np.int32), np.zeros((len(vertices), 3), np.float32)
    for i, vertex in enumerate(vertices):
        face, corner = np.argwhere(faces == vertex)[0]
        chosen[i], bary[i, corner] = face, 1
    return Landmarks(chosen, bary)


def _pupil(
    points: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"], ball: np.ndarray
) -> tuple[int, Float[np.ndarray, " 3"]] | None:
    """Face and barycentrics where the eyeball's axis, straight ahead from its centre, comes out."""
    centre = points[ball].mean(axis=0)
    best, found = -np.inf, None
    for index in np.flatnonzero(ball[faces].all(axis=1)):
        corners = points[faces[index]]
        try:
            bary = np.linalg.solve(np.vstack([corners[:, :2].T, np.ones(3)]), np.append(centre[:2], 1.0))
        except np.linalg.LinAlgError:
            continue
        depth = bary @ corners[:, 2]
        if bary.min() >= 0 and depth > best:
            best, found = depth, (int(index), bary)
    return found


def head_from_ict(path: str | os.PathLike) -> HeadAsset:
    """The head asset of the ICT-FaceKit arrays (`.npz` with neutral, faces, identity_modes, ...).

    100 identity modes with N(0, 1) weights; all expression shapes under their ARKit names with weights
    in [0, 1], those after the 53 official ones (cheekRaiser, PupilDilate) included; landmark sets
    "ibug68" and "mediapipe478" (the corresponding points and the pupils; the rest marked absent).

    Raises:
      HeadAssetError: the file is missing, damaged or of unexpected shapes.
    """
    path = Path(path)
    if not path.is_file():
        raise HeadAssetError(f"{path}: no such file. Give the ICT-FaceKit arrays (.npz).")
    with reading(path, "file of ICT-FaceKit arrays", "Download it again."):
        head = _head_of_arrays(path, read_npz(path))
        validate_head(head, str(path))
    return head


def _head_of_arrays(path: Path, data: dict[str, np.ndarray]) -> HeadAsset:
    missing = [key for key in (*_KEYS, "region_names") if key not in data]
    if missing:
        raise HeadAssetError(f"{path}: not the ICT-FaceKit arrays, lacks {', '.join(missing)}.")
    n_vertices = len(data["neutral"])
    n_identity, n_expression = len(data["identity_modes"]), len(data["expr_names"])
    expected = {
        "neutral": (n_vertices, 3),
        "faces": (len(data["faces"]), 3),
        "identity_modes": (n_identity, n_vertices, 3),
        "expr_deltas": (n_expression, n_vertices, 3),
        "landmarks68": (68,),
        "region_id": (n_vertices,),
    }
    for key, shape in expected.items():
        if data[key].shape != shape:
            raise HeadAssetError(f"{path}: {key} has shape {data[key].shape}, expected {shape}.")
    points, faces = data["neutral"].astype(np.float64), data["faces"].astype(np.int32)
    for key in ("faces", "landmarks68"):
        if data[key].min() < 0 or data[key].max() >= n_vertices:
            raise HeadAssetError(f"{path}: {key} names vertices that do not exist.")
    names = [str(name) for name in data["region_names"]]
    needed = {"face", "head_neck", "mouth_socket", *_EYEBALLS.values()}
    if not needed <= set(names):
        raise HeadAssetError(f"{path}: lacks the regions {', '.join(sorted(needed - set(names)))}.")
    region = {name: data["region_id"] == index for index, name in enumerate(names)}

    skin = region["face"] | region["head_neck"]
    weights = np.zeros((n_vertices, len(_JOINTS)))
    weights[:, 1] = _neck_weight(points)
    weights[:, 0] = 1 - weights[:, 1]
    regressor = np.zeros((len(_JOINTS), n_vertices))
    for index, target in ((0, _ROOT_JOINT), (1, _NECK_JOINT)):
        regressor[index, skin] = _centroid_regressor(points[skin], target, reach=5.0)
    for joint, name in _EYEBALLS.items():
        ball = region[name]
        weights[ball] = np.eye(len(_JOINTS))[_JOINTS.index(joint)]
        # The ball is round and its vertices lie symmetrically about its axis.
        regressor[_JOINTS.index(joint), ball] = 1 / ball.sum()

    ibug = _vertex_landmarks(faces, data["landmarks68"])
    marks = Landmarks(np.full(_N_MEDIAPIPE, -1, np.int32), np.zeros((_N_MEDIAPIPE, 3), np.float32))
    marks.face[MEDIAPIPE_OF_IBUG], marks.bary[MEDIAPIPE_OF_IBUG] = ibug.face, ibug.bary
    for number, name in _PUPILS.items():
        pupil = _pupil(points, faces, region[name])
        if pupil is not None:
            marks.face[number], marks.bary[number] = pupil

    scale = np.float32(_METRES_PER_UNIT)
    return HeadAsset(
        template=(points * _METRES_PER_UNIT).astype(np.float32),
        faces=faces,
        shape_basis=data["identity_modes"].astype(np.float32) * scale,
        expression_basis=data["expr_deltas"].astype(np.float32) * scale,
        pose_correctives=np.zeros((0, n_vertices, 3), np.float32),
        joint_regressor=regressor.astype(np.float32),
        skinning_weights=weights.astype(np.float32),
        render_mask=weights[:, 0] < 0.5,
        inner_mouth=region["mouth_socket"],
        shape_sigma=np.ones(n_identity, np.float32),
        expression_sigma=np.full(n_expression, _EXPRESSION_SIGMA, np.float32),
        expression_bounds=np.tile(np.array([0, 1], np.float32), (n_expression, 1)),
        landmarks={"ibug68": ibug, "mediapipe478": marks},
        parents=(-1, 0, 1, 1),
        name="ict",
        joint_names=_JOINTS,
        shape_names=tuple(f"ict_identity_{i:03d}" for i in range(n_identity)),
        expression_names=tuple(str(name) for name in data["expr_names"]),
        licence=str(data.get("license_text", "MIT (ICT-FaceKit, USC Institute for Creative Technologies)")),
        provenance=f"{path.name}, sha256 {file_sha256(path)}; {data.get('meta', '')}",
    )
