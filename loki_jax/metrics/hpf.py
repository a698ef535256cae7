"""HPF, head-pose follow: how well one clip's head rotation follows another's (method, section 10)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.spatial.transform import Rotation

from loki_jax.arrays import ArrayLike

# Between y up, z towards the viewer (the world's axes) and OpenCV's, in which extrinsics act.
_FLIP = np.diag([1.0, -1.0, -1.0])


class HeadPoseFollow(NamedTuple):
    """Result of `head_pose_follow`.

    Attributes:
      degrees: mean over frames of the angle between the two rotations relative to the first common
        frame (which counts, with 0); None where fewer than two frames are common.
      absolute_degrees: mean angle between the rotations themselves, which HPF is blind to; None
        as above.
      aligned_degrees: as `degrees`, but relative to the best constant rotation between the two tracks (one
        Procrustes alignment over all common frames) instead of frame 0, whose noise enters every frame of
        `degrees`; None as above.
      track_rate: share of the asked frames that both clips have; 0 where there is no value.
      n_frames: number of common frames.
      per_frame: angle of every asked frame, NaN where it is not common.
    """

    degrees: float | None
    absolute_degrees: float | None
    aligned_degrees: float | None
    track_rate: float
    n_frames: int
    per_frame: Float[np.ndarray, " n"]


def head_rotation(rot: Float[ArrayLike, "n 3"], neck: Float[ArrayLike, "n 3"] | None = None) -> Rotation:
    """Total head rotations R(rot) R(neck) of rotation vectors in radians; no neck means no bend."""
    total = Rotation.from_rotvec(np.asarray(rot, np.float64))
    return total if neck is None else total * Rotation.from_rotvec(np.asarray(neck, np.float64))


def _to_camera(extrinsics: Float[ArrayLike, "*n 4 4"] | None, frames: Int[np.ndarray, " k"]) -> Rotation:
    """Rotation from world to camera axes, here y up and z backwards, for the frames with these numbers."""
    matrices = np.eye(4) if extrinsics is None else np.asarray(extrinsics, np.float64)
    if matrices.ndim == 3:
        matrices = matrices[frames]
    return Rotation.from_matrix(_FLIP @ matrices[..., :3, :3] @ _FLIP)


def head_pose_follow(
    pred_rot: Float[ArrayLike, "..."],
    target_rot: Float[ArrayLike, "..."],
    pred_neck: Float[ArrayLike, "..."] | None = None,
    target_neck: Float[ArrayLike, "..."] | None = None,
    n_frames: int | None = None,
    pred_valid: Bool[np.ndarray, "..."] | None = None,
    target_valid: Bool[np.ndarray, "..."] | None = None,
    pred_extrinsics: Float[ArrayLike, "*n 4 4"] | None = None,
    target_extrinsics: Float[ArrayLike, "*m 4 4"] | None = None,
) -> HeadPoseFollow:
    """Head-pose follow: how well a prediction follows a target, in degrees; lower is better.

    With R_t = R(rot_t) R(neck_t) in the axes of each clip's camera and D_t = R_t R_0^T, the mean over t of
    the geodesic angle between D_pred and D_target (method, section 10).

    Args:
      pred_rot, target_rot: (n_pred, 3) and (n_target, 3), rotation vectors, radians.
      pred_neck, target_neck: those of the neck, of the same shapes; None is no bend.
      n_frames: number of frames asked for; default the target's.
      pred_valid, target_valid: (n_pred,) and (n_target,), frames that were tracked; default all. Frame 0 is
        the first frame tracked in both.
      pred_extrinsics, target_extrinsics: from the world to the clip's camera, one for all frames or one a
        frame; None: the identity.

    Raises:
      ValueError: an array is not (n, 3), or its lengths disagree.
    """
    asked = len(target_rot) if n_frames is None else n_frames
    length = min(len(pred_rot), len(target_rot), asked)
    common = np.ones(length, bool)
    for side, rot, neck, valid in (
        ("pred", pred_rot, pred_neck, pred_valid),
        ("target", target_rot, target_neck, target_valid),
    ):
        for name, value in (("rot", rot), ("neck", neck)):
            if value is not None and (np.ndim(value) != 2 or np.shape(value)[1] != 3):
                raise ValueError(
                    f"head_pose_follow: {side}_{name} has shape {np.shape(value)}, expected (frames, 3)"
                )
        for other in (neck, valid):
            if other is not None and len(other) != len(rot):
                raise ValueError(
                    f"head_pose_follow: {side}_rot has {len(rot)} frames, its neck or validity {len(other)}"
                )
        if valid is not None:
            common &= np.asarray(valid[:length], bool)
    index = np.flatnonzero(common)
    per_frame = np.full(asked, np.nan)
    if len(index) < 2:
        return HeadPoseFollow(None, None, None, 0.0, len(index), per_frame)

    def pick(value):
        return None if value is None else np.asarray(value)[index]

    prediction = _to_camera(pred_extrinsics, index) * head_rotation(pick(pred_rot), pick(pred_neck))
    target = _to_camera(target_extrinsics, index) * head_rotation(pick(target_rot), pick(target_neck))
    # `magnitude` is the geodesic angle 2 arccos |q . q|, computed without the arccos that loses half
    # of the digits near 0.
    relative = (prediction * prediction[0].inv()).inv() * (target * target[0].inv())
    per_frame[index] = np.degrees(relative.magnitude())
    # Constant offsets in the head's own frame cancel in D_t; the mean rotation is the best of them.
    offset = (target.inv() * prediction).mean()
    aligned = (target * offset).inv() * prediction
    return HeadPoseFollow(
        degrees=float(per_frame[index].mean()),
        absolute_degrees=float(np.degrees((prediction.inv() * target).magnitude()).mean()),
        aligned_degrees=float(np.degrees(aligned.magnitude()).mean()),
        track_rate=len(index) / asked,
        n_frames=len(index),
        per_frame=per_frame,
    )


def absolute_pose_error(
    pred_rot: Float[ArrayLike, "n 3"],
    target_rot: Float[ArrayLike, "m 3"],
    pred_neck: Float[ArrayLike, "n 3"] | None = None,
    target_neck: Float[ArrayLike, "m 3"] | None = None,
    pred_extrinsics: Float[ArrayLike, "*n 4 4"] | None = None,
    target_extrinsics: Float[ArrayLike, "*m 4 4"] | None = None,
    valid: Bool[np.ndarray, " k"] | None = None,
) -> Float[np.ndarray, " common"]:
    """Angle between both head rotations in each common frame, degrees; arguments as `head_pose_follow`.

    In contrast to HPF it sees constant offsets. `valid`: frames that were tracked in both; others are NaN.
    """
    index = np.arange(min(len(pred_rot), len(target_rot)))

    def total(rot, neck, extrinsics):
        pick = lambda value: None if value is None else np.asarray(value)[index]
        return _to_camera(extrinsics, index) * head_rotation(pick(rot), pick(neck))

    apart = total(pred_rot, pred_neck, pred_extrinsics).inv() * total(
        target_rot, target_neck, target_extrinsics
    )
    degrees = np.degrees(apart.magnitude())
    return degrees if valid is None else np.where(valid[: len(index)], degrees, np.nan)
