"""The driver arms: what the generation network sees of the head (method, section 5).

An entry of `ARMS` is everything that an arm consists of; `config.driver.arm` selects one by its name. No
other module knows the arms, so a new one is a function and an entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jaxtyping import Array

from loki_jax.arrays import ArrayLike
from loki_jax.driver.encoding import encode_map, flame_vector, preview_map
from loki_jax.driver.flow_map import flow_map, preview_flow
from loki_jax.driver.regions import preview_regions, regions_map
from loki_jax.face.asset import HeadAsset

DEFAULT_ARM = "full"


class DriverArm(NamedTuple):
    """One way to show the head to the generation network.

    Attributes:
      channels: C of the result, or a function of the head that gives it.
      encode: `encode(fragments, inputs, dtype)` gives the map (*b, S, S, C), exactly zero on the background
        but for pixels of the portrait, of `Fragments` whose faces outside of the render mask are cleared and
        of `DriverInputs`; or, unless
        `spatial`, `encode(head, coefficients)` gives a vector (*b, C). Traceable and differentiable.
      preview: from the map to a uint8 RGB picture (*b, S, S, 3); traceable. That of an arm which is not
        spatial shows the map of `DEFAULT_ARM`.
      spatial: whether the arm is a map.
      portrait: whether `encode` reads `DriverInputs.portrait`; pixels: whether it reads images, too.
      frames: whether the map shows the driver's own frames instead of a rasterised head:
        `encode(head, frames, size, dtype, shape)` with `DriverFrames` and `config.driver.regions`.
    """

    channels: int | Callable[[HeadAsset], int]
    encode: Callable[..., Array]
    preview: Callable[[ArrayLike], Array]
    spatial: bool = True
    portrait: bool = False
    pixels: bool = False
    frames: bool = False


ARMS = {
    "full": DriverArm(45, encode_map, preview_map),
    "no_posenc": DriverArm(3, partial(encode_map, positions=False), partial(preview_map, positions=False)),
    "no_deform": DriverArm(42, partial(encode_map, offsets=False), partial(preview_map, offsets=False)),
    "flow": DriverArm(48, flow_map, preview_flow, portrait=True),
    "warp": DriverArm(
        51, partial(flow_map, pixels=True), partial(preview_flow, pixels=True), portrait=True, pixels=True
    ),
    "regions": DriverArm(4, regions_map, preview_regions, pixels=True, frames=True),
    "flame_vector": DriverArm(lambda head: head.n_expression + 12, flame_vector, preview_map, spatial=False),
}


def find_arm(name: str) -> DriverArm:
    """The arm called `name`.

    Raises:
      ValueError: there is none.
    """
    if name not in ARMS:
        raise ValueError(f"unknown driver arm {name!r}; one of {', '.join(ARMS)}")
    return ARMS[name]


def find_map_arm(name: str) -> DriverArm:
    """The arm called `name`, or that of `DEFAULT_ARM` where it has no map.

    Raises:
      ValueError: there is no such arm.
    """
    arm = find_arm(name)
    return arm if arm.spatial else ARMS[DEFAULT_ARM]


def driver_channels(name: str, head: HeadAsset) -> int:
    """Channels of the arm called `name` for a head.

    Raises:
      ValueError: there is no such arm.
    """
    channels = find_arm(name).channels
    return channels(head) if callable(channels) else channels
