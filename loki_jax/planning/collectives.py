"""Bytes that devices exchange in a step: what the sharding implies, and what a compiled program holds."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax

from loki_jax.training.flops import Chip
from loki_jax.training.state import TrainState

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """Collectives of one kind over groups of one size, in one step.

    Attributes:
      kind: one of `KINDS`.
      axis: mesh axis they run over: "data", "fsdp", "all", or "?" in a compiled program.
      group: devices of a group.
      bytes: of the whole array that is reduced, gathered or exchanged on each device, all of them together.
      number: how many.
      what: what travels; in a compiled program its types.
    """

    kind: str
    axis: str
    group: int
    bytes: int
    number: int
    what: str


def sent_bytes(collective: Collective) -> float:
    """Bytes that each device sends, by the ring algorithms."""
    g, size = collective.group, collective.bytes
    rounds = {"all-reduce": 2 * (g - 1) / g, "collective-permute": 1.0}
    return size * rounds.get(collective.kind, (g - 1) / g)


# ------------------------------------------------------------------------------------- expectation


def expected_collectives(
    state: TrainState, shardings: TrainState, data: int, fsdp: int, frozen_read: list[bool], *,
    matrix_bytes: int, gradient_bytes: int, microbatches: int = 1,
) -> list[Collective]:  # fmt: skip
    """What data parallelism and sharded parameters need; nothing else is exchanged.

    Frozen parameters are gathered once a step. Trained ones are gathered, and the gradients of their shards
    summed over fsdp, for each microbatch; all gradients are summed over the other devices once.

    Args:
      frozen_read: whether a step reads each of the frozen arrays (the VAE's decoder it does not).
      matrix_bytes: of a number of a matrix or kernel that is gathered: of the computation's dtype.
      gradient_bytes: of a number in the sums of gradients.
    """
    pairs = lambda part, specs: zip(jax.tree.leaves(part), jax.tree.leaves(specs), strict=True)
    trained = list(pairs(state.params, shardings.params))
    shards = [leaf for leaf, spec in trained if not spec.is_fully_replicated]
    whole = [leaf.size for leaf, spec in trained if spec.is_fully_replicated]
    frozen = [
        leaf.size * leaf.dtype.itemsize
        for (leaf, spec), read in zip(pairs(state.frozen, shardings.frozen), frozen_read, strict=True)
        if read and not spec.is_fully_replicated
    ]
    gathered = sum(leaf.size * (matrix_bytes if leaf.ndim > 1 else 4) for leaf in shards)
    split = gradient_bytes * sum(leaf.size for leaf in shards)
    n = microbatches
    found = [
        ("all-gather", "fsdp", fsdp, n * gathered, n * len(shards), "parameters"),
        ("all-gather", "fsdp", fsdp, sum(frozen), len(frozen), "frozen parameters in use"),
        ("reduce-scatter", "fsdp", fsdp, n * split, n * len(shards), "gradients of shards"),
        ("all-reduce", "data", data, split // fsdp, len(shards), "gradients of shards"),
        ("all-reduce", "all", data * fsdp, gradient_bytes * sum(whole), len(whole), "gradients of the rest"),
    ]
    return [Collective(*collective) for collective in found if collective[2] > 1 and collective[3]]


# ---------------------------------------------------------------------------------------- compiled

_LINE = re.compile(
    r"^\s*(?:ROOT\s+)?%?\S+ = (?P<result>\(.*?\)|\S+) (?P<kind>"
    + "|".join(KINDS)
    + r")(?P<start>-start)?\((?P<rest>.*)$",
    re.MULTILINE,
)
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+|f8\w+)\[([\d,]*)\]")


def parse_collectives(hlo: str, n_devices: int) -> list[Collective]:
    """The collectives of a program's text (`compiled.as_text()`), summed by kind, group and types of numbers.

    The body of a loop counts once.
    """
    sums: dict[tuple[str, int, str], tuple[int, int]] = {}
    for match in _LINE.finditer(hlo):
        kind, result, rest = match["kind"], match["result"], match["rest"]
        group = _group_size(kind, rest, n_devices)
        arrays = _ARRAY.findall(result)
        if match["start"] and result.startswith("(") and kind != "all-reduce":
            # Asynchronous forms return (operands, results): the results are the second half, or the
            # second entry.
            arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[1:2]
        size = sum(_array_bytes(*array) for array in arrays) * (group if kind == "reduce-scatter" else 1)
        key = (kind, group, " ".join(sorted({dtype for dtype, _ in arrays})))
        before, number = sums.get(key, (0, 0))
        sums[key] = before + size, number + 1
    return [Collective(kind, "?", group, *total, what) for (kind, group, what), total in sorted(sums.items())]


def _array_bytes(dtype: str, shape: str) -> int:
    # The digits after the first letters are bits, those of bf16 and f8e4m3 too.
    bits = 8 if dtype == "pred" else int(dtype.lstrip("bfsuc").split("e")[0])
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def _group_size(kind: str, rest: str, n_devices: int) -> int:
    """Devices of a group, from any of XLA's ways to write replica groups."""
    if kind == "collective-permute":
        return 2
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        # A part of an axis is written 'name':(size before)size.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    return n_devices


# -------------------------------------------------------------------------------------------- time

# Assumed, not measured: what one collective costs beside its bytes for each doubling of its group, and
# the bytes that XLA joins into one (its default threshold on GPUs).
LATENCY = 10e-6
COMBINED = 30e6


def seconds(collective: Collective, chip: Chip, data: int, fsdp: int) -> float:
    """Time of collectives on `chip`, on an idle network.

    Neighbours on the fsdp axis are neighbours in hardware. A group inside one domain uses its links
    alone. A larger one works in two stages: all members in a domain share the work of leaving it, each
    by its own network port.
    """
    stride = fsdp if collective.axis == "data" else 1
    inside = max(1, min(collective.group, chip.domain // stride))
    outside = collective.group / inside
    half = collective.bytes * (inside - 1) / inside / chip.link
    half += collective.bytes / inside * (outside - 1) / outside / chip.network
    passes = 2 if collective.kind == "all-reduce" else 1
    calls = max(1, min(collective.number, math.ceil(collective.bytes / COMBINED)))
    return passes * (half + calls * LATENCY * math.log2(max(collective.group, 2)))
