"""Is the driver free of identity? Probes, correlations, and residuals of the fit (docs/claims.md).

Rendered people speak in clips whose motion is drawn without regard to the person, so that whatever tells a
person from exact motion is chance, and from fitted motion a fault of the fit. Recorded people each have one
clip; there the person and the recording cannot be told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from loki_jax.driver.map import driver_map
from loki_jax.evidence.probes import classify, linear_probe, train_convolutional
from loki_jax.evidence.response import Seen, make_person, read_head
from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import builtin_head
from loki_jax.face.retarget import retarget
from loki_jax.face.skinning import expression_offsets, make_identity, mesh_render_mask
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.clips import clip_crop_box
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.synthetic.appearance import sample_appearance
from loki_jax.synthetic.clips import render_frames
from loki_jax.video import LazyFrames

MAP_SIZE = 32
LINEAR_SIZE = 16  # the linear probe sees maps averaged to this size
CLIPS, FRAMES, PICTURE = 4, 12, 192
RECORDED_FRAMES, STRIDE = 48, 2
_MOTION = ("expression", "jaw", "eyes", "rot", "tra", "neck")
_RANKS = (1, 2, 5, 10, 15, 20, 30, 40)


class Corpus(NamedTuple):
    """Clips of people: coefficients of each clip, who it is, and which clips test."""

    clips: list[Seen]
    person: Int[np.ndarray, " clips"]
    tests: list[slice]  # frames of each clip that test; empty: all of them train


def orthogonality(landmarker: Landmarker, recordings: Sequence[Path], people: int = 20) -> dict[str, Any]:
    """All of it; accuracies are shares of test frames whose person is told."""
    head = builtin_head()
    truth, fitted = rendered_corpus(head, landmarker, people)
    result: dict[str, Any] = {
        "rendered": {"people": people, "clips": CLIPS, "frames": FRAMES, "chance": 1 / people},
        "residual": residuals(head, truth, fitted),
        "rank": low_rank(head, truth),
    }
    for name, corpus in (("exact", truth), ("fitted", fitted)):
        result["rendered"][name] = probe(head, corpus)
        result["rendered"][name]["correlation"] = correlation(corpus)
    if len(recordings) > 1:
        recorded = recorded_corpus(head, landmarker, recordings)
        result["recorded"] = {"people": len(recordings), "chance": 1 / len(recordings)} | probe(
            head, recorded
        )
    return result


def rendered_corpus(head: HeadAsset, landmarker: Landmarker, people: int) -> tuple[Corpus, Corpus]:
    """The same clips with exact and with fitted coefficients; the last clip of each person tests."""
    truth, fitted, who, tests = [], [], [], []
    for k in range(people):
        for clip in range(CLIPS):
            person = make_person(head, 900 + k, FRAMES, motion_seed=10_000 + CLIPS * k + clip)
            frames = render_frames(
                head, person.coefficients, person.camera, person.crop,
                sample_appearance(person.seed, head), PICTURE,
            )  # fmt: skip
            truth.append(Seen(person.coefficients, person.camera, np.ones(FRAMES, bool)))
            fitted.append(read_head(frames, head, landmarker, f"person {k}, clip {clip}"))
            who.append(k)
            tests.append(slice(0, FRAMES if clip == CLIPS - 1 else 0))
    return Corpus(truth, np.array(who), tests), Corpus(fitted, np.array(who), tests)


def recorded_corpus(head: HeadAsset, landmarker: Landmarker, paths: Sequence[Path]) -> Corpus:
    """One clip a person; its last quarter tests."""
    clips = []
    for path in paths:
        frames = LazyFrames(path, Fraction(25))
        count = min(len(frames), RECORDED_FRAMES * STRIDE)
        shown = np.stack([frames[k] for k in range(0, count, STRIDE)])
        clips.append(read_head(shown, head, landmarker, path.name))
    tests = [slice(3 * len(clip.valid) // 4, len(clip.valid)) for clip in clips]
    return Corpus(clips, np.arange(len(paths)), tests)


def probe(head: HeadAsset, corpus: Corpus) -> dict[str, Any]:
    """Accuracies of the probes on coefficients, own maps and swapped maps.

    In swapped maps the motion is that of the person asked for, the shape that of a mean head, or of another
    person of the corpus ("reference"). The network trained on own maps is asked whom it sees in the latter.
    """
    labels = np.concatenate([[k] * len(c.valid) for k, c in zip(corpus.person, corpus.clips, strict=True)])
    test = np.concatenate([_flags(len(c.valid), t) for c, t in zip(corpus.clips, corpus.tests, strict=True)])
    told = lambda features: _accuracy(
        linear_probe(features[~test], labels[~test], features[test]), labels[test]
    )
    motion = [_motion(clip.coefficients) for clip in corpus.clips]
    result: dict[str, Any] = {
        "shape": told(np.concatenate([np.asarray(c.coefficients.betas, np.float64) for c in corpus.clips])),
        "motion": told(np.concatenate(motion)),
        "motion without its mean": told(np.concatenate([m - m.mean(0) for m in motion])),
    }
    people = int(corpus.person.max()) + 1
    first = [int(np.flatnonzero(corpus.person == k)[0]) for k in range(people)]
    betas = [np.asarray(corpus.clips[k].coefficients.betas)[0] for k in first]
    mean_shape = np.zeros(head.n_shape, np.float32)
    others = (np.arange(people) + people // 2) % people  # who lends the shape
    shapes = {
        "own map": None,
        "swapped map, mean head": [mean_shape] * len(corpus.clips),
        "swapped map, reference": [betas[others[k]] for k in corpus.person],
    }
    network = None
    for name, shown in shapes.items():
        if shown is None:
            maps = np.concatenate([own_map(head, clip) for clip in corpus.clips])
        else:
            pairs = zip(corpus.clips, shown, strict=True)
            maps = np.concatenate([swapped_map(head, clip, shape) for clip, shape in pairs])
        result[f"{name}, linear"] = told(_pooled(maps).reshape(len(maps), -1))
        if name != "swapped map, reference":
            trained = train_convolutional(maps[~test], labels[~test])
            result[f"{name}, convolutional"] = _accuracy(classify(trained, maps[test]), labels[test])
            network = trained if name == "own map" else network
        elif network is not None:
            seen = classify(network, maps[test])
            result["own-map network on swapped maps sees the reference"] = _accuracy(
                seen, others[labels[test]]
            )
            result["own-map network on swapped maps sees the driver"] = _accuracy(seen, labels[test])
    return result


def _flags(count: int, chosen: slice) -> np.ndarray:
    flags = np.zeros(count, bool)
    flags[chosen] = True
    return flags


def _accuracy(found: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(found == labels))


def _motion(coefficients: Coefficients) -> Float[np.ndarray, "n d"]:
    return np.concatenate([np.asarray(getattr(coefficients, f), np.float64) for f in _MOTION], axis=1)


def _pooled(maps: Float[np.ndarray, "n s s c"]) -> Float[np.ndarray, "n t t c"]:
    step = MAP_SIZE // LINEAR_SIZE
    return maps.reshape(len(maps), LINEAR_SIZE, step, LINEAR_SIZE, step, -1).mean((2, 4))


def own_map(head: HeadAsset, clip: Seen) -> Float[np.ndarray, "n s s c"]:
    """The driver maps of a clip with its own shape, in its own crop."""
    crop = clip_crop_box(head, clip.coefficients, clip.camera)
    return _draw_map(head, clip.coefficients, clip.camera, crop)


def swapped_map(
    head: HeadAsset, clip: Seen, betas: Float[np.ndarray, " n_shape"]
) -> Float[np.ndarray, "n s s c"]:
    """The driver maps of a head of other shape with a clip's motion, from one rest pose, as an animation has
    them (method, section 9).
    """
    rest = Coefficients(betas, *(np.zeros_like(np.asarray(field)[0]) for field in clip.coefficients[1:]))
    camera = Camera(np.array([1200, 1200, 256, 256], np.float32), _in_front())
    moved = jax.tree.map(
        np.asarray, _retarget(head, jax.tree.map(jnp.asarray, clip.coefficients), rest, clip.camera, camera)
    )
    still = jax.tree.map(lambda x: np.asarray(x)[None], rest)
    crop = clip_crop_box(head, still, camera, 1.5)
    return _draw_map(head, moved, camera, crop)


def _in_front() -> Float[np.ndarray, "4 4"]:
    extrinsics = np.eye(4, dtype=np.float32)
    extrinsics[2, 3] = 1.0
    return extrinsics


@jax.jit
def _retarget(head, driver, reference, driver_camera, camera):
    origin = jax.tree.map(lambda x: x[0], driver)
    return retarget(
        driver, reference, "relative", origin=origin, driver_camera=driver_camera, reference_camera=camera
    )


def _draw_map(
    head: HeadAsset, coefficients: Coefficients, camera: Camera, crop: np.ndarray
) -> Float[np.ndarray, "n s s c"]:
    maps = _jitted_map(
        head, jax.tree.map(jnp.asarray, coefficients), jax.tree.map(jnp.asarray, camera),
        jnp.asarray(crop, jnp.float32),
    )  # fmt: skip
    return np.asarray(maps)


@jax.jit
def _jitted_map(head, coefficients, camera, crop):
    identity = make_identity(head, coefficients.betas[:1])
    return driver_map(head, identity, coefficients, camera, crop, MAP_SIZE)


def correlation(corpus: Corpus, draws: int = 200) -> dict[str, float]:
    """Mean absolute correlation, over clips, of shape coefficients with the clip's mean motion, and the 95 %
    quantile of the same with the clips' shapes shuffled among people.
    """
    shape = np.stack([np.asarray(c.coefficients.betas, np.float64)[0] for c in corpus.clips])
    motion = np.stack([_motion(c.coefficients).mean(0) for c in corpus.clips])
    motion = motion[:, motion.std(0) > 1e-6]
    rng, people = np.random.default_rng(0), int(corpus.person.max()) + 1

    def mean_correlation(one: np.ndarray) -> float:
        a, b = ((x - x.mean(0)) / (x.std(0) + 1e-9) for x in (one, motion))
        return float(np.abs(a.T @ b / len(a)).mean())

    null = []
    for _ in range(draws):
        # Whole people are shuffled: clips of one person have one shape.
        order = rng.permutation(people)
        position = [int(np.flatnonzero(corpus.person == order[k])[0]) for k in corpus.person]
        null.append(mean_correlation(shape[position]))
    return {
        "mean": mean_correlation(shape), "shuffled": float(np.mean(null)),
        "shuffled_95": float(np.quantile(null, 0.95)),
    }  # fmt: skip


def residuals(head: HeadAsset, truth: Corpus, fitted: Corpus) -> dict[str, Any]:
    """How far vertices of the fit are from the rendered ones, millimetres: mean and 95 % quantile.

    "expression": of the offsets from neutral; "still": the length of the true offsets, what a fit without
    expression would have; "shape": of the neutral heads, brought onto each other by a similarity.
    """
    inside = np.asarray(mesh_render_mask(head))
    moved, lengths, shapes = [], [], []
    for own, other in zip(truth.clips, fitted.clips, strict=True):
        exact, found = (np.asarray(_offsets(head, c.coefficients))[:, inside] for c in (own, other))
        moved.append(np.linalg.norm(found - exact, axis=-1))
        lengths.append(np.linalg.norm(exact, axis=-1))
        neutral = [
            np.asarray(make_identity(head, jnp.asarray(c.coefficients.betas[0])).vertices, np.float64)[
                : len(inside)
            ][inside[: head.template.shape[0]]]
            for c in (own, other)
        ]
        shapes.append(_after_similarity(*neutral))
    summary = lambda values: {
        "mean": 1000 * float(np.mean(values)), "95 %": 1000 * float(np.quantile(values, 0.95)),
    }  # fmt: skip
    return {
        "expression": summary(np.concatenate(moved)), "still": summary(np.concatenate(lengths)),
        "shape": summary(np.concatenate(shapes)),
    }  # fmt: skip


@jax.jit
def _offsets(head, coefficients):
    coefficients = jax.tree.map(jnp.asarray, coefficients)
    return expression_offsets(head, make_identity(head, coefficients.betas[:1]), coefficients)


def _after_similarity(
    target: Float[np.ndarray, "v 3"], points: Float[np.ndarray, "v 3"]
) -> Float[np.ndarray, " v"]:
    """Distances after the similarity of least squares."""
    a, b = target - target.mean(0), points - points.mean(0)
    u, s, vt = np.linalg.svd(b.T @ a)
    sign = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    turn = u @ sign @ vt
    scale = (s * np.diag(sign)).sum() / np.square(b).sum()
    return np.linalg.norm(scale * b @ turn - a, axis=1)


def low_rank(head: HeadAsset, truth: Corpus) -> dict[str, float]:
    """What a basis of few axes leaves of the true expression offsets: root mean square over vertices,
    millimetres, by the number of axes. The basis is that of the principal components of the training clips,
    the residual that of the others.
    """
    inside = np.asarray(mesh_render_mask(head))
    offsets = [np.asarray(_offsets(head, c.coefficients))[:, inside] for c in truth.clips]
    flat = [x.reshape(len(x), -1) for x in offsets]
    tests = [t.stop > 0 for t in truth.tests]
    train = np.concatenate([x for x, t in zip(flat, tests, strict=True) if not t]).astype(np.float64)
    test = np.concatenate([x for x, t in zip(flat, tests, strict=True) if t]).astype(np.float64)
    values, vectors = np.linalg.eigh(train @ train.T)
    basis = (train.T @ vectors[:, ::-1]) / np.sqrt(np.maximum(values[::-1], 1e-12))
    result = {}
    for rank in (0, *_RANKS):
        own = basis[:, :rank]
        left = test - (test @ own) @ own.T
        result[str(rank)] = 1000 * float(np.sqrt(np.square(left).sum(1).mean() / inside.sum()))
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracies beside chance, and what a low rank leaves."""
    from loki_jax.pictures import save_png

    groups = {
        "rendered, exact": result["rendered"]["exact"],
        "rendered, fitted": result["rendered"]["fitted"],
    }
    chances = [result["rendered"]["chance"]] * 2
    if "recorded" in result:
        groups["recorded"] = result["recorded"]
        chances.append(result["recorded"]["chance"])
    names = [key for key, value in groups["rendered, fitted"].items() if isinstance(value, float)]
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    axes = figure.add_subplot(1, 2, 1, xlabel="share of test frames told")
    for number, (group, values) in enumerate(groups.items()):
        places = np.arange(len(names)) + 0.26 * (number - 1)
        axes.barh(places, [values[name] for name in names], height=0.24, label=group, color=f"C{number}")
        axes.axvline(chances[number], color=f"C{number}", linestyle=":")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=8, title="dotted: chance")
    axes = figure.add_subplot(1, 2, 2, xlabel="axes of the basis", ylabel="millimetres, root mean square")
    axes.plot([int(k) for k in result["rank"]], list(result["rank"].values()), marker=".", label="low rank")
    axes.axhline(result["residual"]["expression"]["mean"], color="C3", label="fit, mean")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save_png(figure, path)
