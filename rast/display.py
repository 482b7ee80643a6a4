"""Generated rows for people to read: the text of each token with what the transfer did there, and the same as HTML."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rast.loading import Tokenizer
    from rast.outputs import GenerateOutput

__all__ = ["Span", "as_html", "spans"]


@dataclass(frozen=True)
class Span:
    """A new token: what it reads as, and what base and transfer say of it. Log-probabilities are as in
    `GenerateOutput`."""

    text: str
    """What it adds to the decoded text: nothing if it is special or ends inside a character, which the token that
    completes it adds."""
    label: str
    """`text`, or where that is empty or half a character what can stand for it, such as "<|im_end|>" or "<0xF0>"."""
    id: int
    base_label: str
    """The same of the base's first choice, as if it stood here in the token's place."""
    base_id: int
    logprob: float
    base_logprob: float
    transfer_kl: float

    @property
    def changed(self) -> bool:
        """Whether the base's first choice is another token."""
        return self.base_id != self.id

    @property
    def log_ratio(self) -> float:
        """What the transfer added to the token's log-probability."""
        return self.logprob - self.base_logprob

    @property
    def shift(self) -> float:
        """`log_ratio` between −1 and 1: the share of the token's probability that the transfer gave it (above 0), or
        of its probability under the base that the transfer took away (below 0). 0.5: twice the base's."""
        share = math.copysign(-math.expm1(-abs(self.log_ratio)), self.log_ratio)
        return 0.0 if math.isnan(share) else share


def spans(tokenizer: Tokenizer | None, output: GenerateOutput, row: int, limit: int | None = None) -> list[Span]:
    """The new tokens of a row, the first `limit` of them if given.

    The texts end to end are what `tokenizer.decode` makes of the new tokens. Without a tokenizer they are the ids with
    spaces between.
    """
    n = int(output.new_lengths[row])
    start = output.sequences.shape[1] - output.logprob.shape[1]
    ids: list[int] = output.sequences[row, start : start + n].tolist()
    base_ids: list[int] = output.base_token[row, :n].tolist()
    texts = _ids_as_texts(ids, base_ids) if tokenizer is None else _texts(tokenizer, ids, base_ids)
    return [
        Span(
            text=text,
            label=_label(tokenizer, id, text),
            id=id,
            base_label=_label(tokenizer, base_id, base_text),
            base_id=base_id,
            logprob=float(output.logprob[row, i]),
            base_logprob=float(output.base_logprob[row, i]),
            transfer_kl=float(output.transfer_kl[row, i]),
        )
        for i, (id, base_id, (text, base_text)) in enumerate(islice(zip(ids, base_ids, texts, strict=True), limit))
    ]


_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def _ids_as_texts(ids: list[int], others: list[int]) -> Iterator[tuple[str, str]]:
    for i, (id, other) in enumerate(zip(ids, others, strict=True)):
        yield f" {id}" if i else str(id), str(other)


def _texts(tokenizer: Tokenizer, ids: list[int], others: list[int]) -> Iterator[tuple[str, str]]:
    """For each id its part of the whole text, and the part that the other one would have added there.

    A token's part is known only beside its neighbours: it can end inside a character, and some decoders treat the first
    token of a text specially. So what a token adds is the difference of two decodings that begin at the same earlier
    token, and counts as far as the whole text agrees.
    """

    def decode(some: list[int]) -> str:
        return tokenizer.decode([id for id in some if id >= 0])

    whole = decode(ids)
    window = settled = 0  # tokens: where the decodings begin, and how many have all their text out
    at = 0  # where the text of the settled ones ends in the whole
    end = 0
    for i, (id, other) in enumerate(zip(ids, others, strict=True)):
        known = len(decode(ids[window:settled]))
        new = decode(ids[window : i + 1])[known:]
        other_new = new if other == id else decode([*ids[window:i], other])[known:]
        before = end
        if i + 1 == len(ids):
            end = len(whole)
        elif new and whole.startswith(new, at):
            window, settled, at = settled, i + 1, at + len(new)
            end = max(end, at)
        elif new.endswith(_UNFINISHED):
            end = max(end, at + _common(new, whole[at : at + len(new)]))
        elif new:  # a decoder that looks back beyond the window
            text = decode(ids[: i + 1])
            if whole.startswith(text):
                window, settled, at = settled, i + 1, len(text)
            end = max(end, _common(text, whole))
        yield whole[before:end], other_new


def _common(a: str, b: str) -> int:
    """Length of what both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _label(tokenizer: Tokenizer | None, id: int, text: str) -> str:
    if tokenizer is None or text.strip(_UNFINISHED):
        return text
    token = tokenizer.token_of(id)
    if token is None:
        return f"<id {id}>"
    part = tokenizer.token_bytes(id)
    try:
        part.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in part)
    return text or token


# ---- HTML -----------------------------------------------------------------------------------------------------------
# Styles stand in the elements, and colours are thin layers over the page's own: so the text reads on light and dark
# pages, and both survive the sanitizers of notebooks.

MAX_ROWS = 8
MAX_TOKENS = 1024  # of all rows that are shown

_RAISED, _LOWERED = "200,100,0", "0,110,230"
_STRONGEST = 0.5  # opacity of a colour: more would leave too little contrast on dark pages

_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
_CONTROLS |= {0x7F: "\u2421", **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}}


def as_html(tokenizer: Tokenizer | None, output: GenerateOutput) -> str:
    """The new tokens of the first rows, coloured by what the transfer did to their probability; numbers on hover.

    At most MAX_ROWS rows and MAX_TOKENS tokens; lines say how many more there are. HTML without scripts, style sheets
    and links.
    """
    n_rows = len(output.sequences)
    shown = min(n_rows, MAX_ROWS)
    there = np.arange(output.logprob.shape[1]) < output.new_lengths[:, None]
    moved = bool(np.any((output.transfer_kl > 0) | (output.logprob != output.base_logprob), where=there))
    parts = [_line(escape(repr(output))), _line(_legend(moved, tokenizer is not None))]
    for row in range(shown):
        parts.append(_row(tokenizer, output, row, MAX_TOKENS // shown, heading=n_rows > 1))
    if n_rows > shown:
        parts.append(_line(f"… and {_count(n_rows - shown, 'more sequence')}"))
    return f"<div>{''.join(parts)}</div>"


def _line(html: str) -> str:
    return f'<div style="opacity:0.8;font-size:smaller">{html}</div>'


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _legend(moved: bool, has_tokenizer: bool) -> str:
    marks = "<u>underlined</u>: the base’s first choice is another token (hover for it)"
    if not has_tokenizer:
        marks += "; token ids, since there is no tokenizer"
    if not moved:
        return f"no transfer; {marks}"
    factors = (("÷10", -0.9), ("÷2", -0.5), ("×2", 0.5), ("×10", 0.9))
    scale = " ".join(f'<span style="{_colour(shift)};padding:0 0.3em">{factor}</span>' for factor, shift in factors)
    return f"what the transfer did to a token’s probability: {scale}; {marks}"


def _colour(shift: float) -> str:
    return f"background-color:rgba({_RAISED if shift > 0 else _LOWERED},{_STRONGEST * abs(shift):.2f})"


def _row(tokenizer: Tokenizer | None, output: GenerateOutput, row: int, limit: int, heading: bool) -> str:
    n = int(output.new_lengths[row])
    parts = []
    if heading:
        parts.append(_line(f"[{row}] {_count(n, 'token')}, {escape(output.finish_reason[row])}"))
    tokens = "".join(_token(span, tokenizer is not None) for span in spans(tokenizer, output, row, limit))
    style = "white-space:pre-wrap;overflow-wrap:break-word;line-height:1.6;margin:0.2em 0 0.6em 0"
    parts.append(f'<div dir="auto" style="{style}">{tokens}</div>' if n else _line("no new tokens"))
    if n > limit:
        parts.append(_line(f"… and {_count(n - limit, 'more token')}"))
    return "".join(parts)


def _token(span: Span, has_text: bool) -> str:
    def name(label: str, id: int) -> str:
        return f"{label!r} ({id})" if has_text else str(id)

    choice = name(span.base_label, span.base_id) if span.changed else "the same"
    hover = (
        f"{name(span.label, span.id)}\n"
        f"base’s first choice: {choice}\n"
        f"log-probability: {span.logprob:.3f}, base {span.base_logprob:.3f}, difference {span.log_ratio:+.3f}\n"
        f"KL from the base here: {span.transfer_kl:.3g}"
    )
    text = escape(span.label.translate(_CONTROLS)).replace("\n", "↵<br>")
    tag = "u" if span.changed else "span"
    styles = [_colour(span.shift)] if abs(span.shift) >= 0.01 else []
    if span.label != span.text:
        styles.append("font-size:smaller;font-style:italic")
    style = f' style="{";".join(styles)}"' if styles else ""
    title = escape(hover).replace("\n", "&#10;")
    return f'<{tag}{style} title="{title}">{text}</{tag}>'
