"""A portrait under controls, one picture at a time: what a person sees while moving sliders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import UInt8

from loki_jax.face.controls import Controls, Slider
from loki_jax.geometry.pipeline import GeometryPipeline
from loki_jax.pipeline import retarget_frame
from loki_jax.sources import DrivingClip, Portrait

_GRID = 256


class Preview:
    """A portrait made ready. The first picture is compiled, others take a tenth of a second.

        preview = Preview(GeometryPipeline(), portrait)
        picture = preview(Controls(), {"smile": 0.5})
        picture = preview(Controls(pose=0.5), {}, clip, 12)

    Pictures have the portrait's size: `loki_jax.video.image.reduce_picture` makes it a small one.
    """

    def __init__(self, pipeline: GeometryPipeline, portrait: Portrait):
        self.portrait = portrait
        self._head, self._render = pipeline.head, pipeline.prepare(portrait, grid=_GRID)

    def __call__(
        self,
        controls: Controls,
        sliders: Mapping[str, Slider],
        clip: DrivingClip | None = None,
        frame: int = 0,
        mode: str = "relative",
    ) -> UInt8[np.ndarray, "h w 3"]:
        """The portrait as it is in frame number `frame` of a clip; without a clip moved by sliders alone.

        Smoothing needs more than one frame and is left out.

        Raises:
          ControlError: as `apply_controls`.
        """
        if clip is None:
            driver = neutral = self.portrait.coefficients
            camera, mode = self.portrait.camera, "absolute"
        else:
            driver, neutral = (
                jax.tree.map(lambda x, i=i: np.asarray(x)[i], clip.coefficients)
                for i in (frame, clip.neutral or 0)
            )
            camera = clip.camera
        controls = dataclasses.replace(controls, smooth=0.0)
        moved = retarget_frame(self._head, driver, neutral, camera, self.portrait, mode, controls, sliders)
        return self._render(moved)[0]
