"""What programs have around their work: a cache for compiled code, and errors and warnings of one line."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO, TypeVar

from loki_jax.compile_cache import enable_compile_cache
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.video.files import InputWarning

Options = TypeVar("Options")


def run_program(work: Callable[[Options], object], options: Options, kept: str = "") -> int:
    """Do the work of a program; the result is its exit code.

    An error of the inputs is printed as one line and gives 1; what is worth knowing about inputs
    (`InputWarning`) is printed as one line, too. Every other exception is a fault of this package. SIGINT and
    SIGTERM end the work like an exception, so that no temporary file is left; the exit code is 128 plus the
    signal's number.

    Args:
      kept: what the next run goes on from after Ctrl-C; empty: nothing.
    """
    enable_compile_cache()
    show = warnings.showwarning

    def show_line(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, InputWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            show(message, category, filename, lineno, file, line)

    with warnings.catch_warnings(), _ended_by_sigterm():
        warnings.simplefilter("always", InputWarning)
        warnings.showwarning = show_line
        # MediaError, DatasetError, HeadAssetError, CheckpointError and FitError are all ValueErrors.
        try:
            work(options)
        except (ValueError, LandmarkError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            rest = f"; {kept}. Run the same command again to go on." if kept else ""
            print(f"\nstopped{rest}", file=sys.stderr)
            return 128 + signal.SIGINT
    return 0


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit within the block, in the main thread."""

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
