"""Loki at full size on HDTF (SD 2.1 widths, 512 pixels, 16-frame windows).

    python -m loki_jax.train --config configs/hdtf.py --workdir runs/hdtf \
        --config.data.path=DIR --config.pretrained=SD21_DIR
    variants: `configs/hdtf.py:official` (the public code's choices), `:zero_snr` (Lin et al. 2024),
        `:flow` and `:warp` (driver maps with the flow from the portrait; docs/method.md, section 17)

Hardware and results: not yet measured (docs/benchmarks.md). The paper trained 30,000 steps of
16 windows on 8 H200.
"""

from configs.common import apply_variant, base_config


def get_config(arg=None):
    config = base_config()
    return apply_variant(config, arg)
