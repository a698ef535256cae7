"""From a video to the records of a dataset: decode, track, fit, and crop one clip; build from many."""

from __future__ import annotations

import dataclasses
import functools
import zipfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_prep.dataset import clip_file
from data_prep.dataset.assemble import DatasetOptions, FitClip, RejectedClip, build, work_folder
from data_prep.dataset.clip_file import ClipData
from data_prep.dataset.latents import LatentEncoder
from data_prep.dataset.manifest import PlannedClip, pipeline_identity, plan_clips
from data_prep.dataset.probe import ClipFacts, probe_clip
from data_prep.landmarks.overlay import overlay_frames
from loki_jax.data.writer import encode_image
from loki_jax.face.asset import HeadAsset, load_head
from loki_jax.face.builtin import builtin_head
from loki_jax.face.crop import crop_and_resize
from loki_jax.face.ict import head_from_ict
from loki_jax.fitting.clips import CROP_FACTOR, FittedClip, fit_track
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.points import LANDMARK_SET
from loki_jax.fitting.problem import FitError, FitSettings
from loki_jax.fitting.refine import refine
from loki_jax.fitting.tracking import cut_track, find_face, steady_run
from loki_jax.video.reader import VideoReader
from loki_jax.video.writer import write_video


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
      min_face: clips whose head is smaller, in pixels of the uncropped frames, are rejected.
      max_error: clips whose median inner-face error exceeds this part of the distance of the outer eye
        corners are rejected.
      max_bytes: clips whose decoded frames would not fit in so much memory are rejected.
      max_seconds: only so much of each clip is used; None: all.
      overlay: side of the overlay pictures in pixels; 0: none.
      image_format: "png", "jpeg", or None: PNG up to 128 pixels, JPEG above.
      images: store the pictures; latents alone are made from lossless ones.
      validation: share of identities in the validation split; if there are five or more, at least one.
      identity_from: "file": every file is its own identity; "folder": files of a folder share one.
      licence: licence of the clips, stored with them.
      photometric: refine poses by the pixels (`loki_jax.fitting.refine`).
    """

    size: int = 512
    fps: Fraction = Fraction(25)
    face: int | None = None
    focal: float | None = None
    crop_factor: float = CROP_FACTOR
    min_frames: int = 16
    min_face: float = 64.0
    max_error: float = 0.05
    max_bytes: int = 4 * 2**30
    max_seconds: Fraction | None = None
    overlay: int = 256
    image_format: str | None = None
    images: bool = True
    validation: float = 0.02
    identity_from: str = "file"
    licence: str = "not stated"
    fit: FitSettings = FitSettings()
    photometric: bool = False

    @property
    def stored_format(self) -> str:
        """Image format of the work files."""
        if not self.images:
            return "png"
        return self.image_format or ("png" if self.size <= 128 else "jpeg")

    def of_a_fit(self) -> dict[str, Any]:
        """Everything that the work file of a clip depends on, as JSON."""
        entry = dataclasses.asdict(self)
        for name in ("validation", "identity_from", "licence", "images"):
            del entry[name]
        return entry | {
            "fps": str(self.fps),
            "max_seconds": None if self.max_seconds is None else str(self.max_seconds),
            "image_format": self.stored_format,
            "fit": {k: list(v) if isinstance(v, tuple) else v for k, v in entry["fit"].items()},
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


def fit_clip(path: Path, head: HeadAsset, landmarker: Landmarker, settings: BuildSettings) -> FittedClip:
    """Decode, track and fit one clip: its longest steady run with a visible face.

    Raises:
      MediaError, LandmarkError, FitError: the file cannot be read, shows no face, or does not fit.
      RejectedClip: it is too long for the memory, too short, or badly fitted.
    """
    frames = _decode(path, probe_clip(path), settings)
    frames, track = find_face(landmarker, frames, settings.face, str(path))
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
    if settings.photometric:
        fitted = refine(fitted, head)
    face = float(fitted.crop[2] - fitted.crop[0]) / settings.crop_factor
    if face < settings.min_face:
        raise RejectedClip(
            f"{path}: the head is {face:.0f} pixels large, {settings.min_face:.0f} are needed "
            "(`--min-face`). Use "
            "a clip of higher resolution."
        )
    error = float(np.nanmedian(fitted.fit.error))
    if not error <= settings.max_error:
        raise RejectedClip(
            f"{path}: the head fits badly, median error {100 * error:.1f} % of the outer eye corners' "
            f"distance, limit {100 * settings.max_error:.1f} % (`--max-error`). The face may be hidden or in "
            "profile."
        )
    return fitted


def _decode(path: Path, facts: ClipFacts, settings: BuildSettings) -> list[np.ndarray]:
    """The clip's frames at the rate of the settings, all in memory: the tracker goes both ways."""

    def too_large() -> RejectedClip:
        return RejectedClip(
            f"{path}: its decoded frames ({facts.width}x{facts.height}) take more than "
            f"{settings.max_bytes / 2**30:.1f} GiB. Cut it into shorter clips (or `--max-seconds`), scale "
            "it down, "
            "or raise `--max-memory`."
        )

    seconds = facts.seconds if settings.max_seconds is None else min(facts.seconds, settings.max_seconds)
    if dataclasses.replace(facts, seconds=seconds).decoded_bytes(settings.fps) > settings.max_bytes:
        raise too_large()
    frames, used = [], 0
    with VideoReader(path, settings.fps, stop=settings.max_seconds) as reader:
        for frame in reader:
            frames.append(frame)
            used += frame.nbytes
            if used > settings.max_bytes:  # the file's time stamps promised less
                raise too_large()
    return frames


def make_video_fit(
    head: HeadAsset,
    make_landmarker: Callable[[], Landmarker],
    settings: BuildSettings,
    cache: Path | None,
) -> FitClip:
    """The function that `data_prep.dataset.assemble` applies to every clip of a process.

    Args:
      make_landmarker: loads the landmark networks.
      cache: where compiled functions are kept for the other processes and the next run.
    """
    if cache is not None and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
    landmarker = make_landmarker()

    def fit(clip: PlannedClip, folder: Path) -> ClipData:
        fitted = fit_clip(clip.path, head, landmarker, settings)
        if settings.overlay:
            write_video(
                clip_file.overlay_path(folder, clip.key), overlay_frames(fitted, head, settings.overlay),
                settings.fps, synthetic=False,
            )  # fmt: skip
        images = [
            encode_image(crop_and_resize(frame, fitted.crop, settings.size), settings.stored_format)
            for frame in fitted.frames
        ]
        return ClipData(
            fitted.fit.coefficients, fitted.fit.camera, fitted.crop, fitted.fit.confidence, images,
            _row(fitted, settings.fps, probe_clip(clip.path)),
        )  # fmt: skip

    return fit


def _row(fitted: FittedClip, fps: Fraction, facts: ClipFacts) -> dict[str, Any]:
    error = 100 * fitted.fit.error[np.isfinite(fitted.fit.error)]
    degrees = np.degrees(fitted.fit.coefficients.rot)
    # Deviation from the median of five frames: what the eye sees as trembling.
    padded = np.pad(degrees, ((2, 2), (0, 0)), mode="edge")
    median = np.median([padded[i : i + len(degrees)] for i in range(5)], axis=0)
    return {
        "frames": len(fitted.frames),
        "fps": str(fps),
        "error_percent": round(float(np.median(error)), 3),
        "error_percent_mean": round(float(error.mean()), 3),
        "error_percent_p90": round(float(np.quantile(error, 0.9)), 3),
        "error_pixels": round(float(np.nanmean(fitted.fit.reprojection)), 3),
        "face_share": round(float((fitted.track.score >= 0.5).mean()), 3),
        "faces": int(fitted.track.faces),
        "jitter_degrees": round(float(np.sqrt(((degrees - median) ** 2).mean())), 3),
        "rotation_range_degrees": np.round(np.ptp(degrees, axis=0), 1).tolist(),
        "crop": np.round(fitted.crop, 2).tolist(),
        "video": facts.as_json(),
    }


def build_dataset(
    paths: Sequence[Path],
    head: HeadAsset,
    out: Path,
    make_landmarker: Callable[[], Landmarker],
    settings: BuildSettings = BuildSettings(),
    *,
    models: dict[str, str] | None = None,
    labels: dict[str, dict[str, str]] | None = None,
    encoder: LatentEncoder | None = None,
    workers: int = 0,
    overwrite: bool = False,
    keep_work: bool = False,
    log=print,
) -> dict[str, Any]:
    """Build, continue or extend the dataset `out` and return its summary (also `out/summary.json`).

    Args:
      paths: the clips, in the order of the dataset.
      make_landmarker: loads the landmark networks; called once in each process.
      models: SHA-256 sums of the networks by name, which go into the manifest and the clips' keys.
      labels: identities from a table (`read_labels`).
      encoder: also store its latents.
      workers: processes; 0: this one alone. Otherwise `make_landmarker` must be picklable.
      overwrite, keep_work, log: see `data_prep.dataset.assemble.build`.

    Raises:
      DatasetError: `out` is taken, or no clip could be used (the rejections are in the message).
      FitError: the head has no landmarks to fit.
    """
    if LANDMARK_SET not in head.landmarks:
        raise FitError(
            f"head {head.name!r} has no {LANDMARK_SET!r} landmarks, so nothing can be fitted. "
            "Rebuild the asset with `python -m data_prep.head_asset`."
        )
    made_by = pipeline_identity(head, models or {}, settings.of_a_fit())
    planned = plan_clips(
        paths, made_by, identity_from=settings.identity_from, labels=labels, licence=settings.licence
    )
    options = DatasetOptions(settings.size, settings.stored_format, settings.images, settings.validation)
    cache = work_folder(Path(out)).absolute() / "compiled" if workers else None
    make_fit = functools.partial(make_video_fit, head, make_landmarker, settings, cache)
    return build(
        planned, head, Path(out), make_fit, made_by, options,
        encoder=encoder, workers=workers, overwrite=overwrite, keep_work=keep_work, log=log,
    )  # fmt: skip


def load_landmarker(models: dict[str, Path]) -> Landmarker:
    """The landmark networks, with one thread each: the processes are the parallelism."""
    return Landmarker(models, threads=1)
