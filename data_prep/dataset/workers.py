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
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
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


class _Worker(NamedTuple):
    process: multiprocessing.process.BaseProcess
    connection: Connection


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
        for index, item in enumerate(items):
            yield index, work(item)
        return
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, _Worker] = {}
    working_on: dict[Connection, int] = {}
    pending = iter(range(len(items)))

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, make_work), daemon=True)
        kept = {name: value for name, value in _ONE_THREAD.items() if name not in os.environ}
        with _environment(kept | _ON_CPU):
            process.start()
        theirs.close()
        running[ours] = _Worker(process, ours)

    def hand_out(connection: Connection) -> None:
        index = next(pending, None)
        if index is None:
            running.pop(connection)
            connection.close()  # it ends by itself
        else:
            working_on[connection] = index
            connection.send((index, items[index]))

    try:
        for _ in range(min(workers, len(items))):
            start()
        while running:
            for connection in wait(list(running)):
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    worker = running.pop(connection)
                    worker.process.join()
                    connection.close()
                    index = working_on.pop(connection, None)
                    if index is None:
                        raise WorkerError(
                            f"a worker process ended at its start with exit code {worker.process.exitcode}; "
                            "its message stands above"
                        ) from None
                    yield index, Died(worker.process.exitcode)
                    start()
                    continue
                if message is not None:  # None: ready for the first item
                    working_on.pop(connection)
                    hand_out(connection)
                    yield message
                else:
                    hand_out(connection)
    finally:
        for worker in running.values():
            worker.process.terminate()
        for worker in running.values():
            worker.process.join()


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
    connection.send(None)
    while True:
        try:
            index, item = connection.recv()
        except EOFError:
            return
        connection.send((index, work(item)))


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
