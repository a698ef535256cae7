"""The arithmetic of "43 % fewer parameters, 1,496x fewer clips", from shapes and counts (docs/claims.md)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from loki_jax.face.builtin import builtin_head
from loki_jax.planning.report import HUNYUAN_PORTRAIT, X_PORTRAIT, parameter_table
from loki_jax.planning.work import make_subject, parameters_by_part
from loki_jax.training.config import import_configs

# What the paper states: clips before the split, the share that trains, seconds of a clip; the corpus that it
# compares with, and the ratio.
CLIPS, TRAINING_SHARE, SECONDS = 7_000, 0.98, 5.0
OTHER_CORPUS, STATED_RATIO, STATED_SAVING = 10e6, 1_496, 0.43
RATE, WINDOW, STEPS, BATCH = 25, 16, 30_000, 16


def arithmetic() -> dict[str, Any]:
    """Counts of the full-size networks, from shapes alone, and of clips, frames and windows."""
    import_configs()
    config = ConfigDict(importlib.import_module("configs.hdtf").get_config().to_dict())
    parts = parameters_by_part(make_subject(config, builtin_head()).state)
    table = dict(parameter_table(parts))
    total = table["at inference"]
    counted = {
        "all at inference": total,
        "without the VAE": total - table["VAE"],
        "without the reference UNet": total - table["reference UNet"],
        "trained alone": table["generation branch"],
    }
    frames = CLIPS * TRAINING_SHARE * SECONDS * RATE
    return {
        "parameters": table,
        "below_x_portrait": {name: 1 - count / X_PORTRAIT for name, count in counted.items()},
        "below_hunyuan_portrait": {name: 1 - count / HUNYUAN_PORTRAIT for name, count in counted.items()},
        "stated_saving": STATED_SAVING,
        "count_for_stated_saving": (1 - STATED_SAVING) * X_PORTRAIT,
        "clips": {
            "stated_ratio": STATED_RATIO,
            "clips_for_stated_ratio": OTHER_CORPUS / STATED_RATIO,
            "corpus_for_stated_ratio": CLIPS * STATED_RATIO,
            "ratio_of_all_clips": OTHER_CORPUS / CLIPS,
            "ratio_of_training_clips": OTHER_CORPUS / (CLIPS * TRAINING_SHARE),
            "hours": CLIPS * TRAINING_SHARE * SECONDS / 3600,
            "frames": frames,
            "disjoint_windows": frames / WINDOW,
            "windows_seen": STEPS * BATCH,
            "epochs": STEPS * BATCH / (frames / WINDOW),
        },
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """A bar of our parts beside the other systems."""
    from loki_jax.pictures import save_png

    figure = Figure(figsize=(7.5, 2.6), layout="constrained")
    axes = figure.add_subplot(xlabel="parameters (billions)")
    left = 0.0
    for name, count in result["parameters"].items():
        if name != "at inference":
            axes.barh("Loki", count / 1e9, left=left, label=name)
            left += count / 1e9
    for name, total in (("HunyuanPortrait", HUNYUAN_PORTRAIT), ("X-Portrait", X_PORTRAIT)):
        axes.barh(name, total / 1e9, color="0.6")
    axes.axvline(result["count_for_stated_saving"] / 1e9, color="k", linestyle=":", label="43 % less")
    axes.legend(fontsize=8)
    save_png(figure, path)
