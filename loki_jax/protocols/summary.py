"""Rows of an evaluation put together: weighted means with intervals, tables beside the paper's figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from loki_jax.metrics.failures import mean_with_failures
from loki_jax.metrics.fvd import frechet_distance
from loki_jax.metrics.intervals import paired_difference, weighted_interval
from loki_jax.protocols.manifest import PROTOCOLS


class Column(NamedTuple):
    """A metric in tables: its key in the rows, how it is called, format, whether lower is better, and whether
    it is of motion (else of looks).
    """

    key: str
    label: str
    form: str
    lower: bool = True
    motion: bool = True


COLUMNS = (
    Column("hpf", "HPF (degrees)", ".2f"),
    Column("hpf_aligned", "HPF, aligned", ".2f"),
    Column("absolute_pose", "absolute pose", ".2f"),
    Column("hef", "HEF", ".4f"),
    Column("gaze", "gaze (degrees)", ".2f"),
    Column("blendshapes", "blendshapes", ".4f"),
    Column("mediapipe_hpf", "HPF, MediaPipe", ".2f"),
    Column("rotation_jitter", "jitter (degrees)", ".2f", motion=False),
    Column("landmark_jitter", "jitter (%)", ".2f", motion=False),
    Column("flicker", "flicker", ".2f", motion=False),
    Column("identity_cosine", "identity, cosine", ".3f", False, False),
    Column("identity_distance", "identity, distance", ".3f", motion=False),
    Column("driver_distance", "distance to driver", ".3f", False, False),
    Column("psnr", "PSNR (dB)", ".2f", False, False),
    Column("ssim", "SSIM", ".4f", False, False),
    Column("lpips", "LPIPS", ".4f", motion=False),
    Column("fvd", "FVD", ".0f", motion=False),
)

Figures = tuple[float, float, float | None]  # HPF, HEF, cosine

# Figures that the authors drafted for HDTF, 212 identities: HPF, HEF, cosine of ArcFace. Their head is FLAME
# and their tracker another one, so only a run on the same clips with that head can be compared with them.
PAPER: dict[str, dict[str, Figures]] = {
    "same": {
        "Loki": (2.13, 0.0664, None), "HunyuanPortrait": (2.08, 0.0658, None),
        "X-Portrait": (2.14, 0.0652, None), "SadTalker": (3.42, 0.0811, None),
        "AniTalker": (3.10, 0.0963, None), "EchoMimic": (3.31, 0.0823, None),
    },
    "cross": {
        "Loki": (2.24, 0.0828, 0.791), "HunyuanPortrait": (2.19, 0.0850, 0.823),
        "X-Portrait": (2.94, 0.1053, 0.825), "SadTalker": (3.22, 0.1107, 0.921),
        "AniTalker": (3.03, 0.1134, 0.815), "EchoMimic": (3.27, 0.1156, 0.897),
    },
}  # fmt: skip


def summarise(
    rows: Sequence[Mapping[str, Any]], baseline: str = "still", features: Path | None = None
) -> dict[str, Any]:
    """Means of each protocol and system.

    Values are weighted by the share of frames tracked (method, section 10), and that share, the samples
    without any face, and the number of samples stand beside them. Intervals draw whole drivers, whose samples
    are alike. Systems are compared with the baseline sample by sample; "hpf_with_failures" and
    "hef_with_failures" are means in which frames without a face score as the baseline's sample.

    Args:
      features: folder of features for FVD.

    Returns:
      {protocol: {system: {"samples", "failed", "track_rate", metric: [mean, low, high], "against": {metric:
      {"difference": [mean, low, high], "samples", "p"}}}}}.
    """
    result: dict[str, Any] = {}
    for protocol in PROTOCOLS:
        systems = dict.fromkeys(row["system"] for row in rows if row["protocol"] == protocol)
        for system in systems:
            own = [row for row in rows if row["protocol"] == protocol and row["system"] == system]
            entry: dict[str, Any] = {
                "samples": len(own),
                "failed": sum(row["failed"] for row in own),
                "track_rate": float(np.mean([row["track_rate"] for row in own])),
            }
            for column in COLUMNS:
                # What needs no face is of the whole video.
                judged = [row for row in own if row.get(column.key) is not None]
                if judged:
                    values = np.array([row[column.key] for row in judged], np.float64)
                    entry[column.key] = weighted_interval(
                        values, _weights(judged, column.key), groups=[row["driver"] for row in judged]
                    )
            if features is not None and (distance := _video_distance(own, features / system, features)):
                entry["fvd"] = [distance]
            if system != baseline and baseline in systems:
                theirs = [r for r in rows if r["protocol"] == protocol and r["system"] == baseline]
                entry["against"] = _against(own, theirs)
                entry |= _with_failures(own, theirs)
            result.setdefault(protocol, {})[system] = entry
    return result


def _with_failures(
    rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> dict[str, list[float]]:
    theirs = {row["sample"]: row for row in others}
    result = {}
    for key in ("hpf", "hef"):
        values, drivers = [], []
        for row in rows:
            failure = theirs.get(row["sample"], {}).get(key)
            if failure is None:
                continue
            frames = row.get("per_frame", {}).get(key, [])
            errors = np.array([np.nan if value is None else value for value in frames], np.float64)
            values.append(mean_with_failures(errors, failure, row["frames"]))
            drivers.append(row["driver"])
        if values:
            result[f"{key}_with_failures"] = weighted_interval(np.array(values), groups=drivers)
    return result


def _weights(rows: Sequence[Mapping[str, Any]], key: str) -> Float[np.ndarray, " n"]:
    if key in ("psnr", "ssim", "lpips", "flicker"):
        return np.ones(len(rows))
    return np.array([row["track_rate"] for row in rows], np.float64)


def _against(rows: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    sides = list(rows), list(others)
    found = {}
    for column in COLUMNS:
        own, theirs = (
            {row["sample"]: row[column.key] for row in side if row.get(column.key) is not None}
            for side in sides
        )
        if compared := paired_difference(own, theirs):
            found[column.key] = compared
    return found


def _video_distance(rows: Sequence[Mapping[str, Any]], own: Path, features: Path) -> float | None:
    """FVD between a system's videos and the drivers; None where features are missing or too few."""
    files = [own / f"{row['sample']}.npy" for row in rows]
    drivers = [features / "drivers" / f"{name}.npy" for name in sorted({row["driver"] for row in rows})]
    if len(drivers) < 2 or len(files) < 2 or not all(path.exists() for path in (*files, *drivers)):
        return None
    return frechet_distance(*(np.stack([np.load(path) for path in side]) for side in (files, drivers)))


def shown_columns(systems: Mapping[str, Mapping[str, Any]]) -> list[list[Column]]:
    """The columns that any system of a protocol has: those of motion, and those of looks; none is empty."""
    present = [column for column in COLUMNS if any(column.key in entry for entry in systems.values())]
    groups = [[column for column in present if column.motion is motion] for motion in (True, False)]
    return [group for group in groups if group]


def _tables(summary: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], list[Column]]]:
    for protocol, systems in summary.items():
        for columns in shown_columns(systems):
            yield protocol, systems, columns


def _paper_rows(protocol: str, columns: Sequence[Column]) -> list[tuple[str, Figures]]:
    """Systems of the paper that have a figure for one of the columns."""
    rows = PAPER.get(protocol, {}).items()
    return [row for row in rows if any(_paper_cell(row[1], column) for column in columns)]


def markdown_tables(summary: Mapping[str, Any]) -> str:
    """Two tables a protocol: mean and 95 % interval; the paper's figures below."""
    parts = []
    for protocol, systems, columns in _tables(summary):
        what = "motion" if columns[0].motion else "looks"
        lines = [f"### {protocol}, {what}", "", "| system | samples | failed | tracked |" + _labels(columns)]
        lines.append("|---|" + "---:|" * (3 + len(columns)))
        for name, entry in systems.items():
            cells = [_cell(entry.get(column.key), column) for column in columns]
            head = f"| {name} | {entry['samples']} | {entry['failed']} | {100 * entry['track_rate']:.1f} % |"
            lines.append(head + "".join(f" {cell} |" for cell in cells))
        for name, figures in _paper_rows(protocol, columns):
            cells = [_paper_cell(figures, column) for column in columns]
            lines.append(f"| *{name}, paper* | 212 | | |" + "".join(f" {cell} |" for cell in cells))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _labels(columns: Sequence[Column]) -> str:
    arrow = lambda column: "↓" if column.lower else "↑"
    return "".join(f" {column.label} {arrow(column)} |" for column in columns)


def _cell(value: Sequence[float] | None, column: Column) -> str:
    if value is None:
        return "–"
    mean, *interval = (format(x, column.form) for x in value)
    return f"{mean} ({interval[0]} to {interval[1]})" if interval else mean


def _paper_cell(figures: Figures, column: Column) -> str:
    value = dict(zip(("hpf", "hef", "identity_cosine"), figures, strict=True)).get(column.key)
    if value is None:
        return ""
    # Another network than dlib's, whose cosines are higher.
    return format(value, column.form) + (" (ArcFace)" if column.key == "identity_cosine" else "")


def latex_tables(summary: Mapping[str, Any]) -> str:
    """The same for papers (booktabs): means, with half the width of the interval."""
    parts = []
    for protocol, systems, columns in _tables(summary):
        arrow = lambda column: r"$\downarrow$" if column.lower else r"$\uparrow$"
        lines = [
            f"% {protocol}",
            rf"\begin{{tabular}}{{l{'r' * (1 + len(columns))}}}",
            r"\toprule",
            " & ".join(["", "tracked", *(f"{c.label} {arrow(c)}" for c in columns)]) + r" \\",
            r"\midrule",
        ]
        for name, entry in systems.items():
            cells = [rf"{100 * entry['track_rate']:.1f}\,\%"]
            for column in columns:
                value = entry.get(column.key)
                if value is None:
                    cells.append("--")
                    continue
                spread = rf" $\pm$ {(value[2] - value[1]) / 2:{column.form}}" if len(value) == 3 else ""
                cells.append(f"{value[0]:{column.form}}{spread}")
            lines.append(" & ".join([name.replace("_", r"\_"), *cells]) + r" \\")
        if _paper_rows(protocol, columns):
            lines.append(r"\midrule")
        for name, figures in _paper_rows(protocol, columns):
            cells = [_paper_cell(figures, column) for column in columns]
            lines.append(" & ".join([f"{name} (paper)", "", *cells]) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(parts) + "\n"
