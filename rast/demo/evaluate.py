"""How many problems a model solves, and what part of the way from the base to RL a transfer goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rast.demo.problems import Problem, answer_of

if TYPE_CHECKING:
    from rast.loading import Tokenizer
    from rast.modeling import RastForCausalLM
    from rast.outputs import GenerateOutput

__all__ = ["LEVEL", "MAX_NEW_TOKENS", "Recovery", "attempt", "grade", "recovery", "solve"]

LEVEL = 0.95
"""How sure the intervals are."""
MAX_NEW_TOKENS = 32
"""Of a solution; the longest careful one, with each total taken back once, has 24."""


def attempt(
    model: RastForCausalLM,
    problems: Sequence[Problem],
    *,
    do_sample: bool = True,
    seed: int = 0,
    n_samples: int = 1,
    progress: Callable[[int, int, int], None] | None = None,
    **options: Any,
) -> GenerateOutput:
    """Lets a model write solutions, in one call of its `generate`.

    Args:
        problems: P ≥ 1 problems.
        do_sample: draw from the whole distribution at temperature 1, or take the best token.
        seed: of the draws; models that are asked for the same problems with the same seed draw with the same numbers.
        n_samples: solutions of each problem.
        progress: as in `generate`.
        **options: other options of `generate`, over these; `transfer_strength=0` is the base alone.

    Returns:
        Of P · n_samples rows; those of a problem are neighbours.

    Raises:
        ValueError: no problems, a model without a tokenizer; else as `generate`.
    """
    tokenizer = _tokenizer(model)
    if not problems:
        raise ValueError("there are no problems to solve")
    whole = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}
    settings: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, **whole, **options}
    out: GenerateOutput = model.generate(
        [tokenizer.encode(problem.prompt) for problem in problems],
        do_sample=do_sample,
        seed=seed,
        num_return_sequences=n_samples,
        return_dict_in_generate=True,
        progress=progress,
        **settings,
    )
    return out


def grade(model: RastForCausalLM, problems: Sequence[Problem], out: GenerateOutput) -> NDArray[np.bool_]:
    """bool `[problems, samples]`: which of the solutions that `attempt` returned give the right answer."""
    tokenizer = _tokenizer(model)
    n_samples = len(out.new_lengths) // len(problems)
    right = [
        answer_of(tokenizer.decode(row)) == problems[i // n_samples].answer for i, row in enumerate(out.new_tokens())
    ]
    return np.array(right).reshape(len(problems), n_samples)


def solve(model: RastForCausalLM, problems: Sequence[Problem], **options: Any) -> NDArray[np.bool_]:
    """bool `[problems, samples]`: which solutions of a model are right; its mean is the accuracy.

    Args and errors are those of `attempt`: do_sample, seed, n_samples, progress and options of `generate`.
    """
    return grade(model, problems, attempt(model, problems, **options))


@dataclass(frozen=True)
class Recovery:
    """The recovery rate (arXiv 2506.15710) of a transfer: (transfer − base) / (ceiling − base), of accuracies."""

    rate: float | None
    """1: as good as the ceiling. None if the ceiling is not above the base, so that there is nothing to recover."""
    interval: tuple[float, float] | None
    """Between these with a confidence of `LEVEL`. None if the problems are too few to tell ceiling from base, or if all
    resamples have the same rate."""


def recovery(
    base: NDArray[np.bool_],
    transfer: NDArray[np.bool_],
    ceiling: NDArray[np.bool_],
    *,
    seed: int = 0,
    n_resamples: int = 10_000,
) -> Recovery:
    """The recovery rate, with a percentile bootstrap interval over problems.

    Every resample takes the same problems, with all their samples, for all three systems. One in which the ceiling is
    not above the base has no rate; it counts as beyond both ends of the interval.

    Args:
        base, transfer, ceiling: bool `[problems, samples]` from `solve`, of the same problems in the same order.
            Numbers of samples may differ.
        seed: of the resamples.

    Raises:
        ValueError: arrays of other shapes, or of different problems.
    """
    systems = (base, transfer, ceiling)
    shapes = [right.shape for right in systems]
    if any(right.ndim != 2 or 0 in right.shape for right in systems) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"the systems must have solved the same problems, [problems, samples] each, not {shapes}")
    n = shapes[0][0]
    n_right = np.stack([right.sum(axis=1) for right in systems])  # integers: equal sums are equal
    n_answers = np.array([right.size for right in systems])
    (rate,) = _rates(n_right.sum(axis=1)[None] / n_answers)
    if np.isnan(rate):
        return Recovery(None, None)

    rng = np.random.default_rng(seed)
    resampled = np.array([n_right[:, rng.integers(n, size=n)].sum(axis=1) for _ in range(n_resamples)])
    rates = _rates(resampled / n_answers)
    tail = (1 - LEVEL) / 2
    low = float(np.quantile(np.where(np.isnan(rates), -np.inf, rates), tail, method="lower"))
    high = float(np.quantile(np.where(np.isnan(rates), np.inf, rates), 1 - tail, method="higher"))
    known = low < high and np.isfinite([low, high]).all()
    return Recovery(float(rate), (low, high) if known else None)


def _rates(accuracies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Recovery rates `[n]` of accuracies `[n, 3]` of base, transfer and ceiling; NaN if there is nothing to recover."""
    base, transfer, ceiling = accuracies.T
    gap = ceiling - base
    rates: NDArray[np.float64] = np.divide(transfer - base, gap, out=np.full(len(gap), np.nan), where=gap > 0)
    return rates


def _tokenizer(model: RastForCausalLM) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so it cannot be given problems")
    return model.tokenizer
