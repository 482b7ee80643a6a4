"""The demonstration's problems: sums modulo 64, how they are written as text, and the check of an answer.

    40 + 18 + 62 + 7 mod 64 = 40 → 58 → 56 → 63 #### 63

is a problem (up to the `=`) and its solution: the running totals, then the answer. Every number and sign is one token.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["ANSWER", "ARROW", "CROSS", "EQUALS", "MODULUS", "SKIP", "Problem", "Split", "answer_of", "problems"]

MODULUS = 64
N_OPERANDS = (4, 5, 6)
EQUALS = "mod 64 ="
ARROW = "→"
SKIP = "…"
"""Stands in a solution for a total that its writer did not care to write."""
CROSS = "✗"
"""Takes back the total before it; the right one follows."""
ANSWER = "####"

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Problem:
    """The sum of `operands` (0 … 63) modulo 64."""

    operands: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f"{' + '.join(map(str, self.operands))} {EQUALS}"

    @property
    def answer(self) -> int:
        return sum(self.operands) % MODULUS

    @property
    def split(self) -> Split:
        """Where the problem belongs, by a hash of its text: an eighth each to validation and test."""
        part = zlib.crc32(self.prompt.encode()) % 8
        return "test" if part == 0 else "validation" if part == 1 else "train"


def problems(split: Split, seed: int | str, weights: Sequence[float] | None = None) -> Iterator[Problem]:
    """Endless random problems of a split, the same for the same seed. `weights` `[64]`: of the numbers, else equal."""
    rng = random.Random(f"{split} {seed}")
    while True:
        n = rng.choice(N_OPERANDS)
        problem = Problem(tuple(rng.choices(range(MODULUS), weights, k=n)))
        if problem.split == split:
            yield problem


def answer_of(text: str) -> int | None:
    """The number right behind the first `####` of a solution; None if there is none."""
    found = re.match(r" (\d+)\b", text.partition(ANSWER)[2])
    return int(found[1]) if found else None
