"""Speed of rast on a GPU (trio, and base alone) beside HuggingFace's three-model loop, the device memory's speed and
cuBLAS's on a large product, with the time of each kernel.

    python benchmarks/gpu.py --shape qwen7b+1.5b --batch 1 8

All contestants take turns in one process, round by round; the table shows medians. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from models import TRIOS, random_trio
from turns import measure

import rast

PROMPT_LENGTH = 32


def copy_bandwidth(device: str, megabytes: int = 1024) -> float:
    """Bytes a second, read and written, of a large copy on the device; best of 10."""
    source = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    best = 0.0
    for _ in range(10):
        wait()
        start = time.perf_counter()
        target.copy_(source)
        wait()
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


def product_speed(device: str, size: int = 8192) -> float:
    """Operations a second of a large bfloat16 product; best of 10."""
    a, b = (torch.ones(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    best = 0.0
    for _ in range(10):
        wait()
        start = time.perf_counter()
        torch.matmul(a, b)
        wait()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def operations(folder: Path) -> int:
    """Of a prompt's token: two for each element of the layers' matrices. Attention and the head come on top."""
    config = json.loads((folder / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    q, kv = heads * head, config.get("num_key_value_heads", heads) * head
    return int(2 * config["num_hidden_layers"] * hidden * (2 * q + 2 * kv + 3 * config["intermediate_size"]))


def rast_prefill(model: Any, prompts: np.ndarray, **options: Any) -> float:
    """Prompt tokens a second until the first new token. Prompts differ from call to call: nothing is found again."""
    prompts = (prompts + np.random.default_rng().integers(1, 1000)) % 4000
    start = time.perf_counter()
    model.generate(prompts, max_new_tokens=1, do_sample=False, eos_token_id=None, num_assistant_tokens=0, **options)
    return prompts.size / (time.perf_counter() - start)


def rast_decode(model: Any, prompts: np.ndarray, tokens: int, **options: Any) -> float:
    """Tokens a second after the prompt: the time of a long generation less that of one new token."""

    def seconds(n: int) -> float:
        start = time.perf_counter()
        plain = dict(do_sample=False, eos_token_id=None, num_assistant_tokens=0)
        out = model.generate(prompts, max_new_tokens=n, **plain, **options)
        assert out.shape[1] == prompts.shape[1] + n
        return time.perf_counter() - start

    first = min(seconds(1) for _ in range(2))
    return len(prompts) * tokens / (seconds(tokens + 1) - first)


@torch.inference_mode()
def hf_loop(models: list[Any], coefficients: list[float], prompts: np.ndarray, tokens: int, device: str) -> float:
    """Tokens a second after the prompt of the usual loop: one cached forward a model, logits added up, argmax."""
    caches: list[Any] = [None] * len(models)
    ids = torch.from_numpy(prompts).to(device)
    start = 0.0
    for i in range(tokens + 1):
        total: Any = 0
        for m, model in enumerate(models):
            out = model(ids, past_key_values=caches[m], use_cache=True, logits_to_keep=1)
            caches[m] = out.past_key_values
            total = total + out.logits[:, -1].float() * coefficients[m]
        ids = total.argmax(dim=-1, keepdim=True)
        if i == 0:
            ids.cpu()  # waits for the device
            start = time.perf_counter()
    ids.cpu()
    return len(prompts) * tokens / (time.perf_counter() - start)


def kernel_table(model: Any, prompts: np.ndarray) -> str:
    """Time of each kernel over 32 decoding steps."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    rast_decode(model, prompts, 8)
    with torch.profiler.profile(activities=activities) as profile:
        model.generate(prompts, max_new_tokens=33, do_sample=False, eos_token_id=None, num_assistant_tokens=0)
    return str(profile.key_averages().table(sort_by="cuda_time_total", row_limit=30))


def run(folders: tuple[Path, Path, Path], args: argparse.Namespace, device: str) -> dict[str, Any]:
    """All results, and a table on the terminal."""
    base, expert, antiexpert = map(str, folders)
    model = rast.RastForCausalLM.from_pretrained(
        base, expert=expert, antiexpert=antiexpert, device="cuda", dtype="bfloat16"
    )
    info = model.info()
    bytes_of = [net["weight_bytes"] for net in info["nets"]]
    load = transformers.AutoModelForCausalLM.from_pretrained
    dtype = {"torch_dtype" if transformers.__version__.startswith("4.") else "dtype": torch.bfloat16}
    others = [] if args.no_hf else [load(f, **dtype).to(device).eval() for f in folders]
    print(f"{info['isa']}; {args.shape}, bfloat16, greedy; medians of {args.rounds} rounds")
    print("batch  what         tokens/s  of bandwidth  prefill tokens/s  of cuBLAS's peak")
    work = [operations(folder) for folder in folders]
    results: dict[str, Any] = {"device": info["isa"], "shape": args.shape, "batches": {}}
    for batch in args.batch:
        rng = np.random.default_rng(batch)
        prompts = rng.integers(0, 4000, (batch, PROMPT_LENGTH))
        long = rng.integers(0, 4000, (batch, args.prompt_tokens))
        contestants = {
            "bandwidth": lambda: copy_bandwidth(device),
            "products": lambda: product_speed(device),
            "rast trio": lambda p=prompts: rast_decode(model, p, args.tokens),
            "rast base": lambda p=prompts: rast_decode(model, p, args.tokens, transfer_strength=0),
            "prefill trio": lambda p=long: rast_prefill(model, p),
            "prefill base": lambda p=long: rast_prefill(model, p, transfer_strength=0),
        }
        if others:
            contestants["HF trio"] = lambda p=prompts: hf_loop(others, [1.0, 1.0, -1.0], p, args.tokens, device)
            contestants["HF base"] = lambda p=prompts: hf_loop(others[:1], [1.0], p, args.tokens, device)
        measured = measure(contestants, args.rounds)
        results["batches"][batch] = measured
        median = {name: statistics.median(values) for name, values in measured.items()}
        for name in ("rast trio", "HF trio", "rast base", "HF base"):
            if name not in median:
                continue
            weights = sum(bytes_of) if name.endswith("trio") else bytes_of[0]
            share = weights * median[name] / batch / median["bandwidth"]
            line = f"{batch:>5}  {name:<10} {median[name]:>10.1f} {share:>12.0%}"
            if name.startswith("rast"):
                speed = median[name.replace("rast", "prefill")]
                peak = speed * (sum(work) if name.endswith("trio") else work[0]) / median["products"]
                line += f"  {speed:>16,.0f} {peak:>17.0%}"
            print(line)
    if not args.no_kernels:
        print(kernel_table(model, np.random.default_rng(0).integers(0, 4000, (args.batch[0], PROMPT_LENGTH))))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=TRIOS, default="qwen7b+1.5b", help="random weights in these shapes")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens that are timed")
    parser.add_argument("--prompt-tokens", type=int, default=2048, help="of the prefill")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-kernels", action="store_true", help="without the time of each, by torch's profiler")
    parser.add_argument("--no-hf", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--weights", type=Path, help="keep the random weights in this folder")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU")
    with tempfile.TemporaryDirectory() as scratch:
        results = run(random_trio(args.weights or Path(scratch), args.shape), args, "cuda")
        gc.collect()
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
