"""Demo model 2: 128-pixel frames, and the warped portrait in the driver map. For one GPU.

    ./launch/train_demo.sh runs/demo128
    variants: `configs/demo128.py:full`, `:flow`, `:warp` (the default), by what the driver map shows

Otherwise as configs/demo.py, with wider levels; 4 x 4 pixels a latent give 32 x 32 latents where the first
demo model has 16 x 16. 7.4 M parameters, 15 MB as a model file. Results: not yet measured.
"""

from configs.common import take_variant
from configs.demo import get_config as demo_config

ARMS = ("full", "flow", "warp")


def get_config(arg=None):
    c = demo_config()
    c.driver.arm = take_variant(arg, ARMS) or "warp"
    c.steps = 8_000
    c.batch_size = 16
    c.image_size = 128
    c.data.cache_mb = 4096
    c.data.threads = 16
    c.model.dtype = "bfloat16"
    c.model.unet.channels = 80
    c.model.encoder.widths = (24, 64)
    c.checkpoint.every = 300  # about a minute on one GPU
    c.validation.every = 600
    c.sample.every = 0
    c.sample.follow = False
    return c
