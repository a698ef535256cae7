"""What can go wrong in a run, what it is called, and the exit code it ends with (docs/training.md)."""

from __future__ import annotations

import contextlib
import enum
import errno
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from loki_jax.data.schema import DatasetError
from loki_jax.training.checkpoint import saved_steps
from loki_jax.training.logging import log
from loki_jax.training.remote import stored_at


class ExitCode(enum.IntEnum):
    """Exit codes of `loki_jax.train`; the numbers are those of BSD's sysexits where one fits.

    A supervisor starts the run again on LOST_PROCESS and PREEMPTED, and when a signal killed it; all
    other failures repeat themselves until somebody acts.
    """

    DONE = 0  # the last step is saved
    ERROR = 1  # wrong config, flags or workdir, or an error of the program
    DATA = 65  # a shard is missing, damaged or unreadable
    LOST_PROCESS = 69  # another process of the run is gone, or a step hangs
    NOT_FINITE = 70  # losses or gradients were not finite: too many in a row, or the last ones
    STORAGE = 74  # the disk of the workdir is full or unwritable
    PREEMPTED = 75  # SIGTERM or a preemption notice: a checkpoint is saved, run the same command again


class Preempted(Exception):
    """The run was asked to stop and has saved a checkpoint."""

    def __init__(self, step: int):
        super().__init__(f"asked to stop: saved after step {step}. Run the same command to go on.")


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)
# TensorStore reports the system's error as text.
_DISK_TEXTS = tuple(os.strerror(number) for number in _DISK_ERRORS)
_LOST_TEXTS = (
    "Gloo", "onnection", "heartbeat", "oordination", "DEADLINE_EXCEEDED", "UNAVAILABLE", "NCCL", "peer",
)  # fmt: skip


def exit_code(error: BaseException) -> ExitCode:
    """What an error of a run means."""
    chain = list(_causes(error))
    text = " ".join(str(e) for e in chain)
    among = lambda *kinds: any(isinstance(e, kinds) for e in chain)
    mentions = lambda texts: any(t in text for t in texts)
    if among(Preempted):
        return ExitCode.PREEMPTED
    if among(FloatingPointError):
        return ExitCode.NOT_FINITE
    if any(isinstance(e, OSError) and e.errno in _DISK_ERRORS for e in chain) or mentions(_DISK_TEXTS):
        return ExitCode.STORAGE
    if among(DatasetError):
        return ExitCode.DATA
    if jax.process_count() > 1 and among(jax.errors.JaxRuntimeError) and mentions(_LOST_TEXTS):
        return ExitCode.LOST_PROCESS
    return ExitCode.ERROR


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def explain(error: BaseException, code: ExitCode, workdir: Path, saved: int | None) -> str:
    """One message: what happened, what is saved, what to do."""
    last = f"The last whole checkpoint is {stored_at(workdir) / 'checkpoints' / str(saved)}."
    safe = "No checkpoint was saved yet." if saved is None else last
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if code == ExitCode.STORAGE:
        return f"{workdir}: cannot be written ({first}). {safe} Make room, then run the same command again."
    if code == ExitCode.LOST_PROCESS:
        return (
            f"another process of this run is gone or does not answer ({first}). {safe} "
            "Run the same command again."
        )
    if code == ExitCode.DATA:
        return f"{error} {safe}"
    return str(error)


def leave(error: Exception, workdir: Path) -> None:
    """End the process with the exit code and message of `error`; an error of the program is raised again."""
    code = exit_code(error)
    if code == ExitCode.ERROR and not isinstance(error, (ValueError, OSError)):
        raise error
    saved = saved_steps(workdir)
    kind = "stopped" if code == ExitCode.PREEMPTED else "error"
    log(f"{kind}: {explain(error, code, workdir, saved[-1] if saved else None)}")
    # A clean exit waits for the other processes. They agree to stop in two cases; in all others they may be
    # gone, or waiting in a collective for this one.
    if jax.process_count() > 1 and code not in (ExitCode.PREEMPTED, ExitCode.NOT_FINITE):
        os._exit(code)
    sys.exit(int(code))


class StopRequest:
    """SIGTERM and SIGINT ask the run to save and stop after the step it is in; a second one acts at once.

    With several processes the notice may reach any of them. jax's preemption service, which then owns
    SIGTERM, lets all agree on one step; it also receives what the cloud announces.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> StopRequest:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True
        log(f"{signal.Signals(number).name}: will save and stop after this step")
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def reached(self, step: int) -> bool:
        """Whether all processes are to stop after `step`; each must ask once a step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked


class Watchdog:
    """Ends the process when no step finishes for `seconds`: a lost partner may hold a collective for ever.

    It starts with the first beat, so that compilation does not count. 0 seconds: never.

    Args:
      slow_seconds: the limit inside of `slow()`: validation, samples and checkpoints, the first of which
        compile.
    """

    def __init__(self, seconds: float, slow_seconds: float = 0.0, end: Callable[[int], Any] = os._exit):
        self._seconds, self._limit, self._slow, self._end = seconds, seconds, slow_seconds, end
        self._last: float | None = None
        self._stopped = threading.Event()
        if seconds > 0:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self) -> None:
        self._last = time.monotonic()

    @contextlib.contextmanager
    def slow(self) -> Iterator[None]:
        """Around what may take longer than a step."""
        self.beat()
        self._limit = max(self._slow, self._seconds)
        yield
        self.beat()
        self._limit = self._seconds

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(self._seconds / 4, 10)):
            if self._last is not None and time.monotonic() - self._last > self._limit:
                log(
                    f"error: nothing finished for {self._limit:g} s: another process is gone, or data or "
                    "devices hang. The position of each thread:"
                )
                faulthandler.dump_traceback(file=2, all_threads=True)
                self._end(ExitCode.LOST_PROCESS)
                return
