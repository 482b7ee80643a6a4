"""Writes docs/demo-trio.md and its plots from finished runs: python examples/demo_trio/report.py build/demo_trio/seed-*

The first run named is the one to ship: its models go into the package. The plots show them all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from rast.demo import MODELS, NAMES

DOCS = Path(__file__).resolve().parents[2] / "docs"
COLOURS = {
    "transfer": "tab:blue",
    "large-rl": "tab:green",
    "large-base": "tab:gray",
    "small-rl": "tab:orange",
    "no antiexpert": "tab:red",
}
MEANING = {
    "small-base": "small, before RL (the antiexpert)",
    "small-rl": "small, after RL (the expert)",
    "large-base": "large, before RL (the base)",
    "transfer": "**large-base + small-rl − small-base**",
    "large-rl": "large, after RL of its own (the ceiling)",
    "no antiexpert": "control: large-base + small-rl",
    "base, begun": "control: large-base, the first total given",
    "base, begun, no skips": "control: the same, and `…` forbidden",
    "base, matched entropy": "control: large-base at the temperature that gives the transfer's entropy",
    "expert, matched entropy": "control: small-rl, the same",
    "small-random": "small, after RL on coin tosses",
    "random rewards": "control: large-base + (small, after RL on coin tosses) − small-base",
}
CONTROLS = [name for name, meaning in MEANING.items() if meaning.startswith("control")]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def with_interval(figures: dict[str, Any]) -> str:
    low, high = figures["interval"]
    return f"{percent(figures['accuracy'])} [{percent(low)}, {percent(high)}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracy_table(runs: Sequence[dict[str, Any]]) -> str:
    head = ["", *(f"seed {run['seed']}, {how}" for run in runs for how in ("sampled", "greedy"))]
    rows = [
        [meaning, *(with_interval(run["systems"][name][how]) for run in runs for how in ("sampled", "greedy"))]
        for name, meaning in MEANING.items()
    ]
    return table(head, rows)


def example(run: dict[str, Any]) -> str:
    """The first of the numbers that a small model misreads."""
    number, found = next(iter(run["misread"]["numbers"].items()))
    return f"{number} for {found['taken_for']}"


def recovery_table(runs: Sequence[dict[str, Any]]) -> str:
    rows = []
    for how in ("sampled", "greedy"):
        rates = []
        for run in runs:
            found = run[how]
            rates.append(found["recovery"])
            rows.append(
                [
                    f"seed {run['seed']}, {how}",
                    f"{found['recovery']:.3f} [{', '.join(f'{v:.3f}' for v in found['recovery_interval'])}]",
                    f"{found['above_small_rl']:+.3f} "
                    f"[{', '.join(f'{v:+.3f}' for v in found['above_small_rl_interval'])}]",
                ]
            )
        rows.append([f"mean, {how}", f"{np.mean(rates):.3f}", ""])
    return table(["", "recovery rate", "transfer − small-rl"], rows)


def rivals(runs: Sequence[dict[str, Any]]) -> str:
    """A sentence on controls that are not below the transfer."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for name in CONTROLS:
            for how in ("sampled", "greedy"):
                if run["systems"][name][how]["accuracy"] >= run["systems"]["transfer"][how]["accuracy"]:
                    found.setdefault(f'"{MEANING[name].removeprefix("control: ")}", {how}', []).append(str(run["seed"]))
    if not found:
        return "At λ = 1 the transfer is above every control on every seed."
    lines = "; ".join(f"{name} (seed {', '.join(seeds)})" for name, seeds in found.items())
    return f"At λ = 1 the transfer is above every control on every seed, except: {lines}."


def without_antiexpert(runs: Sequence[dict[str, Any]]) -> str:
    """Sentences on the control without antiexpert at other λ."""
    best, crossings = [], []
    for run in runs:
        sweep = run["strength"]
        at = int(np.argmax(sweep["no antiexpert"]))
        best.append(
            f"{percent(sweep['no antiexpert'][at])} at λ = {sweep['values'][at]:g} "
            f"(transfer at λ = 1: {percent(sweep['transfer'][sweep['values'].index(1.0)])})"
        )
        crossings += [
            value
            for value, control, transfer in zip(sweep["values"], sweep["no antiexpert"], sweep["transfer"], strict=True)
            if value > 0 and control >= transfer
        ]
    text = f"a smaller λ does better: {'; '.join(best)}, by seed."
    if crossings:
        text += f" At the same λ it is not below the transfer for some seeds up to λ = {max(crossings):g}."
    return text


def misread_table(runs: Sequence[dict[str, Any]]) -> str:
    head = ["", *(f"seed {run['seed']}, {how}" for run in runs for how in ("sampled", "greedy"))]
    rows = []
    for name in ("small-rl", "transfer", "no antiexpert", "large-rl"):
        for part in ("without", "with"):
            cells = [
                percent(run["misread"]["accuracy"][name][how][part]) for run in runs for how in ("sampled", "greedy")
            ]
            rows.append([f"{name}, {part} a misread number", *cells])
    return table(head, rows)


def cured(runs: Sequence[dict[str, Any]]) -> str:
    """A sentence on what small-rl makes of the misread numbers."""
    parts = []
    for run in runs:
        numbers = run["misread"]["numbers"].values()
        cured = sum(number["small-rl"]["right"] >= 0.5 for number in numbers)
        leaks = np.mean([number["transfer"]["misread"] for number in numbers])
        parts.append(f"seed {run['seed']}: {cured} cured; misread by the transfer {percent(leaks)} %")
    return "; ".join(parts)


def pass_table(runs: Sequence[dict[str, Any]]) -> str:
    ks = (1, 2, 4, 8, 16, 32)
    rows = [
        [f"seed {run['seed']}, {name}", *(percent(run["pass_at_k"][name][k - 1]) for k in ks)]
        for run in runs
        for name in ("large-base", "small-rl", "transfer", "large-rl")
    ]
    return table(["pass@k, k =", *map(str, ks)], rows)


def pass_sentence(runs: Sequence[dict[str, Any]]) -> str:
    below = [
        f"k = {k + 1} on seed {run['seed']}"
        for run in runs
        for k, (t, b) in enumerate(zip(run["pass_at_k"]["transfer"], run["pass_at_k"]["large-base"], strict=True))
        if t < b
    ]
    return (
        f"is below large-base's at {', '.join(below)}." if below else "is above large-base's for every k from 1 to 32."
    )


def sweep_sentence(runs: Sequence[dict[str, Any]]) -> str:
    def span(sweep: str, low: float, high: float) -> str:
        values = [
            accuracy
            for run in runs
            for value, accuracy in zip(run[sweep]["values"], run[sweep]["transfer"], strict=True)
            if low <= value <= high
        ]
        return f"{percent(min(values))} to {percent(max(values))} %"

    return (
        f"Here the transfer's accuracy is {span('strength', 0.5, 1.5)} for λ from 0.5 to 1.5, over all "
        f"seeds, and {span('temperature', 0.1, 1.0)} for temperatures from 0.1 to 1: flatter in "
        "temperature, up to 1, than in λ. It falls "
        "from there, and that of large-rl does, too: every token of a solution must be right."
    )


def path_table(runs: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            f"seed {run['seed']}",
            percent(run["paths"]["path_coverage"]),
            f"{run['paths']['cosine']:.2f}",
            f"{run['paths']['cosine_where_covered']:.2f}",
            f"{run['paths']['cosine_where_not']:.2f}",
        ]
        for run in runs
    ]
    return table(["", "path coverage, %", "cosine of the deltas", "… where covered", "… where not"], rows)


def changed_table(runs: Sequence[dict[str, Any]]) -> str:
    names = sorted(
        {name for run in runs for name in run["changed"]["kinds"]},
        key=lambda name: -sum(run["changed"]["kinds"].get(name, 0) for run in runs),
    )
    rows = [["all", *(percent(run["changed"]["share"]) for run in runs)]]
    rows += [
        ["`{}` becomes `{}`".format(*name.split(" to "))]
        + [percent(run["changed"]["kinds"].get(name, 0)) for run in runs]
        for name in names
        if max(run["changed"]["kinds"].get(name, 0) for run in runs) >= 0.0005
    ]
    return table(["% of the transfer's greedy tokens", *(f"seed {run['seed']}" for run in runs)], rows)


def hf_table(runs: Sequence[dict[str, Any]]) -> str:
    rows = [
        [f"seed {run['seed']}, {how}", with_interval(run["hf"][how]["hf"]), with_interval(run["hf"][how]["rast"])]
        for run in runs
        for how in ("sampled", "greedy")
    ]
    return table(["transfer, float32", "HuggingFace loop", "rast"], rows)


def recipe_table(runs: Sequence[dict[str, Any]]) -> str:
    names = list(runs[0]["stages"])
    rows = []
    for name in names:
        cells = []
        for run in runs:
            stage = run["stages"][name]
            (what,) = (key for key in stage if key != "seconds")
            value = stage[what]
            cells.append(
                f"{what.replace('_', ' ')} {value if what == 'steps' else format(value, '.3f')}, {stage['seconds']} s"
            )
        rows.append([name, *cells])
    total = [f"{sum(stage['seconds'] for stage in run['stages'].values()) / 60:.0f} min" for run in runs]
    rows.append(["all", *total])
    return table(["stage", *(f"seed {run['seed']}" for run in runs)], rows)


def plots(runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Three SVG files; a line for each run."""
    plt.rcParams.update({"svg.hashsalt": "rast", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})

    def lines(file: str, series: dict[str, list[tuple[Sequence[float], Sequence[float]]]], x: str, y: str) -> None:
        figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
        for name, runs_of in series.items():
            for i, (xs, ys) in enumerate(runs_of):
                axes.plot(xs, ys, color=COLOURS[name], marker=".", lw=1, alpha=0.8, label=None if i else name)
        axes.set(xlabel=x, ylabel=y, ylim=(0, 1.02))
        axes.legend()
        figure.savefig(folder / file, metadata={"Date": None})
        plt.close(figure)

    ks = range(1, 1 + len(runs[0]["pass_at_k"]["transfer"]))
    lines(
        "pass-at-k.svg",
        {
            name: [(ks, run["pass_at_k"][name]) for run in runs]
            for name in ("transfer", "large-rl", "large-base", "small-rl")
        },
        "k",
        "pass@k",
    )
    for file, sweep, x in (("strength.svg", "strength", "λ"), ("temperature.svg", "temperature", "temperature")):
        names = [name for name in runs[0][sweep] if name != "values"]
        series = {name: [(run[sweep]["values"], run[sweep][name]) for run in runs] for name in names}
        lines(file, series, x, "accuracy, sampled")


def write(runs: Sequence[dict[str, Any]], docs: Path) -> None:
    """The page, its plots and its figures, from what `collect` gives."""
    target = docs / "demo-trio"
    target.mkdir(parents=True, exist_ok=True)
    (target / "results.json").write_text(json.dumps(runs, indent=1) + "\n")
    plots(runs, target)
    page = (Path(__file__).parent / "page.md").read_text()
    temperatures = (
        f"seed {run['seed']}: base {run['matched_temperature']['base']:.3g}, "
        f"expert {run['matched_temperature']['expert']:.3g}"
        for run in runs
    )
    parts = {
        "first": str(runs[0]["seed"]),
        "n": str(runs[0]["problems"]),
        "accuracy": accuracy_table(runs),
        "rivals": rivals(runs),
        "without_antiexpert": without_antiexpert(runs),
        "misread": misread_table(runs),
        "misread_share": ", ".join(percent(run["misread"]["share"]) for run in runs),
        "cured": cured(runs),
        "example": example(runs[0]),
        "temperatures": "; ".join(temperatures),
        "recovery": recovery_table(runs),
        "pass": pass_table(runs),
        "pass_sentence": pass_sentence(runs),
        "sweeps": sweep_sentence(runs),
        "changed": changed_table(runs),
        "paths": path_table(runs),
        "hf": hf_table(runs),
        "same": ", ".join(percent(run["hf"]["greedy"]["same_tokens"]) for run in runs),
        "recipe": recipe_table(runs),
    }
    for name, text in parts.items():
        page = page.replace(f"{{{{{name}}}}}", text)
    (docs / "demo-trio.md").write_text(page)


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights of each model in a folder."""
    return {name: hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest() for name in NAMES}


def collect(folder: Path) -> dict[str, Any]:
    """All that a finished run left behind."""
    run: dict[str, Any] = json.loads((folder / "results.json").read_text())
    run["seed"] = json.loads((folder / "recipe.json").read_text())["seed"]
    run["stages"] = json.loads((folder / "stages.json").read_text())
    run["weights"] = weights(folder)
    return run


def ship(folder: Path) -> None:
    """A run's models into the package."""
    for name in NAMES:
        target = MODELS / name
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted((folder / name).iterdir()):
            (target / file.name).write_bytes(file.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs; the first is the shipped one")
    folders = parser.parse_args().runs
    write([collect(folder) for folder in folders], DOCS)
    ship(folders[0])


if __name__ == "__main__":
    main()
