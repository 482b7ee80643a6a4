"""Text as it comes: from token ids to the pieces of text that they complete."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["IncrementalDecoder", "Streamer", "TextStreamer"]


class Streamer(Protocol):
    """HuggingFace's streamer protocol: `put` gets the prompt `[1, length]`, then new ids `[n]`; at last comes `end`."""

    def put(self, value: NDArray[np.int64], /) -> None: ...
    def end(self) -> None: ...


class Decodes(Protocol):
    """The part of a tokenizer that streaming needs."""

    def decode(self, ids: Any, /, *, skip_special_tokens: bool = True) -> str: ...


class IncrementalDecoder:
    """Decodes a growing sequence; pieces end only where the text so far is final.

    A token can be part of a character, and some decoders treat the first token of a text specially, so a token's text
    is the difference of two decodings that begin at the same earlier token.
    """

    def __init__(self, tokenizer: Decodes, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # from the last piece's first token on
        self._shown = 0  # of these, tokens whose text is out

    def _decode(self, n: int | None = None) -> str:
        return self._tokenizer.decode(self._ids[:n], skip_special_tokens=self._skip)

    def push(self, ids: Iterable[int]) -> str:
        """Text that the new ids complete; it may be empty."""
        self._ids.extend(int(i) for i in ids)
        before, now = self._decode(self._shown), self._decode()
        if len(now) <= len(before) or now.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """What is left, also if it ends inside a character. The decoder is then as new."""
        rest = self._decode()[len(self._decode(self._shown)) :]
        self._ids, self._shown = [], 0
        return rest


class TextStreamer:
    """Writes text to a file (standard output) while it is generated; for one sequence at a time.

    Example:
        model.generate(ids, streamer=rast.streaming.TextStreamer(model.tokenizer, skip_prompt=True))
    """

    def __init__(
        self,
        tokenizer: Decodes,
        skip_prompt: bool = False,
        skip_special_tokens: bool = True,
        file: TextIO | None = None,
    ) -> None:
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens)
        self._skip_prompt = skip_prompt
        self._file = file
        self._at_prompt = True

    def _write(self, text: str) -> None:
        file = sys.stdout if self._file is None else self._file
        file.write(text)
        file.flush()

    def put(self, value: NDArray[np.int64], /) -> None:
        """Takes the prompt `[1, length]`, then new ids `[n]`."""
        if value.ndim > 1 and len(value) > 1:
            raise ValueError("TextStreamer takes one sequence at a time")
        prompt, self._at_prompt = self._at_prompt, False
        if not (prompt and self._skip_prompt):
            self._write(self._decoder.push(value.ravel().tolist()))

    def end(self) -> None:
        """Writes what is left and a line feed."""
        self._write(self._decoder.flush() + "\n")
        self._at_prompt = True
