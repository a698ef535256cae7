"""Place MediaPipe's 478 face landmarks on the built-in head, for `tools.builtin_head.generate`.

    python -m tools.builtin_head.landmarks [--wheel mediapipe.whl] [--out FILE.npz] [--sheet FILE.png]

Run once by the authors after the mesh is final; users get the result with the package. The mean head is
rendered in several colourings, poses and mouth openings; the landmark networks mark each render; every
mark is carried back to the surface it lies on; the median over all renders, made symmetric, is the
landmark. Lid and lip contours are then laid exactly on the mesh's own contours (upper and lower apart),
where a render of a closed mouth cannot tell them, and irises on the eyeballs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

from data_prep.landmarks.marks import (
    IRIS_LEFT,
    IRIS_RIGHT,
    LID_LEFT_LOWER,
    LID_LEFT_UPPER,
    LID_RIGHT_LOWER,
    LID_RIGHT_UPPER,
    LIP_INNER_LOWER,
    LIP_INNER_UPPER,
    LIP_OUTER_LOWER,
    LIP_OUTER_UPPER,
    mark,
    mirror_pairs,
)
from data_prep.landmarks.surface import locate
from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import EYE, EYE_RADIUS, EYEBALL, IRIS_DEGREES, SKIN, BuiltinMesh
from loki_jax.face.camera import ndc_from_world
from loki_jax.face.skinning import make_identity, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.model_files import LandmarkError, fetch_models
from loki_jax.raster.api import rasterize
from loki_jax.synthetic.appearance import sample_appearance
from loki_jax.synthetic.clips import render_frames
from tools.builtin_head.generate import MEDIAPIPE_FILE, generate_head
from tools.builtin_head.mesh import build_mesh, lid_vertices, lip_vertices, mirror_vertices

_SIZE = 512

_N = 478


def _views(head: HeadAsset) -> Coefficients:
    """Poses of the mean head: turns, nods, open mouth, raised brows; (n, ...)."""
    rows = []
    for yaw, pitch, jaw in (
        *((y, 0.0, 0.0) for y in (-20, -12, -6, 0, 6, 12, 20)),
        *((0.0, p, 0.0) for p in (-10, 10)),
        *((y, 0.0, j) for y in (-10, 0, 10) for j in (0.10, 0.22)),
    ):
        rows.append((np.deg2rad([pitch, yaw, 0.0]), [jaw, 0.0, 0.0], jaw / 0.26))
    rot, jaw, opening = (np.array(x, np.float32) for x in zip(*rows, strict=True))
    n = len(rows)
    expression = np.zeros((n, head.n_expression), np.float32)
    expression[:, head.expression_names.index("jawOpen")] = opening
    zero = np.zeros((n, 3), np.float32)
    return Coefficients(np.zeros((n, head.n_shape), np.float32), expression, rot, zero, zero, jaw, zero)


def _camera() -> Camera:
    extrinsics = np.eye(4, dtype=np.float32)
    extrinsics[2, 3] = 1.0
    focal = _SIZE / 0.34
    return Camera(np.array([focal, focal, _SIZE / 2, _SIZE / 2], np.float32), extrinsics)


def _surface_points(mesh: BuiltinMesh, faces: np.ndarray, bary: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Template positions (n, 3) of the skin nearest to each pixel (n, 2) of a rasterised view."""
    skin_face = (mesh.part[mesh.faces] == SKIN).all(-1)
    rows, columns = np.nonzero((faces >= 0) & skin_face[np.maximum(faces, 0)])
    _, nearest = cKDTree(np.stack([columns + 0.5, rows + 0.5], -1)).query(pixels)
    face, weight = faces[rows[nearest], columns[nearest]], bary[rows[nearest], columns[nearest]]
    return np.einsum("nk,nkx->nx", weight, mesh.vertices[mesh.faces[face]])


def _observe(head: HeadAsset, mesh: BuiltinMesh, landmarker: Landmarker, seeds: range, keep: int):
    """Marks carried back to the template: (renders, 478, 3), irises meaningless, and one marked image."""
    views, camera = _views(head), _camera()
    crop = np.array([0, 0, _SIZE, _SIZE], np.float32)
    n = len(views.rot)

    @jax.jit
    def fragments(coefficients):
        vertices = world_vertices(head, make_identity(head, coefficients.betas), coefficients)
        tiled = Camera(jnp.tile(camera.intrinsics, (n, 1)), jnp.tile(camera.extrinsics, (n, 1, 1)))
        ndc = ndc_from_world(vertices, tiled, jnp.tile(crop, (n, 1)))
        return rasterize(ndc, head.faces, _SIZE)

    found = fragments(views)
    faces, bary = np.asarray(found.face), np.asarray(found.bary)
    scored = []
    for seed in seeds:
        frontal = Coefficients(*(field[3:4] for field in views))
        image = render_frames(head, frontal, camera, crop, sample_appearance(seed, head), _SIZE)[0]
        marks = mark(landmarker, image)
        scored.append((-1.0 if marks is None else marks[1], seed))
    chosen = [seed for score, seed in sorted(scored, reverse=True)[:keep] if score > 0.5]
    if not chosen:
        raise LandmarkError("the landmark networks see no face in any render of the built-in head")
    observed, sheet, irises = [], None, []
    for seed in chosen:
        frames = render_frames(head, views, camera, crop, sample_appearance(seed, head), _SIZE)
        for view in range(n):
            marks = mark(landmarker, frames[view])
            if marks is None or marks[1] < 0.5:
                continue
            observed.append(_surface_points(mesh, faces[view], bary[view], marks[0]))
            if view == 3:
                irises.append(marks[0][IRIS_RIGHT:])
                sheet = frames[view].copy() if sheet is None else sheet
    return np.stack(observed), np.stack(irises), sheet


def _along(mesh: BuiltinMesh, chain: np.ndarray, fractions: np.ndarray):
    """Landmarks at fractions of the length of a chain of mesh vertices: exactly on its edges."""
    length = np.linalg.norm(np.diff(mesh.vertices[chain], axis=0), axis=-1)
    at = np.concatenate([[0.0], np.cumsum(length)]) / length.sum()
    skin = np.flatnonzero((mesh.part[mesh.faces] == SKIN).all(-1))
    face, bary = [], []
    for fraction in fractions:
        k = int(np.clip(np.searchsorted(at, fraction, side="right") - 1, 0, len(chain) - 2))
        share = np.clip((fraction - at[k]) / (at[k + 1] - at[k]), 0, 1)
        both = [f for f in skin if {chain[k], chain[k + 1]} <= set(mesh.faces[f].tolist())]
        weights = np.zeros(3)
        weights[list(mesh.faces[both[0]]).index(chain[k])] = 1 - share
        weights[list(mesh.faces[both[0]]).index(chain[k + 1])] = share
        face.append(both[0])
        bary.append(weights)
    return np.array(face), np.array(bary)


def _on_midline(mesh: BuiltinMesh, points: np.ndarray):
    """Landmarks on the edges of the skin's front midline nearest to the given points."""
    on = (mesh.left == 0) & (mesh.part == SKIN) & (mesh.phi == 0)
    candidates = np.flatnonzero(on[mesh.faces].sum(-1) == 2)
    corners = mesh.vertices[mesh.faces[candidates]]
    # Only the edge matters: pull the third corner onto it.
    edge = on[mesh.faces[candidates]]
    anchor = corners[np.arange(len(edge)), np.argmax(edge, axis=1)]
    flat = np.where(edge[..., None], corners, anchor[:, None])
    index, bary = locate(flat.reshape(-1, 3), np.arange(3 * len(flat)).reshape(-1, 3), points)
    third, first = np.argmin(edge, axis=1)[index], np.argmax(edge, axis=1)[index]
    rows = np.arange(len(points))
    bary[rows, first] += bary[rows, third]
    bary[rows, third] = 0.0
    return candidates[index], bary


def _fractions(points: np.ndarray, row: tuple[int, ...]) -> np.ndarray:
    """Where a contour's marks lie between its corners (0..1); even spacing if they are out of order."""
    length = np.linalg.norm(np.diff(points[list(row)][:, :2], axis=0), axis=-1)
    at = np.concatenate([[0.0], np.cumsum(length)]) / max(length.sum(), 1e-9)
    even = np.linspace(0, 1, len(row))
    return 0.5 * (at + even) if np.abs(at - even).max() < 0.12 else even


def embed(head: HeadAsset, landmarker: Landmarker, seeds: range = range(24), keep: int = 8):
    """Face indices (478,) and barycentrics (478, 3) of MediaPipe's landmarks, and a marked render."""
    mesh = build_mesh()
    observed, irises, sheet = _observe(head, mesh, landmarker, seeds, keep)
    points = np.median(observed[:, :468], axis=0)
    pairs = mirror_pairs(points)
    points = 0.5 * (points + points[pairs] * [-1, 1, 1])
    # The whole face is laid on one side and mirrored, so that both sides are exact mirror images.
    skin = np.flatnonzero((mesh.part[mesh.faces] == SKIN).all(-1))
    face = np.zeros(_N, int)
    bary = np.zeros((_N, 3))
    near_face, bary[:468] = locate(mesh.vertices, mesh.faces[skin], points)
    face[:468] = skin[near_face]
    # Means of surface points lie a little inside the surface: midline marks must not slip sideways.
    middle = np.flatnonzero(pairs == np.arange(468))
    face[middle], bary[middle] = _on_midline(mesh, points[middle])
    partner = mirror_vertices(mesh)
    by_corners = {tuple(sorted(corners)): f for f, corners in enumerate(mesh.faces.tolist())}

    def mirror(index, source):
        corners = partner[mesh.faces[face[source]]].tolist()
        face[index] = by_corners[tuple(sorted(corners))]
        bary[index] = [bary[source][corners.index(c)] for c in mesh.faces[face[index]].tolist()]

    for index in np.flatnonzero(points[:, 0] < 0):
        mirror(index, pairs[index])

    # Contours: laid on the left half, mirrored to the right.
    ring = lid_vertices(mesh, left=True)
    half = len(ring) // 2
    for row, right, chain in (
        (LID_LEFT_UPPER, LID_RIGHT_UPPER, ring[: half + 1]),
        (LID_LEFT_LOWER, LID_RIGHT_LOWER, np.concatenate([ring[:1], ring[half:][::-1]])),
    ):
        index = list(row)
        face[index], bary[index] = _along(mesh, chain, _fractions(points, row))
        for a, b in zip(right, row, strict=True):
            mirror(a, b)
    for row, tag in (
        (LIP_OUTER_UPPER, 3), (LIP_OUTER_LOWER, -3), (LIP_INNER_UPPER, 1), (LIP_INNER_LOWER, -1),
    ):  # fmt: skip
        corner = lip_vertices(mesh, 1)[-1]
        chain = lip_vertices(mesh, tag)
        chain = chain[mesh.vertices[chain, 0] >= 0]
        if chain[-1] != corner:
            chain = np.append(chain, corner)
        fractions = _fractions(points, row[5:])
        if abs(tag) == 1:
            # The inner corner landmark lies a little inside the outer one.
            fractions = fractions * 0.95
        index = list(row[5:])
        face[index], bary[index] = _along(mesh, chain, fractions)
        for a, b in zip(row[:5], row[:5:-1], strict=True):
            mirror(a, b)

    # Irises: the pupil's centre and four points on the iris's edge, in the networks' own order.
    iris_marks = irises.mean(0)
    for first, left in ((IRIS_RIGHT, False), (IRIS_LEFT, True)):
        ball = np.flatnonzero((mesh.part == EYEBALL) & (mesh.left == (1 if left else -1)))
        pole = ball[mesh.depth[ball] == 0][0]
        centre = EYE * ([1, 1, 1] if left else [-1, 1, 1])
        face[first], bary[first] = next(
            (f, (corners == pole).astype(float)) for f, corners in enumerate(mesh.faces) if pole in corners
        )
        on_ball = np.flatnonzero(np.isin(mesh.faces, ball).all(-1))
        five = iris_marks[first - IRIS_RIGHT : first - IRIS_RIGHT + 5]
        for k in range(1, 5):
            dx, dy = five[k] - five[0]  # image axes: x right is the subject's left, y down
            aim = np.array([np.sign(dx), 0.0]) if abs(dx) > abs(dy) else np.array([0.0, -np.sign(dy)])
            t = np.deg2rad(IRIS_DEGREES)
            target = centre + EYE_RADIUS * np.array([*(np.sin(t) * aim), np.cos(t)])
            near, weights = locate(mesh.vertices, mesh.faces[on_ball], target[None])
            face[first + k], bary[first + k] = on_ball[near[0]], weights[0]
    return face.astype(np.int32), np.round(bary, 5).astype(np.float32), sheet


def _draw(sheet: np.ndarray, head: HeadAsset, face: np.ndarray, bary: np.ndarray) -> np.ndarray:
    """The frontal render, twice as large, with the landmarks as dots."""
    points = np.einsum("nk,nkx->nx", bary, np.asarray(head.template)[np.asarray(head.faces)[face]])
    focal = _SIZE / 0.34
    x = _SIZE / 2 + focal * points[:, 0] / (1.0 - points[:, 2])
    y = _SIZE / 2 - focal * points[:, 1] / (1.0 - points[:, 2])
    big = np.repeat(np.repeat(sheet, 2, 0), 2, 1)
    for k, (px, py) in enumerate(np.stack([2 * x, 2 * y], -1).astype(int)):
        big[py - 1 : py + 2, px - 1 : px + 2] = (255, 40, 40) if k >= 468 else (40, 255, 80)
    return big


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.builtin_head.landmarks", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--wheel", type=Path, help="the MediaPipe wheel with the landmark models (else the cache)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=MEDIAPIPE_FILE,
        help="file to write",
    )
    parser.add_argument("--sheet", type=Path, help="also write a render with the landmarks drawn on it")
    args = parser.parse_args(argv)
    head = generate_head(build_mesh())
    try:
        face, bary, sheet = embed(head, Landmarker(fetch_models(args.wheel)))
    except LandmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    np.savez_compressed(args.out, face=face, bary=bary)
    if args.sheet is not None:
        Image.fromarray(_draw(sheet, head, face, bary)).save(args.sheet)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
