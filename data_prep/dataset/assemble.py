"""From clips to a dataset, in parallel, safe to stop at any moment, and continued where it stopped.

Every clip is fitted on its own and becomes a work file in `DIR.work` beside the dataset DIR
(`data_prep.dataset.clip_file`); then the shards are written from the work files in the order of the clips. So
neither the number of processes nor interruptions show in the result. Clips that are in the dataset
already are taken from there when clips are added. How a clip is fitted is the caller's: `data_prep.build`
finds and fits faces, `data_prep.import_fits` reads the fits of others.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

from data_prep.dataset import clip_file
from data_prep.dataset.clip_file import ClipData
from data_prep.dataset.latents import LatentEncoder, stored_latents
from data_prep.dataset.manifest import (
    MANIFEST_FILE,
    PlannedClip,
    choose_splits,
    differences,
    read_manifest,
    versions,
)
from data_prep.dataset.options import DatasetOptions
from data_prep.dataset.summary import OVERLAYS, SECONDS_FILE, SUMMARY_FILE
from data_prep.dataset.workers import Died, Progress, print_line, remove_partials, run_parallel
from loki_jax.data.reader import Dataset, open_dataset
from loki_jax.data.schema import Clip, ClipInfo, DatasetError, Metadata
from loki_jax.data.writer import recover, write_dataset
from loki_jax.face.asset import HeadAsset, HeadAssetError
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.fitting.problem import FitError
from loki_jax.io import file_sha256
from loki_jax.video import MediaError

_LISTED_REJECTIONS = 10


class RejectedClip(ValueError):
    """A clip that can be read, but is not fit for training; the message says why."""


_REJECTIONS = (RejectedClip, MediaError, LandmarkError, FitError, DatasetError, HeadAssetError)

_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # no clip can be stored

# Takes a clip and the folder of work files, where it may leave an overlay video under the clip's key.
FitClip = Callable[[PlannedClip, Path], ClipData]


class Outcome(NamedTuple):
    """What became of a clip: its row of the summary, or the reason for its rejection.

    `transient` reasons (a process that died) are not kept: the next run tries the clip again. `seconds` are
    those that the clip took.
    """

    row: dict[str, Any] | None
    reason: str = ""
    transient: bool = False
    seconds: float = 0.0


class _Rejected(NamedTuple):
    clip: PlannedClip
    reason: str
    transient: bool


def work_folder(out: Path) -> Path:
    """Where the work files of the dataset `out` lie until it is complete."""
    return out.with_name(f"{out.name}.work")


def make_clip_work(make_fit: Callable[[], FitClip], folder: Path) -> Callable[[PlannedClip], Outcome]:
    """The function that a process applies to each clip: fit it and store the result in `folder`."""
    fit = make_fit()

    def work(clip: PlannedClip) -> Outcome:
        began = time.monotonic()
        try:
            data = fit(clip, folder)
            clip_file.save_clip(folder, clip.key, data)
        except _REJECTIONS as error:
            clip_file.save_rejection(folder, clip.key, str(error), clip.path)
            return Outcome(None, str(error))
        except Exception as error:  # one clip that trips over a bug must not cost the others
            if isinstance(error, OSError) and error.errno in _NO_PLACE:
                raise
            return Outcome(None, f"{clip.path}: {type(error).__name__}: {error}", transient=True)
        return Outcome(data.row, seconds=time.monotonic() - began)

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
    log: Callable[[str], object] = print_line,
) -> dict[str, Any]:
    """Build, continue or extend the dataset `out`; returns its summary (also `out/summary.json`).

    Args:
      planned: the clips, in the order of the dataset.
      make_fit: called once in each process; can be pickled if there are workers.
      made_by: what the keys of `planned` were made with.
      encoder: also store its latents of the pictures.
      log: receives lines of progress.

    Raises:
      DatasetError: `out` is taken, another build of it runs, or no clip could be used.
    """
    if not options.images and encoder is None:
        raise DatasetError("records need pictures or latents: give `--latents`, or leave out `--no-images`.")
    folder = work_folder(out)
    if folder.exists() and not folder.is_dir():
        raise DatasetError(f"{folder}: is in the way of the work files. Move it.")
    folder.mkdir(parents=True, exist_ok=True)
    with clip_file.locked(folder) as free:
        if not free:
            raise DatasetError(f"{out}: is being built by another process. Wait for it, or stop it.")
        try:
            recover(out)
            remove_partials(folder)
            finished = _Finished.open(out, options.overwrite)
            task = _Build(planned, head, out, folder, finished, made_by, options, encoder, log)
            return task.run(make_fit)
        finally:
            # Nothing in it: nothing to continue.
            if all(file.name == ".lock" for file in folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _Build:
    """One run of `build`: its arguments, and the dataset that an earlier run completed."""

    planned: Sequence[PlannedClip]
    head: HeadAsset
    out: Path
    folder: Path
    finished: _Finished | None
    made_by: dict[str, Any]
    options: DatasetOptions
    encoder: LatentEncoder | None
    log: Callable[[str], object]

    def run(self, make_fit: Callable[[], FitClip]) -> dict[str, Any]:
        unique, repeated = _without_repetitions(self.planned)
        if self.finished is not None:
            if not self.options.overwrite:
                self.finished.check(unique, self.made_by, self._described())
            if self.finished.is_complete(self.planned, self.made_by, self._described()):
                clips = len(self.finished.manifest["clips"])
                self.log(f"{self.out}: complete already, {clips} clips; nothing to do")
                self._drop_work(self.options.keep_work)
                return self.finished.summary
        for text in repeated.values():
            self.log(f"rejected: {text}")
        transient, seconds = self._fit(unique, make_fit)
        accepted: list[PlannedClip] = []
        rejected: list[_Rejected] = []
        for clip in self.planned:
            if reason := repeated.get(clip.clip_id) or self._rejection(clip):
                rejected.append(_Rejected(clip, reason, transient=False))
            elif clip.key in transient:
                rejected.append(_Rejected(clip, transient[clip.key], transient=True))
            else:
                accepted.append(clip)
        if not accepted:
            self._drop_work()
            lines = [f"\n  {entry.reason}" for entry in rejected]
            if (more := len(lines) - _LISTED_REJECTIONS) > 0:
                lines[_LISTED_REJECTIONS:] = [f"\n  and {more} more"]
            raise DatasetError(
                f"{self.out}: nothing was built, all {len(rejected)} clips were rejected:{''.join(lines)}"
            )
        summary = self._write(accepted, rejected, seconds)
        self._drop_work(self.options.keep_work)
        return summary

    def _described(self) -> dict[str, Any]:
        latents = None if self.encoder is None else self.encoder.sha256
        return self.options.of_the_records() | {"latents_sha256": latents}

    def _fit(
        self, clips: Sequence[PlannedClip], make_fit: Callable[[], FitClip]
    ) -> tuple[dict[str, str], dict[str, float]]:
        """Fit what is not fitted yet.

        Returns:
          By key, the reasons of clips that the next run tries again, and the seconds that fitted ones took.
        """
        todo = [clip for clip in clips if not self._is_done(clip.key)]
        if len(todo) < len(clips):
            self.log(f"{len(clips) - len(todo)} of {len(clips)} clips are done already")
        transient: dict[str, str] = {}
        seconds: dict[str, float] = {}
        progress, frames = Progress(len(todo)), 0
        work = functools.partial(make_clip_work, make_fit, self.folder)
        for index, outcome in run_parallel(work, todo, self.options.workers):
            clip = todo[index]
            if isinstance(outcome, Died):
                outcome = Outcome(None, f"{clip.path}: {outcome}", transient=True)
            if outcome.transient:
                transient[clip.key] = outcome.reason
            progress.advance()
            if outcome.row is None:
                self.log(f"{progress} rejected: {outcome.reason}")
                continue
            frames += outcome.row["frames"]
            seconds[clip.key] = outcome.seconds
            error = outcome.row.get("error_percent")
            fitted = "" if error is None else f"error {error:.2f} %, "
            self.log(
                f"{progress} {clip.clip_id}: {outcome.row['frames']} frames, {fitted}"
                f"{outcome.seconds:.1f} s; {frames / progress.seconds:.1f} frames/s, "
                f"{progress.seconds_left:.0f} s left"
            )
        return transient, seconds

    def _is_done(self, key: str) -> bool:
        """Whether the clip was fitted or rejected before."""
        if clip_file.is_done(self.folder, key):
            return True
        if self.finished is None or key not in self.finished.entries:
            return self.finished is not None and key in self.finished.rejections
        # Its records are there. New latents need the pictures.
        has_images = self.finished.dataset.metadata.image_format is not None
        return has_images or (not self.options.images and self.finished.has_latents(self.encoder))

    def _rejection(self, clip: PlannedClip) -> str | None:
        reason = clip_file.load_rejection(self.folder, clip.key, clip.path)
        if reason is None and self.finished is not None and clip.key in self.finished.rejections:
            reason = clip_file.fill_template(self.finished.rejections[clip.key], clip.path)
        return reason

    def _write(
        self, accepted: list[PlannedClip], rejected: list[_Rejected], seconds: dict[str, float]
    ) -> dict[str, Any]:
        """Write the dataset; returns its summary."""
        options = self.options
        splits = choose_splits(list(dict.fromkeys(clip.identity for clip in accepted)), options.validation)
        rows: list[dict[str, Any]] = []
        summary: dict[str, Any] = {}

        def clips() -> Iterator[Clip]:
            for clip in accepted:
                split = splits[clip.identity]
                stored, row = self._load(clip, split)
                rows.append({"clip": clip.clip_id, "identity": clip.identity, "split": split, **row})
                yield stored

        def finish(partial: Path, table: Sequence[ClipInfo], metadata: Metadata) -> None:
            summary.update(
                records=metadata.records,
                clips=rows,
                rejected=[
                    {"clip": clip.clip_id, "file": str(clip.path), "reason": reason}
                    for clip, reason, _ in rejected
                ],
                settings=self.made_by["settings"] | self._described(),
            )
            manifest = {
                "made_by": self.made_by,
                "options": self._described(),
                "versions": versions(),
                "head": {"name": self.head.name, "sha256": metadata.head_sha256},
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
                    for clip, reason, again in rejected
                ],
            }
            spent = {clip.clip_id: round(seconds[clip.key], 2) for clip in accepted if clip.key in seconds}
            if self.finished is not None:
                spent = self.finished.seconds({clip.key: clip.clip_id for clip in accepted}) | spent
            for name, value in ((SUMMARY_FILE, summary), (MANIFEST_FILE, manifest), (SECONDS_FILE, spent)):
                (partial / name).write_text(json.dumps(value, indent=1) + "\n")
            for clip in accepted:
                self._copy_overlay(clip, partial / OVERLAYS)

        self.log(f"writing {len(accepted)} clips to {self.out}")
        write_dataset(
            self.out, self.head, clips(), options.size, image_format=options.stored_format,
            shard_bytes=options.shard_bytes, overwrite=options.overwrite or self.finished is not None,
            finish=finish,
        )  # fmt: skip
        return summary

    def _load(self, clip: PlannedClip, split: str) -> tuple[Clip, dict[str, Any]]:
        """A clip as it goes into the records, and its row of the summary."""
        labels: dict[str, Any] = {
            "clip_id": clip.clip_id, "identity": clip.identity, "split": split, "source": clip.source,
            "licence": clip.licence,
        }  # fmt: skip
        images: Iterable[bytes] | None
        latents = None
        if (data := clip_file.load_clip(self.folder, clip.key)) is not None:
            row, images = data.row, data.images
            stored = Clip(
                **labels, fps=Fraction(row["fps"]), coefficients=data.coefficients, camera=data.camera,
                crop=data.crop, images=None, confidence=data.confidence,
                fit_quality=row.get("error_pixels"),
                extra={"error_percent": row["error_percent"]} if "error_percent" in row else {},
            )  # fmt: skip
        elif self.finished is not None and clip.key in self.finished.entries:
            stored, row = self.finished.clip(clip.key)
            images = cast("Iterable[bytes] | None", stored.images)  # of a dataset: encoded
            if self.finished.has_latents(self.encoder):
                latents = stored.latent_mean, stored.latent_logvar
        else:
            raise DatasetError(
                f"{clip.path}: its work file was damaged and has been removed. Run the same command again."
            )
        if self.encoder is not None and latents is None and images is not None:
            latents = stored_latents(self.encoder, images, self.folder, clip.key)
        mean, logvar = latents or (None, None)
        images = images if self.options.images else None
        stored = dataclasses.replace(stored, **labels, images=images, latent_mean=mean, latent_logvar=logvar)
        return stored, row

    def _copy_overlay(self, clip: PlannedClip, overlays: Path) -> None:
        source = clip_file.overlay_path(self.folder, clip.key)
        if not source.is_file() and self.finished is not None and clip.key in self.finished.entries:
            source = self.finished.dataset.path / OVERLAYS / f"{self.finished.entries[clip.key]['clip']}.mp4"
        if not source.is_file():
            return
        overlays.mkdir(exist_ok=True)
        target = overlays / f"{clip.clip_id}.mp4"
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, target)

    def _drop_work(self, keep: bool = False) -> None:
        for file in () if keep else self.folder.iterdir():
            if file.name != ".lock":  # which stays until its holder is through
                shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)


def _without_repetitions(planned: Sequence[PlannedClip]) -> tuple[list[PlannedClip], dict[str, str]]:
    """The clips with each content once, and by name why the others are left out."""
    first: dict[str, PlannedClip] = {}
    repeated = {}
    for clip in planned:
        if (earlier := first.setdefault(clip.key, clip)) is not clip:
            repeated[clip.clip_id] = (
                f"{clip.path}: has the same content as {earlier.path.name}, which stands for it. "
                "Remove one of them."
            )
    return list(first.values()), repeated


@dataclasses.dataclass(frozen=True)
class _Finished:
    """A dataset that an earlier run completed.

    Attributes:
      entries: of the manifest's clips, by key.
      rejections: reasons that hold for the next run too, as templates, by key.
    """

    dataset: Dataset
    summary: dict[str, Any]
    manifest: dict[str, Any]
    entries: dict[str, dict[str, Any]]
    rejections: dict[str, str]

    @classmethod
    def open(cls, out: Path, overwrite: bool) -> _Finished | None:
        """The dataset at `out`; None if nothing is there, or nothing that can be used and may go."""
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return None
        try:
            manifest = read_manifest(out)
            if manifest is None:
                raise DatasetError(
                    f"{out}: exists already and was not made by this program. Choose another folder, or "
                    "replace it with `--overwrite`."
                )
            dataset = open_dataset(out)
            summary = json.loads((out / SUMMARY_FILE).read_text())
            entries = {entry["key"]: entry for entry in manifest["clips"]}
            rejections: dict[str, str] = {}
            for entry in manifest["rejected"]:
                # Repetitions have the key of the clip that is used.
                if not entry.get("transient") and entry["key"] not in entries:
                    rejections.setdefault(entry["key"], entry["reason"])
            lists = [row["clip"] for row in summary["clips"]], [entry["clip"] for entry in entries.values()]
            if any({clip.clip_id for clip in dataset.clips} != set(names) for names in lists):
                raise ValueError("the lists of clips differ")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if overwrite:
                return None
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(
                f"{out}: damaged, its summary does not fit ({error}). Build it again with `--overwrite`."
            ) from error
        return cls(dataset, summary, manifest, entries, rejections)

    def check(self, planned: Sequence[PlannedClip], made_by: dict, described: dict) -> None:
        """Raises DatasetError where extending the dataset would change or lose something that is in it."""
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
                f"{out}: holds {len(missing)} clips that are not among those given, such as {missing[0]!r}. "
                "Give all clips to extend it, or leave these out with `--overwrite`."
            )

    def is_complete(self, planned: Sequence[PlannedClip], made_by: dict, described: dict) -> bool:
        """Whether it is exactly what these clips would give."""
        entries = [*self.manifest["clips"], *self.manifest["rejected"]]
        if self.manifest["made_by"] != made_by or self.manifest["options"] != described:
            return False
        if any(entry.get("transient") for entry in entries):
            return False
        wanted = {clip.clip_id: clip.as_json() for clip in planned}
        held = {e["clip"]: {name: e[name] for name in wanted.get(e["clip"], {})} for e in entries}
        names = [entry["clip"] for entry in self.manifest["clips"]]
        return wanted == held and names == [name for name in wanted if name in set(names)]

    def seconds(self, names: dict[str, str]) -> dict[str, float]:
        """What clips took, as far as it is known; `names` are those that they have now, by key."""
        try:
            stored = json.loads((self.dataset.path / SECONDS_FILE).read_text())
            known = {
                names[key]: stored.get(entry["clip"]) for key, entry in self.entries.items() if key in names
            }
        except (OSError, ValueError, AttributeError):
            return {}
        return {name: value for name, value in known.items() if value is not None}

    def has_latents(self, encoder: LatentEncoder | None) -> bool:
        return encoder is not None and self.manifest["options"].get("latents_sha256") == encoder.sha256

    def clip(self, key: str) -> tuple[Clip, dict[str, Any]]:
        """The clip with this key, and its row of the summary without labels."""
        name = self.entries[key]["clip"]
        info = next(clip for clip in self.dataset.clips if clip.clip_id == name)
        row = next(row for row in self.summary["clips"] if row["clip"] == name)
        row = {k: v for k, v in row.items() if k not in ("clip", "identity", "split")}
        return self.dataset.stored_clip(info), row
