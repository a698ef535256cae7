"""Driver maps: head coefficients as images that the generation network reads (method, section 5)."""

from loki_jax.driver.encoding import (
    DriverInputs,
    ReferenceFrame,
    canonical_positions,
    encode_map,
    flame_vector,
    positional_encoding,
)
from loki_jax.driver.flow_map import flow_map
from loki_jax.driver.map import driver_map, map_of_mesh, ndc_vertices
from loki_jax.driver.registry import ARMS, DriverArm, driver_channels, find_arm

__all__ = [
    "ARMS", "DriverArm", "DriverInputs", "ReferenceFrame", "canonical_positions", "driver_channels",
    "driver_map", "encode_map", "find_arm", "flame_vector", "flow_map", "map_of_mesh", "ndc_vertices",
    "positional_encoding",
]  # fmt: skip
