"""Which clips make up a dataset, under which names and identities, and what was used to make it.

`manifest.json` in a dataset's folder holds all of that, with SHA-256 sums of clips, models, head and
shards. A clip's key is a hash of its content and of everything that its fit depends on: work that
carries the same key need not be done again.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import loki_jax
from data_prep.dataset.options import VIDEO_SUFFIXES, DatasetOptions
from loki_jax.data.schema import SCHEMA_VERSION, DatasetError, assign_split
from loki_jax.face.asset import HeadAsset, save_head
from loki_jax.io import file_sha256
from loki_jax.video import MediaError

MANIFEST_FILE = "manifest.json"

# Of what `data_prep.build` does with a clip. Raise it when the same clip would give other records.
PIPELINE_VERSION = 3

_PACKAGES = (
    "jax", "jaxlib", "numpy", "scipy", "av", "opencv-python-headless", "ai-edge-litert", "array_record"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PlannedClip:
    """A clip to be built.

    Attributes:
      path: the file.
      clip_id: its name in the dataset.
      identity: who it shows.
      sha256: of the file; empty if it cannot be read.
      key: of everything that the fit of it depends on.
      source: where it comes from.
      licence: of its frames.
    """

    path: Path
    clip_id: str
    identity: str
    sha256: str
    key: str
    source: str
    licence: str

    def as_json(self) -> dict[str, str]:
        entry = {name: getattr(self, name) for name in ("identity", "sha256", "key", "source", "licence")}
        return {"clip": self.clip_id, "file": self.path.name, **entry}


def find_files(
    sources: Sequence[str], wanted: Callable[[Path], bool], option: str, error: type[ValueError]
) -> list[Path]:
    """Files as given, and those in folders that are wanted, in order of their names; no file twice.

    Raises:
      error: a source does not exist; the message names the option that gave it.
    """
    found: dict[Path, None] = {}
    for source in map(Path, sources):
        if not source.exists():
            raise error(f"{source}: no such file or folder. Check `{option}`.")
        inside = filter(wanted, sorted(source.rglob("*"))) if source.is_dir() else [source]
        found.update(dict.fromkeys(path.resolve() for path in inside))
    return list(found)


def find_clips(sources: Sequence[str]) -> list[Path]:
    """Files as given, and the videos in folders, in order of their names; no file twice.

    Raises:
      MediaError: a source does not exist, or there is no video at all.
    """
    is_video = lambda path: path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES
    if found := find_files(sources, is_video, "--clips", MediaError):
        return found
    raise MediaError(f"{', '.join(sources)}: no videos there ({', '.join(VIDEO_SUFFIXES)}). Check `--clips`.")


def clip_names(paths: Sequence[Path]) -> list[str]:
    """A name for each file: its stem, with as many parent folders as make it unique."""
    names = []
    stems: dict[str, list[tuple[str, ...]]] = {}
    for path in paths:
        stems.setdefault(path.stem, []).append(path.with_suffix("").parts)
    for path in paths:
        parts = path.with_suffix("").parts
        rivals = [other for other in stems[path.stem] if other != parts]
        depth = 1
        while depth < len(parts) and any(other[-depth:] == parts[-depth:] for other in rivals):
            depth += 1
        names.append("--".join(parts[-depth:]))
    # Files that differ in their suffix only.
    counts = Counter(names)
    return [
        f"{name}{path.suffix.replace('.', '-')}" if counts[name] > 1 else name
        for name, path in zip(names, paths, strict=True)
    ]


def read_labels(path: str | os.PathLike) -> dict[str, dict[str, str]]:
    """The rows of a CSV file with the columns `clip` and `identity`, and perhaps `source` and `licence`.

    `clip` is the file's name, with or without folders and suffix.

    Raises:
      DatasetError: no such file, no such columns, an empty entry, or a clip with two identities.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: not a readable CSV file ({error}). Check `--identities`.") from error
    if not {"clip", "identity"} <= set(columns):
        raise DatasetError(
            f"{path}: has the columns {', '.join(columns) or 'none'}; its first line must name clip and "
            "identity."
        )
    labels: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, start=2):
        row = {name: (value or "").strip() for name, value in row.items() if name is not None}
        if not row["clip"] or not row["identity"]:
            raise DatasetError(f"{path}: line {number} lacks a clip or an identity. Fill it in.")
        if labels.setdefault(row["clip"], row)["identity"] != row["identity"]:
            raise DatasetError(f"{path}: line {number} gives {row['clip']!r} a second identity. Keep one.")
    return labels


def label_of(labels: dict[str, dict[str, str]], path: Path) -> dict[str, str] | None:
    """The row for a file: by as many of its folders as the CSV names, with or without suffix."""
    for parts in (path.parts, path.with_suffix("").parts):
        for first in range(len(parts)):
            if found := labels.get(str(Path(*parts[first:]))):
                return found
    return None


def plan_clips(
    paths: Sequence[Path],
    made_by: dict[str, Any],
    options: DatasetOptions,
    *,
    named: Sequence[Path] | None = None,
    digest_of: Callable[[Path], str] = file_sha256,
    labels: dict[str, dict[str, str]] | None = None,
) -> list[PlannedClip]:
    """Names, identities and keys of the clips.

    Args:
      made_by: what the fits depend on besides the clips; can be written as JSON.
      named: what names, folders and rows of `labels` go by; None: the paths themselves.
      digest_of: SHA-256 of a clip's content; may raise OSError.
      labels: what `read_labels` returns; None: of `options.identities`, if that is given.

    Raises:
      DatasetError: a clip has no row in `labels`.
    """
    if labels is None and options.identities is not None:
        labels = read_labels(options.identities)
    named = paths if named is None else named
    planned = []
    for path, called, name in zip(paths, named, clip_names(named), strict=True):
        label = {} if labels is None else label_of(labels, called)
        if label is None:
            raise DatasetError(
                f"{path}: has no row in the table of identities. Add `{called.name},WHO` to it, or leave "
                "the clip out."
            )
        try:
            digest = content = digest_of(path)
        except OSError:
            # The clip will be rejected with a reason; only its key must not be another one's.
            digest, content = "", f"unreadable {path}"
        by_default = called.parent.name if options.identity_from == "folder" else name
        key = json.dumps({"clip": content, **made_by}, sort_keys=True)
        planned.append(
            PlannedClip(
                path=path,
                clip_id=name,
                identity=label.get("identity") or by_default,
                sha256=digest,
                key=hashlib.sha256(key.encode()).hexdigest()[:32],
                source=label.get("source") or called.name,
                licence=label.get("licence") or options.licence,
            )
        )
    return planned


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


def versions() -> dict[str, str]:
    """Versions of the packages that have a say in the result; those not installed are left out."""
    found = {"loki_jax": loki_jax.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def pipeline_identity(head: HeadAsset, models: dict[str, str], settings: dict[str, Any]) -> dict[str, Any]:
    """What a fit depends on besides the clip. `models` are SHA-256 sums by name."""
    with tempfile.TemporaryDirectory() as scratch:
        head_sha256 = save_head(Path(scratch) / "head.npz", head)
    return {
        "pipeline": PIPELINE_VERSION,
        "schema": SCHEMA_VERSION,
        "loki_jax": loki_jax.__version__,
        "head_sha256": head_sha256,
        "models": dict(sorted(models.items())),
        "settings": settings,
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a dataset, or None if it has none.

    Raises:
      DatasetError: it is damaged.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        if not {"made_by", "clips", "rejected", "options"} <= manifest.keys():
            raise ValueError("entries are missing")
    except (ValueError, AttributeError) as error:
        raise DatasetError(
            f"{path}: damaged ({error}). Build the dataset again with `--overwrite`."
        ) from error
    return manifest


def differences(mine: Any, theirs: Any, name: str = "") -> list[str]:
    """Where two JSON values differ, as text: `settings.size: 256 there, 512 asked for`."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        found = []
        for key in sorted(mine.keys() | theirs.keys()):
            found += differences(mine.get(key), theirs.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if mine == theirs else [f"{name}: {theirs} there, {mine} asked for"]
