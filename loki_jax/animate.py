"""Animate a portrait with a driving clip.

The reference and the driver are files, to which a head is fitted by landmarks, or clips of a dataset,
DATASET_FOLDER:CLIP_ID, whose coefficients are stored (the reference is then the first frame). The driver
can have any length. Without a checkpoint the picture is moved by the fitted head, which needs no training;
a trained model draws every frame anew. Beside OUT.mp4 a panel OUT_panel.mp4 shows reference, driver, driver
map and result. Both videos keep the driver's frame rate and audio and are tagged as synthetic.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from loki_jax.geometry.pipeline import GeometryPipeline
    from loki_jax.pipeline import LokiPipeline


@dataclasses.dataclass(frozen=True)
class AnimateOptions:
    reference: str
    """image file, or DATASET_FOLDER:CLIP_ID"""
    driver: str
    """video file, or DATASET_FOLDER:CLIP_ID"""
    out: Path
    """video to write, .mp4"""
    checkpoint: str = "geometry"
    """"geometry", the renderer that needs no training; or a model: workdir of loki_jax.train, .safetensors
    file, or "demo", the shipped one"""
    head: Path | None = None
    """head asset for "geometry" (default: the built-in head)"""
    steps: int | None = None
    """sampling steps of a model (default: the config's)"""
    solver: Literal["ddim", "dpm++"] | None = None
    """how a model samples; dpm++ needs fewer steps, for example 12 (default: the config's)"""
    guidance: float | None = None
    """scale of a model's classifier-free guidance (default: the config's)"""
    seed: int = 0
    """seed of a model's noise"""
    overlap: int | None = None
    """frames that consecutive windows of a model share; 0: none (default: half a window)"""
    windows_at_once: int = 1
    """windows that a model samples together, where memory has room"""
    mode: Literal["relative", "absolute"] | None = None
    """relative: turn from the reference's pose by the driver's increments; absolute: take the driver's pose
    (default: the config's, or relative)"""
    relight: bool = False
    """geometry renderer: the skin brightens and darkens as it turns in the portrait's light"""
    audio: bool = True
    """keep the driver's audio"""
    landmarker: Path | None = None
    """MediaPipe's face_landmarker.task, for lids and mouths that say more"""
    face: int | None = None
    """which face of the reference, 0 the largest (default: the only or by far the largest)"""
    driver_face: int | None = None
    """which face of the driver, 0 the largest (default: the largest)"""
    all_shots: bool = False
    """follow the driver over cuts (default: its longest shot)"""
    allow_lost: bool = False
    """accept a driver whose face is not visible in most frames"""


def animate(options: AnimateOptions) -> None:
    """Write the animation and its panel. Raises the errors of its inputs; nothing is written then."""
    import numpy as np
    from tqdm import tqdm

    from loki_jax.fitting.clips import default_landmarker
    from loki_jax.pictures import panel_frames
    from loki_jax.sources import load_driving_clip, load_portrait, split_clip_source
    from loki_jax.video import InputWarning, VideoWriter, check_output

    panel_path = options.out.with_name(f"{options.out.stem}_panel{options.out.suffix}")
    for path in (options.out, panel_path):
        check_output(path, [options.reference, options.driver, options.checkpoint])
    pipeline, settings, description = _find_animator(options)
    if options.checkpoint == "demo" and split_clip_source(options.reference) is None:
        warnings.warn(
            "the demo model knows rendered heads only: it shows what the program does, and makes a rendered "
            "head of a photograph. `--checkpoint geometry` moves the photograph itself.",
            InputWarning,
            stacklevel=1,
        )
    landmarker = None if options.landmarker is None else default_landmarker(options.landmarker)
    portrait = load_portrait(
        options.reference, pipeline.head, pipeline.size, face=options.face, landmarker=landmarker
    )
    clip = load_driving_clip(
        options.driver, pipeline.head, pipeline.size, landmarker=landmarker,
        face=options.driver_face, all_shots=options.all_shots, allow_lost=options.allow_lost,
    )  # fmt: skip
    length = len(clip.frames)
    print(f"{clip.name}: {length} frames at {clip.fps} fps; {description}")
    audio = clip.source if options.audio else None
    height = max(256, pipeline.size)
    done = 0
    with (
        VideoWriter(options.out, clip.fps, audio_from=audio, audio_start=clip.start) as video,
        VideoWriter(panel_path, clip.fps, audio_from=audio, audio_start=clip.start) as panel,
        tqdm(total=length, unit="frame") as progress,
    ):
        for frames, maps in pipeline.windows(portrait, clip, **settings):
            for frame in frames:
                video.write(frame)
            shown = np.stack(list(clip.frames[done : done + len(frames)]))
            for frame in panel_frames([portrait.image, shown, maps, frames], height):
                panel.write(frame)
            done += len(frames)
            progress.update(len(frames))
    print(f"wrote {options.out} and {panel_path}")


def _find_animator(options: AnimateOptions) -> tuple[GeometryPipeline | LokiPipeline, dict[str, Any], str]:
    """What animates, the settings of its `windows`, and both in words."""
    from loki_jax.face.asset import load_head
    from loki_jax.geometry.pipeline import GeometryPipeline
    from loki_jax.pipeline import LokiPipeline

    if options.checkpoint == "geometry":
        if any(x is not None for x in (options.steps, options.guidance, options.solver, options.overlap)):
            raise ValueError(
                "--steps, --guidance, --solver and --overlap are options of trained models: name one with "
                "--checkpoint"
            )
        mode = options.mode or "relative"
        head = None if options.head is None else load_head(options.head)
        settings = {"mode": mode, "relight": options.relight}
        return GeometryPipeline(head), settings, f"geometry renderer, {mode} pose"
    if options.head is not None or options.relight:
        raise ValueError("--head and --relight are options of the geometry renderer")
    model = LokiPipeline.from_checkpoint(options.checkpoint)
    sampling = model.sampling(
        options.steps,
        options.guidance,
        options.mode,
        options.solver,
        options.overlap,
        options.windows_at_once,
    )
    description = (
        f"model of step {model.step}, {sampling.steps} {sampling.solver} steps, "
        f"guidance {sampling.guidance}, {sampling.mode} pose"
    )
    return model, {**sampling._asdict(), "seed": options.seed}, description


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.cli(AnimateOptions, prog="python -m loki_jax.animate", args=argv, description=__doc__)

    from loki_jax.program import run_program

    return run_program(animate, options)


if __name__ == "__main__":
    sys.exit(main())
