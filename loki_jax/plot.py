"""Curves of one or several training runs.

    python -m loki_jax.plot WORKDIR... --out curves.png
    python -m loki_jax.plot runs/hdtf runs/no_posenc --out curves.pdf --smooth 500

Draws what the runs logged in `metrics.jsonl`: training loss, validation loss, gradient norm, share of time
spent waiting for data, MFU, windows a second, and HPF and HEF of samples; quantities that no run has are left
out. A run may still be going. Pale lines are the logged values (each a mean over a logging interval), bold
ones their exponential average with a half-life of `--smooth` steps, of the logarithm where the axis is
logarithmic; the picture says so. Validation losses and sample metrics are drawn as they are.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import tyro
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from loki_jax.io import atomic_path
from loki_jax.training.logging import read_metrics


class PlotError(ValueError):
    """A workdir has nothing to draw, or the picture cannot be written; the message names the remedy."""


class Quantity(NamedTuple):
    """One panel: the key in `metrics.jsonl`, its title, how it is drawn."""

    key: str
    title: str
    smooth: bool = True
    log: bool = False
    percent: bool = False


QUANTITIES = (
    Quantity("loss", "training loss", log=True),
    Quantity("val_loss", "validation loss (fixed noise and timesteps)", smooth=False, log=True),
    Quantity("grad_norm", "gradient norm before clipping", log=True),
    Quantity("data_wait", "share of time waiting for data", percent=True),
    Quantity("mfu", "MFU: model FLOPs over the devices' peak", percent=True),
    Quantity("clips_per_s", "windows a second"),
    Quantity("sample_hpf", "HPF of samples (degrees)", smooth=False),
    Quantity("sample_hef", "HEF of samples", smooth=False),
)


class Run(NamedTuple):
    """A run's name and its curves: key -> (steps, values), steps ascending."""

    name: str
    curves: dict[str, tuple[np.ndarray, np.ndarray]]


def read_run(workdir: str | os.PathLike, name: str | None = None) -> Run:
    """The curves of a workdir.

    Raises:
      PlotError: no such folder, no metrics in it, or none that is drawn.
    """
    path = Path(workdir)
    file = path / "metrics.jsonl"
    if not path.is_dir():
        raise PlotError(f"{path}: no such folder. Give the --workdir of a run of loki_jax.train.")
    if not file.is_file():
        raise PlotError(f"{path}: no metrics.jsonl: no workdir of loki_jax.train, or its run has not begun.")
    try:
        rows = read_metrics(file)
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise PlotError(
            f"{file}: not a metrics file of loki_jax.train ({type(error).__name__}: {error})."
        ) from error
    curves = {}
    for quantity in QUANTITIES:
        points = [(row["step"], row[quantity.key]) for row in rows if quantity.key in row]
        points = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
        if points:
            steps, values = zip(*points, strict=True)
            curves[quantity.key] = np.array(steps, float), np.array(values, float)
    if not curves:
        raise PlotError(f"{file}: holds no values yet. Wait for the first log interval (config.log.every).")
    return Run(name or path.name, curves)


def run_names(workdirs: Sequence[str | os.PathLike]) -> list[str]:
    """Short names of the workdirs: as many last parts of each path as make them differ."""
    parts = [Path(workdir).absolute().parts for workdir in workdirs]
    for length in range(1, max(len(part) for part in parts) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise PlotError("the same workdir is given twice.")


def smoothed(
    steps: Float[np.ndarray, " n"], values: Float[np.ndarray, " n"], half_life: float
) -> Float[np.ndarray, " n"]:
    """Exponential average whose weights halve every `half_life` steps, without a start-up bias.

    The weights add up to one and depend on steps, not on rows, which may be uneven. half_life 0 returns the
    values.
    """
    if half_life <= 0:
        return values
    result, total, weight, last = np.empty_like(values), 0.0, 0.0, steps[0]
    for i, (step, value) in enumerate(zip(steps, values, strict=True)):
        keep = 0.5 ** ((step - last) / half_life)
        total, weight, last = total * keep + value, weight * keep + 1.0, step
        result[i] = total / weight
    return result


def draw_runs(runs: Sequence[Run], half_life: float | None = None) -> Figure:
    """A figure with a panel for every quantity that a run has.

    Args:
      half_life: of the smoothing, in steps; None: a fiftieth of the longest run.
    """
    longest = max(steps[-1] for run in runs for steps, _ in run.curves.values())
    half_life = longest / 50 if half_life is None else half_life
    shown = [quantity for quantity in QUANTITIES if any(quantity.key in run.curves for run in runs)]
    columns = min(len(shown), 3 if len(shown) > 4 else 2)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.3 * rows + 0.9), layout="constrained")
    shades = matplotlib.colormaps["turbo"](np.linspace(0, 1, len(runs)))
    colours = list(shades) if len(runs) > 10 else [f"C{i}" for i in range(len(runs))]
    for panel, quantity in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, panel, title=quantity.title, xlim=(0, 1.01 * longest))
        curves = {i: run.curves[quantity.key] for i, run in enumerate(runs) if quantity.key in run.curves}
        log = quantity.log and all((values > 0).all() for _, values in curves.values())
        for number, (steps, values) in curves.items():
            colour = colours[number]
            if half_life > 0 and quantity.smooth:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
                # One huge gradient would hang over a plain average for twenty half-lives on a log axis.
                scale, back = (np.log, np.exp) if log else (np.array, np.array)
                values = back(smoothed(steps, scale(values), half_life))
            axes.plot(steps, values, color=colour, marker="." if len(steps) < 40 else None)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if quantity.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.25)
    handles = [
        matplotlib.lines.Line2D([], [], color=colour, label=run.name)
        for run, colour in zip(runs, colours, strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(runs), 4))
    figure.supxlabel(
        f"step    (pale: as logged; bold: exponential average with a half-life of {half_life:,.4g} "
        "steps, of the logarithm on logarithmic axes)" if half_life > 0
        else "step    (as logged, not smoothed)",
        fontsize="small",
    )  # fmt: skip
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure, atomically; the suffix decides on the format.

    Raises:
      PlotError: an unknown suffix, or no such folder.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise PlotError(
            f"{path}: cannot write {path.suffix or 'files without a suffix'}; use .png, .pdf or .svg."
        )
    if not path.absolute().parent.is_dir():
        raise PlotError(f"{path}: no such folder {path.parent}. Make it first.")
    with atomic_path(path) as partial:
        figure.savefig(partial, format=kind)


@dataclass
class Options:
    """What `python -m loki_jax.plot` takes."""

    workdirs: tyro.conf.Positional[tuple[Path, ...]]
    """--workdir of one or several runs of loki_jax.train"""
    out: Path
    """picture to write: .png, .pdf or .svg"""
    smooth: float | None = None
    """half-life of the average in steps (default: a fiftieth of the longest run; 0: none)"""


def plot(options: Options) -> None:
    """Draw the runs and print their last values. Raises PlotError; nothing is written then."""
    if options.smooth is not None and not options.smooth >= 0:
        raise PlotError(f"--smooth {options.smooth:g}: a number of steps, 0 or above")
    names = run_names(options.workdirs)
    runs = [read_run(workdir, name) for workdir, name in zip(options.workdirs, names, strict=True)]
    save_figure(draw_runs(runs, options.smooth), options.out)
    for run in runs:
        last = {key: (int(steps[-1]), values[-1]) for key, (steps, values) in run.curves.items()}
        found = ", ".join(f"{key} {value:.4g}" for key, (_, value) in last.items())
        print(f"{run.name}: step {max(step for step, _ in last.values()):,}: {found}")
    print(f"wrote {options.out}")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        plot(tyro.cli(Options, prog="python -m loki_jax.plot", args=argv, description=__doc__))
    except PlotError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
