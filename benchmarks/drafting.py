"""How often other drafts would stand: offline, from the models' logits along text that plain transfer has written.

    python benchmarks/drafting.py                              # the demonstration trio
    python benchmarks/drafting.py --folder models --size 5     # as in speculation.py

At each position p is the target's distribution at temperature 1, q the drafter's. Reported: how often the two draw the
same token with the same noise (ours, and greedy), and sum min(p, q), the most that any rule can accept (speculative
sampling). The corrected drafter adds what was missing at the last checked position, target - expert, with a weight
that falls with the distance; `second`: how often the target's draw is the drafter's first or second choice, which is
what a tree with two branches would accept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from speculation import PROMPTS, make_models

import rast
from rast.demo import paths
from rast.demo.problems import problems

Array = NDArray[np.float32]
N_NOISES = 2  # for each position
DEPTHS = (1, 3)  # distance of a draft from the last checked position
WEIGHTS = (0.0, 0.1, 0.25, 0.5, 1.0)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True), dtype=np.float32)


def texts(model: Any, prompts: list[Any], tokens: int, sample: bool) -> list[tuple[Array, Array]]:
    """(target's, expert's) logits at the positions of the new tokens, for each prompt."""
    how: dict[str, Any] = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, seed=0) if sample else {}
    out = model.generate(prompts, max_new_tokens=tokens, return_dict_in_generate=True, **({"do_sample": False} | how))
    found = []
    for prompt, new in zip(prompts, out.new_tokens(), strict=True):
        parts = model.forward(np.concatenate([prompt, new]), return_components=True, logits_to_keep=len(new) + 1)
        found.append((parts.logits[0, :-1], parts.experts[0][0, :-1]))
    return found


def measure(target: Array, drafter: Array, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of (greedy agreement, agreement with shared noise, sum min(p, q), target's draw among the first two)."""
    # -inf where an id cannot be drawn by the target; the drafter's own limit is the same
    ok = np.isfinite(target).all(0) & np.isfinite(drafter).all(0)
    target, drafter = target[:, ok], drafter[:, ok]
    totals = np.zeros(4)
    totals[0] = (target.argmax(-1) == drafter.argmax(-1)).mean()
    totals[2] = np.minimum(softmax(target), softmax(drafter)).sum(-1).mean()
    for _ in range(N_NOISES):
        g = -np.log(-np.log(rng.uniform(1e-12, 1, target.shape))).astype(np.float32)
        drawn, guess = (target + g).argmax(-1), drafter + g
        first = guess.argmax(-1)
        totals[1] += (drawn == first).mean() / N_NOISES
        np.put_along_axis(guess, first[:, None], -np.inf, -1)
        totals[3] += ((drawn == first) | (drawn == guess.argmax(-1))).mean() / N_NOISES
    return totals


def tree_gain(accepts: float, second: float, expert_pass: float, row: float) -> tuple[float, int, int]:
    """How much faster the best chain of k drafts with second choices beside its first n as leaves is than the best one
    without, with k and n.

    A pass that checks one row takes 1, each row more `row`, a pass of the expert `expert_pass`. A leaf stands where the
    chain breaks, in (second - accepts) / (1 - accepts) of the cases, and is worth one token.
    """
    rescued = (second - accepts) / (1 - accepts)

    def rate(k: int, n: int) -> float:
        tokens = (1 - accepts ** (k + 1)) / (1 - accepts) + rescued * (1 - accepts**n)
        return tokens / (1 + row * (k + n) + expert_pass * (k + 1))

    chain = max(rate(k, 0) for k in range(1, 13))
    return max((rate(k, n) / chain, k, n) for k in range(1, 13) for n in range(1, k + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="models of speculation.py; default: the demonstration trio")
    parser.add_argument("--size", type=float, default=5)
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sample", action="store_true", help="text drawn at temperature 1 (default: greedy)")
    parser.add_argument("--expert-pass", type=float, default=0.16, help="cost of one, in checks of one row")
    parser.add_argument("--row", type=float, default=0.10, help="cost of a further row of a check, likewise")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    if args.folder:
        base, expert, antiexpert = make_models(args.folder, args.size, args.noise)
        asked = [[{"role": "user", "content": text}] for text in PROMPTS]
    else:
        folders = paths()
        base, expert, antiexpert = folders["large-base"], folders["small-rl"], folders["small-base"]
    model = rast.RastForCausalLM.from_pretrained(base, expert=expert, antiexpert=antiexpert, device="cpu")
    assert model.tokenizer is not None
    if args.folder:
        written = [model.tokenizer.apply_chat_template(messages) for messages in asked]
        prompts = [np.array(model.tokenizer.encode(text, add_special_tokens=False)) for text in written]
    else:
        prompts = [
            np.array(model.tokenizer.encode(p.prompt)) for p, _ in zip(problems("test", 0), range(200), strict=False)
        ]
    found = texts(model, prompts, args.tokens, args.sample)
    print(f"{'':32}{'greedy':>9}{'ours':>9}{'optimal':>9}{'second':>9}")
    for depth in DEPTHS:
        for weight in WEIGHTS:
            totals, n = np.zeros(4), 0
            for target, expert_logits in found:
                if len(target) <= depth:
                    continue
                missing = np.nan_to_num(target - expert_logits, nan=0.0, posinf=0.0, neginf=0.0)[:-depth]
                corrected = expert_logits[depth:] + weight * missing
                rows = len(corrected)
                totals += rows * measure(target[depth:], corrected, rng)
                n += rows
            if depth == 1 and weight == 0:
                tree = tree_gain(totals[1] / n, totals[3] / n, args.expert_pass, args.row)
            name = "expert" if weight == 0 else f"+ {weight:g} of what was missing"
            print(f"{depth} behind: {name:28}" + "".join(f"{value / n:9.1%}" for value in totals), flush=True)
    print("{:.2f} times a chain's speed: {} drafts, with leaves beside the first {}".format(*tree))


if __name__ == "__main__":
    sys.exit(main())
