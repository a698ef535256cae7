"""Stable Video-Driven Portraits' training at the size of the demo: for comparisons on synthetic heads.

    python -m loki_jax.train --config configs/demo_svp.py:loki_driver --workdir runs/demo_svp \
        --config.data.path=shards
    variants: `configs/demo_svp.py:loki_driver` (Loki's driver map)

Clips must have at least 11 frames. Everything else is configs/demo.py. Results: docs/svp.md.
"""

from configs.common import take_variant
from configs.demo import get_config as demo_config
from configs.svp import VARIANTS, apply_svp


def get_config(arg=None):
    take_variant(arg, VARIANTS)
    return apply_svp(demo_config(), ("spatial", "full", "full"))
