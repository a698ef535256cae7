"""Reads batches ahead, in threads or worker processes, and resumes exactly (method, section 8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from absl import logging

from loki_jax.data.reader import RecordError
from loki_jax.data.schema import Batch, DatasetError
from loki_jax.data.windows import Batches


class BatchIterator(grain.DatasetIterator[Any]):
    """What `iterate` returns. Batches, and the state after n of them, do not depend on its options.

    The state is {"batches": taken so far, "unreadable": record numbers met so far}: of batches *taken*,
    whatever was read or sent ahead. "batches" is the same number on all processes, and a state may be
    set for another number of workers or processes.
    """

    def __init__(
        self,
        batches: Batches,
        workers: int,
        threads: int,
        prefetch: int,
        to_device: Callable[[Batch], Any] | None,
        device_batches: int,
        report: Callable[[str], None],
    ):
        super().__init__()
        self._batches, self._workers, self._threads, self._prefetch = batches, workers, threads, prefetch
        self._to_device, self._device_batches, self._report = to_device, device_batches, report
        self._running: grain.DatasetIterator | None = None  # started by the first batch
        self._taken = 0
        self._unreadable: list[int] = []

    def __next__(self) -> Any:
        if self._closed:
            raise ValueError("the iterator is closed")
        if self._running is None:
            self._running = self._start()
        try:
            batch, unreadable = next(self._running)
        except RuntimeError as error:
            if "Worker process" not in str(error):
                raise
            raise DatasetError(
                f"{self._batches.dataset.path}: a process that reads batches ended ({error}). Most often "
                "memory ran out: lower config.data.workers, config.data.threads or config.data.cache_mb."
            ) from error
        self._count(unreadable)
        self._taken += 1
        return batch

    def _start(self) -> grain.DatasetIterator:
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._prefetch)
        elements = self._batches.elements.slice(slice(self._taken, None)).to_iter_dataset(options)
        if self._workers:
            elements = elements.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        if self._to_device is not None:
            send = self._to_device
            elements = grain.experimental.ThreadPrefetchIterDataset(
                elements.map(lambda pair: (send(pair[0]), pair[1])), prefetch_buffer_size=self._device_batches
            )
        return iter(elements)

    def _count(self, unreadable: np.ndarray) -> None:
        dataset, split = self._batches.dataset, self._batches.split
        total = dataset.metadata.records[split]
        allowed = int(self._batches.max_corrupt_share * total)
        for record in dict.fromkeys(unreadable.ravel().tolist()):
            if record < 0 or record in self._unreadable:
                continue
            self._unreadable.append(record)
            found = len(self._unreadable)
            message = self._fault(record)
            if found > allowed:
                self.close()
                others = [dataset.record_name(split, other) for other in self._unreadable[:-1]]
                raise DatasetError(
                    f"{message}. That makes {found} of {total} records of split {split!r}; "
                    f"config.data.max_corrupt_share={self._batches.max_corrupt_share:g} allows {allowed}. "
                    "Copy the shards again from where they were made."
                    + "".join(f"\n  also: {name}" for name in others[-8:])
                )
            self._report(f"{message}. Its windows are replaced ({found} such records, {allowed} allowed).")

    def _fault(self, record: int) -> str:
        dataset, split = self._batches.dataset, self._batches.split
        reason = "it could be read at a third try"
        try:
            dataset.read(split, [record])
        except RecordError as error:
            reason = error.reason
        return f"{dataset.record_name(split, record)} cannot be read: {reason}"

    def get_state(self) -> dict[str, Any]:
        return {"batches": self._taken, "unreadable": list(self._unreadable)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop()
        self._taken, self._unreadable = int(state["batches"]), list(state["unreadable"])

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def close(self) -> None:
        """Ends threads and processes; nothing can be read afterwards."""
        self._stop()
        self._closed = True


def iterate(
    batches: Batches,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 4,
    *,
    to_device: Callable[[Batch], Any] | None = None,
    device_batches: int = 2,
    report: Callable[[str], None] = logging.warning,
) -> BatchIterator:
    """Start reading; the iterator's `get_state()` / `set_state()` resume it exactly.

    Save it with `grain.checkpoint.CheckpointSave(iterator)` in an Orbax Composite. The batches and the
    state after n of them do not depend on the other arguments.

        iterator = iterate(batches, workers, threads, to_device=lambda batch: global_batch(batch, mesh))

    Args:
      workers: processes that read and decode; 0: threads of this process only. Worker processes need
        parsed absl flags (`app.run`) and an `if __name__ == "__main__"` guard.
      threads: reading threads of each process.
      prefetch: batches read ahead in each process. Grain's own default of 500 would hold gigabytes.
      to_device: applied to each batch in a thread of its own, ahead of the loop, so that copies to the
        device overlap with the step before (`jax.device_put` returns at once, and so does
        `training.sharding.global_batch`). It must not wait for other processes.
      device_batches: batches on the device beside the one in use; 2 is double buffering.
      report: told of every unreadable record, with file, index and reason.

    The iterator raises DatasetError when more records are unreadable than `max_corrupt_share` of
    `make_dataset` allows, when a shard disappears, or when a reading process dies.
    """
    return BatchIterator(batches, workers, threads, prefetch, to_device, device_batches, report)
