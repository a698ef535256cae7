"""The full-size train step and sampling, by part, beside a PyTorch counterpart of the same shape.

    python benchmarks/step.py [--windows 2] [--repeats 7] [--no-torch] [--quick]

For a GPU: configs/hdtf.py (16 frames of 512 x 512, bfloat16) with random weights. The counterpart is
`torch_counterpart.py`: diffusers' blocks, torch.compile, bfloat16, fused attention and AdamW; it gets
its driver maps ready-made. Both must have the same number of parameters. Needs the `convert` extra and
torch beside JAX on the same device. `--quick` shrinks everything, in float32, without torch.compile:
it shows that the program runs; on a CPU it is chosen by itself, and its ratios say nothing of GPUs.

Each part is its own compiled program; backward pass with recomputation and update are the train step
less the parts before them. MFU is matrix work without recomputation over time, over the rate of the
fastest large matrix product measured here (`matrix_rate`), and over the data sheet's where the chip is
known. On a CPU calls of both are taken in turns. On a GPU both may not fit at once: each runs in its
own process, one after the other, `--rounds` times in turns; times are medians over all rounds.
The last line of the output is one JSON object. `ours_over_torch` below 1: ours is faster.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # configs is no installed package

# Two frameworks share the device here, and the planned peak needs most of it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import numpy as np

from configs import hdtf
from loki_jax.data.schema import Batch
from loki_jax.driver.registry import driver_channels
from loki_jax.face.builtin import builtin_head
from loki_jax.face.camera import camera_from_world, project
from loki_jax.face.crop import crop_box
from loki_jax.face.skinning import make_identity, mesh_render_mask, world_vertices
from loki_jax.face.types import Camera, Coefficients
from loki_jax.models.unet import keys_values
from loki_jax.networks import (
    build_networks,
    decode_latents,
    denoise,
    draw_params,
    driver_input,
    encode_condition,
    encode_images,
    initial_noise,
    reference_features,
    sample_windows,
)
from loki_jax.training.flops import chip_of, work_of
from loki_jax.training.init import split_params
from loki_jax.training.sharding import make_mesh
from loki_jax.training.state import create_state, make_optimizer
from loki_jax.training.step import make_train_step


def make_config(quick: bool, windows: int):
    """configs/hdtf.py; with `quick` every part of it, small."""
    config = hdtf.get_config()
    config.batch_size = windows
    if quick:
        config.window, config.image_size = 4, 64
        model = config.model
        model.dtype = "float32"
        model.unet.channels, model.unet.multipliers, model.unet.num_res_blocks = 32, (1, 2), 1
        model.unet.attention_levels, model.unet.attention_modes = (0, 1), ("spatial", "3d")
        model.unet.head_channels = 16
        model.encoder.stem, model.encoder.widths = 32, (32, 32)
        model.reference.context_dim = 64
        model.autoencoder.widths, model.autoencoder.num_res_blocks = (32, 32, 32), 1
    return config


def make_batch(config, head, seed: int = 0) -> dict:
    """A batch of noise pictures and of heads that move, each in a crop box of its window."""
    rng = np.random.default_rng(seed)
    b, t, s = config.batch_size, config.window, config.image_size
    normal = lambda scale, *shape: (scale * rng.standard_normal((b, t, *shape))).astype(np.float32)
    coefficients = Coefficients(
        betas=np.repeat(normal(1.0, head.n_shape)[:, :1], t, 1),
        expression=np.abs(normal(0.2, head.n_expression)),
        rot=normal(0.2, 3), tra=normal(0.005, 3) - np.float32([0, 0, 0.8]), neck=normal(0.05, 3),
        jaw=normal(0.03, 3), eyes=normal(0.05, 3),
    )  # fmt: skip
    intrinsics = np.broadcast_to(np.float32([2.0 * s, 2.0 * s, s / 2, s / 2]), (b, t, 4))
    camera = Camera(intrinsics, np.broadcast_to(np.eye(4, dtype=np.float32), (b, t, 4, 4)))
    identity = make_identity(head, jnp.asarray(coefficients.betas[:, :1]))
    pixels = project(camera_from_world(world_vertices(head, identity, coefficients), camera), camera)
    seen = np.asarray(mesh_render_mask(head))
    box = crop_box(pixels[:, :, seen].reshape(b, -1, 2))
    batch = Batch(
        frames=rng.integers(0, 256, (b, t, s, s, 3), np.uint8),
        reference=rng.integers(0, 256, (b, s, s, 3), np.uint8),
        coefficients=coefficients, reference_coefficients=jax.tree.map(lambda x: x[:, 0], coefficients),
        camera=camera, crop=np.broadcast_to(np.asarray(box)[:, None], (b, t, 4)),
        confidence=np.ones((b, t), np.float32), clip_index=np.zeros(b, np.int32),
        frame_index=np.zeros((b, t), np.int32), reference_index=np.zeros(b, np.int32),
        reference_camera=jax.tree.map(lambda x: x[:, 0], camera),
        reference_crop=np.broadcast_to(np.asarray(box), (b, 4)),
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, batch)


def our_calls(config, steps: int) -> tuple[dict, dict]:
    """(calls by name that wait for their result, figures known without timing)."""
    head = builtin_head()
    networks = build_networks(config, head)
    optimizer = make_optimizer(config)
    mesh = make_mesh(1, 1, jax.devices()[:1])
    batch = make_batch(config, head)
    params = draw_params(networks, jax.random.key(0))
    trained, frozen = split_params(config, params)
    del params
    state = create_state(trained, frozen, optimizer, keep_ema=True)
    del trained
    step = jax.jit(make_train_step(config, networks, optimizer, mesh), donate_argnums=0)
    traced = step.trace(state, batch, head)
    work = work_of(traced.jaxpr)

    whole = lambda s: s.params | s.frozen
    driver_inputs = (batch.coefficients, batch.camera, batch.crop)
    # A batch of 32 frames, whatever the step's own batch is (issue B, point 5).
    many = jax.tree.map(
        lambda x: jnp.concatenate([x] * -(-32 // (x.shape[0] * config.window)))[: -(-32 // config.window)],
        driver_inputs,
    )
    unet = networks.loki.generation.unet

    def draw(coefficients, camera, crop):
        return driver_input(config, head, coefficients, camera, crop)

    def vae(p, frames, reference):
        return encode_images(networks, p, frames), encode_images(networks, p, reference)

    def features_of(p, latents):
        return reference_features(networks, p, latents)

    def generation(p, x, maps, features):
        t = jnp.full(x.shape[:2], 500, jnp.int32)
        return denoise(networks, p, x, t, encode_condition(networks, p, maps), features)

    def sample(p, features, maps, key):
        latents, *_ = sample_windows(
            config,
            networks,
            p,
            keys_values(unet, p["generation"]["unet"], features),
            maps,
            initial_noise(networks, key, *maps.shape[:2]),
            solver="ddim",
            steps=steps,
            guidance=config.sample.guidance,
            spacing="leading",
        )
        return decode_latents(networks, p, latents)

    one = lambda tree: jax.tree.map(lambda x: x[:1], tree)
    params, key = whole(state), jax.random.key(1)
    maps, many_maps, single_maps = (
        jax.eval_shape(draw, *x) for x in (driver_inputs, many, one(driver_inputs))
    )
    latents, portrait = jax.eval_shape(vae, params, batch.frames, batch.reference)
    features, single_features = (
        jax.eval_shape(features_of, params, jax.ShapeDtypeStruct((n, *portrait.shape[1:]), portrait.dtype))
        for n in (len(portrait), 1)
    )
    single_portrait = jax.ShapeDtypeStruct((1, *portrait.shape[1:]), portrait.dtype)
    programs = {
        "train step": traced,
        "draw": jax.jit(draw).trace(*driver_inputs),
        "draw many": jax.jit(draw).trace(*many),
        "draw one": jax.jit(draw).trace(*one(driver_inputs)),
        "copy": jax.jit(jnp.copy).trace(many_maps),
        "vae": jax.jit(vae).trace(params, batch.frames, batch.reference),
        "vae one": jax.jit(vae).trace(params, *one((batch.frames, batch.reference))),
        "reference": jax.jit(features_of).trace(params, portrait),
        "reference one": jax.jit(features_of).trace(params, single_portrait),
        "generation": jax.jit(generation).trace(params, latents, maps, features),
        "sample": jax.jit(sample).trace(params, single_features, single_maps, key),
    }
    del params
    with ThreadPoolExecutor() as pool:
        built = dict(zip(programs, pool.map(lambda p: p.lower().compile(), programs.values()), strict=True))
    print(f"ours: {len(built)} programs compiled", file=sys.stderr, flush=True)
    memory = built["train step"].memory_analysis()
    driver, many_maps = built["draw"](*driver_inputs), built["draw many"](*many)
    holder = {"state": state}
    latents, portrait = built["vae"](whole(state), batch.frames, batch.reference)
    features = built["reference"](whole(state), portrait)
    del state

    def train_step():
        holder["state"], metrics = built["train step"](holder["state"], batch, head)
        jax.block_until_ready(metrics)

    def sample_one():
        params = whole(holder["state"])
        _, z = built["vae one"](params, *one((batch.frames, batch.reference)))
        features = built["reference one"](params, z)
        return built["sample"](params, features, built["draw one"](*one(driver_inputs)), key)

    ready = lambda call: lambda: jax.block_until_ready(call())
    calls = {
        "driver map": ready(lambda: built["draw"](*driver_inputs)),
        "driver maps of 32 frames": ready(lambda: built["draw many"](*many)),
        "copy of these maps": ready(lambda: built["copy"](many_maps)),
        "VAE encode": ready(lambda: built["vae"](whole(holder["state"]), batch.frames, batch.reference)),
        "reference branch": ready(lambda: built["reference"](whole(holder["state"]), portrait)),
        "generation forward": ready(
            lambda: built["generation"](whole(holder["state"]), latents, driver, features)
        ),
        "train step": train_step,
        "sampling": ready(sample_one),
    }
    known = {
        "parameters": {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in {
            **holder["state"].params["generation"], "reference": frozen["reference"],
            "vae": frozen["autoencoder"]}.items()},
        "flops": work.matrix, "model_flops": work.model,
        "compiled_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else None,
        "covered": float((driver != 0).any(-1).mean()),
    }  # fmt: skip
    return calls, known


def their_calls(config, steps: int, use_compile: bool) -> tuple[dict, dict]:
    """The counterpart's calls and parameter counts."""
    import torch
    from torch_counterpart import count, make_calls, make_networks

    from loki_jax.weights.layouts import diffusers_configs, make_network

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda" if cuda else "cpu"), getattr(torch, config.model.dtype)
    channels = driver_channels(config.driver.arm, builtin_head())
    networks = make_networks(
        diffusers_configs(make_network(config.model)), config.model, channels, config.window, device, dtype
    )
    b, t, s = config.batch_size, config.window, config.image_size
    alphas = build_networks(config, builtin_head()).schedule.alphas_cumprod
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "images": torch.randint(0, 256, (b, t, 3, s, s), generator=generator, dtype=torch.uint8).to(device),
        "portrait": torch.randint(0, 256, (b, 3, s, s), generator=generator, dtype=torch.uint8).to(device),
        "driver": torch.randn(b, t, channels, s, s, generator=generator).to(device, dtype),
        "prompt": torch.randn(1, 77, config.model.reference.context_dim, generator=generator).to(device),
        "alphas": torch.from_numpy(np.array(alphas)),
    }
    scale, guidance = config.model.autoencoder.scale, config.sample.guidance
    calls = make_calls(networks, inputs, scale, steps, guidance, use_compile)
    if b > 1:
        # Sampling animates one portrait.
        single = {k: v[:1] if k in ("images", "portrait", "driver") else v for k, v in inputs.items()}
        calls["sampling"] = make_calls(networks, single, scale, steps, guidance, use_compile)["sampling"]
    names = {"unet": "generation", "encoder": "encoder", "reference": "reference", "vae": "vae"}
    return calls, {"parameters": {ours: count(networks[theirs]) for ours, theirs in names.items()}}


def timings(calls: dict[str, dict], repeats: int, slow: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every call of every implementation, taken in turns after one that compiles."""
    found = {who: {name: [] for name in group} for who, group in calls.items()}
    names = list(dict.fromkeys(name for group in calls.values() for name in group))
    for name in names:
        mine = {who: group[name] for who, group in calls.items() if name in group}
        for who, call in mine.items():
            began = time.perf_counter()
            call()
            call()
            print(
                f"{who}: {name} compiled and warm after {time.perf_counter() - began:.1f} s",
                file=sys.stderr,
                flush=True,
            )
        for _ in range(slow if name == "sampling" else repeats):
            for who, call in mine.items():
                began = time.perf_counter()
                call()
                found[who][name].append(time.perf_counter() - began)
    return found


def matrix_rate(quick: bool) -> float:
    """Operations a second of the fastest of a few large products (bfloat16; float32 with `quick`)."""
    dtype, sizes = (jnp.float32, (512, 1024)) if quick else (jnp.bfloat16, (4096, 8192, 16384))
    best = 0.0
    for n in sizes:
        a, b = jax.random.normal(jax.random.key(0), (2, n, n), dtype)
        # A chain, so that the time of a call does not count.
        chain = jax.jit(
            lambda a, b, n=n: jax.lax.fori_loop(0, 8, lambda _, x: (x @ b) * jnp.asarray(n**-0.5, dtype), a)
        )
        jax.block_until_ready(chain(a, b))
        for _ in range(5):
            began = time.perf_counter()
            jax.block_until_ready(chain(a, b))
            best = max(best, 8 * 2 * n**3 / (time.perf_counter() - began))
    return best


def run_one(arguments, config, steps: int) -> dict:
    """Timings and figures of the implementations that this process is to run."""
    calls, known = {}, {}
    if arguments.only in (None, "ours"):
        calls["ours"], known["ours"] = our_calls(config, steps)
    if arguments.only in (None, "torch") and not arguments.no_torch:
        calls["torch"], known["torch"] = their_calls(
            config, steps, not (arguments.quick or arguments.no_compile)
        )
    return {"seconds": timings(calls, arguments.repeats, max(2, arguments.repeats // 3)), "known": known}


def in_processes(arguments) -> dict:
    """The same, each implementation in its own process, in turns."""
    whole = {"seconds": {}, "known": {}}
    command = [
        sys.executable,
        __file__,
        "--windows",
        str(arguments.windows),
        "--repeats",
        str(arguments.repeats),
    ]
    command += [f"--{name.replace('_', '-')}" for name in ("quick", "no_compile") if getattr(arguments, name)]
    for number in range(arguments.rounds):
        for who in ("ours",) if arguments.no_torch else ("ours", "torch"):
            print(f"round {number + 1} of {arguments.rounds}: {who}", file=sys.stderr, flush=True)
            done = subprocess.run([*command, "--only", who], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(
                    f"error: the process that measures {who} ended with {done.returncode}; "
                    "its message stands above"
                )
            found = json.loads(done.stdout.strip().splitlines()[-1])
            whole["known"] |= found["known"]
            for name, values in found["seconds"][who].items():
                whole["seconds"].setdefault(who, {}).setdefault(name, []).extend(values)
    return whole


def summary(found: dict, config, arguments, rate: float) -> dict:
    """Medians, shares and ratios of what was measured."""
    times = {
        who: {name: median(values) for name, values in group.items()}
        for who, group in found["seconds"].items()
    }
    ours, known = times["ours"], found["known"]["ours"]
    forward = sum(
        ours[name] for name in ("driver map", "VAE encode", "reference branch", "generation forward")
    )
    parts = {
        name: ours[name] for name in ("driver map", "VAE encode", "reference branch", "generation forward")
    }
    parts["backward, recomputation and update"] = ours["train step"] - forward
    chip = chip_of(jax.devices()[0].device_kind)
    result = {
        "benchmark": "step", "full_size": not arguments.quick, "device": jax.devices()[0].device_kind,
        "windows": config.batch_size, "frames": config.window, "pixels": config.image_size,
        "dtype": config.model.dtype,
        "torch_compile": not (arguments.quick or arguments.no_compile),
        "milliseconds": {
            who: {name: round(1e3 * s, 3) for name, s in group.items()} for who, group in times.items()
        },
        "share": {name: round(s / ours["train step"], 4) for name, s in parts.items()},
        "matrix_rate": round(rate), "flops": known["flops"], "model_flops": known["model_flops"],
        "mfu_of_measured_rate": round(known["model_flops"] / ours["train step"] / rate, 4),
        "mfu_of_data_sheet":
            round(known["model_flops"] / ours["train step"] / chip.flops, 4) if chip else None,
        "compiled_bytes": known["compiled_bytes"], "driver_covered": round(known["covered"], 3),
        "driver_maps_over_copy": round(ours["driver maps of 32 frames"] / ours["copy of these maps"], 3),
        "driver_map_over_train_step": round(ours["driver map"] / ours["train step"], 4),
    }  # fmt: skip
    if "torch" in times:
        result["ours_over_torch"] = {name: round(ours[name] / s, 3) for name, s in times["torch"].items()}
        without = ours["train step"] - ours["driver map"]
        result["ours_over_torch"]["train step without driver maps"] = round(
            without / times["torch"]["train step"], 3
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny, in float32, to see that it runs")
    parser.add_argument("--windows", type=int, default=2, help="windows of 16 frames a step")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each part (sampling: a third)")
    parser.add_argument(
        "--rounds", type=int, default=2, help="on a GPU: processes of each implementation, in turns"
    )
    parser.add_argument("--no-torch", action="store_true", help="leave the counterpart out")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--only", choices=("ours", "torch"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and not arguments.quick:
        print("no GPU: --quick it is; the full size needs one", file=sys.stderr)
        arguments.quick = True
    config = make_config(arguments.quick, arguments.windows)
    steps = 5 if arguments.quick else 50
    if arguments.only:
        print(json.dumps(run_one(arguments, config, steps)))
        return
    rate = matrix_rate(arguments.quick)
    found = in_processes(arguments) if on_gpu else run_one(arguments, config, steps)
    counts = {who: known["parameters"] for who, known in found["known"].items()}
    if len(counts) == 2 and counts["ours"] != counts["torch"]:
        sys.exit(f"error: the counterpart is not of the same shape: {counts}")
    result = summary(found, config, arguments, rate)
    for name, share in result["share"].items():
        print(f"{name:38s} {share:7.1%} of the train step")
    for who, group in result["milliseconds"].items():
        for name, value in group.items():
            print(f"{who:6s} {name:28s} {value:10.2f} ms")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
