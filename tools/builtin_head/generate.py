"""Make the arrays of the built-in head and write them as package data.

    python -m tools.builtin_head.generate [--out FILE.npz]

The surface is in `mesh.py`, identity and expression axes and skinning weights in `axes.py`. The MediaPipe
landmarks were placed once, by `landmarks.py`, and are read from `mediapipe478.npz`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from loki_jax.face import builtin
from loki_jax.face.asset import HeadAsset, Landmarks, save_head
from loki_jax.face.builtin import CAVITY, EYE, EYEBALL, LOWER_TEETH, NAME, SKIN, UPPER_TEETH, BuiltinMesh
from tools.builtin_head.axes import expression_axes, identity_axes, skinning_weights
from tools.builtin_head.mesh import build_mesh, ibug68, on_grid

NECK_JOINT = np.array([0.0, -0.085, -0.025])

JAW_JOINT = np.array([0.0, -0.012, 0.004])

ROOT_JOINT = np.array([0.0, -0.160, -0.020])

MEDIAPIPE_FILE = Path(__file__).with_name("mediapipe478.npz")

# Landmarks seen from the front say little of these axes. With the prior of the others the noses fitted to 17
# portraits stuck out more than the mean head's by 5.2 mm on average and by up to 13.5 mm; now by 2.3 and 8.7.
NOSE_DEPTH = ("nose_bridge", "nose_tip")


def _joint_regressor(vertices, groups, joints):
    """Least-norm affine combinations (J, V) of each group's vertices that give the joints."""
    rows = np.zeros((len(joints), len(vertices)))
    for row, group, joint in zip(rows, groups, joints, strict=True):
        index = np.flatnonzero(group)
        system = np.concatenate([np.ones((1, len(index))), vertices[index].T])
        # Least norm by the normal equations: the four constraints are independent and well scaled
        # once positions are in decimetres.
        system = system * np.array([1.0, 10.0, 10.0, 10.0])[:, None]
        target = np.array([1.0, *(10.0 * joint)])
        row[index] = system.T @ np.linalg.solve(system @ system.T, target)
    return rows


def generate_head(mesh: BuiltinMesh) -> HeadAsset:
    """The head asset on the mesh of `build_mesh()`."""
    p = mesh.vertices
    shape_names, shape_basis = identity_axes(mesh)
    expression_names, expression_basis, bounds, expression_sigma = expression_axes(mesh)
    ball = mesh.part == EYEBALL
    joints = np.stack([ROOT_JOINT, NECK_JOINT, JAW_JOINT, EYE, EYE * [-1, 1, 1]])
    skin = mesh.part == SKIN
    near_hinge = (
        skin
        & (np.abs(p[:, 0]) > 0.055)
        & (np.abs(p[:, 1] - JAW_JOINT[1]) < 0.020)
        & (np.abs(p[:, 2]) < 0.045)
    )
    neck = skin & (np.abs(mesh.v + 0.130) < 0.022)
    base = skin & (np.abs(mesh.v + 0.190) < 0.025)
    regressor = _joint_regressor(
        p, [base, neck, near_hinge, ball & (mesh.left > 0), ball & (mesh.left < 0)], joints
    )
    # As in the paper's head mask: the head without neck and shoulders.
    below = skin & (mesh.v < -0.118)
    with np.load(MEDIAPIPE_FILE) as stored:
        mediapipe = Landmarks(stored["face"].astype(np.int32), stored["bary"].astype(np.float32))
    return HeadAsset(
        template=p.astype(np.float32),
        faces=mesh.faces,
        shape_basis=on_grid(shape_basis).astype(np.float32),
        expression_basis=on_grid(expression_basis).astype(np.float32),
        pose_correctives=np.zeros((0, len(p), 3), np.float32),
        joint_regressor=on_grid(regressor).astype(np.float32),
        parents=(-1, 0, 1, 1, 1),
        skinning_weights=on_grid(skinning_weights(mesh)).astype(np.float32),
        render_mask=~below,
        inner_mouth=np.isin(mesh.part, [CAVITY, UPPER_TEETH, LOWER_TEETH]),
        shape_sigma=np.where(np.isin(shape_names, NOSE_DEPTH), 0.5, 1.0).astype(np.float32),
        expression_sigma=expression_sigma.astype(np.float32),
        expression_bounds=bounds.astype(np.float32),
        landmarks={"ibug68": ibug68(mesh), "mediapipe478": mediapipe},
        name=NAME,
        joint_names=("root", "neck", "jaw", "left_eye", "right_eye"),
        shape_names=shape_names,
        expression_names=expression_names,
        licence="Apache-2.0",
        provenance="tools/builtin_head of loki_jax: procedural, no external mesh",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.builtin_head.generate", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--out", type=Path, default=builtin.FILE, help="file to write")
    args = parser.parse_args(argv)
    mesh = build_mesh()
    labels = {f"mesh_{name}": value for name, value in vars(mesh).items() if name != "faces"}
    digest = save_head(args.out, generate_head(mesh), labels)
    print(f"wrote {args.out}, SHA-256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
