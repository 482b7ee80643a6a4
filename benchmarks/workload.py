"""The real workload: prompts with a common few-shot header, many random samples of each, and what memory that takes.

The peers' batch size is the one that a short trial predicts to be fastest; rast schedules by itself.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from contestants import Field, arguments, model_folder, report, save, warn_of_other_work
from tables import workload_table
from turns import Contestant, measure

OWN_TOKENS = 32  # of each prompt, after the header
TRIAL_STEPS = 4
BLOCK_TOKENS = 32  # of rast's KV cache

CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "rast": [{}],
    "HuggingFace": [{}],
    "llama.cpp": [{"kv_unified": True}, {"kv_unified": False}],
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16, help="of each prompt")
    parser.add_argument("--header", type=int, default=256, help="tokens that all prompts begin with")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a sample")
    parser.add_argument(
        "--trials", type=Path, metavar="FILE", help="keep the trials there: a later run need not repeat"
    )
    parser.add_argument("--only-trials", action="store_true", help="stop after them")
    parser.set_defaults(rounds=1)
    args = parser.parse_args()
    sequences = args.prompts * args.samples
    own = -(-(OWN_TOKENS + args.tokens) // BLOCK_TOKENS) * BLOCK_TOKENS
    kv_tokens = args.header + sequences * own
    with model_folder(args) as folder, Field(args, folder, kv_tokens) as field:

        def prompts(seed: int, n: int = args.prompts, own_tokens: int = OWN_TOKENS) -> np.ndarray:
            rng = np.random.default_rng(seed)
            header = np.tile(rng.integers(0, field.vocab_size, args.header), (n, 1))
            return np.concatenate([header, rng.integers(0, field.vocab_size, (n, own_tokens))], 1)

        def trial(name: str) -> list[dict[str, Any]]:
            """Predicted seconds of each way to run it, best first. In processes of their own: memory counts later."""
            found = []
            for options in CANDIDATES[name]:
                contestant = field.open(name, **options)
                if contestant is None:
                    return []
                for batch in sorted({min(args.samples * n, sequences) for n in (1, 2, 4, 8)}):
                    part = prompts(0, batch // args.samples)
                    start = contestant.call("workload", part, args.header, args.samples, 1, batch, 0)[-1]
                    # Steps as they are half-way: sequences with so many tokens of their own.
                    part = prompts(0, batch, OWN_TOKENS + args.tokens // 2)
                    steps = contestant.call("workload", part, args.header, 1, 1 + TRIAL_STEPS, batch, 0)
                    step = (steps[-1] - steps[0]) / TRIAL_STEPS
                    predicted = -(-sequences // batch) * (start + (args.tokens - 1) * step)
                    found.append({"options": options, "batch": batch, "seconds": predicted})
                    print(f"  trial: {name} {options} batch {batch}: {predicted:.1f} s", file=sys.stderr)
                field.close(name)
            return sorted(found, key=lambda one: one["seconds"])

        def runner(contestant: Contestant, batch: int) -> Callable[[], float]:
            seeds = itertools.count(2)

            def run() -> float:
                seed = next(seeds)
                ids = prompts(seed)
                return contestant.call("workload", ids, args.header, args.samples, args.tokens, batch, seed)[-1]

            return run

        trials: dict[str, list[dict[str, Any]]] = {}
        if args.trials and args.trials.exists():
            trials = json.loads(args.trials.read_text())
        for name in args.contestants:
            if name != "rast" and name not in trials and (found := trial(name)):
                trials[name] = found
                save(args.trials, trials)
        if args.only_trials:
            return
        runs = {}
        for name in args.contestants:
            if name in field.missing:
                continue
            best = trials[name][0] if name in trials else {"options": {}, "batch": sequences}
            contestant = field.open(name, **best["options"])
            if contestant is None:
                continue
            contestant.call("workload", prompts(1)[:1], args.header, args.samples, 2, args.samples, 0)  # warms up

            runs[name] = runner(contestant, best["batch"])
        other_work = field.other_work()
        results = measure(runs, args.rounds, warm_up=False)
        share = other_work.share()
        warn_of_other_work(share)
        result = report(
            "workload",
            args,
            field,
            prompts=args.prompts,
            samples=args.samples,
            header_tokens=args.header,
            prompt_tokens=args.header + OWN_TOKENS,
            tokens=args.tokens,
            trials=trials,
            seconds=results,
            peak_bytes={name: field.peak_bytes(name) for name in runs},
            other_work=share,
        )
        save(args.json, result)
        print(workload_table([result]))


if __name__ == "__main__":
    main()
