"""Metrics to JSONL and TensorBoard, progress to the terminal; only process 0 writes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter


class MetricWriter:
    """Appends scalars and pictures of one run to `workdir/metrics.jsonl` and TensorBoard files."""

    def __init__(self, workdir: Path, active: bool):
        self._active = active
        if active:
            workdir.mkdir(parents=True, exist_ok=True)
            self._jsonl = open(workdir / "metrics.jsonl", "a", buffering=1)
            self._board = SummaryWriter(str(workdir / "tensorboard"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if not self._active:
            return
        self._jsonl.write(json.dumps({"step": step, **{k: float(v) for k, v in values.items()}}) + "\n")
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """`picture` is (H, W, 3) uint8."""
        if self._active:
            self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        if self._active:
            self._jsonl.close()
            self._board.close()


class Progress:
    """Rate, share of time spent waiting for data and time left, since the last report."""

    def __init__(self, first_step: int, last_step: int):
        self._last_step = last_step
        self._step = first_step
        self._time = time.monotonic()
        self._waited = 0.0

    def waiting(self, seconds: float) -> None:
        self._waited += seconds

    def report(self, step: int) -> dict[str, float]:
        """steps_per_s, data_wait (share of the interval) and eta_s at `step`; starts a new interval."""
        now = time.monotonic()
        elapsed = max(now - self._time, 1e-9)
        rate = (step - self._step) / elapsed
        figures = {
            "steps_per_s": rate,
            "data_wait": self._waited / elapsed,
            "eta_s": (self._last_step - step) / rate if rate > 0 else float("inf"),
        }
        self._step, self._time, self._waited = step, now, 0.0
        return figures


def say(message: str, active: bool = True) -> None:
    """One line on standard error, so that standard output stays free for results."""
    if active:
        print(message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    if not np.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`; a line cut off by a crash is left out, repeated steps keep the last."""
    rows: dict[tuple, dict[str, float]] = {}
    for line in Path(path).read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[(row["step"], "val_loss" in row)] = row
    return sorted(rows.values(), key=lambda row: row["step"])
