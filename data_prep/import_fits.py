"""Fits of other programs to shards: public Loki / CAP4D `fit.npz`, VHAP / GaussianAvatars `flame_param.npz`.

    python -m data_prep.import_fits --fits FILES_OR_FOLDERS... --head flame.npz --out DIR

A fit is a `fit.npz` with its pictures beside it (`images/cam0/`, `images/` or a video; `--frames` names
them otherwise), or VHAP's export: a `transforms.json` with `flame_param/*.npz` or `flame_param.npz`. The
head must be made from the FLAME model that was fitted, with as many axes (`python -m data_prep.head_asset
flame MODEL.pkl`, with `--blink` for fits of the public Loki code, whose 65th expression axis is a blink).
Conventions are those of method, sections 3 and 11. The result is a dataset as `data_prep.build` makes it,
and stopping, continuing and extending work the same way. `data_prep.export` goes back.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from data_prep.dataset.assemble import DatasetOptions, build
from data_prep.dataset.clips import load_any_head
from data_prep.dataset.latents import load_encoder
from data_prep.dataset.manifest import pipeline_identity, plan_clips, read_labels
from data_prep.dataset.options import add_dataset_arguments, check_dataset_arguments, interrupted
from data_prep.dataset.workers import WorkerError
from data_prep.importers.fits import find_fits, fit_digest, make_import
from data_prep.importers.frames import called
from loki_jax.compile_cache import enable_compile_cache
from loki_jax.data.schema import DatasetError
from loki_jax.face.asset import HeadAssetError
from loki_jax.fitting.clips import CROP_FACTOR
from loki_jax.video.reader import MediaError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.import_fits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fits", nargs="+", required=True, help="fit files, or folders with fits")
    parser.add_argument("--head", required=True, help="head asset of the fitted model")
    add_dataset_arguments(parser)
    parser.add_argument("--frames", type=Path, help="folder of pictures or video, for a single fit")
    parser.add_argument("--camera", type=int, default=0, help="which camera of a fit with several")
    parser.add_argument(
        "--neck", choices=("keep", "drop"), default="keep", help="drop: as the public driver map does"
    )
    parser.add_argument(
        "--official-crops",
        action="store_true",
        help="a box of whole pixels for each frame, as the public code",
    )
    parser.add_argument("--fps", type=Fraction, default=Fraction(25), help="rate to resample to")
    parser.add_argument(
        "--source-fps", type=Fraction, default=Fraction(25), help="rate of folders of pictures"
    )
    args = parser.parse_args(argv)
    enable_compile_cache()
    check_dataset_arguments(parser, args)
    if args.fps <= 0 or args.source_fps <= 0 or args.camera < 0:
        parser.error("--fps and --source-fps must be positive, --camera not negative")
    crop_factor = args.crop_factor if args.crop_factor is not None else CROP_FACTOR
    image_format = args.image_format or ("png" if args.size <= 128 else "jpeg")
    options = DatasetOptions(
        args.size, "png" if args.no_images else image_format, not args.no_images, args.validation
    )
    settings = {
        "importer": True, "size": args.size, "image_format": options.image_format, "crop_factor": crop_factor,
        "official_crops": args.official_crops, "fps": str(args.fps), "source_fps": str(args.source_fps),
        "camera": args.camera, "neck": args.neck,
    }  # fmt: skip
    try:
        fits = find_fits(args.fits)
        if args.frames is not None and len(fits) > 1:
            raise DatasetError(
                f"--frames names the pictures of one fit, there are {len(fits)}. Import one by one."
            )
        head = load_any_head(args.head)
        labels = None if args.identities is None else read_labels(args.identities)
        encoder = None
        if args.latents is not None:
            encoder = load_encoder(
                args.latents, args.size, config=args.latents_config, batch=args.latents_batch
            )
        made_by = pipeline_identity(head, {}, settings)
        planned = plan_clips(
            fits, made_by, named=[called(path) for path in fits], identity_from=args.identity_from,
            labels=labels, licence=args.licence,
            digest_of=lambda path: fit_digest(path, args.frames, args.camera),
        )  # fmt: skip
        reader = {"camera": args.camera, "neck": args.neck, "frames": args.frames}
        make_fit = functools.partial(
            make_import, head, size=args.size, image_format=options.image_format, crop_factor=crop_factor,
            official_crops=args.official_crops, fps=args.fps, source_fps=args.source_fps, reader=reader,
        )  # fmt: skip
        summary = build(
            planned, head, args.out, make_fit, made_by, options, encoder=encoder, workers=args.workers,
            overwrite=args.overwrite, keep_work=args.keep_work, log=lambda line: print(line, flush=True),
        )  # fmt: skip
    except (MediaError, HeadAssetError, DatasetError, WorkerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return interrupted(args.out)
    for row in summary["clips"]:
        for note in row["notes"]:
            print(f"note: {row['clip']}: {note}")
    for entry in summary["rejected"]:
        print(f"rejected  {entry['reason']}")
    print(f"{args.out}: {len(summary['clips'])} clips, {sum(summary['records'].values())} frames")
    return 0


if __name__ == "__main__":
    sys.exit(main())
