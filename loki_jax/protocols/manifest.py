"""A frozen list of what an evaluation measures: manifest.json (docs/evaluation.md)."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from loki_jax.io import write_json

VERSION = 1
PROTOCOLS = ("same", "cross", "expression", "pose")


class ManifestError(ValueError):
    """A manifest or one of its inputs is missing or damaged; the message names the file and the remedy."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A clip or a picture, or a rendered clip of a synthetic head.

    Attributes:
      name: of its inputs, without suffix.
      identity: who is shown.
      file: name in the folder of sources; empty: rendered.
      sha256: of that file.
      start: first frame, counted at the manifest's frame rate.
      frames: how many; 1: a picture.
      crop: x0, y0, x1, y1 in pixels of the file's frames.
      identity_seed, motion_seed: of a rendered clip.
      moves: what moves in a rendered clip, "expression" or "pose".
    """

    name: str
    identity: str
    frames: int
    file: str = ""
    sha256: str = ""
    start: int = 0
    crop: tuple[int, int, int, int] | None = None
    identity_seed: int | None = None
    motion_seed: int | None = None
    moves: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A portrait, the first frame of the source `reference`, to be animated by the source `driver`."""

    name: str
    protocol: str
    reference: str
    driver: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is measured.

    Attributes:
      name: of the list.
      seed: of every draw.
      fps: frame rate of the drivers' inputs.
      size: edge of the square inputs in pixels.
      sources: by name.
      samples: in the order of measurement.
      rejected: files that cannot be used, and why.
      inputs: SHA-256 of the written inputs by their path in the folder; empty in a list without inputs.
    """

    name: str
    seed: int
    fps: Fraction
    size: int
    sources: dict[str, Source]
    samples: tuple[Sample, ...]
    rejected: dict[str, str] = dataclasses.field(default_factory=dict)
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)


def write_manifest(path: str | os.PathLike, manifest: Manifest) -> None:
    """Write a manifest; the file appears when it is whole."""
    value = {"version": VERSION, **dataclasses.asdict(manifest), "fps": str(manifest.fps)}
    value["sources"] = [_without_defaults(source) for source in value["sources"].values()]
    write_json(path, value)


def _without_defaults(source: dict[str, Any]) -> dict[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(Source)}
    return {name: value for name, value in source.items() if value != defaults[name]}


def read_manifest(path: str | os.PathLike) -> Manifest:
    """Read a manifest, given as the file or as the folder that holds it as manifest.json.

    Raises:
      ManifestError: no such file, of another version, or damaged.
    """
    path = manifest_file(path)
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ManifestError(
            f"{path}: cannot be read ({error}). Make one with `python -m loki_jax.manifest`."
        ) from error
    except ValueError as error:
        raise ManifestError(f"{path}: not JSON ({error}). Make it again.") from error
    if not isinstance(value, dict) or value.get("version") != VERSION:
        raise ManifestError(f"{path}: not a manifest of version {VERSION}. Make it again.")
    try:
        sources = [
            Source(**source | {"crop": tuple(source["crop"]) if source.get("crop") else None})
            for source in value["sources"]
        ]
        manifest = Manifest(
            str(value["name"]), int(value["seed"]), Fraction(value["fps"]), int(value["size"]),
            {source.name: source for source in sources},
            tuple(Sample(**sample) for sample in value["samples"]),
            dict(value.get("rejected", {})), dict(value.get("inputs", {})),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ManifestError(
            f"{path}: damaged ({type(error).__name__}: {error}). Make the manifest again."
        ) from error
    _check(path, manifest)
    return manifest


def _check(path: Path, manifest: Manifest) -> None:
    names = [sample.name for sample in manifest.samples]
    if len(set(names)) < len(names):
        raise ManifestError(f"{path}: two samples have the same name. Make the manifest again.")
    for sample in manifest.samples:
        missing = {sample.reference, sample.driver} - manifest.sources.keys()
        if missing or sample.protocol not in PROTOCOLS:
            what = f"source {missing.pop()!r}" if missing else f"protocol {sample.protocol!r}"
            raise ManifestError(f"{path}: sample {sample.name!r} has an unknown {what}. Make it again.")
    for name in (*names, *manifest.sources):
        # They become names of files.
        if not name or name != Path(name).name or name.startswith("."):
            raise ManifestError(f"{path}: {name!r} cannot be the name of a file. Make the manifest again.")


def manifest_file(path: str | os.PathLike) -> Path:
    """manifest.json of a folder; a file as it is."""
    path = Path(path)
    return path / "manifest.json" if path.is_dir() else path


def derangement(count: int, seed: int) -> list[int]:
    """A random permutation of 0 .. count-1 that leaves nothing in its place, the same for a seed everywhere.

    Raises:
      ValueError: fewer than two.
    """
    if count < 2:
        raise ValueError(f"a derangement of {count}: needs two or more")
    rng = np.random.Generator(np.random.PCG64(seed))
    while True:  # a permutation is one with probability 1/e
        order = rng.permutation(count)
        if (order != np.arange(count)).all():
            return [int(index) for index in order]


def balanced_pairs(
    rows: Sequence[str], columns: Sequence[str], count: int, seed: int
) -> list[tuple[str, str]]:
    """`count` different pairs (row, column), each name as often as any other, to within one; seeded.

    Raises:
      ValueError: there are not so many.
    """
    if count > len(rows) * len(columns):
        raise ValueError(
            f"{count} pairs of {len(rows)} clips and {len(columns)} portraits: there are only "
            f"{len(rows) * len(columns)}"
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    rows, columns = ([x[i] for i in rng.permutation(len(x))] for x in (rows, columns))
    # Diagonals of the table; each time round they begin one column further.
    around = math.lcm(len(rows), len(columns))
    return [(rows[k % len(rows)], columns[(k + k // around) % len(columns)]) for k in range(count)]
