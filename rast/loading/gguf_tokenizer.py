"""Tokenizer from GGUF metadata: byte-level BPE ("gpt2") and SentencePiece-like BPE ("llama")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

_CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 3, 4, 5, 6  # tokenizer.ggml.token_type

_SPACE = "▁"


@dataclass(frozen=True)
class _Split:
    """How text is cut before merging, and what else goes with it."""

    pattern: str | None = None  # None: GPT-2's own
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False  # a word that is a token is taken whole
    add_bos: bool = False  # unless the file says


_LLAMA3 = _Split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ignore_merges=True,
    add_bos=True,
)
_QWEN2 = _Split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    nfc=True,
)
_TEKKEN = _Split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ignore_merges=True,
    add_bos=True,
)
_SPLITS: Mapping[str, _Split] = {
    "default": _Split(),
    "gpt-2": _Split(),
    "smollm": _Split(single_digits=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": replace(_QWEN2, nfc=False),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "tekken": _TEKKEN,
}


def gguf_tokenizer(metadata: Mapping[str, Any], path: Path) -> tuple[Tokenizer | None, list[str]]:
    """(tokenizer, warnings) of a GGUF file; None without a vocabulary that we can build. ValueError if corrupt."""
    model = metadata.get("tokenizer.ggml.model")
    if not isinstance(model, str) or model not in _BUILDERS:
        found = "no tokenizer" if model is None else f"tokenizer type {model!r} is not supported"
        return None, [f"{path}: {found} (supported: {', '.join(_BUILDERS)}); this model has token ids only"]
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{path}: tokenizer.ggml.tokens must be a list of strings")
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.token_type must have one entry for each of the {len(tokens)} tokens")

    vocab = _Vocabulary(metadata, path, tokens, types)
    try:
        backend, add_bos, warnings = _BUILDERS[model](vocab)
        _add_marked_tokens(backend, vocab)
    except ValueError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path}: the tokenizer's vocabulary and merges do not fit: {error}") from error

    special = {}
    for role, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if id is not None:
            if not isinstance(id, int) or not 0 <= id < len(tokens):
                raise ValueError(f"{path}: tokenizer.ggml.{key}_token_id must be below {len(tokens)}, found {id!r}")
            special[f"{role}_token"] = tokens[id]
    _add_begin_and_end(backend, metadata, special, add_bos)
    template = metadata.get("tokenizer.chat_template")
    tokenizer = Tokenizer(
        backend, special_tokens=special, chat_template=template if isinstance(template, str) else None
    )
    return tokenizer, warnings


@dataclass(frozen=True)
class _Vocabulary:
    metadata: Mapping[str, Any]
    path: Path
    tokens: list[str]
    types: list[int]

    def ids(self) -> dict[str, int]:
        """Id by token, without the fillers up to the embedding's size, which the file marks as unused."""
        return {token: id for id, token in enumerate(self.tokens) if self.types[id] != _UNUSED}


def _byte_level(vocab: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool, list[str]]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    warnings = []
    name = vocab.metadata.get("tokenizer.ggml.pre")
    if name not in _SPLITS:
        found = "is missing" if name is None else f"{name!r} is not known"
        warnings.append(
            f"{vocab.path}: tokenizer.ggml.pre {found}; text is split as for GPT-2, ids may differ slightly"
        )
    split = _SPLITS.get(str(name), _SPLITS["default"])
    merges = vocab.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ValueError(f"{vocab.path}: tokenizer.ggml.merges is missing")
    pairs = []
    for merge in merges:
        left, _, right = str(merge).partition(" ")
        if not left or not right:
            raise ValueError(f"{vocab.path}: tokenizer.ggml.merges holds {merge!r}, which is not a pair")
        pairs.append((left, right))

    backend = Tokenizer(models.BPE(vocab=vocab.ids(), merges=pairs, ignore_merges=split.ignore_merges))
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, split.add_bos, warnings


def _sentencepiece(vocab: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool, list[str]]:
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = vocab.ids()
    unknown = vocab.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    backend = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges_from_scores(vocab, ids),
            unk_token=vocab.tokens[unknown] if isinstance(unknown, int) and unknown < len(vocab.tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = vocab.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[normalizers.Normalizer] = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return backend, True, []


_BUILDERS: Mapping[str, Callable[[_Vocabulary], tuple[tokenizers.Tokenizer, bool, list[str]]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def _merges_from_scores(vocab: _Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's BPE makes: the pair whose union scores best first."""
    scores = vocab.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocab.tokens):
        raise ValueError(f"{vocab.path}: tokenizer.ggml.scores must have one entry for each of the tokens")
    plain = {token: id for token, id in ids.items() if vocab.types[id] not in (_CONTROL, _BYTE)}
    merges = []
    for token, id in plain.items():
        for cut in range(1, len(token)):
            left, right = plain.get(token[:cut]), plain.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[id], left, right))
    merges.sort()
    return [(vocab.tokens[left], vocab.tokens[right]) for _, left, right in merges]


def _add_marked_tokens(backend: tokenizers.Tokenizer, vocab: _Vocabulary) -> None:
    """Tokens that are matched whole in the text: control tokens (special) and user-defined ones."""
    from tokenizers import AddedToken

    for kind in (_CONTROL, _USER_DEFINED):
        special = kind == _CONTROL
        marked = [
            AddedToken(token, normalized=False, special=special)
            for token, type in zip(vocab.tokens, vocab.types, strict=True)
            if type == kind and token
        ]
        if special:
            backend.add_special_tokens(marked)
        else:
            backend.add_tokens(marked)


def _add_begin_and_end(
    backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], special: Mapping[str, str], add_bos: bool
) -> None:
    """Has `encode` begin a text with BOS, or end it with EOS, where the file (or the tokenizer's kind) asks for it."""
    from tokenizers import processors

    begin = special.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None
    end = special.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    around = {token: backend.token_to_id(token) for token in (begin, end) if token is not None}
    if around:
        template = [*([begin] if begin else []), "$A", *([end] if end else [])]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(around.items()))
