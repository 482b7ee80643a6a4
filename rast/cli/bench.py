"""`rast bench`: how fast models run on this machine, beside the speed at which it reads memory."""

from __future__ import annotations

import json
import os
import resource
import statistics
import time
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
    as_json: common.Json = False,
) -> None:
    """Measure tokens/s of prefill and decoding: the base alone and with its pairs, for all --batch and --threads.

    The roofline of decoding is the speed at which the same threads read memory, measured in the same rounds, over the
    bytes that a step must read: all weights of the models that run, and the KV cache of all sequences.
    """
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
            measured = _measure(model, size, prompt_tokens, new_tokens, rounds)
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


def _measure(model: rast.RastForCausalLM, batch: int, prompt: int, new: int, rounds: int) -> list[dict[str, Any]]:
    """A result for the base and, with pairs, the transfer. They and the memory take turns, after a warm-up."""
    info = model.info()
    nets = info["nets"]
    memory = MemoryRead(info["num_threads"])
    rng = np.random.default_rng(0)
    n_ids = min(net["vocab_size"] for net in nets)

    def seconds(n_new: int, **options: Any) -> float:
        ids = rng.integers(0, n_ids, (batch, prompt))  # fresh ones: nothing of them is cached
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=n_new, do_sample=False, eos_token_id=None, num_assistant_tokens=0, **options)
        return time.perf_counter() - start

    has_pairs = len(model.transfer_strength) > 0
    systems: dict[str, dict[str, Any]] = (
        {"base": {"transfer_strength": 0.0}, "transfer": {}} if has_pairs else {"base": {}}
    )
    read: list[float] = []
    prefill: dict[str, list[float]] = {name: [] for name in systems}
    decode: dict[str, list[float]] = {name: [] for name in systems}
    for i in range(rounds + 1):
        speed = memory()
        if i:
            read.append(speed)
        for name, options in systems.items():
            first = seconds(1, **options)
            rest = seconds(new + 1, **options) - first
            if i:
                prefill[name].append(batch * prompt / first)
                decode[name].append(batch * new / max(rest, 1e-9))

    results = []
    for name in systems:
        run = nets if name == "transfer" else nets[:1]
        context = prompt + new / 2
        step_bytes = sum(net["weight_bytes"] + batch * context * net["kv_bytes_per_token"] for net in run)
        tokens = statistics.median(decode[name])
        results.append(
            {
                "threads": info["num_threads"],
                "batch": batch,
                "system": name,
                "prefill_tokens_per_second": round(statistics.median(prefill[name]), 2),
                "decode_tokens_per_second": round(tokens, 2),
                "memory_bytes_per_second": round(statistics.median(read)),
                "roofline_share": round(tokens / batch * step_bytes / statistics.median(read), 4),
            }
        )
    return results


def _head(facts: dict[str, Any], prompt: int, new: int, rounds: int) -> str:
    roles = "; ".join(f"{', '.join(net['roles'])}: {net['source']}, {net['dtype']}" for net in facts["nets"])
    return (
        f"{roles}\n{facts['device']}, {facts['isa']}; {prompt} prompt tokens, {new} new; medians of {rounds} rounds\n\n"
        "threads  batch  system    prefill tok/s  decode tok/s  memory GB/s  of roofline"
    )


def _line(result: dict[str, Any]) -> str:
    return (
        f"{result['threads']:>7}  {result['batch']:>5}  {result['system']:<8}  "
        f"{result['prefill_tokens_per_second']:>13,.1f}  {result['decode_tokens_per_second']:>12,.1f}  "
        f"{result['memory_bytes_per_second'] / 1e9:>11.1f}  {result['roofline_share']:>11.0%}"
    )
