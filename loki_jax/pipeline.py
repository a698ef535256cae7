"""Animation as a library: a portrait and a driving clip in, frames out."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from loki_jax.driver.encoding import ReferenceFrame
from loki_jax.face.asset import HeadAsset
from loki_jax.face.controls import Controls, Slider, apply_controls
from loki_jax.face.retarget import fold_neck, neck_joint, retarget, size_ratio
from loki_jax.face.temporal import bridge_interruptions
from loki_jax.face.types import Camera, Coefficients
from loki_jax.framing import frame_animation
from loki_jax.networks import (
    build_networks,
    driver_input,
    driver_preview,
    initial_noise,
    portrait_features,
    sample_from_features,
)
from loki_jax.sources import DrivingClip, Portrait, stack_trees
from loki_jax.training.checkpoint import load_checkpoint
from loki_jax.training.model_file import Checkpoint


class Window(NamedTuple):
    """Consecutive frames of one animation, or of B animations, RGB.

    Attributes:
      frames: the result.
      maps: pictures of the driver maps that it follows.
    """

    frames: UInt8[np.ndarray, "*b t h w 3"]
    maps: UInt8[np.ndarray, "*b t s s 3"]


class Animator(Protocol):
    """What can animate a portrait. `head` is the head to fit inputs to, `size` the edge of crops, pixels."""

    head: HeadAsset
    size: int

    def windows(self, portrait: Portrait, clip: DrivingClip, **options: Any) -> Iterator[Window]:
        """The animation, a few frames at a time."""
        ...

    def __call__(self, portrait: Portrait, clip: DrivingClip, **options: Any) -> UInt8[np.ndarray, "n h w 3"]:
        """All frames of the animation; the options are those of `windows`."""
        ...


class Sampling(NamedTuple):
    """Options of an animation.

    Attributes:
      steps: DDIM steps.
      guidance: scale of classifier-free guidance; 1 is none.
      mode: "relative": the head turns from the portrait's pose by the driver's increments; "absolute": it
        takes the driver's pose.
    """

    steps: int
    guidance: float
    mode: str


def retarget_clip(
    head: HeadAsset,
    driver: DrivingClip,
    reference: Portrait,
    mode: str = "relative",
    neck: bool = True,
    controls: Controls | None = None,
    sliders: Mapping[str, Slider] | None = None,
) -> Coefficients:
    """The coefficients (N, ...) with which `reference` follows `driver` (method, section 9).

    Args:
      neck: False for a model whose driver map leaves the neck out: in relative mode its bend becomes part of
        `rot` and `tra`.
      controls, sliders: what a person changes (`loki_jax.face.controls`); with controls the motion is also
        eased over cuts and lost faces. None: nothing.

    Raises:
      ValueError: unknown mode, or as `apply_controls`.
    """
    own, followed = reference.coefficients, driver.coefficients
    if controls is not None:
        followed = bridge_interruptions(followed, driver.valid, driver.cuts, float(driver.fps), controls.ease)
    origin = jax.tree.map(lambda x: np.asarray(x)[driver.neutral or 0], followed)
    moved = _retarget(head, followed, own, origin, mode, driver.camera, reference.camera)
    if controls is not None or sliders:
        moved = apply_controls(
            head, moved, own, reference.camera, float(driver.fps), controls or Controls(), sliders
        )
    return moved if neck or mode == "absolute" else _fold(head, moved, own.betas)


# Compiled: operation by operation it would take as long as a few frames of the animation.
@functools.partial(jax.jit, static_argnames=("mode",))
def _retarget(head, driver, own, origin, mode, driver_camera, reference_camera):
    return retarget(
        driver, own, mode, scale=size_ratio(head, own.betas, driver.betas[0]), origin=origin,
        driver_camera=driver_camera, reference_camera=reference_camera,
    )  # fmt: skip


@jax.jit
def _fold(head, moved, betas):
    return fold_neck(moved, neck_joint(head, betas))


class LokiPipeline:
    """A trained model that animates portraits; an `Animator`.

        pipeline = LokiPipeline.from_checkpoint("demo")
        portrait = fit_portrait("portrait.png", pipeline.head, pipeline.size)
        clip = fit_clip("clip.mp4", pipeline.head, pipeline.size)
        frames = pipeline(portrait, clip)

    Compiled code is kept, so one pipeline should serve many clips.

    Attributes:
      head: the head that portraits and clips must be fitted with.
      size: edge of portraits and frames in pixels.
      config, step: the model's config, and the training step it is of.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.config, params, self.head, self.step = checkpoint
        self.size = self.config.image_size
        self._params = jax.device_put(params)
        self._networks = build_networks(self.config, self.head)
        self._features = jax.jit(functools.partial(portrait_features, self.config, self._networks))
        self._window = jax.jit(self._sample_window, static_argnames=("steps", "guidance", "shared_noise"))

    @classmethod
    def from_checkpoint(cls, source: str | os.PathLike) -> LokiPipeline:
        """The model of a workdir, a model file (.safetensors), or "demo", the shipped model.

        Raises:
          CheckpointError: nothing there, or it is not one of ours.
        """
        return cls(load_checkpoint(source))

    def sampling(
        self, steps: int | None = None, guidance: float | None = None, mode: str | None = None
    ) -> Sampling:
        """Options of an animation, with the config's in place of None.

        Raises:
          ValueError: an option is out of range.
        """
        default = self.config.sample
        chosen = Sampling(
            default.steps if steps is None else steps,
            default.guidance if guidance is None else guidance,
            default.get("pose", "relative") if mode is None else mode,  # models of before this key
        )
        if chosen.steps < 1:
            raise ValueError(f"steps is {chosen.steps}, expected at least 1")
        if not math.isfinite(chosen.guidance):
            raise ValueError(f"guidance is {chosen.guidance}, expected a finite number")
        if chosen.mode not in ("relative", "absolute"):
            raise ValueError(f"mode is {chosen.mode!r}, expected 'relative' or 'absolute'")
        return chosen

    def windows(
        self,
        portrait: Portrait,
        clip: DrivingClip,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        mode: str | None = None,
        seed: int = 0,
        shared_noise: bool = True,
        controls: Controls | None = None,
        sliders: Mapping[str, Slider] | None = None,
    ) -> Iterator[Window]:
        """The animation of `portrait` by `clip`, window by window: memory does not grow with its length.

        Args:
          steps, guidance, mode: see `Sampling`; None: the config's.
          controls, sliders: see `retarget_clip`.
          seed: of the sampler's noise.
          shared_noise: sampling starts from the same noise in all frames, which makes them flicker less than
            noise of their own.

        Yields:
          Windows (T, S, S, 3), T the frames of the model's window; the last may be shorter.

        Raises:
          ValueError: an option is out of range.
        """
        steps, guidance, mode = self.sampling(steps, guidance, mode)
        coefficients = retarget_clip(
            self.head, clip, portrait, mode, self.config.driver.neck, controls, sliders
        )
        portrait, coefficients = frame_animation(self.head, portrait, coefficients)
        one, coefficients = (
            stack_trees([portrait._replace(picture=None, landmarks=None)]),
            stack_trees([coefficients]),
        )
        windows = self.windows_of_batch(
            one,
            coefficients,
            one.camera,
            one.crop,
            steps=steps,
            guidance=guidance,
            seed=seed,
            shared_noise=shared_noise,
        )
        return (Window(*(part[0] for part in window)) for window in windows)

    def __call__(self, portrait: Portrait, clip: DrivingClip, **options: Any) -> UInt8[np.ndarray, "n s s 3"]:
        """All frames of `windows`, with its options and errors: one for each frame of the clip, RGB."""
        return np.concatenate([window.frames for window in self.windows(portrait, clip, **options)])

    def windows_of_batch(
        self,
        portraits: Portrait,
        coefficients: Coefficients,
        camera: Camera,
        crop: Float[np.ndarray, "b 4"],
        *,
        steps: int,
        guidance: float,
        seed: int = 0,
        shared_noise: bool = True,
    ) -> Iterator[Window]:
        """Animate B portraits together by coefficients that are already theirs.

        Args:
          portraits: who is shown, arrays (B, ...): `stack_trees` of portraits.
          coefficients: fields (B, N, ...), of `retarget_clip`.
          camera, crop: of the result, (B, ...), constant in time; those of the portraits, as a rule.

        Yields:
          Windows (B, T, S, S, 3); the last may be shorter.
        """
        # All preparation is on the host: on the device every operation would be compiled.
        on_host = functools.partial(jax.tree.map, functools.partial(np.asarray, dtype=np.float32))
        own = on_host(ReferenceFrame(portraits.coefficients, portraits.camera, portraits.crop))
        features = self._features(self._params, self.head, portraits.image, *own[:3])
        reference = own._replace(image=portraits.image)
        batch, length = coefficients.expression.shape[:2]
        window = self.config.window

        def in_time(value):
            return np.broadcast_to(value[:, None], (batch, window, *value.shape[1:]))

        coefficients = on_host(coefficients)
        camera, crop = jax.tree.map(in_time, on_host((camera, crop)))
        for start in range(0, length, window):
            # The last window is filled with its last frame.
            index = np.minimum(np.arange(start, start + window), length - 1)
            part = jax.tree.map(lambda x, index=index: x[:, index], coefficients)
            images = self._window(
                self._params, self.head, features, reference, part, camera, crop,
                np.uint32(seed & 0xFFFFFFFF), np.uint32(start // window),
                steps=steps, guidance=guidance, shared_noise=shared_noise,
            )  # fmt: skip
            yield Window(*(np.asarray(image)[:, : length - start] for image in images))

    def _sample_window(
        self,
        params,
        head,
        features,
        reference,
        coefficients,
        camera,
        crop,
        seed,
        number,
        *,
        steps,
        guidance,
        shared_noise,
    ):
        """One window of B clips: frames and pictures of the driver maps, both (B,T,S,S,3) uint8; traced."""
        config, networks = self.config, self._networks
        driver = driver_input(config, head, coefficients, camera, crop, reference)
        batch, frames = driver.shape[:2]
        key = jax.random.fold_in(jax.random.key(seed), 0 if shared_noise else number)
        noise = initial_noise(networks, key, batch, 1 if shared_noise else frames)
        noise = jnp.broadcast_to(noise, (batch, frames, *noise.shape[2:]))
        frames = sample_from_features(
            config, networks, params, features, driver, noise,
            steps=steps, guidance=guidance, spacing=config.sample.spacing,
        )  # fmt: skip
        return frames, driver_preview(config, head, driver, coefficients, camera, crop)
