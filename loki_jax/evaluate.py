"""Measure how well a generated video follows its driver.

    python -m loki_jax.evaluate --video out.mp4 --driver clip.mp4 --head head.npz --out results
    python -m loki_jax.evaluate --video out.mp4 --driver SHARDS:CLIP --reference SHARDS:CLIP --out results

HPF and HEF (design section 10) against the driver; PSNR and SSIM where the frames are aligned with
`--truth VIDEO`. Real videos are read by the landmark fit. With `--reference DATASET_FOLDER:CLIP_ID`, a
clip of synthetic heads whose appearance is known, the video is the reference's crop and is read back
by photometric fitting through the rasteriser; a driver clip of such a dataset is known exactly, and
`--truth render` compares with the render of the reference performing it.

Writes `metrics.json` and `per_frame.png` to the folder `--out`, and prints a table.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from loki_jax.animate import (
    Performance,
    Portrait,
    find_clip,
    fit_clip,
    load_performance,
    load_portrait,
    split_clip_source,
    transfer,
)
from loki_jax.appearance import Appearance, render, sample_appearance
from loki_jax.data.records import DatasetError, open_dataset
from loki_jax.head.asset import HeadAsset, load_head
from loki_jax.head.builtin import NAME as BUILTIN
from loki_jax.head.builtin import builtin_head
from loki_jax.head.camera import crop_and_resize
from loki_jax.head.skinning import make_identity
from loki_jax.head.types import Camera, Coefficients
from loki_jax.metrics.hef import HeadExpressionFollow, head_expression_follow
from loki_jax.metrics.hpf import HeadPoseFollow, head_pose_follow, head_rotation
from loki_jax.metrics.image import psnr, ssim
from loki_jax.metrics.photometric import fit_photometric, fit_photometric_clips
from loki_jax.report import plot_per_frame
from loki_jax.video import MediaError, read_video

_RENDER_CHUNK = 16  # frames at a time


# --- measures of one video -------------------------------------------------------------------------


class Following(NamedTuple):
    """How a prediction follows a target: pose and expression."""

    pose: HeadPoseFollow
    expression: HeadExpressionFollow


def measure_following(
    head: HeadAsset,
    prediction: Coefficients,
    target: Coefficients,
    camera: Camera,
    size: int = 512,
    prediction_valid: np.ndarray | None = None,
    target_valid: np.ndarray | None = None,
) -> Following:
    """HPF and HEF of fitted coefficients (n, ...) behind a driver's; `camera` is the driver's.

    Frames that were not tracked in both count in neither measure.
    """
    to_numpy = lambda tree: jax.tree.map(np.asarray, tree)
    prediction, target = to_numpy(prediction), to_numpy(target)
    pose = head_pose_follow(
        prediction.rot, target.rot, prediction.neck, target.neck,
        pred_valid=prediction_valid, target_valid=target_valid,
    )  # fmt: skip
    tracked = np.flatnonzero(np.isfinite(pose.per_frame))
    pick = lambda tree: jax.tree.map(lambda x: x[tracked], tree)
    return Following(pose, head_expression_follow(head, pick(prediction), pick(target), camera, size=size))


def rendered_truth(
    head: HeadAsset, coefficients: Coefficients, reference: Portrait, appearance: Appearance, size: int
) -> UInt8[np.ndarray, "n s s 3"]:
    """A perfect animation: the reference's identity and appearance under `coefficients` (n, ...)."""
    length = len(coefficients.expression)
    pieces = []
    for start in range(0, length, _RENDER_CHUNK):
        index = np.minimum(np.arange(start, start + _RENDER_CHUNK), length - 1)
        part = jax.tree.map(lambda x, index=index: jnp.asarray(x)[index], coefficients)
        piece = _render_chunk(head, part, reference.camera, reference.crop, appearance, size)
        pieces.append(np.asarray(piece)[: length - start])
    return np.concatenate(pieces)


@functools.partial(jax.jit, static_argnames="size")
def _render_chunk(head, coefficients, camera, crop, appearance, size):
    identity = make_identity(head, coefficients.shape[:1])
    images = render(head, identity, coefficients, camera, crop, appearance, size)
    return jnp.round(255 * images).astype(jnp.uint8)


# --- the demo's rows -------------------------------------------------------------------------------


class EvaluationPair(NamedTuple):
    """A reference of known appearance, a driver of known coefficients, and frames to judge.

    `generated` are the animation's frames, `truth` the render it should equal (`rendered_truth`).
    """

    reference: Portrait
    appearance: Appearance
    driver: Performance
    generated: UInt8[np.ndarray, "n s s 3"]
    truth: UInt8[np.ndarray, "n s s 3"]


def evaluate_pairs(
    head: HeadAsset,
    pairs: Sequence[EvaluationPair],
    swapped: Sequence[UInt8[np.ndarray, "n s s 3"]] | None = None,
    size: int = 512,
) -> dict[str, Any]:
    """Rows *generated*, *static* and *refit* of pairs with equally long drivers.

    "static" repeats the reference image (what a method that does nothing scores), "refit" is the
    rendered truth itself (what the ruler can resolve). All three are videos that are read back by the
    same photometric fit, which knows the reference's identity and appearance, and starts from the
    neutral head.

    Args:
      swapped: for each pair the animation made with another pair's reference image.
      size: edge of HEF's renders.

    Returns:
      {"generated": {"hpf", "hef", "psnr", "ssim", "absolute_pose"}, "static", "refit", "pairs": [...],
      "generated_swapped_reference": {"psnr", "ssim"}, "per_frame": {row: [[degrees]]}, "hef_size"}; degrees
      and dB. PSNR and SSIM are against `truth`; those of "refit" are of the render of what was read back.
    """
    videos = {
        "generated": [pair.generated for pair in pairs],
        "static": [np.broadcast_to(pair.reference.image, pair.truth.shape) for pair in pairs],
        "refit": [pair.truth for pair in pairs],
    }
    together = lambda items: jax.tree.map(lambda *x: np.stack([np.asarray(v) for v in x]), *items)
    known = (
        together([np.asarray(pair.reference.coefficients.shape) for pair in pairs]),
        together([pair.appearance for pair in pairs]),
        together([pair.reference.camera for pair in pairs]),
        np.stack([pair.reference.crop for pair in pairs]),
    )
    table = [
        {
            "reference": pair.reference.name,
            "driver": pair.driver.name,
            "frames": len(pair.truth),
            "driver_yaw_sd": float(driver_yaw(pair.driver).std()),
        }
        for pair in pairs
    ]
    per_frame: dict[str, list] = {}
    for row, frames in videos.items():
        # One call for each row: equal shapes compile once.
        shape, appearance, camera, crop = known
        fitted, residual = fit_photometric_clips(np.stack(frames), head, shape, appearance, camera, crop)
        fitted = jax.tree.map(np.asarray, fitted)
        per_frame[row] = []
        for i, pair in enumerate(pairs):
            one = jax.tree.map(lambda x, i=i: x[i], fitted)
            following = measure_following(head, one, pair.driver.coefficients, pair.driver.camera, size)
            entry = {
                "hpf": following.pose.degrees,
                "hef": following.expression.distance,
                "absolute_pose": following.pose.absolute_degrees,
                "fit_residual": float(residual[i].mean()),
            }
            shown = frames[i]
            if row == "refit":
                # The truth itself has no finite PSNR; what the ruler saw in it has.
                shown = rendered_truth(head, one, pair.reference, pair.appearance, pair.truth.shape[1])
            entry |= image_scores(shown, pair.truth)
            table[i][row] = entry
            per_frame[row].append(following.pose.per_frame.tolist())
    if swapped is not None:
        for i, (pair, frames) in enumerate(zip(pairs, swapped, strict=True)):
            table[i]["generated_swapped_reference"] = image_scores(frames, pair.truth)
    rows = [row for row in (*videos, "generated_swapped_reference") if row in table[0]]
    means = {
        row: {key: float(np.mean([e[row][key] for e in table])) for key in table[0][row]} for row in rows
    }
    return means | {"pairs": table, "per_frame": per_frame, "hef_size": size}


def image_scores(
    frames: UInt8[np.ndarray, "n s s 3"], truth: UInt8[np.ndarray, "n s s 3"]
) -> dict[str, float]:
    """Mean PSNR (of finite ones) and SSIM over frames."""
    ratios = np.asarray(psnr(frames, truth))
    finite = ratios[np.isfinite(ratios)]
    return {
        "psnr": float(finite.mean()) if len(finite) else None,
        "ssim": float(np.mean(ssim(frames, truth))),
    }


def driver_yaw(driver: Performance) -> Float[np.ndarray, " n"]:
    """Yaw of the head in degrees: the direction of the face's z axis about the vertical."""
    forward = head_rotation(driver.coefficients.rot, driver.coefficients.neck).as_matrix()[:, :, 2]
    return np.degrees(np.arctan2(forward[:, 0], forward[:, 2]))


# --- program ---------------------------------------------------------------------------------------


_LARGEST_FIT = 128  # pixels: photometric fits of larger frames take longer and gain nothing


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loki_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--video", required=True, help="the video to judge")
    parser.add_argument("--driver", required=True, help="its driver: video file, or DATASET_FOLDER:CLIP_ID")
    parser.add_argument(
        "--reference", help="DATASET_FOLDER:CLIP_ID of the synthetic head that the video shows"
    )
    parser.add_argument(
        "--head",
        help='head asset for landmark fits, or "builtin" '
        "(default: that of the dataset, or the built-in head)",
    )
    parser.add_argument("--truth", help="video of the same frames as they should be, or render")
    parser.add_argument(
        "--mode", choices=("relative", "absolute"), default="relative", help="pose of --truth render"
    )
    parser.add_argument("--hef-size", type=int, default=512, help="edge of HEF's renders in pixels")
    parser.add_argument("--out", required=True, type=Path, help="folder for metrics.json and per_frame.png")
    return parser.parse_args(argv)


def _choose_head(args: argparse.Namespace) -> HeadAsset:
    """The head of --head, or of the dataset among the inputs, or the built-in one."""
    if args.head is not None and args.head != BUILTIN:
        return load_head(args.head)
    for source in (args.reference, args.driver):
        found = split_clip_source(source) if source and args.head is None else None
        if found is not None:
            return open_dataset(found[0]).head()
    return builtin_head()


def _known_appearance(source: str, head: HeadAsset) -> tuple[Portrait, Appearance]:
    """Portrait and appearance of a clip of synthetic heads."""
    found = split_clip_source(source)
    if found is None:
        raise DatasetError(
            f"--reference {source}: not DATASET_FOLDER:CLIP_ID. Only synthetic heads have a known "
            "appearance; leave --reference out to judge a real video by landmarks."
        )
    dataset, clip = find_clip(*found, head)
    if "identity_seed" not in clip.extra:
        raise DatasetError(
            f"{found[0]}: clip {clip.clip_id!r} is not of `python -m data_prep.synth`: "
            "its appearance is unknown."
        )
    appearance = sample_appearance(clip.extra["identity_seed"], head)
    return load_portrait(source, head, dataset.metadata.image_size), appearance


def _read_back_photometric(
    frames: UInt8[np.ndarray, "n h w 3"],
    video: str,
    head: HeadAsset,
    portrait: Portrait,
    appearance: Appearance,
) -> Coefficients:
    if frames.shape[1] != frames.shape[2]:
        raise MediaError(
            f"{video}: {frames.shape[2]}x{frames.shape[1]} pixels, but an animation of a crop is square."
        )
    if frames.shape[1] > _LARGEST_FIT:
        whole = np.array([0, 0, frames.shape[2], frames.shape[1]], np.float64)
        frames = np.stack([crop_and_resize(frame, whole, _LARGEST_FIT) for frame in frames])
    coefficients, _ = fit_photometric(
        frames, head, portrait.coefficients.shape, appearance, portrait.camera, portrait.crop
    )
    return coefficients


def evaluate(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the program and return what it wrote. Raises the errors of its inputs; nothing is written then."""
    args = _arguments(argv)

    # ------------------------------------------------------------------------------------ inputs
    head = _choose_head(args)
    video = read_video(args.video)
    known = _known_appearance(args.reference, head) if args.reference else None
    if args.truth == "render" and known is None:
        raise ValueError(
            "--truth render needs --reference DATASET_FOLDER:CLIP_ID, a head of known appearance"
        )
    driver = load_performance(args.driver, head, _LARGEST_FIT)
    length = min(len(video.frames), len(driver.frames))

    # ----------------------------------------------------------------------------- pose and expression
    if known is not None:
        fitted = _read_back_photometric(video.frames[:length], args.video, head, *known)
        valid = np.ones(length, bool)
    else:
        clip = fit_clip(args.video, head)
        fitted, valid = clip.fit.coefficients, np.asarray(clip.fit.confidence) > 0
    following = measure_following(
        head, fitted, driver.coefficients, driver.camera, args.hef_size, valid, np.asarray(driver.valid)
    )

    # --------------------------------------------------------------------------------- aligned frames
    scores, curves = {}, {}
    if args.truth is not None:
        if args.truth == "render":
            portrait, appearance = known
            truth = rendered_truth(
                head, transfer(head, driver, portrait, args.mode), portrait, appearance, video.frames.shape[1]
            )
        else:
            truth = read_video(args.truth).frames
        count = min(len(truth), len(video.frames))
        if truth.shape[1:] != video.frames.shape[1:]:
            raise MediaError(
                f"{args.truth}: frames of {truth.shape[1:3]}, {args.video} has {video.frames.shape[1:3]}."
            )
        scores = image_scores(video.frames[:count], truth[:count])
        curves = {
            "PSNR (dB)": {"video": np.asarray(psnr(video.frames[:count], truth[:count]))},
            "SSIM": {"video": np.asarray(ssim(video.frames[:count], truth[:count]))},
        }

    # ------------------------------------------------------------------------------------- results
    result = {
        "video": args.video,
        "driver": args.driver,
        "ruler": "photometric" if known is not None else "landmarks",
        "frames": following.pose.n_frames,
        "track_rate": following.pose.track_rate,
        "hpf": following.pose.degrees,
        "absolute_pose": following.pose.absolute_degrees,
        "hef": following.expression.distance,
        "hef_uncovered": following.expression.uncovered,
        "hef_size": args.hef_size,
    } | scores
    curves = {
        "HPF (degrees)": {"video": following.pose.per_frame},
        "HEF": {"video": following.expression.per_frame},
    } | curves
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "metrics.json", result)
    plot_per_frame(args.out / "per_frame.png", curves, f"{args.video} behind {args.driver}")
    for label, key, form in (
        ("frames compared", "frames", "{}"),
        ("track rate", "track_rate", "{:.2f}"),
        ("HPF (degrees)", "hpf", "{:.2f}"),
        ("absolute pose (degrees)", "absolute_pose", "{:.2f}"),
        ("HEF", "hef", "{:.4f}"),
        ("HEF, uncovered share", "hef_uncovered", "{:.3f}"),
        ("PSNR (dB)", "psnr", "{:.2f}"),
        ("SSIM", "ssim", "{:.4f}"),
    ):
        if key in result:
            print(f"{label:26}{'-' if result[key] is None else form.format(result[key]):>10}")
    return result


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that the file appears whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def main(argv: list[str] | None = None) -> None:
    # MediaError, DatasetError, HeadAssetError and FitError are all ValueErrors.
    try:
        evaluate(argv)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
