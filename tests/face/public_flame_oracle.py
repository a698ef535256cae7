"""The public code's variant of FLAME (method, section 11, row 10), in float64 NumPy.

It differs from FLAME: pose correctives take the rotations of joints 0, 2, 3, 4 minus *twice* the
identity, the neck turns joint 0, and no joint follows its parent. The package does not reproduce
these defects; golden files contain them.
"""

import numpy as np
from scipy.spatial.transform import Rotation


def rotation(rotvec):
    return Rotation.from_rotvec(np.asarray(rotvec, np.float64)).as_matrix()


class PublicFlame:
    """One identity of the public FLAME variant.

    `model`: arrays of golden's flame_model.npz; `blink` (V, 3) replaces the last expression axis.
    """

    def __init__(self, model, shape, n_expression=65, blink=None, lip_vertex=137):
        get = lambda key: np.asarray(model[f"model/{key}"], np.float64)
        directions = get("shapedirs")
        self.expression = directions[:, :, 300 : 300 + n_expression].copy()
        if blink is not None:
            self.expression[:, :, -1] = blink
        self.correctives, self.regressor, self.weights = get("posedirs"), get("J_regressor"), get("weights")
        self.neutral = get("v_template") + directions[:, :, : len(shape)] @ np.asarray(shape, np.float64)
        self.lip_vertex = lip_vertex

    def posed(self, expression, neck, jaw, eyes, neck_joint=0):
        """Vertices (B, V, 3) before the rigid motion; the base skinner has `neck_joint` 1."""
        batch = len(expression)
        shaped = self.neutral + np.einsum("vce,be->bvc", self.expression, expression)
        joints = np.einsum("jv,bvc->bjc", self.regressor, shaped)
        turns = np.tile(np.eye(3), (batch, 5, 1, 1))
        turns[:, neck_joint] = rotation(neck)
        turns[:, 2] = rotation(jaw)
        turns[:, 3] = turns[:, 4] = rotation(eyes)
        feature = (turns - 2 * np.eye(3))[:, [0, 2, 3, 4]].reshape(batch, -1)
        shaped = shaped + np.einsum("vcp,bp->bvc", self.correctives, feature)
        relative = shaped[:, None] - joints[:, :, None]
        return np.einsum("vj,bjik,bjvk->bvi", self.weights, turns, relative) + np.einsum(
            "vj,bji->bvi", self.weights, joints
        )

    def mouth(self, local):
        """The neutral inner-mouth sphere from its vertices on the unit sphere, and the jaw joint."""
        jaw, lip = (self.regressor @ self.neutral)[2], self.neutral[self.lip_vertex]
        length = np.linalg.norm(lip - jaw)
        pole = (lip - jaw) / length
        side = np.cross([0, 1, 0], pole)
        side /= np.linalg.norm(side)
        frame = np.stack([side, np.cross(pole, side), pole])
        return lip - (length / 4 + 0.005) * pole + length / 4 * local.astype(np.float64) @ frame, jaw


def rigid(vertices, rot, tra):
    """R(rot) x + tra for (B, V, 3) or (V, 3) vertices and (B, 3) motions."""
    return (
        np.einsum("bik,...vk->bvi" if vertices.ndim == 2 else "bik,bvk->bvi", rotation(rot), vertices)
        + np.asarray(tra)[:, None]
    )
