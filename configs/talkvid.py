"""Loki at full size on TalkVid, the paper's training corpus (about 7,000 five-second clips).

    python -m loki_jax.train --config configs/talkvid.py --workdir runs/talkvid \
        --config.data.path=DIR --config.pretrained=SD21_DIR
    variants: `configs/talkvid.py:official` (the public code's choices), `:zero_snr` (Lin et al. 2024),
        `:flow` and `:warp` (driver maps with the flow from the portrait; docs/method.md, section 17)

Hardware and results: not yet measured (docs/benchmarks.md).
"""

from configs.common import apply_variant, base_config


def get_config(arg=None):
    config = base_config()
    config.data.workers = 8
    return apply_variant(config, arg)
