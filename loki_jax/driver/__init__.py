"""Driver maps: head coefficients as images that the generation network reads (method, section 5)."""

from loki_jax.driver.encoding import canonical_positions, encode_fragments, flame_vector, positional_encoding
from loki_jax.driver.map import driver_map, map_of_mesh, ndc_vertices
from loki_jax.driver.registry import driver_channels

__all__ = [
    "canonical_positions", "driver_channels", "driver_map", "encode_fragments", "flame_vector",
    "map_of_mesh", "ndc_vertices", "positional_encoding",
]  # fmt: skip
