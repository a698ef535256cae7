"""A PyTorch step of the same shape as ours, of diffusers' blocks: what `benchmarks/step.py` compares with.

The generation UNet is diffusers' own, without cross-attention, its self-attention replaced by one that
sees all frames of a window and the reference's tokens; `scaled_dot_product_attention` picks the fused
kernel. Parameters are float32 under bfloat16 autocast, frozen networks bfloat16, transformer and
residual blocks are recomputed in the backward pass, AdamW is fused on a GPU. There is no rasteriser:
driver maps come in ready.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn


class Capture:
    """Self-attention that also keeps its input: the reference branch's features, in order of execution."""

    def __init__(self, found: list):
        self.found = found

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        self.found.append(hidden_states)
        return attend(attn, hidden_states, hidden_states)


class Windowed:
    """Self-attention of windows: within each frame or over all of them, with one feature of the reference."""

    def __init__(self, index: int, mode: str, frames: int):
        self.index, self.mode, self.frames = index, mode, frames

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, reference=None, **_
    ):
        shape = hidden_states.shape
        extra = reference[self.index]
        tokens = hidden_states
        if self.mode == "3d":
            tokens = hidden_states.reshape(-1, self.frames * shape[1], shape[2])
        else:
            extra = extra.repeat_interleave(self.frames, 0)
        return attend(attn, tokens, torch.cat([tokens, extra.to(tokens.dtype)], 1)).reshape(shape)


class Plain:
    """Cross-attention through the fused kernel."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        return attend(attn, hidden_states, encoder_hidden_states)


def attend(attn, tokens, context):
    split = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    q, k, v = split(attn.to_q(tokens)), split(attn.to_k(context)), split(attn.to_v(context))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return attn.to_out[0](out)


class Residual(nn.Module):
    def __init__(self, width_in: int, width: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, width), nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + self.skip(x)


def make_encoder(channels: int, stem: int, widths: tuple, out: int, groups: int) -> nn.Sequential:
    """The conditioning encoder."""
    layers, width = [nn.Conv2d(channels, stem, 3, padding=1)], stem
    for new in widths:
        layers += [Residual(width, new, groups), nn.Conv2d(new, new, 3, stride=2, padding=1)]
        width = new
    layers += [
        Residual(width, width, groups),
        nn.GroupNorm(groups, width),
        nn.SiLU(),
        nn.Conv2d(width, out, 3, padding=1),
    ]
    return nn.Sequential(*layers)


class Conditioned(nn.Module):
    """The first convolution, with the driver's residual added."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv, self.condition = conv, None

    def forward(self, x):
        return self.conv(x) + self.condition


def in_order(unet: UNet2DConditionModel) -> list[str]:
    """Names of the self-attentions in order of execution."""
    rank = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    names = [name for name in unet.attn_processors if ".attn1." in name]
    return sorted(
        names, key=lambda name: (rank[name.split(".")[0]], [int(p) for p in name.split(".") if p.isdigit()])
    )


def make_networks(configs: dict, model, channels: int, frames: int, device: str, dtype: torch.dtype) -> dict:
    """Random networks of the sizes of `config.model`.

    Args:
      configs: diffusers' configs of UNet and VAE.
      channels: of the driver map.
    """
    torch.manual_seed(0)
    options = {k: v for k, v in configs["unet"].items() if not k.startswith("_")}
    generation = UNet2DConditionModel(**options)
    for module in list(generation.modules()):
        if hasattr(module, "attn2"):
            module.attn2 = module.norm2 = None
    modes = dict(enumerate(model.unet.attention_modes))
    levels = len(modes)
    processors = {}
    for index, name in enumerate(in_order(generation)):
        part, number = name.split(".")[0], name.split(".")[1]
        level = {
            "down_blocks": lambda n: int(n),
            "up_blocks": lambda n: levels - 1 - int(n),
            "mid_block": lambda n: levels - 1,
        }
        processors[name] = Windowed(index, modes[level[part](number)], frames)
    generation.set_attn_processor(processors)
    generation.conv_in = Conditioned(generation.conv_in)
    generation.enable_gradient_checkpointing()
    generation.train()

    found: list = []
    reference = UNet2DConditionModel(**options)
    reference.set_attn_processor(
        {name: Capture(found) if ".attn1." in name else Plain() for name in reference.attn_processors}
    )
    vae = AutoencoderKL(**{k: v for k, v in configs["vae"].items() if not k.startswith("_")})
    encoder = make_encoder(
        channels, model.encoder.stem, tuple(model.encoder.widths), model.unet.channels, model.norm_groups
    )
    frozen = {"reference": reference, "vae": vae}
    for network in frozen.values():
        network.requires_grad_(False).eval().to(device, dtype)
    return {"generation": generation.to(device), "encoder": encoder.to(device), **frozen, "captured": found}


def make_calls(
    networks: dict, inputs: dict, scale: float, sampling_steps: int, guidance: float, compile_: bool
) -> dict:
    """Calls by name, each doing one part and waiting for it: the same parts as ours.

    Args:
      inputs: torch tensors: images (B,T,3,S,S) uint8, portrait (B,3,S,S) uint8, driver (B,T,C,S,S),
        prompt (1,77,E), alphas (1000,) cumulative products.
    """
    generation, encoder, found = networks["generation"], networks["encoder"], networks["captured"]
    wrap = torch.compile if compile_ else (lambda f: f)
    images, portrait, driver, prompt = (inputs[k] for k in ("images", "portrait", "driver", "prompt"))
    b, t = images.shape[:2]
    device = images.device
    cuda = device.type == "cuda"
    half = next(networks["vae"].parameters()).dtype
    autocast = lambda: torch.autocast(device.type, half, enabled=half != torch.float32)
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    encode = wrap(lambda x: networks["vae"].encode(x).latent_dist)
    reference_unet, condition_of = wrap(networks["reference"]), wrap(encoder)
    unet = wrap(generation)
    decode = wrap(lambda z: networks["vae"].decode(z).sample)
    parameters = [*generation.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.01, fused=cuda)
    average = [p.detach().clone() for p in parameters]
    alphas = inputs["alphas"].to(device)

    @torch.no_grad()
    def latents():
        both = torch.cat([images.flatten(0, 1), portrait]).to(half) / 127.5 - 1
        posterior = encode(both)
        frames = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        return frames[: b * t] * scale, posterior.mean[b * t :] * scale

    @torch.no_grad()
    def features(latent):
        found.clear()
        reference_unet(latent, torch.zeros(b, device=device), prompt.expand(b, -1, -1).to(half))
        return list(found)

    def denoise(x, steps, condition, tokens):
        generation.conv_in.condition = condition
        return unet(x, steps, None, cross_attention_kwargs={"reference": tokens}).sample

    def forward(x, tokens):
        with autocast():
            condition = condition_of(driver.flatten(0, 1))
            steps = torch.randint(0, 1000, (b * t,), device=device)
            a = alphas[steps][:, None, None, None]
            noise = torch.randn_like(x, dtype=torch.float32)
            return F.mse_loss(
                denoise(a.sqrt() * x + (1 - a).sqrt() * noise, steps, condition, tokens).float(), noise
            )

    def train_step():
        x, portrait_latent = latents()
        loss = forward(x, features(portrait_latent))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1e-4)
        wait()

    @torch.no_grad()
    def sample():
        with autocast():
            _, portrait_latent = latents()
            tokens = features(portrait_latent)
            tokens = [torch.cat([torch.zeros_like(f), f]) for f in tokens]
            maps = driver.flatten(0, 1)
            condition = torch.cat([condition_of(torch.zeros_like(maps)), condition_of(maps)])
            x = torch.randn(b * t, *portrait_latent.shape[1:], device=device)
            for step in range(1000 - 1000 // sampling_steps, -1, -(1000 // sampling_steps)):
                u, c = (
                    denoise(
                        torch.cat([x, x]), torch.full((2 * b * t,), step, device=device), condition, tokens
                    )
                    .float()
                    .chunk(2)
                )
                epsilon = u + guidance * (c - u)
                a, previous = alphas[step], alphas[max(step - 1000 // sampling_steps, 0)]
                x = (
                    previous.sqrt() * (x - (1 - a).sqrt() * epsilon) / a.sqrt()
                    + (1 - previous).sqrt() * epsilon
                )
            frames = decode((x.to(half) / scale).contiguous())
        wait()
        return frames

    fixed, portrait_latent = latents()
    tokens = features(portrait_latent)

    def timed(call):
        def run():
            with torch.no_grad():
                call()
            wait()

        return run

    return {
        "VAE encode": timed(latents), "reference branch": timed(lambda: features(portrait_latent)),
        "generation forward": timed(lambda: forward(fixed, tokens)),
        "train step": train_step, "sampling": sample,
    }  # fmt: skip


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
