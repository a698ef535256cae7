"""Options of the programs that make datasets: command line, settings of the library and documentation in one.

Importing this module is quick, so that `--help` is.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_prep.cli import Ratio

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".mpg", ".mpeg", ".ts", ".gif")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """What the records hold, how clips are divided, and how the work is done.

    Attributes:
      size: side of the stored frames in pixels.
      fps: frame rate that clips are resampled to, e.g. 25 or 30000/1001.
      crop_factor: side of the crop box over the longer side of the head over the whole clip.
      image_format: of the stored frames (default: png up to 128 pixels, jpeg above).
      images: store the frames (--no-images: latents alone, which are made from lossless frames).
      shard_bytes: size at which a shard is closed.
      latents: store VAE latents too; a folder that loki_jax.convert wrote.
      latents_config: config with the VAE's sizes (default: Stable Diffusion 2.1's).
      latents_batch: pictures encoded at a time.
      validation: share of identities held out; with five or more there is at least one.
      identity_from: "file": every file is its own identity; "folder": files of a folder share one.
      identities: CSV with clip, identity and perhaps source, licence; comes before identity_from.
      licence: of the clips, stored with them.
      workers: processes; 0: none but this one.
      keep_work: leave the work files in DIR.work.
      overwrite: replace a dataset that is already there. Otherwise one that was built with the same settings
        is extended, if all its clips are among those given.
    """

    size: int = 512
    fps: Ratio = Fraction(25)
    crop_factor: float = 1.2
    image_format: Literal["png", "jpeg"] | None = None
    images: bool = True
    shard_bytes: int = 256 * 2**20
    latents: Path | None = None
    latents_config: str | None = None
    latents_batch: int = 8
    validation: float = 0.02
    identity_from: Literal["file", "folder"] = "file"
    identities: Path | None = None
    licence: str = "not stated"
    workers: int = dataclasses.field(default_factory=available_cores)
    keep_work: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.size < 8 or any(
            n <= 0 for n in (self.crop_factor, self.latents_batch, self.shard_bytes, self.fps)
        ):
            raise ValueError(
                "--size must be at least 8; --crop-factor, --latents-batch, --shard-bytes, --fps positive"
            )
        if self.workers < 0 or not 0 <= self.validation < 1:
            raise ValueError("--workers must not be negative, --validation must be in [0, 1)")
        if not self.images and self.latents is None:
            raise ValueError("--no-images needs --latents: records must hold one of them")

    @property
    def stored_format(self) -> str:
        """Image format of the work files and records."""
        if not self.images:
            return "png"
        return self.image_format or ("png" if self.size <= 128 else "jpeg")

    def of_the_records(self) -> dict[str, Any]:
        """What the records depend on besides the fits, as JSON."""
        return {
            "image_size": self.size,
            "image_format": self.stored_format,
            "images": self.images,
            "validation": self.validation,
            "shard_bytes": self.shard_bytes,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions(DatasetOptions):
    """How clips are fitted.

    Attributes:
      face: which face of a clip, by size times presence, 0 the most prominent (the default).
      focal: focal length in pixels of the uncropped frames (default: from --fov).
      fov: field of view of the longer side, degrees.
      photometric: refine poses by the pixels (slower).
      min_frames: clips whose longest run with a visible face is shorter are rejected.
      min_face: clips whose head is smaller, in pixels of the uncropped frames, are rejected.
      max_error: clips whose median inner-face error exceeds so many percent of the distance of the outer
        eye corners are rejected.
      max_seconds: use only so much of each clip.
      overlay: side of the overlay videos in pixels, 0: none.
    """

    face: int | None = None
    focal: float | None = None
    fov: float = 20.0
    photometric: bool = False
    min_frames: int = 16
    min_face: float = 64.0
    max_error: float = 5.0
    max_seconds: Ratio | None = None
    overlay: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_frames < 1 or self.overlay < 0:
            raise ValueError("--min-frames must be positive, --overlay not negative")
        if not 0 < self.fov < 150 or (self.focal is not None and self.focal <= 0):
            raise ValueError("--fov must be in (0, 150), --focal positive")
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise ValueError("--max-seconds must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions(DatasetOptions):
    """How fits of other programs are read.

    Attributes:
      frames: folder of pictures or video, for a single fit.
      camera: which camera of a fit with several.
      neck: "drop": set its rotation to zero, as the public driver map does.
      official_crops: a box of whole pixels for each frame, as the public code.
      source_fps: frame rate of folders of pictures.
    """

    frames: Path | None = None
    camera: int = 0
    neck: Literal["keep", "drop"] = "keep"
    official_crops: bool = False
    source_fps: Ratio = Fraction(25)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source_fps <= 0 or self.camera < 0:
            raise ValueError("--source-fps must be positive, --camera not negative")


def _frame_range(words: Sequence[str]) -> tuple[int, int]:
    low, _, high = words[0].partition("..")
    if not (low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low)):
        raise ValueError(f"{words[0]!r}: give a number of frames or a range such as 32..64")
    return int(low), int(high or low)


FrameRange = Annotated[
    tuple[int, int],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="N|A..B",
        instance_from_str=_frame_range,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: ["..".join(map(str, value))],
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthOptions:
    """Which synthetic heads to make; identity i of `seed` has the identity seed 1,000,000 seed + i.

    Attributes:
      identities: how many people.
      clips_per_identity: how many clips of each.
      frames: frames of a clip: N or A..B.
      size: side of the stored frames in pixels.
      seed: of everything.
      first_identity: offset of the identities (held-out sets).
      validation: share of identities in the validation split.
    """

    identities: int = 64
    clips_per_identity: int = 2
    frames: FrameRange = (32, 64)
    size: int = 64
    seed: int = 0
    first_identity: int = 0
    validation: float = 0.06

    def __post_init__(self) -> None:
        if min(self.identities, self.clips_per_identity, self.size) < 1:
            raise ValueError("--identities, --clips-per-identity and --size must be at least 1")
        if not 0 <= self.validation < 1 or not 0 <= self.first_identity < 1_000_000 or self.seed < 0:
            raise ValueError(
                "--validation must be in [0, 1), --first-identity in [0, 1000000), --seed not negative"
            )

    def identity_seed(self, index: int) -> int:
        return self.seed * 1_000_000 + self.first_identity + index
