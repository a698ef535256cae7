"""Stable Video-Driven Portraits' method at the size of the demo: for comparisons on synthetic heads.

    python -m data_prep.cross_pairs --shards shards --out pairs
    python -m loki_jax.train --config configs/demo_svp.py --workdir runs/demo_svp --config.data.path=pairs
    variants: those of configs/svp.py, `:same_identity` and `:loki_driver`

Clips must have at least 11 frames. Everything else is configs/demo.py. Results: docs/svp.md.
"""

from configs.demo import get_config as demo_config
from configs.svp import apply_svp


def get_config(arg=None):
    return apply_svp(demo_config(), arg, ("spatial", "full", "full"))
