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

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep import cli
from data_prep.dataset.options import BuildOptions
from loki_jax.fitting.model_files import fetch_models
from loki_jax.fitting.task_file import with_task_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(BuildOptions):
    """The options of the program.

    Attributes:
      clips: video files, or folders with videos.
      head: head asset, ICT-FaceKit arrays, or builtin.
      out: folder of the dataset to make.
      wheel: the mediapipe 0.10.21 wheel, where the landmark models cannot be downloaded.
      landmarker: MediaPipe's face_landmarker.task, for lids and mouths that say more.
    """

    clips: tuple[str, ...]
    head: str
    out: Path
    wheel: str | None = None
    landmarker: Path | None = None


def build(options: Options) -> None:
    from data_prep.dataset import clips
    from data_prep.dataset.manifest import find_clips
    from data_prep.dataset.summary import format_summary

    paths, head = find_clips(options.clips), clips.load_any_head(options.head)
    models = with_task_file(fetch_models(options.wheel), options.landmarker)
    summary = clips.build_dataset(
        paths, head, options.out, functools.partial(clips.load_landmarker, models), options, models
    )
    print(format_summary(summary))
    print(f"{options.out}: {len(summary['clips'])} clips, {sum(summary['records'].values())} frames")


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(Options, "build", __doc__, argv)
    return cli.run(build, options, f"finished clips are kept in {options.out}.work")


if __name__ == "__main__":
    sys.exit(main())
