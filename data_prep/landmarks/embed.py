"""Place MediaPipe's 478 face landmarks on any head that has the 68 iBUG landmarks.

No photograph and no embedding made by others is used. The
built-in head is warped onto the new one by a thin-plate spline through the landmarks that both have; it
lends its colours, the landmark networks mark renders of the new head in them, and the marks are carried
back to the surface. Without the networks (`--no-networks`) the built-in head's landmarks take the closest
points of the skin that faces the same way, which is less exact: in ten real clips the fit's error
roughly doubled. Contours are laid in either case along the mesh's own edges between known landmarks, upper
and lower lids and lips apart, and irises on the eyeballs. `check_embedding` then measures eyes and
mouth at rest and moved, and refuses what does not open and close.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Float, Int
from scipy.interpolate import RBFInterpolator
from scipy.sparse.csgraph import connected_components, dijkstra
from scipy.spatial import cKDTree

from data_prep.landmarks import marks as mediapipe
from data_prep.landmarks.surface import locate
from loki_jax.face.asset import HeadAsset, HeadAssetError, Landmarks
from loki_jax.face.builtin import builtin_head
from loki_jax.face.camera import ndc_from_world
from loki_jax.face.ict import MEDIAPIPE_OF_IBUG
from loki_jax.face.skinning import head_vertices, make_identity, mesh_faces, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.model_files import cached_models, fetch_models
from loki_jax.fitting.points import LANDMARK_SET
from loki_jax.raster.api import rasterize
from loki_jax.synthetic.appearance import Appearance, sample_appearance
from loki_jax.synthetic.shading import render

N_POINTS = 478

LIDS = {
    "right": (mediapipe.LID_RIGHT_UPPER, mediapipe.LID_RIGHT_LOWER),
    "left": (mediapipe.LID_LEFT_UPPER, mediapipe.LID_LEFT_LOWER),
}

LIPS = {
    "outer": (mediapipe.LIP_OUTER_UPPER, mediapipe.LIP_OUTER_LOWER),
    "inner": (mediapipe.LIP_INNER_UPPER, mediapipe.LIP_INNER_LOWER),
}

# Each an upper and a lower row between the same two corners.
ROWS = (*LIDS.values(), *LIPS.values())
CONTOURS = tuple(i for upper, lower in ROWS for i in (*upper, *lower))
IRISES = {"right_eye": mediapipe.IRIS_RIGHT, "left_eye": mediapipe.IRIS_LEFT}
_SIZE = 384  # pixels of the renders that the networks mark
_IRIS_RADIUS = 0.0059  # metres, nearly the same in all people

# The jaw contour of the 68 corresponds only roughly: the spline may miss it by about this (metres).
_CONTOUR_SLACK = 0.004


class Opening(NamedTuple):
    """How far an eye or the mouth opens, measured on the landmarks; gaps over the width.

    Attributes:
      part: "right eye", "left eye" or "mouth".
      rest, least, most: at rest and over all expression axes and jaw rotations tried, one at a time.
      least_by, most_by: what does it.
    """

    part: str
    rest: float
    least: float
    most: float
    least_by: str
    most_by: str

    def __str__(self) -> str:
        return (
            f"{self.part}: gap over width {self.rest:.2f} at rest, {self.least:.2f} by {self.least_by}, "
            f"{self.most:.2f} by {self.most_by}"
        )


def known_landmarks(head: HeadAsset) -> tuple[Int[np.ndarray, " n"], Landmarks]:
    """MediaPipe indices that the head has a place for, and these places, from "ibug68" or a partial set.

    Raises:
      HeadAssetError: the head has neither.
    """
    for name, indices in (("ibug68", MEDIAPIPE_OF_IBUG), (LANDMARK_SET, np.arange(468))):
        if name in head.landmarks:
            marks = head.landmarks[name]
            held = np.flatnonzero(np.asarray(marks.face)[: len(indices)] >= 0)
            if len(held) >= 40:
                return indices[held], Landmarks(np.asarray(marks.face)[held], np.asarray(marks.bary)[held])
    raise HeadAssetError(
        f"head {head.name!r} has landmark sets {sorted(head.landmarks)}, none of which can be extended: "
        "the 68 (or 51) iBUG landmarks are needed. Give the embedding to `python -m data_prep.head_asset "
        "... --landmarks FILE`."
    )


def _positions(vertices: np.ndarray, faces: np.ndarray, marks: Landmarks) -> Float[np.ndarray, "n 3"]:
    return np.einsum("nk,nkx->nx", np.asarray(marks.bary), vertices[faces[np.asarray(marks.face)]])


def _similarity(source: np.ndarray, target: np.ndarray):
    """The rotation, scale and shift (Umeyama 1991, eqs. 38 to 43) that take `source` to `target`."""
    centre_s, centre_t = source.mean(0), target.mean(0)
    left, values, right = np.linalg.svd((target - centre_t).T @ (source - centre_s))
    sign = np.array([1, 1, np.sign(np.linalg.det(left @ right))])
    rotation = (left * sign) @ right
    scale = (values * sign).sum() / ((source - centre_s) ** 2).sum()
    return lambda points: scale * (points - centre_s) @ rotation.T + centre_t


def _face_normals(vertices: np.ndarray, faces: np.ndarray) -> Float[np.ndarray, "F 3"]:
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    normals = np.cross(b - a, c - a)
    return normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)


def _skin_faces(head: HeadAsset, vertices: np.ndarray, faces: np.ndarray, nose: int) -> Int[np.ndarray, " n"]:
    """Faces of the connected surface that holds vertex `nose`, without eyeballs and inner mouth."""
    n = len(vertices)
    edges = np.concatenate([faces, np.roll(faces, 1, axis=1)]).reshape(-1, 3)
    graph = scipy.sparse.coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(n, n))
    _, label = connected_components(graph, directed=False)
    out = (label != label[nose]) | np.asarray(head.inner_mouth)
    for name in IRISES:
        if head.joint(name) is not None:
            out |= np.asarray(head.skinning_weights)[:, head.joint(name)] > 0.5
    return np.flatnonzero(~out[faces].any(-1))


class _Surface(NamedTuple):
    """The skin of the neutral head: vertices of the whole mesh, and the faces that landmarks may lie on."""

    vertices: Float[np.ndarray, "V 3"]
    faces: Int[np.ndarray, "F 3"]
    skin: Int[np.ndarray, " S"]

    def graph(self) -> scipy.sparse.csr_array:
        """Edge lengths between the skin's vertices."""
        corners = self.faces[self.skin]
        edges = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]])
        edges = np.unique(np.sort(edges, axis=1), axis=0)
        length = np.linalg.norm(self.vertices[edges[:, 0]] - self.vertices[edges[:, 1]], axis=-1)
        n = len(self.vertices)
        graph = scipy.sparse.coo_array((length, (edges[:, 0], edges[:, 1])), shape=(n, n)).tocsr()
        return graph + graph.T


def _path(graph, start: int, stop: int, forbidden: np.ndarray) -> list[int]:
    """Vertices of the shortest way along edges, around `forbidden` vertices."""
    cost = graph.copy().tocoo()
    blocked = np.isin(cost.row, forbidden) | np.isin(cost.col, forbidden)
    cost.data = np.where(blocked, cost.data + 1.0, cost.data)  # a metre: only if there is no other way
    _, before = dijkstra(cost.tocsr(), directed=False, indices=start, return_predecessors=True)
    way = [stop]
    while way[-1] != start:
        way.append(int(before[way[-1]]))
        if way[-1] < 0:
            raise HeadAssetError("lids or lips are not one connected surface; the landmarks cannot be laid")
    return way[::-1]


def _along(surface: _Surface, chain: list[int], fractions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Faces and barycentrics at fractions of the length of a chain of vertices: exactly on its edges."""
    if len(chain) == 1:
        chain = chain * 2
    length = np.linalg.norm(np.diff(surface.vertices[chain], axis=0), axis=-1)
    at = np.concatenate([[0.0], np.cumsum(length)]) / max(length.sum(), 1e-12)
    corners = surface.faces[surface.skin]
    faces, bary = [], []
    for fraction in fractions:
        k = int(np.clip(np.searchsorted(at, fraction, side="right") - 1, 0, len(chain) - 2))
        share = np.clip((fraction - at[k]) / max(at[k + 1] - at[k], 1e-12), 0, 1)
        first, second = chain[k], chain[k + 1]
        row = np.flatnonzero((corners == first).any(1) & (corners == second).any(1))[0]
        weights = np.zeros(3)
        weights[np.argmax(corners[row] == first)] += 1 - share
        weights[np.argmax(corners[row] == second)] += share
        faces.append(surface.skin[row])
        bary.append(weights)
    return np.array(faces), np.array(bary)


class _Start(NamedTuple):
    """The built-in head's landmarks and vertices carried to a new head, and that head's skin.

    `normals` are those of the carried surface at the 478 points.
    """

    known: Int[np.ndarray, " n"]
    marks: Landmarks
    points: Float[np.ndarray, "478 3"]
    normals: Float[np.ndarray, "478 3"]
    vertices: Float[np.ndarray, "B 3"]
    surface: _Surface


def _carry_over(head: HeadAsset) -> _Start:
    """The built-in head on `head`: similarity, then a spline through the landmarks that both have."""
    known, marks = known_landmarks(head)
    vertices, faces = np.asarray(head.template, np.float64), np.asarray(head.faces)
    anchors = _positions(vertices, faces, marks)
    source_head = builtin_head()
    source_faces = np.asarray(source_head.faces)
    source_marks = source_head.landmarks[LANDMARK_SET]
    source_vertices = np.asarray(source_head.template, np.float64)
    source = _positions(source_vertices, source_faces, source_marks)
    align = _similarity(source[known], anchors)
    slack = np.where(np.isin(known, MEDIAPIPE_OF_IBUG[:17]), _CONTOUR_SLACK**2, 0.0) / 0.05**2
    warp = RBFInterpolator(align(source[known]), anchors, kernel="thin_plate_spline", smoothing=slack)
    carried, points = warp(align(source_vertices)), warp(align(source))
    normals = _face_normals(carried, source_faces)[np.asarray(source_marks.face)]
    nose = int(np.argmin(np.linalg.norm(vertices - points[1], axis=-1)))
    surface = _Surface(vertices, faces, _skin_faces(head, vertices, faces, nose))
    return _Start(known, marks, points, normals, carried, surface)


def embed(head: HeadAsset, landmarker: Landmarker | None = None) -> Landmarks:
    """The 478 landmarks on `head`; those of eyes it has no joints for are marked absent (-1).

    Args:
      landmarker: if given, the landmarks of skin are where the networks see them in renders of this head
        (`observe`); without it where the built-in head's come to lie.

    Raises:
      HeadAssetError: the head has no known landmarks to start from, or its surface is torn.
    """
    start = _carry_over(head)
    known, surface = start.known, start.surface
    vertices, faces = surface.vertices, surface.faces
    wanted = start.points if landmarker is None else observe(head, start, landmarker)
    face = np.full(N_POINTS, -1, np.int32)
    bary = np.zeros((N_POINTS, 3), np.float32)

    skin_normals = _face_normals(vertices, faces)[surface.skin]
    centres = vertices[faces[surface.skin]].mean(1)
    for index in range(468):
        # Only faces that look the same way and lie on the same side of the midline.
        near = skin_normals @ start.normals[index] > 0.3
        near &= np.linalg.norm(centres - wanted[index], axis=-1) < 0.03
        if abs(wanted[index, 0]) > 0.004:
            near &= centres[:, 0] * wanted[index, 0] > 0
        candidates = surface.skin[near] if near.any() else surface.skin
        found, weights = locate(vertices, faces[candidates], wanted[index][None])
        face[index], bary[index] = candidates[found[0]], weights[0]
    # The known ones are exact: all of them, or those on contours where the networks have seen the rest.
    exact = ~np.isin(known, MEDIAPIPE_OF_IBUG[:17])
    if landmarker is not None:
        exact &= np.isin(known, CONTOURS)
    face[known[exact]] = np.asarray(start.marks.face)[exact]
    bary[known[exact]] = np.asarray(start.marks.bary)[exact]
    _lay_contours(surface, known, face, bary)
    for joint, first in IRISES.items():
        _lay_iris(head, vertices, faces, joint, first, face, bary)
    return Landmarks(face, bary)


def _eyeballs(head: HeadAsset, vertices: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Vertices of each eyeball and their places about its centre, in units of its radius."""
    balls = {}
    for name in IRISES:
        if head.joint(name) is not None:
            ball = np.flatnonzero(np.asarray(head.skinning_weights)[:, head.joint(name)] > 0.5)
            centre = np.asarray(head.joint_regressor, np.float64)[head.joint(name)] @ vertices
            offset = vertices[ball] - centre
            balls[name] = ball, offset / np.median(np.linalg.norm(offset, axis=-1))
    return balls


def _painted(head: HeadAsset, start: _Start, seed: int) -> Appearance:
    """Colours of a built-in person on this head: each vertex takes those of the nearest carried one."""
    source = builtin_head()
    appearance = sample_appearance(seed, source)
    colours = np.asarray(appearance.albedo)
    vertices = np.asarray(head.template, np.float64)
    source_balls = _eyeballs(source, np.asarray(source.template, np.float64))
    balls = np.concatenate([ball for ball, _ in source_balls.values()])
    rest = np.setdiff1d(np.arange(len(source.template)), balls)
    albedo = colours[rest[cKDTree(start.vertices[rest]).query(vertices)[1]]]
    for name, (ball, places) in _eyeballs(head, vertices).items():
        source_ball, source_places = source_balls[name]
        albedo[ball] = colours[source_ball[cKDTree(source_places).query(places)[1]]]
    return appearance._replace(albedo=albedo.astype(np.float32))


def paint(head: HeadAsset, seed: int) -> Appearance:
    """Colours, light and background of a person of the built-in head on any head with known landmarks."""
    return _painted(head, _carry_over(head), seed)


def observe(
    head: HeadAsset, start: _Start, landmarker: Landmarker, seeds: range = range(16), keep: int = 5
) -> Float[np.ndarray, "478 3"]:
    """Where the networks see the landmarks: renders of the head in several colourings and poses are marked,
    the marks carried back to the neutral surface; medians, made symmetric. Irises are those of `start`.

    Raises:
      HeadAssetError: the networks see no face in the renders.
    """
    turns = np.deg2rad([(0, 0), (0, -18), (0, -9), (0, 9), (0, 18), (-9, 0), (9, 0)])
    n = len(turns)
    zero = np.zeros((n, 3), np.float32)
    rot = np.pad(turns, ((0, 0), (0, 1))).astype(np.float32)
    turned = Coefficients(
        np.zeros((n, head.n_shape), np.float32), np.zeros((n, head.n_expression), np.float32),
        rot, zero, zero, zero, zero,
    )  # fmt: skip
    extrinsics = np.eye(4, dtype=np.float32)
    middle = start.points[:468].mean(0)
    extrinsics[:3, 3] = [-middle[0], middle[1], 1.0]
    focal = 0.55 * _SIZE / np.ptp(start.points[:468, 1])
    camera = Camera(np.array([focal, focal, _SIZE / 2, _SIZE / 2], np.float32), extrinsics)
    crop = np.array([0, 0, _SIZE, _SIZE], np.float32)

    @jax.jit
    def fragments(view):
        vertices = world_vertices(head, make_identity(head, view.betas), view)
        found = rasterize(ndc_from_world(vertices, camera, crop), mesh_faces(head), _SIZE)
        return found.face, found.bary

    @jax.jit
    def picture(view, appearance):
        return render(head, make_identity(head, view.betas), view, camera, crop, appearance, _SIZE)

    views = [Coefficients(*(field[k] for field in turned)) for k in range(n)]
    shown = [jax.tree.map(np.asarray, fragments(view)) for view in views]
    show = lambda view, look: np.asarray(picture(view, look) * 255).astype(np.uint8)
    looks = [_painted(head, start, seed) for seed in seeds]
    faces = [mediapipe.mark(landmarker, show(views[0], look)) for look in looks]
    scored = [0.0 if found is None else found[1] for found in faces]
    chosen = [i for i in np.argsort(scored)[::-1][:keep] if scored[i] > 0.5]
    observed = []
    skin = np.isin(np.arange(len(start.surface.faces)), start.surface.skin)
    for i in chosen:
        for view, (face, bary) in zip(views, shown, strict=True):
            found = mediapipe.mark(landmarker, show(view, looks[i]))
            if found is None or found[1] < 0.5:
                continue
            on_skin = skin[np.clip(face, 0, len(skin) - 1)] & (face >= 0) & (face < len(skin))
            rows, columns = np.nonzero(on_skin)
            _, near = cKDTree(np.stack([columns + 0.5, rows + 0.5], -1)).query(found[0][:468])
            corners = start.surface.vertices[start.surface.faces[face[rows[near], columns[near]]]]
            observed.append(np.einsum("nk,nkx->nx", bary[rows[near], columns[near]], corners))
    if len(observed) < 3:
        raise HeadAssetError(
            f"head {head.name!r}: the landmark networks see no face in renders of it. Use --no-networks."
        )
    points = start.points.copy()
    seen = np.median(observed, axis=0)
    pairs = mediapipe.mirror_pairs(seen)
    points[:468] = 0.5 * (seen + seen[pairs] * [-1, 1, 1])
    return points


def _lay_contours(surface: _Surface, known, face, bary) -> None:
    """Lid and lip landmarks between two known ones of their row: evenly along the edges that join these."""
    graph = surface.graph()
    nearest = {i: int(surface.faces[face[i]][np.argmax(bary[i])]) for i in CONTOURS if i in known}
    for upper, lower in ROWS:
        for row, other in ((upper, lower), (lower, upper)):
            forbidden = np.array([nearest[i] for i in other[1:-1] if i in nearest])
            held = [k for k, i in enumerate(row) if i in nearest]
            for a, b in zip(held[:-1], held[1:], strict=True):
                if b - a < 2:
                    continue
                chain = _path(graph, nearest[row[a]], nearest[row[b]], forbidden)
                index = list(row[a + 1 : b])
                fractions = (np.arange(a + 1, b) - a) / (b - a)
                face[index], bary[index] = _along(surface, chain, fractions)


def _lay_iris(head, vertices, faces, joint: str, first: int, face, bary) -> None:
    """Centre and rim of an iris on the eyeball's front: towards the nose, above, away from it, below."""
    if head.joint(joint) is None:
        return
    ball = np.asarray(head.skinning_weights)[:, head.joint(joint)] > 0.5
    on_ball = np.flatnonzero(ball[faces].all(-1))
    if not len(on_ball):
        return
    centre = np.asarray(head.joint_regressor, np.float64)[head.joint(joint)] @ vertices
    front = on_ball[vertices[faces[on_ball]].mean(1)[:, 2] > centre[2]]
    radius = np.median(np.linalg.norm(vertices[faces[front]].reshape(-1, 3) - centre, axis=-1))
    nasal = -np.sign(centre[0])
    aims = [(0, 0), (nasal, 0), (0, 1), (-nasal, 0), (0, -1)]
    slope = np.arcsin(min(_IRIS_RADIUS / radius, 0.8))
    for k, aim in enumerate(aims):
        direction = np.array([*(np.sin(slope) * np.array(aim)), np.cos(slope) if k else 1.0])
        found, weights = locate(vertices, faces[front], (centre + radius * direction)[None])
        face[first + k], bary[first + k] = front[found[0]], weights[0]


def measure_openings(head: HeadAsset, marks: Landmarks) -> list[Opening]:
    """Openings of both eyes and the mouth, at rest and under each expression axis and the jaw joint."""
    moves: list[tuple[str, np.ndarray, float]] = [("rest", np.zeros(head.n_expression), 0.0)]
    for axis, name in enumerate(head.expression_names):
        for bound, sign in zip(np.asarray(head.expression_bounds)[axis], (-1, 1), strict=True):
            amount = float(bound) if np.isfinite(bound) else sign * 2 * float(head.expression_sigma[axis])
            if amount:
                moves.append((f"{name} {amount:+.2g}", amount * np.eye(head.n_expression)[axis], 0.0))
    if head.joint("jaw") is not None:
        moves.append(("jaw +0.25 rad", np.zeros(head.n_expression), 0.25))
    n = len(moves)
    zero = np.zeros((n, 3), np.float32)
    jaw = zero.copy()
    jaw[:, 0] = [move[2] for move in moves]
    expression = np.array([move[1] for move in moves], np.float32)
    shape = np.zeros(head.n_shape, np.float32)
    coefficients = Coefficients(np.tile(shape, (n, 1)), expression, zero, zero, zero, jaw, zero)
    moved = np.asarray(head_vertices(head, make_identity(head, jnp.asarray(shape)), coefficients))
    faces = np.asarray(head.faces)
    points = np.einsum("nk,mnkx->mnx", np.asarray(marks.bary), moved[:, faces[np.maximum(marks.face, 0)]])

    openings = []
    for part, (upper, lower) in {
        "right eye": LIDS["right"], "left eye": LIDS["left"], "mouth": LIPS["inner"],
    }.items():  # fmt: skip
        width = np.linalg.norm(points[0, upper[0]] - points[0, upper[-1]])
        middle = slice(len(upper) // 2 - 1, len(upper) // 2 + 2)
        # Signed along the height: lids that have changed places are not open.
        gap = (points[:, upper[middle], 1] - points[:, lower[middle], 1]).mean(1) / width
        low, high = int(np.argmin(gap)), int(np.argmax(gap))
        rest, least, most = gap[[0, low, high]].tolist()
        openings.append(Opening(part, rest, least, most, moves[low][0], moves[high][0]))
    return openings


def check_embedding(head: HeadAsset, marks: Landmarks) -> list[Opening]:
    """Openings as `measure_openings`, if eyes are open at rest and close, and the mouth opens.

    Raises:
      HeadAssetError: upper and lower contours are not apart, or do not move against each other.
    """
    openings = measure_openings(head, marks)
    for opening in openings:
        if opening.part == "mouth":
            right = -0.05 < opening.rest < 0.35 and opening.most > opening.rest + 0.15
        else:
            right = opening.rest > 0.12 and opening.least < 0.6 * opening.rest
        if not right:
            raise HeadAssetError(
                f"head {head.name!r}: the landmarks of the {opening.part} do not open and close ({opening}). "
                "The known landmarks lie on the wrong side of a lid or lip, or are in another order."
            )
    return openings


def with_landmarks(head: HeadAsset, landmarker: Landmarker | None = None) -> tuple[HeadAsset, list[Opening]]:
    """The head with the set "mediapipe478", and the openings that were checked."""
    marks = embed(head, landmarker)
    openings = check_embedding(head, marks)
    way = "closest points" if landmarker is None else "networks"
    note = f"{head.provenance}; {LANDMARK_SET} by data_prep.embed_landmarks ({way})"
    landmarks = head.landmarks | {LANDMARK_SET: marks}
    return dataclasses.replace(head, landmarks=landmarks, provenance=note), openings


def complete_landmarks(head: HeadAsset, wheel: str | None = None) -> HeadAsset:
    """The head with all MediaPipe landmarks; as it is where it has them or nothing to start from.

    Prints how the eyes and the mouth open, or why landmarks are missing or less exact.

    Raises:
      LandmarkError: the landmark models are not in `wheel`.
    """
    held = head.landmarks.get(LANDMARK_SET)
    if held is not None and (np.asarray(held.face)[:468] >= 0).all():
        return head
    try:
        known_landmarks(head)
    except HeadAssetError:
        print(
            f"note: {head.name} has no landmarks to start from, so it can be rendered but not fitted. "
            "Give its 51 or 68 iBUG landmarks with --landmarks."
        )
        return head
    models = fetch_models(wheel) if wheel else cached_models()
    if models is None:
        print(
            "note: the landmark networks are not cached (`python -m data_prep.fetch_models` or --wheel); "
            "landmarks are placed by closest points, which is less exact."
        )
    try:
        head, openings = with_landmarks(head, None if models is None else Landmarker(models))
    except HeadAssetError as error:
        print(f"note: {error} The asset keeps the landmarks it has.")
        return head
    print(*openings, sep="\n")
    return head
