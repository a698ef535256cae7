"""How much of an expression the fit finds: rendered heads through the landmark networks.

    python benchmarks/expression_response.py [--ict ict_head5k.npz] [--task face_landmarker.task] [--people 2]

People on the built-in head, and on the ICT head if its arrays are given, go from neutral to one full
expression and back. The networks mark the frames, `fit_landmarks` fits them with the true focal length.
Printed for each expression: the part of its displacement that the fit finds (the fitted change from neutral
to full, projected onto the true one, over all vertices; 1 is right), as the networks mark the frames, with
their corrections, refined by the pictures, and with MediaPipe's newer networks if their file is given. For
lids also what is left of the opening: 0 where the fitted eye is as closed as by the blink axes alone, 1 as in
the open eye. The last line is one JSON object. About 10 minutes on 2 cores.
"""

import argparse
import json
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np

from benchmarks.pose_response import person_of
from loki_jax.compile_cache import enable_compile_cache
from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import builtin_head
from loki_jax.face.skinning import expression_offsets, landmark_positions, make_identity
from loki_jax.face.types import Coefficients
from loki_jax.fitting.clips import FittedClip
from loki_jax.fitting.fit import fit_landmarks
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.lids import lid_openings
from loki_jax.fitting.model_files import fetch_models
from loki_jax.fitting.points import LANDMARK_SET
from loki_jax.fitting.refine import refine
from loki_jax.fitting.task_file import with_task_file
from loki_jax.fitting.tracking import clip_landmarks
from tools.landmark_bias import SIZE, Posed, RawLandmarker, pose_person

# ARKit's names; sides as the built-in head has them.
EXPRESSIONS = {
    "eyes shut": ("eyeBlinkLeft", "eyeBlinkRight"),
    "left eye shut": ("eyeBlinkLeft",),
    "mouth to the left": ("mouthLeft",),
    "smile on the left": ("mouthSmileLeft",),
    "frown on the right": ("mouthFrownRight",),
    "pout": ("mouthPucker",),
}

RAMP = np.array([0, 0, 0, 0, 0, 0.5, 1, 1, 1, 0.5, 0, 0, 0, 0, 0, 0], np.float32)


def axes_of(head: HeadAsset, expression: str) -> list[int]:
    """Numbers of the expression's axes, in ICT-FaceKit's names, too."""
    wanted = set(EXPRESSIONS[expression])
    wanted |= {name.replace("Left", "_L").replace("Right", "_R") for name in wanted if name != "mouthLeft"}
    return [index for index, name in enumerate(head.expression_names) if name in wanted]


def express(head: HeadAsset, seed: int, axes: list[int]) -> Posed:
    """A frontal person whose axes follow `RAMP`."""
    expression = np.zeros((len(RAMP), head.n_expression), np.float32)
    expression[:, axes] = RAMP[:, None]
    return pose_person(head, *person_of(head, seed), np.zeros((len(RAMP), 3)), expression)


@jax.jit
def _offsets(head: HeadAsset, coefficients: Coefficients):
    return expression_offsets(head, make_identity(head, coefficients.betas[:1]), coefficients)


@jax.jit
def _marks(head: HeadAsset, coefficients: Coefficients):
    identity = make_identity(head, coefficients.betas[:1])
    vertices = identity.vertices + expression_offsets(head, identity, coefficients)
    return landmark_positions(head, vertices, LANDMARK_SET)


def _change(values: np.ndarray) -> np.ndarray:
    return values[RAMP == 1].mean(0) - values[RAMP == 0].mean(0)


def response(
    head: HeadAsset, landmarker: Landmarker, person: Posed, axes: list[int], refined: bool = False
) -> tuple[float, float]:
    """The found part of the displacement, and (of lids) what is left of the opening of the eyes that shut."""
    track = clip_landmarks(landmarker, person.frames)
    focal = float(person.camera.intrinsics[0])
    fit = fit_landmarks(head, track.points, track.confidence, (SIZE, SIZE), focal=focal, scores=track.scores)
    clip = FittedClip(person.frames, Fraction(25), track, fit, np.zeros(4), "rendered")
    found = (refine(clip, head) if refined else clip).fit.coefficients
    name = head.expression_names[axes[0]]
    true_change, change = (_change(np.asarray(_offsets(head, c))) for c in (person.coefficients, found))
    part = np.sum(change * true_change) / np.sum(true_change**2)
    eyes = [0, 1] if len(axes) == 2 else [int("Left" in name or "_L" in name)]
    shut = found._replace(expression=found.expression.copy())
    shut.expression[:, axes] = 1
    openings, least = (lid_openings(np.asarray(_marks(head, c)))[:, eyes] for c in (found, shut))
    still, full, closed = openings[RAMP == 0].mean(), openings[RAMP == 1].mean(), least[RAMP == 1].mean()
    return float(part), float((full - closed) / (still - closed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ict", type=Path, help="ICT-FaceKit arrays (.npz)")
    parser.add_argument("--task", type=Path, help="MediaPipe's face_landmarker.task")
    parser.add_argument("--people", type=int, default=2)
    args = parser.parse_args()
    enable_compile_cache()
    models = fetch_models()
    plain = Landmarker(models)
    landmarkers = {"as marked": RawLandmarker(models), "corrected": plain, "refined": plain}
    if args.task is not None:
        landmarkers["with task file"] = Landmarker(with_task_file(models, args.task))
    heads = [builtin_head()]
    if args.ict is not None:
        from data_prep.landmarks.embed import with_landmarks
        from loki_jax.face.ict import head_from_ict

        heads.append(with_landmarks(head_from_ict(args.ict), landmarkers["as marked"])[0])
    result: dict[str, dict[str, list[float]]] = {}
    print(f"{'head':9}{'expression':20}" + "".join(f"{name:>18}" for name in landmarkers))
    for head in heads:
        for expression in EXPRESSIONS:
            axes = axes_of(head, expression)
            people = [express(head, seed, axes) for seed in range(1, 1 + args.people)]
            cells = []
            for name, landmarker in landmarkers.items():
                found, opening = np.mean(
                    [response(head, landmarker, p, axes, name == "refined") for p in people], axis=0
                )
                cells.append([float(found), float(opening)] if "eye" in expression else [float(found)])
            result[f"{head.name}, {expression}"] = dict(zip(landmarkers, cells, strict=True))
            texts = (" open ".join(f"{value:.2f}" for value in cell) for cell in cells)
            print(f"{head.name:9}{expression:20}" + "".join(f"{text:>18}" for text in texts), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
