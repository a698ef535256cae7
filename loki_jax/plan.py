"""Plan a training run without its chips: what it costs, whether it fits, how long a step should take.

    python -m loki_jax.plan --config configs/hdtf.py --mesh data=8,fsdp=1 --chip h200
    python -m loki_jax.plan --config configs/hdtf.py --mesh data=32,fsdp=8 --batch 512 --json plan.json
    python -m loki_jax.plan --config configs/hdtf.py --mesh data=4,fsdp=2 --compile
    python -m loki_jax.plan --config configs/hdtf.py --sweep 8,64,1024 --chip h100,h200,v5p --out scaling.png

The step that `loki_jax.train` runs is traced from shapes alone: nothing is allocated, and it takes
well under a minute. `--compile` also compiles it for as many simulated CPU devices as the mesh has,
and prints what the compiler reports of memory, operations and collectives beside the plan. That takes
minutes and about 4 GB at full size, whatever the number of devices.

Any key of the config can be given as `--config.key=value`, as for training.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from loki_jax.compile_cache import enable_compile_cache
from loki_jax.face.builtin import builtin_head
from loki_jax.io import write_json
from loki_jax.planning import predict
from loki_jax.planning.compiled import compile_step, format_compiled
from loki_jax.planning.memory import ATTENTION_BACKENDS
from loki_jax.planning.report import add_other_programs, check_batch, format_plan, make_plan
from loki_jax.planning.sweep import draw_sweep, format_sweep, sweep
from loki_jax.planning.work import make_subject
from loki_jax.training.config import config_arguments, upgrade_config
from loki_jax.training.flops import Chip, chip_named
from loki_jax.training.logging import log

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the program's flags; ml_collections and absl keep them in one place for each process."""
    config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/hdtf.py.")
    flags.DEFINE_string("mesh", "data=8,fsdp=1", "Devices along each axis.")
    flags.DEFINE_list("chip", ["h200"], "h100 | h200 | a100-80 | v4 | v5e | v5p | v6e; several with --sweep.")
    flags.DEFINE_integer("batch", None, "Windows a step over all devices; default: the config's.")
    flags.DEFINE_enum("attention", None, ATTENTION_BACKENDS, "Backend; default: the config's, or the chip's.")
    flags.DEFINE_bool("latents", False, "The shards hold latents: the step skips the VAE.")
    flags.DEFINE_float("efficiency", predict.EFFICIENCY, "Share of the peak that matrix work reaches.")
    flags.DEFINE_float("network", None, "GB/s a chip can send out of its domain; default: the table's.")
    flags.DEFINE_bool("compile", False, "Also compile the step for simulated devices: what XLA reports.")
    flags.DEFINE_string("json", None, "Also write everything to this file.")
    flags.DEFINE_list("sweep", None, "Numbers of devices: a table of predicted weak scaling, no single plan.")
    flags.DEFINE_integer("windows", 2, "Windows a device, with --sweep.")
    flags.DEFINE_string("out", None, "Picture of the sweep (.png).")


def parse_mesh(text: str) -> tuple[int, int]:
    """(data, fsdp) of `data=8,fsdp=1`; an axis left out is 1. Raises ValueError on anything else."""
    axes = {"data": 1, "fsdp": 1}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in axes or not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"--mesh {text}: write data=8,fsdp=1 (whole numbers from 1; the axes are data and fsdp)"
            )
        axes[name] = int(size)
    return axes["data"], axes["fsdp"]


def attention_backend(wanted: str | None, model: ConfigDict, chip: Chip) -> str:
    """What `config.model`'s backend means on a chip: `auto` is the chip's fused kernel where it can run."""
    name = wanted or model.attention_backend
    if name in ATTENTION_BACKENDS:
        return name
    if chip.kinds[0].startswith("TPU"):
        return "splash"
    return "cudnn" if model.dtype in ("bfloat16", "float16") else "chunked"


def plan(config, title: str) -> None:
    """Print the plan, or the sweep, that the flags ask for.

    Raises:
      ValueError: a chip, mesh or batch that does not exist or fit; nothing is written.
    """
    chips = [chip_named(name) for name in FLAGS.chip]
    if FLAGS.network is not None:
        if FLAGS.network <= 0:
            raise ValueError(f"--network {FLAGS.network}: more than 0 GB/s")
        chips = [chip._replace(network=1e9 * FLAGS.network) for chip in chips]
    if FLAGS.batch is not None:
        if FLAGS.batch < 1:
            raise ValueError(f"--batch {FLAGS.batch}: at least one window")
        config.batch_size = FLAGS.batch

    # ------------------------------------------------------------------------------------- sweep
    if FLAGS.sweep:
        if not all(n.isdigit() and int(n) > 0 for n in FLAGS.sweep):
            raise ValueError(f"--sweep {','.join(FLAGS.sweep)}: whole numbers of devices, e.g. 8,64,1024")
        counts = sorted({int(n) for n in FLAGS.sweep})
        log("tracing the step (seconds to a minute) ...")
        subject = make_subject(config, builtin_head())
        backends = {chip.name: attention_backend(FLAGS.attention, config.model, chip) for chip in chips}
        rows = sweep(subject, chips, counts, FLAGS.windows, backends, FLAGS.latents, FLAGS.efficiency)
        print(format_sweep(rows))
        if FLAGS.json:
            write_json(Path(FLAGS.json), rows)
        if FLAGS.out:
            draw_sweep(rows, Path(FLAGS.out))
            log(f"wrote {FLAGS.out}")
        return

    # ---------------------------------------------------------------------------------- one plan
    if len(chips) != 1:
        raise ValueError("--chip: several chips only with --sweep")
    (chip,) = chips
    data, fsdp = parse_mesh(FLAGS.mesh)
    windows = check_batch(config.batch_size, data * fsdp, config.grad_accum_steps)
    backend = attention_backend(FLAGS.attention, config.model, chip)
    log("tracing the step (seconds to a minute) ...")
    subject = make_subject(config, builtin_head())
    result = make_plan(
        subject, chip, data, fsdp, windows, backend, latents=FLAGS.latents, efficiency=FLAGS.efficiency
    )
    add_other_programs(result, subject)
    print(format_plan(result, title))
    if FLAGS.compile:
        result["compiled"] = compile_step(subject, data, fsdp, FLAGS.latents)
        print("\n" + format_compiled(result))
    if FLAGS.json:
        write_json(Path(FLAGS.json), result)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    enable_compile_cache()
    try:
        # Before anything touches a device: planning never uses a real one.
        jax.config.update("jax_platforms", "cpu")
        if FLAGS.compile:
            data, fsdp = parse_mesh(FLAGS.mesh)
            jax.config.update("jax_num_cpu_devices", data * fsdp)
            jax.config.update("jax_enable_compilation_cache", False)
        plan(ConfigDict(upgrade_config(FLAGS.config.to_dict())), config_name())
    except ValueError as error:
        sys.exit(f"error: {error}")


def config_name() -> str:
    """The config file as it was given."""
    return config_flags.get_config_filename(FLAGS["config"])


if __name__ == "__main__":
    define_flags()
    flags.mark_flags_as_required(["config"])
    sys.argv = config_arguments(sys.argv)  # config_flags reads it, too
    app.run(main)
