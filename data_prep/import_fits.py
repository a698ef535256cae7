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

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep import cli
from data_prep.dataset.options import ImportOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ImportOptions):
    """The options of the program.

    Attributes:
      fits: fit files, or folders with fits.
      head: head asset of the fitted model.
      out: folder of the dataset to make.
    """

    fits: tuple[str, ...]
    head: str
    out: Path


def import_fits(options: Options) -> None:
    from data_prep.dataset.clips import load_any_head
    from data_prep.importers.fits import find_fits, import_dataset

    fits = find_fits(options.fits)
    summary = import_dataset(fits, load_any_head(options.head), options.out, options)
    for row in summary["clips"]:
        for note in row["notes"]:
            print(f"note: {row['clip']}: {note}")
    for entry in summary["rejected"]:
        print(f"rejected  {entry['reason']}")
    print(f"{options.out}: {len(summary['clips'])} clips, {sum(summary['records'].values())} frames")


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(Options, "import_fits", __doc__, argv)
    return cli.run(import_fits, options, f"finished clips are kept in {options.out}.work")


if __name__ == "__main__":
    sys.exit(main())
