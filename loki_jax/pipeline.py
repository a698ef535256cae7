"""Animation as a library: a portrait and a driving clip in, frames out."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from loki_jax.diffusion.overlap import blend_windows, join_windows
from loki_jax.diffusion.sampler import Guidance, check_guidance, solver_steps
from loki_jax.driver.encoding import ReferenceFrame
from loki_jax.driver.regions import DriverFrames
from loki_jax.driver.registry import find_arm
from loki_jax.face.asset import HeadAsset
from loki_jax.face.controls import Controls, Slider, apply_controls
from loki_jax.face.retarget import fold_neck, head_rotation, neck_joint, retarget, size_ratio
from loki_jax.face.rotation import geodesic_angle
from loki_jax.face.temporal import bridge_interruptions
from loki_jax.face.types import Camera, Coefficients
from loki_jax.framing import frame_animation
from loki_jax.models.loki import drop_motion
from loki_jax.networks import (
    align_driver,
    build_networks,
    decode_latents,
    default_guidance,
    driver_input,
    driver_preview,
    initial_noise,
    portrait_keys_values,
    sample_windows,
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


@runtime_checkable
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
      steps: of the sampler.
      guidance: scale of classifier-free guidance, 1 is none; or the scales of nested guidance, of source,
        motion and history.
      mode: "relative": the head turns from the portrait's pose by the driver's increments; "absolute": it
        takes the driver's pose.
      solver: "ddim", or "dpm++", which needs fewer steps.
      overlap: frames that consecutive windows share, at most half a window; 0: windows know nothing of
        each other, unless the model sees their history.
      windows_at_once: consecutive windows sampled together, in one batch.
      guided_steps: part of the steps that is guided, from the noisiest, 0, to the last, 1.
    """

    steps: int
    guidance: Guidance
    mode: str
    solver: str
    overlap: int
    windows_at_once: int
    guided_steps: tuple[float, float]


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


def retarget_frame(
    head: HeadAsset,
    driver: Coefficients,
    neutral: Coefficients,
    camera: Camera,
    reference: Portrait,
    mode: str = "relative",
    controls: Controls | None = None,
    sliders: Mapping[str, Slider] | None = None,
) -> Coefficients:
    """The coefficients (1, ...) with which `reference` shows one frame of a driver; see `retarget_clip`.

    Args:
      driver, neutral: a frame, and the one in which the portrait has its own pose; without leading axes.
      camera: the driver's.
    """
    pair = jax.tree.map(lambda *x: np.stack([np.asarray(v, np.float32) for v in x]), neutral, driver)
    clip = DrivingClip(
        np.zeros((2, 1, 1, 3), np.uint8),
        pair,
        camera,
        Fraction(25),
        np.ones(2, bool),
        None,
        "frame",
        neutral=0,
    )
    moved = retarget_clip(head, clip, reference, mode, controls=controls, sliders=sliders)
    return jax.tree.map(lambda x: np.asarray(x)[1:], moved)


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


def _nearest_view(head, own, moved, camera, crop, frames):
    """The view (B,4) of drivers (B,N,...), aligned where they are turned most like the portrait; traced."""
    turned = geodesic_angle(head_rotation(frames.coefficients), head_rotation(own)[:, None])
    at = jnp.argmin(turned, axis=1)
    pick = lambda tree: jax.tree.map(lambda x: x[jnp.arange(len(x)), at][:, None], tree)
    once = lambda tree: jax.tree.map(lambda x: x[:, None], tree)
    theirs = DriverFrames(None, pick(frames.coefficients), *once(frames[2:5]))
    return align_driver(head, pick(moved), *once((camera, crop)), theirs).view[:, 0]


def _driver_window(drivers: DriverFrames, clips: Sequence[DrivingClip], index: np.ndarray) -> DriverFrames:
    """Frames `index` (M,T) of the drivers, (B,M,T,...), with what is constant as it is."""
    images = [np.stack([clip.frames[int(i)] for i in index.ravel()]) for clip in clips]
    shown = np.stack([image.reshape(*index.shape, *image.shape[1:]) for image in images])
    coefficients = jax.tree.map(lambda x: x[:, index], drivers.coefficients)
    return drivers._replace(image=shown, coefficients=coefficients)


# Options of `LokiPipeline._sample_windows` that make programs of their own.
_STATIC = ("solver", "guidance", "guided_steps", "shared_noise")


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
        self._keys_values = jax.jit(functools.partial(portrait_keys_values, self.config, self._networks))
        self._sample = jax.jit(self._sample_windows, static_argnames=_STATIC)
        self._decode = jax.jit(self._decode_frames)
        self._align = jax.jit(_nearest_view)
        self._reads_frames = find_arm(self.config.driver.arm).frames

    @classmethod
    def from_checkpoint(cls, source: str | os.PathLike) -> LokiPipeline:
        """The model of a workdir, a model file (.safetensors), or "demo", the shipped model.

        Raises:
          CheckpointError: nothing there, or it is not one of ours.
        """
        return cls(load_checkpoint(source))

    def sampling(
        self,
        steps: int | None = None,
        guidance: Guidance | None = None,
        mode: str | None = None,
        solver: str | None = None,
        overlap: int | None = None,
        windows_at_once: int = 1,
        guided_steps: tuple[float, float] | None = None,
    ) -> Sampling:
        """Options of an animation, with the config's in place of None; an overlap of half a window.

        Windows of a model that sees their history are sampled one by one and share no frames unless told to.

        Raises:
          ValueError: an option is out of range.
        """
        default, half = self.config.sample, self.config.window // 2
        history = self.config.history.frames
        chosen = Sampling(
            default.steps if steps is None else steps,
            default_guidance(self.config) if guidance is None else guidance,
            default.pose if mode is None else mode,
            default.solver if solver is None else solver,
            (0 if history else half) if overlap is None else overlap,
            windows_at_once,
            tuple(default.guided_steps if guided_steps is None else guided_steps),
        )
        if chosen.steps < 1:
            raise ValueError(f"steps is {chosen.steps}, expected at least 1")
        check_guidance(chosen.guidance, chosen.guided_steps)
        if chosen.mode not in ("relative", "absolute"):
            raise ValueError(f"mode is {chosen.mode!r}, expected 'relative' or 'absolute'")
        solver_steps(self._networks.schedule, chosen.solver, chosen.steps, default.spacing)  # may refuse them
        if not 0 <= chosen.overlap <= half:
            raise ValueError(
                f"overlap is {chosen.overlap}, expected 0 to {half}: windows have {self.config.window} frames"
            )
        if chosen.windows_at_once < 1:
            raise ValueError(f"windows_at_once is {chosen.windows_at_once}, expected at least 1")
        if history and chosen.windows_at_once > 1:
            raise ValueError("windows_at_once: this model goes on from the window before, expected 1")
        if history > self.config.window - chosen.overlap:
            raise ValueError(
                f"overlap is {chosen.overlap}, expected at most {self.config.window - history}: "
                f"this model sees {history} frames before each window"
            )
        return chosen

    def windows(
        self,
        portrait: Portrait,
        clip: DrivingClip,
        *,
        seed: int = 0,
        shared_noise: bool = True,
        controls: Controls | None = None,
        sliders: Mapping[str, Slider] | None = None,
        **options: Any,
    ) -> Iterator[Window]:
        """The animation of `portrait` by `clip`, a few frames at a time, in constant memory.

        Args:
          controls, sliders: see `retarget_clip`.
          options: those of `sampling`.
          seed: of the sampler's noise.
          shared_noise: sampling starts from the same noise in all frames, which makes them flicker less than
            noise of their own.

        Raises:
          ValueError: an option is out of range; or the model follows the driver's pixels, and there are none,
            or sliders.
        """
        sampling = self.sampling(**options)
        if self._reads_frames and (sliders or controls not in (None, Controls())):
            raise ValueError(
                "this model follows the driver's pixels: controls and sliders do not change them"
            )
        coefficients = retarget_clip(
            self.head, clip, portrait, sampling.mode, self.config.driver.neck, controls, sliders
        )
        portrait, coefficients = frame_animation(self.head, portrait, coefficients)
        one, coefficients = (
            stack_trees([portrait._replace(picture=None, landmarks=None)]),
            stack_trees([coefficients]),
        )
        windows = self.windows_of_batch(
            one, coefficients, one.camera, one.crop, sampling, [clip], seed=seed, shared_noise=shared_noise
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
        sampling: Sampling,
        clips: Sequence[DrivingClip] = (),
        *,
        seed: int = 0,
        shared_noise: bool = True,
    ) -> Iterator[Window]:
        """Animate B portraits together by coefficients that are already theirs.

        Args:
          portraits: who is shown, arrays (B, ...): `stack_trees` of portraits.
          coefficients: fields (B, N, ...), of `retarget_clip`.
          camera, crop: of the result, (B, ...), constant in time; those of the portraits, as a rule.
          sampling: of `sampling`; its mode is that of the coefficients already.
          clips: the B drivers, for models that read their frames.

        Yields:
          Windows (B, n, S, S, 3), in which n is at most the number of frames that are new in the windows
          sampled together.

        Raises:
          ValueError: the model reads frames of drivers, and a clip has none of its own.
        """
        # All preparation is on the host: on the device every operation would be compiled.
        on_host = functools.partial(jax.tree.map, functools.partial(np.asarray, dtype=np.float32))
        own = on_host(ReferenceFrame(portraits.coefficients, portraits.camera, portraits.crop))
        seen = self._keys_values(self._params, self.head, portraits.image, *own[:3])
        reference = own._replace(image=portraits.image)
        batch, length = coefficients.expression.shape[:2]
        window, overlap, together = self.config.window, sampling.overlap, sampling.windows_at_once
        model = self._networks.model_config
        latent = (model.latent_size, model.latent_size, model.latent_channels)
        earlier = np.zeros((sampling.steps, batch, overlap, *latent), np.float32)
        history = np.zeros((batch, self.config.history.frames, *latent), np.float32)
        step = together * (window - overlap)  # frames that are new in the windows sampled together
        coefficients, camera, crop = on_host((coefficients, camera, crop))
        drivers = None
        if self._reads_frames:
            drivers = self._align_clips(clips, own.coefficients, coefficients, camera, crop)
        for start in range(0, max(length - overlap, 1), step):
            first = start + (window - overlap) * np.arange(together)[:, None]
            number = first + np.arange(window)
            # What lies beyond the end shows the last frame.
            index = np.clip(first + np.arange(-history.shape[1], window), 0, length - 1)
            part = jax.tree.map(lambda x, index=index: x[:, index], coefficients)
            pixels = drivers if drivers is None else _driver_window(drivers, clips, index)
            latents, maps, earlier, history = self._sample(
                self._params, self.head, seen, reference, part, camera, crop, pixels,
                np.uint32(seed & 0xFFFFFFFF), number.astype(np.uint32),
                earlier, history, np.bool_(start == 0),
                solver=sampling.solver, guidance=sampling.guidance, guided_steps=sampling.guided_steps,
                shared_noise=shared_noise,
            )  # fmt: skip
            maps, left = np.asarray(maps), length - start
            # Shared frames are not finished before the windows that come next.
            finished = left if left <= step + overlap else step
            for begin in range(0, finished, step):
                # Decoded in pieces of one length: each length is compiled.
                piece = np.minimum(np.arange(begin, begin + step), maps.shape[1] - 1)
                frames = np.asarray(self._decode(self._params, latents, piece))
                yield Window(frames[:, : finished - begin], maps[:, begin : min(begin + step, finished)])

    def _sample_windows(
        self,
        params,
        head,
        seen,
        reference,
        coefficients,
        camera,
        crop,
        frames,
        seed,
        number,
        earlier,
        history,
        first,
        *,
        solver,
        guidance,
        guided_steps,
        shared_noise,
    ):
        """M consecutive windows of B clips; traced.

        Args:
          coefficients: (B,M,k+T,...), of windows behind their history; `number` (M,T): which frames of the
            clip are those of the windows.
          frames: of the drivers, (B,M,k+T,...), where the arm reads them; camera, crop and view are (B,...).
          earlier, first: see `blend_windows`, for every step.
          history: latents (B,k,h,w,c) of the frames before the windows.

        Returns:
          latents (B,n,h,w,c) and pictures of the driver maps (B,n,S,S,3) uint8 of all n frames, and the next
          `earlier` and `history`.
        """
        config, networks = self.config, self._networks
        (steps, batch, overlap), (together, window) = earlier.shape[:3], number.shape
        before, total = history.shape[1], history.shape[1] + window
        # To (B M, ...), window by window.
        windows = lambda tree: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
        coefficients = windows(coefficients)
        seen, reference, camera, crop = jax.tree.map(
            lambda x: jnp.repeat(x, together, axis=0), (seen, reference, camera, crop)
        )
        in_time = lambda *tree: jax.tree.map(
            lambda x: jnp.broadcast_to(x[:, None], (len(x), total, *x.shape[1:])), tree
        )
        camera, crop = in_time(camera, crop)
        if frames is not None:
            of_clip = jax.tree.map(lambda x: jnp.repeat(x, together, axis=0), frames[2:])
            frames = DriverFrames(*windows(frames[:2]), *in_time(*of_clip))
        driver = driver_input(config, head, coefficients, camera, crop, reference, frames)
        maps = driver_preview(config, head, driver, coefficients, camera, crop)[:, before:]
        if before:
            # There is nothing before the first frame.
            driver = drop_motion(driver, ((jnp.arange(total) >= before) | ~first)[None])
        key = jax.random.fold_in(jax.random.key(seed), 0)
        if shared_noise:
            noise = initial_noise(networks, key, batch, 1)[:, None]
            noise = jnp.broadcast_to(noise, (batch, together, window, *noise.shape[3:]))
        else:
            of_frame = lambda i: initial_noise(networks, jax.random.fold_in(key, i), batch, 1)[:, 0]
            noise = jnp.moveaxis(jax.vmap(jax.vmap(of_frame))(number), 2, 0)
        latents, earlier = sample_windows(
            config, networks, params, seen, driver, noise.reshape(-1, *noise.shape[2:]),
            solver=solver, steps=steps, guidance=guidance, spacing=config.sample.spacing,
            guided_steps=guided_steps,
            blend=lambda x0, given: blend_windows(x0, given, first, together), blended=earlier,
            history=history if before else None,
        )  # fmt: skip
        latents, maps = (join_windows(x, together, overlap) for x in (latents, maps))
        end = latents.shape[1] - overlap  # where the next windows begin
        return latents, maps, earlier, latents[:, end - before : end]

    def _align_clips(
        self, clips: Sequence[DrivingClip], own: Coefficients, moved: Coefficients, camera: Camera,
        crop: Float[np.ndarray, "b 4"],
    ) -> DriverFrames:  # fmt: skip
        """The drivers (B, N, ...) without images, what is constant (B, ...), aligned with the driven head.

        Raises:
          ValueError: a clip has no pixels of its own, or there is none for each portrait.
        """
        if any(clip.crop is None for clip in clips) or len(clips) != len(crop):
            raise ValueError(
                "this model follows the driver's pixels; a motion file or the pose of another driver has none"
            )
        theirs = stack_trees([clip.coefficients for clip in clips])
        box = np.stack([np.asarray(clip.crop, np.float32) for clip in clips])
        frames = DriverFrames(None, theirs, stack_trees([clip.camera for clip in clips]), box, box)
        return frames._replace(view=np.asarray(self._align(self.head, own, moved, camera, crop, frames)))

    def _decode_frames(self, params, latents, index):
        """Frames (B,m,S,S,3) uint8 of latents (B,n,h,w,c) at `index` (m,); traced."""
        return decode_latents(self._networks, params, latents[:, index])
