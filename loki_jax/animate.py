"""Animate a portrait with a driving clip.

The reference and the driver are files, to which a head is fitted by landmarks, or clips of a dataset,
DATASET_FOLDER:CLIP_ID, whose coefficients are stored (the reference is then the first frame). The driver
is a video of any length, a picture, a folder of pictures, or a motion file of loki_jax.motion. Without a
driver the sliders alone move the portrait. Without a checkpoint the picture is moved by the fitted head,
which needs no training; a trained model draws every frame anew. The suffix of --out decides what is written;
it has the driver's frame rate and audio and is tagged as synthetic. docs/animate.md explains all options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from loki_jax.face.control_options import Controls

if TYPE_CHECKING:
    from loki_jax.diffusion.sampler import Guidance
    from loki_jax.face.asset import HeadAsset
    from loki_jax.face.controls import Slider
    from loki_jax.fitting.landmarker import Landmarker
    from loki_jax.geometry.pipeline import GeometryPipeline
    from loki_jax.pipeline import LokiPipeline, Window
    from loki_jax.sources import DrivingClip, Portrait
    from loki_jax.video.credentials import Credentials


# Options that the geometry renderer does not have.
_OF_MODELS = (
    "steps", "solver", "overlap", "guidance", "guidance_source", "guidance_motion", "guidance_history",
    "guided_steps",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AnimateOptions:
    reference: str
    """image file, or DATASET_FOLDER:CLIP_ID"""
    out: Path
    """output: .mp4 (or .mov, .mkv), .webm, .gif, frame_%05d.png, a folder of PNG, .png of one frame"""
    driver: tuple[str, ...] = ()
    """video, picture, folder of pictures, motion file (.npz), or DATASET_FOLDER:CLIP_ID; several with several
    faces"""
    pose_driver: str | None = None
    """another driver, for the pose of the head alone"""
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
    guidance_source: float | None = None
    """nested guidance of a model instead: scale of the reference"""
    guidance_motion: float | None = None
    """and of the driver beside the reference"""
    guidance_history: float | None = None
    """and of the frames before the window beside both (defaults: the config's, or 2, 2.5 and 1)"""
    guided_steps: tuple[float, float] | None = None
    """part of a model's sampling steps that is guided, from the noisiest, 0, to the last, 1 (default: the
    config's, or all)"""
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
    neutral: int | None = None
    """frame of the driver, from 0, at which the portrait has its own pose in relative mode (default: the one
    nearest to rest)"""
    controls: Annotated[Controls, tyro.conf.arg(name="")] = Controls()
    settings: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="set")] = ()
    """slider as NAME=NUMBER, such as smile=0.5 or yaw=10; repeat it for several"""
    sliders: Path | None = None
    """JSON file of sliders: numbers, or keyframes [[seconds, value], ...]"""
    fps: str | None = None
    """frames a second, such as 25 or 30000/1001 (default: the driver's; of pictures 25)"""
    audio: Path | None = None
    """file whose sound is taken instead of the driver's"""
    no_audio: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """write no sound"""
    panel: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """write OUT_panel beside OUT: reference, driver, driver map and result"""
    dump: Path | None = None
    """new folder for motions, driver maps and scores of the result (HPF, HEF)"""
    sign: Path | None = None
    """private key (PEM): sign the result as generated (C2PA); needs --cert"""
    cert: Path | None = None
    """certificate chain (PEM) of --sign, the signer's first"""
    landmarker: Path | None = None
    """MediaPipe's face_landmarker.task, for lids and mouths that say more"""
    face: tuple[str, ...] = ()
    """which face of the reference: a number, 0 the largest; left; right; pixels X,Y; several of these; or
    all, from left to right (default: the only or by far the largest)"""
    driver_face: tuple[str, ...] = ()
    """which face of the driver, likewise (default: the largest)"""
    all_shots: bool = False
    """follow the driver over cuts (default: its longest shot)"""
    allow_lost: bool = False
    """accept a driver whose face is not visible in most frames"""


def animate(options: AnimateOptions) -> None:
    """Write the animation. Raises the errors of its inputs; nothing is written then."""
    from loki_jax.dump import open_dump
    from loki_jax.face.controls import check_sliders, parse_sliders, read_sliders
    from loki_jax.fitting.clips import default_landmarker

    panel_path = options.out.with_name(f"{options.out.stem}_panel{options.out.suffix}")
    outputs = [options.out, panel_path] if options.panel else [options.out]
    _check_files(options, outputs)
    credentials = _find_credentials(options, outputs)
    sliders = {} if options.sliders is None else read_sliders(options.sliders)
    sliders |= parse_sliders(options.settings)
    pipeline, settings, description = _find_animator(options)
    check_sliders(pipeline.head, sliders)
    landmarker = None if options.landmarker is None else default_landmarker(options.landmarker)

    portraits = _load_portraits(options, pipeline, landmarker)
    if options.driver:
        clips = _load_drivers(options, pipeline, landmarker, len(portraits))
    else:
        clips = [_still_driver(options, portraits[0], sliders)] * len(portraits)
        settings["mode"] = "absolute"  # the portrait's own pose, exactly
    length = max(len(each.valid) for each in clips)
    print(f"{clips[0].name}: {length} frames at {clips[0].fps} fps; {description}")

    settings |= {"controls": options.controls, "sliders": sliders}
    windows = _windows(pipeline, portraits, clips, settings)
    with contextlib.ExitStack() as stack:
        kept = None if options.dump is None else stack.enter_context(open_dump(options.dump))
        maps = None if kept is None else kept / "maps"
        _write_frames(options, outputs, windows, portraits[0], clips[0], length, maps, credentials)
        if kept is not None:
            _write_dump(options, kept, pipeline.head, portraits[0], clips[0], settings, landmarker)
    print("wrote " + " and ".join(str(path) for path in [*outputs, options.dump] if path is not None))


def _write_frames(
    options: AnimateOptions,
    outputs: Sequence[Path],
    windows: Iterator[Window],
    portrait: Portrait,
    clip: DrivingClip,
    length: int,
    maps_folder: Path | None,
    credentials: Credentials | None,
) -> None:
    """Write the animation, the panel if it is the second of `outputs`, and the driver maps if wanted."""
    import numpy as np
    from tqdm import tqdm

    from loki_jax.pictures import panel_frames
    from loki_jax.video import open_output
    from loki_jax.video.credentials import COMPOSITE, COMPOSITE_TRAINED, signed

    sound: dict[str, Any] = {"audio_from": options.audio}
    if options.audio is None and not options.no_audio:
        sound = {"audio_from": clip.source, "audio_start": clip.start}
    kind = COMPOSITE if options.checkpoint == "geometry" else COMPOSITE_TRAINED
    done = 0
    with contextlib.ExitStack() as stack:
        names = [stack.enter_context(signed(path, credentials, kind)) for path in outputs]
        video, *panel = [stack.enter_context(open_output(name, clip.fps, **sound)) for name in names]
        kept = None if maps_folder is None else stack.enter_context(open_output(maps_folder, clip.fps))
        progress = stack.enter_context(tqdm(total=length, unit="frame"))
        for frames, maps in windows:
            for frame in frames:
                video.write(frame)
            if panel:
                shown = np.stack(list(clip.frames[done : done + len(frames)]))
                columns = [portrait.image, shown, maps, frames]
                for frame in panel_frames(columns, max(256, len(portrait.image))):
                    panel[0].write(frame)
            if kept is not None:
                for picture in maps:
                    kept.write(picture)
            done += len(frames)
            progress.update(len(frames))


def _write_dump(
    options: AnimateOptions,
    folder: Path,
    head: HeadAsset,
    portrait: Portrait,
    clip: DrivingClip,
    settings: dict[str, Any],
    landmarker: Landmarker | None,
) -> None:
    from loki_jax.data.schema import DatasetError
    from loki_jax.dump import wanted_motion, write_motions, write_scores
    from loki_jax.evaluation import known_appearance
    from loki_jax.pipeline import retarget_clip
    from loki_jax.sources import split_clip_source

    motion = {name: settings[name] for name in ("mode", "controls", "sliders")}
    wanted = wanted_motion(clip, portrait, retarget_clip(head, clip, portrait, **motion))
    write_motions(folder, head, clip, wanted)
    reading: dict[str, Any] = {"name": str(options.out), "landmarker": landmarker}
    if options.face:
        reading["face"] = options.face[0]
    if split_clip_source(options.reference) is not None:
        with contextlib.suppress(DatasetError):  # of people, not of synthetic heads
            reading = {"known": known_appearance(options.reference, head)}
    write_scores(folder, head, options.out, clip, wanted, **reading)


def _check_files(options: AnimateOptions, outputs: Sequence[Path]) -> None:
    """Find what is wrong with names and combinations of options, before any work."""
    from loki_jax.video import MediaError, check_frames_output, has_audio, keeps_sound

    inputs = [options.reference, *options.driver, options.checkpoint]
    files = (options.pose_driver, options.audio, options.sliders, options.sign, options.cert)
    inputs += [str(path) for path in files if path is not None]
    for path in outputs:
        check_frames_output(path, inputs)
    if options.audio is not None:
        if options.no_audio:
            raise ValueError("--audio and --no-audio contradict each other: give one of them")
        if not keeps_sound(options.out):
            raise MediaError(f"{options.out}: cannot have sound. Name a video, or leave --audio out.")
        if not has_audio(options.audio):
            raise MediaError(f"{options.audio}: has no sound. Give another file, or leave --audio out.")
    _frame_rate(options)
    if not options.driver and (options.pose_driver is not None or options.neutral is not None):
        raise ValueError("--pose-driver and --neutral need a --driver")
    if not options.driver and options.sliders is None and not options.settings:
        unchanged = options.controls.yaw == options.controls.pitch == options.controls.roll == 0
        if unchanged and options.controls.gaze != "camera":
            raise ValueError("nothing moves the portrait: give a --driver, or sliders (--set, --sliders)")
    if len(options.face) > 1 and "all" in options.face:
        raise ValueError("--face all already names every face: give no other")
    for name in ("panel", "dump"):
        if getattr(options, name) and (len(options.face) > 1 or "all" in options.face):
            raise ValueError(f"--{name} is of one face: leave it out, or choose one with --face")
    if options.dump is not None:
        from loki_jax.dump import check_dump

        check_dump(options.dump, options.out)


def _find_credentials(options: AnimateOptions, outputs: Sequence[Path]) -> Credentials | None:
    """Who signs; None: nobody. Raises what is wrong with key, certificates and outputs, before any work."""
    from loki_jax.video.credentials import check_signable, read_credentials

    if options.sign is None and options.cert is None:
        return None
    if options.sign is None or options.cert is None:
        raise ValueError("--sign and --cert go together: give the private key and the certificate chain")
    for path in outputs:
        check_signable(path)
    return read_credentials(options.sign, options.cert)


def _frame_rate(options: AnimateOptions) -> Fraction | None:
    if options.fps is None:
        return None
    try:
        fps = Fraction(options.fps)
    except (ValueError, ZeroDivisionError):
        fps = Fraction(0)
    if not 0 < fps <= 1000:
        raise ValueError(
            f"--fps {options.fps}: expected a number of frames a second, such as 25 or 30000/1001"
        )
    return fps


def _load_portraits(
    options: AnimateOptions, pipeline: GeometryPipeline | LokiPipeline, landmarker: Landmarker | None
) -> list[Portrait]:
    """The faces to animate, from left to right where all are."""
    from loki_jax.fitting.clips import default_landmarker
    from loki_jax.fitting.tracking import FaceChoice, faces_of_picture
    from loki_jax.geometry.pipeline import GeometryPipeline
    from loki_jax.sources import load_portrait, split_clip_source
    from loki_jax.video import InputWarning, read_image

    if options.checkpoint == "demo" and split_clip_source(options.reference) is None:
        warnings.warn(
            "the demo model knows rendered heads only: it shows what the program does, and makes a rendered "
            "head of a photograph. `--checkpoint geometry` moves the photograph itself.",
            InputWarning,
            stacklevel=1,
        )
    faces: Sequence[FaceChoice | None] = options.face or [None]
    if options.face == ("all",):
        faces = faces_of_picture(
            landmarker or default_landmarker(), read_image(options.reference), options.reference
        )
    if len(faces) > 1 and not isinstance(pipeline, GeometryPipeline):
        raise ValueError("several faces are animated by the geometry renderer only: leave --checkpoint out")
    return [
        load_portrait(options.reference, pipeline.head, pipeline.size, face=face, landmarker=landmarker)
        for face in faces
    ]


def _load_drivers(
    options: AnimateOptions,
    pipeline: GeometryPipeline | LokiPipeline,
    landmarker: Landmarker | None,
    count: int,
) -> list[DrivingClip]:
    """One driver for each of `count` faces."""
    from loki_jax.sources import combine_drivers, load_driving_clip

    def one_each(values: Sequence[Any], what: str) -> list[Any]:
        if len(values) not in (1, count):
            raise ValueError(f"{len(values)} {what} for {count} faces: give one, or one for each face")
        return list(values) * count if len(values) == 1 else list(values)

    chosen = one_each(options.driver, "drivers"), one_each(options.driver_face or [None], "--driver-face")
    common: dict[str, Any] = {"landmarker": landmarker, "fps": _frame_rate(options)}
    common |= {"all_shots": options.all_shots, "allow_lost": options.allow_lost}
    head, size = pipeline.head, pipeline.size
    loaded: dict[Any, DrivingClip] = {}
    for key in zip(*chosen, strict=True):
        if key not in loaded:
            loaded[key] = load_driving_clip(key[0], head, size, face=key[1], **common)
            if options.pose_driver is not None:
                pose = load_driving_clip(options.pose_driver, head, size, **common)
                loaded[key] = combine_drivers(loaded[key], pose)
            loaded[key] = loaded[key].with_neutral(head, options.neutral)
    return [loaded[key] for key in zip(*chosen, strict=True)]


def _still_driver(options: AnimateOptions, portrait: Portrait, sliders: dict[str, Slider]) -> DrivingClip:
    """A driver that does not move, as long as the sliders' keyframes."""
    from loki_jax.face.controls import last_keyframe
    from loki_jax.sources import still_clip

    fps, last = _frame_rate(options) or Fraction(25), last_keyframe(sliders)
    picture = options.out.suffix.lower() == ".png" and "%" not in options.out.name
    if not picture and last <= 0:
        raise ValueError(
            f"{options.out}: sliders without keyframes make one picture. Name it .png, or give keyframes."
        )
    return still_clip(portrait, 1 if picture else round(Fraction(last) * fps) + 1, fps)


def _windows(
    pipeline: GeometryPipeline | LokiPipeline,
    portraits: Sequence[Portrait],
    clips: Sequence[DrivingClip],
    settings: dict[str, Any],
) -> Iterator[Window]:
    from loki_jax.geometry.pipeline import GeometryPipeline
    from loki_jax.geometry.several import animate_several

    if len(portraits) == 1:
        return pipeline.windows(portraits[0], clips[0], **settings)
    assert isinstance(pipeline, GeometryPipeline)
    return animate_several(pipeline, portraits, clips, **settings)


def _find_animator(options: AnimateOptions) -> tuple[GeometryPipeline | LokiPipeline, dict[str, Any], str]:
    """What animates, the settings of its `windows`, and both in words."""
    from loki_jax.face.asset import load_head
    from loki_jax.geometry.pipeline import GeometryPipeline
    from loki_jax.pipeline import LokiPipeline

    if options.checkpoint == "geometry":
        given = [name for name in _OF_MODELS if getattr(options, name) is not None]
        if given:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"only trained models have {named}: name one with --checkpoint")
        mode = options.mode or "relative"
        head = None if options.head is None else load_head(options.head)
        settings = {"mode": mode, "relight": options.relight}
        return GeometryPipeline(head), settings, f"geometry renderer, {mode} pose"
    if options.head is not None or options.relight:
        raise ValueError("--head and --relight are options of the geometry renderer")
    model = LokiPipeline.from_checkpoint(options.checkpoint)
    nested = (options.guidance_source, options.guidance_motion, options.guidance_history)
    guidance: Guidance | None = options.guidance
    if any(x is not None for x in nested):
        if guidance is not None:
            raise ValueError("--guidance and nested guidance (--guidance-source, ...) exclude each other")
        scales = model.config.sample.fusion or (2.0, 2.5, 1.0)
        guidance = tuple(b if a is None else a for a, b in zip(nested, scales, strict=True))
    sampling = model.sampling(
        options.steps,
        guidance,
        options.mode,
        options.solver,
        options.overlap,
        options.windows_at_once,
        options.guided_steps,
    )
    description = (
        f"model of step {model.step}, {sampling.steps} {sampling.solver} steps, "
        f"guidance {sampling.guidance}, {sampling.mode} pose"
    )
    return model, {**sampling._asdict(), "seed": options.seed}, description


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = tyro.cli(AnimateOptions, prog="python -m loki_jax.animate", args=argv, description=__doc__)
    except ValueError as error:  # of `Controls`
        print(f"error: {error}", file=sys.stderr)
        return 1

    from loki_jax.program import run_program

    return run_program(animate, options)


if __name__ == "__main__":
    sys.exit(main())
