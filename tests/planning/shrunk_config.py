"""configs/hdtf.py with every part of the full-size step, at widths that compile in seconds."""

from configs.hdtf import get_config as full_config


def get_config(arg=None):
    config = full_config(arg)
    config.window = 2
    config.image_size = 32
    config.batch_size = 16
    config.sharding_min_size = 2**10
    model = config.model
    model.dtype = "float32"  # bfloat16 work is widened on CPU, which would hide the temporaries
    model.unet.channels = 32
    model.unet.multipliers = (1, 2)
    model.unet.num_res_blocks = 1
    model.unet.attention_levels = (1,)
    model.unet.attention_modes = ("spatial", "3d")
    model.unet.head_channels = 16
    model.encoder.stem = 32
    model.encoder.widths = (32,)
    model.autoencoder.widths = (32, 32)
    model.autoencoder.num_res_blocks = 1
    model.reference.context_dim = 64
    return config
