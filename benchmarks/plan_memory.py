"""Memory that `loki_jax.plan` predicts for a train step, beside what XLA's compiler allots.

    python benchmarks/plan_memory.py [--sizes small medium large]

Each size is configs/hdtf.py with fewer channels, frames and pixels, in float32 (XLA for CPU widens bfloat16),
with attention written out, on one device. Arguments are exact in the plan. Temporaries are compared twice:
as XLA for CPU schedules by default, which lets independent operations run side by side, and as it schedules
to save memory. The last line of the output is one JSON object.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configs.hdtf import get_config  # noqa: E402
from loki_jax.face.builtin import builtin_head  # noqa: E402
from loki_jax.planning.compiled import COMPILER_OPTIONS  # noqa: E402
from loki_jax.planning.report import make_plan  # noqa: E402
from loki_jax.planning.work import make_subject  # noqa: E402
from loki_jax.training.flops import CHIPS  # noqa: E402
from loki_jax.training.init import abstract_batch  # noqa: E402
from loki_jax.training.sharding import make_mesh  # noqa: E402
from loki_jax.training.step import make_train_step  # noqa: E402

# (channels of the UNet's first level, levels, frames of a window, pixels)
SIZES = {"small": (32, 2, 2, 64), "medium": (64, 3, 4, 128), "large": (96, 4, 8, 256)}
SCHEDULES = {
    "side by side": {},
    "saving memory": {"xla_cpu_enable_concurrency_optimized_scheduler": False,
                      "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
}  # fmt: skip


def config_of(size: str) -> ConfigDict:
    channels, levels, frames, pixels = SIZES[size]
    config = get_config()
    config.batch_size, config.window, config.image_size = 1, frames, pixels
    model = config.model
    model.dtype, model.attention_backend = "float32", "xla"
    model.unet.channels, model.unet.head_channels = channels, channels // 2
    model.unet.multipliers = model.unet.multipliers[:levels]
    model.unet.attention_modes = model.unet.attention_modes[:levels]
    model.unet.attention_levels = tuple(range(min(levels, 3)))
    model.encoder.widths = tuple(width // 2 for width in model.encoder.widths)
    model.autoencoder.widths = tuple(width // 2 for width in model.autoencoder.widths)
    return config


def measure(size: str) -> dict:
    """Planned and compiled bytes of arguments and of temporaries, by schedule."""
    subject = make_subject(config_of(size), builtin_head())
    config, head, networks, optimizer, state = subject
    plan = make_plan(subject, CHIPS[0], 1, 1, 1, "xla")["memory"]
    mesh = make_mesh(1, 1, jax.devices()[:1])
    step = jax.jit(
        make_train_step(config, networks, optimizer, mesh), donate_argnums=0, keep_unused=True
    )  # so that the bytes of all arguments can be compared
    lowered = step.lower(state, abstract_batch(config, head), head)
    found = {"arguments": {"planned": plan["resident"]}, "temporaries": {}}
    found["temporaries"]["planned"] = max(plan["peak_by_attention"]["xla"].values()) - plan["resident"]
    for name, options in SCHEDULES.items():
        start = time.perf_counter()
        memory = lowered.compile(COMPILER_OPTIONS | options).memory_analysis()
        found["arguments"]["compiled"] = memory.argument_size_in_bytes
        found["temporaries"][name] = memory.temp_size_in_bytes
        ratio = found["temporaries"]["planned"] / memory.temp_size_in_bytes
        print(f"{size}, {name}: {memory.temp_size_in_bytes / 1e6:.1f} MB, plan {ratio:.2f} of it "
              f"({time.perf_counter() - start:.0f} s)", flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    print(json.dumps({"bytes": {size: measure(size) for size in args.sizes}}))


if __name__ == "__main__":
    main()
