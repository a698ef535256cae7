"""Real clips to shards: decode, landmarks, fit, one crop box a clip, records, and a picture of each fit.

    python -m data_prep.build --clips FILES_OR_FOLDERS... --head HEAD.npz --out DIR [--size 512]

DIR becomes a dataset (`loki_jax.data.writer`) with additions: `overlays/CLIP.mp4`, the mesh drawn over
each clip; `summary.json`, how good each fit is and which clips were rejected and why; `manifest.json`,
identities, checksums and the versions that made it. HEAD is a head asset, the ICT-FaceKit arrays, or the
word builtin. A clip that cannot be used is listed and left out; the program fails only if none can.

Clips are fitted by several processes, and each finished one is kept in `DIR.work`: stop the program at
any moment and run the same command again. DIR appears complete or not at all. Given more clips, the same
command fits the new ones only.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from fractions import Fraction

from data_prep.dataset.clips import BuildSettings, build_dataset, load_any_head, load_landmarker
from data_prep.dataset.latents import load_encoder
from data_prep.dataset.manifest import find_clips, read_labels
from data_prep.dataset.options import (
    add_dataset_arguments,
    check_dataset_arguments,
    format_table,
    interrupted,
)
from data_prep.dataset.workers import WorkerError
from loki_jax.compile_cache import enable_compile_cache
from loki_jax.data.schema import DatasetError
from loki_jax.face.asset import HeadAssetError
from loki_jax.fitting.model_files import LandmarkError, fetch_models
from loki_jax.fitting.problem import FitError, FitSettings
from loki_jax.fitting.task_file import with_task_file
from loki_jax.io import file_sha256
from loki_jax.video.reader import MediaError


def main(argv: Sequence[str] | None = None) -> int:
    default = BuildSettings()
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clips", nargs="+", required=True, help="video files, or folders with videos")
    parser.add_argument("--head", required=True, help="head asset, ICT-FaceKit arrays, or builtin")
    add_dataset_arguments(parser)
    parser.add_argument("--fps", type=Fraction, default=default.fps, help="frame rate, e.g. 25 or 30000/1001")
    parser.add_argument("--face", type=int, help="which face, 0 the most prominent (the default)")
    parser.add_argument("--focal", type=float, help="focal length in pixels (default: from --fov)")
    parser.add_argument(
        "--fov", type=float, default=default.fit.fov, help="field of view of the longer side, degrees"
    )
    parser.add_argument("--photometric", action="store_true", help="refine poses by the pixels (slower)")
    parser.add_argument("--min-frames", type=int, default=default.min_frames)
    parser.add_argument("--min-face", type=float, default=default.min_face, help="pixels of the head")
    parser.add_argument(
        "--max-error", type=float, default=100 * default.max_error, help="percent; see summary.json"
    )
    parser.add_argument(
        "--max-memory", type=float, default=default.max_bytes / 2**30,
        help="GiB of frames of one clip, in each process (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--max-seconds", type=Fraction, help="use only so much of each clip")
    parser.add_argument(
        "--overlay", type=int, default=default.overlay, help="side of the overlay videos, 0: none"
    )
    parser.add_argument(
        "--wheel", help="the mediapipe 0.10.21 wheel, where the landmark models cannot be downloaded"
    )
    parser.add_argument(
        "--landmarker", type=Path, help="MediaPipe's face_landmarker.task, for lids and mouths that say more"
    )
    args = parser.parse_args(argv)
    enable_compile_cache()
    check_dataset_arguments(parser, args)
    if args.fps <= 0 or args.min_frames < 1 or args.overlay < 0:
        parser.error("--fps and --min-frames must be positive, --overlay not negative")
    if not 0 < args.fov < 150 or (args.focal is not None and args.focal <= 0):
        parser.error("--fov must be in (0, 150), --focal positive")
    if args.max_seconds is not None and args.max_seconds <= 0:
        parser.error("--max-seconds must be positive")
    settings = BuildSettings(
        size=args.size,
        fps=args.fps,
        face=args.face,
        focal=args.focal,
        crop_factor=args.crop_factor,
        min_frames=args.min_frames,
        min_face=args.min_face,
        max_error=args.max_error / 100,
        max_bytes=int(args.max_memory * 2**30),
        max_seconds=args.max_seconds,
        overlay=args.overlay,
        image_format=args.image_format,
        images=not args.no_images,
        validation=args.validation,
        identity_from=args.identity_from,
        licence=args.licence,
        fit=FitSettings(fov=args.fov),
        photometric=args.photometric,
    )
    try:
        paths = find_clips(args.clips)
        head = load_any_head(args.head)
        labels = None if args.identities is None else read_labels(args.identities)
        models = with_task_file(fetch_models(args.wheel), args.landmarker)
        encoder = None
        if args.latents is not None:
            encoder = load_encoder(
                args.latents, args.size, config=args.latents_config, batch=args.latents_batch
            )
        summary = build_dataset(
            paths, head, args.out, functools.partial(load_landmarker, models), settings,
            models={name: file_sha256(path) for name, path in models.items()},
            labels=labels, encoder=encoder, workers=args.workers, overwrite=args.overwrite,
            keep_work=args.keep_work, log=lambda line: print(line, flush=True),
        )  # fmt: skip
    except (MediaError, HeadAssetError, LandmarkError, FitError, DatasetError, WorkerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return interrupted(args.out)
    print(format_table(summary))
    print(f"{args.out}: {len(summary['clips'])} clips, {sum(summary['records'].values())} frames")
    return 0


if __name__ == "__main__":
    sys.exit(main())
