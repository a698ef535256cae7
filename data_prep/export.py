"""A dataset's clips as `fit.npz` files of the public Loki / CAP4D layout (method, section 11).

    python -m data_prep.export DIR --out FOLDER [--clips ID...] [--frames]

writes FOLDER/CLIP/fit.npz for every clip: shape, expr, rot, tra, neck_rot, jaw_rot, eye_rot, fx, fy, cx,
cy, extr, as float32 with the dataset's own numbers. The camera is that of the uncropped frames. With
--frames the stored crops are written to `images/cam0/00000.png ...` and the camera becomes that of the
crops. `data_prep.import_fits` reads both back. Programs that expect FLAME can use fits of FLAME alone.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import tyro

from data_prep import cli


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the program.

    Attributes:
      dataset: folder of the dataset.
      out: folder that gets one folder a clip.
      clips: only the clips of these names.
      frames: also write the stored crops as pictures.
    """

    dataset: tyro.conf.Positional[Path]
    out: Path
    clips: tuple[str, ...] = ()
    frames: bool = False


def export(options: Options) -> None:
    from data_prep.importers.loki import export_clip
    from loki_jax.data.reader import open_dataset
    from loki_jax.data.schema import DatasetError

    dataset = open_dataset(options.dataset)
    head = dataset.head()
    by_id = {clip.clip_id: clip for clip in dataset.clips}
    unknown = [name for name in options.clips if name not in by_id]
    if unknown:
        raise DatasetError(
            f"{options.dataset}: has no clip {unknown[0]!r}, but {', '.join(list(by_id)[:5])} and so on."
        )
    names = options.clips or tuple(by_id)
    notes: Counter[str] = Counter()
    for number, name in enumerate(names, start=1):
        notes.update(export_clip(dataset, by_id[name], head, options.out / name, frames=options.frames))
        print(f"[{number}/{len(names)}] {options.out / name}: {by_id[name].length} frames", flush=True)
    for note, count in notes.items():
        print(f"note ({count} clips): {note}")


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(Options, "export", __doc__, argv)
    return cli.run(export, options)


if __name__ == "__main__":
    sys.exit(main())
