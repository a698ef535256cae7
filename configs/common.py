"""What all configurations share; every key is explained here and nowhere else."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def base_config() -> ConfigDict:
    """The paper's full-size recipe with our decisions (docs/decisions.md) as defaults."""
    c = ConfigDict()
    c.seed = 0
    c.steps = 30_000
    c.batch_size = 16  # windows a step, over all devices
    c.grad_accum_steps = 1  # microbatches of a step; saves memory, changes no number beyond rounding
    c.deterministic = False  # True: GPU kernels that repeat bit for bit (slower; CPU and TPU always do)
    c.window = 16  # frames a window
    c.image_size = 512

    # Start from the parameters of another run: a workdir, a .safetensors file or "demo". Empty: none.
    c.init_from = ""
    # Folder with converted SD 2.1 weights (`python -m loki_jax.convert`). A config whose reference
    # branch is frozen stops without it: features of a random network carry no identity.
    c.pretrained = ""

    c.data = ConfigDict()
    c.data.path = ""  # folder that holds dataset_info.json and head.npz
    c.data.workers = 0  # Grain worker processes beside the threads; 0: threads only
    c.data.threads = 8  # that read and decode ahead; neither changes the order of samples
    c.data.cache_mb = 0  # decoded frames kept in memory
    # Share of the training records that may be unreadable (wrong checksum, damaged picture). Each is named
    # in the log with file and index, windows with it are replaced by others; beyond the share the run stops.
    c.data.max_corrupt_share = 0.001
    c.data.fixed_reference = False  # True: the same reference frame for a window for ever

    c.driver = ConfigDict()
    c.driver.arm = "full"  # an entry of ARMS in loki_jax/driver/registry.py
    c.driver.neck = True  # False: the fitted neck rotation never reaches the driver map

    # The last frames of the window before, clean and in front of the window: they are seen, not predicted
    # (docs/svp.md). `frames` of them; 0: windows know nothing of each other.
    c.history = ConfigDict(dict(frames=0, noise=0.1, real_share=0.2, dropout=0.1))
    # In training the latents of the history get Gaussian noise, of a standard deviation up to `noise`; they
    # are zero until the last `real_share` of the steps, and from then on for a share `dropout` of windows.

    c.model = ConfigDict()
    c.model.dtype = "bfloat16"  # of activations; parameters, norms, softmax and loss are float32
    c.model.attention_backend = "auto"  # auto | xla | chunked | cudnn (GPU) | splash (TPU)
    c.model.remat = True
    c.model.latent_channels = 4
    c.model.unet = ConfigDict()
    c.model.unet.channels = 320
    c.model.unet.multipliers = (1, 2, 4, 4)
    c.model.unet.num_res_blocks = 2
    c.model.unet.attention_levels = (0, 1, 2)
    # By level; the middle follows the last. "spatial": within a frame, as the paper's finest level; "3d":
    # all frames together; "temporal": within a frame, then over the frames at each pixel (AnimateDiff, Guo
    # et al. 2024, section 4.2, without position encoding); "full": within a frame, then all frames together
    # without the reference (Stable Video-Driven Portraits). The last two add layers that start at zero.
    c.model.unet.attention_modes = ("spatial", "3d", "3d", "3d")
    # Cross-attention of the generation branch to the null prompt: None removes it (the paper's parameter
    # count), the width of the prompt (1024) keeps SD's layers.
    c.model.unet.context_dim = placeholder(int)
    c.model.unet.head_channels = 64
    c.model.norm_groups = 32  # of every GroupNorm in encoder and UNets
    c.model.encoder = ConfigDict()
    c.model.encoder.stem = 64
    c.model.encoder.widths = (128, 256, 320)  # one residual block and one stride-2 convolution each
    c.model.encoder.hidden = 1024  # of the MLP that encodes the driver if the arm is a vector, not a map
    # The reference branch has the sizes of unet. A config may add reference.channels, .multipliers and
    # .num_res_blocks of its own; the widths at its attention layers must stay those of unet.
    c.model.reference = ConfigDict()
    c.model.reference.trainable = False
    c.model.reference.driver = False  # True: the branch also sees the reference frame's own driver map
    c.model.reference.context_dim = placeholder(int)  # width of the null prompt of its cross-attention
    c.model.reference.context_dim = 1024
    c.model.autoencoder = ConfigDict()
    c.model.autoencoder.kind = "kl"  # kl: SD 2.1's VAE | pixel: space-to-depth, no weights
    c.model.autoencoder.widths = (128, 256, 512, 512)
    c.model.autoencoder.num_res_blocks = 2
    c.model.autoencoder.patch = 4  # of the pixel autoencoder
    c.model.autoencoder.scale = 0.18215
    c.model.autoencoder.sample_reference = False  # True: the reference latent is a random posterior draw

    c.diffusion = ConfigDict()
    # What the network predicts: epsilon (Ho et al. 2020, equation 14), v = sqrt(alpha_bar) epsilon -
    # sqrt(1 - alpha_bar) x0 (Salimans and Ho 2022, section 4), or x0.
    c.diffusion.prediction = "epsilon"
    c.diffusion.shared_timesteps = 0.0  # share of windows whose frames all have one timestep, as in sampling
    # Zero terminal SNR (Lin et al. 2024, algorithm 1). The published schedule clips betas at 0.99, which
    # leaves a trace of signal; max_beta = 1 leaves none and wants prediction v and sample.spacing trailing
    # (their sections 3.2 and 3.3; variant `zero_snr`).
    c.diffusion.rescale_zero_snr = True
    c.diffusion.max_beta = 0.99
    c.diffusion.shift_frames = 15  # SNR shifted by sqrt(64^2 / (latent size^2 n)); 0: not shifted
    # gamma of the min-SNR weights (Hang et al. 2023, who use 5; formulas in diffusion/loss.py); 0: every
    # timestep counts alike. The validation loss is never weighted.
    c.diffusion.min_snr_gamma = 0.0
    c.diffusion.clip = 0.0  # bound on the estimate of the clean latents while sampling; 0: none

    # Shares of samples that lose the identity features, the driver map, or both together (classifier-free
    # guidance, Ho and Salimans 2022, algorithm 1; independent shares as Brooks et al. 2023, section 3.2.1).
    c.dropout = ConfigDict()
    c.dropout.identity = 0.05
    c.dropout.motion = 0.05
    c.dropout.both = 0.1
    # What a lost identity is: zero features, or a zero latent through the reference branch.
    c.dropout.null_reference = "features"
    c.dropout.null_gradient = False  # True: windows without their driver map train its encoder, too

    c.optimizer = ConfigDict()
    # The learning rate rises linearly for `warmup_steps`, stays for `hold_steps`, then follows `decay`:
    # constant | cosine (Loshchilov and Hutter 2017, equation 5) | linear, both down to `final_share` of the
    # peak at `steps` | rsqrt, proportional to 1 / sqrt(step) (EDM2, Karras et al. 2024).
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup_steps = 0
    c.optimizer.hold_steps = 0
    c.optimizer.decay = "constant"
    c.optimizer.final_share = 0.0
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    # Decoupled decay (Loshchilov and Hutter 2019, algorithm 2) of all parameters, as the paper's AdamW, or
    # of matrices only: not of biases and scales of norms (Radford et al. 2018, section 4.1).
    c.optimizer.weight_decay = 0.01
    c.optimizer.weight_decay_on = "all"  # all | matrices
    c.optimizer.clip_norm = 1.0  # of all gradients together (Pascanu et al. 2013, algorithm 1); 0: none
    # Moving average of the parameters (Ho et al. 2020, appendix B) whose decay grows as
    # (1 + step) / (10 + step) up to this; 0: none.
    c.ema_decay = 0.9999

    # Mesh: `data` replicates parameters, `fsdp` shards them; -1 takes the devices that are left.
    c.mesh = ConfigDict()
    c.mesh.data = -1
    c.mesh.fsdp = 1
    # First match of the regular expression on the parameter path decides: "fsdp" shards the largest
    # dimension that the axis divides, "replicate" keeps a whole copy on each device.
    c.sharding_rules = ((r".*", "fsdp"),)
    c.sharding_min_size = 2**16  # smaller arrays are not worth a collective
    # In which gradients are summed over devices: float32, or bfloat16, which halves the bytes, with an error
    # that grows with the number of devices (docs/scaling.md).
    c.gradient_dtype = "float32"

    c.faults = ConfigDict()
    # So many updates in a row skipped, because loss or gradient were not finite, stop the run.
    c.faults.max_skips = 10
    c.faults.spike_factor = 10.0  # a gradient norm above so many times the median is logged
    c.faults.spike_window = 100  # steps the median is over
    # No step finished for so long: end with the exit code of a lost process. 0: wait for ever.
    c.faults.hang_seconds = 1800
    c.faults.slow_seconds = 4 * 3600  # the same for a validation, samples or a checkpoint

    # Intervals in steps; all four are also due after the last step. 0: never.
    c.log = ConfigDict(dict(every=50))
    # Of the checkpoints stay the last `keep`, those at multiples of `keep_every` (0: none), and the
    # `keep_best` with the lowest validation loss.
    c.checkpoint = ConfigDict(dict(every=1000, keep=3, keep_every=0, keep_best=1))
    c.validation = ConfigDict(dict(every=1000, batches=8))
    c.sample = ConfigDict(dict(every=5000, pairs=4, steps=50, guidance=2.0, spacing="leading"))
    # ddim (Song et al. 2021, equation 12) | dpm++ (DPM-Solver++ 2M, Lu et al. 2022, algorithm 2), which needs
    # fewer steps
    c.sample.solver = "ddim"
    # Nested guidance instead of `guidance`: its scales of source, motion and history, as (2.0, 2.5, 1.0)
    # (docs/svp.md). Empty: off.
    c.sample.fusion = ()
    c.sample.guided_steps = (
        0.0,
        1.0,
    )  # part of the steps with guidance: from the noisiest, 0, to the last, 1
    c.sample.video = True  # also samples/STEP.mp4 in the workdir
    # HPF and HEF of the samples of synthetic clips; takes seconds to minutes on the host.
    c.sample.follow = False
    c.sample.pose = "relative"  # relative | absolute: how a driver gives the head pose, unless --mode says
    return c


def apply_official(c: ConfigDict) -> ConfigDict:
    """The public code's choices, for reproducing it (docs/decisions.md lists each with ours).

    Rows 4 and 13 are choices of the data (`data_prep.build`), row 10 is not reproduced.
    """
    c.data.fixed_reference = True
    c.driver.neck = False
    c.model.autoencoder.sample_reference = True
    c.dropout.identity = 0.0
    c.dropout.motion = 0.0
    c.dropout.both = 0.1
    c.dropout.null_reference = "latent"
    c.dropout.null_gradient = True
    c.optimizer.clip_norm = 0.0
    c.ema_decay = 0.0
    c.sample.spacing = "official"
    c.sample.pose = "absolute"
    return c


def apply_zero_snr(c: ConfigDict) -> ConfigDict:
    """Lin et al. 2024: true zero terminal SNR, v-prediction, and sampling that starts at the last step."""
    c.diffusion.prediction = "v"
    c.diffusion.max_beta = 1.0
    c.sample.spacing = "trailing"
    return c


def apply_flow(c: ConfigDict) -> ConfigDict:
    """The driver map also tells where each pixel comes from in the portrait."""
    c.driver.arm = "flow"
    return c


def apply_warp(c: ConfigDict) -> ConfigDict:
    """As `flow`, and the map shows the portrait's colours there. Shards must hold images."""
    c.driver.arm = "warp"
    return c


VARIANTS = {
    "official": apply_official, "zero_snr": apply_zero_snr, "flow": apply_flow, "warp": apply_warp,
}  # fmt: skip


def apply_variant(c: ConfigDict, arg: str | None) -> ConfigDict:
    """`c` changed as the argument of `--config file.py:variant` says."""
    variant = take_variant(arg, tuple(VARIANTS))
    return VARIANTS[variant](c) if variant else c


def take_variant(arg: str | None, allowed: tuple[str, ...]) -> str:
    """The variant named after the colon of `--config file.py:variant`; an unknown one is an error."""
    variant = arg or ""
    if variant and variant not in allowed:
        raise ValueError(f"config variant {variant!r} is not one of {', '.join(allowed)}")
    return variant
