"""Bytes on one device: what stays (exact, from the sharding rules) and what a step adds (estimated).

The estimate of activations is read off the traced step: what the forward pass computes and the
backward pass reads is kept; inside a block that is recomputed, the same holds for the block alone.
It is too much in one way (compilers recompute cheap elementwise work instead of keeping it) and too
little in another (schedules that hold several large arrays at once, workspaces of convolutions). XLA for
CPU, where it schedules to save memory, allots 1.01 to 1.10 times as much (`benchmarks/plan_memory.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import AbstractMesh, AxisType

from loki_jax.models.attention import attend
from loki_jax.planning.work import PARTS, part_of
from loki_jax.training.flops import AttentionProduct, attention_products, bodies, live_jaxpr, operations
from loki_jax.training.sharding import path_name
from loki_jax.training.state import TrainState

ATTENTION_BACKENDS = ("xla", "chunked", "cudnn", "splash")
# Backward pass, for each logit: the float32 weights and their gradient, and a 16-bit copy of both.
_BYTES_A_LOGIT = 12


class Placement(NamedTuple):
    """Where the arrays of one group of the train state are.

    Attributes:
      total: bytes of one whole copy.
      per_device: bytes on each device.
      sharded, small, whole: arrays that are split; that are too small to be; that no rule or no
        dimension lets split, as (path, shape).
    """

    total: int
    per_device: int
    sharded: int
    small: int
    whole: tuple[tuple[str, tuple[int, ...]], ...]


def placements(
    state: TrainState, shardings: TrainState, min_size: int, grad_accum_steps: int = 1
) -> dict[str, Placement]:
    """Placement of parameters, moving average, optimiser moments, gradients and frozen parameters."""
    groups = {
        "parameters": (state.params, shardings.params),
        "moving average": (state.ema, shardings.ema),
        "optimiser moments": (state.opt_state, shardings.opt_state),
        # The step gives gradients the layout of their parameters.
        "gradients": (state.params, shardings.params),
        **({"accumulated gradients": (state.params, shardings.params)} if grad_accum_steps > 1 else {}),
        "frozen": (state.frozen, shardings.frozen),
    }
    return {name: _placement(*group, min_size) for name, group in groups.items()}


def _placement(tree: Any, shardings: Any, min_size: int) -> Placement:
    total = per_device = sharded = small = 0
    whole = []
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        size = leaf.size * leaf.dtype.itemsize
        part = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total, per_device = total + size, per_device + part
        if part < size:
            sharded += 1
        elif leaf.size < min_size:
            small += 1
        else:
            whole.append((path_name(path), tuple(leaf.shape)))
    return Placement(total, per_device, sharded, small, tuple(whole))


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(map(_bytes, jax.tree.leaves(tree)))


# ------------------------------------------------------------------------------------ activations


class Activations(NamedTuple):
    """Bytes on one device beside the train state.

    Attributes:
      kept: by part of the forward pass, what the backward pass reads.
      block: the largest recomputed block's own intermediate arrays, without attention's logits.
      attention: by backend, what the largest attention of the generation branch needs in the backward
        pass beside its inputs and results.
      operation: operands and results of the largest operation of the backward pass.
      encode: the largest operand, result and one more copy in the frozen VAE.
    """

    kept: dict[str, int]
    block: int
    attention: dict[str, int]
    operation: int
    encode: int


def activations(jaxpr: ClosedJaxpr, microbatches: int = 1) -> Activations:
    """Activations of the step of one device (`work.trace_step`) in so many microbatches."""
    live = live_jaxpr(jaxpr)
    products = list(attention_products(live))
    # Logits differ from backend to backend: they are counted apart.
    logits = {product.logits for product in products}
    kept = _kept(live, logits)
    blocks = [_block(body, logits) for body in _recomputed_bodies(live)]
    largest = dict.fromkeys(PARTS, 0.0)
    for op in operations(jaxpr):
        part = part_of(op.scope)
        largest[part] = max(largest[part], op.bytes / microbatches)
    return Activations(
        kept=kept, block=max(blocks, default=0),
        attention=attention_bytes(_largest_attention(products)),
        operation=int(largest["backward"]), encode=int(1.5 * largest["VAE encode"]),
    )  # fmt: skip


def _kept(jaxpr: Jaxpr, logits: set) -> dict[str, int]:
    """Bytes of what forward equations produce and backward equations read, by part that produced them.

    Of a step with microbatches, the loop body is counted.
    """
    produced: dict[Any, str] = {}
    found: dict[str, int] = {}
    for equation in jaxpr.eqns:
        scope = _scope(equation)
        if "transpose(" not in scope:
            if "jvp(" in scope:
                produced.update(dict.fromkeys(equation.outvars, scope))
            continue
        for var in _variables(equation):
            origin = produced.pop(var, None)
            if origin is not None and var.aval.shape not in logits:
                part = part_of(origin)
                found[part] = found.get(part, 0) + _bytes(var.aval)
    inner = (_kept(body, logits) for equation in jaxpr.eqns for body in bodies(equation))
    return found or next(filter(None, inner), {})


def _scope(equation: Any) -> str:
    # The name of a call tells driver maps (a shard_map) from the rest.
    return f"{equation.source_info.name_stack}/{equation.primitive.name}"


def _recomputed_bodies(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    """Bodies of the checkpointed calls of the backward pass."""
    for equation in jaxpr.eqns:
        recomputed = equation.primitive.name in ("remat2", "checkpoint") and "transpose(" in _scope(equation)
        for body in bodies(equation):
            yield from [body] if recomputed else _recomputed_bodies(body)


def _block(body: Jaxpr, logits: set) -> int:
    """Bytes of what a block's recomputation produces and its backward pass reads."""
    produced, total = set(), 0
    for equation in body.eqns:
        if "rematted_computation" in _scope(equation):
            produced.update(equation.outvars)
            continue
        for var in _variables(equation):
            if var in produced and var.aval.shape not in logits:
                produced.discard(var)
                total += _bytes(var.aval)
    return total


def _variables(equation: Any) -> list:
    """What an equation reads, without constants."""
    return [var for var in equation.invars if not isinstance(var, Literal)]


def _largest_attention(products: list[AttentionProduct]) -> AttentionProduct | None:
    """The attention with the largest logits in the generation branch's forward pass."""
    mine = [p for p in products if "denoise" in p.scope and "transpose(" not in p.scope]
    return max(mine, key=lambda p: math.prod(p.logits), default=None)


def attention_bytes(largest: AttentionProduct | None) -> dict[str, int]:
    """Bytes that each backend needs for one attention, forward and backward, beside inputs and results.

    xla: all logits. chunked: one block of them. cudnn, splash: a float32 accumulator for the gradient
    of q, a log-sum-exp for each query and head, and (splash) copies padded to multiples of 128 tokens.
    """
    if largest is None:
        return dict.fromkeys(ATTENTION_BACKENDS, 0)
    batch, n, m, width = largest.batch, largest.queries, largest.keys, largest.width
    flash = 4 * batch * n * (width + 1)
    padded = lambda tokens: -(-tokens // 128) * 128
    return {
        "xla": _BYTES_A_LOGIT * math.prod(largest.logits),
        "chunked": _BYTES_A_LOGIT * _chunk_logits(batch, n, m, width),
        "cudnn": flash,
        "splash": flash + 2 * batch * width * (padded(n) + 2 * padded(m)),
    }


def _chunk_logits(batch: int, n: int, m: int, width: int) -> int:
    """Logits that the chunked backend holds at a time: the largest product of the traced function."""
    shape = lambda tokens: jax.ShapeDtypeStruct((batch, tokens, 1, width), jnp.bfloat16)
    traced = jax.make_jaxpr(lambda q, k, v: attend(q, k, v, "chunked"))(shape(n), shape(m), shape(m))
    return max((math.prod(p.logits) for p in attention_products(traced.jaxpr)), default=0)


def _bytes(aval: Any) -> int:
    extended = jnp.issubdtype(aval.dtype, jax.dtypes.extended)  # keys
    return 0 if extended else math.prod(aval.shape) * aval.dtype.itemsize


def live_bytes(jaxpr: Jaxpr, logits: set) -> int:
    """The most bytes of intermediate arrays alive at a time, without attention's logits.

    For programs without a backward pass (validation, sampling); calls and loop bodies count where they run.
    """
    last = {var: i for i, equation in enumerate(jaxpr.eqns) for var in _variables(equation)}
    last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, Literal)}
    size = lambda v: 0 if v.aval.shape in logits else _bytes(v.aval)
    alive: dict[Any, int] = {}
    peak = 0
    for i, equation in enumerate(jaxpr.eqns):
        inner = max((live_bytes(body, logits) for body in bodies(equation)), default=0)
        made = {v: size(v) for v in equation.outvars}
        peak = max(peak, sum(alive.values()) + max(inner, sum(made.values())))
        alive = {v: n for v, n in (alive | made).items() if last.get(v, -1) > i}
    return peak


def forward_bytes(jaxpr: ClosedJaxpr, backend: str) -> int:
    """Bytes that a traced program without a backward pass needs on a device beside its arguments."""
    live = live_jaxpr(jaxpr)
    products = list(attention_products(live))
    largest = max(products, key=lambda p: math.prod(p.logits), default=None)
    # Forward alone needs no gradients of logits: a third of both passes.
    attention = attention_bytes(largest)[backend] // 3
    return live_bytes(live, {product.logits for product in products}) + attention


# ------------------------------------------------------------------------------------------- peak


def peak_bytes(
    resident: int, gradients: int, step: Activations, backend: str, gathered: int = 0
) -> dict[str, int]:
    """Bytes at the two moments that need most: the frozen VAE, and the backward pass.

    The backward pass is counted as if all gradients were held beside all kept activations; they meet
    nearly so where the part that is differentiated last keeps most.

    Args:
      gathered: whole copies of sharded parameters in use, as if all were there at once.
    """
    working = sum(step.kept.values()) + step.block + step.attention[backend] + step.operation
    return {
        "VAE encode": resident + gathered + step.encode,
        "backward": resident + gathered + gradients + working,
    }


def abstract_mesh(data: int, fsdp: int) -> AbstractMesh:
    """The training mesh without devices: enough for shardings and shard shapes."""
    return AbstractMesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
