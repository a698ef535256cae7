"""A portrait that follows frames as they come: landmarks, fit, smoothing, retargeting, a picture for each."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from loki_jax.face.controls import Controls, Slider
from loki_jax.face.temporal import Smoothed, between, neutral_frame, smooth_next, start_smoothing
from loki_jax.face.types import Coefficients
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.lids import usual_openings
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.fitting.streaming import FrameFit, FrameFitter
from loki_jax.fitting.tracking import FaceChoice, follow_face, image_landmarks
from loki_jax.geometry.pipeline import GeometryPipeline
from loki_jax.pipeline import retarget_frame
from loki_jax.sources import Portrait

FIRST = 16  # frames that show the face and give the shape
_GRID = 256
_SHORT = 0.2  # seconds: after a shorter loss of the face the motion just goes on


class _Seen(NamedTuple):
    """A frame that shows the face: landmarks as the networks gave them."""

    points: Float[np.ndarray, "478 3"]
    confidence: Float[np.ndarray, "478"]
    score: float
    seconds: float


class _Motion(NamedTuple):
    """The driver's head in the last frame that showed it."""

    fit: FrameFit
    smoothed: Smoothed
    shown: Coefficients
    seconds: float


class LiveAnimator:
    """Moves a portrait by one frame after another.

        animator = LiveAnimator(GeometryPipeline(), portrait, landmarker)
        picture = animator(frame, seconds)

    The first 16 frames that show a face give its shape, and its neutral pose: until then the portrait is
    still. While the face is lost the last pose is held. All is compiled before the constructor returns.

    Args:
      portrait: of `fit_portrait`, with its picture, which gives the size of the result.
      controls: may be changed at any time, as `sliders` may, which are constants; `smooth` is that of
        the driver's motion.
      face: which face of the frames (`FaceChoice`), for the first frame; default the largest.
      mode: "relative" or "absolute" (`loki_jax.face.retarget`).

    Attributes:
      state: "no face", "learning", "following" or "lost".
      spent: seconds that the parts of the last frame took: "landmarks", "fit", "render".
    """

    def __init__(
        self,
        pipeline: GeometryPipeline,
        portrait: Portrait,
        landmarker: Landmarker,
        *,
        mode: str = "relative",
        controls: Controls = Controls(smooth=30.0),  # noqa: B008 (frozen)
        sliders: Mapping[str, Slider] | None = None,
        face: FaceChoice = 0,
    ):
        self.controls, self.sliders = controls, dict(sliders or {})
        self.state, self.spent = "no face", {"landmarks": 0.0, "fit": 0.0, "render": 0.0}
        self._head, self._portrait, self._landmarker = pipeline.head, portrait, landmarker
        self._mode, self._face = mode, face
        self._render = pipeline.prepare(portrait, grid=_GRID)
        self._first: list[_Seen] = []
        self._last: _Seen | None = None
        self._found_before = False
        self._fitter: FrameFitter | None = None
        self._motion: _Motion | None = None
        self._returned: tuple[float, Coefficients] | None = None  # from a loss: when, and the pose held
        self._picture = self._warm_up()

    def __call__(self, frame: UInt8[np.ndarray, "h w 3"], seconds: float) -> UInt8[np.ndarray, "H W 3"]:
        """The picture for a frame.

        Args:
          frame: RGB; all of one size.
          seconds: when it was taken; times rise.
        """
        began = time.perf_counter()
        seen = self._find(frame, seconds)
        self.spent = dict.fromkeys(self.spent, 0.0) | {"landmarks": time.perf_counter() - began}
        if seen is None:
            self.state = "no face" if self._fitter is None else "lost"
            return self._picture
        if self._fitter is None or self._motion is None:
            self.state = "learning"
            self._learn(seen, frame.shape[:2])
            return self._picture
        self.state = "following"
        began = time.perf_counter()
        self._motion = self._follow(self._fitter, self._motion, seen)
        fitted = time.perf_counter()
        self._picture = self._animate(self._motion.shown)
        self.spent |= {"fit": fitted - began, "render": time.perf_counter() - fitted}
        return self._picture

    def recentre(self) -> None:
        """Make the driver's present pose the neutral one, in which the portrait has its own."""
        if self._motion is not None:
            self._neutral = self._motion.shown

    def _find(self, frame: np.ndarray, seconds: float) -> _Seen | None:
        """The face in a frame, or None."""
        if self._last is None:
            try:
                track = image_landmarks(self._landmarker, frame, self._face)
            except LandmarkError:
                return None
            found = track.points[0], track.confidence[0], float(track.score[0])
        else:
            followed = follow_face(self._landmarker, frame, self._last.points, self._found_before)
            self._found_before = followed is not None
            if followed is None:
                return None
            found = followed
        self._found_before = True
        self._last = _Seen(*found, seconds)
        return self._last

    def _learn(self, seen: _Seen, image_size: tuple[int, int]) -> None:
        """Collect a first frame; with the last of them, the shape and the neutral pose."""
        self._first.append(seen)
        if len(self._first) == FIRST:
            points, confidence, score, seconds = (np.array(field) for field in zip(*self._first, strict=True))
            self._usual = usual_openings(points, score)
            fps = (FIRST - 1) / max(seconds[-1] - seconds[0], 1e-3)
            self._begin(
                self._landmarker.correct(points, score), confidence, image_size, float(fps), seconds[-1]
            )

    def _begin(self, points, confidence, image_size: tuple[int, int], fps: float, seconds: float) -> None:
        fitter = FrameFitter(self._head, points, confidence, image_size, fps=fps)
        neutral = neutral_frame(self._head, fitter.first, fitter.camera)
        self._neutral = Coefficients(*(field[neutral] for field in fitter.first))
        last = fitter.coefficients(fitter.start)
        self._fitter, self._motion = fitter, _Motion(fitter.start, start_smoothing(last), last, seconds)

    def _follow(self, fitter: FrameFitter, before: _Motion, seen: _Seen) -> _Motion:
        points = self._landmarker.correct(seen.points[None], np.array([seen.score]), self._usual)[0]
        interval = seen.seconds - before.seconds
        fit = fitter.fit(points, seen.confidence, interval, before.fit)
        found = fitter.coefficients(fit)
        lag, ease = self.controls.smooth / 1000, self.controls.ease
        if interval > _SHORT:
            self._returned = seen.seconds, before.shown
            smoothed = start_smoothing(found)
        elif lag > 0:
            smoothed = smooth_next(before.smoothed, found, interval, lag)
        else:
            smoothed = start_smoothing(found)
        shown = smoothed.coefficients
        if self._returned is not None:
            share = min((seen.seconds - self._returned[0]) / max(ease, 1e-6), 1.0)
            shown = between(self._returned[1], shown, share * share * (3 - 2 * share))
            self._returned = self._returned if share < 1 else None
        return _Motion(fit, smoothed, shown, seen.seconds)

    def _animate(self, driver: Coefficients) -> UInt8[np.ndarray, "H W 3"]:
        """The portrait in the driver's pose."""
        assert self._fitter is not None
        controls = dataclasses.replace(self.controls, smooth=0.0)
        moved = retarget_frame(
            self._head, driver, self._neutral, self._fitter.camera, self._portrait, self._mode, controls,
            self.sliders,
        )  # fmt: skip
        return self._render(moved)[0]

    def _warm_up(self) -> UInt8[np.ndarray, "H W 3"]:
        """Compile what a frame needs, with the portrait as its own driver; the first picture."""
        portrait = self._portrait
        if portrait.picture is None or portrait.landmarks is None:
            raise ValueError(f"{portrait.name}: has no landmarks. Give a picture, not a clip of a dataset.")
        points, sure = np.repeat(portrait.landmarks[None], FIRST, axis=0), np.ones((FIRST, 478), np.float32)
        self._begin(points, sure, portrait.picture.shape[:2], 25.0, 0.0)
        assert self._fitter is not None and self._motion is not None
        self._fitter.fit(points[0], sure[0], 0.04, self._motion.fit)
        picture = self._animate(self._neutral)
        self._fitter = self._motion = None
        return picture
