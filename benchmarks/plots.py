"""Plots of the benchmarks' results, as SVG."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib
from tables import Report, decode_rows, number, title, weights

matplotlib.use("svg")
from matplotlib import pyplot as plt

COLOURS = {"rast": "#1f6f8b", "llama.cpp": "#e08e45", "HuggingFace": "#9a9a9a"}


def draw_decode(reports: list[Report], path: Path) -> None:
    """Decoding of the trios for each batch size: the share of the memory's read speed, with tokens a second above."""
    columns = min(len(reports), 3)
    size = (3.2 * columns, 2.8 * -(-len(reports) // columns))
    figure, grid = plt.subplots(-(-len(reports) // columns), columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[len(reports) :]:
        axes.set_visible(False)
    for axes, report in zip(grid.flat, reports, strict=False):
        rows = [row for row in decode_rows(report) if row["name"] == "rast"]
        for i, (name, colour) in enumerate(COLOURS.items()):
            shown = [(x, row) for x, row in enumerate(rows) if row[name]]
            places, shares = [x + (i - 1) * 0.27 for x, _ in shown], [100 * row[f"{name} share"] for _, row in shown]
            bars = axes.bar(places, shares, 0.25, color=colour, label=name)
            axes.bar_label(bars, [number(row[name]) for _, row in shown], fontsize=7)
        axes.set_xticks(range(len(rows)), [f"batch {row['batch']}" for row in rows])
        axes.set_ylim(0, 115)
        axes.axhline(100, color="black", linestyle=":", linewidth=1)
        axes.set_title(f"{title(report)}\n{weights(report)}", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("% of the memory's read speed\n(above the bars: tokens/s)", fontsize=8)
    grid[0][0].legend(fontsize=7, frameon=False, loc="upper right", bbox_to_anchor=(1.05, 0.95))
    _save(figure, path)


def draw_workload(reports: list[Report], path: Path) -> None:
    """Wall time and peak memory of the real workload."""
    figure, grid = plt.subplots(len(reports), 2, figsize=(7, 1.8 * len(reports)), layout="constrained", squeeze=False)
    for (left, right), report in zip(grid, reports, strict=True):
        seconds = {name: statistics.median(values) for name, values in report["seconds"].items()}
        _bars(left, seconds, "seconds")
        _bars(right, {name: peak / 1e9 for name, peak in report["peak_bytes"].items()}, "peak memory, GB")
        left.set_title(f"{title(report)}, {weights(report)}", fontsize=8)
    _save(figure, path)


def _bars(axes: Any, values: dict[str, float], label: str) -> None:
    bars = axes.barh(list(values), list(values.values()), color=[COLOURS[name] for name in values])
    axes.bar_label(bars, fmt="{:,.3g}", fontsize=8, padding=2)
    axes.set_xlabel(label)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    with plt.rc_context({"svg.hashsalt": "rast"}):  # the same results give the same file
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


PLOTS = {"decode": draw_decode, "workload": draw_workload}
