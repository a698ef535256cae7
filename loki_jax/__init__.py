"""Loki (arXiv 2605.24176) in JAX: portrait animation from parametric-head coefficients.

The names below are the public interface (docs/api.md). They are imported on first use, so `import loki_jax`
alone loads neither jax nor any other large package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loki_jax.driver.map import driver_map
    from loki_jax.face.asset import load_head
    from loki_jax.face.builtin import builtin_head
    from loki_jax.face.control_options import Controls
    from loki_jax.face.retarget import retarget
    from loki_jax.face.skinning import make_identity
    from loki_jax.geometry.pipeline import GeometryPipeline
    from loki_jax.metrics.hef import head_expression_follow
    from loki_jax.metrics.hpf import head_pose_follow
    from loki_jax.pipeline import LokiPipeline, retarget_clip
    from loki_jax.raster.api import rasterize
    from loki_jax.sources import (
        DrivingClip,
        Portrait,
        fit_clip,
        fit_portrait,
        load_driving_clip,
        load_portrait,
    )
    from loki_jax.training.checkpoint import load_checkpoint

__version__ = "0.2.0"

_MODULES = {
    "Controls": "face.control_options",
    "DrivingClip": "sources",
    "GeometryPipeline": "geometry.pipeline",
    "LokiPipeline": "pipeline",
    "Portrait": "sources",
    "builtin_head": "face.builtin",
    "driver_map": "driver.map",
    "fit_clip": "sources",
    "fit_portrait": "sources",
    "head_expression_follow": "metrics.hef",
    "head_pose_follow": "metrics.hpf",
    "load_checkpoint": "training.checkpoint",
    "load_driving_clip": "sources",
    "load_head": "face.asset",
    "load_portrait": "sources",
    "make_identity": "face.skinning",
    "rasterize": "raster.api",
    "retarget": "face.retarget",
    "retarget_clip": "pipeline",
}

__all__ = [
    "Controls", "DrivingClip", "GeometryPipeline", "LokiPipeline", "Portrait", "builtin_head", "driver_map",
    "fit_clip", "fit_portrait", "head_expression_follow", "head_pose_follow", "load_checkpoint",
    "load_driving_clip", "load_head", "load_portrait", "make_identity", "rasterize", "retarget",
    "retarget_clip",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
