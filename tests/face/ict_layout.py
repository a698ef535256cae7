"""The built-in head in the layout of the ICT-FaceKit arrays: vertices, regions and linear shapes alone."""

import numpy as np

from loki_jax.face.builtin import builtin_head
from loki_jax.face.ict import MEDIAPIPE_OF_IBUG
from loki_jax.face.skinning import head_vertices, make_identity
from loki_jax.face.types import Coefficients

REGIONS = ("face", "head_neck", "mouth_socket", "eyeball_l", "eyeball_r")


def builtin_in_ict_layout() -> dict[str, np.ndarray]:
    """Arrays that `head_from_ict` reads (centimetres); jawOpen turns the jaw, as far as a line can."""
    head = builtin_head()
    eyeball = lambda name: np.asarray(head.skinning_weights)[:, head.joint(name)] > 0.5
    parts = [np.asarray(head.inner_mouth), eyeball("left_eye"), eyeball("right_eye")]
    sizes = (head.n_shape, head.n_expression, 3, 3, 3, 3, 3)
    rest = Coefficients(*(np.zeros(n, np.float32) for n in sizes))
    opened = rest._replace(jaw=np.float32([0.35, 0, 0]))
    identity = make_identity(head, np.zeros(head.n_shape, np.float32))
    deltas = np.array(head.expression_basis)
    deltas[head.expression_names.index("jawOpen")] += head_vertices(head, identity, opened) - head.template
    marks = head.landmarks["mediapipe478"]
    nearest = np.asarray(marks.bary)[MEDIAPIPE_OF_IBUG].argmax(-1)
    return {
        "neutral": head.template * 100,
        "faces": np.asarray(head.faces),
        "region_id": np.select(parts, [2, 3, 4], 0).astype(np.int8),
        "region_names": np.array(REGIONS),
        "identity_modes": np.asarray(head.shape_basis) * 100,
        "expr_deltas": deltas * 100,
        "expr_names": np.array(head.expression_names),
        "landmarks68": np.asarray(head.faces)[np.asarray(marks.face)[MEDIAPIPE_OF_IBUG], nearest],
    }
