"""One plan as plain data, and as text for a terminal."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loki_jax.planning import predict
from loki_jax.planning.collectives import expected_collectives, sent_bytes
from loki_jax.planning.memory import (
    abstract_mesh,
    activations,
    forward_bytes,
    peak_bytes,
    placements,
    tree_bytes,
)
from loki_jax.planning.work import (
    Subject,
    frozen_read,
    parameters_by_part,
    trace_sampling,
    trace_step,
    trace_validation,
    work_by_part,
)
from loki_jax.training.flops import Chip, Work
from loki_jax.training.init import abstract_batch
from loki_jax.training.sharding import tree_shardings

# Method, section 2: the paper's count, and those of others that it compares itself with.
PAPER_PARAMETERS = {"generation branch": 822_878_788, "reference UNet": 865_910_724, "VAE": 83_653_863}
X_PORTRAIT, HUNYUAN_PORTRAIT = 3.07e9, 1.99e9


def check_batch(batch: int, devices: int, microbatches: int) -> int:
    """Windows that each device holds. Raises ValueError, with a batch that fits, where it does not divide."""
    if batch % (devices * microbatches):
        per_device = max(batch // devices // microbatches, 1) * microbatches
        parts = f" in {microbatches} microbatches" if microbatches > 1 else ""
        raise ValueError(
            f"a batch of {batch} windows does not divide over {devices} devices{parts}: "
            f"give --batch {per_device * devices} ({per_device} a device) "
            f"or another multiple of {devices * microbatches}"
        )
    return batch // devices


def local_plan(subject: Subject, windows: int, latents: bool) -> tuple[dict[str, Work], Any]:
    """What does not depend on how many devices there are: work by part, and the traced step."""
    jaxpr = trace_step(subject, windows, latents)
    return work_by_part(jaxpr), jaxpr


def make_plan(
    subject: Subject, chip: Chip, data: int, fsdp: int, windows: int, backend: str, *,
    latents: bool = False, efficiency: float = predict.EFFICIENCY, local: tuple | None = None,
) -> dict:  # fmt: skip
    """The plan of a step of `windows` windows a device on data x fsdp devices: plain data (bytes, seconds).

    Args:
      backend: of attention, one of `memory.ATTENTION_BACKENDS`.
      local: `local_plan` of the same windows, to be shared by several meshes.
    """
    config, state = subject.config, subject.state
    work, jaxpr = local or local_plan(subject, windows, latents)
    shardings, _ = tree_shardings(
        state, abstract_mesh(data, fsdp), config.sharding_rules, config.sharding_min_size
    )
    steps = config.grad_accum_steps
    places = placements(state, shardings, config.sharding_min_size, steps)
    on_device = {name: placement.per_device for name, placement in places.items()}
    step = activations(jaxpr, steps)

    local_config = config.copy_and_resolve_references()
    local_config.batch_size = windows
    batch = tree_bytes(abstract_batch(local_config, subject.head, subject.networks if latents else None))
    head = tree_bytes(jax.tree.map(np.asarray, subject.head))
    resident = sum(on_device.values()) - on_device["gradients"] + batch + head + state.step.dtype.itemsize
    exchanged = functools.partial(
        expected_collectives, state, shardings, data, fsdp, frozen_read(jaxpr, state),
        matrix_bytes=jnp.dtype(config.model.dtype).itemsize,
        gradient_bytes=jnp.dtype(config.gradient_dtype).itemsize,
    )  # fmt: skip
    collectives = exchanged(microbatches=steps)
    gathered = sum(c.bytes for c in exchanged() if c.kind == "all-gather")
    peaks = {
        name: peak_bytes(resident, on_device["gradients"], step, name, gathered) for name in step.attention
    }
    peak = max(peaks[backend].values())

    traffic = predict.optimizer_traffic(
        *(on_device[k] for k in ("parameters", "optimiser moments", "moving average", "gradients"))
    )
    time = predict.step_time(work, traffic, collectives, chip, data, fsdp, efficiency)
    model = sum(part.matrix for name, part in work.items() if name != "recomputation")
    parameters = parameters_by_part(state)
    return {
        "chip": chip._asdict(), "mesh": {"data": data, "fsdp": fsdp}, "devices": data * fsdp,
        "batch": windows * data * fsdp, "windows_per_device": windows, "attention": backend,
        "latents": latents,
        "dtype": str(config.model.dtype), "gradient_dtype": str(config.gradient_dtype),
        "parameters": parameters,
        "trained": sorted(state.params), "paper_parameters": PAPER_PARAMETERS,
        "work_per_device": {name: part._asdict() for name, part in work.items()},
        "memory": {
            "groups": {name: placement._asdict() for name, placement in places.items()},
            "batch": batch, "head": head, "resident": resident, "gathered": gathered,
            "activations": step._asdict(),
            "peak_by_attention": peaks, "peak": peak, "usable": predict.USABLE_MEMORY * chip.memory,
            "fits": bool(peak <= predict.USABLE_MEMORY * chip.memory),
        },
        "collectives": [
            c._asdict() | {"sent": sent_bytes(c), "seconds": s}
            for c, s in zip(collectives, time.collectives, strict=True)
        ],
        "time": {
            "parts": {name: p._asdict() | {"bound": p.bound} for name, p in time.parts.items()},
            "device": time.device, "network": time.network, "overlapped": time.overlapped,
            "serial": time.serial, "floor": time.floor, "efficiency": efficiency,
            "mfu": model / (time.overlapped * chip.flops),
            "windows_per_second": windows * data * fsdp / time.overlapped,
        },
    }  # fmt: skip


def add_other_programs(plan: dict, subject: Subject) -> None:
    """Add what validation and sampling need on a device (bytes) to a plan: `memory["other_programs"]`."""
    memory, backend = plan["memory"], plan["attention"]
    validation = trace_validation(subject, plan["windows_per_device"], plan["latents"])
    whole = [memory["groups"][name] for name in ("parameters", "frozen")]
    copies = sum(group["total"] for group in whole if group["per_device"] < group["total"])
    memory["other_programs"] = {
        "validation": memory["resident"] + memory["gathered"] + forward_bytes(validation, backend),
        # Each device draws one pair with whole parameters.
        "sampling": memory["resident"] + copies + forward_bytes(trace_sampling(subject), backend),
    }


# -------------------------------------------------------------------------------------------- text


def format_plan(plan: dict, title: str) -> str:
    """The plan as text for a terminal."""
    sections = (_parameters, _work, _memory, _placement, _network, _time)
    chip = plan["chip"]
    head = (
        f"{title}: mesh data={plan['mesh']['data']} x fsdp={plan['mesh']['fsdp']} of {chip['name']}, "
        f"batch {plan['batch']} ({plan['windows_per_device']} windows a device), "
        f"attention {plan['attention']}" + (", latents from the shards" if plan["latents"] else "")
    )
    return "\n\n".join([head, *(section(plan) for section in sections)])


def parameter_table(parameters: dict[str, int]) -> list[tuple[str, int]]:
    """Rows of the paper's table: what is needed at inference, and its sum (the null prompt is an input)."""
    generation = parameters["generation UNet"] + parameters["conditioning encoder"]
    rows = [("generation branch", generation)] + [
        (name, parameters[name]) for name in ("reference UNet", "VAE")
    ]
    return [*rows, ("at inference", sum(count for _, count in rows))]


def _parameters(plan: dict) -> str:
    parameters = plan["parameters"]
    lines = ["PARAMETERS"]
    lines += [f"  {name:24s} {number:>15,}" for name, number in parameters.items()]
    lines += ["  the paper's table"]
    table = parameter_table(parameters)
    for name, number in table:
        lines.append(f"  {name:24s} {number:>15,}")
    total, paper = table[-1][1], sum(PAPER_PARAMETERS.values())
    if dict(table[:-1]) == PAPER_PARAMETERS:
        lines.append(
            f"  {total / 1e9:.3f} B, the paper's count; "
            f"{1 - total / X_PORTRAIT:.1%} below X-Portrait's 3.07 B, "
            f"{1 - total / HUNYUAN_PORTRAIT:.0%} below HunyuanPortrait's 1.99 B"
        )
    else:
        lines.append(
            f"  another model than the paper's {paper:,} = "
            f"{' + '.join(f'{n:,}' for n in PAPER_PARAMETERS.values())} "
            f"({paper / 1e9:.3f} B, {1 - paper / X_PORTRAIT:.1%} below X-Portrait's 3.07 B)"
        )
    return "\n".join(lines)


def quantity(value: int | float) -> str:
    """A number with a metric prefix: 3.29 G."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:.4g} "


def _work(plan: dict) -> str:
    devices = plan["devices"]
    lines = [
        "OPERATIONS OF A STEP (a multiply-add is two; matrix work unless stated otherwise)",
        f"  {'part':24s} {'a device':>10s} {'of it attention':>16s} {'all devices':>12s} "
        f"{'elementwise, a device':>22s}",
    ]
    row = lambda name, w: (
        f"  {name:24s} {quantity(w['matrix']):>10s} {quantity(w['attention']):>16s} "
        f"{quantity(w['matrix'] * devices):>12s} {quantity(w['vector']):>22s}"
    )
    works = plan["work_per_device"]
    total = {key: sum(work[key] for work in works.values()) for key in ("matrix", "attention", "vector")}
    lines += [row(name, work) for name, work in works.items()] + [row("total", total)]
    lines.append(
        f"  {works['recomputation']['matrix'] / max(total['matrix'], 1):.0%} is recomputation, "
        "which MFU does not count. Loops of the rasteriser count once: their length depends on the mesh."
    )
    return "\n".join(lines)


def _memory(plan: dict) -> str:
    memory, chip = plan["memory"], plan["chip"]
    row = lambda name, size, note="": f"  {name:44s} {quantity(size) + 'B':>10s}{note}"
    used = lambda name: "  <- used" if name == plan["attention"] else ""
    lines = ["BYTES ON A DEVICE"]
    for name, group in memory["groups"].items():
        lines.append(row(name, group["per_device"], f"  of {quantity(group['total'])}B"))
    lines += [row("batch", memory["batch"]), row("head asset", memory["head"])]
    lines.append(row("sharded parameters, gathered all at once", memory["gathered"]))
    step = memory["activations"]
    for name, size in sorted(step["kept"].items(), key=lambda item: -item[1]):
        lines.append(row("kept for the backward pass: " + name, size))
    lines.append(row("largest recomputed block", step["block"]))
    lines += [row("largest attention, " + name, size, used(name)) for name, size in step["attention"].items()]
    lines.append(row("largest operation of the backward pass", step["operation"]))
    lines.append(row("largest in the VAE", step["encode"]))
    for name, moments in memory["peak_by_attention"].items():
        peak = max(moments.values())
        verdict = "fits" if peak <= memory["usable"] else "does NOT fit"
        lines.append(
            row(f"peak with {name}", peak, f"  {verdict} in {quantity(memory['usable'])}B{used(name)}")
        )
    for name, size in memory.get("other_programs", {}).items():
        verdict = "fits" if size <= memory["usable"] else "does NOT fit"
        lines.append(row(f"peak of {name}", size, f"  {verdict}"))
    lines.append(
        f"  ({predict.USABLE_MEMORY:.0%} of {chip['name']}'s {chip['memory'] / 1e9:.0f} GB; on GPUs set "
        f"XLA_PYTHON_CLIENT_MEM_FRACTION={predict.USABLE_MEMORY}, the default is 0.75)"
    )
    return "\n".join(lines)


def _placement(plan: dict) -> str:
    lines = ["WHAT IS SHARDED"]
    if plan["mesh"]["fsdp"] == 1:
        lines.append(
            "  nothing: the fsdp axis has one device, so each holds a whole copy of the state; "
            "the batch is split"
        )
        return "\n".join(lines)
    for name, group in plan["memory"]["groups"].items():
        lines.append(
            f"  {name:20s} {group['sharded']:4d} arrays split along the largest dimension that fsdp divides; "
            f"{group['small']} whole: smaller than config.sharding_min_size"
        )
        for path, shape in group["whole"]:
            lines.append(f"    whole: {path} {shape}: a rule says replicate, or fsdp divides no dimension")
    return "\n".join(lines)


def _network(plan: dict) -> str:
    lines = [
        f"COLLECTIVES OF A STEP, gradients summed in {plan['gradient_dtype']} "
        "(expected from the sharding; --compile counts them in the compiled program)"
    ]
    for c in plan["collectives"]:
        lines.append(
            f"  {c['kind']:15s} over {c['axis']:4s} ({c['group']:4d}) {quantity(c['bytes']) + 'B':>10s}, "
            f"sent by each {quantity(c['sent']) + 'B':>10s}, {1e3 * c['seconds']:7.2f} ms  "
            f"{c['what']} ({c['number']} arrays)"
        )
    if not plan["collectives"]:
        lines.append("  none: one device")
    return "\n".join(lines)


def _time(plan: dict) -> str:
    time, chip = plan["time"], plan["chip"]
    lines = [
        f"PREDICTED STEP on {chip['name']} (nothing measured)",
        f"  {'part':24s} {'compute ms':>11s} {'memory ms':>10s}  bound by",
    ]
    for name, part in time["parts"].items():
        lines.append(
            f"  {name:24s} {1e3 * part['compute']:11.2f} {1e3 * part['memory']:10.2f}  {part['bound']}"
        )
    lines += [
        f"  device {1e3 * time['device']:.1f} ms, network {1e3 * time['network']:.1f} ms; "
        f"step {1e3 * time['overlapped']:.1f} ms with overlap, {1e3 * time['serial']:.1f} ms without",
        f"  {time['windows_per_second']:.1f} windows/s, MFU {time['mfu']:.0%}; "
        f"at the peak rate with nothing else: {1e3 * time['floor']:.1f} ms",
        f"  Assumed: matrix work at {time['efficiency']:.0%} of {chip['flops'] / 1e12:.0f} TFLOP/s; "
        f"activations cross HBM ({chip['bandwidth'] / 1e12:.2f} TB/s) {predict.HBM_PASSES} times "
        "for each read and write by matrix work; ",
        f"  a part takes the slower of the two; links {chip['link'] / 1e9:.0f} GB/s each way "
        f"within {chip['domain']} chips, {chip['network'] / 1e9:.1f} GB/s a chip beyond; "
        "rasterising is left out (benchmarks/step.py measures it).",
    ]
    if plan["dtype"] != "bfloat16":
        lines.append(
            f"  The config computes in {plan['dtype']}: the peak above is bfloat16's, "
            "so the step will be slower."
        )
    return "\n".join(lines)
