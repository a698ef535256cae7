"""A synthetic model in FLAME's file format and size, read by smplx and by us."""

import pickle
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import scipy.sparse

from loki_jax.face.flame import head_from_flame
from loki_jax.face.types import Coefficients

N_VERTICES, RINGS, SECTORS = 5023, 58, 86  # 2 x 58 x 86 = 9,976 faces
N_SHAPE, N_EXPRESSION = 150, 65
TOLERANCE = 1e-5  # metres
LIP_VERTEX = 3533


def synthetic_flame(seed: int = 0) -> dict:
    """What a FLAME pickle holds, with random smooth shapes on an egg; metres."""
    rng = np.random.default_rng(seed)
    polar = np.pi * (np.arange(RINGS) + 0.5) / RINGS
    azimuth = 2 * np.pi * np.arange(SECTORS) / SECTORS
    points = np.stack(
        [
            np.outer(np.sin(polar), np.sin(azimuth)),
            np.outer(np.cos(polar), np.ones(SECTORS)),
            np.outer(np.sin(polar), np.cos(azimuth)),
        ],
        axis=-1,
    ).reshape(-1, 3)
    spare = rng.normal(size=(N_VERTICES - len(points) - 2, 3))
    spare = spare / np.linalg.norm(spare, axis=-1, keepdims=True)
    points = np.concatenate([points, [[0, 1, 0], [0, -1, 0]], spare])
    template = points * [0.08, 0.12, 0.1]
    i, j = np.meshgrid(np.arange(RINGS - 1), np.arange(SECTORS), indexing="ij")
    a, b = (i * SECTORS + j).ravel(), (i * SECTORS + (j + 1) % SECTORS).ravel()
    ring, top = np.arange(SECTORS), RINGS * SECTORS
    low, following = top - SECTORS + ring, (ring + 1) % SECTORS
    faces = np.concatenate(
        [
            np.stack([a, a + SECTORS, b], -1),
            np.stack([b, a + SECTORS, b + SECTORS], -1),
            np.stack([np.full(SECTORS, top), ring, following], -1),
            np.stack([np.full(SECTORS, top + 1), top - SECTORS + following, low], -1),
        ]
    )
    waves = np.sin(points @ rng.normal(size=(3, 24)) * 3 + rng.uniform(0, 6, 24))
    smooth = lambda count, scale: np.einsum("vw,wcn->vcn", waves, rng.normal(size=(24, 3, count)) * scale)
    trunk = [[0, -0.12, -0.02], [0, -0.08, -0.01], [0, -0.02, 0]]
    joints = np.array([*trunk, [0.03, 0.03, 0.07], [-0.03, 0.03, 0.07]])
    distance = np.linalg.norm(template[:, None] - joints, axis=-1)
    near = np.exp(-((distance / 0.05) ** 2))
    regressor = np.where(distance.T < np.sort(distance.T, axis=1)[:, 30:31], 1 / 30, 0)
    return {
        "v_template": template,
        "f": faces.astype(np.uint32),
        "shapedirs": smooth(400, 4e-4),
        "posedirs": smooth(36, 2e-4),
        "J_regressor": scipy.sparse.csc_matrix(regressor),
        "weights": near / near.sum(1, keepdims=True),
        "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], [0, 1, 2, 3, 4]], np.int64),
        "J": joints,
        "bs_style": "lbs",
        "bs_type": "lrotmin",
    }


def both_models(folder: Path):
    """The head asset and the smplx module of one synthetic pickle."""
    import smplx

    content = synthetic_flame()
    embedding = {"lmk_face_idx": np.arange(51), "lmk_b_coords": np.full((51, 3), 1 / 3)}
    (folder / "FLAME_NEUTRAL.pkl").write_bytes(pickle.dumps(content, protocol=2))
    (folder / "flame_static_embedding.pkl").write_bytes(pickle.dumps(embedding, protocol=2))
    theirs = smplx.FLAME(str(folder), num_betas=N_SHAPE, num_expression_coeffs=N_EXPRESSION, batch_size=1)
    head = head_from_flame(
        folder / "FLAME_NEUTRAL.pkl", n_shape=N_SHAPE, n_expression=N_EXPRESSION, lip_vertex=LIP_VERTEX
    )
    return head, theirs


def random_coefficients(frames: int, seed: int = 1) -> Coefficients:
    rng = np.random.default_rng(seed)
    draw = lambda n, scale: jnp.asarray(rng.normal(size=(frames, n)) * scale, jnp.float32)
    shape = jnp.tile(draw(N_SHAPE, 1.0)[:1], (frames, 1))
    neck, jaw, eyes = (draw(3, 0.2) for _ in range(3))
    return Coefficients(shape, draw(N_EXPRESSION, 1.0), draw(3, 0), draw(3, 0), neck, jaw, eyes)
