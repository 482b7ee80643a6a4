"""The real workload: prompts with a common few-shot header, many random samples of each, and what memory that takes.

The peers' batch size is the one that a short trial predicts to be fastest; rast schedules by itself.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from contestants import Field, arguments, model_folder, report, save, warn_of_other_work
from tables import workload_table
from turns import Contestant, measure

OWN_TOKENS = 32  # of each prompt, after the header
TRIAL_TOKENS = 5
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
    parser.set_defaults(rounds=1)
    args = parser.parse_args()
    sequences = args.prompts * args.samples
    own = -(-(OWN_TOKENS + args.tokens) // BLOCK_TOKENS) * BLOCK_TOKENS
    kv_tokens = args.header + sequences * own
    with model_folder(args) as folder, Field(args, folder, kv_tokens) as field:

        def prompts(seed: int) -> np.ndarray:
            rng = np.random.default_rng(seed)
            header = np.tile(rng.integers(0, field.vocab_size, args.header), (args.prompts, 1))
            return np.concatenate([header, rng.integers(0, field.vocab_size, (args.prompts, OWN_TOKENS))], 1)

        def trial(name: str) -> list[dict[str, Any]]:
            """Predicted seconds of each way to run it, best first. In processes of their own: memory counts later."""
            found = []
            for options in CANDIDATES[name]:
                contestant = field.open(name, **options)
                if contestant is None:
                    return []
                for batch in sorted({min(args.samples * n, sequences) for n in (1, 2, 4, 8)}):
                    part = prompts(0)[: batch // args.samples]

                    def seconds(tokens: int, part: Any = part, batch: int = batch, contestant: Any = contestant) -> Any:
                        return contestant.call("workload", part, args.header, args.samples, tokens, batch, 0)

                    seconds(1)  # warms up
                    first = seconds(1)
                    step = (seconds(1 + TRIAL_TOKENS) - first) / TRIAL_TOKENS
                    predicted = -(-sequences // batch) * (first + (args.tokens - 1) * step)
                    found.append({"options": options, "batch": batch, "seconds": predicted})
                    print(f"  trial: {name} {options} batch {batch}: {predicted:.1f} s", file=sys.stderr)
                field.close(name)
            return sorted(found, key=lambda one: one["seconds"])

        def runner(contestant: Contestant, batch: int) -> Callable[[], float]:
            seeds = itertools.count(2)

            def run() -> float:
                seed = next(seeds)
                ids = prompts(seed)
                return contestant.call("workload", ids, args.header, args.samples, args.tokens, batch, seed)

            return run

        trials: dict[str, list[dict[str, Any]]] = {}
        runs = {}
        for name in args.contestants:
            if name != "rast":
                trials[name] = trial(name)
                if not trials[name]:
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
