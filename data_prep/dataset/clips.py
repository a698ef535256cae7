"""From a video to the records of a dataset: decode, track, fit, and crop one clip; build from many."""

from __future__ import annotations

import dataclasses
import functools
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_prep.dataset import clip_file
from data_prep.dataset.assemble import FitClip, RejectedClip, build, work_folder
from data_prep.dataset.clip_file import ClipData
from data_prep.dataset.latents import chosen_encoder
from data_prep.dataset.manifest import PlannedClip, pipeline_identity, plan_clips
from data_prep.dataset.options import BuildOptions
from data_prep.dataset.probe import ClipFacts, probe_clip
from data_prep.dataset.summary import jitter_degrees
from data_prep.dataset.workers import print_line
from data_prep.landmarks.overlay import overlay_frames
from loki_jax.data.writer import encode_image
from loki_jax.face.asset import HeadAsset, load_head
from loki_jax.face.builtin import builtin_head
from loki_jax.face.crop import crop_and_resize
from loki_jax.face.ict import head_from_ict
from loki_jax.fitting.clips import FittedClip, fit_track
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.points import LANDMARK_SET
from loki_jax.fitting.problem import FitError, FitSettings
from loki_jax.fitting.refine import refine
from loki_jax.fitting.tracking import cut_track, find_face, steady_run
from loki_jax.io import file_sha256
from loki_jax.video import LazyFrames, write_video


def settings_of_fit(options: BuildOptions) -> dict[str, Any]:
    """Everything that the work file of a clip depends on, as JSON."""
    fit = dataclasses.asdict(FitSettings(fov=options.fov))
    seconds = options.max_seconds
    return {
        "size": options.size,
        "fps": str(options.fps),
        "face": options.face,
        "focal": options.focal,
        "crop_factor": options.crop_factor,
        "min_frames": options.min_frames,
        "min_face": options.min_face,
        "max_error": options.max_error / 100,
        "max_seconds": None if seconds is None else str(seconds),
        "overlay": options.overlay,
        "image_format": options.stored_format,
        "fit": {name: list(value) if isinstance(value, tuple) else value for name, value in fit.items()},
        "photometric": options.photometric,
    }


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


def fit_clip(path: Path, head: HeadAsset, landmarker: Landmarker, options: BuildOptions) -> FittedClip:
    """Track and fit one clip: its longest steady run with a visible face.

    The frames are decoded when they are asked for.

    Raises:
      MediaError, LandmarkError, FitError: the file cannot be read, shows no face, or does not fit.
      RejectedClip: it is too short, or badly fitted.
    """
    decoded = LazyFrames(path, options.fps, stop=options.max_seconds)
    frames, track = find_face(landmarker, decoded, options.face, str(path))
    start, stop = steady_run(track)
    if stop - start < options.min_frames:
        raise RejectedClip(
            f"{path}: the face is visible for {stop - start} frames in a row, "
            f"{options.min_frames} are needed (`--min-frames`). Use a longer clip."
        )
    fitted = fit_track(
        frames[start:stop], options.fps, cut_track(track, start, stop), head, focal=options.focal,
        crop_factor=options.crop_factor, settings=FitSettings(fov=options.fov), name=str(path),
    )  # fmt: skip
    if options.photometric:
        fitted = refine(fitted, head)
    face = float(fitted.crop[2] - fitted.crop[0]) / options.crop_factor
    if face < options.min_face:
        raise RejectedClip(
            f"{path}: the head is {face:.0f} pixels large, {options.min_face:.0f} are needed "
            "(`--min-face`). Use a clip of higher resolution."
        )
    error = 100 * float(np.nanmedian(fitted.fit.error))
    if not error <= options.max_error:
        raise RejectedClip(
            f"{path}: the head fits badly, median error {error:.1f} % of the outer eye corners' distance, "
            f"limit {options.max_error:.1f} % (`--max-error`). The face may be hidden or in profile."
        )
    return fitted


def make_video_fit(
    head: HeadAsset, make_landmarker: Callable[[], Landmarker], options: BuildOptions, cache: Path | None
) -> FitClip:
    """The function that `data_prep.dataset.assemble` applies to every clip of a process.

    Args:
      make_landmarker: loads the landmark networks.
      cache: where compiled functions are kept for the other processes and the next run.
    """
    if cache is not None and jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
    landmarker = make_landmarker()

    def fit(clip: PlannedClip, folder: Path) -> ClipData:
        fitted = fit_clip(clip.path, head, landmarker, options)
        if options.overlay:
            drawn = overlay_frames(fitted, head, options.overlay)
            write_video(clip_file.overlay_path(folder, clip.key), drawn, options.fps, synthetic=False)
        images = (
            encode_image(crop_and_resize(frame, fitted.crop, options.size), options.stored_format)
            for frame in fitted.frames
        )
        row = _row(fitted, probe_clip(clip.path))
        return ClipData(
            fitted.fit.coefficients, fitted.fit.camera, fitted.crop, fitted.fit.confidence, images, row
        )

    return fit


def _row(fitted: FittedClip, facts: ClipFacts) -> dict[str, Any]:
    error = 100 * fitted.fit.error[np.isfinite(fitted.fit.error)]
    degrees = np.degrees(fitted.fit.coefficients.rot)
    rounded = lambda value: round(float(value), 3)
    return {
        "frames": len(fitted.frames),
        "fps": str(fitted.fps),
        "error_percent": rounded(np.median(error)),
        "error_percent_mean": rounded(error.mean()),
        "error_percent_p90": rounded(np.quantile(error, 0.9)),
        "error_pixels": rounded(np.nanmean(fitted.fit.reprojection)),
        "face_share": rounded((fitted.track.score >= 0.5).mean()),
        "faces": int(fitted.track.faces),
        "jitter_degrees": rounded(jitter_degrees(degrees)),
        "rotation_range_degrees": np.round(np.ptp(degrees, axis=0), 1).tolist(),
        "crop": np.round(fitted.crop, 2).tolist(),
        "video": facts.as_json(),
    }


def build_dataset(
    paths: Sequence[Path],
    head: HeadAsset,
    out: Path,
    make_landmarker: Callable[[], Landmarker],
    options: BuildOptions,
    models: dict[str, Path] | None = None,
    log: Callable[[str], object] = print_line,
) -> dict[str, Any]:
    """Build, continue or extend the dataset `out` and return its summary (also `out/summary.json`).

    Args:
      paths: the clips, in the order of the dataset.
      make_landmarker: loads the landmark networks; called once in each process, picklable if there are
        several.
      models: files of the networks by name, whose SHA-256 go into the manifest and the clips' keys.
      log: receives lines of progress.

    Raises:
      DatasetError: `out` is taken, or no clip could be used (the rejections are in the message).
      FitError: the head has no landmarks to fit.
    """
    if LANDMARK_SET not in head.landmarks:
        raise FitError(
            f"head {head.name!r} has no {LANDMARK_SET!r} landmarks, so nothing can be fitted. "
            "Rebuild the asset with `python -m data_prep.head_asset`."
        )
    sums = {name: file_sha256(path) for name, path in (models or {}).items()}
    made_by = pipeline_identity(head, sums, settings_of_fit(options))
    planned = plan_clips(paths, made_by, options)
    cache = work_folder(out).absolute() / "compiled" if options.workers else None
    make_fit = functools.partial(make_video_fit, head, make_landmarker, options, cache)
    return build(planned, head, out, make_fit, made_by, options, encoder=chosen_encoder(options), log=log)


def load_landmarker(models: dict[str, Path]) -> Landmarker:
    """The landmark networks, with one thread each: the processes are the parallelism."""
    return Landmarker(models, threads=1)
