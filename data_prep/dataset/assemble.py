"""From clips to a dataset, in parallel, safe to stop at any moment, and continued where it stopped.

Every clip is fitted on its own and becomes a work file in `DIR.work` beside the dataset DIR
(`data_prep.dataset.clip_file`); then the shards are written from the work files in the order of the clips. So
neither the number of processes nor interruptions show in the result. Clips that are in the dataset
already are taken from there when clips are added. How a clip is fitted is the caller's: `data_prep.build`
finds and fits faces, `data_prep.import_fits` reads the fits of others.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from data_prep.dataset import clip_file
from data_prep.dataset.clip_file import ClipData
from data_prep.dataset.latents import LatentEncoder, encode_clip
from data_prep.dataset.manifest import (
    MANIFEST_FILE,
    PlannedClip,
    choose_splits,
    differences,
    read_manifest,
    versions,
)
from data_prep.dataset.workers import Died, run_parallel
from loki_jax.data.reader import Dataset, open_dataset
from loki_jax.data.schema import Clip, DatasetError
from loki_jax.data.writer import recover, write_dataset
from loki_jax.face.asset import HeadAsset, HeadAssetError
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.fitting.problem import FitError
from loki_jax.io import atomic_path, file_sha256
from loki_jax.video.reader import MediaError

SUMMARY_FILE = "summary.json"

OVERLAYS = "overlays"

_LISTED_REJECTIONS = 10


class RejectedClip(ValueError):
    """A clip that can be read, but is not fit for training; the message says why."""


_REJECTIONS = (RejectedClip, MediaError, LandmarkError, FitError, DatasetError, HeadAssetError)

# Takes a clip and the folder of work files, where it may leave an overlay video under the clip's key.
FitClip = Callable[[PlannedClip, Path], ClipData]


@dataclasses.dataclass(frozen=True)
class DatasetOptions:
    """What the records hold and how clips are divided; none of it changes a fit.

    Attributes:
      image_size: side of the stored pictures in pixels.
      image_format: "png" or "jpeg", that of `ClipData.images`.
      images: store the pictures; without them, an encoder must be given.
      validation: share of identities in the validation split; with five or more there is at least one.
      shard_bytes: size at which a shard is closed.
    """

    image_size: int
    image_format: str
    images: bool = True
    validation: float = 0.02
    shard_bytes: int = 256 * 2**20


class Outcome(NamedTuple):
    """What became of a clip: its row of the summary, or the reason for its rejection.

    `transient` reasons (a process that died) are not kept: the next run tries the clip again.
    """

    row: dict[str, Any] | None
    reason: str = ""
    transient: bool = False


def work_folder(out: Path) -> Path:
    """Where the work files of the dataset `out` lie until it is complete."""
    return out.with_name(f"{out.name}.work")


def make_clip_work(make_fit: Callable[[], FitClip], folder: Path) -> Callable[[PlannedClip], Outcome]:
    """The function that a process applies to each clip: fit it and store the result in `folder`."""
    fit = make_fit()

    def work(clip: PlannedClip) -> Outcome:
        try:
            data = fit(clip, folder)
        except _REJECTIONS as error:
            clip_file.save_rejection(folder, clip.key, str(error), clip.path)
            return Outcome(None, str(error))
        except Exception as error:  # one clip that trips over a bug must not cost the others
            return Outcome(None, f"{clip.path}: {type(error).__name__}: {error}", transient=True)
        clip_file.save_clip(folder, clip.key, data)
        return Outcome(data.row)

    return work


def build(
    planned: Sequence[PlannedClip],
    head: HeadAsset,
    out: Path,
    make_fit: Callable[[], FitClip],
    made_by: dict[str, Any],
    options: DatasetOptions,
    *,
    encoder: LatentEncoder | None = None,
    workers: int = 0,
    overwrite: bool = False,
    keep_work: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Build, continue or extend the dataset `out`; returns its summary (also `out/summary.json`).

    Args:
      planned: the clips, in the order of the dataset.
      make_fit: called once in each process; can be pickled if `workers` > 0.
      made_by: what the keys of `planned` were made with.
      encoder: also store its latents of the pictures.
      workers: processes; 0: none but this one.
      overwrite: make `out` anew from these clips whatever it holds. Without it, a dataset built with the
        same settings is extended, if all its clips are among `planned`.
      keep_work: leave the work files.
      say: receives lines of progress.

    Raises:
      DatasetError: `out` is taken, another build of it runs, or no clip could be used.
    """
    if not options.images and encoder is None:
        raise DatasetError("records need pictures or latents: give `--latents`, or leave out `--no-images`.")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = work_folder(out)
    if folder.exists() and not folder.is_dir():
        raise DatasetError(f"{folder}: is in the way of the work files. Move it.")
    folder.mkdir(exist_ok=True)
    with clip_file.locked(folder) as free:
        if not free:
            raise DatasetError(f"{out}: is being built by another process. Wait for it, or stop it.")
        try:
            return _build_locked(
                planned,
                head,
                out,
                folder,
                make_fit,
                made_by,
                options,
                encoder,
                workers,
                overwrite,
                keep_work,
                log,
            )
        finally:
            # Nothing in it: nothing to continue.
            if all(file.name == ".lock" for file in folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)


def _build_locked(
    planned, head, out, folder, make_fit, made_by, options, encoder, workers, overwrite, keep_work, log
):
    recover(out)
    clip_file.remove_partials(folder)
    unique, repeated = _without_repetitions(planned)
    described = _described(options, encoder)
    finished = _Finished.open(out, overwrite)
    if finished is not None:
        finished.check(unique, made_by, described, overwrite)
        if finished.is_complete(planned, made_by, described):
            log(f"{out}: complete already, {len(finished.manifest['clips'])} clips; nothing to do")
            summary = json.loads((out / SUMMARY_FILE).read_text())
            _drop_work(folder, keep_work)
            return summary

    # ------------------------------------------------------------------------------------ fit clips
    todo = [
        clip
        for clip in unique
        if not clip_file.is_done(folder, clip.key)
        and not (finished is not None and finished.serves(clip.key, options, encoder))
    ]
    if len(todo) < len(unique):
        log(f"{len(unique) - len(todo)} of {len(unique)} clips are done already")
    for reason in repeated.values():
        log(f"rejected: {reason}")
    transient: dict[str, str] = {}
    progress = _Progress(len(todo), log)
    make_work = functools.partial(make_clip_work, make_fit, folder)
    for index, outcome in run_parallel(make_work, todo, workers):
        clip = todo[index]
        if isinstance(outcome, Died):
            outcome = Outcome(None, f"{clip.path}: {outcome}", transient=True)
        if outcome.transient:
            transient[clip.key] = outcome.reason
        progress.report(clip, outcome)

    # ------------------------------------------------------------------------------- write the shards
    # By key, reason and whether the next run tries again; repeated clips share the key of the first.
    rejected: dict[str, tuple[str, bool]] = {key: (reason, True) for key, reason in transient.items()}
    accepted = []
    for clip in unique:
        reason = clip_file.load_rejection(folder, clip.key, clip.path)
        if reason is None and finished is not None:
            reason = finished.rejection(clip)
        if reason is not None:
            rejected[clip.key] = (reason, False)
        elif clip.key not in transient:
            accepted.append(clip)
    rows_of_rejected = []
    for clip in planned:
        if clip.clip_id in repeated:
            rows_of_rejected.append((clip, repeated[clip.clip_id], False))
        elif clip.key in rejected:
            rows_of_rejected.append((clip, *rejected[clip.key]))
    if not accepted:
        reasons = [reason for _, reason, _ in rows_of_rejected]
        shown = "".join(f"\n  {reason}" for reason in reasons[:_LISTED_REJECTIONS])
        more = (
            f"\n  and {len(reasons) - _LISTED_REJECTIONS} more" if len(reasons) > _LISTED_REJECTIONS else ""
        )
        _drop_work(folder, keep=False)
        raise DatasetError(f"{out}: nothing was built, all {len(reasons)} clips were rejected:{shown}{more}")
    splits = choose_splits(list(dict.fromkeys(clip.identity for clip in accepted)), options.validation)
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}

    def clips() -> Iterator[Clip]:
        for clip in accepted:
            stored, row = _load(clip, folder, finished, options, encoder)
            split = splits[clip.identity]
            rows.append({"clip": clip.clip_id, "identity": clip.identity, "split": split, **row})
            yield dataclasses.replace(
                stored, clip_id=clip.clip_id, identity=clip.identity, split=split, source=clip.source,
                licence=clip.licence,
            )  # fmt: skip

    def finish(partial: Path, table, metadata) -> None:
        summary.update(
            records=metadata.records,
            clips=rows,
            rejected=[
                {"clip": clip.clip_id, "file": str(clip.path), "reason": reason}
                for clip, reason, _ in rows_of_rejected
            ],
            settings=made_by["settings"] | described,
        )
        (partial / SUMMARY_FILE).write_text(json.dumps(summary, indent=1) + "\n")
        manifest = {
            "made_by": made_by,
            "options": described,
            "versions": versions(),
            "head": {"name": head.name, "sha256": metadata.head_sha256},
            "records": metadata.records,
            "shards": {
                name: {"records": count, "bytes": size, "sha256": file_sha256(partial / name)}
                for name, (count, size) in metadata.shards.items()
            },
            "clips": [
                clip.as_json()
                | {"split": info.split, "frames": info.length, "first_record": info.first_record}
                for clip, info in zip(accepted, table, strict=True)
            ],
            "rejected": [
                clip.as_json()
                | {"reason": clip_file.template_of(reason, clip.path)}
                | ({"transient": True} if again else {})
                for clip, reason, again in rows_of_rejected
            ],
        }
        (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")
        for clip in accepted:
            _copy_overlay(clip, folder, finished, partial)

    log(f"writing {len(accepted)} clips to {out}")
    write_dataset(
        out, head, clips(), options.image_size, image_format=options.image_format,
        shard_bytes=options.shard_bytes, overwrite=overwrite or finished is not None, finish=finish,
    )  # fmt: skip
    _drop_work(folder, keep_work)
    return summary


def _described(options: DatasetOptions, encoder: LatentEncoder | None) -> dict[str, Any]:
    return dataclasses.asdict(options) | {"latents_sha256": None if encoder is None else encoder.sha256}


def _without_repetitions(planned: Sequence[PlannedClip]) -> tuple[list[PlannedClip], dict[str, str]]:
    """The clips with each content once, and by name why the others are left out."""
    first: dict[str, PlannedClip] = {}
    repeated = {}
    for clip in planned:
        if (earlier := first.setdefault(clip.key, clip)) is not clip:
            repeated[clip.clip_id] = (
                f"{clip.path}: has the same content as {earlier.path.name}, which stands for it. Remove "
                "one of "
                "them."
            )
    return list(first.values()), repeated


def _drop_work(folder: Path, keep: bool) -> None:
    if keep:
        return
    # The lock stays until its holder is through.
    for file in folder.iterdir():
        if file.name != ".lock":
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class _Finished:
    """A dataset that an earlier run completed."""

    dataset: Dataset
    manifest: dict[str, Any]
    rows: dict[str, dict[str, Any]]  # of the summary, by key
    entries: dict[str, dict[str, Any]]  # of the manifest, by key

    @classmethod
    def open(cls, out: Path, overwrite: bool) -> _Finished | None:
        """The dataset at `out`; None if nothing is there, or nothing that can be used and may go."""
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return None
        try:
            manifest = read_manifest(out)
            if manifest is None:
                if overwrite:
                    return None
                raise DatasetError(
                    f"{out}: exists already and was not made by this program. Choose another folder, or "
                    "replace it with `--overwrite`."
                )
            dataset = open_dataset(out)
            summary = json.loads((out / SUMMARY_FILE).read_text())
            by_clip = {row["clip"]: row for row in summary["clips"]}
            entries = {entry["key"]: entry for entry in manifest["clips"]}
            rows = {key: by_clip[entry["clip"]] for key, entry in entries.items()}
            if {row.clip_id for row in dataset.clips} != set(by_clip):
                raise ValueError("the lists of clips differ")
        except DatasetError:
            if overwrite:
                return None
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            if overwrite:
                return None
            raise DatasetError(
                f"{out}: damaged, its summary does not fit ({error}). Build it again with `--overwrite`."
            ) from error
        return cls(dataset, manifest, rows, entries)

    def check(self, planned, made_by, described, overwrite: bool) -> None:
        """Raises DatasetError where extending the dataset would change or lose something that is in it."""
        if overwrite:
            return
        out = self.dataset.path
        changed = differences(made_by, self.manifest["made_by"]) + differences(
            {**described, "validation": None}, {**self.manifest["options"], "validation": None}
        )
        if changed:
            raise DatasetError(
                f"{out}: was built with other settings ({'; '.join(changed[:4])}). Choose another folder, or "
                "build it anew with `--overwrite`."
            )
        keys = {clip.key for clip in planned}
        missing = [entry["clip"] for key, entry in self.entries.items() if key not in keys]
        if missing:
            raise DatasetError(
                f"{out}: holds {len(missing)} clips that are not among those given, such as "
                f"{missing[0]!r}. Give "
                "all clips to extend it, or leave these out with `--overwrite`."
            )

    def is_complete(self, planned, made_by, described) -> bool:
        """Whether it is exactly what these clips would give."""
        if self.manifest["made_by"] != made_by or self.manifest["options"] != described:
            return False
        entries = [*self.manifest["clips"], *self.manifest["rejected"]]
        if any(entry.get("transient") for entry in entries):
            return False
        wanted = {clip.clip_id: clip.as_json() for clip in planned}
        held = {
            entry["clip"]: {name: entry[name] for name in wanted.get(entry["clip"], {})} for entry in entries
        }
        order = [
            clip.clip_id for clip in planned if clip.clip_id in {e["clip"] for e in self.manifest["clips"]}
        ]
        return wanted == held and order == [entry["clip"] for entry in self.manifest["clips"]]

    def rejection(self, clip: PlannedClip) -> str | None:
        for entry in self.manifest["rejected"]:
            # Without their keys: repetitions, which have the key of the clip that is used.
            if entry["key"] == clip.key and not entry.get("transient") and clip.key not in self.entries:
                return clip_file.fill_template(entry["reason"], clip.path)
        return None

    def serves(self, key: str, options: DatasetOptions, encoder: LatentEncoder | None) -> bool:
        """Whether the clip's records can be taken from here, or it was rejected here."""
        if key in self.entries:
            has_images = self.dataset.metadata.image_format is not None
            return has_images or (not options.images and self.has_latents(encoder))
        return any(e["key"] == key and not e.get("transient") for e in self.manifest["rejected"])

    def has_latents(self, encoder: LatentEncoder | None) -> bool:
        return encoder is not None and self.manifest["options"].get("latents_sha256") == encoder.sha256

    def clip(self, key: str) -> Clip:
        name = self.entries[key]["clip"]
        return self.dataset.stored_clip(next(row for row in self.dataset.clips if row.clip_id == name))


def _load(
    clip: PlannedClip,
    folder: Path,
    finished: _Finished | None,
    options: DatasetOptions,
    encoder: LatentEncoder | None,
) -> tuple[Clip, dict[str, Any]]:
    """A clip as it goes into the records, and its row of the summary."""
    data = clip_file.load_clip(folder, clip.key)
    if data is not None:
        row, images = data.row, data.images
        stored = Clip(
            clip_id=clip.clip_id, identity=clip.identity, fps=Fraction(row["fps"]), split="train",
            source=clip.source, licence=clip.licence, coefficients=data.coefficients, camera=data.camera,
            crop=data.crop, images=None, confidence=data.confidence, fit_quality=row.get("error_pixels"),
            extra={"error_percent": row["error_percent"]} if "error_percent" in row else {},
        )  # fmt: skip
        mean = logvar = None
    elif finished is not None and clip.key in finished.entries:
        stored = finished.clip(clip.key)
        images = None if stored.images is None else list(stored.images)
        row = {k: v for k, v in finished.rows[clip.key].items() if k not in ("clip", "identity", "split")}
        mean, logvar = stored.latent_mean, stored.latent_logvar
        if not finished.has_latents(encoder):
            mean = logvar = None
    else:
        raise DatasetError(
            f"{clip.path}: its work file was damaged and has been removed. Run the same command again."
        )
    if encoder is not None and mean is None:
        mean, logvar = _latents(clip, images, folder, encoder)
    stored = dataclasses.replace(
        stored, images=images if options.images else None, latent_mean=mean, latent_logvar=logvar
    )
    return stored, row


def _latents(clip: PlannedClip, images: Sequence[bytes], folder: Path, encoder: LatentEncoder):
    """The clip's latents, from a work file if an earlier run left one."""
    path = folder / f"{clip.key}.{encoder.sha256[:12]}.latents"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                return tuple(file[name].view(ml_dtypes.bfloat16) for name in ("mean", "logvar"))
        except (OSError, ValueError, KeyError):
            path.unlink(missing_ok=True)
    mean, logvar = encode_clip(encoder, images)
    arrays = {"mean": mean.view(np.uint16), "logvar": logvar.view(np.uint16)}
    with atomic_path(path, durable=True) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
    return mean, logvar


def _copy_overlay(clip: PlannedClip, folder: Path, finished: _Finished | None, partial: Path) -> None:
    source = clip_file.overlay_path(folder, clip.key)
    if not source.is_file() and finished is not None and clip.key in finished.entries:
        source = finished.dataset.path / OVERLAYS / f"{finished.entries[clip.key]['clip']}.mp4"
    if not source.is_file():
        return
    target = partial / OVERLAYS / f"{clip.clip_id}.mp4"
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


class _Progress:
    """Says one line a clip: what became of it, the rate so far, the time left."""

    def __init__(self, total: int, log: Callable[[str], None]):
        self._total, self._say, self._done, self._frames = total, log, 0, 0
        self._started = time.monotonic()

    def report(self, clip: PlannedClip, outcome: Outcome) -> None:
        self._done += 1
        seconds = max(time.monotonic() - self._started, 1e-9)
        left = seconds / self._done * (self._total - self._done)
        head = f"[{self._done}/{self._total}]"
        if outcome.row is None:
            self._say(f"{head} rejected: {outcome.reason}")
            return
        self._frames += outcome.row["frames"]
        error = outcome.row.get("error_percent")
        fitted = "" if error is None else f"error {error:.2f} %, "
        self._say(
            f"{head} {clip.clip_id}: {outcome.row['frames']} frames, {fitted}"
            f"{self._frames / seconds:.1f} frames/s, {left:.0f} s left"
        )
