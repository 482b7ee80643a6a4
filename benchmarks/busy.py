"""Decoding at batch 1 while another process keeps one core busy: with all threads, and with one thread.

Each step is timed by itself, so that a stall shows. What does not finish in time is stopped and reported.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from typing import Any

import numpy as np
from contestants import Field, arguments, model_folder, report, save
from tables import busy_table
from turns import Contestant, DidNotFinishError

PROMPT_TOKENS = 32


def spin(core: int) -> None:
    """Keeps a core busy for ever."""
    os.sched_setaffinity(0, {core})
    while True:
        pass


class Spinner:
    """Another process that computes on the last core."""

    def __enter__(self) -> None:
        core = max(os.sched_getaffinity(0))
        self._process = multiprocessing.get_context("spawn").Process(target=spin, args=(core,), daemon=True)
        self._process.start()

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()


def steps(contestant: Contestant, prompt: Any, args: argparse.Namespace, threads: int) -> list[float]:
    return contestant.call("steps", prompt, args.tokens, args.seconds, threads, limit=args.limit)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=32, help="the most steps of a run")
    parser.add_argument("--seconds", type=float, default=5, help="after which a run stops")
    parser.add_argument("--limit", type=float, default=60, help="seconds after which a run counts as not finished")
    args = parser.parse_args()
    with model_folder(args) as folder, Field(args, folder) as field:
        contestants = field.open_all()
        rng = np.random.default_rng(0)
        cases: dict[str, dict[str, list[list[float]]]] = {name: {} for name in contestants}
        stopped: dict[str, str] = {}
        facts = field.facts()
        for i in range(args.rounds + 1):  # the first warms up
            for name, contestant in contestants.items():
                if name in stopped:
                    continue
                prompt = rng.integers(0, field.vocab_size, PROMPT_TOKENS)
                try:
                    times = {"quiet": steps(contestant, prompt, args, args.threads)}
                    if i:
                        with Spinner():
                            times["busy, one thread"] = steps(contestant, prompt, args, 1)
                            times["busy"] = steps(contestant, prompt, args, args.threads)
                except DidNotFinishError as reason:
                    stopped[name] = str(reason)
                    print(reason, file=sys.stderr)
                if i:
                    for case, seconds in times.items():
                        cases[name].setdefault(case, []).append(seconds)
        result = report("busy", args, field, tokens=args.tokens, step_seconds=cases, did_not_finish=stopped)
        result["contestants"] = facts
        save(args.json, result)
        print(busy_table([result]))


if __name__ == "__main__":
    main()
