"""Stable Video-Driven Portraits' method (arXiv 2509.17476) in Loki's network, at full size on TalkVid.

    python -m data_prep.cross_pairs --shards DIR --portraits FOLDER --out PAIRS
    python -m loki_jax.train --config configs/svp.py --workdir runs/svp \
        --config.data.path=PAIRS --config.pretrained=SD21_DIR
    variants, neither of which needs pairs: `configs/svp.py:same_identity` (every clip drives itself),
        `:loki_driver` (Loki's driver map)

The driver map shows eyes, nose and mouth of another person, attention over all frames is added to attention
within a frame, windows see the 3 frames before them, and guidance is nested (docs/svp.md). Everything else
is configs/talkvid.py. Results: not yet measured.
"""

from ml_collections import ConfigDict

from configs.common import take_variant
from configs.talkvid import get_config as talkvid_config

VARIANTS = ("same_identity", "loki_driver")


def apply_svp(c: ConfigDict, arg: str | None, modes: tuple[str, ...]) -> ConfigDict:
    """What the method changes; `modes` are the levels' attention modes."""
    variant = take_variant(arg, VARIANTS)
    c.model.unet.attention_modes = modes
    c.history.frames = 3
    c.sample.fusion = (2.0, 2.5, 1.0)
    if variant != "loki_driver":
        c.driver.arm = "regions"
        c.sample.pose = "absolute"  # pixels show the driver's pose
        c.data.cross_share = 0.0 if variant == "same_identity" else 1.0
    return c


def get_config(arg=None):
    # Attention over all tokens of the finest level, 77,824 of them, costs more than the rest of the step.
    return apply_svp(talkvid_config(), arg, ("spatial", "full", "full", "full"))
