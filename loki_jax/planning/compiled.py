"""What the compiler reports of a step, from simulated devices on the CPU."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from loki_jax.networks import build_networks
from loki_jax.planning.collectives import Collective, parse_collectives, sent_bytes
from loki_jax.planning.report import quantity
from loki_jax.planning.work import Subject
from loki_jax.training.flops import step_flops, work_of
from loki_jax.training.init import abstract_batch
from loki_jax.training.logging import log_duration
from loki_jax.training.sharding import batch_sharding, make_mesh, tree_shardings
from loki_jax.training.step import make_train_step

# The program never runs, so its machine code may be poor.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compile_step(
    subject: Subject, data: int, fsdp: int, latents: bool = False, attention: str = "chunked"
) -> dict:
    """Compile the step of `subject.config.batch_size` windows for data x fsdp simulated CPU devices.

    Collectives are those of the partitioned program, before XLA for CPU widens what is bfloat16.

    Raises:
      ValueError: this process has another number of devices, or jax's compilation cache is on.
    """
    config = ConfigDict(subject.config.to_dict())
    config.model.attention_backend = attention
    networks = build_networks(config, subject.head)
    mesh = make_mesh(data, fsdp)
    shardings, _ = tree_shardings(subject.state, mesh, config.sharding_rules, config.sharding_min_size)
    batch = abstract_batch(config, subject.head, networks if latents else None)
    split = jax.tree.map(lambda _: batch_sharding(mesh), batch)
    step = jax.jit(
        make_train_step(config, networks, subject.optimizer, mesh), donate_argnums=0,
        in_shardings=(shardings, split, None), out_shardings=(shardings, None),
        keep_unused=True,  # so that the bytes of all arguments can be compared
    )  # fmt: skip
    began = time.monotonic()
    with log_duration("lowering"):
        traced = step.trace(subject.state, batch, subject.head)
        lowered = traced.lower()
    with log_duration("compiling"), tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        compiled = lowered.compile(COMPILER_OPTIONS | dump)
        dumps = [path.read_text() for path in Path(folder).glob("*after_spmd-partitioning*.txt")]
    if not dumps:
        raise ValueError("a program from jax's compilation cache does not show how it was partitioned")
    memory = compiled.memory_analysis()
    return {
        "seconds": time.monotonic() - began,
        "attention": attention,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": step_flops(compiled),
        "traced_flops": work_of(traced.jaxpr).matrix,
        "collectives": [
            c._asdict() | {"sent": sent_bytes(c)} for c in parse_collectives(dumps[0], data * fsdp)
        ],
    }


def format_compiled(plan: dict) -> str:
    """What the compiler reports beside what was planned."""
    found, memory = plan["compiled"], plan["memory"]
    show = lambda size: f"{quantity(size) + 'B':>10s}"
    planned = memory["resident"]
    temporary = max(memory["peak_by_attention"][found["attention"]].values()) - planned
    total = {
        key: sum(w[key] for w in plan["work_per_device"].values()) * plan["devices"]
        for key in ("matrix", "vector")
    }
    lines = [
        f"COMPILED for {plan['devices']} simulated CPU devices in {found['seconds']:.0f} s, "
        f"attention {found['attention']}",
        f"  arguments on a device     {show(found['argument_bytes'])}  (planned: {quantity(planned)}B); "
        f"donated {show(found['donated_bytes'])}",
        f"  temporaries on a device   {show(found['temporary_bytes'])}  (planned: {quantity(temporary)}B; "
        "XLA for CPU widens bfloat16 work to float32: compare a plan with --config.model.dtype=float32)",
        f"  operations, all devices   {quantity(found['flops']):>10s} by XLA, loops counted once "
        f"(planned: {quantity(total['matrix'])}and {quantity(total['vector'])}elementwise; "
        f"this program traced: {quantity(found['traced_flops'])})",
    ]
    for entry in found["collectives"]:
        c = Collective(**{key: entry[key] for key in Collective._fields})
        lines.append(
            f"  {c.kind:20s} groups of {c.group:4d}: {c.number:5d}, together {show(c.bytes)}, "
            f"sent by each {show(entry['sent'])}  {c.what}"
        )
    return "\n".join(lines)
