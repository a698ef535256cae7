"""Clips of synthetic talking heads with known truth (`loki_jax.synthetic.clips`) for a dataset."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from data_prep.dataset.options import SynthOptions
from loki_jax.data.schema import Clip
from loki_jax.face.asset import HeadAsset
from loki_jax.face.builtin import builtin_mesh
from loki_jax.synthetic.clips import synth_clip
from loki_jax.synthetic.motion import FPS


def synthetic_clips(head: HeadAsset, options: SynthOptions) -> Iterator[Clip]:
    """All clips that the options ask for, rendered one after another, with a line of progress."""
    n_validation = round(options.validation * options.identities)
    if options.validation > 0 and options.identities > 1:
        n_validation = max(n_validation, 1)
    mesh = builtin_mesh()
    wanted = [(i, k) for i in range(options.identities) for k in range(options.clips_per_identity)]
    for i, k in tqdm(wanted, unit="clip"):
        identity_seed = options.identity_seed(i)
        clip_seed = identity_seed * 1000 + k
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([clip_seed, 9])))
        n_frames = int(rng.integers(options.frames[0], options.frames[1] + 1))
        clip = synth_clip(head, identity_seed, clip_seed, n_frames, options.size, mesh=mesh)
        yield Clip(
            clip_id=f"synth-{identity_seed:08d}-{k}",
            identity=f"synth-{identity_seed:08d}",
            fps=FPS,
            split="validation" if i >= options.identities - n_validation else "train",
            source="data_prep.synth",
            licence="CC0-1.0",
            coefficients=clip.coefficients,
            camera=clip.camera,
            crop=clip.crop,
            images=clip.frames,
            extra={"identity_seed": identity_seed, "clip_seed": clip_seed},
        )


def preview(head: HeadAsset, options: SynthOptions, columns: int = 10) -> UInt8[np.ndarray, "H W 3"]:
    """Contact sheet: a row for each of 12 identities, with frames of a clip of two seconds."""
    mesh, rows = builtin_mesh(), []
    for i in range(min(options.identities, 12)):
        seed = options.identity_seed(i)
        clip = synth_clip(head, seed, seed * 1000, 50, options.size, mesh=mesh)
        rows.append(np.concatenate(list(clip.frames[np.linspace(0, 49, columns).astype(int)]), axis=1))
    return np.concatenate(rows, axis=0)
