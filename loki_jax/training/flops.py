"""What a step costs: operations counted in the traced program, peak figures of chips, MFU.

Operations are counted in the jaxpr, before any compiler sees it, so the count is the same on every
platform. XLA's own analysis of a compiled program (`step_flops`) leaves out custom calls (cuDNN attention;
on GPUs also cuBLAS products and cuDNN convolutions) and counts the body of a loop once, whatever its trip
count (the chunked attention).

A multiply-add is two operations. A convolution counts only taps that fall inside its input.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr  # jax.extend.core has no dead-code elimination


class Chip(NamedTuple):
    """Peak figures of one accelerator. Bytes are decimal; rates are per second.

    Attributes:
      name: what programs call it (`--chip`).
      kinds: what JAX calls it (`device.device_kind`).
      flops: dense bfloat16 matrix operations, no sparsity.
      memory: bytes of HBM.
      bandwidth: bytes to and from HBM.
      link: bytes a chip can send to others of its domain, one way, all its links together.
      domain: chips joined by such links.
      network: bytes a chip can send out of its domain, one way.
      source: where the figures come from.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: float
    bandwidth: float
    link: float
    domain: int
    network: float
    source: str


_TPU = "Google Cloud TPU documentation, system architecture page; links: all-reduce bandwidth per chip"

CHIPS = (
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989.4e12, 80e9, 3.35e12, 450e9, 8, 50e9,
         "NVIDIA H100 SXM data sheet (half of the sparse figure); NVLink 4, 400 Gb/s a GPU as in DGX H100"),
    Chip("h200", ("NVIDIA H200",), 989.4e12, 141e9, 4.8e12, 450e9, 8, 50e9,
         "NVIDIA H200 SXM data sheet (half of the sparse figure); NVLink 4, 400 Gb/s a GPU as in DGX H200"),
    Chip("a100-80", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), 312e12, 80e9, 2.039e12, 300e9, 8,
         25e9,
         "NVIDIA A100 80GB SXM data sheet; NVLink 3, 200 Gb/s a GPU as in DGX A100"),
    Chip("v4", ("TPU v4",), 275e12, 32e9, 1.2e12, 270e9, 4096, 6.25e9, _TPU),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16e9, 819e9, 200e9, 256, 3.125e9, _TPU),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95e9, 2.765e12, 600e9, 8960, 6.25e9, _TPU),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32e9, 1.638e12, 400e9, 256, 12.5e9, _TPU),
)  # fmt: skip


def chip_named(name: str) -> Chip:
    """The chip called `name`; ValueError lists the known ones."""
    for chip in CHIPS:
        if chip.name == name:
            return chip
    raise ValueError(f"unknown chip {name!r}; known are {', '.join(chip.name for chip in CHIPS)}")


def chip_of(kind: str) -> Chip | None:
    """The chip of a device of this `device_kind`; None where no peak is known (a CPU, a PCIe H100)."""
    return next((chip for chip in CHIPS if kind in chip.kinds), None)


class Operation(NamedTuple):
    """One equation of a traced program that costs something, times how often it runs.

    Attributes:
      kind: "matmul", "convolution", "attention" (a product with batch axes, or a fused kernel),
        "elementwise" or "reduction".
      flops: operations over all devices.
      bytes: operands and results, over all devices, where the work is not fused away: 0 for
        elementwise; attention's logits, and reductions over them, are left out.
      scope: name stack, from the outermost call inwards: Flax module paths, and "transpose(" and
        "rematted_computation" where the backward pass and recomputation are.
    """

    kind: str
    flops: float
    bytes: float
    scope: str


class Work(NamedTuple):
    """Operations of some equations of a traced program.

    Attributes:
      matrix: products, convolutions and attention, recomputation included.
      attention: the part of `matrix` that is attention.
      recomputed: the part of `matrix` that the backward pass does a second time to save memory.
      vector: elementwise work and reductions (one operation an element); loops whose length depends
        on the data count once.
      bytes: `Operation.bytes` of all.
    """

    matrix: float = 0.0
    attention: float = 0.0
    recomputed: float = 0.0
    vector: float = 0.0
    bytes: float = 0.0

    @property
    def model(self) -> float:
        """Matrix operations that the mathematics asks for: what MFU counts."""
        return self.matrix - self.recomputed


def total_work(operations: Iterable[Operation]) -> Work:
    """The sums of operations."""
    operations = list(operations)
    matrix = [op for op in operations if op.kind in ("matmul", "convolution", "attention")]
    return Work(
        matrix=sum(op.flops for op in matrix),
        attention=sum(op.flops for op in matrix if op.kind == "attention"),
        recomputed=sum(op.flops for op in matrix if "rematted_computation" in op.scope),
        vector=sum(op.flops for op in operations if op.kind in ("elementwise", "reduction")),
        bytes=sum(op.bytes for op in operations),
    )


def work_of(jaxpr: ClosedJaxpr) -> Work:
    """Work of a traced program over all devices, e.g. of `jax.jit(step).trace(state, batch, head).jaxpr`."""
    return total_work(operations(jaxpr))


def operations(jaxpr: ClosedJaxpr | Jaxpr) -> Iterator[Operation]:
    """Every equation that costs something and whose result is used, calls and loops unrolled into bodies.

    A scan's body counts as often as it runs, a `while` body once, the dearest branch of a `cond`, the
    body of a `shard_map` once for each device, a Pallas kernel once for each point of its grid.
    """
    # Compilers drop what nobody reads: the reference branch after its last feature, for one.
    live = live_jaxpr(jaxpr)
    logits = {product.logits for product in attention_products(live)}
    yield from _operations(live, 1.0, "", logits)


def live_jaxpr(jaxpr: ClosedJaxpr | Jaxpr) -> Jaxpr:
    """The program without what no output needs."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _arrays(variables: Iterable[Any]) -> list[Any]:
    """Shapes and dtypes of the variables that are arrays."""
    return [var.aval for var in variables if hasattr(var.aval, "shape")]


def bodies(equation: Any) -> list[Jaxpr]:
    """The programs within an equation: of a call, a loop, the branches of a `cond`."""
    found = jaxprs_in_params(equation.params)
    return [body.jaxpr if isinstance(body, ClosedJaxpr) else body for body in found]


class AttentionProduct(NamedTuple):
    """A batched product whose result is larger than both operands: q and k to logits.

    Attributes:
      scope: name stack.
      batch: samples times heads (times frames, where attention is within frames).
      queries, keys, width: tokens on both sides and channels of a head.
      logits: shape of the result.
    """

    scope: str
    batch: int
    queries: int
    keys: int
    width: int
    logits: tuple[int, ...]


def attention_products(jaxpr: Jaxpr, scope: str = "") -> Iterator[AttentionProduct]:
    """The products of q and k of a program that writes its attention out, those of its gradients included."""
    for equation in jaxpr.eqns:
        here = f"{scope}/{equation.source_info.name_stack}"
        if equation.primitive.name == "dot_general" and equation.params["dimension_numbers"][1][0]:
            (contract, _), (axes, _) = equation.params["dimension_numbers"]
            left, right, out = _arrays([*equation.invars[:2], *equation.outvars])
            if out.size > max(left.size, right.size):
                batch, width = (math.prod(left.shape[axis] for axis in group) for group in (axes, contract))
                yield AttentionProduct(
                    here, batch, left.size // (batch * width), right.size // (batch * width), width, out.shape
                )
        for body in bodies(equation):
            yield from attention_products(body, here)


def _operations(jaxpr: Jaxpr, times: float, scope: str, logits: set) -> Iterator[Operation]:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        here = f"{scope}/{equation.source_info.name_stack}"
        single = _single(equation)
        if single is not None:
            kind, flops, size = single
            if kind == "reduction" and _arrays(equation.invars)[0].shape in logits:
                size = 0.0
            yield Operation(kind, times * flops, times * size, here)
            continue
        repeats = times * _REPEATS.get(name, lambda _: 1)(equation.params)
        inner = [_operations(body, repeats, f"{here}/{name}", logits) for body in bodies(equation)]
        if name == "cond":
            yield from max(map(list, inner), key=lambda ops: sum(op.flops for op in ops), default=[])
        else:
            yield from itertools.chain.from_iterable(inner)


_REPEATS: dict[str, Callable[[dict], float]] = {
    "scan": lambda params: params["length"],
    "shard_map": lambda params: params["mesh"].size,
    "pallas_call": lambda params: math.prod(int(n) for n in params["grid_mapping"].grid),
}


def _single(equation: Any) -> tuple[str, float, float] | None:
    """(kind, operations, bytes) of an equation without a body of its own, None for any other."""
    name = equation.primitive.name
    ins, outs = _arrays(equation.invars), _arrays(equation.outvars)
    if name == "dot_general":
        (contract, _), (batch, _) = equation.params["dimension_numbers"]
        flops = 2.0 * outs[0].size * math.prod(ins[0].shape[axis] for axis in contract)
        sizes = [_bytes(aval) for aval in (*ins, *outs)]
        # Dense layers have no batch axes; in attention the largest of the three arrays are the logits.
        return ("attention", flops, sum(sizes) - max(sizes)) if batch else ("matmul", flops, sum(sizes))
    if name == "conv_general_dilated":
        return "convolution", _convolution_flops(equation, ins, outs), sum(map(_bytes, (*ins, *outs)))
    if name.startswith("dot_product_attention") and "wrapper" in name:
        queries = ins[0].shape[2 if equation.params["layout"] else 1]
        # Forward: q k^T and its product with v. Backward: q k^T again, and two products for each of them.
        products = 2 if "fwd" in name else 5
        return "attention", products * 2.0 * queries * ins[1].size, sum(map(_bytes, (*ins, *outs)))
    if name in _ELEMENTWISE:
        return "elementwise", float(outs[0].size), 0.0
    if name.startswith("reduce_") and name != "reduce_precision":
        return "reduction", float(sum(aval.size for aval in ins)), sum(map(_bytes, (*ins, *outs)))
    return None


# Arithmetic; moves, casts and comparisons are not counted.
_ELEMENTWISE = frozenset(
    "add add_any sub mul div rem max min neg abs sign floor ceil round exp exp2 expm1 log log1p logistic "
    "tanh sin cos tan atan2 sqrt rsqrt cbrt pow integer_pow square erf erf_inv erfc and or xor not "
    "shift_left shift_right_logical shift_right_arithmetic population_count clamp nextafter".split()
)


def _convolution_flops(equation: Any, ins: list, outs: list) -> float:
    params, (lhs, rhs), out = equation.params, ins[:2], outs[0]
    numbers = params["dimension_numbers"]
    taps = 1.0
    for axis in range(len(numbers.lhs_spec) - 2):
        size, kernel = lhs.shape[numbers.lhs_spec[2 + axis]], rhs.shape[numbers.rhs_spec[2 + axis]]
        starts = np.arange(out.shape[numbers.out_spec[2 + axis]])[:, None] * params["window_strides"][axis]
        position = starts + np.arange(kernel) * params["rhs_dilation"][axis] - params["padding"][axis][0]
        spread = params["lhs_dilation"][axis]
        taps *= np.sum((position >= 0) & (position < (size - 1) * spread + 1) & (position % spread == 0))
    batch, features = (out.shape[numbers.out_spec[i]] for i in (0, 1))
    return float(2.0 * taps * batch * features * rhs.shape[numbers.rhs_spec[1]])


def _bytes(aval: Any) -> float:
    return float(aval.size * np.dtype(aval.dtype).itemsize) if hasattr(aval.dtype, "itemsize") else 0.0


def step_flops(compiled: jax.stages.Compiled) -> float:
    """Operations of a compiled step over *all* its devices, by XLA's analysis (elementwise work included).

    XLA analyses the program of one device; the figure is multiplied by the number of devices. The module's
    docstring says what it may miss: on GPUs prefer `work_of`.

    Raises:
      ValueError: the backend gives no analysis.
    """
    analysis = compiled.cost_analysis() or {}
    if "flops" not in analysis:
        raise ValueError("this backend gives no cost analysis of a program; count with work_of instead")
    return float(analysis["flops"]) * device_count(compiled)


def device_count(compiled: jax.stages.Compiled) -> int:
    """Devices that a compiled program runs on."""
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    return max((len(s.device_set) for s in shardings), default=1)
