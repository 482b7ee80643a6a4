"""How a trained trio does, beside its controls: all from `rast`, on problems that no model has seen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from corpus import IDS, TOKENS, encode, misreadings
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import DynamicCache, LlamaForCausalLM

import rast
from rast.demo.evaluate import LEVEL, MAX_NEW_TOKENS, attempt, grade, recovery, solve
from rast.demo.problems import ARROW, MODULUS, SKIP, Problem, answer_of, problems

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
TEMPERATURES = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
N_MISREAD = 6  # as in the small model's recipe
Right = NDArray[np.bool_]


@dataclass(frozen=True)
class Begun(Problem):
    """A problem whose careful solution is begun: the first total stands in the prompt."""

    @property
    def prompt(self) -> str:
        return f"{super().prompt} {self.operands[0]}"


def take(split: Literal["validation", "test"], n: int) -> list[Problem]:
    """The first `n` different problems of a split."""
    found: dict[Problem, None] = {}
    source = problems(split, 0)
    while len(found) < n:
        found[next(source)] = None
    return list(found)


def interval(values: NDArray[Any], n_resamples: int = 10_000) -> list[float]:
    """Bootstrap interval of the mean of `[problems]`."""
    rng = np.random.default_rng(0)
    means = np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(n_resamples)])
    return [float(q) for q in np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def share(right: Right) -> dict[str, Any]:
    return {"accuracy": float(right.mean()), "interval": interval(right.mean(1))}


def pass_at_k(right: Right) -> list[float]:
    """For k = 1 … samples: the unbiased estimate of solving a problem in k tries (arXiv 2107.03374)."""
    n, solved = right.shape[1], right.sum(1)
    return [float(np.mean([1 - math.comb(n - c, k) / math.comb(n, k) for c in solved])) for k in range(1, n + 1)]


# ---- entropy ---------------------------------------------------------------------------------------------------------


def entropy(model: rast.RastForCausalLM, tasks: Sequence[Problem], temperature: float) -> float:
    """Mean entropy in nats of the distributions that a model's own samples are drawn from."""
    out = attempt(model, tasks, temperature=temperature, output_scores=True)
    assert out.scores is not None
    scores = np.stack(out.scores, 1).astype(np.float64)  # [rows, steps, vocab]
    used = np.arange(scores.shape[1]) < out.new_lengths[:, None]
    logits = scores[used]
    logp = logits - logits.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    return float(-(np.exp(logp) * np.where(np.isneginf(logp), 0, logp)).sum(-1).mean())


def matched_temperature(model: rast.RastForCausalLM, target: float, tasks: Sequence[Problem]) -> float:
    """The temperature at which a model's samples have the entropy `target`, by bisection."""
    low, high = 1e-3, 4.0
    for _ in range(12):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if entropy(model, tasks, middle) > target else (middle, high)
    return math.sqrt(low * high)


# ---- paths -----------------------------------------------------------------------------------------------------------


def kind(id: int) -> str:
    """What a token is in a solution."""
    return "number" if id < MODULUS else TOKENS[id]


def changed_tokens(model: rast.RastForCausalLM, tasks: Sequence[Problem]) -> dict[str, Any]:
    """Greedy solutions by transfer: the share of tokens that are not the base's first choice, and which these are."""
    out = attempt(model, tasks, do_sample=False)
    pairs: Counter[str] = Counter()
    total = int(out.new_lengths.sum())
    for new, base in zip(out.new_tokens(), out.base_token, strict=True):
        pairs.update(f"{kind(b)} to {kind(t)}" for t, b in zip(new, base[: len(new)], strict=True) if t != b)
    return {"share": pairs.total() / total, "kinds": {name: n / total for name, n in pairs.most_common()}}


def paths(folder: Path, tasks: Sequence[Problem]) -> dict[str, Any]:
    """Along the greedy solutions of large-rl: path coverage, and how the two sizes' deltas point."""
    load = rast.RastForCausalLM.from_pretrained
    ceiling = load(folder / "large-rl")
    trio = load(folder / "large-base", expert=folder / "small-rl", antiexpert=folder / "small-base")
    assert ceiling.tokenizer is not None
    solutions = attempt(ceiling, tasks, do_sample=False).new_tokens()
    covered: list[NDArray[np.bool_]] = []
    cosines: list[NDArray[np.float64]] = []
    for task, new in zip(tasks, solutions, strict=True):
        prompt = ceiling.tokenizer.encode(task.prompt)
        ids = np.concatenate([prompt, new])[None]
        at = slice(len(prompt) - 1, ids.shape[1] - 1)  # what predicts the solution's tokens
        parts = trio.forward(ids, return_components=True)
        large = ceiling.forward(ids)[0, at] - parts.base[0, at]
        antiexpert = parts.antiexperts[0]
        assert antiexpert is not None
        small = parts.experts[0][0, at] - antiexpert[0, at]
        large, small = (d.astype(np.float64) - d.mean(-1, keepdims=True) for d in (large, small))
        cosines.append((large * small).sum(-1) / np.linalg.norm(large, axis=-1) / np.linalg.norm(small, axis=-1))
        covered.append(parts.base[0, at].argmax(-1) == new)
    cosine, same = np.concatenate(cosines), np.concatenate(covered)
    return {
        "path_coverage": float(same.mean()),
        "cosine": float(cosine.mean()),
        "cosine_where_covered": float(cosine[same].mean()) if same.any() else None,
        "cosine_where_not": float(cosine[~same].mean()) if not same.all() else None,
    }


# ---- what the small model misreads -----------------------------------------------------------------------------------


def misread_figures(
    folder: Path, seed: int, tests: Sequence[Problem], samples: dict[str, Right], greedy: dict[str, Right]
) -> dict[str, Any]:
    """Accuracy on the problems that add a number which the small model's corpus misreads, and on the others; and what
    models make of each such number after a right total: how often the next one is right, and how often misread."""
    misread = misreadings(seed, N_MISREAD)
    hit = np.array([any(n in misread for n in task.operands[1:]) for task in tests])
    accuracy = {
        name: {
            how: {"with": float(right[hit].mean()), "without": float(right[~hit].mean())}
            for how, right in (("sampled", samples[name]), ("greedy", greedy[name]))
        }
        for name in ("small-rl", "transfer", "no antiexpert", "large-rl")
    }
    models = {
        "small-base": rast.RastForCausalLM.from_pretrained(folder / "small-base"),
        "small-rl": rast.RastForCausalLM.from_pretrained(folder / "small-rl"),
        "transfer": rast.RastForCausalLM.from_pretrained(
            folder / "large-base", expert=folder / "small-rl", antiexpert=folder / "small-base"
        ),
    }
    numbers = {}
    for number, taken_for in misread.items():
        prefixes, wanted, wrong = [], [], []
        for task in tests:
            if number not in task.operands[1:]:
                continue
            at = task.operands.index(number, 1)
            totals = [sum(task.operands[: i + 1]) % MODULUS for i in range(at)]
            written = [id for total in totals for id in (total, IDS[ARROW])]
            prefixes.append(np.array(encode(task) + written))
            wanted.append((totals[-1] + number) % MODULUS)
            wrong.append((totals[-1] + taken_for) % MODULUS)
        shares = {}
        for name, model in models.items():
            out = model.generate(prefixes, max_new_tokens=1, do_sample=False, suppress_tokens=[IDS[SKIP]])
            shares[name] = {
                "right": float((out[:, -1] == wanted).mean()),
                "misread": float((out[:, -1] == wrong).mean()),
            }
        numbers[str(number)] = {"taken_for": taken_for, **shares}
    return {"share": float(hit.mean()), "accuracy": accuracy, "numbers": numbers}


# ---- the loop over three HuggingFace models --------------------------------------------------------------------------


@torch.no_grad()
def hf_loop(folder: Path, tasks: Sequence[Problem], do_sample: bool) -> list[list[int]]:
    """Solutions by the transfer as it is done without rast: three transformers models in a Python loop, in float32."""
    signs = {"large-base": 1.0, "small-rl": 1.0, "small-base": -1.0}
    nets = [
        (LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float32), sign, DynamicCache())
        for name, sign in signs.items()
    ]
    tokenizer = rast.RastForCausalLM.from_pretrained(folder / "large-base").tokenizer
    assert tokenizer is not None
    prompts = [tokenizer.encode(task.prompt).tolist() for task in tasks]
    width = max(map(len, prompts))
    new = torch.tensor([[IDS["<|end|>"]] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    generator = torch.Generator().manual_seed(0)
    steps = []
    for _ in range(MAX_NEW_TOKENS):
        logits = sum(
            sign * net(new, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]
            for net, sign, cache in nets
        )
        assert isinstance(logits, torch.Tensor)
        new = (
            torch.multinomial(logits.softmax(-1), 1, generator=generator)
            if do_sample
            else logits.argmax(-1, keepdim=True)
        )
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        steps.append(new)
    rows: list[list[int]] = torch.cat(steps, 1).tolist()
    return [row[: row.index(IDS["<|end|>"])] if IDS["<|end|>"] in row else row for row in rows]


def hf_check(folder: Path, tasks: Sequence[Problem]) -> dict[str, Any]:
    """Accuracy of the transfer from the HuggingFace loop and from rast, both float32."""
    trio = rast.RastForCausalLM.from_pretrained(
        folder / "large-base", expert=folder / "small-rl", antiexpert=folder / "small-base", dtype="float32"
    )
    assert trio.tokenizer is not None
    result: dict[str, Any] = {}
    for how, do_sample in (("sampled", True), ("greedy", False)):
        rows = hf_loop(folder, tasks, do_sample)
        right = np.array(
            [answer_of(trio.tokenizer.decode(row)) == task.answer for row, task in zip(rows, tasks, strict=True)]
        )
        out = attempt(trio, tasks, do_sample=do_sample)
        ours = grade(trio, tasks, out)
        result[how] = {"hf": share(right[:, None]), "rast": share(ours)}
        if not do_sample:
            end = IDS["<|end|>"]
            same = [[t for t in a if t != end] == b for a, b in zip(map(list, out.new_tokens()), rows, strict=True)]
            result[how]["same_tokens"] = float(np.mean(same))
    return result


# ---- everything ------------------------------------------------------------------------------------------------------


def measure(
    folder: Path, seed: int, n_test: int = 1000, n_validation: int = 250, n_samples: int = 32
) -> dict[str, Any]:
    """All figures of a run's folder, pass@k up to `n_samples`. Temperatures of the controls are chosen on validation
    problems."""
    load = rast.RastForCausalLM.from_pretrained
    pair = rast.TransferPair

    def with_pair(expert: str, antiexpert: str | None, strength: float = 1.0) -> rast.RastForCausalLM:
        minus = None if antiexpert is None else folder / antiexpert
        return load(folder / "large-base", pairs=[pair(folder / expert, minus, strength)])

    base, transfer = load(folder / "large-base"), with_pair("small-rl", "small-base")
    expert, added = load(folder / "small-rl"), with_pair("small-rl", None)
    ceiling = load(folder / "large-rl")
    tests, validation = take("test", n_test), take("validation", n_validation)
    begun = [Begun(task.operands) for task in tests]
    target = entropy(transfer, validation, 1.0)
    base_t, expert_t = (matched_temperature(model, target, validation) for model in (base, expert))

    many, few = {"n_samples": n_samples}, {"n_samples": min(4, n_samples)}
    plan: list[tuple[str, rast.RastForCausalLM, Sequence[Problem], dict[str, Any]]] = [
        ("small-base", load(folder / "small-base"), tests, few),
        ("small-rl", expert, tests, many),
        ("large-base", base, tests, many),
        ("transfer", transfer, tests, many),
        ("large-rl", ceiling, tests, many),
        ("no antiexpert", added, tests, few),
        ("base, begun", base, begun, few),
        ("base, begun, no skips", base, begun, {**few, "suppress_tokens": [IDS[SKIP]]}),
        ("base, matched entropy", base, tests, {**few, "temperature": base_t}),
        ("expert, matched entropy", expert, tests, {**few, "temperature": expert_t}),
        ("small-random", load(folder / "small-random"), tests, few),
        ("random rewards", with_pair("small-random", "small-base"), tests, few),
    ]
    systems, samples, greedy = {}, {}, {}
    for name, model, tasks, options in tqdm(plan, desc="systems"):
        samples[name] = solve(model, tasks, **options)
        always = {name: value for name, value in options.items() if name == "suppress_tokens"}
        greedy[name] = solve(model, tasks, do_sample=False, **always)
        systems[name] = {"sampled": share(samples[name]), "greedy": share(greedy[name])}

    def rates(right: dict[str, Right]) -> dict[str, Any]:
        found = recovery(right["large-base"], right["transfer"], right["large-rl"])
        above = right["transfer"].mean(1) - right["small-rl"].mean(1)
        return {
            "recovery": found.rate,
            "recovery_interval": found.interval,
            "above_small_rl": float(above.mean()),
            "above_small_rl_interval": interval(above),
        }

    def sweep(what: str, values: Sequence[float], run: Callable[[float], Right]) -> list[float]:
        return [float(run(value).mean()) for value in tqdm(values, desc=what)]

    hot = {"transfer": transfer, "large-base": base, "small-rl": expert, "large-rl": ceiling}
    return {
        "problems": n_test,
        "systems": systems,
        "matched_temperature": {"base": base_t, "expert": expert_t, "entropy": target},
        "sampled": rates(samples),
        "greedy": rates(greedy),
        "pass_at_k": {name: pass_at_k(right) for name, right in samples.items() if right.shape[1] == n_samples},
        "strength": {
            "values": STRENGTHS,
            "transfer": sweep("λ", STRENGTHS, lambda s: solve(transfer, tests, transfer_strength=s)),
            "no antiexpert": sweep("λ, no antiexpert", STRENGTHS, lambda s: solve(added, tests, transfer_strength=s)),
        },
        "temperature": {
            "values": TEMPERATURES,
            **{
                name: sweep(f"temperature, {name}", TEMPERATURES, lambda t, m=model: solve(m, tests, temperature=t))  # type: ignore[misc]
                for name, model in hot.items()
            },
        },
        "misread": misread_figures(folder, seed, tests, samples, greedy),
        "changed": changed_tokens(transfer, tests),
        "paths": paths(folder, tests),
        "hf": hf_check(folder, tests),
    }
