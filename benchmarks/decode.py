"""Decode speed of rast (trio, and base alone) beside HuggingFace's three-model loop and the memory's own speed.

    python benchmarks/decode.py --shape qwen1.5b+0.5b --batch 1 8
    python benchmarks/decode.py --model smollm2 --json result.json

All contestants take turns in one process, round by round; the table shows medians. See README.md here.
"""

from __future__ import annotations

import os
import sys

if "OPENBLAS_CORETYPE" in os.environ:  # it would bind NumPy's BLAS, read at import, to the code of another CPU
    del os.environ["OPENBLAS_CORETYPE"]
    os.execv(sys.executable, [sys.executable, *sys.argv])

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from models import TRIOS, random_trio, smollm2_gguf

import rast
from rast.cli.bench import MemoryRead

PROMPT_LENGTH = 32
MOST_OTHER_WORK = 0.05  # share of the cores beyond which the results are called not comparable


def cpu_name() -> str:
    """The CPU as Linux calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def rast_decode(model: Any, prompts: np.ndarray, tokens: int, **options: Any) -> float:
    """Tokens a second after the prompt: the time of a long generation less that of one new token."""

    def seconds(n: int) -> float:
        start = time.perf_counter()
        out = model.generate(
            prompts, max_new_tokens=n, do_sample=False, eos_token_id=None, num_assistant_tokens=0, **options
        )
        assert out.shape[1] == prompts.shape[1] + n
        return time.perf_counter() - start

    first = min(seconds(1) for _ in range(2))
    return len(prompts) * tokens / (seconds(tokens + 1) - first)


@torch.inference_mode()
def hf_decode(models: list[Any], coefficients: list[float], prompts: np.ndarray, tokens: int) -> float:
    """Tokens a second after the prompt of the usual loop: one cached forward a model, logits added up, argmax."""
    caches: list[Any] = [None] * len(models)
    ids = torch.from_numpy(prompts)

    def step() -> torch.Tensor:
        total = None
        for i, model in enumerate(models):
            out = model(ids, past_key_values=caches[i], use_cache=True, logits_to_keep=1)
            caches[i] = out.past_key_values
            part = out.logits[:, -1].float() * coefficients[i]
            total = part if total is None else total + part
        return total.argmax(dim=-1, keepdim=True)

    ids = step()
    start = time.perf_counter()
    for _ in range(tokens):
        ids = step()
    return len(prompts) * tokens / (time.perf_counter() - start)


class OtherWork:
    """What share of the machine's CPU time went to other processes (or other virtual machines) since it was made."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        tick = os.sysconf("SC_CLK_TCK")
        idle = fields[3] + fields[4]
        return sum(fields) / tick, (sum(fields) - idle) / tick, sum(os.times()[:2])

    def share(self) -> float:
        total, busy, own = (b - a for a, b in zip(self.start, self._now(), strict=True))
        return max(0.0, busy - own) / total if total else 0.0


def measure(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """`rounds` results each, taking turns; one round before them warms everything up and is not counted."""
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, run in contestants.items():
            value = run()
            if i:
                results[name].append(value)
            print(f"  {'round ' + str(i) if i else 'warm-up'}: {name} {value:.4g}", file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", choices=TRIOS, default="qwen1.5b+0.5b", help="random weights in these shapes")
    what.add_argument("--model", choices=["smollm2"], help="the real GGUF file as rast's base")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=32, help="new tokens that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="keep the models there (5 GB for qwen1.5b+0.5b)")
    parser.add_argument(
        "--quantization",
        nargs="+",
        choices=("int8", "int4", "int4-64"),
        default=[],
        help="also rast with these weights",
    )
    parser.add_argument("--no-hf", action="store_true", help="leave HuggingFace out")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    args = parser.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    shape = args.model or args.shape
    with tempfile.TemporaryDirectory() as scratch:
        folders = random_trio(args.folder or Path(scratch), shape)
        sources = (smollm2_gguf() if args.model else folders[0], *folders[1:])
        options: dict[str, Any] = dict(device="cpu", dtype="bfloat16", num_threads=args.threads)
        names = ["none", *args.quantization]  # "none": floats also where the file holds quantized weights
        trios = {
            name: rast.RastForCausalLM.from_pretrained(
                str(sources[0]), expert=str(sources[1]), antiexpert=str(sources[2]), quantization=name, **options
            )
            for name in names
        }
        hf = []
        if not args.no_hf:
            for folder in folders:
                hf.append(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval())
        gc.collect()
        info = trios["none"].info()
        weights = {name: [net["weight_bytes"] for net in trio.info()["nets"]] for name, trio in trios.items()}
        read = MemoryRead(args.threads, repeats=5)
        report: dict[str, Any] = {
            "shape": shape,
            "cpu": cpu_name(),
            "isa": info["isa"],
            "threads": args.threads,
            "rounds": args.rounds,
            "tokens": args.tokens,
            "dtype": "bfloat16",
            "weight_bytes": weights["none"],
            "quantized_weight_bytes": {name: weights[name] for name in args.quantization},
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "rast": rast.__version__,
            "batches": {},
        }
        machine = f"{report['cpu']}, {info['isa']}, {args.threads} threads"
        print(f"{shape}, bfloat16; {machine}; medians of {args.rounds} rounds")
        for batch in args.batch:
            prompts = np.random.default_rng(0).integers(0, info["vocab_size"], (batch, PROMPT_LENGTH))
            contestants: dict[str, Callable[[], float]] = {"memory read": read}
            parts = {}  # of each contestant, the bytes of its weights
            for name, trio in trios.items():
                suffix = "" if name == "none" else f" {name}"
                contestants |= {
                    f"rast trio{suffix}": lambda m=trio, p=prompts: rast_decode(m, p, args.tokens),
                    f"rast base{suffix}": lambda m=trio, p=prompts: rast_decode(
                        m, p, args.tokens, transfer_strength=0.0
                    ),
                }
                parts |= {f"rast trio{suffix}": weights[name], f"rast base{suffix}": weights[name][:1]}
            if hf:
                contestants["HF trio"] = lambda p=prompts: hf_decode(hf, [1.0, 1.0, -1.0], p, args.tokens)
                contestants["HF base"] = lambda p=prompts: hf_decode(hf[:1], [1.0], p, args.tokens)
                parts |= {"HF trio": weights["none"], "HF base": weights["none"][:1]}
            other_work = OtherWork()
            results = measure(contestants, args.rounds)
            others = other_work.share()
            median = {name: statistics.median(values) for name, values in results.items()}
            report["batches"][batch] = {"median": median, "all": results, "other_work": others}
            print(f"\nbatch {batch}; memory read {median['memory read'] / 1e9:.1f} GB/s")
            print(f"{'':18}{'tokens/s':>10}{'of roofline':>13}{'vs HF':>8}{'vs bf16':>9}")
            for name in [name for name in contestants if name != "memory read"]:
                share = median[name] / batch * sum(parts[name]) / median["memory read"]
                peer = median.get("HF" + name[4:9]) if name.startswith("rast") else None
                ratio = f"{median[name] / peer:7.2f}×" if peer else ""
                own = f"{median[name] / median[name[:9]]:7.2f}×" if name[:9] != name else ""
                print(f"{name:18}{median[name]:10.1f}{share:12.0%} {ratio:>8}{own:>9}")
            if others > MOST_OTHER_WORK:
                print(
                    f"NOT COMPARABLE: other processes took {others:.0%} of the cores; torch suffers most. Run it alone."
                )
        if args.json:
            args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
