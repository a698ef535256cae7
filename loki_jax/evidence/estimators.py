"""Whether two independent estimators say the same of the same recordings (docs/claims.md).

The first is the package's own: landmarks and the fit, HPF and HEF. The second is MediaPipe's: its newer
landmarks, its face model for the pose, and its 52 blendshapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from scipy.spatial.transform import Rotation

from loki_jax.evaluation import measure_following
from loki_jax.evidence.response import make_person
from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import builtin_head
from loki_jax.fitting.clips import FittedClip, default_landmarker, fit_video
from loki_jax.io import atomic_path
from loki_jax.metrics.agreement import measure_agreement
from loki_jax.metrics.blendshapes import (
    BlendshapeReading,
    blendshape_distance,
    load_canonical_face,
    read_blendshapes,
)
from loki_jax.metrics.hpf import head_pose_follow
from loki_jax.synthetic.appearance import sample_appearance
from loki_jax.synthetic.clips import clip_crop, render_frames
from loki_jax.video import LazyFrames

FPS = Fraction(25)
LAGS = (1, 2, 4, 8)  # frames by which a clip is compared with itself
HEF_SIZE = 256
TURNS = np.arange(-30.0, 31.0, 5.0)  # degrees
_AXES = ("yaw", "pitch", "roll")


class _Seen(NamedTuple):
    """A recording as both see it."""

    name: str
    fitted: FittedClip
    second: BlendshapeReading


def compare_estimators(clips: Sequence[Path], task: Path, frames: int = 24) -> dict[str, Any]:
    """Both estimators on pairs of recordings, as if one were to follow the other.

    A pair is a clip and itself some frames later, or two clips: errors from small to those of a result that
    has nothing to do with its driver.

    Args:
      clips: of at least `frames` + 8 frames at 25 a second; shorter ones are left out.
      task: MediaPipe's `face_landmarker.task`.

    Returns:
      {"pairs": rows of "prediction", "target", "lag", "hpf", "hpf_mediapipe", "hef", "blendshapes"; "hpf",
      "expression": `Agreement` of both estimators over all pairs, "hpf_lagged", "expression_lagged" of the
      pairs within clips; "angles": {axis: `Agreement` of the turn since the first frame, "slope" of the
      second over the first}}.

    Raises:
      LandmarkError: another task file, or a clip without a face.
      ValueError: fewer than two clips are long enough.
    """
    head, length = builtin_head(), frames + max(LAGS)
    seen = [clip for clip in (_see(path, head, task, length) for path in clips) if clip is not None]
    if len(seen) < 2:
        raise ValueError(
            f"two clips of {length} or more frames are needed to compare estimators, found {len(seen)}"
        )
    pairs = [(one, one, lag) for one in seen for lag in LAGS]
    pairs += [(one, other, 0) for one, other in itertools.combinations(seen, 2)]
    rows = [_row(head, *pair, frames) for pair in pairs]
    result: dict[str, Any] = {"clips": len(seen), "frames": frames, "hef_size": HEF_SIZE, "pairs": rows}
    lagged = [row for row in rows if row["lag"]]
    for name, keys in (("hpf", ("hpf", "hpf_mediapipe")), ("expression", ("hef", "blendshapes"))):
        for suffix, part in (("", rows), ("_lagged", lagged)):
            columns = (np.array([row[key] for row in part], np.float64) for key in keys)
            result[name + suffix] = measure_agreement(*columns)._asdict()
    result["angles"] = _compare_angles(seen)
    return result


def _see(path: Path, head: HeadAsset, task: Path, length: int) -> _Seen | None:
    pictures = LazyFrames(path, FPS)
    if len(pictures) < length:
        return None
    fitted = fit_video(
        pictures[:length], head, fps=FPS, landmarker=default_landmarker(), all_shots=True, name=path.name
    )
    newer, face = default_landmarker(task), load_canonical_face(task)
    found = np.asarray(fitted.track.score) >= 0.5
    second = read_blendshapes(newer, face, fitted.frames, fitted.track.points, found)
    return _Seen(path.name, fitted, second)


def _row(head: HeadAsset, prediction: _Seen, target: _Seen, lag: int, frames: int) -> dict[str, Any]:
    later, first = slice(lag, lag + frames), slice(0, frames)
    fits = prediction.fitted.fit, target.fitted.fit
    following = measure_following(
        head,
        jax.tree.map(lambda x: np.asarray(x)[later], fits[0].coefficients),
        jax.tree.map(lambda x: np.asarray(x)[first], fits[1].coefficients),
        fits[1].camera,
        HEF_SIZE,
        prediction.second.valid[later],
        target.second.valid[first],
        fits[0].camera,
    )
    one, other = prediction.second, target.second
    turns = head_pose_follow(
        one.rotation[later], other.rotation[first],
        pred_valid=one.valid[later], target_valid=other.valid[first],
    )  # fmt: skip
    return {
        "prediction": prediction.name,
        "target": target.name,
        "lag": lag,
        "hpf": following.pose.degrees,
        "hpf_mediapipe": turns.degrees,
        "hef": following.expression.distance,
        "blendshapes": float(np.nanmean(blendshape_distance(one.scores[later], other.scores[first]))),
    }


def _compare_angles(seen: Sequence[_Seen]) -> dict[str, Any]:
    """Turns since the first frame with a face, all clips together."""
    sides: tuple[list, list] = ([], [])
    for clip in seen:
        index = np.flatnonzero(clip.second.valid)
        fit = clip.fitted.fit.coefficients
        total = Rotation.from_rotvec(np.asarray(fit.rot)) * Rotation.from_rotvec(np.asarray(fit.neck))
        for side, turn in zip(
            sides, (total[index], Rotation.from_rotvec(clip.second.rotation[index])), strict=True
        ):
            side.append((turn * turn[0].inv()).as_euler("YXZ", degrees=True))
    ours, theirs = (np.concatenate(side) for side in sides)
    return {
        name: measure_agreement(ours[:, k], theirs[:, k])._asdict()
        | {"slope": float(np.polyfit(ours[:, k], theirs[:, k], 1)[0])}
        for k, name in enumerate(_AXES)
    }


def slopes_on_renders(task: Path, people: int = 3, size: int = 384) -> dict[str, dict[str, Any]]:
    """Which of both is right: people of the built-in head who turn by known angles about one axis at a time.

    Returns:
      {axis: {"fit", "mediapipe": slopes of the found over the true angle within 30 degrees, one a person}}.
    """
    head, newer, face = builtin_head(), default_landmarker(task), load_canonical_face(task)
    slopes: dict[str, dict[str, Any]] = {axis: {"fit": [], "mediapipe": []} for axis in _AXES}
    for seed, (axis, (index, column)) in itertools.product(
        range(900, 900 + people), zip(_AXES, ((1, 0), (0, 1), (2, 2)), strict=True)
    ):
        person = make_person(head, seed, len(TURNS))
        still = jax.tree.map(np.zeros_like, person.coefficients)
        rot = np.radians(TURNS)[:, None].astype(np.float32) * np.eye(3, dtype=np.float32)[index]
        moved = still._replace(
            betas=person.coefficients.betas, rot=rot, tra=np.repeat(person.coefficients.tra[:1], len(rot), 0)
        )
        frames = render_frames(
            head, moved, person.camera, clip_crop(head, moved, person.camera, 1.6),
            sample_appearance(seed, head), size,
        )  # fmt: skip
        fitted = fit_video(frames, head, fps=FPS, landmarker=default_landmarker(), name=f"person {seed}")
        found = np.asarray(fitted.track.score) >= 0.5
        second = read_blendshapes(newer, face, frames, fitted.track.points, found)
        for name, vectors in (("fit", fitted.fit.coefficients.rot), ("mediapipe", second.rotation)):
            angles = Rotation.from_rotvec(np.asarray(vectors)[found]).as_euler("YXZ", degrees=True)
            slopes[axis][name].append(float(np.polyfit(TURNS[found], angles[:, column], 1)[0]))
    return slopes


def draw_estimators(result: dict[str, Any], path: Path) -> None:
    """Both estimators against each other, and the differences of HPF against its mean."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    pose, difference, expression = (figure.add_subplot(1, 3, k + 1) for k in range(3))
    for lagged, label, colour in ((True, "a clip and itself, later", "C0"), (False, "two clips", "C1")):
        rows = [row for row in result["pairs"] if bool(row["lag"]) == lagged]
        of = lambda key, rows=rows: np.array([row[key] for row in rows], np.float64)
        style: dict[str, Any] = {"s": 12, "color": colour, "label": label}
        pose.scatter(of("hpf"), of("hpf_mediapipe"), **style)
        difference.scatter((of("hpf") + of("hpf_mediapipe")) / 2, of("hpf_mediapipe") - of("hpf"), **style)
        expression.scatter(of("hef"), of("blendshapes"), **style)
    largest = max(row["hpf"] or 0 for row in result["pairs"])
    pose.plot([0, largest], [0, largest], color="0.7")
    for level in (result["hpf"]["bias"], *result["hpf"]["limits"]):
        difference.axhline(level, color="0.6", linewidth=0.8)
    pose.set(title=f"HPF (r = {result['hpf']['pearson']:.3f})", xlabel="fit, degrees", ylabel="MediaPipe")
    difference.set(
        title="difference (bias, limits of agreement)", xlabel="mean of both, degrees", ylabel="degrees"
    )
    rank = result["expression"]["spearman"]
    expression.set(
        title=f"expression (rank correlation {rank:.3f})", xlabel="HEF", ylabel="blendshape distance"
    )
    pose.legend(fontsize=8)
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
