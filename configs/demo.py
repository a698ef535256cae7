"""The embedded default: a small model on 64-pixel frames that trains on a laptop's CPU.

    python -m data_prep.synth --out shards
    python -m loki_jax.train --config configs/demo.py --workdir runs/demo --config.data.path=shards
    variants: `configs/demo.py:tiny` (seconds a step fewer; for tests only)

The shipped model is this config; docs/demo_model.md holds its command, hardware and loss curve.
No pretrained weights exist at this size, so the reference branch is trained along with the rest
(features of a random network carry no identity), and it has no text cross-attention.
"""

from configs.common import base_config, take_variant


def get_config(arg=None):
    c = base_config()
    c.steps = 4_000
    c.batch_size = 4
    c.window = 8
    c.image_size = 64
    c.data.cache_mb = 2048
    c.model.dtype = "float32"
    c.model.remat = False
    c.model.latent_channels = 48
    c.model.unet.channels = 64
    c.model.unet.multipliers = (1, 1, 1)
    c.model.unet.num_res_blocks = 1
    c.model.unet.attention_modes = ("spatial", "3d", "3d")
    c.model.unet.head_channels = 16
    c.model.norm_groups = 8
    c.model.encoder.stem = 16
    c.model.encoder.widths = (16, 48)
    c.model.reference.trainable = True
    # Which part of a face a patch of the portrait shows, SD's features tell; a small branch trained from
    # nothing is told by the portrait's own driver map (docs/decisions.md).
    c.model.reference.driver = True
    c.model.reference.context_dim = None
    c.model.autoencoder.kind = "pixel"
    c.model.autoencoder.patch = 4
    c.model.autoencoder.scale = 1.0
    # The latents of a patch (48 numbers) are nearly as many as the channels (64): a network this narrow
    # cannot hand the noise through to its output, but clean pictures it can draw (docs/decisions.md).
    c.diffusion.prediction = "x0"
    # Sampling sees all frames equally noisy: there colours can come from the reference alone.
    c.diffusion.shared_timesteps = 0.75
    c.diffusion.clip = 1.0  # space-to-depth latents are pixels
    c.diffusion.shift_frames = 0
    c.optimizer.learning_rate = 8e-4
    c.optimizer.warmup_steps = 200
    c.optimizer.decay = "cosine"
    c.ema_decay = 0.999
    c.log.every = 20
    c.checkpoint.every = 250
    c.validation.every = 250
    c.validation.batches = 4
    c.sample.every = 1000
    c.sample.steps = 20
    c.sample.spacing = "trailing"
    c.sample.guidance = 1.5
    c.sample.follow = True
    if take_variant(arg, ("tiny",)) == "tiny":
        c.batch_size = 2
        c.window = 2
        c.model.unet.channels = 16
        c.model.unet.multipliers = (1, 1)
        c.model.unet.attention_modes = ("spatial", "3d")
        c.model.unet.attention_levels = (1,)
        c.model.unet.head_channels = 16
        c.model.encoder.stem = 8
        c.model.encoder.widths = (8, 16)
        c.sample.pairs = 1
        c.sample.steps = 2
        c.sample.follow = False
        c.validation.batches = 1
    return c
