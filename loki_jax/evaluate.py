"""Measure how well a generated video follows its driver, or all videos of a manifest.

    python -m loki_jax.evaluate --video V.mp4 --driver D.mp4 --out DIR
    python -m loki_jax.evaluate --manifest M --videos DIR --out DIR    (`--manifest M --help`: its options)

HPF and HEF (method, section 10) are against the driver; PSNR and SSIM are computed where --truth gives
aligned frames. Real videos are read by the landmark fit. With --reference DATASET_FOLDER:CLIP_ID, a clip of
synthetic heads whose appearance is known, the video is an animation of that clip's first frame and is read by
photometric fitting through the rasteriser. A driver of such a dataset is known exactly, and --truth render
compares with the render of the reference that follows it.

The floor is what a perfect video would score: the driver itself, or with --reference the render, resized and
re-encoded as the video is, and read by the same estimator.

Writes metrics.json and per_frame.png to the folder --out, and prints a table.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from loki_jax.fitting.model_files import LandmarkError

if TYPE_CHECKING:
    from loki_jax.evaluation import Following
    from loki_jax.face.asset import HeadAsset
    from loki_jax.protocols.manifest import Manifest
    from loki_jax.video import LazyFrames

_TABLE = (
    ("frames compared", "frames", ""),
    ("track rate", "track_rate", ".2f"),
    ("HPF (degrees)", "hpf", ".2f"),
    ("HPF, aligned (degrees)", "hpf_aligned", ".2f"),
    ("absolute pose (degrees)", "absolute_pose", ".2f"),
    ("HEF", "hef", ".4f"),
    ("HEF, uncovered share", "hef_uncovered", ".3f"),
    ("PSNR (dB)", "psnr", ".2f"),
    ("SSIM", "ssim", ".4f"),
)


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    video: str
    """the video to judge"""
    driver: str
    """its driver: video file, or DATASET_FOLDER:CLIP_ID"""
    out: Path
    """folder for metrics.json and per_frame.png"""
    reference: str | None = None
    """DATASET_FOLDER:CLIP_ID of the synthetic head that the video shows"""
    head: str | None = None
    """head asset for landmark fits, or "builtin" (default: that of the dataset, or the built-in head)"""
    truth: str | None = None
    """video of the same frames as they should be, or "render\""""
    mode: Literal["relative", "absolute"] = "relative"
    """pose of --truth render"""
    neutral: int | None = None
    """neutral frame of the driver of --truth render, as the animation has it (default: the one nearest to
    rest)"""
    hef_size: int = 512
    """edge of HEF's renders in pixels"""
    landmarker: Path | None = None
    """MediaPipe's face_landmarker.task, for landmark fits with better lids and mouths"""
    face: int | None = None
    """which face of the video, 0 the largest (default: the largest)"""
    driver_face: int | None = None
    """which face of the driver, as the animation followed it"""
    all_shots: bool = False
    """the animation follows the driver over cuts (default: its longest shot)"""
    allow_lost: bool = False
    """accept a driver whose face is not visible in most frames"""
    floor: bool = True
    """measure what a perfect video would score at this resolution and codec, too"""


def _choose_head(options: EvaluateOptions) -> HeadAsset:
    from loki_jax.data.reader import open_dataset
    from loki_jax.face.asset import load_head
    from loki_jax.face.builtin import NAME, builtin_head
    from loki_jax.sources import split_clip_source

    if options.head is not None:
        return builtin_head() if options.head == NAME else load_head(options.head)
    for source in (options.reference, options.driver):
        found = split_clip_source(source) if source else None
        if found is not None:
            return open_dataset(found[0]).head()
    return builtin_head()


def _figures(following: Following) -> dict[str, float | None]:
    pose, expression = following
    return {"track_rate": pose.track_rate} | following.scores() | {"hef_uncovered": expression.uncovered}


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Measure, and return what was written. Raises the errors of its inputs; nothing is written then."""
    import numpy as np

    from loki_jax.evaluation import (
        image_scores,
        known_appearance,
        read_animation,
        rendered_frames,
    )
    from loki_jax.fitting.clips import default_landmarker
    from loki_jax.io import write_json
    from loki_jax.pictures import plot_per_frame
    from loki_jax.pipeline import retarget_clip
    from loki_jax.sources import load_driving_clip
    from loki_jax.video import LazyFrames, MediaError, reencode, resample_indices

    if options.truth == "render" and options.reference is None:
        raise ValueError(
            "--truth render needs --reference DATASET_FOLDER:CLIP_ID, a head of known appearance"
        )
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out}: is a file. --out names a folder.")
    head = _choose_head(options)
    frames = LazyFrames(options.video)
    fps, shape = frames.fps, frames[0].shape
    known = None if options.reference is None else known_appearance(options.reference, head)
    landmarker = None if options.landmarker is None else default_landmarker(options.landmarker)
    # Frames are compared at equal times, whatever the rates of the files.
    driver = load_driving_clip(
        options.driver, head, shape[0], landmarker=landmarker,
        face=options.driver_face, all_shots=options.all_shots, allow_lost=options.allow_lost,
    ).with_neutral(head, options.neutral).at_rate(fps)  # fmt: skip

    # ----------------------------------------------------------------------------- pose and expression
    def follow(shown: LazyFrames) -> Following:
        """How the head in the frames follows the driver, by the estimator that the options choose."""
        if known is not None:
            shown = shown[: len(driver.frames)]
            try:
                reading = read_animation(shown, head, known)
            except ValueError as error:
                raise MediaError(f"{options.video}: {error}.") from error
        else:
            reading = read_animation(
                shown, head, fps=fps, name=options.video, face=options.face, landmarker=landmarker
            )
        return reading.following(head, driver, options.hef_size)

    following = follow(frames)
    result: dict[str, Any] = {
        "video": options.video,
        "driver": options.driver,
        "estimator": "photometric" if known is not None else "landmarks",
        "frames": following.pose.n_frames,
        **_figures(following),
        "hef_size": options.hef_size,
    }
    curves = {"HPF (degrees)": following.pose.per_frame, "HEF": following.expression.per_frame}

    def perfect() -> Iterable[np.ndarray]:
        """What a perfect video would show."""
        if known is None:
            return driver.frames
        coefficients = retarget_clip(head, driver, known[0], options.mode)
        return rendered_frames(head, coefficients, *known, shape[0])

    if options.floor:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            compared = itertools.islice(perfect(), len(frames))
            try:
                coded = reencode(compared, fps, options.video, Path(folder) / "coded.mkv")
                result["floor"] = _figures(follow(coded))
            except LandmarkError:  # the driver's face is lost at this size, which says what it says
                result["floor"] = None

    # --------------------------------------------------------------------------------- aligned frames
    if options.truth is not None:
        if options.truth == "render":
            scores = image_scores(frames, perfect())
        else:
            truth = LazyFrames(options.truth)
            truth = truth[resample_indices(len(truth), truth.fps, fps)]
            if truth[0].shape != shape:
                raise MediaError(
                    f"{options.truth}: frames of {truth[0].shape[:2]}, {options.video} has {shape[:2]}."
                )
            scores = image_scores(frames, truth)
        result |= scores.means()
        curves |= {"PSNR (dB)": scores.psnr, "SSIM": scores.ssim}

    # ------------------------------------------------------------------------------------- results
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "metrics.json", result)
    plot_per_frame(
        options.out / "per_frame.png",
        {name: {"video": values} for name, values in curves.items()},
        f"{options.video} following {options.driver}",
    )
    floor: dict[str, Any] = result.get("floor") or {}
    print(f"{'':26}{'video':>10}{'floor':>10}" if floor else "")
    for label, key, form in _TABLE:
        if key in result:
            shown = (
                format(part[key], form) if part.get(key) is not None else "-" for part in (result, floor)
            )
            print(f"{label:26}" + "".join(f"{text:>10}" for text in shown))
    return result


@dataclasses.dataclass(frozen=True)
class ManifestOptions:
    manifest: Path
    """folder of python -m loki_jax.manifest"""
    out: Path
    """folder of the results; that of a stopped run goes on"""
    videos: tuple[str, ...] = ()
    """folders with SAMPLE.mp4 of each sample, DIR or NAME=DIR"""
    checkpoint: tuple[str, ...] = ()
    """models to run: workdir, .safetensors file or "demo", C or NAME=C"""
    baselines: tuple[Literal["still", "aligned", "refit", "geometry", "demo"], ...] = (
        "still", "aligned", "refit", "geometry",
    )  # fmt: skip
    """what is measured beside them"""
    shard: str = "1/1"
    """i/n: this process measures every n-th sample from the i-th"""
    head: str | None = None
    """head asset of the estimator (default: the built-in head)"""
    landmarker: Path | None = None
    """MediaPipe's face_landmarker.task for the estimator of pose and expression itself"""
    blendshapes: Path | None = None
    """the same file for a second, independent estimator: the distance of its expression scores"""
    identity: str = "dlib"
    """identity network: dlib, an ONNX file of ArcFace, or none"""
    lpips: bool = True
    """LPIPS (AlexNet) where truth exists"""
    fvd: bool = False
    """FVD (I3D), 2 to 5 s a video on CPUs"""
    hef_size: int = 512
    """edge of HEF's renders in pixels"""
    steps: int | None = None
    """sampling steps of models (default: the config's)"""
    guidance: float | None = None
    """scale of classifier-free guidance of models (default: the config's)"""
    seed: int = 0
    """seed of a model's noise"""
    pictures: int = 24
    """samples that the report shows"""


def evaluate_manifest(options: ManifestOptions) -> dict[str, Any] | None:
    """Measure, and return the summary; None while other shards have work left."""
    from loki_jax.face.asset import load_head
    from loki_jax.face.builtin import NAME, builtin_head
    from loki_jax.fitting.clips import default_landmarker
    from loki_jax.io import file_sha256
    from loki_jax.protocols import run
    from loki_jax.protocols.inputs import check_inputs
    from loki_jax.protocols.manifest import manifest_file, read_manifest
    from loki_jax.protocols.measure import Judge, load_tools
    from loki_jax.protocols.systems import Fits, ModelSettings, make_baseline, model

    shard = run.parse_shard(options.shard)
    folder = manifest_file(options.manifest).parent
    manifest = read_manifest(options.manifest)
    check_inputs(manifest, folder)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out}: is a file. --out names a folder.")
    named = [
        (kind, *_split_name(text)) for kind in ("videos", "checkpoint") for text in getattr(options, kind)
    ]
    names = [*options.baselines, *(name for _, name, _ in named)]
    if not names or len(set(names)) < len(names):
        raise ValueError("give --videos, --checkpoint or --baselines, each with a name of its own (NAME=DIR)")
    head = builtin_head() if options.head in (None, NAME) else load_head(options.head)
    landmarker = default_landmarker(options.landmarker)

    # --------------------------------------------------------------------------------------- systems
    settings = ModelSettings(options.steps, options.guidance, options.seed)
    fits = Fits(manifest, folder, head, manifest.size, landmarker)
    systems: dict[str, run.Source] = {}
    for baseline in options.baselines:
        systems[baseline] = run.Source(animate=make_baseline(baseline, fits, landmarker, settings))
    for kind, name, source in named:
        if kind == "videos":
            systems[name] = run.Source(Path(source))
        else:
            systems[name] = run.Source(animate=model(source, manifest, folder, landmarker, settings))

    # -------------------------------------------------------------------------------------- measuring
    identity: bool | Path = options.identity != "none"
    if options.identity not in ("none", "dlib"):
        identity = Path(options.identity)
    tools = load_tools(
        head, landmarker, options.hef_size, identity, options.blendshapes, options.lpips, options.fvd
    )
    kept = ("head", "landmarker", "blendshapes", "identity", "hef_size", "steps", "guidance", "seed")
    run.claim_folder(
        options.out,
        {"manifest": file_sha256(manifest_file(options.manifest))}
        | {key: value if (value := getattr(options, key)) is None else str(value) for key in kept},
    )
    judge = Judge(manifest, folder, tools)
    if not run.measure_all(manifest, judge, systems, options.out, shard):
        run.warn_unfinished(manifest, systems, options.out)
        return None
    return _write_results(options, manifest, folder, head, {n: s.folder for n, s in systems.items()})


def _split_name(text: str) -> tuple[str, str]:
    """(name, source) of NAME=SOURCE, or of a source, which gives its own name."""
    name, equals, source = text.partition("=")
    return (name, source) if equals else (Path(text).stem, text)


def _write_results(
    options: ManifestOptions,
    manifest: Manifest,
    folder: Path,
    head: HeadAsset,
    videos: dict[str, Path | None],
) -> dict[str, Any]:
    from loki_jax.io import atomic_path, write_json
    from loki_jax.protocols import summary as tables
    from loki_jax.protocols.report import write_report
    from loki_jax.protocols.run import read_rows

    out = options.out
    order = [(sample.name, system) for sample in manifest.samples for system in videos]
    found = {(row["sample"], row["system"]): row for row in read_rows(out)}
    rows = [found[key] for key in order]
    features = out / "features" if options.fvd else None
    summary = tables.summarise(rows, features=features)
    write_json(out / "summary.json", {"manifest": manifest.name, "protocols": summary})
    markdown = tables.markdown_tables(summary)
    for name, text in (("tables.md", markdown), ("tables.tex", tables.latex_tables(summary))):
        with atomic_path(out / name) as partial:
            partial.write_text(text)
    write_report(out / "report.html", manifest, folder, out, videos, rows, summary, head, options.pictures)
    print(f"{markdown}\nwrote {out}/summary.json, tables.md, tables.tex, report.html")
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if any(word.split("=")[0] == "--manifest" for word in words):
        return _main_of_manifest(argv)
    options = tyro.cli(EvaluateOptions, prog="python -m loki_jax.evaluate", args=argv, description=__doc__)

    from loki_jax.program import run_program

    return run_program(evaluate, options)


def _main_of_manifest(argv: Sequence[str] | None) -> int:
    what = (
        "Measure all animations of a manifest: HPF, HEF, identity, and where truth exists PSNR, SSIM and "
        "LPIPS. Writes metrics.jsonl, summary.json, tables.md, tables.tex and report.html to --out, and goes "
        "on where it was stopped (docs/evaluation.md)."
    )
    options = tyro.cli(ManifestOptions, prog="python -m loki_jax.evaluate", args=argv, description=what)

    from loki_jax.program import run_program

    return run_program(evaluate_manifest, options, f"what is measured is kept in {options.out}")


if __name__ == "__main__":
    sys.exit(main())
