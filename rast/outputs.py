"""What `generate`, `forward` and `score` return."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rast.loading import Tokenizer

__all__ = ["ForwardOutput", "GenerateOutput", "Sample", "ScoreOutput"]


@dataclass(repr=False, eq=False)
class GenerateOutput:
    """Output of `RastForCausalLM.generate(..., return_dict_in_generate=True)`.

    R = batch · num_return_sequences rows (the copies of a prompt are neighbours), T = most new tokens of a row. Arrays
    of `[R, T]` are padded behind a row's end: with NaN, `base_token` with −1.

    A notebook shows the new tokens as text, coloured by what the transfer did to each token's probability. For this the
    attribute `tokenizer` holds the model's, or None (ids are shown). It is no field, and not in pickles and copies.
    """

    sequences: NDArray[np.int64]
    """`[R, width + T]`: left-padded prompt, new tokens, then `pad_token_id`."""
    new_lengths: NDArray[np.int64]
    """`[R]` number of new tokens, the final end-of-sequence token included."""
    finish_reason: list[str]
    """For each row "eos", "length", "stop" (a stop string) or "time"."""
    logprob: NDArray[np.float32]
    """`[R, T]` log-softmax of the combined, unprocessed logits at each new token, over the ids that can be drawn."""
    base_logprob: NDArray[np.float32]
    """`[R, T]` the base's own log-probability of the token: `logprob - base_logprob` is what the transfer added."""
    base_token: NDArray[np.int64]
    """`[R, T]` the base's first choice at that place."""
    transfer_kl: NDArray[np.float32]
    """`[R, T]` KL(softmax(combined) ‖ softmax(base)) in nats, both unprocessed."""
    seed: int
    """Gives the same output again, with the same prompts and options."""
    scores: tuple[NDArray[np.float32], ...] | None = None
    """With `output_scores`: T arrays `[R, vocab]`, processed logits (−inf where forbidden); finished rows NaN."""
    logits: tuple[NDArray[np.float32], ...] | None = None
    """With `output_logits`: T arrays `[R, vocab]`, combined and unprocessed; finished rows NaN."""
    steps: NDArray[np.int64] | None = None
    """`[R]` steps that gave the row its tokens: `new_lengths / steps` are the tokens of a pass of the base."""
    drafted: NDArray[np.int64] | None = None
    """`[R]` drafts that these steps checked (`num_assistant_tokens`)."""
    accepted: NDArray[np.int64] | None = None
    """`[R]` drafts that stood."""

    def __post_init__(self) -> None:
        self.tokenizer: Tokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "tokenizer": None}  # it can be large, and a compiled chat template cannot be pickled

    def new_tokens(self) -> list[NDArray[np.int64]]:
        """The new ids of each row, without prompt and padding."""
        start = self.sequences.shape[1] - self.logprob.shape[1]
        return [row[start : start + n] for row, n in zip(self.sequences, self.new_lengths, strict=True)]

    def __repr__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(self.finish_reason).items())
        return (
            f"GenerateOutput({len(self.sequences)} sequences, {int(self.new_lengths.sum())} new tokens, "
            f"finished by {reasons}, seed {self.seed})"
        )

    def _repr_html_(self) -> str:
        from rast.display import as_html

        return as_html(self.tokenizer, self)


@dataclass(repr=False, eq=False)
class Sample:
    """One finished sequence of `generate_iter`. n new tokens; the fields with None as default are there with
    `return_dict_in_generate` (scores and logits: with `output_scores`, `output_logits` too), as in GenerateOutput."""

    tag: Any
    """The request's."""
    index: int = 0
    """Which of the request's `num_return_sequences`."""
    new_tokens: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """`[n]` the final end-of-sequence token included; without the prompt."""
    finish_reason: str = "error"
    """ "eos", "length", "stop" (a stop string), "time", "cancelled" or "error"."""
    seed: int | None = None
    """Of the request; None if it did not get so far."""
    error: Exception | None = None
    """What is wrong with the request (then this is its only sample), or with this sequence: it ended there."""
    logprob: NDArray[np.float32] | None = None
    base_logprob: NDArray[np.float32] | None = None
    base_token: NDArray[np.int64] | None = None
    transfer_kl: NDArray[np.float32] | None = None
    scores: NDArray[np.float32] | None = None
    """`[n, vocab]`"""
    logits: NDArray[np.float32] | None = None
    """`[n, vocab]`"""
    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def __repr__(self) -> str:
        end = self.finish_reason if self.error is None else f"error: {self.error}"
        return f"Sample(tag {self.tag!r}, index {self.index}, {len(self.new_tokens)} new tokens, {end})"


@dataclass(repr=False, eq=False)
class ForwardOutput:
    """Output of `RastForCausalLM.forward(..., return_components=True)`: arrays of float32 `[batch, length, vocab]` with
    the base's vocabulary. −inf: the model has no row for that id; NaN: the model did not run (its coefficient is 0)."""

    logits: NDArray[np.float32]
    """Combined: base + Σ λᵢ (expertᵢ − antiexpertᵢ)."""
    base: NDArray[np.float32]
    experts: list[NDArray[np.float32]]
    """One for each pair."""
    antiexperts: list[NDArray[np.float32] | None]
    """One for each pair; None where the pair has no antiexpert."""

    def __repr__(self) -> str:
        return f"ForwardOutput(logits {list(self.logits.shape)}, {len(self.experts)} pair(s))"


@dataclass(repr=False, eq=False)
class ScoreOutput:
    """Output of `RastForCausalLM.score`. Arrays are `[batch, length]`, laid out as the input; the first token of a
    prompt has nothing before it, so that place and padding hold NaN (`base_token`: −1)."""

    logprob: NDArray[np.float32]
    """Log-probability of each token given those before it, under the combined model, over the ids that can be
    drawn (not over rows beyond the tokenizer)."""
    base_logprob: NDArray[np.float32]
    """The same under the base alone."""
    base_token: NDArray[np.int64]
    """The base's first choice for that place."""
    kl: NDArray[np.float32]
    """KL(softmax(combined) ‖ softmax(base)) in nats, of the distributions that predict the token."""

    def sum(self) -> NDArray[np.float64]:
        """`[batch]` log-probability of each prompt after its first token."""
        total: NDArray[np.float64] = np.nansum(self.logprob, axis=1, dtype=np.float64)
        return total

    @property
    def perplexity(self) -> NDArray[np.float64]:
        """`[batch]` exp(−mean log-probability); NaN for a prompt of one token."""
        n = np.count_nonzero(~np.isnan(self.logprob), axis=1)
        mean = np.divide(self.sum(), n, out=np.full(len(n), np.nan), where=n > 0)
        ppl: NDArray[np.float64] = np.exp(-mean)
        return ppl

    def __repr__(self) -> str:
        return f"ScoreOutput({list(self.logprob.shape)}, perplexity {np.round(self.perplexity, 3).tolist()})"
