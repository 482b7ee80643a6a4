"""Plots of the benchmarks' results, as SVG."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib
from tables import Report, decode_rows, title, weights

matplotlib.use("svg")
from matplotlib import pyplot as plt

COLOURS = {"rast": "#1f6f8b", "llama.cpp": "#e08e45", "HuggingFace": "#9a9a9a"}


def draw_decode(reports: list[Report], path: Path) -> None:
    """Decoding of the trios: tokens a second for each batch size, and what reading memory alone would allow."""
    figure, grid = plt.subplots(1, len(reports), figsize=(3 * len(reports), 3.4), layout="constrained", squeeze=False)
    for axes, report in zip(grid[0], reports, strict=True):
        rows = [row for row in decode_rows(report) if row["name"] == "rast"]
        for i, (name, colour) in enumerate(COLOURS.items()):
            places = [x + (i - 1) * 0.27 for x, row in enumerate(rows) if row[name]]
            bars = axes.bar(places, [row[name] for row in rows if row[name]], 0.25, color=colour, label=name)
            axes.bar_label(bars, fmt="{:,.3g}", fontsize=7)
        for x, row in enumerate(rows):
            roof = row["rast"] / row["rast share"]
            axes.plot([x - 0.42, x + 0.42], [roof, roof], "k:", label=None if x else "memory read")
        axes.set_xticks(range(len(rows)), [f"batch {row['batch']}" for row in rows])
        axes.set_yscale("log")
        axes.set_title(f"{title(report)}\n{weights(report)}", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("tokens/s")
    grid[0][0].legend(fontsize=7, frameon=False)
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
