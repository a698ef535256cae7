"""`summary.json` of a dataset: how good each fit is, and which clips were rejected and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from loki_jax.data.schema import DatasetError

SUMMARY_FILE = "summary.json"
SECONDS_FILE = "seconds.json"  # what each clip took: the one file that differs from build to build
OVERLAYS = "overlays"  # folder of a video for each clip


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of the dataset at `path`, or an empty one.

    Raises:
      DatasetError: the file is damaged.
    """
    file = path / SUMMARY_FILE
    if not file.is_file():
        return {"clips": [], "rejected": [], "settings": {}}
    try:
        summary = json.loads(file.read_text())
        return {name: summary[name] for name in ("clips", "rejected", "settings")}
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{file}: damaged ({error!r}). Build the dataset again.") from error


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def format_summary(summary: dict[str, Any]) -> str:
    """The accepted clips and their errors, then the rejected ones, as text."""
    rows = [("clip", "split", "frames", "error %", "p90 %", "jitter deg", "face")]
    for row in summary["clips"]:
        rows.append(
            (row["clip"], row["split"], str(row["frames"]), f"{row['error_percent']:.2f}",
             f"{row['error_percent_p90']:.2f}", f"{row['jitter_degrees']:.2f}",
             f"{100 * row['face_share']:.0f} %")
        )  # fmt: skip
    return "\n".join(align(rows) + [f"rejected  {entry['reason']}" for entry in summary["rejected"]])


def jitter_degrees(angles: Float[np.ndarray, "N k"]) -> float:
    """Root mean square deviation from the centred median of five frames: what the eye sees as trembling."""
    padded = np.pad(angles, ((2, 2), (0, 0)), mode="edge")
    median = np.median([padded[i : i + len(angles)] for i in range(5)], axis=0)
    return float(np.sqrt(((angles - median) ** 2).mean()))
