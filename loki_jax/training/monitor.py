"""Follows loss and gradient norm of every step: skipped updates, spikes, means of an interval."""

from __future__ import annotations

import collections
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from loki_jax.data.schema import Batch, ClipInfo
from loki_jax.training.config import NonFiniteError


class Anomaly(NamedTuple):
    """Something a person should know about a step.

    Attributes:
      kind: "skipped" (loss or gradient not finite) or "spike" (gradient norm far above the median).
      figures: loss and grad_norm, and for a spike the median.
      batch: the step's batch (global arrays).
    """

    kind: str
    step: int
    figures: dict[str, float]
    batch: Batch

    def __str__(self) -> str:
        figures = ", ".join(f"{key} {value:.4g}" for key, value in self.figures.items())
        texts = {"skipped": "update skipped, not finite", "spike": "gradient norm far above its median"}
        return f"step {self.step}: {texts[self.kind]}: {figures}"


class StepMonitor:
    """Reads each step's figures one step late, so that the devices never wait for the host.

    After a skipped step each one is read as soon as it is done. So when `stuck` becomes true, the state is
    still the one before the first of the skipped steps.

    Args:
      faults: `config.faults`.
      skipped: updates skipped before this process started.
      in_row: how many of them were the last ones.
    """

    def __init__(self, faults: ConfigDict, skipped: int = 0, in_row: int = 0):
        self.skipped, self.in_row = skipped, in_row
        self._faults = faults
        self._pending: collections.deque = collections.deque()
        self._norms: collections.deque = collections.deque(maxlen=faults.spike_window)
        self._interval: list[dict[str, float]] = []
        self._interval_skips = 0

    @property
    def stuck(self) -> bool:
        """So many updates in a row were skipped that the run must stop."""
        return self.in_row >= self._faults.max_skips

    def follow(self, step: int, batch: Batch, metrics: dict[str, jax.Array]) -> list[Anomaly]:
        """Take a step that was just started; returns the anomalies of those that are read now."""
        self._pending.append((step, batch, metrics))
        return self._read(0 if self.in_row or self._faults.max_skips == 1 else 1)

    def finish(self) -> list[Anomaly]:
        """Read everything that was started; waits for the devices."""
        return self._read(0)

    def check_end(self) -> None:
        """Raise NonFiniteError where the last updates of the run were skipped."""
        if self.in_row:
            raise NonFiniteError(
                f"the last {self.in_row} updates were skipped: their loss or gradients were not finite. "
                "events.jsonl in the workdir names their windows."
            )

    def means(self) -> dict[str, float]:
        """Means over the finite steps read since the last call, and `skipped`, how many were not."""
        keys = self._interval[0] if self._interval else ()
        means = {key: float(np.mean([row[key] for row in self._interval])) for key in keys}
        means["skipped"] = float(self._interval_skips)
        self._interval, self._interval_skips = [], 0
        return means

    def _read(self, leave: int) -> list[Anomaly]:
        anomalies = []
        while len(self._pending) > (0 if self.in_row else leave):
            step, batch, metrics = self._pending.popleft()
            figures = {key: float(value) for key, value in jax.device_get(metrics).items()}
            if figures.pop("skipped"):
                self.skipped, self.in_row = self.skipped + 1, self.in_row + 1
                self._interval_skips += 1
                anomalies.append(Anomaly("skipped", step, figures, batch))
                continue
            self.in_row = 0
            self._interval.append(figures)
            norm, median = figures["grad_norm"], float(np.median(self._norms)) if self._norms else math.inf
            # A median of few steps says little.
            enough = len(self._norms) >= min(20, self._faults.spike_window)
            self._norms.append(norm)
            if enough and norm > self._faults.spike_factor * median:
                anomalies.append(Anomaly("spike", step, figures | {"median": median}, batch))
        return anomalies


def window_names(batch: Batch, clips: tuple[ClipInfo, ...]) -> list[dict[str, Any]]:
    """Clip, first frame and reference frame of each window of a global batch; all processes must call."""
    gather = lambda name: np.asarray(multihost_utils.process_allgather(getattr(batch, name), tiled=True))
    rows = zip(gather("clip_index"), gather("frame_index")[:, 0], gather("reference_index"), strict=True)
    return [
        {"clip": clips[int(clip)].clip_id, "frame": int(frame), "reference": int(reference)}
        for clip, frame, reference in rows
    ]
