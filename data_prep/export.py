"""A dataset's clips as `fit.npz` files of the public Loki / CAP4D layout (method, section 11).

    python -m data_prep.export DIR --out FOLDER [--clips ID...] [--frames]

writes FOLDER/CLIP/fit.npz for every clip: shape, expr, rot, tra, neck_rot, jaw_rot, eye_rot, fx, fy, cx,
cy, extr, as float32 with the dataset's own numbers. The camera is that of the uncropped frames. With
--frames the stored crops are written to `images/cam0/00000.png ...` and the camera becomes that of the
crops. `data_prep.import_fits` reads both back. Programs that expect FLAME can use fits of FLAME alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from loki_jax.compile_cache import enable_compile_cache
from loki_jax.data.reader import Dataset, open_dataset
from loki_jax.data.schema import ClipInfo, DatasetError, Frame
from loki_jax.face.asset import HeadAsset
from loki_jax.io import atomic_path, remove, stale_siblings

_N_PUBLIC_EXPRESSION = 65

FIT_FILE = "fit.npz"


class Exported(NamedTuple):
    """The arrays of a `fit.npz`, and what could not be expressed in it."""

    arrays: dict[str, np.ndarray]
    notes: tuple[str, ...]


def public_expression(
    expression: Float[np.ndarray, "N n"], head: HeadAsset
) -> tuple[Float[np.ndarray, "N m"], tuple[str, ...]]:
    """Expression on the public axes: for FLAME 64 of its own and a blink, for other heads theirs."""
    if head.name != "flame":
        return expression, (f"the head is {head.name!r}: programs for FLAME cannot use this fit.",)
    names, last = head.expression_names, _N_PUBLIC_EXPRESSION - 1
    plain = [index for index, name in enumerate(names) if name != "blink"]
    result = np.zeros((len(expression), _N_PUBLIC_EXPRESSION), np.float32)
    kept = plain[:last]
    result[:, : len(kept)] = expression[:, kept]
    if "blink" in names:
        result[:, last] = expression[:, names.index("blink")]
    lost = np.abs(expression[:, plain[last:]]).max(initial=0)
    notes = (
        () if lost == 0 else (f"FLAME's axes beyond the 64th (up to {lost:.2f}) have no place and are lost.",)
    )
    return result, notes


def clip_to_fit(frames: Sequence[Frame], head: HeadAsset, name: str, *, cropped: bool = False) -> Exported:
    """The `fit.npz` of a clip.

    Args:
      name: what errors call the clip.
      cropped: give the camera of the stored crops instead of that of the uncropped frames.

    Raises:
      DatasetError: shape, camera or, with `cropped`, box change within the clip: the layout has one of each.
    """
    intrinsics = np.stack([frame.camera.intrinsics for frame in frames]).astype(np.float64)
    if cropped:
        boxes = np.stack([frame.crop for frame in frames]).astype(np.float64)
        size = frames[0].image.shape[0]
        scale = size / (boxes[:, 2:] - boxes[:, :2])
        intrinsics = np.concatenate(
            [intrinsics[:, :2] * scale, (intrinsics[:, 2:] - boxes[:, :2]) * scale], axis=1
        )
    fixed = {
        "shape": np.stack([frame.coefficients.betas for frame in frames]),
        "camera": intrinsics,
        "camera's pose": np.stack([frame.camera.extrinsics for frame in frames]),
    }
    for what, values in fixed.items():
        if (values != values[0]).any():
            raise DatasetError(
                f"{name}: its {what} changes from frame to frame, a fit.npz has one for the clip"
                + (". Export it without `--frames`." if cropped and what == "camera" else ".")
            )
    stacked = {
        field: np.stack([getattr(frame.coefficients, field) for frame in frames]).astype(np.float32)
        for field in ("expression", "rot", "tra", "neck", "jaw", "eyes")
    }
    expression, notes = public_expression(stacked["expression"], head)
    arrays = {
        "shape": fixed["shape"][0].astype(np.float32),
        "expr": expression,
        "rot": stacked["rot"],
        "tra": stacked["tra"],
        "neck_rot": stacked["neck"],
        "jaw_rot": stacked["jaw"],
        "eye_rot": stacked["eyes"],
        "extr": fixed["camera's pose"][:1].astype(np.float32),
    }
    for index, key in enumerate(("fx", "fy", "cx", "cy")):
        arrays[key] = intrinsics[:1, index : index + 1].astype(np.float32)
    return Exported(arrays, notes)


def export_clip(
    dataset: Dataset, clip: ClipInfo, head: HeadAsset, out: Path, *, frames: bool = False
) -> tuple[str, ...]:
    """Write one clip to the folder `out`, whole or not at all; returns what could not be expressed.

    Raises:
      DatasetError: see `clip_to_fit`; the dataset has no pictures; or `out` is taken.
    """
    if frames and dataset.metadata.image_format is None:
        raise DatasetError(f"{dataset.path}: holds latents only. Export without `--frames`.")
    if out.exists():
        raise DatasetError(f"{out}: exists already. Choose another `--out`.")
    read = dataset.read_clip(clip)
    exported = clip_to_fit(read, head, f"{dataset.path}: clip {clip.clip_id!r}", cropped=frames)
    for stale in stale_siblings(out):
        remove(stale)
    with atomic_path(out, durable=True) as partial:
        partial.mkdir()
        if frames:
            pictures = partial / "images" / "cam0"
            pictures.mkdir(parents=True)
            for frame in read:
                Image.fromarray(frame.image).save(pictures / f"{frame.frame_index:05d}.png")
        np.savez(partial / FIT_FILE, **exported.arrays)
    return exported.notes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", help="folder of the dataset")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets one folder a clip")
    parser.add_argument("--clips", nargs="+", metavar="ID", help="only these clips")
    parser.add_argument("--frames", action="store_true", help="also write the stored crops as pictures")
    args = parser.parse_args(argv)
    enable_compile_cache()
    try:
        dataset = open_dataset(args.dataset)
        head = dataset.head()
        by_id = {clip.clip_id: clip for clip in dataset.clips}
        unknown = [name for name in args.clips or () if name not in by_id]
        if unknown:
            raise DatasetError(
                f"{args.dataset}: has no clip {unknown[0]!r}, but {', '.join(list(by_id)[:5])} and so on."
            )
        chosen = [by_id[name] for name in args.clips] if args.clips else list(dataset.clips)
        notes: dict[str, int] = {}
        for number, clip in enumerate(chosen, start=1):
            for note in export_clip(dataset, clip, head, args.out / clip.clip_id, frames=args.frames):
                notes[note] = notes.get(note, 0) + 1
            print(f"[{number}/{len(chosen)}] {args.out / clip.clip_id}: {clip.length} frames", flush=True)
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for note, count in notes.items():
        print(f"note ({count} clips): {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
