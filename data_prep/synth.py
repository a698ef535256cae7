"""Make a dataset of synthetic talking heads with known truth.

    python -m data_prep.synth --out DIR [--identities 64] [--clips-per-identity 2] [--frames 32..64]
    python -m data_prep.synth --preview sheet.png

The dataset (docs/data.md) holds clips of `loki_jax.synthetic.clips`, whose coefficients are exact. The clip
table keeps the `identity_seed`, from which `sample_appearance` gives the colours of the identity again.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep import cli
from data_prep.dataset.options import SynthOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SynthOptions):
    """The options of the program.

    Attributes:
      out: folder of the dataset to make.
      preview: write a contact sheet to this PNG instead of a dataset.
      overwrite: replace a dataset that is already there.
    """

    out: Path | None = None
    preview: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.out is None) == (self.preview is None):
            raise ValueError("give either --out DIR or --preview FILE.png")


def synth(options: Options) -> None:
    from PIL import Image

    from data_prep.dataset.synthetic import preview, synthetic_clips
    from loki_jax.data.writer import write_dataset
    from loki_jax.face.builtin import builtin_head
    from loki_jax.io import atomic_path

    head = builtin_head()
    if options.preview is not None:
        with atomic_path(options.preview) as partial:
            Image.fromarray(preview(head, options)).save(partial)
        print(f"wrote {options.preview}")
    if options.out is not None:
        clips = synthetic_clips(head, options)
        metadata = write_dataset(options.out, head, clips, options.size, overwrite=options.overwrite)
        print(f"wrote {options.out}: {metadata.records} frames, head {metadata.head_sha256[:12]}")


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(Options, "synth", __doc__, argv)
    return cli.run(synth, options)


if __name__ == "__main__":
    sys.exit(main())
