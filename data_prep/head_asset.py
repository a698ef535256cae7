"""Write a head asset, and a sheet of pictures that shows what it can do.

    python -m data_prep.head_asset builtin --out head.npz
    python -m data_prep.head_asset ict ict_head5k.npz --out head.npz
    python -m data_prep.head_asset flame generic_model.pkl --out head.npz [--blink FILE]
        [--landmarks FILE] [--mask FILE] [--n-shape 150] [--n-expression 65]

A head without the 478 MediaPipe landmarks that the fit uses gets them from `data_prep.landmarks.embed`, if it
has the 68 iBUG ones to start from (`--no-embedding`: not). The licence of the source is kept in the asset.
The sheet (`--sheet`, by default beside the asset with the suffix .png) holds a turntable, the joints,
the landmarks, the first identity axes and every expression axis.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_prep.landmarks.head_sheet import head_sheet
from loki_jax.compile_cache import enable_compile_cache
from loki_jax.face.asset import HeadAsset, HeadAssetError, save_head
from loki_jax.face.builtin import builtin_head
from loki_jax.face.flame import head_from_flame
from loki_jax.face.ict import head_from_ict
from loki_jax.fitting.landmarker import Landmarker
from loki_jax.fitting.model_files import LandmarkError, cached_models, fetch_models
from loki_jax.fitting.points import LANDMARK_SET
from loki_jax.io import atomic_path


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.head_asset", description=__doc__.splitlines()[0]
    )
    sources = parser.add_subparsers(dest="source", required=True)
    builtin = sources.add_parser("builtin", help="the package's own procedural head")
    ict = sources.add_parser("ict", help="the ICT-FaceKit arrays")
    ict.add_argument("arrays", help="ICT-FaceKit arrays (.npz)")
    flame = sources.add_parser("flame", help="a FLAME pickle")
    flame.add_argument("model", help="FLAME model (.pkl)")
    flame.add_argument(
        "--blink", help="vertex offsets of a blink; takes the place of the last expression axis"
    )
    flame.add_argument("--landmarks", help="landmark embedding (lmk_face_idx, lmk_b_coords)")
    flame.add_argument("--mask", help="vertex numbers the driver map shows, such as FLAME_masks.pkl")
    flame.add_argument("--mask-region", default="face", help="region of --mask, if it has several")
    flame.add_argument("--n-shape", type=int, default=150)
    flame.add_argument("--n-expression", type=int, default=65)
    flame.add_argument("--lip-vertex", type=int, default=3533, help="-1 for no inner mouth")
    for source in (builtin, ict, flame):
        source.add_argument("--out", required=True, type=Path, help="the asset to write (.npz)")
        source.add_argument("--sheet", type=Path, help="the pictures to write (default: --out with .png)")
        source.add_argument("--no-sheet", action="store_true", help="write no pictures")
        source.add_argument("--no-embedding", action="store_true", help="add no MediaPipe landmarks")
        source.add_argument("--wheel", help="the mediapipe 0.10.21 wheel with the networks (else the cache)")
    return parser.parse_args(argv)


def _write_image(path: Path, image: UInt8[np.ndarray, "height width 3"]) -> None:
    with atomic_path(path) as partial:
        Image.fromarray(image).save(partial, format="PNG")


def _embedded(head: HeadAsset, wheel: str | None) -> HeadAsset:
    """The head with all MediaPipe landmarks; as it is where it has them or nothing to start from."""
    from data_prep.landmarks.embed import can_embed, with_landmarks

    held = head.landmarks.get(LANDMARK_SET)
    if held is not None and (np.asarray(held.face)[:468] >= 0).all():
        return head
    if not can_embed(head):
        print(
            f"note: {head.name} has no landmarks to start from, so it can be rendered but not fitted. "
            "Give its 51 or 68 iBUG landmarks with --landmarks."
        )
        return head
    models = fetch_models(wheel) if wheel else cached_models()
    if models is None:
        print(
            "note: the landmark networks are not cached (`python -m data_prep.fetch_models` or --wheel); "
            "landmarks are placed by closest points, which is less exact."
        )
    try:
        head, openings = with_landmarks(head, None if models is None else Landmarker(models))
    except HeadAssetError as error:
        print(f"note: {error} The asset keeps the landmarks it has.")
        return head
    for opening in openings:
        print(
            f"{opening.part}: gap over width {opening.rest:.2f} at rest, {opening.least:.2f} by "
            f"{opening.least_by}, {opening.most:.2f} by {opening.most_by}"
        )
    return head


def main(argv: list[str] | None = None) -> int:
    """Write the asset and its sheet; returns the exit status."""
    arguments = _arguments(argv)
    enable_compile_cache()
    try:
        if arguments.out.suffix != ".npz":
            raise HeadAssetError(f"{arguments.out}: a head asset ends in .npz. Choose such a name for --out.")
        if arguments.source == "builtin":
            head = builtin_head()
        elif arguments.source == "ict":
            head = head_from_ict(arguments.arrays)
        else:
            head = head_from_flame(
                arguments.model,
                blink=arguments.blink,
                n_shape=arguments.n_shape,
                n_expression=arguments.n_expression,
                landmarks=arguments.landmarks,
                mask=arguments.mask,
                mask_region=arguments.mask_region,
                lip_vertex=arguments.lip_vertex,
            )
        if not arguments.no_embedding:
            head = _embedded(head, arguments.wheel)
        digest = save_head(arguments.out, head)
    except (HeadAssetError, LandmarkError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{arguments.out}: {head.name}, {len(head.template)} vertices, {len(head.faces)} faces, "
        f"{head.n_shape} identity and {head.n_expression} expression axes, sha256 {digest}"
    )
    if not arguments.no_sheet:
        sheet = arguments.sheet or arguments.out.with_suffix(".png")
        _write_image(sheet, head_sheet(head))
        print(f"{sheet}: pictures of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
