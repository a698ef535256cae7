"""Frames without a face count as failures: means of what is left would reward losing the difficult ones.

`errors` are per-frame errors, NaN where no face was found; `asked` is the number of frames that there should
be (default: as many as errors), of which missing ones have failed, too.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def failure_share(errors: Float[np.ndarray, " n"], asked: int | None = None) -> float:
    """Share of the asked frames without a value, 0 to 1; lower is better."""
    return 1 - len(_found(errors, asked)) / (asked or len(errors))


def success_rate(errors: Float[np.ndarray, " n"], limit: float, asked: int | None = None) -> float:
    """Share of the asked frames whose error is at most `limit`, 0 to 1; higher is better."""
    return float((_found(errors, asked) <= limit).sum() / (asked or len(errors)))


def mean_with_failures(errors: Float[np.ndarray, " n"], failure: float, asked: int | None = None) -> float:
    """Mean error of the asked frames, of which failed ones count as `failure`; lower is better.

    A fair value of `failure` is the error of the still portrait on the same sample: a system that shows no
    face then scores as one that does nothing.
    """
    found = _found(errors, asked)
    count = asked or len(errors)
    return float((found.sum() + failure * (count - len(found))) / count)


def _found(errors: Float[np.ndarray, " n"], asked: int | None) -> Float[np.ndarray, " m"]:
    errors = np.asarray(errors, np.float64)[:asked]
    if not (asked or len(errors)):
        raise ValueError("no frame was asked for, so that no share of failures can be told")
    return errors[np.isfinite(errors)]
