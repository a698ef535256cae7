"""Flow: where each pixel of a posed head comes from in a portrait, without learning (method, section 17)."""

from loki_jax.flow.flow import (
    DEPTH_TOLERANCE,
    FACING,
    Flow,
    MeshView,
    flow_between,
    head_flow,
    head_parts,
    normalise_positions,
    pixel_positions,
    sample_image,
    view_cosines,
    view_head,
    view_mesh,
)

__all__ = [
    "DEPTH_TOLERANCE", "FACING", "Flow", "MeshView", "flow_between", "head_flow", "head_parts",
    "normalise_positions", "pixel_positions", "sample_image", "view_cosines", "view_head", "view_mesh",
]  # fmt: skip
