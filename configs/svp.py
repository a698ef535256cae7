"""Stable Video-Driven Portraits' training (arXiv 2509.17476) in Loki's network, at full size on TalkVid.

    python -m loki_jax.train --config configs/svp.py:loki_driver --workdir runs/svp \
        --config.data.path=DIR --config.pretrained=SD21_DIR
    variants: `configs/svp.py:loki_driver` (Loki's driver map)

Attention over all frames is added to attention within a frame, windows see the 3 frames before them, and
guidance is nested (docs/svp.md). Everything else is configs/talkvid.py. Results: not yet measured.
"""

from ml_collections import ConfigDict

from configs.common import take_variant
from configs.talkvid import get_config as talkvid_config

VARIANTS = ("loki_driver",)


def apply_svp(c: ConfigDict, modes: tuple[str, ...]) -> ConfigDict:
    """What the method changes whatever the driver is; `modes` are the levels' attention modes."""
    c.model.unet.attention_modes = modes
    c.history.frames = 3
    c.sample.fusion = (2.0, 2.5, 1.0)
    return c


def get_config(arg=None):
    take_variant(arg, VARIANTS)
    # Attention over all tokens of the finest level, 77,824 of them, costs more than the rest of the step.
    return apply_svp(talkvid_config(), ("spatial", "full", "full", "full"))
