"""The reference UNet against the same network in diffusers: its Flax model and its PyTorch model.

    python benchmarks/unet.py [--quick] [--repeats 5] [--dtype bfloat16] [--compile]

Needs the `convert` extra and torch. SD 2.1's UNet at full width (`--quick`: tiny), batch 1, one frame,
32 x 32 latents, 77 context tokens. All three hold the same random weights, carried over by the
converter's tables, and must agree before anything is timed: ours within 1e-4 of torch in float32, the
Flax model within 5e-2, because it computes tanh-GELU and another GroupNorm eps. Times are taken in
turns, in changing order; ratios are those of medians. torch runs on the GPU when JAX does. The last line
of the output is one JSON object with `ours_over_flax_diffusers` and `ours_over_torch` (below 1: ours is
faster).

Full width takes two copies of the weights (ours and Flax's share theirs), about 9 GB in float32 (the JSON
states the peak), and on two idle cores about two minutes. Run it on an idle machine: torch's threads wait
for each other, so that its time, and with it `ours_over_torch`, suffers most from company.
"""

import argparse
import json
import resource
import time
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import FlaxUNet2DConditionModel, UNet2DConditionModel
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from loki_jax.models.loki import make_loki
from loki_jax.weights.diffusers_names import diffusers_unet_table, flax_table
from loki_jax.weights.layouts import diffusers_configs, make_network, sd21_config
from loki_jax.weights.ldm_names import from_ldm

LATENT, TOKENS = 32, 77
# diffusers' Flax UNet has these fixed.
NOT_IN_FLAX = ("norm_num_groups", "norm_eps", "act_fn", "center_input_sample")


def model_config(quick: bool, dtype: str) -> ConfigDict:
    config = sd21_config()
    if quick:
        config.unet.channels, config.unet.multipliers = 32, (1, 2)
        config.unet.attention_levels, config.unet.attention_modes = (0,), ("spatial", "3d")
        config.unet.head_channels, config.unet.num_res_blocks = 16, 1
        config.encoder.widths = (32, 32)
        config.reference.context_dim = 64
        config.autoencoder.widths, config.autoencoder.num_res_blocks = (32, 32), 1
    config.dtype = dtype
    return config


def random_torch_unet(options: dict) -> UNet2DConditionModel:
    """diffusers' PyTorch UNet with every parameter random, and small enough that activations stay near 1."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**options).eval().requires_grad_(False)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
    return unet


def relative_error(out: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(out - expected).max() / expected.std())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny widths, to see that it runs")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each network")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the PyTorch model")
    args = parser.parse_args()

    # ---------------------------------------------------------------------------------- networks
    network = make_network(model_config(args.quick, args.dtype))
    options = {k: v for k, v in diffusers_configs(network)["unet"].items() if not k.startswith("_")}
    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    dtype, torch_dtype = jnp.dtype(args.dtype), getattr(torch, args.dtype)
    theirs = random_torch_unet(options)

    # One weight at a time; where the layouts agree, ours and Flax's are the same array.
    table = diffusers_unet_table(network.loki.reference)
    flax_names = flax_table(table)
    state = theirs.state_dict()
    ours, flax = {}, {}
    for path, (name, layout) in table.items():
        array = state[name].numpy()
        ours[path] = jnp.asarray(from_ldm(array, layout))
        flax_name, flax_layout = flax_names[path]
        value = ours[path][None, None] if flax_layout == "pointwise" else ours[path]
        flax[flax_name] = value.astype(dtype)
    ours, flax = unflatten_dict(ours, sep="/"), unflatten_dict(flax, sep="/")
    theirs = theirs.to("cuda" if on_gpu else "cpu", torch_dtype)

    # ------------------------------------------------------------------------------------ inputs
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, LATENT, LATENT)).astype(np.float32)
    context = rng.standard_normal((1, TOKENS, options["cross_attention_dim"])).astype(np.float32)
    reference = make_loki(network.config).reference
    timesteps = jnp.full((1, 1), 500)
    x_ours, context_jax = jnp.asarray(x).transpose(0, 2, 3, 1)[:, None], jnp.asarray(context)
    x_torch = torch.from_numpy(x).to(theirs.device, torch_dtype)
    context_torch = torch.from_numpy(context).to(theirs.device, torch_dtype)
    x_flax, context_flax = jnp.asarray(x, dtype), jnp.asarray(context, dtype)
    flax_unet = FlaxUNet2DConditionModel(
        **{k: v for k, v in options.items() if k not in NOT_IN_FLAX}, dtype=dtype
    )
    our_apply = jax.jit(lambda p, x, c: reference.apply({"params": p}, x, timesteps, context=c)[0])
    flax_apply = jax.jit(lambda p, x, c: flax_unet.apply({"params": p}, x, timesteps[0], c).sample)
    torch_apply = torch.compile(theirs) if args.compile else theirs

    def run_ours() -> np.ndarray:
        return np.asarray(our_apply(ours, x_ours, context_jax))[:, 0].transpose(0, 3, 1, 2)

    def run_flax() -> np.ndarray:
        return np.asarray(flax_apply(flax, x_flax, context_flax), np.float32)

    @torch.inference_mode()
    def run_torch() -> np.ndarray:
        # The copy to the host waits for the device, in all three alike.
        return torch_apply(x_torch, 500, context_torch).sample.float().cpu().numpy()

    # ------------------------------------------------------------------------------------- agree
    runs = {"ours": run_ours, "flax_diffusers": run_flax, "torch": run_torch}
    outputs = {name: run() for name, run in runs.items()}  # compiles
    errors = {name: relative_error(outputs[name], outputs["torch"]) for name in ("ours", "flax_diffusers")}
    bound = {"ours": 1e-4, "flax_diffusers": 5e-2} if args.dtype == "float32" else dict.fromkeys(errors, 0.3)
    print(f"relative error against torch: {errors}")
    for name, error in errors.items():
        if not error < bound[name]:
            raise SystemExit(
                f"{name} is not the same network: relative error {error:.2e}, allowed {bound[name]}"
            )

    # -------------------------------------------------------------------------------------- time
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(args.repeats):
        for name in order:
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
        # What runs before leaves the caches and the thread pools as it likes: each follows each in turn.
        order = order[1:] + order[:1] if len(times[name]) % 2 else order[::-1]
    medians = {name: median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:15s} {1e3 * value:9.1f} ms  ({', '.join(f'{1e3 * t:.1f}' for t in times[name])})")
    print(json.dumps({
        "benchmark": "unet",
        "full_width": not args.quick,
        "dtype": args.dtype,
        "device": jax.devices()[0].device_kind,
        "torch_compile": args.compile,
        "repeats": args.repeats,
        "milliseconds": {name: round(1e3 * value, 2) for name, value in medians.items()},
        "ours_over_flax_diffusers": round(medians["ours"] / medians["flax_diffusers"], 3),
        "ours_over_torch": round(medians["ours"] / medians["torch"], 3),
        "error_against_torch": errors["ours"],
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
