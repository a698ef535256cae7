"""Predicted step time: the slowest of arithmetic, HBM and network, by peak figures and stated assumptions."""

from __future__ import annotations

from typing import NamedTuple

from loki_jax.planning.collectives import Collective, seconds
from loki_jax.training.flops import Chip, Work

# Assumed, not measured: the share of the peak that matrix work reaches, and how often activations cross
# HBM for each time a matrix operation reads or writes them (elementwise work beside it does so once more).
EFFICIENCY = 0.6
HBM_PASSES = 2
# XLA can be given this share of HBM (XLA_PYTHON_CLIENT_MEM_FRACTION; its default is 0.75 on GPUs).
USABLE_MEMORY = 0.92


class PartTime(NamedTuple):
    """Seconds of one part on one device: by arithmetic at `EFFICIENCY` of the peak, and by HBM."""

    compute: float
    memory: float

    @property
    def bound(self) -> str:
        return "compute" if self.compute >= self.memory else "memory"

    @property
    def seconds(self) -> float:
        return max(self)


class StepTime(NamedTuple):
    """Prediction for one step.

    Attributes:
      parts: see `PartTime`.
      collectives: seconds of each collective, in the order given.
      device: seconds of all parts.
      network: seconds of all collectives.
      overlapped: gradients travel while the backward pass runs, parameters while the forward and
        backward pass run; only what does not fit under them is added.
      serial: nothing overlaps.
      floor: all matrix work at the peak rate and nothing else.
    """

    parts: dict[str, PartTime]
    collectives: tuple[float, ...]
    device: float
    network: float
    overlapped: float
    serial: float
    floor: float


def step_time(
    work: dict[str, Work], optimizer_bytes: float, collectives: list[Collective], chip: Chip, data: int,
    fsdp: int, efficiency: float = EFFICIENCY,
) -> StepTime:  # fmt: skip
    """Predict a step from the work of one device.

    Args:
      optimizer_bytes: that the update reads and writes on one device (`optimizer_traffic`).
    """
    parts = {}
    for name, part in work.items():
        moved = optimizer_bytes if name == "optimiser" else HBM_PASSES * part.bytes
        parts[name] = PartTime(part.matrix / (efficiency * chip.flops), moved / chip.bandwidth)
    times = tuple(seconds(c, chip, data, fsdp) for c in collectives)
    device, network = sum(p.seconds for p in parts.values()), sum(times)
    hidden = parts["backward"].seconds + parts["recomputation"].seconds
    gathers = sum(t for c, t in zip(collectives, times, strict=True) if c.kind == "all-gather")
    # Gathers can hide under the forward pass as well; the last bucket of gradients can hide under nothing.
    cover = parts["generation forward"].seconds + parts["reference branch"].seconds
    exposed = max(0.0, network - min(gathers, cover) - hidden)
    floor = sum(part.matrix for part in work.values()) / chip.flops
    return StepTime(parts, times, device, network, device + exposed, device + network, floor)


def optimizer_traffic(parameters: int, moments: int, average: int, gradients: int) -> float:
    """Bytes AdamW and the moving average move: all read once, all but the gradients written once.

    Clipping by the global norm reads the gradients once more. Arguments are bytes on one device.
    """
    return 2.0 * (parameters + moments + average + gradients)
