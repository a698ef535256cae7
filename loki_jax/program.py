"""What programs have around their work: a cache for compiled code, and errors and warnings of one line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import TextIO, TypeVar

from loki_jax.compile_cache import enable_compile_cache
from loki_jax.fitting.model_files import LandmarkError
from loki_jax.video.files import InputWarning

Options = TypeVar("Options")


def run_program(work: Callable[[Options], object], options: Options) -> int:
    """Do the work of a program; the result is its exit code.

    An error of the inputs is printed as one line and gives 1; what is worth knowing about inputs
    (`InputWarning`) is printed as one line, too. Every other exception is a fault of this package.
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

    with warnings.catch_warnings():
        warnings.simplefilter("always", InputWarning)
        warnings.showwarning = show_line
        # MediaError, DatasetError, HeadAssetError, CheckpointError and FitError are all ValueErrors.
        try:
            work(options)
        except (ValueError, LandmarkError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0
