"""Errors of single expressions: smile, blink, and so on (docs/metrics.md)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy.spatial.transform import Rotation

from loki_jax.face.asset import HeadAsset
from loki_jax.face.types import Coefficients


def expression_errors(
    head: HeadAsset,
    prediction: Coefficients,
    target: Coefficients,
    valid: Bool[np.ndarray, " n"] | None = None,
) -> dict[str, Float[np.ndarray, " n"]]:
    """Errors of each common frame by the name of the expression axis; lower is better.

    The error of an axis is the absolute difference of its coefficients: 1 is the whole movement of a head
    with named expressions, and one standard deviation of FLAME's. "jaw", where the head has that joint, is
    the angle between both rotations in degrees.

    Args:
      prediction, target: fields (n, ...) and (m, ...) of `head`.
      valid: frames that were tracked in both; None: all. Others are NaN.

    Raises:
      ValueError: the coefficients do not fit the head.
    """
    for name, side in (("prediction", prediction), ("target", target)):
        if np.shape(side.expression)[1:] != (head.n_expression,):
            raise ValueError(
                f"expression_errors: {name} has expression {np.shape(side.expression)}, "
                f"but head {head.name!r} expects (frames, {head.n_expression})"
            )
    count = min(len(prediction.expression), len(target.expression))
    own, wanted = (np.asarray(side.expression, np.float64)[:count] for side in (prediction, target))
    errors = dict(zip(head.expression_names, np.abs(own - wanted).T, strict=True))
    if head.joint("jaw") is not None:
        one, other = (
            Rotation.from_rotvec(np.asarray(s.jaw, np.float64)[:count]) for s in (prediction, target)
        )
        errors["jaw"] = np.degrees((one.inv() * other).magnitude())
    if valid is None:
        return errors
    return {name: np.where(valid[:count], error, np.nan) for name, error in errors.items()}
