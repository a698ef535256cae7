"""Animate a portrait with a driver clip.

    python -m loki_jax.animate --reference portrait.png --driver clip.mp4 --checkpoint WORKDIR --out out.mp4

Reference and driver are files, which the checkpoint's head is fitted to by landmarks, or clips of a
dataset, DATASET_FOLDER:CLIP_ID, whose coefficients are stored (the reference is then its first
frame). The checkpoint is a workdir of `loki_jax.train`, a model file, or "demo". Beside OUT.mp4 a
panel OUT_panel.mp4 shows reference, driver, driver map and result. Both videos keep the driver's
frame rate and audio and are tagged as synthetic.

A driver of any length is animated window by window; the last window is filled up with its last frame
and cut again.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree, UInt8
from ml_collections import ConfigDict

from loki_jax.data.records import ClipInfo, Dataset, DatasetError, Frame, open_dataset
from loki_jax.driver import driver_map
from loki_jax.head.asset import HeadAsset
from loki_jax.head.camera import crop_and_resize
from loki_jax.head.retarget import size_ratio, substitute
from loki_jax.head.skinning import make_identity
from loki_jax.head.types import Camera, Coefficients
from loki_jax.networks import (
    Networks,
    build_networks,
    driver_input,
    initial_noise,
    portrait_features,
    sample_from_features,
)
from loki_jax.report import driver_map_picture, panel_frames
from loki_jax.training.checkpoint import load_checkpoint
from loki_jax.video import MediaError, VideoWriter


class Portrait(NamedTuple):
    """A reference: `image` is its crop; coefficients (n,), camera and crop (4,) are unbatched."""

    image: UInt8[np.ndarray, "s s 3"]
    coefficients: Coefficients
    camera: Camera
    crop: Float[np.ndarray, " 4"]
    name: str


class Performance(NamedTuple):
    """A driver: coefficients (N, ...), its camera unbatched, its crop's frames for display.

    `source` is the file that rate and audio come from; None for a clip of a dataset, which has no audio.
    `valid` marks frames whose face was found.
    """

    frames: UInt8[np.ndarray, "n s s 3"]
    coefficients: Coefficients
    camera: Camera
    fps: Fraction
    valid: Float[np.ndarray, " n"]
    source: Path | None
    name: str


# --- inputs ----------------------------------------------------------------------------------------


def split_clip_source(source: str) -> tuple[Path, str] | None:
    """("folder", "clip id") of a source DATASET_FOLDER:CLIP_ID; None for anything else."""
    folder, colon, clip_id = source.rpartition(":")
    if not colon or not Path(folder).is_dir():
        return None
    return Path(folder), clip_id


def find_clip(folder: Path, clip_id: str, head: HeadAsset) -> tuple[Dataset, ClipInfo]:
    """The clip `clip_id` of the dataset at `folder`.

    Raises:
      DatasetError: no such dataset or clip, or the dataset's coefficients belong to another head.
    """
    dataset = open_dataset(folder)
    stored = dataset.head()
    if stored.template.shape != head.template.shape or not np.allclose(
        stored.template, head.template, atol=1e-6
    ):
        raise DatasetError(
            f"{folder}: its coefficients belong to the head {stored.name!r}, "
            f"the checkpoint to {head.name!r}. Build the dataset with the checkpoint's head."
        )
    for clip in dataset.clips:
        if clip.clip_id == clip_id:
            return dataset, clip
    names = ", ".join(clip.clip_id for clip in dataset.clips[:8])
    raise DatasetError(
        f"{folder}: has no clip {clip_id!r}. Its clips: {names}{', ...' * (len(dataset.clips) > 8)}"
    )


def fit_portrait(path: str, head: HeadAsset):
    """`data_prep.face_track.fit_image` of a file; its landmark networks are loaded for real pictures only."""
    from data_prep.face_track import fit_image
    from data_prep.landmarker import LandmarkError

    try:
        return fit_image(path, head)
    except LandmarkError as error:
        raise MediaError(str(error)) from error


def fit_clip(path: str, head: HeadAsset):
    """`data_prep.face_track.fit_video` of a file, at its own frame rate."""
    from data_prep.face_track import fit_video
    from data_prep.landmarker import LandmarkError

    try:
        return fit_video(path, head)
    except LandmarkError as error:
        raise MediaError(str(error)) from error


def load_portrait(source: str, head: HeadAsset, size: int, frame: int = 0) -> Portrait:
    """Read a reference from an image file (fitted) or from frame `frame` of a dataset's clip.

    Raises:
      MediaError, DatasetError, FitError: unreadable, no such clip, or no face.
    """
    found = split_clip_source(source)
    if found is None:
        fitted = fit_portrait(source, head)
        coefficients = jax.tree.map(lambda x: np.asarray(x)[0], fitted.fit.coefficients)
        image = crop_and_resize(fitted.frames[0], fitted.crop, size)
        return Portrait(image, coefficients, fitted.fit.camera, fitted.crop, source)
    dataset, clip = find_clip(*found, head)
    record = dataset.read_clip(clip, frame, frame + 1)[0]
    image = _stored_image(record, clip, size)
    return Portrait(image, record.coefficients, record.camera, record.crop, clip.clip_id)


def stack_portraits(portraits: Sequence[Portrait]) -> Portrait:
    """Portraits as one whose arrays have a leading axis."""
    arrays = [portrait._replace(name=()) for portrait in portraits]
    stacked = jax.tree.map(lambda *x: np.stack([np.asarray(v) for v in x]), *arrays)
    return stacked._replace(name=", ".join(portrait.name for portrait in portraits))


def load_performance(source: str, head: HeadAsset, size: int) -> Performance:
    """Read a driver from a video file (fitted) or a dataset's clip.

    Raises:
      MediaError, DatasetError, FitError: unreadable, no such clip, or no face.
    """
    found = split_clip_source(source)
    if found is None:
        fitted = fit_clip(source, head)
        frames = np.stack([crop_and_resize(frame, fitted.crop, size) for frame in fitted.frames])
        valid = np.asarray(fitted.fit.confidence) > 0
        return Performance(
            frames, fitted.fit.coefficients, fitted.fit.camera, fitted.fps, valid, Path(source), source
        )
    dataset, clip = find_clip(*found, head)
    records = dataset.read_clip(clip)
    coefficients = jax.tree.map(lambda *x: np.stack(x), *(record.coefficients for record in records))
    frames = np.stack([_stored_image(record, clip, size) for record in records])
    valid = np.array([record.confidence > 0 for record in records])
    return Performance(frames, coefficients, records[0].camera, clip.fps, valid, None, clip.clip_id)


def _stored_image(frame: Frame, clip: ClipInfo, size: int) -> UInt8[np.ndarray, "size size 3"]:
    if frame.image is None:
        raise DatasetError(f"clip {clip.clip_id!r} is stored as latents only. Build the dataset with images.")
    whole = np.array([0, 0, frame.image.shape[1], frame.image.shape[0]], np.float64)
    return frame.image if frame.image.shape[0] == size else crop_and_resize(frame.image, whole, size)


def transfer(
    head: HeadAsset, driver: Performance, reference: Portrait, mode: str = "relative"
) -> Coefficients:
    """The coefficients (N, ...) with which `reference` performs `driver` (design section 9)."""
    scale = size_ratio(
        head, jnp.asarray(reference.coefficients.shape), jnp.asarray(driver.coefficients.shape[0])
    )
    as_arrays = functools.partial(jax.tree.map, jnp.asarray)
    return substitute(
        as_arrays(driver.coefficients),
        as_arrays(reference.coefficients),
        mode,
        scale=scale,
        driver_camera=as_arrays(driver.camera),
        reference_camera=as_arrays(reference.camera),
    )


# --- sampling --------------------------------------------------------------------------------------


class Animator(NamedTuple):
    """Compiled functions of one model: `prepare` gives a reference's features, `animate` one window."""

    prepare: object
    animate: object
    window: int


def make_animator(
    config: ConfigDict, networks: Networks, *, steps: int, guidance: float, spacing: str
) -> Animator:
    """Compile-once functions that `animate_clip` calls for each clip and window."""

    @jax.jit
    def prepare(
        params: PyTree, head: HeadAsset, image: UInt8[np.ndarray, "b s s 3"], coefficients, camera, crop
    ):
        return portrait_features(config, networks, params, head, image, coefficients, camera, crop)

    @jax.jit
    def animate(params: PyTree, head: HeadAsset, features, coefficients, camera, crop, key):
        """One window of B clips: frames and pictures of the driver maps, both (B,T,S,S,3) uint8."""
        driver = driver_input(config, head, coefficients, camera, crop)
        noise = initial_noise(networks, key, *driver.shape[:2])
        frames = sample_from_features(
            config, networks, params, features, driver, noise, steps=steps, guidance=guidance, spacing=spacing
        )
        if config.driver.arm == "flame_vector":
            identity = make_identity(head, coefficients.shape[:, :1])
            driver = driver_map(head, identity, coefficients, camera, crop, config.image_size)
        return frames, driver_map_picture(driver)

    return Animator(prepare, animate, config.window)


def animate_windows(
    animator: Animator,
    params: PyTree,
    head: HeadAsset,
    portraits: Portrait,
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[np.ndarray, "b 4"],
    seed: int = 0,
) -> Iterator[tuple[UInt8[np.ndarray, "b t s s 3"], UInt8[np.ndarray, "b t s s 3"]]]:
    """Animate B references, one window of all clips after another.

    Args:
      portraits: who is shown (`stack_portraits`).
      coefficients: fields (B, N, ...), already those of the references (`transfer`).
      camera, crop: of the result, (B, ...), constant in time; those of the portraits, as a rule.
      seed: of the sampler's noise.

    Yields:
      Frames and driver-map pictures of each window; the last one may be shorter.
    """
    as_arrays = functools.partial(jax.tree.map, functools.partial(jnp.asarray, dtype=jnp.float32))
    own = as_arrays((portraits.coefficients, portraits.camera, portraits.crop))
    features = animator.prepare(params, head, jnp.asarray(portraits.image), *own)
    length, window = coefficients.expression.shape[1], animator.window
    batch = len(portraits.image)

    def in_time(value):
        value = jnp.asarray(value, jnp.float32)
        return jnp.broadcast_to(value[:, None], (batch, window, *value.shape[1:]))

    camera, crop = jax.tree.map(in_time, camera), in_time(crop)
    key = jax.random.key(seed)
    for start in range(0, length, window):
        index = np.minimum(np.arange(start, start + window), length - 1)
        part = jax.tree.map(lambda x, index=index: jnp.asarray(x)[:, index], coefficients)
        frames, maps = animator.animate(
            params, head, features, part, camera, crop, jax.random.fold_in(key, start // window)
        )
        count = min(window, length - start)
        yield np.asarray(frames)[:, :count], np.asarray(maps)[:, :count]


def animate_clips(
    animator: Animator,
    params: PyTree,
    head: HeadAsset,
    portraits: Portrait,
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[np.ndarray, "b 4"],
    seed: int = 0,
) -> tuple[UInt8[np.ndarray, "b n s s 3"], UInt8[np.ndarray, "b n s s 3"]]:
    """All windows of `animate_windows` joined in time."""
    parts = list(animate_windows(animator, params, head, portraits, coefficients, camera, crop, seed))
    frames, maps = (np.concatenate(side, axis=1) for side in zip(*parts, strict=True))
    return frames, maps


# --- program ---------------------------------------------------------------------------------------


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loki_jax.animate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reference", required=True, help="image file, or DATASET_FOLDER:CLIP_ID")
    parser.add_argument("--driver", required=True, help="video file, or DATASET_FOLDER:CLIP_ID")
    parser.add_argument("--checkpoint", required=True, help='workdir, .safetensors file, or "demo"')
    parser.add_argument("--out", required=True, type=Path, help="video to write, .mp4")
    parser.add_argument("--steps", type=int, help="DDIM steps (default: the config's)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance (default: the config's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument(
        "--mode",
        choices=("relative", "absolute"),
        default=None,
        help="relative: turn from the reference's pose by the driver's increments; "
        "absolute: the driver's own pose (default: the config's)",
    )
    parser.add_argument("--no-audio", action="store_true", help="leave the driver's audio out")
    return parser.parse_args(argv)


def animate(argv: list[str] | None = None) -> None:
    """Run the program. Raises the errors of its inputs; nothing is written then."""
    args = _arguments(argv)
    panel_path = args.out.with_name(f"{args.out.stem}_panel{args.out.suffix}")

    # ------------------------------------------------------------------------------------- model
    config, params, head, step = load_checkpoint(args.checkpoint)
    networks = build_networks(config, head)
    steps = config.sample.steps if args.steps is None else args.steps
    guidance = config.sample.guidance if args.guidance is None else args.guidance
    mode = args.mode or config.sample.get("pose", "relative")  # models of before this key
    if steps < 1:
        raise ValueError(f"--steps {steps} must be at least 1")
    animator = make_animator(config, networks, steps=steps, guidance=guidance, spacing=config.sample.spacing)
    params = jax.tree.map(jnp.asarray, params)

    # ------------------------------------------------------------------------------------ inputs
    reference = load_portrait(args.reference, head, config.image_size)
    driver = load_performance(args.driver, head, config.image_size)
    coefficients = jax.tree.map(lambda x: x[None], transfer(head, driver, reference, mode))
    length = len(driver.frames)
    print(
        f"{driver.name}: {length} frames at {driver.fps} fps; "
        f"model of step {step}, {steps} steps, guidance {guidance}"
    )

    # ----------------------------------------------------------------------- windows and writing
    audio = None if args.no_audio else driver.source
    height = max(256, config.image_size)
    started, done = time.monotonic(), 0
    with (
        VideoWriter(args.out, driver.fps, audio_from=audio) as video,
        VideoWriter(panel_path, driver.fps, audio_from=audio) as panel,
    ):
        one = stack_portraits([reference])
        for frames, maps in animate_windows(
            animator, params, head, one, coefficients, one.camera, one.crop, args.seed
        ):
            shown = driver.frames[done : done + frames.shape[1]]
            for frame in frames[0]:
                video.write(frame)
            for frame in panel_frames([reference.image, shown, maps[0], frames[0]], height):
                panel.write(frame)
            done += frames.shape[1]
            rate = done / (time.monotonic() - started)
            print(
                f"\r{done}/{length} frames, {rate:.1f} frames/s, {(length - done) / rate:.0f} s left  ",
                end="",
                flush=True,
            )
    print(f"\nwrote {args.out} and {panel_path}")


def main(argv: list[str] | None = None) -> None:
    # MediaError, DatasetError, HeadAssetError, CheckpointError and FitError are all ValueErrors.
    try:
        animate(argv)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
