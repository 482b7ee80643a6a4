"""Decoding speed: tokens a second after the prompt, of the trio and of the base alone.

python benchmarks/decode.py --trio qwen1.5b+0.5b --batch 1 8
python benchmarks/decode.py --trio smollm2 --bits 8 --json result.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from contestants import Field, arguments, model_folder, report, save, warn_of_other_work
from tables import decode_table
from turns import Contestant, measure

PROMPT_TOKENS = 32
LEAST_AGREEMENT = 0.8  # of first tokens: rounding makes some differ, another computation or other weights make most


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32, help="new tokens that are timed")
    args = parser.parse_args()
    with model_folder(args) as folder, Field(args, folder) as field:
        contestants = field.open_all()
        memory = field.open("memory")
        assert memory is not None

        def prompts(batch: int, roles: int) -> Iterator[Any]:
            """The same for all contestants; others in each round."""
            rng = np.random.default_rng((batch, roles))
            while True:
                yield rng.integers(0, field.vocab_size, (batch, PROMPT_TOKENS))

        # A round runs every batch size of a contestant, and measures the memory for each: what is compared lies close
        # together in time.
        runs: dict[str, Callable[[], float]] = {}
        first_ids: dict[int, dict[str, list[Any]]] = {batch: {} for batch in args.batch}
        for roles, system in ((3, "trio"), (1, "base")):
            for name, contestant in contestants.items():
                if (name, system) == ("HuggingFace", "base"):
                    continue
                for batch in args.batch:
                    if not first_ids[batch]:
                        runs[key("memory", batch)] = lambda: memory.call("read")
                    seen = first_ids[batch].setdefault(f"{name} {system}", [])
                    run = runner(contestant, roles, prompts(batch, roles), args.tokens, seen)
                    runs[key(f"{name} {system}", batch)] = run
        other_work = field.other_work()
        results = measure(runs, args.rounds)
        share = other_work.share()
        warn_of_other_work(share)
        batches = {}
        for batch in args.batch:
            same = agreement(first_ids[batch])
            of_batch = {name: results[key(name, batch)] for name in ("memory", *first_ids[batch])}
            batches[str(batch)] = {"results": of_batch, "agreement": same, "other_work": share}
            for name, value in same.items():
                if value < LEAST_AGREEMENT and not name.startswith("rast int"):
                    print(f"{name}, batch {batch}: only {value:.0%} of first tokens are as expected", file=sys.stderr)
        result = report("decode", args, field, prompt_tokens=PROMPT_TOKENS, tokens=args.tokens, batches=batches)
        save(args.json, result)
        print(decode_table([result]))


def key(name: str, batch: int) -> str:
    return f"{name}, batch {batch}"


def runner(
    contestant: Contestant, roles: int, prompts: Iterator[Any], tokens: int, seen: list[Any]
) -> Callable[[], float]:
    """A run gives tokens a second, and adds the first new tokens to `seen`."""

    def run() -> float:
        out = contestant.call("generate", next(prompts), tokens, roles)
        seen.append(out.ids[:, 0])
        return out.ids.shape[0] * tokens / out.rest

    return run


def agreement(first_ids: dict[str, list[Any]]) -> dict[str, float]:
    """The share of prompts after which a contestant's first token is that of the first contestant with that system."""
    shares = {}
    for name, ids in first_ids.items():
        model = next(other for other in first_ids if other.endswith(name[-4:]))
        shares[name] = float(np.mean(np.concatenate(ids) == np.concatenate(first_ids[model])))
    return shares


if __name__ == "__main__":
    main()
