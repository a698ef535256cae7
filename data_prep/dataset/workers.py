"""Items worked on by several processes, one at a time each; the death of a process costs one item.

Processes are spawned, not forked: JAX and the landmark networks run threads that a fork would lose.
Each has one thread for numbers, whatever their count, so that results do not depend on how many there
are. They ignore Ctrl-C, which is their parent's to handle, and end with it even if it is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}

# A fit is small: several processes would only wait for each other on one accelerator.
_ON_CPU = {"JAX_PLATFORMS": "cpu"}

_SIGKILL = 9


class WorkerError(RuntimeError):
    """The processes cannot be started."""


class Died(NamedTuple):
    """Result of an item whose process died: its exit code, negative for a signal."""

    exit_code: int

    def __str__(self) -> str:
        if self.exit_code == -_SIGKILL:
            return "the process that worked on it was killed, perhaps for lack of memory (fewer `--workers`)"
        how = f"signal {-self.exit_code}" if self.exit_code < 0 else f"exit code {self.exit_code}"
        return f"the process that worked on it died ({how})"


def print_line(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def remove_partials(folder: Path) -> None:
    """Remove what writers that were killed left in `folder`."""
    for file in folder.glob(".*.partial*"):
        file.unlink(missing_ok=True)


class Progress:
    """How many of `total` items are done, and how long the rest will take; as text `[done/total]`."""

    def __init__(self, total: int):
        self.total, self.done, self._started = total, 0, time.monotonic()

    def advance(self, items: int = 1) -> None:
        self.done += items

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)

    @property
    def seconds_left(self) -> float:
        return self.seconds / self.done * (self.total - self.done)

    def __str__(self) -> str:
        return f"[{self.done}/{self.total}]"


def run_parallel(
    make_work: Callable[[], Callable[[Any], Any]], items: Sequence[Any], workers: int
) -> Iterator[tuple[int, Any]]:
    """Yield (index, result) for each item as it is done, in any order; `Died` where its process died.

    Args:
      make_work: called once in each process, returns the function that takes an item. Can be pickled,
        as can items and results.
      workers: number of processes; 0: in this process, in order.

    Raises:
      WorkerError: a process died before it was ready for work; its own message is on stderr.
    """
    if workers == 0:
        work = make_work()
        yield from ((index, work(item)) for index, item in enumerate(items))
        return
    pending = iter(range(len(items)))
    running: dict[Connection, multiprocessing.process.BaseProcess] = {}
    working_on: dict[Connection, int] = {}
    try:
        for _ in range(min(workers, len(items))):
            running.update([_start(make_work)])
        while running:
            ready = wait(running)
            for connection in [c for c in running if c in ready]:
                index = working_on.pop(connection, None)  # None: it has just become ready, or failed to
                try:
                    result = connection.recv()
                except (EOFError, OSError):
                    process = running.pop(connection)
                    process.join()
                    connection.close()
                    if index is None:
                        raise WorkerError(
                            f"a worker process ended at its start with exit code {process.exitcode}; "
                            "its message stands above"
                        ) from None
                    result = Died(process.exitcode or 0)
                    running.update([_start(make_work)])
                else:
                    following = next(pending, None)
                    if following is None:
                        del running[connection]
                        connection.close()  # it ends by itself
                    else:
                        working_on[connection] = following
                        with contextlib.suppress(BrokenPipeError):  # if it died meanwhile, recv finds out
                            connection.send(items[following])
                if index is not None:
                    yield index, result
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _start(make_work: Callable[[], Callable[[Any], Any]]) -> tuple[Connection, Any]:
    """A new process, by the connection to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make_work), daemon=True)
    with _environment({k: v for k, v in _ONE_THREAD.items() if k not in os.environ} | _ON_CPU):
        process.start()
    theirs.close()
    return ours, process


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """These environment variables for processes started within."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection, make_work: Callable[[], Callable[[Any], Any]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work = make_work()
    connection.send(None)  # ready
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send(work(item))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
