"""High dynamic range to standard range: PQ (HDR10, Dolby Vision's base layer) and HLG to sRGB.

Light is measured in units of reference white, 203 candela a square metre (ITU-R BT.2408). Colours pass from
BT.2020's primaries to BT.709's. Then light up to half of reference white stays as it is, and brighter light
approaches white exponentially; the strongest of red, green and blue decides, so that hues are kept.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float, UInt8, UInt16

PQ, HLG = 16, 18  # FFmpeg's AVColorTransferCharacteristic
WHITE = 203.0  # candela a square metre
KNEE = 0.5  # of reference white

_HLG_PEAK = 1000.0  # candela a square metre, of the display that HLG is graded for
_LEVELS = 4096  # of the tables; PQ and HLG have 10 or 12 bits

# From BT.2020 to BT.709, linear light (ITU-R BT.2087).
_PRIMARIES = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)  # BT.2020


def linear_pq(signal: Float[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
    """Light in units of reference white of PQ signals in [0, 1] (SMPTE ST 2084)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = np.asarray(signal, np.float64) ** (1 / m2)
    return 10000 / WHITE * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def scene_hlg(signal: Float[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
    """Light of the scene in [0, 1] of HLG signals in [0, 1] (ITU-R BT.2100)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    signal = np.asarray(signal, np.float64)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def compress(light: Float[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
    """Light in units of reference white to [0, 1]: the same up to `KNEE`, then towards 1."""
    above = np.maximum(light - KNEE, 0) / (1 - KNEE)
    return np.minimum(light, KNEE) + (1 - KNEE) * (1 - np.exp(-above))


@functools.cache
def _table(transfer: int) -> Float[np.ndarray, " levels"]:
    signal = np.linspace(0, 1, _LEVELS)
    return (linear_pq if transfer == PQ else scene_hlg)(signal).astype(np.float32)


@functools.cache
def _srgb() -> UInt8[np.ndarray, " levels"]:
    light = np.linspace(0, 1, 4 * _LEVELS)
    curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * curve).astype(np.uint8)


def tone_map(signal: UInt16[np.ndarray, "h w 3"], transfer: int) -> UInt8[np.ndarray, "h w 3"]:
    """A picture of PQ or HLG signals, RGB of BT.2020 in 16 bits, as 8-bit sRGB."""
    light = _table(transfer)[signal >> 4]
    if transfer == HLG:
        # The display adapts: its light is that of the scene to the power 1.2.
        luminance = np.maximum(light @ _LUMA, 1e-6)[..., None]
        light = _HLG_PEAK / WHITE * luminance**0.2 * light
    light = np.maximum(light @ _PRIMARIES.T, 0)
    strongest = np.maximum(light.max(-1, keepdims=True), 1e-6)
    light = light * (compress(strongest) / strongest)
    curve = _srgb()
    return curve[np.rint(light * (len(curve) - 1)).astype(np.int32)]
