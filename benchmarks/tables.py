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


def times(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f} ×" if a and b else "–"


def step_bytes(report: Report, name: str, batch: int) -> float:
    """What a step of the trio must read: all weights, and the keys and values of all sequences."""
    kv = report["contestants"][rasts(report)[0]]["kv_bytes_per_token"] if rasts(report) else [0]
    context = report["prompt_tokens"] + report["tokens"] / 2
    return sum(report["contestants"][name]["weight_bytes"]) + batch * context * sum(kv)


def decode_rows(report: Report) -> list[dict[str, Any]]:
    """The numbers of the table and the plot: one row for each batch size and each contestant that is rast."""
    rows = []
    first: dict[str, float] = {}
    for batch_name, batch_results in report["batches"].items():
        batch = int(batch_name)
        speed = {name: statistics.median(values) for name, values in batch_results["results"].items()}

        def share(name: str, batch: int = batch, speed: dict[str, float] = speed) -> float | None:
            got = speed.get(f"{name} trio")
            return got and got / batch * step_bytes(report, name, batch) / speed["memory"]

        for name in rasts(report):
            trio = speed[f"{name} trio"]
            first.setdefault(name, trio / batch if batch == 1 else 0)
            rows.append(
                {
                    "name": name,
                    "batch": batch,
                    "rast": trio,
                    "llama.cpp": speed.get("llama.cpp trio"),
                    "HuggingFace": speed.get("HuggingFace trio"),
                    "rast base": speed.get(f"{name} base"),
                    "llama.cpp base": speed.get("llama.cpp base"),
                    "rast share": share(name),
                    "llama.cpp share": share("llama.cpp"),
                    "HuggingFace share": share("HuggingFace"),
                    "growth": trio / first[name] if first[name] and batch > 1 else None,
                    "memory": speed["memory"],
                }
            )
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
            times(row["rast"], row["llama.cpp"]),
            times(row["rast"], row["HuggingFace"]),
            times(row["growth"], 1),
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
        speed = {name: statistics.median(values) for name, values in report["results"].items()}
        peers = [value for name, value in speed.items() if not name.startswith("rast")]
        for name in rasts(report):
            columns = [number(speed.get(other)) for other in (name, "llama.cpp", "HuggingFace")]
            better = times(speed[name], max(peers, default=None))
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
                    times(took, seconds.get("rast")),
                    f"{report['peak_bytes'][name] / 1e9:.2f}",
                    allowed,
                ]
            )
    head = ["models", "contestant", "best batch", "new tokens", "seconds", "tokens/s", "seconds : rast's"]
    return table([*head, "peak memory GB", "weights + KV budget + 0.2 GB"], rows)


def busy_table(reports: list[Report]) -> str:
    """Speeds in steps a second, over all steps."""
    rows = []
    for report in reports:
        for name, cases in report["step_seconds"].items():
            every = {case: [step for run in runs for step in run] for case, runs in cases.items()}
            speed = {case: 1 / (sum(steps) / len(steps)) for case, steps in every.items()}
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
                    times(columns[1], columns[2]),
                    longest,
                ]
            )
    head = ["models", "weights", "contestant", "quiet", "busy", "busy, one thread", "busy : one thread"]
    return table([*head, "longest step : median"], rows)


TABLES = {"decode": decode_table, "prefill": prefill_table, "workload": workload_table, "busy": busy_table}
