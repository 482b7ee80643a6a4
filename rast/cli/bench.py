"""`rast bench`: how fast models run on this machine, beside the speed at which it reads memory."""

from __future__ import annotations

import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import numpy as np
import typer

import rast
from rast import _core
from rast.cli import common

_BUFFER = 256 << 20  # bytes a thread reads to measure the memory: more than caches hold


@common.loads_models("num_threads")
def bench(
    load: common.Load,
    batch: Annotated[list[int] | None, typer.Option(metavar="N", help="Sequences at once; may be repeated.")] = None,
    threads: Annotated[list[int] | None, typer.Option(metavar="N", help="Threads; may be repeated.")] = None,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", help="Random tokens of a prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to decode after it.")] = 32,
    rounds: Annotated[int, typer.Option(metavar="N", help="Of which the medians are shown.")] = 3,
    num_assistant_tokens: Annotated[str, typer.Option(metavar="N", help="Drafts a step, or auto.")] = "auto",
    as_json: common.Json = False,
) -> None:
    """Measure tokens/s of prefill and decoding: the base alone, with its pairs, and with drafts, for all --batch and
    --threads.

    Shown too: what a pass of each model takes, how often drafts stand, and the tokens of a step. Prompts are random
    tokens, so drafts of real text may stand more or less often.

    The roofline of decoding is the speed at which the same threads read memory, measured in the same rounds, over the
    bytes that a step must read: all weights of the models that run, and the KV cache of all sequences.
    """
    drafts = int(num_assistant_tokens) if num_assistant_tokens.isdecimal() else num_assistant_tokens
    batches, counts = batch or [1, 8], threads or [len(os.sched_getaffinity(0))]
    given = {"batch": batches, "threads": counts, "rounds": [rounds]}
    given |= {"prompt-tokens": [prompt_tokens], "new-tokens": [new_tokens]}
    for name, values in given.items():
        if min(values) < 1:
            raise ValueError(f"--{name} must be at least 1, not {min(values)}")
    results: list[dict[str, Any]] = []
    for n_threads in counts:
        model = load(num_threads=n_threads)
        if prompt_tokens + new_tokens + 1 > model.max_context:
            raise ValueError(
                f"--prompt-tokens {prompt_tokens} and --new-tokens {new_tokens} do not fit into the context of "
                f"{model.max_context} tokens"
            )
        facts = model.info()
        if facts["device"] != "cpu":
            raise ValueError(f"rast bench measures the CPU, and this is {facts['device']}: add --device cpu")
        if not results and not as_json:
            typer.echo(_head(facts, prompt_tokens, new_tokens, rounds))
        for size in batches:
            measured = _measure(model, size, prompt_tokens, new_tokens, rounds, drafts)
            results += measured
            if not as_json:
                typer.echo("\n".join(map(_line, measured)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not as_json:
        typer.echo(f"\nmost memory resident at once, mapped weights included: {peak / 2**30:.2f} GiB")
        return
    report = {
        "rast": rast.__version__,
        "isa": facts["isa"],
        "nets": facts["nets"],
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "peak_memory_bytes": peak,
        "results": results,
    }
    typer.echo(json.dumps(report, ensure_ascii=False))


class MemoryRead:
    """Bytes a second that `threads` threads read from memory together, by a loop in C that does nothing else."""

    def __init__(self, threads: int, repeats: int = 3) -> None:
        self._parts = [np.ones(_BUFFER, np.uint8) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)
        self._repeats = repeats

    def __call__(self) -> float:
        """The best of the repeats."""
        best = 0.0
        for _ in range(self._repeats):
            start = time.perf_counter()
            list(self._pool.map(_core.memory_read, self._parts))
            best = max(best, _BUFFER * len(self._parts) / (time.perf_counter() - start))
        return best


def _measure(
    model: rast.RastForCausalLM, batch: int, prompt: int, new: int, rounds: int, drafts: int | str
) -> list[dict[str, Any]]:
    """A result for the base and, with pairs, the transfer without and with drafts. They and the memory take turns,
    after a warm-up; so do, for the time of a pass, the base and each other model beside it."""
    info = model.info()
    nets = info["nets"]
    memory = MemoryRead(info["num_threads"])
    rng = np.random.default_rng(0)
    n_ids = min(net["vocab_size"] for net in nets)

    def generate(**options: Any) -> Callable[[Any, int], Any]:
        return lambda ids, n: model.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=None, **options)

    def beside_the_base(net: int) -> Callable[[Any, int], Any]:
        """Decodes with the sum of the base and one model more."""
        coef = np.zeros(len(nets), np.float32)
        coef[[0, net]] = 1
        engine = model._shared_engine()
        return lambda ids, n: engine.run([{"ids": row.astype(np.int32), "coef": coef, "max_new": n} for row in ids])

    if len(model.transfer_strength) > 0:
        systems = {
            "base": generate(transfer_strength=0.0, num_assistant_tokens=0),
            "transfer": generate(num_assistant_tokens=0),
            "drafts": generate(num_assistant_tokens=drafts),
        }
    else:
        systems = {"base": generate(num_assistant_tokens=0)}
    runs: dict[str | int, Callable[[Any, int], Any]] = {i: beside_the_base(i) for i in range(1, len(nets))}
    for name, run in systems.items():
        runs[name] = run
    read: list[float] = []
    prefill: dict[str | int, list[float]] = {name: [] for name in runs}
    decode: dict[str | int, list[float]] = {name: [] for name in runs}
    counts = dict.fromkeys(("drafted", "accepted", "rejected", "step_ns", "draft_ns"), 0)
    steps = 0  # of sequences, as decoded with drafts
    for i in range(rounds + 1):
        speed = memory()
        if i:
            read.append(speed)
        for key, run in runs.items():
            before = model.cache_info()
            taken = []
            for n in (1, new + 1):
                ids = rng.integers(0, n_ids, (batch, prompt))  # fresh ones: nothing of them is cached
                start = time.perf_counter()
                run(ids, n)
                taken.append(time.perf_counter() - start)
            if not i:
                continue
            prefill[key].append(taken[0])
            decode[key].append(max(taken[1] - taken[0], 1e-9))
            if key == "drafts":
                after = model.cache_info()
                for count in counts:
                    counts[count] += after[count] - before[count]
                steps += batch * new - (after["accepted"] - before["accepted"])

    seconds = {key: statistics.median(values) for key, values in decode.items()}
    passes = [seconds["base"] / new]
    passes += [max(seconds[net] - seconds["base"], 0) / new for net in range(1, len(nets))]
    results = []
    for name in systems:
        run_nets = nets[:1] if name == "base" else nets
        step_bytes = sum(
            net["weight_bytes"] + batch * (prompt + new / 2) * net["kv_bytes_per_token"] for net in run_nets
        )
        result: dict[str, Any] = {
            "threads": info["num_threads"],
            "batch": batch,
            "system": name,
            "prefill_tokens_per_second": round(batch * prompt / statistics.median(prefill[name]), 2),
            "decode_tokens_per_second": round(batch * new / seconds[name], 2),
            "memory_bytes_per_second": round(statistics.median(read)),
        }
        if name == "drafts":
            tried = counts["accepted"] + counts["rejected"]
            result["acceptance"] = round(counts["accepted"] / tried, 4) if tried else None
            result["tokens_per_step"] = round(1 + counts["accepted"] / steps, 4)
            result["drafting_share"] = round(counts["draft_ns"] / (counts["draft_ns"] + counts["step_ns"]), 4)
        else:
            result["roofline_share"] = round(new / seconds[name] * step_bytes / statistics.median(read), 4)
            result["pass_seconds"] = [round(s, 6) for s in passes[: len(run_nets)]]
        results.append(result)
    return results


def _head(facts: dict[str, Any], prompt: int, new: int, rounds: int) -> str:
    roles = "; ".join(f"{', '.join(net['roles'])}: {net['source']}, {net['dtype']}" for net in facts["nets"])
    return (
        f"{roles}\n{facts['device']}, {facts['isa']}; {prompt} prompt tokens, {new} new; medians of {rounds} rounds\n\n"
        "threads  batch  system    prefill tok/s  decode tok/s  memory GB/s  of roofline  ms of a pass"
    )


def _line(result: dict[str, Any]) -> str:
    line = (
        f"{result['threads']:>7}  {result['batch']:>5}  {result['system']:<8}  "
        f"{result['prefill_tokens_per_second']:>13,.1f}  {result['decode_tokens_per_second']:>12,.1f}  "
        f"{result['memory_bytes_per_second'] / 1e9:>11.1f}"
    )
    if result["system"] != "drafts":
        passes = ", ".join(f"{seconds * 1e3:.2f}" for seconds in result["pass_seconds"])
        return f"{line}  {result['roofline_share']:>11.0%}  {passes}"
    accepted = (
        "no draft was tried" if result["acceptance"] is None else f"{result['acceptance']:.0%} of the drafts stand"
    )
    return (
        f"{line}               {accepted}, {result['tokens_per_step']:.2f} tokens a step, "
        f"{result['drafting_share']:.0%} of the time for drafting"
    )
