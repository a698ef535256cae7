"""Measure how well a generated video follows its driver.

    python -m loki_jax.evaluate --video out.mp4 --driver clip.mp4 --head head.npz --out results
    python -m loki_jax.evaluate --video out.mp4 --driver SHARDS:CLIP --reference SHARDS:CLIP --out results

HPF and HEF (method, section 10) against the driver; PSNR and SSIM where the frames are aligned with
`--truth VIDEO`. Real videos are read by the landmark fit. With `--reference DATASET_FOLDER:CLIP_ID`, a
clip of synthetic heads whose appearance is known, the video is the reference's crop and is read back
by photometric fitting through the rasteriser; a driver clip of such a dataset is known exactly, and
`--truth render` compares with the render of the reference performing it.

Writes `metrics.json` and `per_frame.png` to the folder `--out`, and prints a table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from loki_jax.data.reader import open_dataset
from loki_jax.data.schema import DatasetError
from loki_jax.evaluation import image_scores, measure_following, rendered_truth
from loki_jax.face.asset import HeadAsset, load_head
from loki_jax.face.builtin import NAME as BUILTIN
from loki_jax.face.builtin import builtin_head
from loki_jax.face.crop import crop_and_resize
from loki_jax.face.types import Coefficients
from loki_jax.fitting.photometric import fit_photometric
from loki_jax.io import write_json
from loki_jax.metrics.image import psnr, ssim
from loki_jax.pictures import plot_per_frame
from loki_jax.pipeline import retarget_clip
from loki_jax.sources import (
    Portrait,
    find_clip,
    fit_clip,
    load_driving_clip,
    load_portrait,
    split_clip_source,
)
from loki_jax.synthetic.appearance import Appearance, sample_appearance
from loki_jax.video.reader import MediaError, read_video

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
        frames, head, portrait.coefficients.betas, appearance, portrait.camera, portrait.crop
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
    driver = load_driving_clip(args.driver, head, _LARGEST_FIT)
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
                head,
                retarget_clip(head, driver, portrait, args.mode),
                portrait,
                appearance,
                video.frames.shape[1],
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


def main(argv: list[str] | None = None) -> None:
    # MediaError, DatasetError, HeadAssetError and FitError are all ValueErrors.
    try:
        evaluate(argv)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
