"""Make pairs for cross-identity supervision: another person performs each clip of a dataset.

    python -m data_prep.cross_pairs --shards DIR --out DIR2 [--portraits FOLDER]

DIR2 holds the clips of DIR, and beside each a clip of another person with its poses and expressions. Clips
of synthetic heads are rendered exactly. Clips of real people are performed by the portraits of a folder, one
drawn for each clip, through the geometry renderer. Train on the pairs with --config.data.cross_share=1
(docs/svp.md).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep import cli


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the program.

    Attributes:
      shards: folder of the dataset.
      out: folder of the dataset to make.
      portraits: folder of pictures of people who perform clips of real people.
      seed: of the draw.
      overwrite: replace a dataset that is already there.
    """

    shards: Path
    out: Path
    portraits: Path | None = None
    seed: int = 0
    overwrite: bool = False


def cross_pairs(options: Options) -> None:
    from data_prep.dataset.pairs import paired_clips
    from loki_jax.data.reader import open_dataset
    from loki_jax.data.schema import DatasetError
    from loki_jax.data.writer import write_dataset
    from loki_jax.sources import fit_portrait

    dataset = open_dataset(options.shards)
    metadata, head = dataset.metadata, dataset.head()
    if metadata.image_format is None or metadata.latent_shape is not None:
        raise DatasetError(f"{options.shards}: holds latents. Build it with images alone.")
    portraits = []
    if options.portraits is not None:
        pictures = (".png", ".jpg", ".jpeg", ".webp")
        files = sorted(path for path in options.portraits.iterdir() if path.suffix.lower() in pictures)
        if not files:
            raise DatasetError(f"{options.portraits}: no pictures there. Give another folder.")
        portraits = [fit_portrait(file, head, metadata.image_size) for file in files]
    clips = paired_clips(dataset, portraits, options.seed)
    written = write_dataset(
        options.out, head, clips, metadata.image_size,
        image_format=metadata.image_format, overwrite=options.overwrite,
    )  # fmt: skip
    print(f"wrote {options.out}: {written.records} frames")


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(Options, "cross_pairs", __doc__, argv)
    return cli.run(cross_pairs, options)


if __name__ == "__main__":
    sys.exit(main())
