"""Motion over time: the neutral frame of a driver, smoothing, and what happens at cuts and lost faces."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.ndimage import median_filter
from scipy.spatial.transform import Rotation

from loki_jax.arrays import ArrayLike
from loki_jax.face.asset import HeadAsset
from loki_jax.face.types import Camera, Coefficients

# One Euro: hertz that the cutoff rises with the speed, in hertz a unit a second (weights, radians, metres).
_CUTOFF_RISE = {"expression": 1.0, "rot": 3.0, "tra": 20.0, "neck": 3.0, "jaw": 5.0, "eyes": 2.0}
_SPEED_CUTOFF = 1.0  # hertz, of the low-pass of the speed

_LONGEST_GAP = 0.2  # seconds without the face that are interpolated; longer ones are held

# What counts as much as one sigma of the expression when the neutral frame is chosen.
_NEUTRAL_DEGREES, _NEUTRAL_METRES, _NEUTRAL_JAW = 10.0, 0.03, 0.1


def neutral_frame(
    head: HeadAsset, coefficients: Coefficients, camera: Camera, valid: Bool[np.ndarray, " n"] | None = None
) -> int:
    """The frame of a driver that is nearest to rest: facing the camera, at its usual place, relaxed.

    The least sum of squares of the angle to the camera's axes, of the distance from the median position, of
    the expression in sigmas of the head (root mean square) and of the jaw's turn. A median over five frames
    makes it robust against single bad fits.

    Args:
      coefficients: fields (n, ...).
      camera: of the driver; without leading axes.
      valid: frames to choose from; None: all.
    """
    rot, neck = (Rotation.from_rotvec(np.asarray(field)) for field in (coefficients.rot, coefficients.neck))
    flip = np.diag([1.0, -1.0, -1.0])
    view = Rotation.from_matrix(flip @ np.asarray(camera.extrinsics, np.float64)[:3, :3] @ flip)
    degrees = np.degrees((view * rot * neck).magnitude())
    tra = np.asarray(coefficients.tra, np.float64)
    away = np.linalg.norm(tra - np.median(tra, axis=0), axis=-1)
    tension = np.asarray(coefficients.expression) / np.asarray(head.expression_sigma)
    jaw = np.linalg.norm(np.asarray(coefficients.jaw), axis=-1)
    cost = (degrees / _NEUTRAL_DEGREES) ** 2 + (away / _NEUTRAL_METRES) ** 2
    cost = median_filter(cost + np.mean(tension**2, -1) + (jaw / _NEUTRAL_JAW) ** 2, 5, mode="nearest")
    if valid is not None and valid.any():
        cost = np.where(valid, cost, np.inf)
    return int(np.argmin(cost))


def bridge_interruptions(
    coefficients: Coefficients,
    valid: Bool[np.ndarray, " n"],
    cuts: Int[np.ndarray, " c"],
    fps: float,
    ease: float,
) -> Coefficients:
    """A motion without jumps at cuts and lost faces.

    While the face is lost for more than 0.2 s, the last pose and expression are held. After that, and after
    a cut, the difference to the driver is eased out in `ease` seconds. Without cuts and such gaps the motion
    is returned as it is.

    Args:
      coefficients: fields (n, ...); those of frames that are not valid are interpolated.
      cuts: first frames of other shots.
    """
    held = [(start, stop) for start, stop in _runs(~np.asarray(valid)) if stop - start > _LONGEST_GAP * fps]
    events = [(start, stop) for start, stop in held if start > 0]
    events += [(int(cut), int(cut)) for cut in cuts if 0 < cut < len(valid)]
    # A cut while the face is lost is over when it returns.
    events = [e for e in events if e[0] != e[1] or not any(start < e[0] <= stop for start, stop in held)]
    if not events:
        return coefficients
    before = Coefficients(*(np.asarray(field, np.float64) for field in coefficients))
    fields = before._asdict()
    del fields["betas"]
    result = {name: field.copy() for name, field in fields.items()}
    steps = np.arange(len(valid)) / max(ease * fps, 1e-6)
    share = np.clip(steps, 0, 1)
    share = 1 - share * share * (3 - 2 * share)
    for start, stop in sorted(events):
        rest = share[: len(valid) - stop, None]
        for name, field in fields.items():
            last = result[name][start - 1]
            result[name][start:stop] = last
            if stop == len(valid):
                continue
            live = field[stop:]
            if name in ("rot", "neck"):
                turns = Rotation.from_rotvec(live)
                off = (Rotation.from_rotvec(last) * turns[0].inv()).as_rotvec()
                eased = (Rotation.from_rotvec(rest * off) * turns).as_rotvec()
                result[name][stop:] = np.where(rest > 0, eased, live)
            else:
                result[name][stop:] = live + rest * (last - live[0])
    return before._replace(**result)._replace(betas=coefficients.betas)


def _runs(mask: Bool[np.ndarray, " n"]) -> list[tuple[int, int]]:
    """[start, stop) of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def between(start: Coefficients, stop: Coefficients, share: float) -> Coefficients:
    """A frame between two, without leading axes; the head turns the shortest way."""
    fields = {
        name: (1 - share) * a + share * b for name, a, b in zip(start._fields, start, stop, strict=True)
    }
    turn = Rotation.from_rotvec(share * _turn_between(start.rot, stop.rot))
    return stop._replace(**fields | {"rot": (turn * Rotation.from_rotvec(start.rot)).as_rotvec()})


class Smoothed(NamedTuple):
    """A motion smoothed up to one frame.

    Attributes:
      coefficients: the smoothed frame, without leading axes.
      latest: the frame as it came.
      speed: fields of `coefficients`, change a second; of `rot` in the world's axes.
    """

    coefficients: Coefficients
    latest: Coefficients
    speed: Coefficients


def start_smoothing(coefficients: Coefficients) -> Smoothed:
    """The first frame of a motion, without leading axes."""
    first = Coefficients(*(np.asarray(field, np.float64) for field in coefficients))
    return Smoothed(first, first, Coefficients(*(0 * field for field in first)))


def smooth_next(before: Smoothed, coefficients: Coefficients, interval: float, lag: float) -> Smoothed:
    """The next frame of a motion, smoothed by the One Euro filter (Casiez, Roussel and Vogel, CHI 2012).

    Args:
      interval: seconds since the frame before.
      lag: seconds by which slow motion is late, 1 / (2 pi cutoff); the cutoff rises with the speed, so that
        fast motion is less late.
    """
    latest = Coefficients(*(np.asarray(field, np.float64) for field in coefficients))
    smoothed, speeds = latest._asdict(), before.speed._asdict()
    for name, rise in _CUTOFF_RISE.items():
        value, last, own = (getattr(c, name) for c in (latest, before.latest, before.coefficients))
        turns = name == "rot"
        change = _turn_between(last, value) if turns else value - last
        speeds[name] = _smooth_speed(getattr(before.speed, name), change, interval)
        share = _share(speeds[name], interval, lag, rise, apart=name == "expression")
        if turns:
            own_turn = Rotation.from_rotvec(share * _turn_between(own, value))
            smoothed[name] = (own_turn * Rotation.from_rotvec(own)).as_rotvec()
        else:
            smoothed[name] = own + share * (value - own)
    return Smoothed(Coefficients(**smoothed), latest, Coefficients(**speeds))


def _turn_between(start: Float[ArrayLike, "3"], stop: Float[ArrayLike, "3"]) -> Float[np.ndarray, "3"]:
    return (Rotation.from_rotvec(stop) * Rotation.from_rotvec(start).inv()).as_rotvec()


def smooth_motion(coefficients: Coefficients, fps: float, lag: float) -> Coefficients:
    """A motion (N, ...) smoothed by `smooth_next`."""
    fields = [np.asarray(field, np.float64) for field in coefficients]
    state = start_smoothing(Coefficients(*(field[0] for field in fields)))
    frames = [state.coefficients]
    for t in range(1, len(fields[0])):
        state = smooth_next(state, Coefficients(*(field[t] for field in fields)), 1 / fps, lag)
        frames.append(state.coefficients)
    return Coefficients(*(np.stack(field).astype(np.float32) for field in zip(*frames, strict=True)))


def _smooth_speed(speed: np.ndarray, change: np.ndarray, interval: float) -> np.ndarray:
    """The low-passed speed after a change within an interval in seconds."""
    keep = 1 / (1 + 1 / (2 * np.pi * _SPEED_CUTOFF * interval))
    return speed + keep * (change / interval - speed)


def _share(speed: np.ndarray, interval: float, lag: float, rise: float, apart: bool) -> np.ndarray | float:
    """The share of the way to a new value that the filter goes."""
    size = np.abs(speed) if apart else float(np.linalg.norm(speed))
    late = 1 / (1 / lag + 2 * np.pi * rise * size)
    return 1 / (1 + late / interval)
