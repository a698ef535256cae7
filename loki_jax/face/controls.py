"""What a person changes about a retargeted motion: scales, gaze, offsets, regions, sliders (docs/animate.md).

Pure functions on the host, since a clip has a few numbers a frame. Rotations are those of `Coefficients`.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from loki_jax.arrays import ArrayLike
from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import builtin_head
from loki_jax.face.control_options import REGIONS, ControlError, Controls
from loki_jax.face.temporal import smooth_motion
from loki_jax.face.types import Camera, Coefficients

# A slider: a constant, or keyframes (seconds, value) with rising times.
Slider = int | float | Sequence[Sequence[int | float]]

ANGLES = ("yaw", "pitch", "roll", "gazeYaw", "gazePitch")  # sliders of every head, degrees
GAZE_LIMITS = (35.0, 25.0)  # how far eyes turn towards the camera: to the side, up or down; degrees

_ALIASES = {"smile": "mouthSmile", "frown": "mouthFrown", "blink": "eyeBlink", "pucker": "mouthPucker"}
_LANDMARKS = "mediapipe478"
_FIT_ERROR = 0.001  # metres by which a fitted slider may miss a landmark, against one tenth of a sigma


def apply_controls(
    head: HeadAsset,
    moved: Coefficients,
    portrait: Coefficients,
    camera: Camera,
    fps: float,
    controls: Controls = Controls(),  # noqa: B008 (frozen)
    sliders: Mapping[str, Slider] | None = None,
) -> Coefficients:
    """A retargeted motion under controls and sliders.

    In this order: smoothing, scales and regions, offsets of the pose, sliders, gaze to the camera. What no
    control changes stays equal bit for bit; a scale of 0 gives exactly the portrait's own values. Offsets
    turn the head about its neck joint, in its own axes: roll, then pitch, then yaw.

    Args:
      moved: fields (N, ...), of `retarget`.
      portrait: fields without leading axes.
      camera: of the portrait; without leading axes.
      fps: frames a second, for smoothing and keyframes.

    Raises:
      ControlError: a slider that this head does not have, keyframes that do not rise in time, or lids or lips
        apart on a head that names no axes and has no landmarks.
    """
    moved, own = _on_host(moved), _on_host(portrait)
    length = len(moved.rot)
    values = _values_at(sliders or {}, np.arange(length) / fps)
    if controls.smooth > 0:
        moved = smooth_motion(moved, fps, controls.smooth / 1000)
    moved = _scaled(head, moved, own, controls)
    angles = {name: values.pop(name, np.zeros(length)) for name in ANGLES}
    for name in ("yaw", "pitch", "roll"):
        angles[name] = angles[name] + getattr(controls, name)
    moved = _turned(head, moved, angles)
    moved = _with_sliders(head, moved, values)
    if controls.gaze == "camera":
        moved = moved._replace(eyes=gaze_at_camera(head, moved, camera))
    gaze = _rotation_of_degrees(angles["gazeYaw"], angles["gazePitch"], np.zeros(length))
    turned = (gaze * Rotation.from_rotvec(moved.eyes)).as_rotvec().astype(np.float32)
    changed = (angles["gazeYaw"] != 0) | (angles["gazePitch"] != 0)
    return moved._replace(eyes=np.where(changed[:, None], turned, moved.eyes))


def _on_host(coefficients: Coefficients) -> Coefficients:
    return Coefficients(*(np.asarray(field, np.float32) for field in coefficients))


# ------------------------------------------------------------------------------------------- scales


def _mixed(own: ArrayLike, driver: ArrayLike, scale: float | np.ndarray) -> np.ndarray:
    """`own` where the scale is 0 and `driver` where it is 1, both exactly; between and beyond on a line."""
    scale = np.asarray(scale, np.float32)
    return np.where(scale == 1, driver, (1 - scale) * own + scale * driver).astype(np.float32)


def _scaled(head: HeadAsset, moved: Coefficients, own: Coefficients, controls: Controls) -> Coefficients:
    follows = REGIONS[controls.region]
    share = {part: float(part in follows) for part in REGIONS["all"]}
    scale = {
        "expression": controls.expression * share["expression"],
        "mouth": controls.expression * share["mouth"],
        "jaw": controls.jaw * share["jaw"],
        "left": controls.lids * controls.left_lids * share["lids"],
        "right": controls.lids * controls.right_lids * share["lids"],
    }
    gaze = share["gaze"] * (1.0 if controls.gaze == "camera" else controls.gaze)
    return _scaled_pose(moved, own, controls.pose * share["pose"])._replace(
        expression=_scaled_expression(head, moved.expression, own.expression, scale),
        jaw=_mixed(own.jaw, moved.jaw, scale["jaw"]),
        eyes=_mixed(own.eyes, moved.eyes, gaze),
    )


def _scaled_expression(
    head: HeadAsset, moved: ArrayLike, own: ArrayLike, scale: Mapping[str, float]
) -> Float[np.ndarray, "N n_expr"]:
    moved, own = np.asarray(moved), np.asarray(own)
    if set(scale.values()) == {1.0}:
        return moved
    axes = find_axes(head)
    factor = np.array([_axis_scale(name, scale) for name in axes.names])
    if not axes.fitted:
        result = _mixed(own, moved, factor)
        # Lids do not pass through each other, however much they are exaggerated.
        lids = np.array([part_of(name) in ("left", "right", "both") for name in axes.names])
        low, high = np.asarray(head.expression_bounds, np.float32).T
        return np.where(lids & (factor > 1), np.clip(result, low, high), result)
    if len(set(scale.values())) == 1:
        return _mixed(own, moved, scale["expression"])
    # What the named directions explain of the difference is scaled by name, the rest as expression.
    weights = (moved - own) @ np.linalg.pinv(axes.expression, rcond=1e-3)
    change = ((factor - scale["expression"]) * weights) @ axes.expression
    return (_mixed(own, moved, scale["expression"]) + change).astype(np.float32)


def _axis_scale(name: str, scale: Mapping[str, float]) -> float:
    part = part_of(name)
    return (scale["left"] + scale["right"]) / 2 if part == "both" else scale[part]


def _scaled_pose(moved: Coefficients, own: Coefficients, scale: float) -> Coefficients:
    if scale == 1:
        return moved
    if scale == 0:
        still = {name: np.broadcast_to(getattr(own, name), getattr(moved, name).shape) for name in _POSE}
        return moved._replace(**still)
    there = Rotation.from_rotvec(own.rot) * Rotation.from_rotvec(own.neck)
    turned = Rotation.from_rotvec(moved.rot) * Rotation.from_rotvec(moved.neck)
    turned = Rotation.from_rotvec(scale * (turned * there.inv()).as_rotvec()) * there
    neck = _mixed(own.neck, moved.neck, scale)
    rot = (turned * Rotation.from_rotvec(neck).inv()).as_rotvec()
    return moved._replace(rot=rot.astype(np.float32), tra=_mixed(own.tra, moved.tra, scale), neck=neck)


_POSE = ("rot", "tra", "neck")

# ----------------------------------------------------------------------------------- pose and gaze


def _rotation_of_degrees(yaw: np.ndarray, pitch: np.ndarray, roll: np.ndarray) -> Rotation:
    """Rotations in the head's axes: to the person's left, upwards, and clockwise in the picture."""
    return Rotation.from_euler("YXZ", np.stack([yaw, -pitch, -roll], -1), degrees=True)


def _turned(head: HeadAsset, moved: Coefficients, angles: Mapping[str, np.ndarray]) -> Coefficients:
    yaw, pitch, roll = (angles[name] for name in ("yaw", "pitch", "roll"))
    changed = ((yaw != 0) | (pitch != 0) | (roll != 0))[:, None]
    if not changed.any():
        return moved
    before, neck = Rotation.from_rotvec(moved.rot), Rotation.from_rotvec(moved.neck)
    after = before * neck * _rotation_of_degrees(yaw, pitch, roll) * neck.inv()
    joint = head.joint("neck")
    pivot = np.zeros(3) if joint is None else _joints(head, moved.betas[0])[joint]
    tra = moved.tra + before.apply(pivot) - after.apply(pivot)
    return moved._replace(
        rot=np.where(changed, after.as_rotvec(), moved.rot).astype(np.float32),
        tra=np.where(changed, tra, moved.tra).astype(np.float32),
    )


def _joints(head: HeadAsset, betas: Float[ArrayLike, " n_shape"]) -> Float[np.ndarray, "J 3"]:
    """Joints of a neutral head, in its frame, metres."""
    vertices = np.asarray(head.template) + np.tensordot(betas, np.asarray(head.shape_basis), 1)
    return np.asarray(head.joint_regressor) @ vertices


def camera_centre(camera: Camera) -> Float[np.ndarray, " 3"]:
    """Where a camera is in the world, metres."""
    extrinsics = np.asarray(camera.extrinsics, np.float64)
    return np.diag([1.0, -1.0, -1.0]) @ extrinsics[:3, :3].T @ -extrinsics[:3, 3]


def gaze_at_camera(head: HeadAsset, moved: Coefficients, camera: Camera) -> Float[np.ndarray, "N 3"]:
    """Rotations `eyes` with which both eyes look into the lens, within `GAZE_LIMITS`.

    The eyes stay parallel: they are aimed from between them.

    Raises:
      ControlError: the head has no joints of the eyes.
    """
    eyes = [head.joint("left_eye"), head.joint("right_eye")]
    if None in eyes:
        raise ControlError(f"head {head.name!r} has no joints of the eyes: its gaze cannot be turned")
    joints, joint = _joints(head, moved.betas[0]), head.joint("neck")
    pivot = np.zeros(3) if joint is None else joints[joint]
    turned = Rotation.from_rotvec(moved.rot) * Rotation.from_rotvec(moved.neck)
    middle = np.mean([joints[index] for index in eyes if index is not None], axis=0)
    place = turned.apply(middle - pivot) + Rotation.from_rotvec(moved.rot).apply(pivot) + moved.tra
    x, y, z = turned.inv().apply(camera_centre(camera) - place).T
    side, height = GAZE_LIMITS
    yaw = np.clip(np.degrees(np.arctan2(x, z)), -side, side)
    pitch = np.clip(np.degrees(np.arctan2(y, np.hypot(x, z))), -height, height)
    return _rotation_of_degrees(yaw, pitch, np.zeros_like(yaw)).as_rotvec().astype(np.float32)


# ------------------------------------------------------------------------------------------ sliders


class Axes(NamedTuple):
    """The named directions of a head's expression.

    Attributes:
      names: as the head has them, or those of the built-in head where they are fitted.
      expression: change of the expression coefficients at weight 1.
      jaw: change of the jaw's rotation vector at weight 1.
      fitted: the head's own axes have no names that are known.
    """

    names: tuple[str, ...]
    expression: Float[np.ndarray, "k n_expr"]
    jaw: Float[np.ndarray, "k 3"]
    fitted: bool


def find_axes(head: HeadAsset) -> Axes:
    """The named directions of a head: its own axes, or for FLAME fitted ones.

    A fitted direction moves the head's landmarks as the axis of the built-in head moves its own, by least
    squares over the expression axes and the jaw.

    Raises:
      ControlError: the head has neither names nor landmarks.
    """
    guide = builtin_head()
    known = {_plain(name) for name in guide.expression_names}
    known |= {base + side for base in known for side in "lr"}
    own = [_plain(name) in known for name in head.expression_names]
    if sum(own) > len(own) / 2:
        still = np.zeros((head.n_expression, 3))
        return Axes(head.expression_names, np.eye(head.n_expression), still, False)
    if _LANDMARKS not in head.landmarks:
        raise ControlError(
            f"head {head.name!r} has neither named expression axes nor landmarks to find them by. Place the "
            "landmarks with `python -m data_prep.embed_landmarks`."
        )
    present = np.asarray(head.landmarks[_LANDMARKS].face) >= 0
    here, there = _marks(head, head.template)[present], _marks(guide, guide.template)[present]
    size = np.linalg.norm(here - here.mean(0)) / np.linalg.norm(there - there.mean(0))
    wanted = size * np.stack([_marks(guide, shape)[present] for shape in guide.expression_basis])
    moves = [_marks(head, shape)[present] for shape in head.expression_basis]
    sigma = np.asarray(head.expression_sigma)
    joint = head.joint("jaw")
    if joint is not None:
        # Small turns of the jaw, of what follows it.
        arm = np.asarray(head.template) - _joints(head, np.zeros(head.n_shape))[joint]
        weight = np.asarray(head.skinning_weights)[:, joint, None]
        moves += [_marks(head, weight * np.cross(axis, arm))[present] for axis in np.eye(3)]
        sigma = np.append(sigma, [0.2, 0.03, 0.03])
    matrix = np.stack([move.ravel() for move in moves], -1) / (_FIT_ERROR * np.sqrt(len(here)))
    target = wanted.reshape(len(wanted), -1).T / (_FIT_ERROR * np.sqrt(len(here)))
    matrix = np.concatenate([matrix, 0.1 * np.diag(1 / sigma)])
    target = np.concatenate([target, np.zeros((len(sigma), len(wanted)))])
    found = np.linalg.lstsq(matrix, target, rcond=None)[0].T
    n = head.n_expression
    jaw = found[:, n:] if joint is not None else np.zeros((len(found), 3))
    return Axes(guide.expression_names, found[:, :n], jaw, True)


def _marks(head: HeadAsset, values: ArrayLike) -> Float[np.ndarray, "478 3"]:
    """Values at vertices, read at the landmarks."""
    marks = head.landmarks[_LANDMARKS]
    corners = np.asarray(values)[np.asarray(head.faces)[np.asarray(marks.face)]]
    return np.einsum("nk,nkc->nc", np.asarray(marks.bary, np.float64), corners)


def _plain(name: str) -> str:
    """A name without case and underscores, its side as one letter: eyeBlink_L, eyeBlinkLeft, eyeblinkl."""
    plain = name.replace("_", "").lower()
    for side in ("left", "right"):
        if plain.endswith(side):
            return plain.removesuffix(side) + side[0]
    return plain


def part_of(name: str) -> str:
    """The part of the face that an axis moves: jaw, mouth, the lids of the left or right eye or both
    ("left", "right", "both"), or "expression" for the rest. mouthClose closes the lips of an open jaw and
    belongs to it.
    """
    plain = _plain(name)
    if plain == "blink":
        return "both"
    if plain.startswith("eye"):
        return {"l": "left", "r": "right"}.get(plain[-1], "both")
    if plain.startswith("jaw") or plain == "mouthclose":
        return "jaw"
    return "mouth" if plain.startswith("mouth") else "expression"


def _axes_of(axes: Axes, name: str, head: HeadAsset) -> list[int]:
    """Numbers of the axes that a slider moves: the one of that name, or both sides of it."""
    names = [_plain(axis) for axis in axes.names]
    wanted = _plain(_ALIASES.get(name, name))
    if wanted in names:
        return [names.index(wanted)]
    pair = [wanted + side for side in "lr"]
    if all(side in names for side in pair) and wanted not in ("jaw", "mouth"):
        return [names.index(side) for side in pair]
    choices = [*axes.names, *_ALIASES, *ANGLES]
    lower = {choice.lower(): choice for choice in choices}
    close = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, 4, 0.5)]
    raise ControlError(
        f"head {head.name!r} has no slider {name!r}. "
        + (f"Close ones: {', '.join(close)}." if close else f"Some it has: {', '.join(choices[:6])}.")
    )


def check_sliders(head: HeadAsset, sliders: Mapping[str, Slider]) -> None:
    """Check that a head has sliders of these names.

    Raises:
      ControlError: it does not.
    """
    names = [name for name in sliders if name not in ANGLES]
    axes = find_axes(head) if names else None
    for name in names:
        assert axes is not None
        _axes_of(axes, name, head)


def _with_sliders(
    head: HeadAsset, moved: Coefficients, values: Mapping[str, Float[np.ndarray, " N"]]
) -> Coefficients:
    """Weights of named axes added to a motion, within the axes' bounds."""
    if not values:
        return moved
    axes = find_axes(head)
    expression, jaw = moved.expression.astype(np.float64), moved.jaw.astype(np.float64)
    touched = np.zeros(moved.expression.shape, bool)
    for name, value in values.items():
        for index in _axes_of(axes, name, head):
            expression = expression + value[:, None] * axes.expression[index]
            jaw = jaw + value[:, None] * axes.jaw[index]
            touched |= (value[:, None] != 0) & (axes.expression[index] != 0)
    # What the fit left outside of the bounds is not pulled in.
    low, high = np.asarray(head.expression_bounds).T
    low, high = np.minimum(low, moved.expression), np.maximum(high, moved.expression)
    clipped = np.clip(expression, low, high).astype(np.float32)
    return moved._replace(expression=np.where(touched, clipped, moved.expression), jaw=jaw.astype(np.float32))


def _values_at(
    sliders: Mapping[str, Slider], times: Float[np.ndarray, " N"]
) -> dict[str, Float[np.ndarray, " N"]]:
    """Values of sliders at times in seconds: linear between keyframes, constant before and after them."""
    values = {}
    for name, slider in sliders.items():
        check_slider(name, slider)
        if isinstance(slider, int | float):
            values[name] = np.full(len(times), float(slider))
        else:
            keys = np.asarray(slider, np.float64)
            values[name] = np.interp(times, keys[:, 0], keys[:, 1])
    return values


def check_slider(name: str, slider: object) -> None:
    """Check that a slider is a number or a list of keyframes.

    Raises:
      ControlError: it is not.
    """
    if isinstance(slider, int | float) and not isinstance(slider, bool) and math.isfinite(slider):
        return
    try:
        keys = np.asarray(slider, np.float64)
    except (TypeError, ValueError):
        keys = np.zeros(0)
    if keys.ndim != 2 or keys.shape[1] != 2 or len(keys) == 0 or not np.isfinite(keys).all():
        raise ControlError(
            f"slider {name!r} is {slider!r:.60}, expected a number or keyframes [[seconds, value], ...]"
        )
    if (np.diff(keys[:, 0]) <= 0).any():
        raise ControlError(f"slider {name!r}: the times of its keyframes do not rise")


def read_sliders(path: str | os.PathLike) -> dict[str, Slider]:
    """Sliders of a JSON file: an object from names to numbers or keyframes [[seconds, value], ...].

    Raises:
      ControlError: no such file, no JSON, or something else in it.
    """
    try:
        sliders = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ControlError(f"{path}: not a readable JSON file of sliders ({error}).") from error
    if not isinstance(sliders, dict):
        raise ControlError(f'{path}: expected an object such as {{"smile": 0.5}}.')
    for name, slider in sliders.items():
        try:
            check_slider(name, slider)
        except ControlError as error:
            raise ControlError(f"{path}: {error}.") from error
    return sliders


def parse_sliders(settings: Iterable[str]) -> dict[str, Slider]:
    """Sliders of texts NAME=NUMBER.

    Raises:
      ControlError: another text.
    """
    sliders: dict[str, Slider] = {}
    for text in settings:
        name, _, value = text.partition("=")
        try:
            sliders[name.strip()] = float(value)
        except ValueError as error:
            raise ControlError(f"{text!r} is not a slider: write NAME=NUMBER, such as smile=0.5") from error
        check_slider(name, sliders[name.strip()])
    return sliders


def last_keyframe(sliders: Mapping[str, Slider]) -> float:
    """Time of the last keyframe in seconds; 0 where all sliders are constant."""
    return max((s[-1][0] for s in sliders.values() if not isinstance(s, int | float)), default=0.0)
