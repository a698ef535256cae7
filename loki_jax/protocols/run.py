"""All samples of a manifest measured, one after another, in a folder that a stopped run goes on from.

The folder holds settings.json, metrics.jsonl (one row for each sample and system; with shards one file for
each), videos/SYSTEM/SAMPLE.mp4 of what was made here, motions/SYSTEM/SAMPLE.npz as they were read, and
features/ for FVD.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loki_jax.io import atomic_path, write_json
from loki_jax.protocols.manifest import Manifest, ManifestError, Sample
from loki_jax.protocols.measure import Judge
from loki_jax.protocols.systems import Frames
from loki_jax.video import write_video


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the videos of a system come from: a folder of them, or the system itself."""

    folder: Path | None = None
    animate: Callable[[Sample], Frames] | None = None


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n", i from 1 to n.

    Raises:
      ValueError: anything else.
    """
    first, slash, count = text.partition("/")
    if not (slash and first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise ValueError(f"--shard {text}: expected i/n with i from 1 to n, such as 1/4")
    return int(first), int(count)


def claim_folder(out: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder of the results, or see that one that is there is of the same settings.

    Raises:
      ManifestError: it holds results of other settings.
    """
    path, wanted = out / "settings.json", json.loads(json.dumps(settings))
    if not path.exists():
        write_json(path, wanted)
        return
    found = json.loads(path.read_text())
    different = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
    if different:
        key = different[0]
        raise ManifestError(
            f"{out}: holds results with {key} = {found.get(key)!r}, this run has {wanted.get(key)!r}. "
            "Name another folder."
        )


def read_rows(out: Path) -> list[dict[str, Any]]:
    """All rows of a folder, the last one of each sample and system; half a line, of a process that was
    killed, is left out.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(out.glob("metrics*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows[row["system"], row["sample"]] = row
    return list(rows.values())


def measure_all(
    manifest: Manifest,
    judge: Judge,
    systems: Mapping[str, Source],
    out: Path,
    shard: tuple[int, int] = (1, 1),
) -> bool:
    """Measure what is not measured yet; true when nothing is left, of this shard or another.

    Raises:
      ManifestError: a folder of videos lacks one of a sample.
      MediaError: a video cannot be read.
    """
    number, count = shard
    todo = [(sample, system) for sample in manifest.samples[number - 1 :: count] for system in systems]
    for sample, system in todo:
        folder = systems[system].folder
        if folder is not None and not (folder / f"{sample.name}.mp4").is_file():
            raise ManifestError(
                f"{folder}: has no {sample.name}.mp4. Make it from the inputs of the manifest."
            )
    log = out / ("metrics.jsonl" if count == 1 else f"metrics-{number}of{count}.jsonl")
    measured = {(row["sample"], row["system"]) for row in read_rows(out)}
    todo = [(sample, system) for sample, system in todo if (sample.name, system) not in measured]
    for position, (sample, system) in enumerate(todo, 1):
        began = time.monotonic()
        video = _find_video(sample, system, systems[system], manifest, out)
        motion = out / "motions" / system / f"{sample.name}.npz"
        row, features = judge.measure(sample, video, motion)
        if features is not None:
            _save(out / "features" / system / f"{sample.name}.npy", features)
            _save(out / "features" / "drivers" / f"{sample.driver}.npy", judge.driver_features(sample.driver))
        _append(log, {"system": system} | row)
        shown = "no face" if row["failed"] else f"HPF {row['hpf']:.2f}, HEF {row['hef']:.4f}"
        seconds = time.monotonic() - began
        print(f"[{position}/{len(todo)}] {sample.name}, {system}: {shown} ({seconds:.0f} s)", flush=True)
    for source in {sample.driver for sample in manifest.samples[number - 1 :: count]}:
        _keep_driver(judge, source, out)
    every = {(sample.name, system) for sample in manifest.samples for system in systems}
    return every <= {(row["sample"], row["system"]) for row in read_rows(out)}


def _find_video(sample: Sample, system: str, source: Source, manifest: Manifest, out: Path) -> Path:
    """The video of a system, made if it is not there."""
    if source.folder is not None:
        return source.folder / f"{sample.name}.mp4"
    path = out / "videos" / system / f"{sample.name}.mp4"
    if not path.exists():
        if source.animate is None:
            raise ManifestError(f"{system}: neither a folder of videos nor a system that makes them")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, source.animate(sample), manifest.fps)
    return path


def _keep_driver(judge: Judge, source: str, out: Path) -> None:
    from loki_jax.face.motion_file import write_motion

    path = out / "motions" / "drivers" / f"{source}.npz"
    if not path.exists():
        head = judge.tools.head
        write_motion(path, head, judge.driver(source).motion(head, judge.manifest.fps))


def _save(path: Path, values: np.ndarray) -> None:
    if not path.exists():
        with atomic_path(path) as partial:
            np.save(partial, values)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    """One line, on the disk before the next sample begins."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # of a process that was killed
                file.write(b"\n")
        file.write((json.dumps(row, allow_nan=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def warn_unfinished(manifest: Manifest, systems: Mapping[str, Source], out: Path) -> None:
    """Say on the error stream how much other processes still have to measure."""
    every = len(manifest.samples) * len(systems)
    print(f"{every - len(read_rows(out))} of {every} rows are left to other shards", file=sys.stderr)
