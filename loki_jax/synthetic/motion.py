"""Speech-like motion of the built-in head, drawn from a seed: head, jaw, eyes, lids, brows and lips.

Every process is a function of the frame number at `FPS`, drawn from numpy's PCG64, so motion is the same
on every machine.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial

import numpy as np
from jaxtyping import Float

from loki_jax.face.asset import HeadAsset
from loki_jax.face.types import Coefficients

FPS = Fraction(25)  # of synthetic motion, and so of clips


def _wander(rng: np.random.Generator, n: int, low: float, high: float) -> Float[np.ndarray, " n"]:
    """A smooth process of unit variance with frequencies in [low, high] Hz, sampled at 25 fps."""
    t = np.arange(n) / float(FPS)
    frequency = low * (high / low) ** rng.random(7)
    phase = 2 * np.pi * rng.random(7)
    weight = rng.uniform(0.5, 1.0, 7)
    waves = weight[:, None] * np.sin(2 * np.pi * frequency[:, None] * t + phase[:, None])
    return waves.sum(0) / np.sqrt(0.5 * (weight**2).sum())


def _swing(rng: np.random.Generator, n: int, low: float, high: float, deviation: float, limit: float):
    """A process with the given standard deviation within the clip, softly kept below `limit`."""
    process = _wander(rng, n, low, high)
    process = (process - process.mean()) / max(process.std(), 1e-3)
    offset = 0.35 * deviation * np.clip(rng.standard_normal(), -2, 2)
    return limit * np.tanh((deviation * process + offset) / limit)


def _bursts(
    rng: np.random.Generator, n: int, low: float, high: float, share: float
) -> Float[np.ndarray, " n"]:
    """Smooth bumps in [0, 1] that are above zero for about `share` of the time."""
    level = _wander(rng, n, low, high)
    threshold = np.quantile(_normal_table(), 1 - share)
    return np.clip((level - threshold) / 1.2, 0.0, 1.0)


def _normal_table():
    """A fixed table of normal quantiles: sums of seven waves are nearly normal."""
    u = (np.arange(200) + 0.5) / 200
    # Tukey's lambda with 0.14 is the normal quantile function to three digits.
    return (u**0.135 - (1 - u) ** 0.135) / 0.1975


def _blinks(rng: np.random.Generator, n: int) -> Float[np.ndarray, " n"]:
    """Lid closure: short blinks, about one in two seconds, shut for one or two frames."""
    closure = np.zeros(n)
    at = int(rng.integers(2, 40))
    while at < n:
        shape = np.array([0.35, 0.9, 1.0, 1.0, 0.6, 0.2] if rng.random() < 0.5 else [0.5, 1.0, 0.8, 0.3])
        span = slice(at, min(at + len(shape), n))
        closure[span] = np.maximum(closure[span], shape[: n - at])
        at += int(rng.integers(22, 80))
    return closure


def _gaze(rng: np.random.Generator, n: int) -> Float[np.ndarray, "n 2"]:
    """Eye pitch and yaw in radians: fixations with quick jumps between them."""
    gaze = np.zeros((n, 2))
    at = 0
    while at < n:
        target = np.clip(rng.standard_normal(2), -2, 2) * (0.07, 0.16)
        gaze[at:] = target
        at += int(rng.integers(8, 40))
    # A saccade takes two frames.
    smooth = gaze.copy()
    smooth[1:] = 0.65 * gaze[1:] + 0.35 * gaze[:-1]
    return smooth


def synth_motion(head: HeadAsset, clip_seed: int, n_frames: int) -> Coefficients:
    """Speech-like motion: fields (n_frames, n), metres and radians, float32; `betas` are zero (no identity).

    Yaw has a standard deviation of 9 to 13 degrees within the clip and stays within 38, pitch about
    6, roll about 4; 40 % of the head's rotation is in the neck joint. Speech opens the jaw at
    syllable rate with lip shapes; eyes fixate, jump and blink; brows and smiles come and go.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([int(clip_seed), 7])))
    n = n_frames
    pitch = _swing(rng, n, 0.25, 1.0, rng.uniform(4.0, 7.5), 22.0)
    yaw = _swing(rng, n, 0.25, 0.8, rng.uniform(9.0, 13.0), 38.0)
    roll = _swing(rng, n, 0.25, 0.9, rng.uniform(2.5, 5.0), 18.0)
    # The limit reduces the swing a little, and the metrics of pose need enough yaw.
    yaw *= max(1.0, 8.5 / max(yaw.std(), 1e-3))
    rotation = np.deg2rad(np.stack([pitch, yaw, roll], -1))
    translation = np.stack([sd * _wander(rng, n, 0.2, 0.8) for sd in (0.006, 0.005, 0.012)], -1)

    speaking = np.clip(0.35 + 0.9 * _bursts(rng, n, 0.3, 0.9, 0.75), 0.0, 1.0)
    phase = 2 * np.pi * rng.uniform(2.6, 4.2) * np.arange(n) / float(FPS)
    syllables = 0.5 + 0.5 * np.sin(phase + 1.3 * _wander(rng, n, 0.5, 1.5) + rng.uniform(0, 6))
    opening = speaking * syllables**1.3 * rng.uniform(0.45, 1.0)
    opening = opening * np.clip(0.8 + 0.35 * _wander(rng, n, 0.8, 2.0), 0, 1.4)
    jaw = np.stack([0.26 * opening, 0.012 * _wander(rng, n, 0.5, 2.0), np.zeros(n)], -1)

    blink, gaze = _blinks(rng, n), _gaze(rng, n)
    gaze -= 0.35 * rotation[:, :2]  # eyes stay on the camera while the head turns
    down, up = np.maximum(gaze[:, 0], 0), np.maximum(-gaze[:, 0], 0)
    weights = {name: np.zeros(n) for name in head.expression_names}
    bursts = partial(_bursts, rng, n)

    def both(name, value, asymmetry=0.08):
        tilt = asymmetry * np.clip(rng.standard_normal(), -2, 2)
        weights[f"{name}Left"] = value * (1 + tilt)
        weights[f"{name}Right"] = value * (1 - tilt)

    def speech(share, amount, low=1.0, high=3.0):
        return amount * np.clip(0.25 + speaking, 0, 1) * bursts(low, high, share)

    both("eyeBlink", np.maximum(blink, np.clip(1.3 * down, 0, 0.45)), 0.0)
    both("eyeWide", (1 - blink) * np.clip(0.6 * bursts(0.2, 0.7, 0.25) + 1.0 * up, 0, 1))
    both("eyeSquint", 0.6 * bursts(0.2, 0.7, 0.25))
    smile = rng.uniform(0.2, 0.9) * bursts(0.15, 0.5, 0.4)
    both("mouthSmile", np.clip(smile + speech(0.2, 0.3), 0, 1), 0.15)
    both("cheekSquint", 0.7 * smile)
    brows = bursts(0.25, 1.0, 0.35)
    weights["browInnerUp"] = np.clip(0.75 * brows + 0.4 * bursts(0.3, 1.0, 0.2), 0, 1)
    both("browOuterUp", 0.85 * brows, 0.3)
    both("browDown", 0.8 * bursts(0.2, 0.8, 0.3) * (1 - brows))
    both("noseSneer", 0.5 * bursts(0.2, 0.8, 0.15))
    weights["jawOpen"] = np.clip(0.85 * opening, 0, 1)
    weights["jawForward"] = 0.5 * bursts(0.3, 1.0, 0.15)
    for side in ("Left", "Right"):
        weights[f"jaw{side}"] = 0.35 * bursts(0.3, 1.0, 0.15)
        weights[f"mouth{side}"] = 0.4 * bursts(0.3, 1.0, 0.15)
    weights["cheekPuff"] = 0.5 * bursts(0.3, 1.0, 0.10)
    rounded = bursts(1.0, 2.5, 0.35)
    weights["mouthPucker"] = 0.8 * rounded * (1 - smile)
    weights["mouthFunnel"] = np.clip(speech(0.35, 0.8), 0, 1) * (1 - 0.6 * rounded)
    both("mouthStretch", speech(0.25, 0.6) * (1 - rounded))
    both("mouthFrown", 0.6 * bursts(0.2, 0.8, 0.2) * (1 - np.clip(2 * smile, 0, 1)))
    both("mouthDimple", 0.5 * bursts(0.2, 0.8, 0.2))
    both("mouthPress", 0.7 * bursts(1.0, 2.5, 0.25) * (1 - np.clip(3 * opening, 0, 1)))
    both("mouthUpperUp", speech(0.35, 0.6))
    both("mouthLowerDown", speech(0.35, 0.7))
    for movement in ("Roll", "Shrug"):
        weights[f"mouth{movement}Upper"] = 0.5 * bursts(0.5, 2.0, 0.15)
        weights[f"mouth{movement}Lower"] = 0.5 * bursts(0.5, 2.0, 0.2)
    weights["mouthClose"] = 0.25 * bursts(0.5, 2.0, 0.2) * np.clip(2 * opening, 0, 1)
    expression = np.stack([weights[name] for name in head.expression_names], -1)
    fields = (
        np.zeros((n, head.n_shape)),
        np.clip(expression, head.expression_bounds[:, 0], head.expression_bounds[:, 1]),
        0.6 * rotation,
        translation,
        0.4 * rotation,
        jaw,
        np.concatenate([gaze, np.zeros((n, 1))], -1),
    )
    return Coefficients(*(np.asarray(field, np.float32) for field in fields))
