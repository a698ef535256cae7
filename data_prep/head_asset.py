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

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from data_prep import cli


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssetOptions:
    """What all sources share.

    Attributes:
      out: the asset to write (.npz).
      sheet: the pictures to write (default: --out with .png).
      no_sheet: write no pictures.
      embedding: add the MediaPipe landmarks that are missing.
      wheel: the mediapipe 0.10.21 wheel with the networks (else the cache).
    """

    out: Path
    sheet: Path | None = None
    no_sheet: bool = False
    embedding: bool = True
    wheel: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Builtin(AssetOptions):
    """The package's own procedural head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ict(AssetOptions):
    """The ICT-FaceKit arrays.

    Attributes:
      arrays: ICT-FaceKit arrays (.npz).
    """

    arrays: tyro.conf.Positional[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flame(AssetOptions):
    """A FLAME pickle.

    Attributes:
      model: FLAME model (.pkl).
      blink: vertex offsets of a blink; takes the place of the last expression axis.
      landmarks: landmark embedding (lmk_face_idx, lmk_b_coords).
      mask: vertex numbers the driver map shows, such as FLAME_masks.pkl.
      mask_region: region of --mask, if it has several.
      n_shape: identity axes to keep.
      n_expression: expression axes to keep, with the blink.
      lip_vertex: vertex where the inner mouth hangs; -1 for none.
    """

    model: tyro.conf.Positional[str]
    blink: str | None = None
    landmarks: str | None = None
    mask: str | None = None
    mask_region: str = "face"
    n_shape: int = 150
    n_expression: int = 65
    lip_vertex: int = 3533


Options = (
    Annotated[Builtin, tyro.conf.subcommand("builtin")]
    | Annotated[Ict, tyro.conf.subcommand("ict")]
    | Annotated[Flame, tyro.conf.subcommand("flame")]
)


def head_asset(options: Builtin | Ict | Flame) -> None:
    """Write the asset and its sheet."""
    from data_prep.landmarks.embed import complete_landmarks
    from data_prep.landmarks.head_sheet import save_sheet
    from loki_jax.face.asset import HeadAssetError, save_head
    from loki_jax.face.builtin import builtin_head
    from loki_jax.face.flame import head_from_flame
    from loki_jax.face.ict import head_from_ict

    if options.out.suffix != ".npz":
        raise HeadAssetError(f"{options.out}: a head asset ends in .npz. Choose such a name for --out.")
    if isinstance(options, Flame):
        head = head_from_flame(
            options.model, blink=options.blink, n_shape=options.n_shape, n_expression=options.n_expression,
            landmarks=options.landmarks, mask=options.mask, mask_region=options.mask_region,
            lip_vertex=options.lip_vertex,
        )  # fmt: skip
    else:
        head = head_from_ict(options.arrays) if isinstance(options, Ict) else builtin_head()
    if options.embedding:
        head = complete_landmarks(head, options.wheel)
    digest = save_head(options.out, head)
    print(
        f"{options.out}: {head.name}, {len(head.template)} vertices, {len(head.faces)} faces, "
        f"{head.n_shape} identity and {head.n_expression} expression axes, sha256 {digest}"
    )
    if not options.no_sheet:
        sheet = options.sheet or options.out.with_suffix(".png")
        save_sheet(sheet, head)
        print(f"{sheet}: pictures of it")


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(Options, "head_asset", __doc__, argv)
    return cli.run(head_asset, options)


if __name__ == "__main__":
    sys.exit(main())
