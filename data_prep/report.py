"""How good the fits of a dataset are: one HTML file with tables, plots, thumbnails and overlay clips.

    python -m data_prep.report DIR [--out DIR/report.html] [--overlays auto|embed|link|none]

DIR is a dataset (docs/data.md). Pose and expression are measured on its records; reprojection errors,
settings and rejected clips come from `summary.json`, where `data_prep.build` left one. The same table is
printed. Plots and thumbnails are inside the file; overlay clips too while they are small (`auto`: together
below 48 MB), otherwise they are links to DIR/overlays. docs/fitting.md explains the columns.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from data_prep import cli


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the program.

    Attributes:
      dataset: folder of a dataset.
      out: file to write (default: report.html in the dataset).
      overlays: where the overlay clips are.
    """

    dataset: tyro.conf.Positional[Path]
    out: Path | None = None
    overlays: Literal["auto", "embed", "link", "none"] = "auto"


def report(options: Options) -> None:
    from data_prep.dataset.report import format_table, make_report

    page = options.out or options.dataset / "report.html"
    clips, summary = make_report(options.dataset, page, options.overlays)
    print(format_table(clips))
    for reason, count in Counter(entry["reason"] for entry in summary["rejected"]).most_common():
        print(f"rejected ({count}): {reason}")
    print(f"wrote {page}")


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(Options, "report", __doc__, argv)
    return cli.run(report, options)


if __name__ == "__main__":
    sys.exit(main())
