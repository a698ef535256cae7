"""Freeze what an evaluation measures: which clips and portraits, which frames, which pairs.

    python -m loki_jax.manifest --sources HDTF --protocols same cross --out eval       # the paper's protocols
    python -m loki_jax.manifest --sources FOLDER --protocols cross --pairs 40 --out eval
    python -m loki_jax.manifest --protocols expression pose --people 8 --out synthetic
    python -m loki_jax.manifest --frozen list.json --sources FOLDER --out eval         # of somebody else

FOLDER holds clips, and perhaps pictures. "same": each clip animates its own first frame. "cross": a seeded
derangement of the clips, or with pictures every clip (or `--pairs` of them) animates pictures. "expression"
and "pose": rendered heads, of which only one of both moves. Of each identity one clip is used, 16 frames at
25 fps, cropped to 512 pixels around the face.

Writes to --out: manifest.json, and as inputs for any system drivers/*.mp4, references/*.png and, where they
are known, truths/*.mp4. Name the animation of a sample SAMPLE.mp4; `python -m loki_jax.evaluate --manifest`
measures a folder of them. docs/evaluation.md explains the protocols.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from loki_jax.protocols.manifest import Manifest, Sample, Source


@dataclasses.dataclass(frozen=True)
class ManifestOptions:
    out: Path
    """new folder for manifest.json and the inputs, or one that a stopped run has left"""
    sources: Path | None = None
    """folder of clips and pictures"""
    protocols: tuple[Literal["same", "cross", "expression", "pose"], ...] = ("same", "cross")
    """what is measured"""
    frozen: Path | None = None
    """manifest whose samples are taken; the options below do not count then"""
    frames: int = 16
    """frames of each clip; 0: whole clips"""
    window: Literal["first", "liveliest"] = "first"
    """which frames of a clip: the first that show the face, as in the paper, or those that move most"""
    pairs: int | None = None
    """number of pairs of clips and pictures (default: all)"""
    identities: Path | None = None
    """CSV with the columns clip and identity (default: each file is its own identity)"""
    people: int = 8
    """rendered people of "expression" and "pose\""""
    fps: str = "25"
    """frames a second"""
    size: int = 512
    """edge of the inputs in pixels"""
    seed: int = 0
    """of all draws"""
    name: str = ""
    """of the list (default: the name of the folder)"""


def freeze(options: ManifestOptions) -> Manifest:
    """Write manifest and inputs. Raises the errors of its inputs."""
    from loki_jax.protocols.inputs import write_inputs
    from loki_jax.protocols.manifest import ManifestError, read_manifest, write_manifest

    path = options.out / "manifest.json"
    if options.frozen is not None:
        manifest = read_manifest(options.frozen)
    elif path.exists():
        raise ManifestError(f"{path}: exists already. Name another folder, or give it as --frozen.")
    else:
        manifest = _draw(options)
    manifest = write_inputs(manifest, options.sources, options.out)
    write_manifest(path, manifest)
    counts = collections.Counter(sample.protocol for sample in manifest.samples)
    print(
        f"wrote {path}: {', '.join(f'{count} {name}' for name, count in counts.items())}; "
        f"{len(manifest.inputs)} inputs"
    )
    return manifest


def _draw(options: ManifestOptions) -> Manifest:
    from loki_jax.fitting.clips import default_landmarker
    from loki_jax.fitting.model_files import LandmarkError
    from loki_jax.protocols.inputs import find_sources, measure_source, one_per_identity, synthetic_samples
    from loki_jax.protocols.manifest import Manifest, ManifestError
    from loki_jax.video import MediaError

    try:
        fps = Fraction(options.fps)
    except (ValueError, ZeroDivisionError):
        fps = Fraction(0)
    if not fps > 0:
        raise ManifestError(f"--fps {options.fps}: expected a number of frames a second, such as 25")
    if options.frames < 0 or options.frames == 1:
        raise ManifestError(f"--frames {options.frames}: at least 2, or 0 for whole clips")
    recorded = {"same", "cross"}.intersection(options.protocols)
    sources: list[Source] = []
    samples: list[Sample] = []
    rejected: dict[str, str] = {}
    if recorded:
        if options.sources is None:
            raise ManifestError("same and cross need --sources, a folder of clips")
        clips, pictures = find_sources(options.sources)
        identities = {} if options.identities is None else read_identities(options.identities)
        chosen = one_per_identity(clips, identities, options.seed)
        chosen += pictures if "cross" in recorded else []
        landmarker = default_landmarker()
        for number, name in enumerate(chosen, 1):
            try:
                source = measure_source(
                    options.sources, name, identities.get(name, Path(name).stem), landmarker, fps,
                    options.frames or None, options.window == "liveliest",
                )  # fmt: skip
            except (MediaError, LandmarkError, ManifestError) as error:
                rejected[name] = str(error)
                print(f"[{number}/{len(chosen)}] {name}: not used: {error}", flush=True)
                continue
            print(f"[{number}/{len(chosen)}] {name}: frame {source.start}, box {source.crop}", flush=True)
            sources.append(source)
        samples += _recorded_samples(options, sources)
    for protocol in ("expression", "pose"):
        if protocol in options.protocols:
            if options.people < 2:
                raise ManifestError(f"--people {options.people}: at least 2")
            rendered = synthetic_samples(protocol, options.people, options.frames or 48, options.seed)
            sources, samples = sources + rendered[0], samples + rendered[1]
    if not samples:
        raise ManifestError("there is nothing to measure. Give more clips, or look at why they are not used.")
    twice = [name for name, count in collections.Counter(s.name for s in sources).items() if count > 1]
    if twice:
        raise ManifestError(f"{options.sources}: two files are called {twice[0]}. Rename one.")
    return Manifest(
        options.name or options.out.resolve().name, options.seed, fps, options.size,
        {source.name: source for source in sources}, tuple(samples), rejected,
    )  # fmt: skip


def _recorded_samples(options: ManifestOptions, sources: list[Source]) -> list[Sample]:
    from loki_jax.protocols.manifest import Sample, balanced_pairs, derangement

    clips = [source.name for source in sources if source.frames > 1]
    portraits = [source.name for source in sources if source.frames == 1]
    samples = []
    if "same" in options.protocols:
        samples += [Sample(f"same-{clip}", "same", clip, clip) for clip in clips]
    if "cross" not in options.protocols:
        return samples
    if portraits:
        count = len(clips) * len(portraits) if options.pairs is None else options.pairs
        pairs = balanced_pairs(clips, portraits, count, options.seed)
    else:
        order = derangement(len(clips), options.seed)[: options.pairs]
        pairs = [(clips[k], clips[other]) for k, other in enumerate(order)]
    return samples + [
        Sample(f"cross-{portrait}-by-{clip}", "cross", portrait, clip) for clip, portrait in pairs
    ]


def read_identities(path: Path) -> dict[str, str]:
    """Identity of each clip, from a CSV with these two columns.

    Raises:
      ManifestError: unreadable, or without the columns.
    """
    from loki_jax.protocols.manifest import ManifestError

    try:
        with path.open(newline="") as file:
            return {row["clip"]: row["identity"] for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: cannot be read as CSV ({error})") from error
    except KeyError as error:
        raise ManifestError(f"{path}: has no column {error}. It needs clip and identity.") from error


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.cli(ManifestOptions, prog="python -m loki_jax.manifest", args=argv, description=__doc__)

    from loki_jax.program import run_program

    return run_program(freeze, options, f"finished inputs are kept in {options.out}")


if __name__ == "__main__":
    sys.exit(main())
