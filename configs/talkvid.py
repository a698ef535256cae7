"""Loki at full size on TalkVid, the paper's training corpus (about 7,000 five-second clips).

    python -m loki_jax.train --config configs/talkvid.py --workdir runs/talkvid \
        --config.data.path=DIR --config.pretrained=SD21_DIR
    variants: `configs/talkvid.py:official` (the public code's choices)

Hardware and results: not yet measured (docs/benchmarks.md).
"""

from configs.common import apply_official, base_config, take_variant


def get_config(arg=None):
    config = base_config()
    config.data.workers = 8
    if take_variant(arg, ("official",)) == "official":
        apply_official(config)
    return config
