"""How the metrics answer known changes: slope, bias, noise, codec, resolution, identity (docs/claims.md).

First on exact coefficients, where the metrics alone act; then through rendered pictures, landmarks and the
fit, as in an evaluation; and on recordings that are rotated in their plane.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure
from PIL import Image
from scipy.spatial.transform import Rotation

from loki_jax.evaluation import Following, measure_following
from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import builtin_head
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.clips import fit_video
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.pictures import resize_frames
from loki_jax.synthetic.appearance import sample_appearance, sample_shape
from loki_jax.synthetic.clips import clip_crop, render_frames, synth_camera
from loki_jax.synthetic.motion import synth_motion
from loki_jax.video import Frames, LazyFrames, write_video

FPS = Fraction(25)
ANGLES = (0.0, 2.0, 4.0, 8.0, 12.0, 16.0, 20.0)  # degrees at the end of a clip; their mean is half
MISSING = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # share of the expression
NOISE = (0.0, 0.25, 0.5, 1.0, 2.0)  # degrees a frame
QUALITY = (10, 20, 28, 35, 40, 45)  # CRF of H.264
SIZES = (512, 256, 128, 96, 64)  # pixels
HEF_SIZE = 256
_CALM = 0.5  # of a synthetic head's turns, so that ten degrees more stay within what is fitted


class Person(NamedTuple):
    """A rendered person: coefficients (n, ...), the camera and crop of all its clips, and its looks."""

    coefficients: Coefficients
    camera: Camera
    crop: Float[np.ndarray, " 4"]
    seed: int


def make_person(head: HeadAsset, seed: int, frames: int, motion_seed: int | None = None) -> Person:
    """A person who speaks and turns calmly."""
    motion = synth_motion(head, seed if motion_seed is None else motion_seed, frames)
    betas = np.broadcast_to(sample_shape(seed, head), motion.betas.shape)
    motion = motion._replace(
        betas=np.ascontiguousarray(betas), rot=_CALM * motion.rot, neck=_CALM * motion.neck
    )
    camera = synth_camera(seed)
    return Person(motion, camera, clip_crop(head, motion, camera, 1.6), seed)


def ramp(frames: int) -> Float[np.ndarray, " n"]:
    """From 0 to 1, beginning and ending slowly: jumps would test the smoothness of the fit."""
    return (1 - np.cos(np.linspace(0, np.pi, frames))) / 2


def turned(coefficients: Coefficients, degrees: float, rng: np.random.Generator) -> Coefficients:
    """Turned about one random axis by an angle that grows along `ramp`; its mean is half of `degrees`."""
    axis = rng.standard_normal(3)
    extra = np.radians(degrees) * ramp(len(coefficients.rot))[:, None] * axis / np.linalg.norm(axis)
    rot = Rotation.from_rotvec(np.asarray(coefficients.rot, np.float64))
    return coefficients._replace(rot=(Rotation.from_rotvec(extra) * rot).as_rotvec().astype(np.float32))


def muted(coefficients: Coefficients, share: float) -> Coefficients:
    """Expression, jaw and eyes that lack a share of what they were."""
    keep = np.float32(1 - share)
    return coefficients._replace(
        expression=keep * coefficients.expression, jaw=keep * coefficients.jaw, eyes=keep * coefficients.eyes
    )


def shaken(coefficients: Coefficients, degrees: float, rng: np.random.Generator) -> Coefficients:
    """Every frame turned by noise of this root mean square angle."""
    noise = np.radians(degrees) / np.sqrt(3) * rng.standard_normal(np.shape(coefficients.rot))
    rot = Rotation.from_rotvec(noise) * Rotation.from_rotvec(np.asarray(coefficients.rot, np.float64))
    return coefficients._replace(rot=rot.as_rotvec().astype(np.float32))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line through the origin of least squares: without a change both metrics are 0."""
    return float(np.dot(x, y) / np.dot(x, x))


def exact_response(people: int = 6, frames: int = 24) -> dict[str, Any]:
    """The metrics on exact coefficients: what they say of known errors, without any estimator."""
    head, rng = builtin_head(), np.random.default_rng(0)
    persons = [make_person(head, 500 + k, frames) for k in range(people)]
    follow = lambda person, wrong: measure_following(
        head, wrong, person.coefficients, person.camera, HEF_SIZE, prediction_camera=person.camera
    )
    pose, noise, expression = [], [], []
    for angle in ANGLES:
        found = [follow(p, turned(p.coefficients, angle, rng)) for p in persons]
        pose.append(_pose_row(found) | {"injected": angle * float(ramp(frames).mean())})
    for sigma in NOISE:
        found = [follow(p, shaken(p.coefficients, sigma, rng)) for p in persons]
        noise.append(_pose_row(found) | {"injected": sigma})
    for share in MISSING:
        found = [follow(p, muted(p.coefficients, share)) for p in persons]
        expression.append({"injected": share} | _mean_and_spread([f.expression.distance for f in found]))
    # One motion on many people, all of its expression missing.
    same = [make_person(head, 600 + k, frames, motion_seed=500) for k in range(people)]
    of_people = [follow(p, muted(p.coefficients, 1.0)).expression.distance for p in same]
    sizes = {
        size: measure_following(
            head, muted(persons[0].coefficients, 0.5), persons[0].coefficients, persons[0].camera, size
        ).expression.distance
        for size in SIZES
    }
    return {
        "people": people, "frames": frames, "hef_size": HEF_SIZE,
        "pose": pose, "pose_slope": slope([r["injected"] for r in pose], [r["hpf"] for r in pose]),
        "noise": noise, "expression": expression,
        "hef_of_one_motion_on_people": _mean_and_spread(of_people), "hef_by_render_size": sizes,
    }  # fmt: skip


def _pose_row(found: Sequence[Following]) -> dict[str, float]:
    scores = [f.scores() for f in found]
    of = lambda key: np.array([s[key] for s in scores], np.float64)
    means = {key: float(of(key).mean()) for key in ("hpf", "hpf_aligned", "absolute_pose")}
    return means | {"hpf_spread": float(of("hpf").std())}


def _mean_and_spread(values: Sequence[float | None]) -> dict[str, float]:
    numbers = np.array(values, np.float64)
    return {"mean": float(numbers.mean()), "spread": float(numbers.std())}


class Seen(NamedTuple):
    """What the estimator reads from frames."""

    coefficients: Coefficients
    camera: Camera
    valid: Bool[np.ndarray, " n"]


def read_head(frames: Frames, head: HeadAsset, landmarker: Landmarker, name: str) -> Seen:
    """As in an evaluation."""
    fitted = fit_video(
        frames, head, fps=FPS, landmarker=landmarker, all_shots=True, allow_lost=True, name=name
    )
    return Seen(fitted.fit.coefficients, fitted.fit.camera, np.asarray(fitted.fit.confidence) > 0)


def compare(head: HeadAsset, shown: Seen, target: Seen) -> Following:
    """A reading against another one."""
    return measure_following(
        head, shown.coefficients, target.coefficients, target.camera, HEF_SIZE, shown.valid, target.valid,
        shown.camera,
    )  # fmt: skip


def estimated_response(
    landmarker: Landmarker, people: int = 3, frames: int = 24, size: int = 256
) -> dict[str, Any]:
    """The same through rendered pictures, landmarks and the fit; and what codec, size and identity do."""
    head = builtin_head()
    rng = np.random.default_rng(1)
    persons = [make_person(head, 700 + k, frames) for k in range(people)]
    draw = lambda person, coefficients, edge=size: render_frames(
        head, coefficients, person.camera, person.crop, sample_appearance(person.seed, head), edge
    )
    read = lambda pictures, name: read_head(pictures, head, landmarker, name)
    rendered = [draw(p, p.coefficients) for p in persons]
    base = [read(pictures, f"person {p.seed}") for p, pictures in zip(persons, rendered, strict=True)]
    truth = [Seen(p.coefficients, p.camera, np.ones(frames, bool)) for p in persons]
    floor = [compare(head, *pair) for pair in zip(base, truth, strict=True)]
    pose, expression = [], []
    for angle in ANGLES:
        found = [
            compare(head, read(draw(p, turned(p.coefficients, angle, rng)), "turned"), own)
            for p, own in zip(persons, base, strict=True)
        ]
        pose.append(_pose_row(found) | {"injected": angle * float(ramp(frames).mean())})
    for share in MISSING:
        found = [
            compare(head, read(draw(p, muted(p.coefficients, share)), "muted"), own)
            for p, own in zip(persons, base, strict=True)
        ]
        expression.append({"injected": share} | _mean_and_spread([f.expression.distance for f in found]))
    codec = [
        {"crf": crf}
        | _both([compare(head, read(shown, "coded"), own) for shown, own in _coded(rendered, base, crf)])
        for crf in QUALITY
    ]
    sharp = [draw(p, p.coefficients, max(SIZES)) for p in persons[:2]]
    best = [read(pictures, "sharp") for pictures in sharp]
    resolution = [
        {"size": edge}
        | _both(
            [
                compare(head, read(resize_frames(x, edge), "small"), own)
                for x, own in zip(sharp, best, strict=True)
            ]
        )
        for edge in SIZES[1:]
    ]
    # A perfect animation of other people by the first one's motion, read back.
    others = [make_person(head, 800 + k, frames, motion_seed=persons[0].seed) for k in range(people)]
    perfect = [compare(head, read(draw(p, p.coefficients), "other"), base[0]) for p in others]
    return {
        "people": people, "frames": frames, "size": size,
        "against_truth": _both(floor), "perfect_animation_of_others": _both(perfect),
        "pose": pose, "pose_slope": slope([r["injected"] for r in pose], [r["hpf"] for r in pose]),
        "expression": expression, "codec": codec, "resolution": resolution,
    }  # fmt: skip


def _both(found: Sequence[Following]) -> dict[str, float]:
    return {
        "hpf": float(np.mean([f.pose.degrees for f in found])),
        "hef": float(np.mean([f.expression.distance for f in found])),
    }


def _coded(clips: Sequence[np.ndarray], base: Sequence[Seen], crf: int) -> Iterator[tuple[np.ndarray, Seen]]:
    with tempfile.TemporaryDirectory() as folder:
        for clip, own in zip(clips, base, strict=True):
            path = Path(folder) / "coded.mp4"
            write_video(path, clip, FPS, crf=crf)
            yield np.stack(list(LazyFrames(path))), own


def recorded_response(
    landmarker: Landmarker,
    clips: Sequence[Path],
    frames: int = 12,
    angles: Sequence[float] = (0, 2, 4, 6, 8, 10),
) -> dict[str, Any]:
    """Recordings whose frames are rotated in their plane by known angles, which grow along `ramp`."""
    head = builtin_head()
    rows: dict[str, list[float]] = {}
    for clip in clips:
        pictures = np.stack(list(LazyFrames(clip, FPS)[:frames]))
        own = read_head(pictures, head, landmarker, clip.name)
        found = []
        for angle in angles:
            turns = zip(pictures, angle * ramp(len(pictures)), strict=True)
            shown = np.stack([rotate(frame, turn) for frame, turn in turns])
            found.append(compare(head, read_head(shown, head, landmarker, clip.name), own).pose.degrees)
        rows[clip.name] = [float("nan") if value is None else value for value in found]
    injected = [angle * float(ramp(frames).mean()) for angle in angles]
    slopes = {name: slope(injected, values) for name, values in rows.items()}
    mean = np.mean(list(rows.values()), axis=0)
    return {
        "frames": frames, "injected": injected, "hpf": rows, "slopes": slopes,
        "slope": slope(injected, mean.tolist()),
    }  # fmt: skip


def rotate(frame: UInt8[np.ndarray, "h w 3"], degrees: float) -> UInt8[np.ndarray, "h w 3"]:
    """A picture turned about its middle; what comes from outside is its mirrored edge."""
    margin = max(frame.shape[:2]) // 3
    wide = np.pad(frame, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    turned = np.asarray(Image.fromarray(wide).rotate(degrees, Image.Resampling.BICUBIC))
    return turned[margin:-margin, margin:-margin]


def draw(result: dict[str, Any], path: Path) -> None:
    """The curves of all that was measured."""
    from loki_jax.pictures import save_png

    exact, seen = result["exact"], result["estimated"]
    figure = Figure(figsize=(14, 7), layout="constrained")
    cells = [figure.add_subplot(2, 3, k + 1) for k in range(6)]
    pose, expression, noise, codec, resolution, recorded = cells
    pose.plot([0, 10], [0, 10], color="0.7", label="injected")
    for name, part in (("exact coefficients", exact), ("rendered and read", seen)):
        x = [row["injected"] for row in part["pose"]]
        pose.plot(x, [row["hpf"] for row in part["pose"]], marker=".", label=name)
        x = [row["injected"] for row in part["expression"]]
        expression.errorbar(
            x, [r["mean"] for r in part["expression"]], [r["spread"] for r in part["expression"]],
            marker=".", capsize=2, label=name,
        )  # fmt: skip
    pose.set(title="injected rotation", xlabel="degrees", ylabel="HPF (degrees)")
    expression.set(title="missing expression", xlabel="share", ylabel="HEF")
    for key in ("hpf", "hpf_aligned"):
        noise.plot(
            [r["injected"] for r in exact["noise"]], [r[key] for r in exact["noise"]], marker=".", label=key
        )
    noise.set(title="noise of each frame", xlabel="degrees, root mean square", ylabel="degrees")
    for axes, rows, key, title, label in (
        (codec, seen["codec"], "crf", "compression", "CRF"),
        (resolution, seen["resolution"], "size", "resolution", "pixels"),
    ):
        axes.plot([r[key] for r in rows], [r["hpf"] for r in rows], marker=".", label="HPF (degrees)")
        axes.plot([r[key] for r in rows], [10 * r["hef"] for r in rows], marker=".", label="HEF x 10")
        axes.set(title=title, xlabel=label)
    if "recorded" in result:
        recorded.plot([0, 10], [0, 10], color="0.7", label="injected")
        for name, values in result["recorded"]["hpf"].items():
            recorded.plot(result["recorded"]["injected"], values, linewidth=0.9, label=name[:12])
    recorded.set(title="recordings rotated in their plane", xlabel="degrees", ylabel="HPF (degrees)")
    for axes in cells:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    save_png(figure, path)
