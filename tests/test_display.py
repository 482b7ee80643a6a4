"""Generated rows for people: each token's text and numbers, and the HTML that notebooks show."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from oracle import N_TEXT_TOKENS, ModelZoo, load_rast, make_tokenizer
from test_smollm2 import gguf_path
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

import rast
from rast.display import MAX_ROWS, MAX_TOKENS, Span, as_html, spans
from rast.loading import Tokenizer

# ---- tokenizers and outputs -----------------------------------------------------------------------------------------

WORDS = [
    "<unk>",
    *map(str, range(64)),
    "+",
    "mod 64 =",
    "→",
    "…",
    "####",
    "<script>alert(1)</script>",
    "\n",
    "&lt;",
    '"',
]


def word_level() -> Tokenizer:
    """As that of the demonstration's models: words split at spaces, no decoder, so that spaces join them again."""
    backend = Backend(models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"mod 64 =|\S+"), "removed", invert=True)
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return Tokenizer(backend)


def byte_level() -> Tokenizer:
    return Tokenizer(make_tokenizer(("<s>", "</s>")))


def sentencepiece() -> Tokenizer:
    """Llama 2's kind: "▁" for spaces, bytes for characters that have no token, the first space of a text left out."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlorstw", "▁t", "▁th", "▁the", "日"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return Tokenizer(backend)


def metaspace() -> Tokenizer:
    vocab: list[tuple[str, float]] = [
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("▁the", -1.0),
        ("se", -1.5),
        *((c, -3.0) for c in "thes"),
    ]
    backend = Backend(models.Unigram(vocab, 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend)


def word_piece() -> Tokenizer:
    """Its decoder takes spaces back before punctuation, which changes text that was decoded already."""
    words = ["[UNK]", "do", "n't", "it", "##s", ".", "'", "a", "##b", "!", " ' ", "n't do"]
    backend = Backend(models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=True)
    return Tokenizer(backend)


KINDS: list[Callable[[], Tokenizer]] = [word_level, byte_level, sentencepiece, metaspace, word_piece]


def output(
    rows: Sequence[Sequence[int]], base: Sequence[Sequence[int]] | None = None, ratio: float = 0.0, width: int = 3
) -> rast.GenerateOutput:
    """Rows of new tokens after prompts of zeros; the base's first choices are the tokens themselves unless given."""
    n = max(map(len, rows))

    def padded(values: Sequence[Sequence[float]], fill: float, dtype: type) -> np.ndarray:
        return np.array([[*row, *[fill] * (n - len(row))] for row in values], dtype).reshape(len(rows), n)

    base_logprob = padded([[-2.0] * len(row) for row in rows], np.nan, np.float32)
    return rast.GenerateOutput(
        sequences=np.hstack([np.zeros((len(rows), width), np.int64), padded(rows, 0, np.int64)]),
        new_lengths=np.array([len(row) for row in rows]),
        finish_reason=["length"] * len(rows),
        logprob=base_logprob + np.float32(ratio),
        base_logprob=base_logprob,
        base_token=padded(rows if base is None else base, -1, np.int64),
        transfer_kl=np.where(np.isnan(base_logprob), np.nan, np.float32(abs(ratio))),
        seed=0,
    )


def texts(tokenizer: Tokenizer | None, ids: Sequence[int], base: Sequence[int] | None = None) -> list[Span]:
    return spans(tokenizer, output([ids], None if base is None else [base]), 0)


def ids_of(tokenizer: Tokenizer, tokens: Sequence[str]) -> list[int]:
    ids = [tokenizer.id_of(token) for token in tokens]
    assert None not in ids
    return [id for id in ids if id is not None]


# ---- text of tokens -------------------------------------------------------------------------------------------------


def by_prefixes(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds, by decoding everything up to it: it counts as far as the whole text agrees."""
    whole = tokenizer.decode(ids)
    ends = [0]
    for i in range(1, len(ids)):
        same = [a == b for a, b in zip(tokenizer.decode(ids[:i]), whole, strict=False)]
        ends.append(max(ends[-1], [*same, False].index(False)))
    return [whole[a:b] for a, b in pairwise([*ends, len(whole)])]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_end_to_end_are_the_decoded_text(kind: Callable[[], Tokenizer]) -> None:
    """For any ids: half characters, special tokens, ids without a token, choices that the base has no token for."""
    tokenizer = kind()
    rng = np.random.default_rng(0)
    for _ in range(300):
        ids = rng.integers(0, tokenizer.n_tokens + 2, rng.integers(1, 30)).tolist()
        base = np.where(rng.random(len(ids)) < 0.5, ids, rng.integers(-1, tokenizer.n_tokens + 2, len(ids))).tolist()
        found = texts(tokenizer, ids, base)
        assert "".join(span.text for span in found) == tokenizer.decode(ids)
        # where bytes make no character, which of them an "�" belongs to is no matter
        clear = [
            [text.replace("�", "") for text in parts]
            for parts in ([s.text for s in found], by_prefixes(tokenizer, ids))
        ]
        assert clear[0] == clear[1]
        assert [span.id for span in found] == ids
        assert [span.base_id for span in found] == base
        assert [span.changed for span in found] == [a != b for a, b in zip(ids, base, strict=True)]
        assert all(span.label for span in found)


def test_words() -> None:
    tokenizer = word_level()
    ids = ids_of(tokenizer, ["40", "→", "58", "####", "58", "<|end|>"])
    base = ids_of(tokenizer, ["40", "####", "mod 64 =", "<|end|>", "58", "1"])
    found = texts(tokenizer, ids, base)
    assert [span.text for span in found] == ["40", " →", " 58", " ####", " 58", ""]
    assert [span.label for span in found] == ["40", " →", " 58", " ####", " 58", "<|end|>"]
    assert [span.base_label for span in found] == ["40", " ####", " mod 64 =", "<|end|>", " 58", " 1"]
    assert texts(tokenizer, [tokenizer.n_tokens, *ids])[0].label == f"<id {tokenizer.n_tokens}>"


def test_bytes_that_are_parts_of_characters() -> None:
    tokenizer = byte_level()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    assert len(alphabet) == 256
    # "a", then 😀 by bytes, then a first byte of a character that does not go on
    ids = ids_of(tokenizer, ["a", "ð", "Ł", "ĺ", "Ģ", "ð", "b"])
    found = texts(tokenizer, ids, [*ids[:2], *ids_of(tokenizer, ["ð", "b", "Ģ", "b", "ð"])])
    assert [span.text for span in found] == ["a", "", "", "", "😀", "�", "b"]
    assert [span.label for span in found] == ["a", "<0xF0>", "<0x9F>", "<0x98>", "😀", "<0xF0>", "b"]
    assert [span.base_label for span in found[3:]] == ["�b", "😀", "b", "<0xF0>"]
    cut = texts(tokenizer, ids[:4])
    assert "".join(span.text for span in cut) == tokenizer.decode(ids[:4]) == "a�"


def test_sentencepiece() -> None:
    tokenizer = sentencepiece()
    ids = ids_of(tokenizer, ["▁the", "▁", "<0xE4>", "<0xBD>", "<0xA0>", "日", "▁t", "</s>", "a"])
    found = texts(tokenizer, ids, ids_of(tokenizer, ["▁", "▁the", *["<0x0A>"] * 6, "▁the"]))
    assert [span.text for span in found] == ["the", " ", "", "", "你", "日", " t", "", "a"]
    assert found[2].label == "<0xE4>" and found[7].label == "</s>"
    assert [found[i].base_label for i in (0, 1, 2, 6, 8)] == ["▁", " the", "\n", "\n", " the"]


def test_text_after_bytes_that_are_no_character_is_not_held_back() -> None:
    """A decoder judges a run of byte tokens as a whole: what a prefix reads as can change with a later byte."""
    tokenizer = sentencepiece()
    for run in (["<0xFF>", "<0xC3>", "<0xA9>"], ["<0xC3>", "<0xA9>", "<0xFF>"], ["<0xC3>", "<0xA9>", "<0xC3>"]):
        ids = ids_of(tokenizer, [*run, "a", "▁t", "▁the", "日"])
        found = texts(tokenizer, ids, [*ids[:-2], *ids_of(tokenizer, ["▁th", "a"])])
        assert [span.text for span in found[-3:]] == [" t", " the", "日"], run
        assert [span.base_label for span in found[-3:]] == [" t", " th", "a"], run
        assert "".join(span.text for span in found[:4]) == "���a"


def test_other_decoders() -> None:
    tokenizer = metaspace()
    assert [span.text for span in texts(tokenizer, tokenizer.encode("the these").tolist())] == ["the", " the", "se"]
    tokenizer = word_piece()
    found = texts(tokenizer, ids_of(tokenizer, ["a", "##b", "do", "n't", "it", "##s", "."]))
    assert [span.text for span in found] == ["a", "b", " do", "n't", " it", "s", "."]


@pytest.mark.parametrize("kind", KINDS)
def test_limit(kind: Callable[[], Tokenizer]) -> None:
    tokenizer = kind()
    ids = tokenizer.encode("the other 你好 1 + 2 😀 do it.").tolist()
    out = output([ids])
    whole = spans(tokenizer, out, 0)
    for limit in range(len(ids) + 2):
        assert spans(tokenizer, out, 0, limit) == whole[:limit]


def test_shift() -> None:
    def shift(logprob: float, base_logprob: float) -> float:
        return Span("a", "a", 0, "a", 0, logprob, base_logprob, 0.0).shift

    assert shift(math.log(0.5), math.log(0.25)) == pytest.approx(0.5)
    assert shift(math.log(0.1), math.log(0.8)) == pytest.approx(-7 / 8)
    assert shift(-1.0, -1.0) == 0
    assert shift(-1.0, -math.inf) == 1 and shift(-math.inf, -1.0) == -1
    assert shift(math.nan, -1.0) == 0 and shift(-math.inf, -math.inf) == 0


def test_numbers_are_those_of_the_output(zoo: ModelZoo) -> None:
    size = N_TEXT_TOKENS + 2
    base = zoo.folder("qwen2", seed=0, vocab_size=size, tokenizer="<s>,</s>")
    small = [zoo.folder("qwen2-tied", seed=seed, vocab_size=size, tokenizer="<s>,</s>") for seed in (1, 2)]
    model = load_rast(base, *small)
    prompts = [model.tokenizer.encode(text) for text in ("the quick brown", "naïve café, said the fox", "a")]
    out = model.generate(
        prompts, do_sample=True, seed=1, max_new_tokens=20, num_return_sequences=2, return_dict_in_generate=True
    )
    assert out.tokenizer is model.tokenizer
    for row, ids in enumerate(out.new_tokens()):
        found = spans(model.tokenizer, out, row)
        assert "".join(span.text for span in found) == model.tokenizer.decode(ids)
        assert [span.id for span in found] == ids.tolist()
        for name, array in (
            ("base_id", out.base_token),
            ("logprob", out.logprob),
            ("base_logprob", out.base_logprob),
            ("transfer_kl", out.transfer_kl),
        ):
            np.testing.assert_array_equal([getattr(span, name) for span in found], array[row, : len(ids)], err_msg=name)
        np.testing.assert_array_equal([span.log_ratio for span in found], [s.logprob - s.base_logprob for s in found])
    page = parse(out)
    assert [row.text for row in page.rows] == [shown(spans(model.tokenizer, out, row)) for row in range(6)]
    assert page.colours and not page.says("no transfer")


# ---- HTML -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """A row of tokens in the page."""

    text: str = ""
    tokens: list[tuple[str, dict[str, str], str]] = dataclasses.field(default_factory=list)
    """Tag, attributes, text."""


class Page(HTMLParser):
    """Takes HTML apart and insists on its form: every tag closed, only what notebooks' sanitizers let through."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.rows: list[Row] = []
        self.lines: list[str] = []
        self.colours: list[str] = []

    def says(self, words: str) -> bool:
        return any(words in line for line in self.lines)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        assert tag in ("div", "span", "u", "br")
        assert attributes.keys() <= {"style", "title", "dir"} and len(attributes) == len(attrs)
        assert not re.search(r"url|expression|[<>&\"\\]", attributes.get("style", ""))
        if tag == "br":
            assert self.in_row and not attributes
            self.add("\n")
            return
        self.open.append(tag)
        if "dir" in attributes:
            assert self.open == ["div", "div"] and "white-space:pre-wrap" in attributes["style"]
            self.rows.append(Row())
            self.in_row = True
        elif self.in_row:
            assert len(self.open) == 3
            self.rows[-1].tokens.append((tag, attributes, ""))
            self.colours += re.findall(r"background-color:(\S+?)(?:;|$)", attributes.get("style", ""))
        elif self.open == ["div", "div"]:
            self.lines.append("")

    in_row = False

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag
        if len(self.open) == 1:
            self.in_row = False

    def handle_data(self, data: str) -> None:
        assert len(self.open) >= 2, "text outside of rows and lines"
        self.add(data)

    def add(self, data: str) -> None:
        if not self.in_row:
            self.lines[-1] += data
            return
        assert len(self.open) == 3, "text between tokens"
        self.rows[-1].text += data
        tag, attributes, text = self.rows[-1].tokens[-1]
        self.rows[-1].tokens[-1] = (tag, attributes, text + data)

    def fail(self, *_: Any) -> None:
        raise AssertionError("comments, declarations and the like")

    handle_comment = handle_decl = handle_pi = unknown_decl = handle_startendtag = fail


def parse(out: rast.GenerateOutput) -> Page:
    html = out._repr_html_()
    html.encode()
    assert "\n" not in html  # it would show where white space is kept
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == [], "tags left open"
    assert page.lines[0] == repr(out)
    return page


def shown(found: list[Span]) -> str:
    """What the page shows: a line feed stays beside its sign, other control characters have signs in their place."""
    signs = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {127: "␡"}
    return "".join(span.label for span in found).translate(signs).replace("\n", "↵\n")


def make(tokenizer: Tokenizer | None, *args: Any, **kwargs: Any) -> rast.GenerateOutput:
    out = output(*args, **kwargs)
    out.tokenizer = tokenizer
    return out


def test_page_of_a_row() -> None:
    tokenizer = word_level()
    ids = ids_of(tokenizer, ["40", "→", "58", "<|end|>"])
    out = make(tokenizer, [ids], [[*ids[:2], *ids_of(tokenizer, ["…", "<|end|>"])]], ratio=math.log(4))
    out.logprob[0, 1] = out.base_logprob[0, 1] - np.float32(math.log(2))
    out.logprob[0, 3] = out.base_logprob[0, 3]
    (row,) = parse(out).rows
    assert [(tag, text) for tag, _, text in row.tokens] == [
        ("span", "40"),
        ("span", " →"),
        ("u", " 58"),
        ("span", "<|end|>"),
    ]
    styles = [attributes.get("style", "") for _, attributes, _ in row.tokens]
    raised, lowered = (
        re.match(r"background-color:rgba\((.*),0.38\)$", styles[0]),
        re.match(r"background-color:rgba\((.*),0.25\)$", styles[1]),
    )
    assert raised and lowered and raised[1] != lowered[1]
    assert styles[2] == styles[0] and "background" not in styles[3]
    assert row.tokens[2][1]["title"].split("\n") == [
        f"' 58' ({ids[2]})",
        f"base’s first choice: ' …' ({tokenizer.id_of('…')})",
        "log-probability: -0.614, base -2.000, difference +1.386",
        "KL from the base here: 1.39",
    ]
    assert row.tokens[0][1]["title"].split("\n")[1] == "base’s first choice: the same"


def test_nothing_in_a_token_becomes_markup() -> None:
    nasty = [
        "<script>alert(1)</script>",
        "&lt;",
        '"',
        "'",
        "\" onmouseover='x'",
        "</div>",
        "<!-- ",
        "\n",
        "\n\n",
        "]]>",
        "&#10;",
    ]
    backend = Backend(models.WordLevel({text: id for id, text in enumerate(nasty)}, unk_token="'"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("<b>", special=True)])
    tokenizer = Tokenizer(backend)
    ids = [*range(tokenizer.n_tokens), tokenizer.n_tokens + 1]
    page = parse(make(tokenizer, [ids, ids], [ids, ids[::-1]], ratio=0.5))
    for row in page.rows:
        assert [text for _, _, text in row.tokens] == [
            *(text.replace("\n", "↵\n") for text in nasty),
            "<b>",
            f"<id {tokenizer.n_tokens + 1}>",
        ]
    hovers = [attributes["title"].split("\n") for _, attributes, _ in page.rows[1].tokens]
    assert [len(lines) for lines in hovers] == [4] * len(ids)
    assert hovers[0][0] == "'<script>alert(1)</script>' (0)" and hovers[7][0] == r"'\n' (7)"
    assert hovers[1][1] == f"base’s first choice: '<b>' ({len(nasty)})"


def test_white_space_and_control_characters() -> None:
    odd = {"  a": "  a", "\t": "\t", "\r": "␍", "\x00": "␀", "\x1b[1m": "␛[1m", "\x7f": "␡", "\x85": r"\x85"}
    odd |= {"\r\n": "␍↵\n", "\u202e": "\u202e", "\u200d": "\u200d", "\u2028": "\u2028"}
    backend = Backend(models.WordLevel({text: id for id, text in enumerate(odd)}, unk_token="  a"))
    backend.decoder = decoders.Fuse()
    page = parse(make(Tokenizer(backend), [range(len(odd))]))
    assert [text for _, _, text in page.rows[0].tokens] == list(odd.values())
    assert all(
        line.isprintable() for _, attributes, _ in page.rows[0].tokens for line in attributes["title"].split("\n")
    )


def test_pages_are_bounded() -> None:
    tokenizer = word_level()
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 60, (MAX_ROWS + 5, 10 * MAX_TOKENS)).tolist()
    out = make(tokenizer, rows, np.flip(rows, 1).tolist(), ratio=-1.0)
    page = parse(out)
    each = MAX_TOKENS // MAX_ROWS
    assert [row.text for row in page.rows] == [tokenizer.decode(row[:each]) for row in rows[:MAX_ROWS]]
    assert page.lines[-1] == "… and 5 more sequences"
    assert page.lines.count(f"… and {10 * MAX_TOKENS - each} more tokens") == MAX_ROWS
    assert len(out._repr_html_()) < 400_000
    single = parse(make(tokenizer, [rows[0][: MAX_TOKENS + 1]]))
    assert len(single.rows[0].tokens) == MAX_TOKENS and single.lines[-1] == "… and 1 more token"
    just = parse(make(tokenizer, [row[:each] for row in rows[:MAX_ROWS]]))
    assert not just.says("more")


def test_rows_of_different_length() -> None:
    tokenizer = word_level()
    ids = ids_of(tokenizer, ["1", "+", "2", "→"])
    page = parse(make(tokenizer, [ids, [], ids[:1]], ratio=0.1))
    assert [row.text for row in page.rows] == ["1 + 2 →", "1"]
    assert page.lines[2:] == ["[0] 4 tokens, length", "[1] 0 tokens, length", "no new tokens", "[2] 1 token, length"]


@pytest.mark.parametrize("tokenizer", [None, word_level()])
def test_no_new_tokens(tokenizer: Tokenizer | None) -> None:
    out = make(tokenizer, [[]])
    assert spans(tokenizer, out, 0) == []
    page = parse(out)
    assert page.rows == [] and page.lines[-1] == "no new tokens"
    assert parse(make(tokenizer, [[], []])).lines.count("no new tokens") == 2


def test_without_a_tokenizer(zoo: ModelZoo) -> None:
    model = load_rast(*zoo.trio())
    assert model.tokenizer is None
    prompts = [np.arange(3), np.arange(7)]
    out = model.generate(prompts, max_new_tokens=8, return_dict_in_generate=True)
    page = parse(out)
    for row, ids in enumerate(out.new_tokens()):
        assert page.rows[row].text == " ".join(map(str, ids))
        assert [a["title"].split("\n")[0] for _, a, _ in page.rows[row].tokens] == list(map(str, ids))
        assert [tag == "u" for tag, _, _ in page.rows[row].tokens] == (out.base_token[row] != ids).tolist()
    assert page.says("no tokenizer") and page.colours


def test_plain_generation_has_no_colours(zoo: ModelZoo) -> None:
    folder = zoo.folder("qwen2", seed=0, vocab_size=N_TEXT_TOKENS + 2, tokenizer="<s>,</s>")
    model = load_rast(folder)
    ids = model.tokenizer.encode("the quick")
    out = model.generate(ids, do_sample=True, seed=0, max_new_tokens=16, return_dict_in_generate=True)
    page = parse(out)
    assert page.says("no transfer") and page.colours == []
    changed = (out.base_token[0] != out.new_tokens()[0]).tolist()
    assert any(changed) and [tag == "u" for tag, _, _ in page.rows[0].tokens] == changed


def test_a_real_model() -> None:
    model = load_rast(gguf_path())
    ids = model.tokenizer.encode("Translate to Chinese and emoji: hello 你好 👩‍👩‍👧 日本語")
    out = model.generate(
        ids, do_sample=True, seed=0, max_new_tokens=48, num_return_sequences=3, return_dict_in_generate=True
    )
    page = parse(out)
    for row, new in enumerate(out.new_tokens()):
        found = spans(model.tokenizer, out, row)
        assert "".join(span.text for span in found) == model.tokenizer.decode(new)
        assert page.rows[row].text == shown(found)
    # its vocabulary on text that it does not have whole characters for
    for text in ("Ünïcödé 日本語 🤗👩‍👩‍👧 e\u0301", "def f(x):\n\treturn x**2  # ok\n\n", " ½ ٣٤ العربية"):
        ids = model.tokenizer.encode(text).tolist()
        assert "".join(span.text for span in texts(model.tokenizer, ids)) == text
        assert parse(make(model.tokenizer, [ids])).rows[0].text == shown(texts(model.tokenizer, ids))


def test_colours_leave_the_text_readable() -> None:
    """Contrast of at least 4.5 (WCAG AA) on the pages of notebooks: background and text, in grey levels."""

    def luminance(colour: Sequence[float]) -> float:
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    themes = {
        "JupyterLab light": (255, 33),
        "JupyterLab dark": (17, 224),
        "VS Code dark": (31, 204),
        "Colab dark": (56, 213),
    }
    for ratio in (9.0, -9.0):
        page = parse(make(word_level(), [[1]], ratio=ratio))
        (colour,) = page.colours
        *rgb, alpha = (float(part) for part in re.findall(r"[\d.]+", colour))
        for theme, (background, text) in themes.items():
            light = luminance([alpha * c + (1 - alpha) * background for c in rgb]) + 0.05
            other = luminance([text] * 3) + 0.05
            assert max(light, other) / min(light, other) >= 4.5, (theme, colour)


# ---- the output object ----------------------------------------------------------------------------------------------


def test_the_tokenizer_stays_out_of_fields_pickles_and_copies() -> None:
    tokenizer = word_level()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.apply_chat_template([{"role": "user", "content": "1 + 2"}])  # compiled: it could not be pickled
    out = make(tokenizer, [[3, 4]], ratio=1.0)
    names = [field.name for field in dataclasses.fields(out)]
    assert names == [
        *("sequences", "new_lengths", "finish_reason", "logprob", "base_logprob", "base_token", "transfer_kl", "seed"),
        *("scores", "logits", "steps", "drafted", "accepted"),
    ]
    assert list(dataclasses.asdict(out)) == names
    for other in (pickle.loads(pickle.dumps(out)), copy.copy(out), copy.deepcopy(out)):
        assert repr(other) == repr(out)
        np.testing.assert_array_equal(other.sequences, out.sequences)
        assert other.tokenizer is None and parse(other).rows[0].text == "3 4"
    assert out.tokenizer is tokenizer and parse(out).rows[0].text == "2 3"
    other = rast.GenerateOutput(*(getattr(out, name) for name in names))  # by position
    assert other.tokenizer is None and as_html(tokenizer, other) == out._repr_html_()
