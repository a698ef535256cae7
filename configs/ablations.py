"""The paper's ablation arms: what the driver map consists of.

    python -m loki_jax.train --config configs/ablations.py:no_posenc --workdir runs/no_posenc ...
    arms: no_posenc (3 channels) | no_deform (42) | flame_vector (no map: numbers through an MLP)

Everything else is configs/talkvid.py. Results: not yet measured.
"""

from configs.common import take_variant
from configs.talkvid import get_config as talkvid_config

ARMS = ("no_posenc", "no_deform", "flame_vector")


def get_config(arg=None):
    config = talkvid_config()
    config.driver.arm = take_variant(arg, ARMS) or "full"
    return config
