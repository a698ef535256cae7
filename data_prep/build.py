"""Real clips to shards: decode, landmarks, fit, one crop box a clip, records, and a picture of each fit.

    python -m data_prep.build --clips FILES_OR_FOLDERS... --head HEAD.npz --out DIR [--size 512]

DIR becomes a dataset (`loki_jax.data.records`) with two additions: `overlays/CLIP.mp4`, the mesh drawn
over each clip, and `summary.json`, how good each fit is and which clips were rejected and why. HEAD
is a head asset, the ICT-FaceKit arrays, or the word builtin. A clip that cannot be used is listed and
left out; the program fails only if none can. DIR appears complete or not at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.face_track import (
    CROP_FACTOR,
    FittedClip,
    cut_track,
    fit_image,
    fit_track,
    fit_video,
    steady_run,
)
from data_prep.fit import LANDMARK_SET, FitError, FitSettings
from data_prep.landmarker import Landmarker, LandmarkError, clip_landmarks, fetch_models
from data_prep.overlay import overlay_frames
from loki_jax.data.records import Clip, DatasetError, assign_split, write_dataset
from loki_jax.head.asset import HeadAsset, HeadAssetError, load_head
from loki_jax.head.builtin import builtin_head
from loki_jax.head.camera import crop_and_resize
from loki_jax.head.ict import head_from_ict
from loki_jax.video import MediaError, VideoReader, resample_indices, write_video

__all__ = ["build_dataset", "fit_image", "fit_video", "load_any_head", "main"]

_VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts")
_SUMMARY = "summary.json"
_OVERLAYS = "overlays"


class RejectedClip(ValueError):
    """A clip that can be read and fitted, but is not fit for training; the message says why."""


@dataclasses.dataclass(frozen=True)
class BuildSettings:
    """What `build_dataset` does with each clip.

    Attributes:
      size: side of the stored frames in pixels.
      fps: rate that clips are resampled to.
      face: which face of a clip, by size times presence; None: the most prominent.
      focal: focal length in pixels of the uncropped frames; None: from `fit.fov`.
      crop_factor: side of the crop box over the longer side of the head over the whole clip.
      min_frames: shorter runs with a visible face are rejected.
      max_error: clips whose median inner-face error exceeds this part of the distance of the outer eye
        corners are rejected.
      max_bytes: clips whose decoded frames would not fit in so much memory are rejected.
      overlay: side of the overlay pictures in pixels; 0: none.
      image_format: "png", "jpeg", or None: PNG up to 128 pixels, JPEG above.
      validation: share of identities in the validation split; if there are five or more, at least one.
      identity_from: "file": every file is its own identity; "folder": files of a folder share one.
      licence: licence of the clips, stored with them.
    """

    size: int = 512
    fps: Fraction = Fraction(25)
    face: int | None = None
    focal: float | None = None
    crop_factor: float = CROP_FACTOR
    min_frames: int = 16
    max_error: float = 0.05
    max_bytes: int = 4 * 2**30
    overlay: int = 256
    image_format: str | None = None
    validation: float = 0.02
    identity_from: str = "file"
    licence: str = "not stated"
    fit: FitSettings = FitSettings()


def load_any_head(source: str) -> HeadAsset:
    """The head asset in a file, the ICT-FaceKit arrays converted to one, or "builtin".

    Raises:
      HeadAssetError: the file is missing, damaged or something else.
    """
    if source == "builtin":
        return builtin_head()
    try:
        with zipfile.ZipFile(source) as archive:
            names = set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        names = set()  # load_head says what is wrong
    return head_from_ict(source) if "identity_modes.npy" in names else load_head(source)


def find_clips(sources: Sequence[str]) -> list[Path]:
    """Files as given, and the videos in folders, in order of their names; no file twice.

    Raises:
      MediaError: a source does not exist, or there is no video at all.
    """
    found: dict[Path, None] = {}
    for source in map(Path, sources):
        if not source.exists():
            raise MediaError(f"{source}: no such file or folder. Check `--clips`.")
        inside = sorted(source.rglob("*")) if source.is_dir() else [source]
        for path in inside:
            if not source.is_dir() or (path.is_file() and path.suffix.lower() in _VIDEO_SUFFIXES):
                found.setdefault(path.resolve(), None)
    if not found:
        raise MediaError(
            f"{', '.join(sources)}: no videos there ({', '.join(_VIDEO_SUFFIXES)}). Check `--clips`."
        )
    return list(found)


def clip_names(paths: Sequence[Path]) -> list[str]:
    """A name for each file: its stem, with as many parent folders as it takes to tell them apart."""
    names = []
    for path in paths:
        depth = 1
        rivals = [other for other in paths if other != path]
        parts = path.with_suffix("").parts
        while depth < len(parts) and any(
            other.with_suffix("").parts[-depth:] == parts[-depth:] for other in rivals
        ):
            depth += 1
        names.append("--".join(parts[-depth:]))
    # Files that differ in their suffix only.
    return [
        f"{name}{path.suffix.replace('.', '-')}" if names.count(name) > 1 else name
        for name, path in zip(names, paths, strict=True)
    ]


def choose_splits(identities: Sequence[str], share: float) -> dict[str, str]:
    """Identity -> split, a fixed function of the name; with five identities or more both splits occur."""
    splits = {identity: assign_split(identity, share) for identity in identities}
    if share > 0 and len(splits) >= 5 and "validation" not in splits.values():
        # The identity that would cross over first if the share grew.
        threshold = {
            i: next(k for k in range(1, 1001) if assign_split(i, k / 1000) == "validation") for i in splits
        }
        splits[min(splits, key=lambda i: (threshold[i], i))] = "validation"
    return splits


def fit_clip(path: Path, head: HeadAsset, landmarker: Landmarker, settings: BuildSettings) -> FittedClip:
    """Decode, track and fit one clip: its longest steady run with a visible face.

    Raises:
      MediaError, LandmarkError, FitError: the file cannot be read, shows no face, or does not fit.
      RejectedClip: it is too long for the memory, too short, or badly fitted.
    """
    frames = _decode(path, settings)
    track = clip_landmarks(landmarker, frames, settings.face, str(path))
    start, stop = steady_run(track)
    if stop - start < settings.min_frames:
        raise RejectedClip(
            f"{path}: the face is visible for {stop - start} frames in a row, "
            f"{settings.min_frames} are needed (`--min-frames`). Use a longer clip."
        )
    fitted = fit_track(
        frames[start:stop], settings.fps, cut_track(track, start, stop), head,
        focal=settings.focal, crop_factor=settings.crop_factor, settings=settings.fit, name=str(path),
    )  # fmt: skip
    error = float(np.nanmedian(fitted.fit.error))
    if not error <= settings.max_error:
        raise RejectedClip(
            f"{path}: the head fits badly, median error {100 * error:.1f} % of the outer eye corners' "
            f"distance, limit {100 * settings.max_error:.1f} % (`--max-error`). The face may be hidden or in "
            "profile."
        )
    return fitted


def _decode(path: Path, settings: BuildSettings) -> list[np.ndarray]:
    frames, used = [], 0
    with VideoReader(path) as reader:
        for frame in reader:
            frames.append(frame)
            used += frame.nbytes
            if used > settings.max_bytes:
                raise RejectedClip(
                    f"{path}: more than {settings.max_bytes / 2**30:.1f} GiB of decoded frames "
                    f"({frame.shape[1]}x{frame.shape[0]}). Cut it into shorter clips, scale it down, or "
                    "raise `--max-memory`."
                )
        indices = resample_indices(len(frames), reader.fps, settings.fps)
    return [frames[i] for i in indices]


def build_dataset(
    paths: Sequence[Path],
    head: HeadAsset,
    out: Path,
    landmarker: Landmarker,
    settings: BuildSettings = BuildSettings(),
    *,
    overwrite: bool = False,
    say=print,
) -> dict[str, Any]:
    """Build the dataset `out` and return its summary (also `out/summary.json`).

    Args:
      paths: the clips.
      say: receives one line for each clip, with rate and time left.

    Raises:
      DatasetError: `out` is taken, or no clip could be used (the rejections are in the message).
      FitError: the head has no landmarks to fit.
    """
    if LANDMARK_SET not in head.landmarks:
        raise FitError(
            f"head {head.name!r} has no {LANDMARK_SET!r} landmarks, so nothing can be fitted. "
            "Rebuild the asset with `python -m data_prep.head_asset`."
        )
    names = clip_names(paths)
    identities = [
        path.parent.name if settings.identity_from == "folder" else name
        for path, name in zip(paths, names, strict=True)
    ]
    splits = choose_splits(list(dict.fromkeys(identities)), settings.validation)
    accepted: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    image_format = settings.image_format or ("png" if settings.size <= 128 else "jpeg")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.overlays.", dir=out.parent) as scratch:

        def clips() -> Iterator[Clip]:
            started = time.monotonic()
            for index, (path, name, identity) in enumerate(zip(paths, names, identities, strict=True)):
                clip_started = time.monotonic()
                try:
                    fitted = fit_clip(path, head, landmarker, settings)
                except (MediaError, LandmarkError, FitError, RejectedClip) as error:
                    rejected.append({"clip": name, "file": str(path), "reason": str(error)})
                    say(f"[{index + 1}/{len(paths)}] rejected: {error}")
                    continue
                if settings.overlay:
                    write_video(
                        Path(scratch) / f"{name}.mp4", overlay_frames(fitted, head, settings.overlay),
                        settings.fps, synthetic=False,
                    )  # fmt: skip
                row = _row(fitted, name, splits[identity], head)
                yield Clip(
                    clip_id=name,
                    identity=identity,
                    fps=settings.fps,
                    split=splits[identity],
                    source=path.name,
                    licence=settings.licence,
                    coefficients=fitted.fit.coefficients,
                    camera=fitted.fit.camera,
                    crop=fitted.crop,
                    images=(crop_and_resize(frame, fitted.crop, settings.size) for frame in fitted.frames),
                    confidence=fitted.fit.confidence,
                    fit_quality=float(np.nanmean(fitted.fit.reprojection)),
                    extra={"error_percent": row["error_percent"]},
                )
                # Resumed here once the records of this clip are written.
                now = time.monotonic()
                row["seconds"] = round(now - clip_started, 1)
                accepted.append(row)
                left = (now - started) / (index + 1) * (len(paths) - index - 1)
                say(
                    f"[{index + 1}/{len(paths)}] {name}: {row['frames']} frames, "
                    f"error {row['error_percent']:.2f} %, "
                    f"{row['frames'] / max(now - clip_started, 1e-9):.1f} frames/s, {left:.0f} s left"
                )

        try:
            metadata = write_dataset(
                out, head, clips(), settings.size, image_format=image_format, overwrite=overwrite
            )
        except DatasetError as error:
            if rejected and not accepted:
                reasons = "".join(f"\n  {entry['reason']}" for entry in rejected)
                raise DatasetError(
                    f"{out}: nothing was built, all {len(rejected)} clips were rejected:{reasons}"
                ) from error
            raise
        summary = {
            "records": metadata.records,
            "clips": accepted,
            "rejected": rejected,
            "settings": dataclasses.asdict(settings) | {"fps": str(settings.fps)},
        }
        if settings.overlay:
            (out / _OVERLAYS).mkdir()
            for picture in sorted(Path(scratch).iterdir()):
                shutil.move(picture, out / _OVERLAYS / picture.name)
        (out / _SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _row(fitted: FittedClip, name: str, split: str, head: HeadAsset) -> dict[str, Any]:
    error = 100 * fitted.fit.error[np.isfinite(fitted.fit.error)]
    degrees = np.degrees(fitted.fit.coefficients.rot)
    # Deviation from the median of five frames: what the eye sees as trembling.
    padded = np.pad(degrees, ((2, 2), (0, 0)), mode="edge")
    median = np.median([padded[i : i + len(degrees)] for i in range(5)], axis=0)
    return {
        "clip": name,
        "split": split,
        "frames": len(fitted.frames),
        "error_percent": round(float(np.median(error)), 3),
        "error_percent_mean": round(float(error.mean()), 3),
        "error_percent_p90": round(float(np.quantile(error, 0.9)), 3),
        "error_pixels": round(float(np.nanmean(fitted.fit.reprojection)), 3),
        "face_share": round(float((fitted.track.score >= 0.5).mean()), 3),
        "jitter_degrees": round(float(np.sqrt(((degrees - median) ** 2).mean())), 3),
        "rotation_range_degrees": np.round(np.ptp(degrees, axis=0), 1).tolist(),
        "crop": np.round(fitted.crop, 2).tolist(),
    }


def format_table(summary: dict[str, Any]) -> str:
    """The accepted clips and their errors, then the rejected ones, as text."""
    rows = [("clip", "split", "frames", "error %", "p90 %", "jitter deg", "face", "s")]
    for row in summary["clips"]:
        rows.append(
            (row["clip"], row["split"], str(row["frames"]), f"{row['error_percent']:.2f}",
             f"{row['error_percent_p90']:.2f}", f"{row['jitter_degrees']:.2f}",
             f"{100 * row['face_share']:.0f} %",
             f"{row['seconds']:.1f}")
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines += [f"rejected  {entry['reason']}" for entry in summary["rejected"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    default = BuildSettings()
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clips", nargs="+", required=True, help="video files, or folders with videos")
    parser.add_argument("--head", required=True, help="head asset, ICT-FaceKit arrays, or builtin")
    parser.add_argument("--out", type=Path, required=True, help="folder of the dataset to make")
    parser.add_argument("--size", type=int, default=default.size, help="side of the stored frames in pixels")
    parser.add_argument("--fps", type=Fraction, default=default.fps, help="frame rate, e.g. 25 or 30000/1001")
    parser.add_argument("--face", type=int, help="which face, 0 the most prominent (the default)")
    parser.add_argument("--focal", type=float, help="focal length in pixels (default: from --fov)")
    parser.add_argument(
        "--fov", type=float, default=default.fit.fov, help="field of view of the longer side, degrees"
    )
    parser.add_argument("--crop-factor", type=float, default=default.crop_factor)
    parser.add_argument("--min-frames", type=int, default=default.min_frames)
    parser.add_argument(
        "--max-error", type=float, default=100 * default.max_error, help="percent; see summary.json"
    )
    parser.add_argument(
        "--max-memory", type=float, default=default.max_bytes / 2**30, help="GiB of frames a clip"
    )
    parser.add_argument(
        "--overlay", type=int, default=default.overlay, help="side of the overlay videos, 0: none"
    )
    parser.add_argument(
        "--image-format", choices=("png", "jpeg"), help="default: png up to 128 pixels, jpeg above"
    )
    parser.add_argument(
        "--validation", type=float, default=default.validation, help="share of identities held out"
    )
    parser.add_argument("--identity-from", choices=("file", "folder"), default=default.identity_from)
    parser.add_argument("--licence", default=default.licence, help="licence of the clips, stored with them")
    parser.add_argument(
        "--wheel", help="the mediapipe 0.10.21 wheel, where the landmark models cannot be downloaded"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that is already there")
    args = parser.parse_args(argv)
    if args.size < 8 or args.fps <= 0 or args.crop_factor <= 0 or args.min_frames < 1 or args.overlay < 0:
        parser.error(
            "--size must be at least 8, --fps, --crop-factor and --min-frames positive, "
            "--overlay not negative"
        )
    if not 0 < args.fov < 150 or (args.focal is not None and args.focal <= 0) or not 0 <= args.validation < 1:
        parser.error("--fov must be in (0, 150), --focal positive, --validation in [0, 1)")
    settings = BuildSettings(
        size=args.size,
        fps=args.fps,
        face=args.face,
        focal=args.focal,
        crop_factor=args.crop_factor,
        min_frames=args.min_frames,
        max_error=args.max_error / 100,
        max_bytes=int(args.max_memory * 2**30),
        overlay=args.overlay,
        image_format=args.image_format,
        validation=args.validation,
        identity_from=args.identity_from,
        licence=args.licence,
        fit=FitSettings(fov=args.fov),
    )
    try:
        paths = find_clips(args.clips)
        head = load_any_head(args.head)
        landmarker = Landmarker(fetch_models(args.wheel))
        summary = build_dataset(
            paths, head, args.out, landmarker, settings, overwrite=args.overwrite,
            say=lambda line: print(line, flush=True),
        )  # fmt: skip
    except (MediaError, HeadAssetError, LandmarkError, FitError, DatasetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(summary))
    print(f"wrote {args.out}: {len(summary['clips'])} clips, {sum(summary['records'].values())} frames")
    return 0


if __name__ == "__main__":
    sys.exit(main())
