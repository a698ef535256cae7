"""Predicted weak scaling: the same work on each device, more and more devices."""

from __future__ import annotations

from pathlib import Path

from loki_jax.planning.report import local_plan, make_plan
from loki_jax.planning.work import Subject
from loki_jax.training.flops import Chip

# Parameters whole on each device, split within eight neighbours, split over all devices.
LAYOUTS = {"data": lambda n: (n, 1), "fsdp=8": lambda n: (n // 8, 8), "fsdp=all": lambda n: (1, n)}


def sweep(
    subject: Subject, chips: list[Chip], counts: list[int], windows: int, backends: dict[str, str],
    latents: bool, efficiency: float,
) -> list[dict]:  # fmt: skip
    """One row for each chip, layout and number of devices; the step is traced once.

    Efficiency is the time of a step without any network over the overlapped and the serial time.
    """
    local = local_plan(subject, windows, latents)
    rows = []
    for chip in chips:
        for layout, axes in LAYOUTS.items():
            for n in counts:
                data, fsdp = axes(n)
                if data < 1 or data * fsdp != n or (layout == "fsdp=all" and n == 8):
                    continue
                plan = make_plan(
                    subject, chip, data, fsdp, windows, backends[chip.name], latents=latents,
                    efficiency=efficiency, local=local,
                )  # fmt: skip
                time, memory = plan["time"], plan["memory"]
                rows.append({
                    "chip": chip.name, "layout": layout, "devices": n, "batch": plan["batch"],
                    "device_s": time["device"], "network_s": time["network"], "step_s": time["overlapped"],
                    "serial_s": time["serial"], "efficiency": time["device"] / time["overlapped"],
                    "serial_efficiency": time["device"] / time["serial"],
                    "windows_per_s": time["windows_per_second"], "peak_bytes": memory["peak"],
                    "fits": memory["fits"],
                })  # fmt: skip
    return rows


def format_sweep(rows: list[dict]) -> str:
    lines = [
        "chip     layout     devices   batch   device ms  network ms   step ms  serial ms  efficiency"
        "  windows/s  peak GB"
    ]
    for r in rows:
        lines.append(
            f"{r['chip']:8s} {r['layout']:10s} {r['devices']:7d} {r['batch']:7d} {1e3 * r['device_s']:11.1f} "
            f"{1e3 * r['network_s']:11.1f} {1e3 * r['step_s']:9.1f} {1e3 * r['serial_s']:10.1f} "
            f"{r['serial_efficiency']:4.0%}..{r['efficiency']:4.0%} {r['windows_per_s']:10.0f} "
            f"{r['peak_bytes'] / 1e9:8.1f}" + ("" if r["fits"] else "  does NOT fit")
        )
    return "\n".join(lines)


def draw_sweep(rows: list[dict], path: Path) -> None:
    """Predicted efficiency over the number of devices as a PNG, one panel a chip; hollow: memory is short."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chips = list(dict.fromkeys(r["chip"] for r in rows))
    figure, panels = pyplot.subplots(
        1, len(chips), figsize=(3.9 * len(chips), 3.7), squeeze=False, sharey=True
    )
    for panel, chip in zip(panels[0], chips, strict=True):
        mine = [r for r in rows if r["chip"] == chip]
        for layout in dict.fromkeys(r["layout"] for r in mine):
            line = [r for r in mine if r["layout"] == layout]
            devices = [r["devices"] for r in line]
            (serial,) = panel.plot(devices, [100 * r["serial_efficiency"] for r in line], label=layout)
            panel.plot(devices, [100 * r["efficiency"] for r in line], ls=":", color=serial.get_color())
            for r in line:
                fill = serial.get_color() if r["fits"] else "white"
                panel.plot(
                    r["devices"], 100 * r["serial_efficiency"], "o", ms=4, mec=serial.get_color(), mfc=fill
                )
        batch = mine[0]["batch"] // mine[0]["devices"]
        panel.set(title=f"{chip}, {batch} window{'s' * (batch > 1)} a device", xscale="log", xlabel="devices")
        ticks = sorted({r["devices"] for r in mine})
        panel.set_xticks(ticks, [str(n) for n in ticks], rotation=60, fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    lowest = min(100 * r["serial_efficiency"] for r in rows)
    panels[0][0].set(ylabel="step without network / step, %", ylim=(max(0, lowest - 8), 101))
    title = "solid: nothing overlaps\ndotted: planned overlap"
    panels[0][-1].legend(title=title, fontsize=7, title_fontsize=7, loc="lower left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
