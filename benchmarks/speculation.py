"""Speculative transfer beside plain transfer and beside the base alone.

    python benchmarks/speculation.py --size 5 --folder models

Expert is SmolLM2-135M, antiexpert a copy with disturbed normalisation weights. The base is SmolLM2 grown to `--size`
times the cost of one small model by layers that hardly change the residual stream: what they add is `--noise` strong,
which sets how often drafts stand, while text stays text. Its costs are those of a model with as many weights.
With `--demo` the models are the demonstration's, and the texts its solutions.

The column "predicted" is the speed-up over plain transfer by the bytes of the models alone: with k drafts a step reads
the expert k + 1 times and the others once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from gpu_costs import TRIOS
from models import smollm2_gguf
from turns import measure

import rast
from rast.demo import evaluate, paths
from rast.demo.problems import problems

PROMPTS = (
    "Why is the sky blue? Answer in two sentences.",
    "Write a short story about a lighthouse keeper.",
    "Explain how to make a cup of tea, step by step.",
    "What is the capital of France, and what is it known for?",
)
NORM_NOISE = 0.05  # of the antiexpert
COUNTS = ("drafted", "accepted", "rejected", "steps", "draft_steps", "step_ns", "draft_ns")


def small_model(folder: Path) -> Any:
    """SmolLM2 as transformers loads it, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    gguf = smollm2_gguf()
    return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """A folder with the model and SmolLM2's tokenizer."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    gguf = smollm2_gguf()
    folder.mkdir(parents=True, exist_ok=True)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))  # last: it marks the folder as complete
    return folder


def make_models(root: Path, size: float, noise: float) -> tuple[Path, Path, Path]:
    """Folders of base, expert and antiexpert, made where they are not there."""
    import torch

    expert, antiexpert = root / "small", root / f"small-{NORM_NOISE}"
    base = root / f"grown-{size:g}-{noise:g}"
    if all((folder / "config.json").exists() for folder in (base, expert, antiexpert)):
        return base, expert, antiexpert
    model = small_model(root)
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config.pop("quantization_config", None)  # of the file it came from
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    generator = torch.Generator().manual_seed(0)
    save(expert, config, tensors)

    def disturbed(t: Any) -> Any:
        return (t.float() * (1 + NORM_NOISE * torch.randn(t.shape, generator=generator))).to(t.dtype)

    save(antiexpert, config, {k: disturbed(v) if "norm" in k else v for k, v in tensors.items()})

    n_layers = config["num_hidden_layers"]
    layer = {k.removeprefix("model.layers.0."): v for k, v in tensors.items() if k.startswith("model.layers.0.")}
    per_layer = sum(v.numel() for v in layer.values())
    added = round((size - 1) * sum(v.numel() for v in tensors.values()) / per_layer)
    for i in range(n_layers, n_layers + added):
        for name, like in layer.items():
            if "norm" in name:
                new = torch.ones_like(like)
            else:
                strength = noise if name.startswith(("self_attn.o_proj", "mlp.down_proj")) else 1.0
                new = torch.randn(like.shape, generator=generator) * strength / like.shape[1] ** 0.5
            tensors[f"model.layers.{i}.{name}"] = new.to(like.dtype)
    save(base, config | {"num_hidden_layers": n_layers + added}, tensors)
    return base, expert, antiexpert


def best_drafts(base: float, small: float, acceptance: float) -> tuple[int, float]:
    """(k, speed-up over plain transfer) of the best number of drafts, where a pass takes the bytes of its weights."""

    def gain(k: int) -> float:
        tokens = (1 - acceptance ** (k + 1)) / (1 - acceptance)
        return tokens * (base + 2 * small) / (base + small + (k + 1) * small)

    return max(((k, gain(k)) for k in range(1, 13)), key=lambda found: found[1])


def print_table() -> None:
    """Predictions for pairs of real sizes, as Markdown."""
    shares = (0.6, 0.7, 0.8, 0.9)
    print("| base + pair | " + " | ".join(f"a = {a:g}" for a in shares) + " |")
    print("|---|" + "---:|" * len(shares))
    for base, small in TRIOS:
        plain = (base.weight_bytes + 2 * small.weight_bytes) / base.weight_bytes
        cells = []
        for a in shares:
            k, gain = best_drafts(base.weight_bytes, small.weight_bytes, a)
            cells.append(f"{gain:.2f} × ({gain / plain:.2f} ×), k = {k}")
        print(f"| {base.name} + 2 × {small.name} | " + " | ".join(cells) + " |")


class Decoder:
    """Tokens a second of one way to decode, after the prompts; and what became of its drafts. prompts: batches."""

    def __init__(self, model: rast.RastForCausalLM, prompts: list[list[Any]], tokens: int, **options: Any):
        self.model, self.prompts, self.tokens, self.options = model, prompts, tokens, options
        self.counts = dict.fromkeys(COUNTS, 0)

    def _seconds(self, prompt: list[Any], n: int) -> float:
        before = self.model.cache_info()
        start = time.perf_counter()
        out = self.model.generate(prompt, max_new_tokens=n, eos_token_id=None, **self.options)
        assert out.shape[1] == max(map(len, prompt)) + n
        seconds = time.perf_counter() - start
        after = self.model.cache_info()
        for name in COUNTS:
            self.counts[name] += after[name] - before[name]
        return seconds

    @property
    def acceptance(self) -> float:
        """How often a draft stands whose predecessors all stood."""
        tried = self.counts["accepted"] + self.counts["rejected"]
        return self.counts["accepted"] / tried if tried else float("nan")

    @property
    def tokens_per_step(self) -> float:
        """One, and what stood."""
        return 1 + self.counts["accepted"] / self.counts["steps"]

    def predicted(self, base: float, small: float) -> float:
        """Speed-up over plain transfer, if time were the bytes of the weights."""
        passes = self.counts["draft_steps"] / self.counts["steps"]
        checks = base + small + (small if passes == 0 else 0)
        return self.tokens_per_step * (base + 2 * small) / (checks + passes * small)

    def __call__(self) -> float:
        """Of all prompts together."""
        seconds = sum(self._seconds(p, self.tokens + 1) - self._seconds(p, 1) for p in self.prompts)
        return sum(map(len, self.prompts)) * self.tokens / seconds


class Solver:
    """Tokens a second of solutions to the demonstration's problems, to their ends, `batch` of them at once."""

    def __init__(self, model: rast.RastForCausalLM, batch: int, do_sample: bool, drafts: int | str):
        asked = list(islice(problems("test", 0), max(40, batch)))
        self.model, self.batches = model, [asked[i : i + batch] for i in range(0, len(asked), batch)]
        self.options: dict[str, Any] = {"do_sample": do_sample, "num_assistant_tokens": drafts}
        self.drafted = self.accepted = self.steps = self.tokens = 0

    def __call__(self) -> float:
        tokens, start = 0, time.perf_counter()
        for asked in self.batches:
            before = self.model.cache_info()
            out = evaluate.attempt(self.model, asked, **self.options)
            tokens += sum(map(len, out.new_tokens()))
            self.accepted += self.model.cache_info()["accepted"] - before["accepted"]
            self.drafted += self.model.cache_info()["accepted"] - before["accepted"]
            self.drafted += self.model.cache_info()["rejected"] - before["rejected"]
            self.steps += int(out.steps.sum())
        self.tokens += tokens
        return tokens / (time.perf_counter() - start)


def measure_demo(rounds: int) -> None:
    """Prints speed and acceptance of the demonstration's trio, as Markdown."""
    folders = paths()
    model = rast.RastForCausalLM.from_pretrained(
        folders["large-base"], expert=folders["small-rl"], antiexpert=folders["small-base"], device="cpu"
    )
    print("| | batch | plain, tok/s | auto, tok/s | ratio | acceptance | tokens a step |\n|---|" + "---:|" * 6)
    for do_sample in (False, True):
        for batch in (1, 8, 32):
            ways = {str(k): Solver(model, batch, do_sample, k) for k in (0, "auto")}
            speed = {name: statistics.median(values) for name, values in measure(dict(ways), rounds).items()}
            auto = ways["auto"]
            print(
                f"| {'sampled' if do_sample else 'greedy'} | {batch} | {speed['0']:,.0f} | {speed['auto']:,.0f} | "
                f"{speed['auto'] / speed['0']:.2f} × | {auto.accepted / max(auto.drafted, 1):.0%} | "
                f"{auto.tokens / auto.steps:.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=5, help="cost of the base in small models")
    parser.add_argument("--noise", type=float, default=0.05, help="strength of the added layers")
    parser.add_argument("--folder", type=Path, help="the models are kept there")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1, help="sequences at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drafts", nargs="*", default=["auto"], help="numbers of drafts to measure, or auto")
    parser.add_argument("--sample", action="store_true", help="draw at temperature 1 (default: greedy)")
    parser.add_argument("--lookup", action="store_true", help="also the base alone with drafts from earlier tokens")
    parser.add_argument("--demo", action="store_true", help="measure the demonstration's models")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", action="store_true", help="only print the predictions for larger models")
    args = parser.parse_args()
    if args.table:
        print_table()
        return
    if args.demo:
        measure_demo(args.rounds)
        return
    if not args.folder:
        parser.error("--folder is needed")
    base, expert, antiexpert = make_models(args.folder, args.size, args.noise)
    model = rast.RastForCausalLM.from_pretrained(base, expert=expert, antiexpert=antiexpert, device="cpu")
    assert model.tokenizer is not None
    prompts = [
        np.array(
            model.tokenizer.encode(
                model.tokenizer.apply_chat_template([{"role": "user", "content": text}]), add_special_tokens=False
            )
        )
        for text in PROMPTS
    ]
    how: dict[str, Any] = {"do_sample": args.sample, "seed": 0, "top_k": 0} if args.sample else {"do_sample": False}
    batches = [prompts[i : i + args.batch] for i in range(0, len(prompts), args.batch)]
    if args.batch > len(prompts):
        batches = [[prompts[i % len(prompts)] for i in range(args.batch)]]
    contestants = {
        "base alone": Decoder(model, batches, args.tokens, transfer_strength=0.0, num_assistant_tokens=0, **how),
        "plain": Decoder(model, batches, args.tokens, num_assistant_tokens=0, **how),
    }
    if args.lookup:
        contestants["base, auto"] = Decoder(model, batches, args.tokens, transfer_strength=0.0, **how)
    for k in args.drafts:
        number = k if k == "auto" else int(k)
        contestants[f"drafts {k}"] = Decoder(model, batches, args.tokens, num_assistant_tokens=number, **how)
    results = measure(dict(contestants), args.rounds)
    median = {name: statistics.median(values) for name, values in results.items()}
    how_drawn = "sampled" if args.sample else "greedy"
    print(f"\nbase {args.size:g} × the small model, {how_drawn}, batch {args.batch}")
    columns = ("tokens/s", "vs plain", "predicted", "vs base", "acceptance", "tokens/step", "drafting")
    print(f"{'':12}" + "".join(f"{column:>12}" for column in columns))
    base_bytes, small_bytes = (net["weight_bytes"] for net in model.info()["nets"][:2])
    report = {}
    for name, decoder in contestants.items():
        speed, counts = median[name], decoder.counts
        time_drafting = counts["draft_ns"] / (counts["draft_ns"] + counts["step_ns"])
        print(
            f"{name:12}{speed:12.1f}{speed / median['plain']:11.2f}×{decoder.predicted(base_bytes, small_bytes):11.2f}×"
            f"{speed / median['base alone']:11.2f}×{decoder.acceptance:12.0%}{decoder.tokens_per_step:12.2f}"
            f"{time_drafting:12.0%}"
        )
        report[name] = {"tokens_per_s": results[name], "acceptance": decoder.acceptance, **counts}
    if args.json:
        args.json.write_text(
            json.dumps({"size": args.size, "batch": args.batch, "sample": args.sample, "results": report}, indent=1)
        )


if __name__ == "__main__":
    sys.exit(main())
