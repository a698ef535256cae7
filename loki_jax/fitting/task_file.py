"""MediaPipe's newer landmark networks (`face_landmarker.task`), for those who have the file.

Of the bundle's networks two are used here: 478 points of their own, whose lids shut, and 52 expression scores
under ARKit's names, which see what landmarks say little of: lids, a skewed mouth, pouts.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Float

from loki_jax.fitting.model_files import LandmarkError

STEM = "face_landmarker"  # its key among the models of `Landmarker`
POINTS, SCORES = "face_landmarks_detector.tflite", "face_blendshapes.tflite"
POINTS_SIZE = 256  # pixels of the points network's input

# The landmarks that the score network reads (in pixels), and the names of its outputs.
SCORE_INPUTS = np.array(
    """0 1 4 5 6 7 8 10 13 14 17 21 33 37 39 40 46 52 53 54 55 58 61 63 65 66 67 70 78 80 81 82 84 87 88 91 93
    95 103 105 107 109 127 132 133 136 144 145 146 148 149 150 152 153 154 155 157 158 159 160 161 162 163 168
    172 173 176 178 181 185 191 195 197 234 246 249 251 263 267 269 270 276 282 283 284 285 288 291 293 295
    296 297 300 308 310 311 312 314 317 318 321 323 324 332 334 336 338 356 361 362 365 373 374 375 377 378
    379 380 381 382 384 385 386 387 388 389 390 397 398 400 402 405 409 415 454 466 468 469 470 471 472 473
    474 475 476 477""".split(),
    np.int64,
)

_SIDED = (
    *("browDown", "browOuterUp", "cheekSquint", "eyeBlink", "eyeLookDown", "eyeLookIn", "eyeLookOut"),
    *("eyeLookUp", "eyeSquint", "eyeWide", "mouthDimple", "mouthFrown", "mouthLowerDown", "mouthPress"),
    *("mouthSmile", "mouthStretch", "mouthUpperUp", "noseSneer"),
)

SCORE_NAMES = (
    "neutral",
    *sorted(
        [name + side for name in _SIDED for side in ("Left", "Right")]
        + ["browInnerUp", "cheekPuff", "jawForward", "jawLeft", "jawOpen", "jawRight", "mouthClose"]
        + ["mouthFunnel", "mouthLeft", "mouthPucker", "mouthRight", "mouthRollLower", "mouthRollUpper"]
        + ["mouthShrugLower", "mouthShrugUpper"]
    ),
)


# What the scores of blinks reach where lids meet.
_SHUT = 0.7


def read_task_file(path: str | os.PathLike) -> dict[str, bytes]:
    """The two networks of a `face_landmarker.task` by name.

    Raises:
      LandmarkError: the file is missing or another one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in (POINTS, SCORES)}
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise LandmarkError(
            f"{path}: not MediaPipe's face_landmarker.task ({error}). Download it again, or leave "
            "--landmarker out."
        ) from error


def with_task_file(models: dict[str, Path], path: str | os.PathLike | None) -> dict[str, Path]:
    """The models of a `Landmarker` with those of a `face_landmarker.task`, checked; None: as they are."""
    if path is None:
        return models
    read_task_file(path)
    return models | {STEM: Path(path)}


def axis_scores(
    names: tuple[str, ...], scores: Float[np.ndarray, "N 52"]
) -> dict[int, Float[np.ndarray, " N"]]:
    """The scores that belong to expression axes, by the axis's index.

    ICT-FaceKit's names end in _L and _R and divide what ARKit has once; FLAME's "blink" is of both eyes.
    """
    column = dict(zip(SCORE_NAMES, np.asarray(scores).T, strict=True))
    for name in ("eyeBlinkLeft", "eyeBlinkRight"):
        column[name] = np.minimum(column[name] / _SHUT, 1)
    column["blink"] = (column["eyeBlinkLeft"] + column["eyeBlinkRight"]) / 2
    found = {}
    for index, name in enumerate(names):
        base = name.removesuffix("_L").removesuffix("_R")
        side = {"_L": "Left", "_R": "Right"}.get(name[-2:], "")
        for candidate in (base + side, base):
            if candidate in column and candidate != "neutral":
                found[index] = column[candidate]
                break
    return found
