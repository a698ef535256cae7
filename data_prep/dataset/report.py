"""How good the fits of a dataset are, measured on its records: a table, and a page of HTML."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from PIL import Image

from data_prep.dataset.summary import OVERLAYS, align, jitter_degrees, read_summary
from loki_jax.data.reader import Dataset, open_dataset, stack_frames
from loki_jax.data.schema import ClipInfo
from loki_jax.face.asset import HeadAsset
from loki_jax.io import atomic_path
from loki_jax.metrics.hpf import head_rotation

_EMBED_LIMIT = 48e6  # bytes of overlay clips in one HTML file
_THUMBNAIL = 112  # pixels
# An expression axis takes part in a clip if it moves by so many of its standard deviations.
_ACTIVE = 0.5
_ANGLES = ("yaw", "pitch", "roll")


class ClipReport(NamedTuple):
    """One clip of N frames.

    Attributes:
      angles: yaw, pitch and roll of the head with its neck, degrees; yaw to the subject's left, pitch
        down, roll to the subject's right shoulder positive.
      jitter: root mean square deviation of these angles from their centred 5-frame median, degrees.
      reach: 5 % and 95 % quantiles over the frames of each expression axis, in its standard deviations.
      opening: range of the jaw's rotation, degrees; of the axis jawOpen (in %) if the head has no jaw joint.
      closures: how often eyes shut, if the head has blink axes, else None.
      confidence: of each frame.
      fit: what `summary.json` says of the clip; empty without one.
      thumbnail: JPEG of the middle frame, or None in a dataset without images.
    """

    info: ClipInfo
    angles: Float[np.ndarray, "N 3"]
    jitter: float
    reach: Float[np.ndarray, "n_expr 2"]
    opening: float
    closures: int | None
    confidence: Float[np.ndarray, " N"]
    fit: dict[str, Any]
    thumbnail: bytes | None

    @property
    def active_axes(self) -> int:
        return int((self.reach[:, 1] - self.reach[:, 0] > _ACTIVE).sum())


def count_closures(weight: Float[np.ndarray, " N"], shut: float = 0.35, open_: float = 0.2) -> int:
    """How often a blink weight rises by `shut` above its 20 % quantile after having been below `open_`.

    The quantile is the open eye: narrow eyes have some of the blink axis at rest.
    """
    closures, armed = 0, True
    for value in weight - np.quantile(weight, 0.2):
        if armed and value > shut:
            closures, armed = closures + 1, False
        elif value < open_:
            armed = True
    return closures


def report_clip(dataset: Dataset, head: HeadAsset, info: ClipInfo, fit: dict[str, Any]) -> ClipReport:
    """Measure one clip on its records."""
    rows = range(info.first_record, info.first_record + info.length)
    frames = stack_frames(dataset.read(info.split, rows, with_image=False))
    rot, neck, expression, jaw = (
        np.asarray(getattr(frames.coefficients, name)) for name in ("rot", "neck", "expression", "jaw")
    )
    angles = head_rotation(rot, neck).as_euler("YXZ", degrees=True)
    names = [name.lower().replace("_", "") for name in head.expression_names]
    if head.joint("jaw") is not None:
        opening = float(np.degrees(np.ptp(jaw[:, 0])))
    elif "jawopen" in names:
        opening = 100 * float(np.ptp(expression[:, names.index("jawopen")]))
    else:
        opening = 0.0
    blinks = [k for k, name in enumerate(names) if name.startswith("eyeblink")]
    middle = dataset.read(info.split, [rows[len(rows) // 2]])[0].image
    quantiles = np.quantile(expression, [0.05, 0.95], axis=0)
    return ClipReport(
        info=info,
        angles=angles,
        jitter=jitter_degrees(angles),
        reach=quantiles.T / np.asarray(head.expression_sigma)[:, None],
        opening=opening,
        closures=count_closures(expression[:, blinks].mean(1)) if blinks else None,
        confidence=np.asarray(frames.confidence),
        fit=fit,
        thumbnail=None if middle is None else _thumbnail(middle),
    )


def _thumbnail(image: UInt8[np.ndarray, "S S 3"]) -> bytes:
    file = io.BytesIO()
    small = Image.fromarray(image).resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    small.save(file, "JPEG", quality=85)
    return file.getvalue()


# --- the table ----------------------------------------------------------------------------------------

_COLUMNS = (
    "clip", "split", "frames", "error %", "p90 %", "jitter", "yaw", "pitch", "roll", "axes", "jaw", "blinks",
    "confidence", "face",
)  # fmt: skip


def table_row(clip: ClipReport) -> tuple[str, ...]:
    """The cells of `_COLUMNS`; "-" where nothing is known."""

    def shown(key: str, form: str, scale: float = 1.0) -> str:
        value = clip.fit.get(key)
        return "-" if value is None else format(scale * value, form)

    low, high = clip.angles.min(0), clip.angles.max(0)
    return (
        clip.info.clip_id, clip.info.split, str(clip.info.length), shown("error_percent", ".2f"),
        shown("error_percent_p90", ".2f"), f"{clip.jitter:.2f}",
        *(f"{a:.0f}..{b:.0f}" for a, b in zip(low, high, strict=True)),
        str(clip.active_axes), f"{clip.opening:.0f}", "-" if clip.closures is None else str(clip.closures),
        f"{np.median(clip.confidence):.2f}", shown("face_share", ".0f", 100.0),
    )  # fmt: skip


def format_table(clips: list[ClipReport]) -> str:
    """The clips as aligned text, and a last line with medians."""
    lines = align([_COLUMNS, *map(table_row, clips)])
    return "\n".join([*lines, *(f"{name}: {value}" for name, value in totals(clips).items())])


def totals(clips: list[ClipReport]) -> dict[str, str]:
    """Figures of the whole dataset, ready to print."""
    frames = sum(clip.info.length for clip in clips)
    seconds = sum(clip.info.length / float(clip.info.fps) for clip in clips)
    angles = np.concatenate([clip.angles for clip in clips])
    errors = [clip.fit["error_percent"] for clip in clips if "error_percent" in clip.fit]
    spread = np.quantile(angles, [0.05, 0.95], axis=0).T
    found = {
        "clips": f"{len(clips)} of {len({clip.info.identity for clip in clips})} identities",
        "frames": f"{frames} ({seconds / 60:.1f} minutes)",
        "median jitter": f"{np.median([clip.jitter for clip in clips]):.2f} degrees",
    }
    if errors:
        found["median error"] = f"{np.median(errors):.2f} % of the outer eye corners' distance"
    for name, (low, high) in zip(_ANGLES, spread, strict=True):
        found[f"{name}, 5 to 95 %"] = f"{low:.0f} to {high:.0f} degrees"
    return found


# --- the plots ----------------------------------------------------------------------------------------


def draw_plots(clips: list[ClipReport], names: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """Captions and PNG files: errors and jitter, pose, expression."""
    colour = "#3b6ea5"
    angles = np.concatenate([clip.angles for clip in clips])

    quality = Figure(figsize=(10, 2.8), layout="constrained")
    values_of = {
        "median error of a clip, %": [c.fit["error_percent"] for c in clips if "error_percent" in c.fit],
        "jitter of a clip, degrees": [clip.jitter for clip in clips],
        "confidence of a frame": np.concatenate([clip.confidence for clip in clips]).tolist(),
        "length of a clip, seconds": [clip.info.length / float(clip.info.fps) for clip in clips],
    }
    for axis, (label, values) in zip(quality.subplots(1, 4), values_of.items(), strict=True):
        if values:
            axis.hist(values, bins=min(40, max(8, len(values) // 2)), color=colour)
        else:
            axis.text(0.5, 0.5, "not known", ha="center", transform=axis.transAxes)
        axis.set_xlabel(label)

    pose = Figure(figsize=(10, 3.2), layout="constrained")
    *histograms, joint = pose.subplots(1, 4)
    for axis, values, label in zip(histograms, angles.T, _ANGLES, strict=True):
        axis.hist(values, bins=60, range=(-60, 60), color=colour)
        axis.set_xlabel(f"{label}, degrees (frames)")
    counts, *_ = np.histogram2d(angles[:, 1], angles[:, 0], bins=48, range=[[-48, 48], [-72, 72]])
    joint.imshow(np.log1p(counts), extent=(-72, 72, -48, 48), origin="lower", aspect="auto", cmap="viridis")
    joint.set(xlabel="yaw, degrees", ylabel="pitch (log of frames)")

    reach = np.stack([clip.reach for clip in clips])
    expression = Figure(figsize=(10, 0.6 + 0.14 * len(names)), layout="constrained")
    axis = expression.subplots()
    positions = np.arange(len(names))
    together = reach[..., 1].max(0) - reach[..., 0].min(0)
    axis.barh(positions, together, color="#c9d8e8", label="all clips together")
    axis.barh(positions, np.median(np.ptp(reach, axis=-1), axis=0), color=colour, label="median clip")
    axis.set_yticks(positions, names, fontsize=6)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set_xlabel("range of the axis (5 to 95 % of a clip's frames), in standard deviations of its prior")
    axis.legend(loc="lower right")

    plots = []
    for caption, figure in {
        "Quality and length": quality,
        "Head pose": pose,
        "Expression": expression,
    }.items():
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=90)
        plots.append((caption, file.getvalue()))
    return plots


# --- the page -----------------------------------------------------------------------------------------

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; max-width: 1400px }
table { border-collapse: collapse; margin: 1em 0 }
th { text-align: left; position: sticky; top: 0; background: #fff }
td, th { padding: 3px 10px 3px 0; border-bottom: 1px solid #e4e4e4; vertical-align: top; white-space: nowrap }
td.reason { white-space: normal } td.number { text-align: right; font-variant-numeric: tabular-nums }
img.thumb { width: 72px; display: block } video { width: 288px; display: block } .high { color: #b00020 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px } dd { margin: 0 }
"""


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _overlay_tag(path: Path, page: Path, how: str) -> str:
    if how == "none" or not path.is_file():
        return ""
    if how == "embed":
        source = _data_uri("video/mp4", path.read_bytes())
    else:
        source = html.escape(os.path.relpath(path, page.parent).replace(os.sep, "/"), quote=True)
    return f'<video src="{source}" controls loop muted preload="metadata"></video>'


def _cell(text: str, kind: str = "") -> str:
    return f'<td class="{kind}">{html.escape(text)}</td>' if kind else f"<td>{html.escape(text)}</td>"


def _definitions(values: dict[str, str]) -> str:
    return "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in values.items())


def render_page(
    dataset: Dataset, clips: list[ClipReport], summary: dict[str, Any], page: Path, overlays: str = "auto"
) -> str:
    """The HTML text of a report that will be written to `page`; worst clips first."""
    videos = {
        clip.info.clip_id: dataset.path / OVERLAYS / f"{clip.info.clip_id}.mp4" for clip in clips
    }  # fmt: skip
    if overlays == "auto":
        size = sum(video.stat().st_size for video in videos.values() if video.is_file())
        overlays = "embed" if size < _EMBED_LIMIT else "link"
    limit = summary["settings"].get("max_error", np.inf)
    rows = ""
    for clip in sorted(clips, key=lambda c: -c.fit.get("error_percent", c.jitter)):
        picture = ""
        if clip.thumbnail is not None:
            picture = f'<img class="thumb" alt="" src="{_data_uri("image/jpeg", clip.thumbnail)}">'
        near = "number high" if clip.fit.get("error_percent", 0) > 80 * limit else "number"
        kinds = ["", "", "number", near, *["number"] * (len(_COLUMNS) - 4)]
        cells = "".join(map(_cell, table_row(clip), kinds))
        video = _overlay_tag(videos[clip.info.clip_id], page, overlays)
        rows += f"<tr><td>{picture}</td>{cells}<td>{video}</td></tr>"
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS)
    plots = "".join(
        f'<h2>{caption}</h2><img alt="{caption}" src="{_data_uri("image/png", picture)}">'
        for caption, picture in draw_plots(clips, dataset.head().expression_names)
    )
    settings = {str(key): json.dumps(value) for key, value in summary["settings"].items()}
    rejected = "".join(
        f"<tr>{_cell(entry['clip'])}{_cell(entry['reason'], 'reason')}</tr>" for entry in summary["rejected"]
    )
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Fits of {html.escape(dataset.path.name)}</title>
<style>{_STYLE}</style>
<h1>Fits of {html.escape(dataset.path.name)}</h1>
<dl>{_definitions(totals(clips))}</dl>
{plots}
<h2>Clips, the worst first</h2>
<p>error: median reprojection error of the inner face over the outer eye corners' distance, p90 its 90 %
quantile over frames; jitter, yaw, pitch, roll: degrees; axes: expression axes that move; jaw: range of its
opening, degrees (or % of jawOpen); face: % of frames in which it was seen. Red: above 80 % of the limit.</p>
<table><tr><th></th>{heads}<th>overlay</th></tr>{"".join(rows)}</table>
<h2>Rejected: {len(summary["rejected"])}</h2>
<table>{rejected}</table>
<h2>Settings and thresholds</h2>
<dl>{_definitions(settings)}</dl>
</html>
"""


def make_report(path: Path, page: Path, overlays: str = "auto") -> tuple[list[ClipReport], dict[str, Any]]:
    """Write the report of the dataset `path` to `page`, atomically; returns its clips and its summary.

    Raises:
      DatasetError: `path` is no complete dataset.
    """
    dataset = open_dataset(path)
    summary = read_summary(path)
    by_clip = {row["clip"]: row for row in summary["clips"]}
    head = dataset.head()
    clips = [report_clip(dataset, head, info, by_clip.get(info.clip_id, {})) for info in dataset.clips]
    text = render_page(dataset, clips, summary, page, overlays)
    with atomic_path(page) as partial:
        partial.write_text(text)
    return clips, summary
