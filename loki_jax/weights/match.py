"""Key matching: which tensor of a source fills which parameter, and what is left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from loki_jax.weights.ldm_names import Table, to_ldm
from loki_jax.weights.tensors import TensorInfo, WeightsError

FLOATS = ("float32", "float16", "bfloat16")

_NAMED = 8  # names that an error spells out


class Drop(NamedTuple):
    """Tensors left out on purpose: a regular expression for the whole name, and why."""

    pattern: str
    reason: str


def match_keys(
    infos: Mapping[str, TensorInfo],
    table: Table,
    shapes: Mapping[str, tuple[int, ...]],
    drops: Sequence[Drop],
    source: str,
) -> dict[str, str]:
    """Match the tensors of a source to the parameters of a table, without reading any.

    Args:
      infos: shape and dtype of every tensor of the source.
      table: the parameters that the source must fill.
      shapes: shapes of our parameters by path; may hold more than the table.
      drops: rules for tensors that are left out; a tensor the table names is never left out.
      source: what errors call the source.

    Returns:
      name of each tensor that is left out -> why.

    Raises:
      WeightsError: tensors are missing, have another shape or are no floating-point numbers, or are
        neither in the table nor covered by a rule. All of them are counted, the first named.
    """
    names = {weight.name: path for path, weight in table.items()}
    problems: dict[str, list[str]] = {
        "missing": [], "of another shape": [], "of another dtype": [],
        "that nothing asks for and no rule drops": [],
    }  # fmt: skip
    missing, misshapen, mistyped, unknown = problems.values()
    for name, path in names.items():
        wanted = state_shape(shapes[path], table[path].layout)
        if name not in infos:
            missing.append(f"{name} ({', '.join(map(str, wanted))})")
        elif infos[name].shape != wanted:
            misshapen.append(f"{name}: {infos[name].shape} there, {wanted} in this network")
        elif infos[name].dtype not in FLOATS:
            mistyped.append(f"{name}: {infos[name]}, expected one of {', '.join(FLOATS)}")
    dropped: dict[str, str] = {}
    for name in [name for name in infos if name not in names]:
        reason = next((drop.reason for drop in drops if re.fullmatch(drop.pattern, name)), None)
        if reason is None:
            unknown.append(f"{name}: {infos[name]}")
        else:
            dropped[name] = reason
    if any(problems.values()):
        raise WeightsError(
            f"{source}: not the weights of this network.\n"
            + "\n".join(_problem(kind, lines) for kind, lines in problems.items() if lines)
            + "\nGive the weights that fit, or the --config that they were made with."
        )
    return dropped


def state_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Shape of a parameter of ours in the layout of a state dict."""
    return to_ldm(np.broadcast_to(np.False_, shape), layout).shape


def _problem(kind: str, lines: list[str]) -> str:
    rest = [f"... and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else []
    return f"{len(lines)} tensors {kind}:\n  " + "\n  ".join([*sorted(lines)[:_NAMED], *rest])
