"""The report of an evaluation: one HTML file with everything in it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from loki_jax.face.asset import HeadAsset
from loki_jax.face.motion_file import read_motion
from loki_jax.face.types import Coefficients
from loki_jax.io import atomic_path
from loki_jax.metrics.hef import expression_maps
from loki_jax.pictures import resize_frames
from loki_jax.protocols.inputs import driver_file, reference_file
from loki_jax.protocols.manifest import Manifest, Sample
from loki_jax.protocols.summary import COLUMNS, Column, shown_columns
from loki_jax.video import LazyFrames, read_image

_TIMES = 6  # frames of each video that are shown
_EDGE = 112  # pixels of their pictures

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .7em; text-align: right }
th { border-bottom: 2px solid #888; font-weight: 600 } tr:nth-child(even) { background: #f4f4f4 }
td:first-child, th:first-child { text-align: left } .range { color: #777; font-size: 85% }
.best { font-weight: 700 } img { display: block; max-width: 100% }
details { border-top: 1px solid #ccc; padding: .5em 0 } summary { cursor: pointer }
.strip { display: grid; grid-template-columns: 8em auto; align-items: center; gap: 2px 8px }
"""


def write_report(
    path: Path,
    manifest: Manifest,
    folder: Path,
    out: Path,
    videos: Mapping[str, Path | None],
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    head: HeadAsset,
    pictures: int = 24,
) -> None:
    """Write the report, one file without links.

    Args:
      folder: of the manifest.
      out: of the results.
      videos: where each system's videos are; None: in the results.
      pictures: samples that are shown, the first ones of each protocol; figures are of all.
    """
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(manifest.name)}</title>",
        f"<style>{_STYLE}</style><h1>Evaluation: {html.escape(manifest.name)}</h1>",
        f"<p>{len(manifest.samples)} samples, {manifest.fps} fps, {manifest.size} pixels. Means are weighted "
        "by the share of frames in which the face was found; in brackets 95 % bootstrap intervals over "
        "samples; bold is the best value, baselines included.</p>",
    ]
    for protocol, systems in summary.items():
        parts.append(f"<h2>{protocol}</h2>")
        parts += [_table(systems, columns) for columns in shown_columns(systems)]
        parts += [_spread_plot(rows, protocol)]
        shown = [sample for sample in manifest.samples if sample.protocol == protocol]
        for sample in shown[: max(1, pictures // len(summary))]:
            parts.append(_sample(sample, manifest, folder, out, videos, rows, head))
    with atomic_path(path) as partial:
        partial.write_text("\n".join(parts) + "\n</html>\n")


def _table(systems: Mapping[str, Any], columns: Sequence[Column]) -> str:
    head = "".join(f"<th>{c.label} {'↓' if c.lower else '↑'}</th>" for c in columns)
    lines = [f"<table><tr><th>system<th>samples<th>failed<th>tracked{head}</tr>"]
    best = {}
    for column in columns:
        means = [entry[column.key][0] for entry in systems.values() if column.key in entry]
        best[column.key] = min(means) if column.lower else max(means)
    for name, entry in systems.items():
        cells = [name, entry["samples"], entry["failed"], f"{100 * entry['track_rate']:.1f} %"]
        line = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
        for column in columns:
            if column.key not in entry:
                line += "<td>–</td>"
                continue
            mean, *interval = (format(x, column.form) for x in entry[column.key])
            spread = f"<br><span class=range>{interval[0]} to {interval[1]}</span>" if interval else ""
            mark = " class=best" if entry[column.key][0] == best[column.key] else ""
            line += f"<td{mark}>{mean}{spread}</td>"
        lines.append(f"<tr>{line}</tr>")
    return "\n".join([*lines, "</table>"])


def _spread_plot(rows: Sequence[Mapping[str, Any]], protocol: str) -> str:
    """Every sample of every system, for each metric."""
    own = [row for row in rows if row["protocol"] == protocol]
    systems = list(dict.fromkeys(row["system"] for row in own))
    columns = [c for c in COLUMNS if any(row.get(c.key) is not None for row in own)]
    if not columns:
        return ""
    wide = 4
    high = -(-len(columns) // wide)
    figure = Figure(figsize=(3.6 * wide, 2.5 * high), layout="constrained")
    for position, column in enumerate(columns, 1):
        axes = figure.add_subplot(high, wide, position, title=column.label)
        values = [
            [r[column.key] for r in own if r["system"] == s and r.get(column.key) is not None]
            for s in systems
        ]
        present = [index for index, value in enumerate(values) if value]
        axes.boxplot([values[i] for i in present], positions=present, orientation="horizontal", widths=0.6)
        axes.set_yticks(range(len(systems)), systems, fontsize=8)
        axes.invert_yaxis()
        axes.grid(alpha=0.3, axis="x")
    return f"<p>Samples of each system: median, quartiles, range.</p>{_image(_pixels(figure))}"


def _sample(
    sample: Sample,
    manifest: Manifest,
    folder: Path,
    out: Path,
    videos: Mapping[str, Path | None],
    rows: Sequence[Mapping[str, Any]],
    head: HeadAsset,
) -> str:
    own = {row["system"]: row for row in rows if row["sample"] == sample.name}
    length = manifest.sources[sample.driver].frames
    times = np.unique(np.linspace(0, length - 1, _TIMES).round().astype(int))
    driver = LazyFrames(driver_file(folder, sample.driver))
    strips = [("portrait", _image(_thumbnails([read_image(reference_file(folder, sample.reference))])))]
    strips.append(("driver", _image(_thumbnails([driver[int(t)] for t in times]))))
    for system, row in own.items():
        place = videos.get(system)
        video = (out / "videos" / system if place is None else place) / f"{sample.name}.mp4"
        frames = LazyFrames(video, manifest.fps)
        shown = _thumbnails([frames[min(int(t), len(frames) - 1)] for t in times])
        label = "no face" if row["failed"] else f"HPF {row['hpf']:.2f}<br>HEF {row['hef']:.4f}"
        strips.append((f"{html.escape(system)}<br><span class=range>{label}</span>", _image(shown)))
        maps = _expression_maps(sample, system, out, head, times)
        if maps is not None:
            strips.append(
                ("<span class=range>its expression map, the driver's, difference</span>", _image(maps))
            )
    grid = "".join(f"<div>{label}</div><div>{image}</div>" for label, image in strips)
    return (
        f"<details><summary>{html.escape(sample.name)}</summary><div class=strip>{grid}</div>"
        f"{_image(_frame_plot(own))}</details>"
    )


def _frame_plot(own: Mapping[str, Mapping[str, Any]]) -> UInt8[np.ndarray, "h w 3"]:
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    for position, (key, label) in enumerate((("hpf", "HPF (degrees)"), ("hef", "HEF")), 1):
        axes = figure.add_subplot(1, 2, position, xlabel="frame", ylabel=label)
        for system, row in own.items():
            values = row.get("per_frame", {}).get(key)
            if values:
                axes.plot([np.nan if v is None else v for v in values], label=system, linewidth=1.3)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    return _pixels(figure)


def _expression_maps(
    sample: Sample, system: str, out: Path, head: HeadAsset, times: np.ndarray
) -> UInt8[np.ndarray, "h w 3"] | None:
    """HEF's maps of the mean head at those frames: length of the offset of the system, of the driver, and of
    their difference.
    """
    files = [
        out / "motions" / system / f"{sample.name}.npz",
        out / "motions" / "drivers" / f"{sample.driver}.npz",
    ]
    if not all(path.exists() for path in files):
        return None
    own, driver = (read_motion(path, head) for path in files)
    at = np.minimum(times, min(len(own.valid), len(driver.valid)) - 1)
    pick = lambda motion: Coefficients(*(jnp.asarray(np.asarray(x)[at]) for x in motion.coefficients))
    maps = expression_maps(head, pick(own), pick(driver), driver.camera, _EDGE)
    lengths = np.stack(
        [
            np.linalg.norm(x, axis=-1) * maps.mask
            for x in (maps.swapped, maps.target, maps.swapped - maps.target)
        ]
    )
    shades = matplotlib.colormaps["magma"](np.clip(lengths, 0, 1))[..., :3]
    rows = [np.concatenate(list((255 * row).astype(np.uint8)), axis=1) for row in shades]
    return np.concatenate(rows, axis=0)


def _thumbnails(frames: Sequence[np.ndarray]) -> UInt8[np.ndarray, "h w 3"]:
    return np.concatenate([resize_frames(frame[None], _EDGE)[0] for frame in frames], axis=1)


def _pixels(figure: Figure) -> UInt8[np.ndarray, "h w 3"]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _image(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """A picture within the page."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="WEBP", quality=80)
    return f'<img src="data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'
