"""Convert weights between projects, strictly: every tensor is used or dropped for a stated reason.

    python -m loki_jax.convert SD21 --out sd21                      # config.pretrained of configs/hdtf.py
    python -m loki_jax.convert sd21 --out sd21_diffusers --to diffusers
    python -m loki_jax.convert loki.ckpt --out runs/loki --head flame.npz --config configs/hdtf.py:official
    python -m loki_jax.convert --workdir runs/demo --out model.safetensors

SOURCE is one of
  a diffusers folder (unet/, vae/; .safetensors or .bin, sharded or not; or diffusers' Flax files),
  an original latent-diffusion checkpoint (v2-1_512-ema-pruned, .safetensors or .ckpt),
  a training checkpoint of the public Loki code, a folder that this program wrote, or a workdir.
--to is one of
  orbax      a folder for `config.pretrained` (the default); float32, with the null prompt
  diffusers  a folder of safetensors files;  flax: the same of Flax files
  ldm, loki  one .safetensors file under the names of the original code
  workdir    a run to animate or to start from (the default for Loki checkpoints); needs --head, --config

The null prompt, the text encoder's output for "", comes from SOURCE/text_encoder, --text-encoder DIR
(needs transformers and torch) or --null-prompt FILE.npy. Pickles are never executed. `conversion.json`,
beside the weights, holds the SHA-256 of all source files, what was dropped and why, and what is new.

With --workdir alone, the moving average of a run (or its parameters, with --no-ema) becomes one file
for inference. That works for models of the built-in head; others carry licences and stay in their workdir.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from loki_jax.weights.options import ConvertOptions


def export_run(options: ConvertOptions) -> None:
    """Write a run's newest checkpoint as one file for inference. Raises CheckpointError."""
    from loki_jax.training.checkpoint import load_checkpoint
    from loki_jax.training.model_file import save_model_file

    checkpoint = load_checkpoint(str(options.workdir), options.ema)
    save_model_file(options.out, checkpoint)
    print(f"{options.out}: step {checkpoint.step}, {options.out.stat().st_size / 1e6:.1f} MB")


def convert_source(options: ConvertOptions) -> None:
    """Convert, and print what became of every tensor. Raises WeightsError; nothing is written then."""
    from loki_jax.weights.conversion import convert, open_source

    source = open_source(options)
    print(f"{source.path}: layout {source.layout.name}, {len(source.tensors.infos)} tensors")
    if source.note:
        print(f"note: {source.note}")
    target, record = convert(source, options)
    for entry in record["source"]["files"]:
        print(f"  sha256 {entry['sha256']}  {entry['name']}")
    print(f"  {record['used']} parameters filled")
    for kind in ("dropped", "new"):
        for reason, names in record[kind].items():
            print(f"  {len(names)} {kind}: {reason}")
    print(f"{options.out}: layout {target}")


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.cli(ConvertOptions, prog="python -m loki_jax.convert", args=argv, description=__doc__)
    if problem := options.contradiction():
        print(f"error: {problem}", file=sys.stderr)
        return 2

    from loki_jax.program import run_program

    return run_program(export_run if options.source is None else convert_source, options)


if __name__ == "__main__":
    sys.exit(main())
