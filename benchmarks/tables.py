"""Results of the benchmarks as Markdown tables. Medians and ratios are made here; the files hold what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Report = dict[str, Any]

MODELS = {
    "qwen1.5b+0.5b": "Qwen2.5 shapes, 1.5B + 2 × 0.5B",
    "smollm2": "SmolLM2 shapes, 3 × 135M",
    "tiny": "tiny, 3 × 4M",
}
WEIGHTS = {16: "bf16", 8: "Q8_0", 4: "Q4_0"}
ALLOWANCE = 200e6  # bytes beyond weights and KV cache that rast should not need


def title(report: Report) -> str:
    forced = f", {report['forced_isa'].upper()} only" if report["forced_isa"] else ""
    return MODELS[report["trio"]] + forced


def rasts(report: Report) -> list[str]:
    """Rast's contestants: with the peers' weights, or with its own quantization of the same models."""
    return [name for name in report["contestants"] if name.startswith("rast")]


def weights(report: Report, name: str = "rast") -> str:
    """What a row compares: "int8 : Q8_0" where the contestant does not use the peers' type."""
    kind = WEIGHTS[report["bits"]]
    return kind if name == "rast" else f"{name.split()[1]} : {kind}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Numbers to the right: all columns but the first."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times(ratio: float | None) -> str:
    return f"{ratio:.2f} ×" if ratio else "–"


def over(a: Sequence[float] | None, b: Sequence[float] | None) -> float | None:
    """The median of the rounds' own ratios, which changes in the machine's speed between rounds do not touch."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True)) if a and b else None


def median(values: Sequence[float] | None) -> float | None:
    return statistics.median(values) if values else None


def step_bytes(report: Report, name: str, batch: int) -> float:
    """What a step of the trio must read: all weights, and the keys and values of all sequences."""
    kv = report["contestants"][rasts(report)[0]]["kv_bytes_per_token"] if rasts(report) else [0]
    context = report["prompt_tokens"] + report["tokens"] / 2
    return sum(report["contestants"][name]["weight_bytes"]) + batch * context * sum(kv)


def decode_rows(report: Report) -> list[dict[str, Any]]:
    """The numbers of the table and the plot: one row for each batch size and each contestant that is rast."""
    rows = []
    first: dict[str, list[float]] = {}
    for batch_name, batch_results in report["batches"].items():
        batch = int(batch_name)
        speeds = batch_results["results"]
        for name in rasts(report):
            row: dict[str, Any] = {"name": name, "batch": batch, "memory": median(speeds["memory"])}
            ours = speeds[f"{name} trio"]
            for column, contestant in (("rast", name), ("llama.cpp", "llama.cpp"), ("HuggingFace", "HuggingFace")):
                trio = speeds.get(f"{contestant} trio")
                per_byte = over(trio, speeds["memory"])
                row[column] = median(trio)
                row[f"{column} base"] = median(speeds.get(f"{contestant} base"))
                row[f"{column} share"] = per_byte and per_byte / batch * step_bytes(report, contestant, batch)
                row[f"rast : {column}"] = over(ours, trio)
            if batch == 1:
                first[name] = ours
            row["growth"] = over(ours, first.get(name)) if batch > 1 else None
            rows.append(row)
    return sorted(rows, key=lambda row: len(row["name"]))  # stable: the peers' weights first


def decode_table(reports: list[Report]) -> str:
    """Speeds in tokens a second, with shares of the roofline."""

    def speed(row: dict[str, Any], name: str) -> str:
        return f"{number(row[name])} ({row[f'{name} share']:.0%})" if row[name] else "–"

    rows = [
        [
            title(report),
            weights(report, row["name"]),
            str(row["batch"]),
            speed(row, "rast"),
            speed(row, "llama.cpp"),
            speed(row, "HuggingFace"),
            times(row["rast : llama.cpp"]),
            times(row["rast : HuggingFace"]),
            times(row["growth"]),
            number(row["rast base"]),
            number(row["llama.cpp base"]),
            f"{row['memory'] / 1e9:.1f}",
        ]
        for report in reports
        for row in decode_rows(report)
    ]
    head = ["models", "weights", "batch", "rast", "llama.cpp", "HuggingFace", "rast : llama.cpp", "rast : HuggingFace"]
    return table([*head, "against batch 1", "rast, base alone", "llama.cpp, base alone", "memory GB/s"], rows)


def prefill_table(reports: list[Report]) -> str:
    rows = []
    for report in reports:
        speeds = report["results"]
        for name in rasts(report):
            columns = [number(median(speeds.get(other))) for other in (name, "llama.cpp", "HuggingFace")]
            ratios = [over(speeds[name], values) for other, values in speeds.items() if not other.startswith("rast")]
            better = times(min((ratio for ratio in ratios if ratio), default=None))
            rows.append([title(report), weights(report, name), str(report["prompt_tokens"]), *columns, better])
    head = ["models", "weights", "prompt tokens", "rast", "llama.cpp", "HuggingFace", "rast : the better"]
    return table(head, rows)


def workload_table(reports: list[Report]) -> str:
    rows = []
    for report in reports:
        new = report["prompts"] * report["samples"] * report["tokens"]
        seconds = {name: statistics.median(values) for name, values in report["seconds"].items()}
        for name, took in seconds.items():
            facts = report["contestants"][name]
            budget = facts.get("kv_budget_bytes")
            allowed = f"{(sum(facts['weight_bytes']) + budget + ALLOWANCE) / 1e9:.2f}" if budget else "–"
            trials = report["trials"].get(name)
            rows.append(
                [
                    f"{title(report)}, {weights(report)}",
                    name,
                    str(trials[0]["batch"]) if trials else "–",
                    str(report["tokens"]),
                    number(took),
                    number(new / took),
                    times(over(report["seconds"][name], report["seconds"].get("rast"))),
                    f"{report['peak_bytes'][name] / 1e9:.2f}",
                    allowed,
                ]
            )
    head = ["models", "contestant", "best batch", "new tokens", "seconds", "tokens/s", "seconds : rast's"]
    return table([*head, "peak memory GB", "weights + KV budget + 0.2 GB"], rows)


def busy_table(reports: list[Report]) -> str:
    """Speeds in steps a second: of each round's steps together, then the rounds' median."""
    rows = []
    for report in reports:
        for name, cases in report["step_seconds"].items():
            every = {case: [step for run in runs for step in run] for case, runs in cases.items()}
            speed = {case: median([len(run) / sum(run) for run in runs]) for case, runs in cases.items()}
            columns = [speed.get(case) for case in ("quiet", "busy", "busy, one thread")]
            busy = "did not finish" if name in report["did_not_finish"] else number(columns[1])
            longest = f"{max(every['busy']) / statistics.median(every['busy']):.1f} ×" if "busy" in every else "–"
            rows.append(
                [
                    title(report),
                    weights(report),
                    name,
                    number(columns[0]),
                    busy,
                    number(columns[2]),
                    times(columns[1] / columns[2] if columns[1] and columns[2] else None),
                    longest,
                ]
            )
    head = ["models", "weights", "contestant", "quiet", "busy", "busy, one thread", "busy : one thread"]
    return table([*head, "longest step : median"], rows)


TABLES = {"decode": decode_table, "prefill": prefill_table, "workload": workload_table, "busy": busy_table}
