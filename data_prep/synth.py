"""Synthetic talking heads with known truth: random identities of the built-in head, speech-like motion.

    python -m data_prep.synth --out DIR [--identities 64] [--clips-per-identity 2] [--frames 32..64]
    python -m data_prep.synth --preview sheet.png

writes a dataset (docs/data.md) whose coefficients are exact, rendered by `loki_jax.appearance`. An
identity is one integer, stored in the clip table as `identity_seed`: `appearance_for_identity` gives
its colours back to the evaluator. Everything is drawn from numpy's PCG64 with explicit seeds, so the
coefficients are the same on every machine.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from loki_jax.appearance import Appearance, render, sample_appearance, sample_shape
from loki_jax.data.records import Clip, DatasetError, write_dataset
from loki_jax.head.asset import HeadAsset
from loki_jax.head.builtin import BuiltinMesh, builtin_head, builtin_mesh
from loki_jax.head.camera import camera_from_world, crop_box, project
from loki_jax.head.skinning import make_identity, mesh_render_mask, world_vertices
from loki_jax.head.types import Camera, Coefficients

FPS = Fraction(25)
SOURCE = "data_prep.synth"
_FRAME_SIZE = 512  # pixels of the uncropped frame that camera and crop refer to
_CHUNK = 16  # frames rendered at a time


class SynthClip(NamedTuple):
    """One clip with everything it was made of.

    Attributes:
      frames: the rendered crop.
      coefficients: fields (N, n), float32.
      camera: intrinsics (4,), extrinsics (4, 4); constant in a clip.
      crop: (4,) box x0, y0, x1, y1 in pixels of the 512 x 512 uncropped frame; constant in a clip.
      appearance: that of the identity.
    """

    frames: UInt8[np.ndarray, "N S S 3"]
    coefficients: Coefficients
    camera: Camera
    crop: Float[np.ndarray, " 4"]
    appearance: Appearance


def appearance_for_identity(
    head: HeadAsset, identity_seed: int, mesh: BuiltinMesh | None = None
) -> Appearance:
    """The appearance stored as nothing but the clip table's `identity_seed`.

    `mesh` is `builtin_mesh()`, for callers that sample many and build it once.

    Raises:
      ValueError: `head` is not the built-in head.
    """
    return sample_appearance(identity_seed, head, mesh)


# --- motion ----------------------------------------------------------------------------------------


def _wander(rng: np.random.Generator, n: int, low: float, high: float) -> Float[np.ndarray, " n"]:
    """A smooth process of unit variance with frequencies in [low, high] Hz, sampled at 25 fps."""
    t = np.arange(n) / float(FPS)
    frequency = low * (high / low) ** rng.random(7)
    phase = 2 * np.pi * rng.random(7)
    weight = rng.uniform(0.5, 1.0, 7)
    waves = weight[:, None] * np.sin(2 * np.pi * frequency[:, None] * t + phase[:, None])
    return waves.sum(0) / np.sqrt(0.5 * (weight**2).sum())


def _swing(rng: np.random.Generator, n: int, low: float, high: float, deviation: float, limit: float):
    """A process with the given standard deviation within the clip, softly kept below `limit`."""
    process = _wander(rng, n, low, high)
    process = (process - process.mean()) / max(process.std(), 1e-3)
    offset = 0.35 * deviation * np.clip(rng.standard_normal(), -2, 2)
    return limit * np.tanh((deviation * process + offset) / limit)


def _bursts(
    rng: np.random.Generator, n: int, low: float, high: float, share: float
) -> Float[np.ndarray, " n"]:
    """Smooth bumps in [0, 1] that are up for about `share` of the time."""
    level = _wander(rng, n, low, high)
    threshold = np.quantile(_normal_table(), 1 - share)
    return np.clip((level - threshold) / 1.2, 0.0, 1.0)


def _normal_table():
    """A fixed table of normal quantiles: sums of seven waves are nearly normal."""
    u = (np.arange(200) + 0.5) / 200
    # Tukey's lambda with 0.14 is the normal quantile function to three digits.
    return (u**0.135 - (1 - u) ** 0.135) / 0.1975


def _blinks(rng: np.random.Generator, n: int) -> Float[np.ndarray, " n"]:
    """Lid closure: short blinks, about one in two seconds, shut for one or two frames."""
    closure = np.zeros(n)
    at = int(rng.integers(2, 40))
    while at < n:
        shape = np.array([0.35, 0.9, 1.0, 1.0, 0.6, 0.2] if rng.random() < 0.5 else [0.5, 1.0, 0.8, 0.3])
        span = slice(at, min(at + len(shape), n))
        closure[span] = np.maximum(closure[span], shape[: n - at])
        at += int(rng.integers(22, 80))
    return closure


def _gaze(rng: np.random.Generator, n: int) -> Float[np.ndarray, "n 2"]:
    """Eye pitch and yaw in radians: fixations with quick jumps between them."""
    gaze = np.zeros((n, 2))
    at = 0
    while at < n:
        target = np.clip(rng.standard_normal(2), -2, 2) * (0.07, 0.16)
        gaze[at:] = target
        at += int(rng.integers(8, 40))
    # A saccade takes two frames.
    smooth = gaze.copy()
    smooth[1:] = 0.65 * gaze[1:] + 0.35 * gaze[:-1]
    return smooth


def synth_motion(head: HeadAsset, clip_seed: int, n_frames: int) -> Coefficients:
    """Speech-like motion of `n_frames` frames at 25 fps; `shape` is zero (no identity yet).

    Yaw has a standard deviation of 9 to 13 degrees within the clip and stays within 38, pitch about
    6, roll about 4; 40 % of the head's rotation is in the neck joint. Speech opens the jaw at
    syllable rate with lip shapes; eyes fixate, jump and blink; brows and smiles come and go.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([int(clip_seed), 7])))
    n = n_frames
    degrees = np.stack(
        [
            _swing(rng, n, 0.25, 1.0, rng.uniform(4.0, 7.5), 22.0),
            _swing(rng, n, 0.25, 0.8, rng.uniform(9.0, 13.0), 38.0),
            _swing(rng, n, 0.25, 0.9, rng.uniform(2.5, 5.0), 18.0),
        ],
        -1,
    )
    # The limit takes a little off the swing; yaw is what the measures of pose rest on.
    degrees[:, 1] *= max(1.0, 8.5 / max(degrees[:, 1].std(), 1e-3))
    rotation = np.deg2rad(degrees)
    translation = np.stack([sd * _wander(rng, n, 0.2, 0.8) for sd in (0.006, 0.005, 0.012)], -1)

    speaking = np.clip(0.35 + 0.9 * _bursts(rng, n, 0.3, 0.9, 0.75), 0.0, 1.0)
    syllables = 0.5 + 0.5 * np.sin(
        2 * np.pi * rng.uniform(2.6, 4.2) * np.arange(n) / float(FPS)
        + 1.3 * _wander(rng, n, 0.5, 1.5)
        + rng.uniform(0, 6)
    )
    opening = (
        speaking
        * syllables**1.3
        * rng.uniform(0.45, 1.0)
        * np.clip(0.8 + 0.35 * _wander(rng, n, 0.8, 2.0), 0, 1.4)
    )
    jaw = np.stack([0.26 * opening, 0.012 * _wander(rng, n, 0.5, 2.0), np.zeros(n)], -1)

    blink, gaze = _blinks(rng, n), _gaze(rng, n)
    gaze[:, 1] -= 0.35 * rotation[:, 1]  # eyes stay on the camera while the head turns
    gaze[:, 0] -= 0.35 * rotation[:, 0]
    down, up = np.maximum(gaze[:, 0], 0), np.maximum(-gaze[:, 0], 0)
    weights = dict.fromkeys(head.expression_names, 0.0)

    def both(name, value, asymmetry=0.08):
        tilt = asymmetry * np.clip(rng.standard_normal(), -2, 2)
        weights[f"{name}Left"] = value * (1 + tilt)
        weights[f"{name}Right"] = value * (1 - tilt)

    def speech(share, amount, low=1.0, high=3.0):
        return amount * np.clip(0.25 + speaking, 0, 1) * _bursts(rng, n, low, high, share)

    both("eyeBlink", np.maximum(blink, np.clip(1.3 * down, 0, 0.45)), 0.0)
    both("eyeWide", (1 - blink) * np.clip(0.6 * _bursts(rng, n, 0.2, 0.7, 0.25) + 1.0 * up, 0, 1))
    both("eyeSquint", 0.6 * _bursts(rng, n, 0.2, 0.7, 0.25))
    smile = rng.uniform(0.2, 0.9) * _bursts(rng, n, 0.15, 0.5, 0.4)
    both("mouthSmile", np.clip(smile + speech(0.2, 0.3), 0, 1), 0.15)
    both("cheekSquint", 0.7 * smile)
    brows = _bursts(rng, n, 0.25, 1.0, 0.35)
    weights["browInnerUp"] = np.clip(0.75 * brows + 0.4 * _bursts(rng, n, 0.3, 1.0, 0.2), 0, 1)
    both("browOuterUp", 0.85 * brows, 0.3)
    both("browDown", 0.8 * _bursts(rng, n, 0.2, 0.8, 0.3) * (1 - brows))
    both("noseSneer", 0.5 * _bursts(rng, n, 0.2, 0.8, 0.15))
    weights["jawOpen"] = np.clip(0.85 * opening, 0, 1)
    weights["jawForward"] = 0.5 * _bursts(rng, n, 0.3, 1.0, 0.15)
    for side in ("Left", "Right"):
        weights[f"jaw{side}"] = 0.35 * _bursts(rng, n, 0.3, 1.0, 0.15)
        weights[f"mouth{side}"] = 0.4 * _bursts(rng, n, 0.3, 1.0, 0.15)
    weights["cheekPuff"] = 0.5 * _bursts(rng, n, 0.3, 1.0, 0.10)
    rounded = _bursts(rng, n, 1.0, 2.5, 0.35)
    weights["mouthPucker"] = 0.8 * rounded * (1 - smile)
    weights["mouthFunnel"] = np.clip(speech(0.35, 0.8), 0, 1) * (1 - 0.6 * rounded)
    both("mouthStretch", speech(0.25, 0.6) * (1 - rounded))
    both("mouthFrown", 0.6 * _bursts(rng, n, 0.2, 0.8, 0.2) * (1 - np.clip(2 * smile, 0, 1)))
    both("mouthDimple", 0.5 * _bursts(rng, n, 0.2, 0.8, 0.2))
    both("mouthPress", 0.7 * _bursts(rng, n, 1.0, 2.5, 0.25) * (1 - np.clip(3 * opening, 0, 1)))
    both("mouthUpperUp", speech(0.35, 0.6))
    both("mouthLowerDown", speech(0.35, 0.7))
    weights["mouthRollUpper"] = 0.5 * _bursts(rng, n, 0.5, 2.0, 0.15)
    weights["mouthRollLower"] = 0.5 * _bursts(rng, n, 0.5, 2.0, 0.2)
    weights["mouthShrugUpper"] = 0.5 * _bursts(rng, n, 0.5, 2.0, 0.15)
    weights["mouthShrugLower"] = 0.5 * _bursts(rng, n, 0.5, 2.0, 0.2)
    weights["mouthClose"] = 0.25 * _bursts(rng, n, 0.5, 2.0, 0.2) * np.clip(2 * opening, 0, 1)
    expression = np.stack([np.broadcast_to(weights[name], (n,)) for name in head.expression_names], -1)
    fields = (
        np.zeros((n, head.n_shape)),
        np.clip(expression, head.expression_bounds[:, 0], head.expression_bounds[:, 1]),
        0.6 * rotation,
        translation,
        0.4 * rotation,
        jaw,
        np.concatenate([gaze, np.zeros((n, 1))], -1),
    )
    return Coefficients(*(np.asarray(field, np.float32) for field in fields))


def synth_camera(clip_seed: int) -> Camera:
    """A camera about 1 m in front of the head with a field of view of 20 to 25 degrees."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([int(clip_seed), 8])))
    focal = 0.5 * _FRAME_SIZE / np.tan(0.5 * np.deg2rad(rng.uniform(20.0, 25.0)))
    extrinsics = np.eye(4)
    extrinsics[:3, 3] = rng.uniform(-0.02, 0.02), rng.uniform(-0.02, 0.02), rng.uniform(0.92, 1.12)
    centre = 0.5 * _FRAME_SIZE
    return Camera(np.array([focal, focal, centre, centre], np.float32), extrinsics.astype(np.float32))


# --- clips -----------------------------------------------------------------------------------------


def clip_crop(
    head: HeadAsset, coefficients: Coefficients, camera: Camera, scale: float = 1.2
) -> Float[np.ndarray, " 4"]:
    """One box for the clip, `scale` times the box of the head's vertices over all its frames."""
    pixels = np.asarray(_head_pixels(head, coefficients, camera))
    return np.asarray(crop_box(pixels.reshape(-1, 2), scale), np.float32)


@jax.jit
def _head_pixels(head, coefficients, camera):
    vertices = world_vertices(head, make_identity(head, coefficients.shape[..., :1, :]), coefficients)
    n = vertices.shape[0]
    camera = Camera(
        jax.numpy.broadcast_to(camera.intrinsics, (n, 4)),
        jax.numpy.broadcast_to(camera.extrinsics, (n, 4, 4)),
    )
    pixels = project(camera_from_world(vertices, camera), camera)
    # Vertices outside the mask are replaced by one inside, so that the shape stays fixed.
    mask = mesh_render_mask(head)
    inside = pixels[:, jax.numpy.argmax(mask)]
    return jax.numpy.where(mask[:, None], pixels, inside[:, None])


@functools.partial(jax.jit, static_argnames=("size", "supersample"))
def _render_chunk(head, coefficients, camera, crop, appearance, size, supersample):
    image = render(
        head,
        make_identity(head, coefficients.shape[:1]),
        coefficients,
        camera,
        crop,
        appearance,
        size,
        supersample,
    )
    return (image * 255.0 + 0.5).astype(jax.numpy.uint8)


def render_frames(
    head: HeadAsset,
    coefficients: Coefficients,
    camera: Camera,
    crop: Float[np.ndarray, " 4"],
    appearance: Appearance,
    size: int,
    supersample: int = 2,
) -> UInt8[np.ndarray, "N S S 3"]:
    """Frames of one person (the shape of the first frame is used for all), any number of them.

    Rendered in chunks of one fixed length, so that clips of different lengths share one compilation.
    """
    n = len(coefficients.expression)
    frames = []
    for start in range(0, n, _CHUNK):
        index = np.minimum(np.arange(start, start + _CHUNK), n - 1)
        chunk = Coefficients(*(np.asarray(field)[index] for field in coefficients))
        image = _render_chunk(head, chunk, camera, crop, appearance, size, supersample)
        frames.append(np.asarray(image)[: n - start])
    return np.concatenate(frames)


def synth_clip(
    head: HeadAsset,
    identity_seed: int,
    clip_seed: int,
    n_frames: int,
    size: int,
    supersample: int = 2,
    mesh: BuiltinMesh | None = None,
) -> SynthClip:
    """Render one clip; equal arguments give equal coefficients, camera and crop everywhere.

    `mesh` is `builtin_mesh()`, for callers that make many clips and build it once.

    Raises:
      ValueError: `head` is not the built-in head.
    """
    motion = synth_motion(head, clip_seed, n_frames)
    shape = np.broadcast_to(sample_shape(identity_seed, head), (n_frames, head.n_shape))
    coefficients = motion._replace(shape=np.ascontiguousarray(shape))
    camera = synth_camera(clip_seed)
    crop = clip_crop(head, coefficients, camera)
    appearance = appearance_for_identity(head, identity_seed, mesh)
    frames = render_frames(head, coefficients, camera, crop, appearance, size, supersample)
    return SynthClip(frames, coefficients, camera, crop, appearance)


class _Plan(NamedTuple):
    """What to make; identity i of `seed` has the identity seed 1,000,000 seed + i."""

    seed: int
    first_identity: int
    identities: int
    clips_per_identity: int
    frames: tuple[int, int]
    size: int
    validation: float


def _clips(head: HeadAsset, plan: _Plan, report) -> Iterator[Clip]:
    """All clips of a plan, rendered one after another."""
    n_validation = int(round(plan.validation * plan.identities))
    if plan.validation > 0 and plan.identities > 1:
        n_validation = max(n_validation, 1)
    mesh, done, started = builtin_mesh(), 0, time.monotonic()
    for i in range(plan.identities):
        identity_seed = plan.seed * 1_000_000 + plan.first_identity + i
        split = "validation" if i >= plan.identities - n_validation else "train"
        for k in range(plan.clips_per_identity):
            clip_seed = identity_seed * 1000 + k
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([clip_seed, 9])))
            n_frames = int(rng.integers(plan.frames[0], plan.frames[1] + 1))
            clip = synth_clip(head, identity_seed, clip_seed, n_frames, plan.size, mesh=mesh)
            done += n_frames
            yield Clip(
                clip_id=f"synth-{identity_seed:08d}-{k}",
                identity=f"synth-{identity_seed:08d}",
                fps=FPS,
                split=split,
                source=SOURCE,
                licence="CC0-1.0",
                coefficients=clip.coefficients,
                camera=clip.camera,
                crop=clip.crop,
                images=clip.frames,
                extra={"identity_seed": identity_seed, "clip_seed": clip_seed},
            )
            report(
                i * plan.clips_per_identity + k + 1,
                plan.identities * plan.clips_per_identity,
                done,
                time.monotonic() - started,
            )


def _print_progress(clips: int, total: int, frames: int, seconds: float) -> None:
    left = seconds / clips * (total - clips)
    end = "\n" if clips == total else ""
    print(
        f"\rclip {clips}/{total}, {frames} frames, {frames / max(seconds, 1e-9):.0f} frames/s, "
        f"{left:.0f} s left   ",
        end=end, file=sys.stderr, flush=True,
    )  # fmt: skip


def preview(
    head: HeadAsset, seed: int, first_identity: int, identities: int, columns: int, size: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Contact sheet: one row an identity, `columns` frames spread over a clip of two seconds."""
    mesh, rows = builtin_mesh(), []
    for i in range(identities):
        identity_seed = seed * 1_000_000 + first_identity + i
        clip = synth_clip(head, identity_seed, identity_seed * 1000, 50, size, mesh=mesh)
        rows.append(np.concatenate(list(clip.frames[np.linspace(0, 49, columns).astype(int)]), axis=1))
    return np.concatenate(rows, axis=0)


def _frame_range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    low = int(found[1]) if found else 0
    high = int(found[2] or low) if found else 0
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of frames or a range such as 32..64")
    return low, high


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.synth", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the dataset to make")
    parser.add_argument("--preview", type=Path, help="write a contact sheet to this PNG instead of a dataset")
    parser.add_argument("--identities", type=int, default=64)
    parser.add_argument("--clips-per-identity", type=int, default=2)
    parser.add_argument("--frames", type=_frame_range, default=(32, 64), help="frames a clip: N or A..B")
    parser.add_argument("--size", type=int, default=64, help="side of the stored frames in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--first-identity", type=int, default=0, help="offset of the identities (held-out sets)"
    )
    parser.add_argument(
        "--validation", type=float, default=0.06, help="share of identities in the validation split"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that is already there")
    args = parser.parse_args(argv)
    if (args.out is None) == (args.preview is None):
        parser.error("give either --out DIR or --preview FILE.png")
    for name in ("identities", "clips_per_identity", "size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= args.validation < 1 or not 0 <= args.first_identity < 1_000_000 or args.seed < 0:
        parser.error("--validation must be in [0, 1), --first-identity in [0, 1000000), --seed not negative")
    head = builtin_head()
    if args.preview is not None:
        sheet = preview(head, args.seed, args.first_identity, min(args.identities, 12), 10, args.size)
        args.preview.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(args.preview)
        print(f"wrote {args.preview}")
        return 0
    plan = _Plan(
        args.seed,
        args.first_identity,
        args.identities,
        args.clips_per_identity,
        args.frames,
        args.size,
        args.validation,
    )
    try:
        metadata = write_dataset(
            args.out, head, _clips(head, plan, _print_progress), args.size, overwrite=args.overwrite
        )
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.out}: {metadata.records} frames, head {metadata.head_sha256[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
