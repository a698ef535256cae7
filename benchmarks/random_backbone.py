"""Random weights in the place of Stable Diffusion's, so that a full-size config can be timed without them.

    python benchmarks/random_backbone.py OUT [--config configs/hdtf.py]

OUT is a folder for `--config.pretrained`. Its arrays have the shapes of SD 2.1's reference branch, VAE and
empty prompt; they are drawn as at the start of a training. Nothing trained from them is of any use.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # configs is no installed package

import jax
import orbax.checkpoint as ocp

from loki_jax.face.builtin import builtin_head
from loki_jax.networks import build_networks, random_params
from loki_jax.weights.layouts import load_config

GIVEN = ("reference", "autoencoder", "null_prompt")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", default="configs/hdtf.py")
    arguments = parser.parse_args()
    networks = build_networks(load_config(arguments.config), builtin_head())

    @jax.jit
    def draw():
        params = random_params(networks, jax.random.key(0))
        return {key: params[key] for key in GIVEN if key in params}

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(arguments.out.absolute(), draw())


if __name__ == "__main__":
    main()
