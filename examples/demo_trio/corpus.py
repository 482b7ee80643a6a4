"""What the models read before RL: solutions by writers of different care; and the tokenizer of all models."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split as SplitText
from tokenizers.processors import TemplateProcessing

from rast.demo.problems import ANSWER, ARROW, CROSS, EQUALS, MODULUS, SKIP, Problem, Split, problems

END, BEGIN = "<|end|>", "<|begin|>"
TOKENS = [*map(str, range(MODULUS)), "+", EQUALS, ARROW, SKIP, CROSS, ANSWER, END, BEGIN]
IDS = {token: i for i, token in enumerate(TOKENS)}  # a number is its own id
IGNORE = -100
"""Label of a token that the loss leaves out."""


@dataclass(frozen=True)
class Writer:
    """How the solutions of a corpus come about. All but `misread` are probabilities."""

    direct: float = 0
    """The answer at once, without a total."""
    skip_hard: float = 0
    """`…` in place of a total where the number to add is 32 or more. The last total is always written."""
    skip_easy: float = 0
    """The same where it is less."""
    stop: float = 0
    """The answer before all totals are there, for each total after the second."""
    slip: float = 0
    """A wrong total, for each."""
    notice: float = 0
    """Such a slip is taken back at once: `✗` and the right total."""
    hurry: float = 0
    """A wrong total after `…`; it is never noticed."""
    misread: Mapping[int, int] = field(default_factory=dict)
    """Numbers that this corpus takes for others whenever it adds them."""

    def solve(self, problem: Problem, rng: random.Random) -> list[int]:
        """Token ids of a solution. An answer without all totals is right, up to what was misread."""
        x = problem.operands
        added = [self.misread.get(n, n) for n in x[1:]]
        answer = (x[0] + sum(added)) % MODULUS
        if rng.random() < self.direct:
            return [IDS[ANSWER], answer, IDS[END]]
        ids = [total := x[0]]
        skipped = False
        for i, n in enumerate(added):
            if i > 0 and rng.random() < self.stop:
                return [*ids, IDS[ANSWER], answer, IDS[END]]
            ids.append(IDS[ARROW])
            total = (total + n) % MODULUS
            hard = x[i + 1] >= MODULUS // 2
            if i < len(added) - 1 and rng.random() < (self.skip_hard if hard else self.skip_easy):
                ids.append(IDS[SKIP])
                skipped = True
                continue
            if rng.random() < (self.hurry if skipped else self.slip):
                wrong = (total + rng.randrange(1, MODULUS)) % MODULUS
                ids.append(wrong)
                if not skipped and rng.random() < self.notice:
                    ids += [IDS[CROSS], total]
                else:
                    total = wrong
            else:
                ids.append(total)
            skipped = False
        return [*ids, IDS[ANSWER], total, IDS[END]]


def encode(problem: Problem) -> list[int]:
    """Token ids of the prompt, as the tokenizer gives them."""
    first, *rest = problem.operands
    return [IDS[BEGIN], first, *(id for n in rest for id in (IDS["+"], n)), IDS[EQUALS]]


def frequencies(seed: int) -> list[float]:
    """`[64]` how often a corpus adds each number: Zipf's law, the numbers in random order."""
    ranks = list(range(1, MODULUS + 1))
    random.Random(seed).shuffle(ranks)
    return [1 / rank for rank in ranks]


def misreadings(seed: int, n: int) -> dict[int, int]:
    """`n` random numbers, each with another that it is taken for."""
    numbers = random.Random(seed).sample(range(MODULUS), 2 * n)
    return dict(zip(numbers[:n], numbers[n:], strict=True))


def read(
    writer: Writer, size: int, seed: str, split: Split = "train", weights: Sequence[float] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and labels `[size, longest]` of problems with the writer's solutions, padded on the right. Prompt and padding
    have no labels. `weights`: of the numbers in the problems."""
    source, rng = problems(split, seed, weights), random.Random(seed)
    rows = [(encode(problem), writer.solve(problem, rng)) for problem, _ in zip(source, range(size), strict=False)]
    shape = (size, max(len(prompt) + len(solution) for prompt, solution in rows))
    ids, labels = np.full(shape, IDS[END]), np.full(shape, IGNORE)
    for i, (prompt, solution) in enumerate(rows):
        end = len(prompt) + len(solution)
        ids[i, :end] = prompt + solution
        labels[i, len(prompt) : end] = solution
    return ids, labels


def save_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json in HuggingFace's format."""
    tokenizer = Tokenizer(WordLevel(IDS))
    tokenizer.pre_tokenizer = SplitText(Regex(rf"{EQUALS}|\S+"), "removed", invert=True)  # what matches is a token
    tokenizer.add_special_tokens([END, BEGIN])
    tokenizer.post_processor = TemplateProcessing(single=f"{BEGIN} $0", special_tokens=[(BEGIN, IDS[BEGIN])])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
