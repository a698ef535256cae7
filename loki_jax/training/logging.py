"""Metrics to JSONL and TensorBoard, progress to the terminal; only process 0 writes."""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


class MetricWriter:
    """Appends to `workdir/metrics.jsonl` and `events.jsonl`, and writes TensorBoard files."""

    def __init__(self, workdir: Path, active: bool):
        self._active = active
        if active:
            from tensorboardX import SummaryWriter  # slow to import

            workdir.mkdir(parents=True, exist_ok=True)
            self._jsonl = open(workdir / "metrics.jsonl", "a", buffering=1)
            self._events = open(workdir / "events.jsonl", "a", buffering=1)
            self._board = SummaryWriter(str(workdir / "tensorboard"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if not self._active:
            return
        values = {key: float(value) for key, value in values.items() if np.isfinite(value)}
        self._jsonl.write(json.dumps({"step": step, **values}) + "\n")
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def event(self, step: int, kind: str, **details: Any) -> None:
        """Something that is no curve: a start, a skipped update, a spike, a stop."""
        if self._active:
            row = {"step": step, "time": time.time(), "event": kind, **details}
            self._events.write(json.dumps(row, default=str) + "\n")

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """`picture` is (H, W, 3) uint8."""
        if self._active:
            self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        if self._active:
            self._jsonl.close()
            self._events.close()
            self._board.close()


class Progress:
    """Rates since the last report: steps and windows a second, MFU, share of time waiting on data, time left.

    Args:
      flops: matrix operations of a step over all devices (`flops.work_of(...).model`).
      peak: operations a second of all devices together; None where it is not known: no MFU then.
    """

    def __init__(
        self, first_step: int, last_step: int, batch_size: int, flops: float = 0.0, peak: float | None = None
    ):
        self._last_step, self._batch_size, self._flops, self._peak = last_step, batch_size, flops, peak
        self._step, self._time, self._waited = first_step, time.monotonic(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def report(self, step: int) -> dict[str, float]:
        """steps_per_s, clips_per_s, mfu, data_wait (share of the interval), eta_s; starts a new interval."""
        now = time.monotonic()
        elapsed = max(now - self._time, 1e-9)
        rate = (step - self._step) / elapsed
        figures = {"steps_per_s": rate, "clips_per_s": rate * self._batch_size}
        if self._peak:
            figures["mfu"] = self._flops * rate / self._peak
        figures["data_wait"] = self._waited / elapsed
        figures["eta_s"] = (self._last_step - step) / rate if rate > 0 else float("inf")
        self._step, self._time, self._waited = step, now, 0.0
        return figures


def peak_memory() -> dict[str, float]:
    """peak_memory_gb of the first device since the process began; empty where the backend does not tell."""
    import jax

    held = jax.local_devices()[0].memory_stats()
    return {"peak_memory_gb": held["peak_bytes_in_use"] / 1e9} if held else {}


def progress_line(step: int, last_step: int, values: dict[str, float]) -> str:
    """One line for a person: step, loss, rate, MFU where it is known, data wait, time left."""
    parts = [f"step {step}/{last_step}"]
    parts.append(f"loss {values['loss']:.4f}" if "loss" in values else "no finite loss")
    parts.append(f"{values['clips_per_s']:.2f} clips/s")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    if "peak_memory_gb" in values:
        parts.append(f"peak {values['peak_memory_gb']:.1f} GB")
    parts += [f"data wait {values['data_wait']:.1%}", f"left {duration(values['eta_s'])}"]
    if values.get("skipped"):
        parts.append(f"{values['skipped']:.0f} updates skipped")
    return "  ".join(parts)


def log(message: str, active: bool = True) -> None:
    """One line on standard error, so that standard output stays free for results."""
    if active:
        print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def log_duration(what: str, active: bool = True, every: float = 15.0) -> Iterator[None]:
    """Log that `what` begins, every so many seconds that it goes on, and how long it took."""
    done, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(every):
            log(f"{what}: {duration(time.monotonic() - began)}", active)

    log(f"{what} ...", active)
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        log(f"{what} took {time.monotonic() - began:.1f} s", active)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=int(seconds))) if np.isfinite(seconds) else "?"


def read_metrics(path: Path) -> list[dict[str, int | float]]:
    """The rows of a `metrics.jsonl`; a line cut off by a crash is left out, repeated steps keep the last."""
    # Losses, validation losses and figures of samples may share a step.
    kind = lambda row: next((key for key in ("val_loss", "sample_hpf") if key in row), "loss")
    rows: dict[tuple, dict[str, int | float]] = {}
    for line in Path(path).read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[(row["step"], kind(row))] = row
    return sorted(rows.values(), key=lambda row: row["step"])
