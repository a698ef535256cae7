"""Pictures of results: panels beside a video, the per-frame plot, the demo's one-sheet report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from loki_jax.io import atomic_path


def resize_frames(frames: UInt8[np.ndarray, "n h w 3"], height: int) -> UInt8[np.ndarray, "n height w2 3"]:
    """Scale frames to a height, keeping their proportions."""
    if frames.shape[1] == height:
        return frames
    width = round(frames.shape[2] * height / frames.shape[1])
    method = Image.Resampling.BICUBIC if height > frames.shape[1] else Image.Resampling.BOX
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), method)) for frame in frames])


def panel_frames(
    columns: Sequence[UInt8[np.ndarray, "..."]], height: int = 256, gap: int = 4
) -> UInt8[np.ndarray, "n height w 3"]:
    """Videos side by side; a still (h, w, 3) repeats, and all end with the shortest video.

    Widths come out even, as H.264 wants them.

    Raises:
      ValueError: there is no video among the columns.
    """
    lengths = [len(column) for column in columns if column.ndim == 4]
    if not lengths:
        raise ValueError("panel_frames: needs at least one video (n, h, w, 3)")
    length = min(lengths)
    pieces = []
    for column in columns:
        video = column[None] if column.ndim == 3 else column[:length]
        video = resize_frames(video, height)
        pieces.append(np.broadcast_to(video, (length, *video.shape[1:])))
        pieces.append(np.full((length, height, gap, 3), 255, np.uint8))
    panel = np.concatenate(pieces[:-1], axis=2)
    return panel[:, :, : panel.shape[2] - panel.shape[2] % 2]


class PairPictures(NamedTuple):
    """What the report shows of one pair; the videos have equal length."""

    name: str
    reference: UInt8[np.ndarray, "s s 3"]
    driver: UInt8[np.ndarray, "n s s 3"]
    driver_map: UInt8[np.ndarray, "n s s 3"]
    generated: UInt8[np.ndarray, "n s s 3"]
    truth: UInt8[np.ndarray, "n s s 3"]


def pair_sheet(
    pair: PairPictures, columns: int = 7, size: int = 96, gap: int = 2
) -> UInt8[np.ndarray, "h w 3"]:
    """One pair as rows driver, driver map, generated, truth over time, the reference at the left."""
    index = np.linspace(0, len(pair.driver) - 1, columns).round().astype(int)
    rows = [
        np.concatenate([_bordered(frame, gap) for frame in resize_frames(video[index], size)], axis=1)
        for video in (pair.driver, pair.driver_map, pair.generated, pair.truth)
    ]
    block = np.concatenate(rows, axis=0)
    left = np.full((block.shape[0], size + 5 * gap, 3), 255, np.uint8)
    reference = resize_frames(pair.reference[None], size)[0]
    # Beside the generated row, which it should resemble.
    top = 2 * (size + 2 * gap) + gap
    left[top : top + size, gap : gap + size] = reference
    return np.concatenate([left, block], axis=1)


def _bordered(frame, gap):
    return np.pad(frame, ((gap, gap), (gap, gap), (0, 0)), constant_values=255)


def plot_per_frame(
    path: str | os.PathLike,
    curves: Mapping[str, Mapping[str, Float[np.ndarray, " n"]]],
    title: str = "",
) -> None:
    """Write a PNG with one panel a metric: `curves[metric][row]` over the frames."""
    figure = Figure(figsize=(9, 2.6 * len(curves)), layout="constrained")
    axes = figure.subplots(len(curves), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (metric, rows) in zip(axes, curves.items(), strict=True):
        for name, values in rows.items():
            axis.plot(values, label=name, linewidth=1.4)
        axis.set_ylabel(metric)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[-1].set_xlabel("frame")
    figure.suptitle(title)
    save_png(figure, path, 110)


def write_report(
    path: str | os.PathLike,
    pairs: Sequence[PairPictures],
    metrics: Mapping[str, Any],
    per_frame: Mapping[str, Sequence[Sequence[float]]],
    losses: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    title: str = "loki_jax demo",
) -> None:
    """Write the report: pictures of each pair, loss, HPF over time, the table.

    Args:
      pairs: pairs to show, two beside each other.
      metrics: rows "generated", "static", "refit" with "hpf", "hef", "psnr"; "pairs" with the same
        for each.
      per_frame: head-pose error in degrees by row, (pairs, frames).
      losses: (steps, values) by curve name.
    """
    sheets = [pair_sheet(pair) for pair in pairs]
    picture_rows = (len(sheets) + 1) // 2
    height = 4.4 * picture_rows + 4.6
    figure = Figure(figsize=(16, height), layout="constrained")
    grid = figure.add_gridspec(picture_rows + 1, 6, height_ratios=[4.4] * picture_rows + [4.2])
    for i, (pair, sheet) in enumerate(zip(pairs, sheets, strict=True)):
        axis = figure.add_subplot(grid[i // 2, 3 * (i % 2) : 3 * (i % 2) + 3])
        axis.imshow(sheet, interpolation="nearest")
        axis.set_axis_off()
        row = metrics["pairs"][i]
        axis.set_title(
            f"{pair.name}   HPF {row['generated']['hpf']:.2f} (static {row['static']['hpf']:.2f})   "
            f"HEF {row['generated']['hef']:.3f} (static {row['static']['hef']:.3f})   "
            f"PSNR {row['generated']['psnr']:.1f}",
            fontsize=9,
        )
        block = sheet.shape[0] / 4
        for k, label in enumerate(("driver", "driver map", "generated", "truth")):
            axis.text(2, block * (k + 0.5), label if k != 2 else "", fontsize=8, va="center")
        axis.text(2, block * 2 - 4, "reference", fontsize=8)

    axis = figure.add_subplot(grid[-1, :2])
    for name, (steps, values) in losses.items():
        axis.plot(steps, values, label=name, linewidth=1.2)
    axis.set_title("training loss (this run)")
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if losses:
        axis.legend(fontsize=8)

    axis = figure.add_subplot(grid[-1, 2:4])
    for name, rows in per_frame.items():
        errors = np.asarray(rows)
        line = axis.plot(np.nanmean(errors, 0), label=name, linewidth=1.6)[0]
        low, high = np.nanquantile(errors, (0.1, 0.9), 0)
        axis.fill_between(range(errors.shape[1]), low, high, color=line.get_color(), alpha=0.15)
    axis.set_title("head-pose error over time, mean and 10-90 % of pairs (degrees)")
    axis.set_xlabel("frame")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)

    axis = figure.add_subplot(grid[-1, 4:])
    axis.set_axis_off()
    axis.text(
        0, 0.95, format_table(metrics), family="monospace", fontsize=10, va="top", transform=axis.transAxes
    )
    figure.suptitle(title)
    save_png(figure, path, 100)


def format_table(metrics: Mapping[str, Any]) -> str:
    """The rows of `metrics` as text, columns HPF (degrees), HEF and PSNR (dB)."""
    names = {"generated": "generated", "static": "static", "refit": "re-fitted ground truth"}
    lines = [f"{'':24}{'HPF':>8}{'HEF':>9}{'PSNR':>9}"]
    for key, label in names.items():
        if key in metrics:
            cells = [
                "-" if metrics[key].get(field) is None else f"{metrics[key][field]:.{digits}f}"
                for field, digits in (("hpf", 2), ("hef", 4), ("psnr", 2))
            ]
            lines.append(f"{label:24}{cells[0]:>8}{cells[1]:>9}{cells[2]:>9}")
    return "\n".join(lines)


def save_png(figure: Figure, path: str | os.PathLike, dpi: int = 110) -> None:
    """Write a figure as PNG; a reader never sees half a file."""
    FigureCanvasAgg(figure)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=dpi, format="png")
