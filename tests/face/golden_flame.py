"""Golden's synthetic FLAME model as a head asset, and as a pickle in FLAME's own format."""

import pickle

import numpy as np
import scipy.sparse

from loki_jax.face.asset import HeadAsset

LIP_VERTEX = 137


def read(golden, name):
    with np.load(golden / f"{name}.npz") as file:
        return {key: file[key] for key in file.files if key != "meta_json"}


def head_of(model, n_shape=150, n_expression=65, lip_vertex=LIP_VERTEX):
    """The asset, built without `loki_jax.face.flame`."""
    directions = np.moveaxis(model["model/shapedirs"], -1, 0)
    n_vertices = len(model["model/v_template"])
    return HeadAsset(
        template=model["model/v_template"],
        faces=model["model/f"].astype(np.int32),
        shape_basis=directions[:n_shape].copy(),
        expression_basis=directions[300 : 300 + n_expression].copy(),
        pose_correctives=np.moveaxis(model["model/posedirs"], -1, 0).copy(),
        joint_regressor=model["model/J_regressor"],
        parents=(-1, 0, 1, 1, 1),
        skinning_weights=model["model/weights"],
        render_mask=np.ones(n_vertices, bool),
        inner_mouth=np.zeros(n_vertices, bool),
        shape_sigma=np.ones(n_shape, np.float32),
        expression_sigma=np.ones(n_expression, np.float32),
        expression_bounds=np.tile(np.float32([-np.inf, np.inf]), (n_expression, 1)),
        landmarks={},
        name="golden",
        joint_names=("root", "neck", "jaw", "left_eye", "right_eye"),
        shape_names=tuple(f"s{i}" for i in range(n_shape)),
        expression_names=tuple(f"e{i}" for i in range(n_expression)),
        licence="synthetic",
        provenance="golden",
        lip_vertex=lip_vertex,
    )


def flame_dict(model):
    """The mapping a FLAME pickle holds, with the types FLAME uses."""
    return {
        "v_template": model["model/v_template"].astype(np.float64),
        "f": model["model/f"].astype(np.uint32),
        "shapedirs": model["model/shapedirs"].astype(np.float64),
        "posedirs": model["model/posedirs"].astype(np.float64),
        "J_regressor": scipy.sparse.csc_matrix(model["model/J_regressor"].astype(np.float64)),
        "weights": model["model/weights"].astype(np.float64),
        "kintree_table": model["model/kintree_table"].astype(np.int64),
        "J": np.zeros((5, 3)),
        "bs_style": "lbs",
        "bs_type": "lrotmin",
    }


def write_pickle(path, content, protocol=2):
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol=protocol)
    return path
