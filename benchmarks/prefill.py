"""Prefill speed: prompt tokens a second, to the trio's first new token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from contestants import Field, arguments, model_folder, report, save, warn_of_other_work
from tables import prefill_table
from turns import Contestant, measure


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    args = parser.parse_args()
    with model_folder(args) as folder, Field(args, folder) as field:

        def runner(contestant: Contestant) -> Callable[[], float]:
            rng = np.random.default_rng(0)  # the same prompts for all; others in each round

            def run() -> float:
                prompts = rng.integers(0, field.vocab_size, (1, args.prompt_tokens))
                return args.prompt_tokens / contestant.call("generate", prompts, 0, 3).first

            return run

        runs = {name: runner(contestant) for name, contestant in field.open_all().items()}
        other_work = field.other_work()
        results = measure(runs, args.rounds)
        share = other_work.share()
        warn_of_other_work(share)
        result = report("prefill", args, field, prompt_tokens=args.prompt_tokens, results=results, other_work=share)
        save(args.json, result)
        print(prefill_table([result]))


if __name__ == "__main__":
    main()
