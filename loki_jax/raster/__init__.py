"""An exact differentiable rasteriser in pure JAX; docs/rasteriser.md describes the algorithm."""

from loki_jax.raster.antialias import antialias
from loki_jax.raster.api import Rendering, downsample, rasterize, render
from loki_jax.raster.fragments import Fragments, clear_hidden_faces, interpolate, locate
from loki_jax.raster.search import nearest_faces

__all__ = [
    "Fragments", "Rendering", "antialias", "clear_hidden_faces", "downsample", "interpolate", "locate",
    "nearest_faces", "rasterize", "render",
]  # fmt: skip
