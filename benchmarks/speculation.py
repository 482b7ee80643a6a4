"""Speculative transfer beside plain transfer and beside the base alone.

    python benchmarks/speculation.py --size 5 --folder models
    python benchmarks/speculation.py --demo --batch 8

Expert is SmolLM2-135M, antiexpert a copy with disturbed normalisation weights. The base is SmolLM2 grown to `--size`
times the cost of one small model by layers that hardly change the residual stream: what they add is `--noise` strong,
which sets how often drafts stand, while text stays text. Its costs are those of a model with as many weights.
With `--demo` the models are the demonstration's, and the texts its solutions.

In a round all take short turns, forth and back, so that changes in the machine's speed meet all alike. Reported are
medians over the rounds, of ratios within each, with their quartiles in brackets. With `--json` rounds are added to
those that the file has already, so a long measurement can be made in pieces.

The column "by bytes" is the speed-up over plain transfer at batch 1 by the bytes of the models alone: with k drafts a
step reads the expert k + 1 times and the others once. For "predicted" a check of so many rows takes as much longer than
one of a single row as a plain step of so many sequences does, which is measured beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from gpu_costs import TRIOS
from models import smollm2_gguf

import rast
from rast.demo import evaluate, paths
from rast.demo.problems import problems

PROMPTS = (
    "Why is the sky blue? Answer in two sentences.",
    "Write a short story about a lighthouse keeper.",
    "Explain how to make a cup of tea, step by step.",
    "What is the capital of France, and what is it known for?",
    "Describe a walk through a forest in autumn.",
    "How does a bicycle stay upright?",
    "Write a letter to a friend who has moved to another city.",
    "What should one pack for a week in the mountains?",
    "Explain what a database index is good for.",
    "Tell me about the life of Johann Sebastian Bach.",
    "Give three reasons to learn a second language.",
    "How do vaccines work?",
    "Write a poem about the sea.",
    "What is the difference between weather and climate?",
    "Plan a dinner for six people, one of whom eats no meat.",
    "Why did the Roman Empire fall?",
    "Explain to a child why we have leap years.",
    "Write the opening of a detective novel.",
    "How is paper made?",
    "What makes a good teacher?",
    "Summarise the story of Romeo and Juliet.",
    "How can I sleep better?",
    "Describe the taste of an orange without naming it.",
    "What does a compiler do?",
    "Write a dialogue between a cat and a dog.",
    "How do I repair a flat tyre?",
    "What are the planets of the solar system, in order?",
    "Explain supply and demand with an example.",
    "Write an advertisement for a very ordinary chair.",
    "How do bees make honey?",
    "What is a good way to remember names?",
    "Describe how a letter travels from one country to another.",
)
NORM_NOISE = 0.05  # of the antiexpert
COUNTS = ("drafted", "accepted", "rejected", "steps", "draft_steps", "step_ns", "draft_ns")
BESIDE = ("plain", "base alone")
ROW_TOKENS, ROW_ROUNDS = (4, 20), 3
N_DEMO = 64  # problems of the demonstration in a round


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


@dataclass
class Counts:
    """What has become of one way to decode: sums over its turns."""

    sequences: int = 0
    tokens: int = 0
    """Of these sequences."""
    sequence_steps: int = 0
    """Steps that each of them took, together."""
    engine: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))

    def add(self, other: Counts) -> None:
        self.sequences += other.sequences
        self.tokens += other.tokens
        self.sequence_steps += other.sequence_steps
        for name, value in other.engine.items():
            self.engine[name] += value

    @property
    def acceptance(self) -> float:
        """How often a draft stands whose predecessors all stood."""
        tried = self.engine["accepted"] + self.engine["rejected"]
        return self.engine["accepted"] / tried if tried else float("nan")

    @property
    def drafting(self) -> float:
        """Share of the models' time."""
        return self.engine["draft_ns"] / (self.engine["draft_ns"] + self.engine["step_ns"])

    @property
    def width(self) -> float:
        """Rows of a step that checks, at batch 1."""
        return 1 + self.engine["drafted"] / self.engine["steps"]

    def predicted(self, base: float, small: float, widened: float = 1.0) -> float:
        """Speed-up over plain transfer at batch 1, if time were the bytes of the weights, in checks `widened` times."""
        passes = self.engine["draft_steps"] / self.engine["steps"]
        checks = (base + small + (small if passes == 0 else 0)) * widened
        return self.tokens / self.sequence_steps * (base + 2 * small) / (checks + passes * small)


class Decoder:
    """One way to decode. A turn decodes a batch of prompts whose keys are kept, so that all of it is decoding."""

    def __init__(self, model: rast.RastForCausalLM, **options: Any):
        self.model, self.options = model, options
        self.counts = Counts()

    def __call__(self, prompts: Sequence[Any]) -> float:
        """Seconds of a turn."""
        before = self.model.cache_info()
        start = time.perf_counter()
        out = self.model.generate(list(prompts), return_dict_in_generate=True, **self.options)
        seconds = time.perf_counter() - start
        after = self.model.cache_info()
        engine = {name: after[name] - before[name] for name in COUNTS}
        tokens = sum(map(len, out.new_tokens()))
        self.counts.add(Counts(len(prompts), tokens, int(out.steps.sum()), engine))
        return seconds


def take_turns(ways: dict[str, Decoder], batches: Sequence[Sequence[Any]], rounds: int) -> list[dict[str, float]]:
    """Seconds of each way in each round: with every batch, in turns, forth and back, each time another one first. A
    turn before them, with every batch, warms up: the cache holds the prompts, and costs are known."""
    for batch in batches:
        for way in ways.values():
            way(batch)
    for way in ways.values():
        way.counts = Counts()
    results, names = [], list(ways)
    for i in range(rounds):
        seconds = dict.fromkeys(ways, 0.0)
        for j, batch in enumerate(batches):
            first = (i + j) % len(ways)
            order = names[first:] + names[:first]
            for name in order + order[::-1]:
                seconds[name] += ways[name](batch)
        results.append(seconds)
        print(f"  round {i + 1}: " + ", ".join(f"{k} {v:.2f} s" for k, v in seconds.items()), file=sys.stderr)
    return results


def time_of_rows(model: rast.RastForCausalLM, prompts: Sequence[Any], **how: Any) -> float:
    """What a plain step of so many sequences takes, in steps of one."""
    if len(prompts) == 1:
        return 1.0
    plain = how | {"num_assistant_tokens": 0, "eos_token_id": None}
    short, long = (Decoder(model, **plain | {"max_new_tokens": n}) for n in ROW_TOKENS)

    def seconds(these: Sequence[Any]) -> float:
        """Of the steps by which one is longer: both begin with the same first step, which copies blocks."""
        return long(these) - short(these)

    seconds(prompts)
    ratios = []
    for _ in range(ROW_ROUNDS):
        one, all_, again, last = (seconds(these) for these in (prompts[:1], prompts, prompts, prompts[:1]))
        ratios.append((all_ + again) / (one + last))
    return statistics.median(ratios)


def spread(values: Iterable[float]) -> str:
    """Median, and quartiles."""
    found = sorted(values)
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def gather(path: Path | None, about: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """The report, with what a file about the same measurement already has; written there."""
    if path is None:
        return report
    if path.exists():
        before = json.loads(path.read_text())
        if before["about"] != about:
            raise SystemExit(f"{path} is about {before['about']}, not {about}")
        report = {
            "rounds": before["rounds"] + report["rounds"],
            "counts": {name: before["counts"][name] + counts for name, counts in report["counts"].items()},
            "widened": {name: before["widened"][name] + found for name, found in report["widened"].items()},
        }
    path.write_text(json.dumps({"about": about, **report}, indent=1))
    return report


def show(report: dict[str, Any], base: float, small: float) -> None:
    """Prints the gathered rounds."""
    rounds: list[dict[str, float]] = report["rounds"]
    columns = ("tokens/s", "acceptance", "tokens/step", "drafting", "by bytes", "predicted")
    print(
        f"{'':12}" + "".join(f"{column:>12}" for column in columns) + "".join(f"{'× ' + than:>22}" for than in BESIDE)
    )
    ways: dict[str, Counts] = {}
    for name, pieces in report["counts"].items():
        ways[name] = Counts()
        for piece in pieces:
            ways[name].add(Counts(**piece))
    speeds = {name: [way.tokens / len(rounds) / seconds[name] for seconds in rounds] for name, way in ways.items()}
    for name, way in ways.items():
        widened: list[float] = report["widened"][name]
        predicted = [way.predicted(base, small, by) for by in (1.0, statistics.median(widened))] if widened else []
        ratios = (spread(a / b for a, b in zip(speeds[name], speeds[than], strict=True)) for than in BESIDE)
        print(
            f"{name:12}{statistics.median(speeds[name]):12,.1f}{way.acceptance:12.0%}"
            f"{way.tokens / way.sequence_steps:12.2f}{way.drafting:12.0%}"
            + ("".join(f"{by:12.2f}" for by in predicted) or f"{'':24}")
            + "".join(f"{ratio:>22}" for ratio in ratios)
        )


def demonstration(n: int) -> tuple[rast.RastForCausalLM, list[Any]]:
    """Its trio, and so many prompts of its test set."""
    folders = paths()
    model = rast.RastForCausalLM.from_pretrained(
        folders["large-base"], expert=folders["small-rl"], antiexpert=folders["small-base"], device="cpu"
    )
    assert model.tokenizer is not None
    return model, [np.array(model.tokenizer.encode(p.prompt)) for p in islice(problems("test", 0), n)]


def grown(folder: Path, size: float, noise: float) -> tuple[rast.RastForCausalLM, list[Any]]:
    """The trio around a grown base, and prompts."""
    base, expert, antiexpert = make_models(folder, size, noise)
    model = rast.RastForCausalLM.from_pretrained(base, expert=expert, antiexpert=antiexpert, device="cpu")
    assert model.tokenizer is not None
    texts = [model.tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in PROMPTS]
    return model, [np.array(model.tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=5, help="cost of the base in small models")
    parser.add_argument("--noise", type=float, default=0.05, help="strength of the added layers")
    parser.add_argument("--folder", type=Path, help="the models are kept there")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1, help="sequences at once")
    parser.add_argument("--prompts", type=int, default=4, help="at least so many, as whole batches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drafts", nargs="*", default=["auto"], help="numbers of drafts to measure, or auto")
    parser.add_argument("--sample", action="store_true", help="draw at temperature 1 (default: greedy)")
    parser.add_argument("--lookup", action="store_true", help="also the base alone with drafts from earlier tokens")
    parser.add_argument("--demo", action="store_true", help="the demonstration's models, to the ends of its solutions")
    parser.add_argument("--json", type=Path, help="rounds are added to this file's; all of them are shown")
    parser.add_argument("--table", action="store_true", help="only print the predictions for larger models")
    args = parser.parse_args()
    if args.table:
        print_table()
        return
    if not args.demo and not args.folder:
        parser.error("--folder is needed")
    n = N_DEMO if args.demo else args.prompts
    n = -(-n // args.batch) * args.batch
    model, prompts = demonstration(n) if args.demo else grown(args.folder, args.size, args.noise)
    if n > len(prompts):
        parser.error(f"there are {len(prompts)} prompts")
    how: dict[str, Any] = {"do_sample": False}
    if args.sample:
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    how |= (
        {"max_new_tokens": evaluate.MAX_NEW_TOKENS}
        if args.demo
        else {"max_new_tokens": args.tokens, "eos_token_id": None}
    )
    ways = {
        "base alone": Decoder(model, transfer_strength=0.0, num_assistant_tokens=0, **how),
        "plain": Decoder(model, num_assistant_tokens=0, **how),
    }
    if args.lookup:
        ways["base, auto"] = Decoder(model, transfer_strength=0.0, **how)
    for k in args.drafts:
        ways[f"drafts {k}"] = Decoder(model, num_assistant_tokens=k if k == "auto" else int(k), **how)
    batches = [prompts[i : i + args.batch] for i in range(0, n, args.batch)]
    rounds = take_turns(ways, batches, args.rounds)
    about = {"trio": "demonstration" if args.demo else f"{args.size:g} ×, noise {args.noise:g}"}
    about |= {"batch": args.batch, "prompts": n, "tokens": how["max_new_tokens"], "sample": args.sample}
    counts = {name: [vars(way.counts)] for name, way in ways.items()}
    widened = {
        name: [time_of_rows(model, prompts[: round(way.counts.width)], **way.options)] if args.batch == 1 else []
        for name, way in ways.items()
    }
    report = gather(args.json, about, {"rounds": rounds, "counts": counts, "widened": widened})
    print(", ".join(f"{name} {value}" for name, value in about.items()), f"; {len(report['rounds'])} rounds")
    base_bytes, small_bytes = (net["weight_bytes"] for net in model.info()["nets"][:2])
    show(report, base_bytes, small_bytes)


if __name__ == "__main__":
    sys.exit(main())
