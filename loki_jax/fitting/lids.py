"""Lids that shut: the lid contours of the iris network, which stay apart where eyes are closed, made to meet.

The network follows a lid only part of the way down: in renders of closed eyes its contours are still about
half as far apart as in the open eye, in videos of people two fifths (frames which MediaPipe's newer networks
see as closed). The opening of an eye relative to the open eye of the same clip is therefore stretched.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from loki_jax.fitting.points import LIDS_LEFT, LIDS_RIGHT

# Opening of the contours over that of the open eye, and the eye's own.
_MARKED, _TRUE = (0.42, 0.65, 0.80, 1.0), (0.0, 0.35, 0.70, 1.0)

# Gap over width: an eye is called open from here on, so that closed eyes of a portrait are not its open ones.
_LEAST_OPEN = 0.25
_OPEN_QUANTILE = 0.8


def lid_openings(points: Float[np.ndarray, "n 478 3"]) -> Float[np.ndarray, "n 2"]:
    """Gap between the middles of the lids over the eye's width, of the right and the left eye."""
    openings = []
    for lids in (LIDS_RIGHT, LIDS_LEFT):
        lower, upper = points[:, lids[3:6], :2], points[:, lids[11:14], :2]
        # The width with its depth, so that a turn of the head does not open the eyes.
        width = np.linalg.norm(points[:, lids[0]] - points[:, lids[8]], axis=-1)
        openings.append(np.linalg.norm(upper - lower, axis=-1).mean(axis=-1) / np.maximum(width, 1e-6))
    return np.stack(openings, axis=-1)


def usual_openings(
    points: Float[np.ndarray, "n 478 3"], seen: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " 2"]:
    """`lid_openings` of a clip's open eyes.

    Args:
      seen: the frames that show the face are those above 0; at least one does.
    """
    usual = np.quantile(lid_openings(points)[seen > 0], _OPEN_QUANTILE, axis=0)
    return np.maximum(usual, _LEAST_OPEN)


def relative_openings(
    points: Float[np.ndarray, "n 478 3"], seen: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n 2"]:
    """`lid_openings` over those of the clip's open eyes; `seen` as for `usual_openings`."""
    return lid_openings(points) / usual_openings(points, seen)


def close_lids(
    points: Float[np.ndarray, "n 478 3"],
    seen: Float[np.ndarray, " n"],
    usual: Float[np.ndarray, " 2"] | None = None,
) -> Float[np.ndarray, "n 478 3"]:
    """Landmarks of a clip with the upper lids moved down to where eyes are as open as `_TRUE` says.

    Args:
      seen: the frames that show the face are those above 0.
      usual: openings of the open eyes (`usual_openings`); None: those of this clip.
    """
    if not (seen > 0).any():
        return points
    closed = points.copy()
    usual = usual_openings(points, seen) if usual is None else usual
    marked = np.maximum(lid_openings(points) / usual, 1e-6)
    # Eyes that are wider open than usual stay as they are.
    share = np.where(marked < 1, np.interp(marked, _MARKED, _TRUE) / marked, 1.0)
    for eye, lids in enumerate((LIDS_RIGHT, LIDS_LEFT)):
        lower, upper = points[:, lids[1:8], :2], points[:, lids[9:], :2]
        closed[:, lids[9:], :2] = lower + (upper - lower) * share[:, eye, None, None]
    return closed
