"""The options of `loki_jax.face.controls`, apart from it: command lines import them without JAX or NumPy."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal


class ControlError(ValueError):
    """A control or slider cannot be used; the message names it and the remedy."""


@dataclasses.dataclass(frozen=True)
class Controls:
    """Changes of a motion. Scales lead from the portrait's own value (0) to the driver's (1) and beyond."""

    expression: float = 1.0
    """scale of brows, cheeks, nose and lips: 0 the portrait's own, 1 the driver's, more exaggerates"""
    jaw: float = 1.0
    """scale of the jaw"""
    lids: float = 1.0
    """scale of the lids of both eyes"""
    left_lids: float = 1.0
    """further scale of the lids of the person's left eye"""
    right_lids: float = 1.0
    """further scale of the lids of the person's right eye"""
    gaze: float | Literal["camera"] = 1.0
    """scale of the gaze; "camera": the eyes look into the lens whatever the head does"""
    pose: float = 1.0
    """scale of the head's rotation and translation"""
    yaw: float = 0.0
    """degrees by which the face is turned to the person's left, the right of the picture"""
    pitch: float = 0.0
    """degrees by which the face is turned up"""
    roll: float = 0.0
    """degrees by which the head is tilted clockwise in the picture"""
    region: Literal["all", "lips", "eyes", "pose", "expression"] = "all"
    """what alone follows the driver: lips with the jaw, eyes with their lids, pose, or all but the pose"""
    smooth: float = 0.0
    """One Euro smoothing, milliseconds of lag for slow motion; fast motion lags less; 0: none"""
    ease: float = 0.4
    """seconds in which the motion returns to the driver's after a cut or a lost face"""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "region" or (field.name == "gaze" and value == "camera"):
                continue
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ControlError(f"{field.name} is {value!r}, expected a finite number")
            if value < 0 and field.name not in ("yaw", "pitch", "roll"):
                raise ControlError(f"{field.name} is {value}, expected 0 or more")
        if self.region not in REGIONS:
            raise ControlError(f"region is {self.region!r}, expected one of {', '.join(REGIONS)}")


# What follows the driver in each region.
REGIONS = {
    "all": {"expression", "mouth", "jaw", "lids", "gaze", "pose"},
    "lips": {"mouth", "jaw"},
    "eyes": {"lids", "gaze"},
    "pose": {"pose"},
    "expression": {"expression", "mouth", "jaw", "lids", "gaze"},
}
