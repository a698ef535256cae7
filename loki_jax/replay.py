"""Repeat a train step that gave no finite numbers, from its debug snapshot.

    python -m loki_jax.replay runs/hdtf/snapshots/1234

Prints loss and gradient norm, and names the values of the batch and the gradients that are not finite.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from loki_jax.compile_cache import enable_compile_cache


@dataclass(frozen=True)
class Options:
    """See the module."""

    snapshot: Annotated[Path, tyro.conf.Positional]  # WORKDIR/snapshots/STEP


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m loki_jax.replay", args=argv, description=__doc__)
    enable_compile_cache()
    from loki_jax.training.config import CheckpointError
    from loki_jax.training.snapshot import read_snapshot, replay

    try:
        found = replay(read_snapshot(options.snapshot))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"loss {found['loss']}, gradient norm {found['grad_norm']}")
    for line in found["batch"]:
        print(f"not finite in the batch: {line}")
    print("\n  ".join([f"{len(found['gradients'])} gradients are not finite", *found["gradients"][:8]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
