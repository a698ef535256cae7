"""Head coefficients of frames as they come: the shape from the first frames, then one frame after another.

The cost of a frame is that of the clip's fit (`loki_jax.fitting.problem`) with the shape and all earlier
frames held: its landmarks, the priors, its second difference in time. A few Levenberg-Marquardt steps from
the frame before find its minimum. Later frames cannot help, so that the motion is less steady than that of
`fit_landmarks`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from loki_jax.face.asset import HeadAsset
from loki_jax.face.types import Coefficients
from loki_jax.fitting.fit import (
    DEFAULT_SETTINGS,
    fit_landmarks,
    make_problem,
    observations,
    pose_from_points,
)
from loki_jax.fitting.points import FACE_OVAL, IRISES, LANDMARK_SET
from loki_jax.fitting.problem import FitSettings, Layout, Problem, with_shape
from loki_jax.fitting.solver import optimise

_STEPS = 6
_LONGEST = 0.4  # seconds after which the motion before says nothing


class FrameFit(NamedTuple):
    """The fit of one frame.

    Attributes:
      x: unknowns (`Layout`).
      velocity: their change a second.
      interval: seconds since the frame before; 0: none that counts.
    """

    x: Float[np.ndarray, " p"]
    velocity: Float[np.ndarray, " p"]
    interval: float = 0.0


class FrameFitter:
    """Fits the head of one person to frames as they come.

        fitter = FrameFitter(head, points, confidence, (height, width))    # of the first frames
        fit = fitter.fit(points, confidence, 1 / 25, fitter.start)         # of the next one
        coefficients = fitter.coefficients(fit)

    Args:
      head: has the 478 landmarks.
      points, confidence: (N, 478, 2 or 3) in pixels and (N, 478), of the first frames, which give the shape.
      image_size: (height, width) in pixels.
      fps: frame rate of the first frames.
      focal: focal length in pixels; None: from `settings.fov`.

    Attributes:
      camera: of all frames.
      first: coefficients (N, ...) of the first frames.
      start: the fit of the last of them.

    Raises:
      FitError: as `fit_landmarks`.
    """

    def __init__(
        self,
        head: HeadAsset,
        points: Float[np.ndarray, "N 478 _"],
        confidence: Float[np.ndarray, "N 478"],
        image_size: tuple[int, int],
        *,
        fps: float = 25.0,
        focal: float | None = None,
        settings: FitSettings = DEFAULT_SETTINGS,
    ):
        found = fit_landmarks(head, points, confidence, image_size, focal=focal, settings=settings, fps=fps)
        self.camera, self.first = found.camera, found.coefficients
        self._betas, self._settings = found.coefficients.betas[0], settings
        # Smoothness is stated for 25 frames a second.
        self._problem, self._layout, *_ = make_problem(
            with_shape(head, self._betas),
            points[-1:, :, :2],
            confidence[-1:],
            image_size,
            focal,
            settings,
            25.0,
        )
        last = self._layout.unknowns(Coefficients(*(field[-1] for field in self.first)))
        self.start = FrameFit(last, np.zeros_like(last))
        self._pairs = np.asarray(self._problem.pairs)
        self._indices = np.flatnonzero(np.asarray(head.landmarks[LANDMARK_SET].face) >= 0)

    def fit(
        self,
        points: Float[np.ndarray, "478 _"],
        confidence: Float[np.ndarray, "478"],
        interval: float,
        before: FrameFit,
    ) -> FrameFit:
        """The fit of the next frame.

        Args:
          interval: seconds since `before`. After a long time only its expression is where the search begins.
        """
        seen = np.asarray(points, np.float32)[None, self._indices, :2]
        near = 0 < interval <= _LONGEST
        start = before.x if near else self._with_pose(before.x, seen)
        depth = -start[self._layout.n_expression + 5]
        scale = np.array([self.camera.intrinsics[:2].mean() / depth], np.float32)
        sure = confidence[None, self._indices]
        observed = observations(self._indices, self._pairs, seen, sure, scale, self._settings)
        # The second difference of a smooth motion grows with the square of the interval.
        spacing = (interval + (before.interval or interval)) / 2
        trust = (25 * np.sqrt(interval * spacing)) ** -4.0 if near else 0.0
        x = _fit_frame(
            self._problem._replace(**observed._asdict()), self._layout, start,
            before.x + np.float32(interval) * before.velocity, np.float32(trust),
            np.float32(self._settings.tolerance),
        )  # fmt: skip
        x = np.asarray(x)
        if not near:
            return FrameFit(x, np.zeros_like(x))
        return FrameFit(x, (x - before.x) / np.float32(interval), interval)

    def coefficients(self, fit: FrameFit) -> Coefficients:
        """Coefficients of a frame, without leading axes."""
        return self._layout.coefficients(fit.x, self._betas)

    def _with_pose(self, x: Float[np.ndarray, " p"], seen: Float[np.ndarray, "1 n 2"]) -> np.ndarray:
        """The unknowns with the rigid motion that the landmarks alone show."""
        inner = (~np.isin(self._indices, (*FACE_OVAL, *IRISES))).astype(np.float32)
        model = self._problem.head.template[: len(self._indices)]
        rot, tra, _ = pose_from_points(model, seen, inner[None], self.camera.intrinsics)
        x, n = x.copy(), self._layout.n_expression
        x[n : n + 6] = np.concatenate([np.asarray(rot)[0], np.asarray(tra)[0]])
        return x


@functools.partial(jax.jit, static_argnames=("layout",))
def _fit_frame(
    problem: Problem,
    layout: Layout,
    start: Float[Array, " p"],
    expected: Float[Array, " p"],
    trust: Float[Array, ""],
    tolerance: Float[Array, ""],
) -> Float[Array, " p"]:
    """The unknowns of a frame; smoothness, times `trust`, is a prior about `expected`."""
    smoothness = trust * problem.smoothness
    prior = problem.frame_prior + smoothness
    mean = (problem.frame_prior * problem.frame_mean[0] + smoothness * expected) / jnp.maximum(prior, 1e-12)
    problem = problem._replace(frame_prior=prior, frame_mean=mean[None])
    start = jnp.clip(start, problem.lower, problem.upper)
    _, x, _, _ = optimise(problem, layout, jnp.zeros(0), start[None], _STEPS, tolerance)
    return x[0]
