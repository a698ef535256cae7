"""What the command lines of the programs share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Annotated, Any, TypeVar

import tyro

from data_prep.dataset.workers import WorkerError

Options = TypeVar("Options")

# A number such as 25, 7.5 or 30000/1001 on the command line.
Ratio = Annotated[
    Fraction,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="RATIO",
        instance_from_str=lambda words: Fraction(words[0]),
        is_instance=lambda value: isinstance(value, Fraction),
        str_from_instance=lambda value: [str(value)],
    ),
]


def parse(options: Any, program: str, description: str | None, argv: Sequence[str] | None) -> Any:
    """The options (a dataclass, or a union of them as subcommands) that the command line gives.

    A ValueError of the dataclass is an error of usage: its message and exit status 2.
    """
    off = tyro.conf.FlagCreatePairsOff  # --overwrite without --no-overwrite
    return tyro.cli(
        options, prog=f"python -m data_prep.{program}", description=description, args=argv, config=(off,)
    )


def run(work: Callable[[Options], object], options: Options, kept: str = "") -> int:
    """Do the work of a program; the result is its exit status. Errors of the input are one line on stderr.

    Args:
      kept: what the next run goes on from after Ctrl-C; empty: nothing.
    """
    from loki_jax.program import run_program

    try:
        return run_program(work, options, kept)
    except (WorkerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
