"""What the command lines of the programs share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Annotated, Any

import tyro

from data_prep.dataset.workers import WorkerError
from loki_jax.fitting.model_files import LandmarkError

_INTERRUPTED = 130  # what shells report after Ctrl-C

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


def run(work: Callable[[], int], kept: str = "") -> int:
    """The exit status of a program that does `work`.

    An error of the input is one line on stderr and status 1. DatasetError, MediaError, HeadAssetError,
    FitError and RecipeError are ValueErrors.

    Args:
      kept: what the next run goes on from after Ctrl-C; empty: nothing.
    """
    from loki_jax.compile_cache import enable_compile_cache

    enable_compile_cache()
    try:
        return work()
    except (ValueError, LandmarkError, WorkerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        rest = f"; {kept}. Run the same command again to go on." if kept else ""
        print(f"\nstopped{rest}", file=sys.stderr)
        return _INTERRUPTED
