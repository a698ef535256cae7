"""The inputs of a manifest: square drivers and portraits that any system can be given (docs/evaluation.md).

A folder of a manifest holds manifest.json, drivers/SOURCE.mp4, references/SOURCE.png (the first frame of the
source), and for rendered samples truths/SAMPLE.mp4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import builtin_head
from loki_jax.face.crop import crop_and_resize
from loki_jax.face.types import Camera, Coefficients
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.fitting.tracking import Track, clip_landmarks
from loki_jax.io import atomic_path, file_sha256
from loki_jax.protocols.manifest import Manifest, ManifestError, Sample, Source
from loki_jax.synthetic.appearance import sample_appearance, sample_shape
from loki_jax.synthetic.clips import clip_crop, render_frames, synth_camera
from loki_jax.synthetic.motion import synth_motion
from loki_jax.video import LazyFrames, write_video
from loki_jax.video.frames import PICTURES

CRF = 10  # of inputs: better than what is visible, so that the codec is not measured

_SIDE = 2.0  # of the crop over the longer side of the landmarks' box
_RISE = 0.08  # of the crop's side: hair reaches further than the chin
_CAMERA_SEED = 0


def find_sources(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the clips and of the pictures in a folder, in alphabetical order.

    Raises:
      ManifestError: no such folder.
    """
    if not folder.is_dir():
        raise ManifestError(f"{folder}: no such folder. Name the one that holds clips and portraits.")
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    pictures = [name for name in names if Path(name).suffix.lower() in PICTURES]
    clips = [name for name in names if Path(name).suffix.lower() in (".mp4", ".mov", ".mkv", ".webm", ".avi")]
    return clips, pictures


def measure_source(
    folder: Path,
    name: str,
    identity: str,
    landmarker: Landmarker,
    fps: Fraction,
    frames: int | None = None,
    lively: bool = False,
) -> Source:
    """A file as a source: which of its frames, and the square of them that is used.

    Args:
      frames: length of the window; None: the whole clip.
      lively: of all windows the one in which the landmarks move most; else the first.

    Raises:
      MediaError, LandmarkError: unreadable, or no face.
      ManifestError: the clip is too short, or its face is not visible in all frames.
    """
    pictures = LazyFrames(folder / name, fps)
    wanted = len(pictures) if frames is None else frames
    if Path(name).suffix.lower() in PICTURES:
        wanted = 1
    if len(pictures) < wanted:
        raise ManifestError(f"{name}: {len(pictures)} frames at {fps} fps, {wanted} are needed")
    # The beginning is enough, unless its face is lost.
    for looked_at in [pictures] if lively else [pictures[:wanted], pictures]:
        try:
            track = clip_landmarks(landmarker, looked_at, name=name)
        except LandmarkError:
            if looked_at is pictures or wanted == len(pictures):
                raise
            continue
        starts = _whole_windows(track, wanted)
        if starts:
            break
    else:
        raise ManifestError(f"{name}: no {wanted} frames in a row show the face without a cut")
    points = track.points[:, :468, :2].astype(np.float64)
    start = max(starts, key=lambda s: _movement(points[s : s + wanted])) if lively else starts[0]
    crop = square_around(points[start : start + wanted], looked_at[0].shape[:2])
    return Source(Path(name).stem, identity, wanted, name, file_sha256(folder / name), start, crop)


def _whole_windows(track: Track, wanted: int) -> list[int]:
    """Where windows begin that show the face in every frame, without a cut."""
    seen, cut = track.score >= 0.5, np.zeros(len(track.score), bool)
    cut[track.cuts] = True
    ends = range(wanted, len(seen) + 1)
    return [
        end - wanted
        for end in ends
        if seen[end - wanted : end].all() and not cut[end - wanted + 1 : end].any()
    ]


def _movement(points: Float[np.ndarray, "n k 2"]) -> float:
    return float(points.std(0).mean() / np.ptp(points, axis=1).mean())


def square_around(points: Float[np.ndarray, "n k 2"], extent: tuple[int, int]) -> tuple[int, int, int, int]:
    """The square x0, y0, x1, y1 around the landmarks of all frames, inside a picture of (height, width)."""
    low, high = points.min((0, 1)), points.max((0, 1))
    side = min(round(_SIDE * float((high - low).max())), *extent)
    corner = (low + high) / 2 - side / 2 - np.array([0, _RISE * side])
    x, y = np.clip(corner.round().astype(int), 0, np.array(extent[::-1]) - side)
    return int(x), int(y), int(x) + side, int(y) + side


def one_per_identity(names: Iterable[str], identities: dict[str, str], seed: int) -> list[str]:
    """One clip of each identity, drawn by the seed; a clip without an entry is its own identity."""
    rng = np.random.Generator(np.random.PCG64(seed))
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(identities.get(name, Path(name).stem), []).append(name)
    return [group[int(rng.integers(len(group)))] for _, group in sorted(groups.items())]


def synthetic_samples(
    protocol: str, people: int, frames: int, seed: int
) -> tuple[list[Source], list[Sample]]:
    """Rendered heads: each of `people` moves by another one's "expression" at fixed pose, or "pose" at fixed
    expression.
    """
    first = 1_000_000 * (seed + 1)
    sources = [
        Source(
            f"{protocol}-{person}", f"synthetic-{first + person}", frames,
            identity_seed=first + person, motion_seed=first + person, moves=protocol,
        )
        for person in range(people)
    ]  # fmt: skip
    samples = [
        Sample(f"{protocol}-{k}-by-{(k + 1) % people}", protocol, sources[k].name, other.name)
        for k, other in enumerate(sources[1:] + sources[:1])
    ]
    return sources, samples


def true_motion(head: HeadAsset, source: Source) -> tuple[Coefficients, Camera]:
    """Exact coefficients (n, ...) and camera of a rendered source, for the built-in head."""
    if source.identity_seed is None or source.motion_seed is None:
        raise ValueError(f"{source.name}: is no rendered source")
    motion = synth_motion(head, source.motion_seed, source.frames)
    still = jax.tree.map(np.zeros_like, motion)
    if source.moves == "expression":
        motion = still._replace(expression=motion.expression, jaw=motion.jaw, eyes=motion.eyes)
    else:
        motion = still._replace(rot=motion.rot, tra=motion.tra, neck=motion.neck)
    betas = np.broadcast_to(sample_shape(source.identity_seed, head), motion.betas.shape)
    return motion._replace(betas=np.ascontiguousarray(betas)), synth_camera(_CAMERA_SEED)


def true_animation(head: HeadAsset, reference: Source, driver: Source) -> Coefficients:
    """The reference's head with the driver's motion.

    Rendered heads have one rest pose and one camera, so no retargeting is needed.
    """
    betas = true_motion(head, reference)[0].betas
    motion = true_motion(head, driver)[0]
    return motion._replace(betas=np.broadcast_to(betas[:1], (len(motion.rot), betas.shape[1])))


def _rendered(
    head: HeadAsset, person: Source, coefficients: Coefficients, manifest: Manifest
) -> UInt8[np.ndarray, "n s s 3"]:
    """Renders of a person; the box is that of all its animations."""
    camera = synth_camera(_CAMERA_SEED)
    if person.identity_seed is None:
        raise ValueError(f"{person.name}: is no rendered source")
    appearance = sample_appearance(person.identity_seed, head)
    drivers = {person.name} | {s.driver for s in manifest.samples if s.reference == person.name}
    crops = [
        clip_crop(head, true_animation(head, person, manifest.sources[name]), camera, 1.5) for name in drivers
    ]
    low, high = np.min(crops, axis=0)[:2], np.max(crops, axis=0)[2:]
    middle, half = (low + high) / 2, (high - low).max() / 2
    crop = np.concatenate([middle - half, middle + half]).astype(np.float32)
    return render_frames(head, coefficients, camera, crop, appearance, manifest.size)


def write_inputs(manifest: Manifest, sources: Path | None, out: Path) -> Manifest:
    """Write drivers, references and truths to the folder `out`; the result names their SHA-256.

    Files that are there are kept, so that a stopped run goes on.

    Raises:
      ManifestError: a file of the sources is missing or has other content than the manifest says.
    """
    drivers = {sample.driver for sample in manifest.samples}
    references = {sample.reference for sample in manifest.samples}
    head = builtin_head() if any(not source.file for source in manifest.sources.values()) else None
    for name in sorted(drivers | references):
        video, picture = driver_file(out, name), reference_file(out, name)
        if (name not in drivers or video.exists()) and (name not in references or picture.exists()):
            continue
        source = manifest.sources[name]
        frames = iter(source_frames(manifest, source, sources, head))
        first = next(frames)
        if name in references:
            with atomic_path(picture) as partial:
                Image.fromarray(first).save(partial)
        if name in drivers:
            video.parent.mkdir(parents=True, exist_ok=True)
            write_video(video, _after(first, frames), manifest.fps, synthetic=not source.file, crf=CRF)
    for sample in manifest.samples:
        reference, driver = manifest.sources[sample.reference], manifest.sources[sample.driver]
        path = out / "truths" / f"{sample.name}.mp4"
        if reference.file or path.exists() or head is None:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        truth = _rendered(head, reference, true_animation(head, reference, driver), manifest)
        write_video(path, truth, manifest.fps, crf=CRF)
    written = sorted(p for kind in ("drivers", "references", "truths") for p in (out / kind).glob("*.*"))
    wanted = {str(p.relative_to(out)): file_sha256(p) for p in written if not p.name.startswith(".")}
    return dataclasses.replace(manifest, inputs=wanted)


def _after(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest


def source_frames(
    manifest: Manifest, source: Source, folder: Path | None, head: HeadAsset | None
) -> Iterable[UInt8[np.ndarray, "s s 3"]]:
    """The square frames of a source.

    Raises:
      ManifestError: its file is missing or another one.
    """
    if not source.file:
        head = builtin_head() if head is None else head
        return _rendered(head, source, true_motion(head, source)[0], manifest)
    if folder is None:
        raise ManifestError(f"{source.file}: give the folder that holds it (--sources)")
    path = folder / source.file
    if not path.is_file():
        raise ManifestError(f"{path}: no such file. Give the folder that holds it (--sources).")
    if file_sha256(path) != source.sha256:
        raise ManifestError(f"{path}: its content is not that of the manifest. Give the same file.")
    pictures = LazyFrames(path, manifest.fps)[source.start : source.start + source.frames]
    if len(pictures) < source.frames:
        raise ManifestError(f"{path}: {len(pictures)} frames where the manifest has {source.frames}.")
    box = np.array(source.crop, np.float64)
    return pictures.map(lambda frame: crop_and_resize(frame, box, manifest.size))


def driver_file(folder: Path, source: str) -> Path:
    """Where the folder of a manifest has the driver of a source."""
    return folder / "drivers" / f"{source}.mp4"


def reference_file(folder: Path, source: str) -> Path:
    """Where it has the portrait of a source."""
    return folder / "references" / f"{source}.png"


def truth_file(manifest: Manifest, folder: Path, sample: Sample) -> Path | None:
    """Where it has the frames that a perfect animation shows; None: nobody knows them."""
    if sample.protocol == "same":
        return driver_file(folder, sample.driver)
    path = folder / "truths" / f"{sample.name}.mp4"
    return None if manifest.sources[sample.reference].file else path


def check_inputs(manifest: Manifest, folder: Path) -> None:
    """See that the inputs are there and are those that the manifest names.

    Raises:
      ManifestError: one is missing or has other content.
    """
    if not manifest.inputs:
        raise ManifestError(
            f"{folder}: the manifest has no inputs. Write them: `python -m loki_jax.manifest --frozen "
            "MANIFEST --sources FOLDER --out FOLDER`."
        )
    for name, digest in manifest.inputs.items():
        path = folder / name
        if not path.is_file() or file_sha256(path) != digest:
            state = "has other content than the manifest says" if path.is_file() else "is missing"
            raise ManifestError(f"{path}: {state}. Make the folder again with `python -m loki_jax.manifest`.")
