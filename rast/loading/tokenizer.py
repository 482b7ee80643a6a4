"""The tokenizer of a net: a thin wrapper of `tokenizers.Tokenizer` with what generation needs around it."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .files import read_json

if TYPE_CHECKING:
    import jinja2
    import tokenizers

_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


def byte_alphabet() -> dict[str, int]:
    """What byte-level vocabularies write bytes with: printable ones as themselves, the others from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """Text to ids and back. Ids of special tokens that the tokenizer does not have are None."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """`special_tokens`: text by role ("bos_token", "eos_token", "pad_token", "unk_token", others)."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.n_tokens: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """Largest id + 1."""
        added = backend.get_added_tokens_decoder()
        self.added_ids = frozenset(added)
        """Ids of tokens added beside the ordinary ones, special or not."""
        self.special_ids = frozenset(id for id, token in added.items() if token.special)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer | None:
        """From tokenizer.json and tokenizer_config.json; None without a tokenizer.json. ValueError if corrupt."""
        import tokenizers

        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a valid tokenizer: {error}") from error
        settings_path = folder / "tokenizer_config.json"
        settings = read_json(settings_path) if settings_path.exists() else {}
        special = {key: _token_text(value) for key, value in settings.items() if key.endswith("_token")}
        texts = {key: text for key, text in special.items() if text is not None}
        return cls(backend, special_tokens=texts, chat_template=_chat_template(folder, settings))

    def encode(self, text: str, add_special_tokens: bool = True) -> NDArray[np.int32]:
        """Ids of `text`, int32 [n]. Special tokens written in the text are recognised; `add_special_tokens` adds those
        the model begins (or ends) a text with, which the output of `apply_chat_template` already has."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text is not valid Unicode: {error.reason} at character {error.start}") from None
        try:
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        except MemoryError:
            raise
        except Exception as error:  # the library raises plain Exception, for a word outside a closed vocabulary
            raise ValueError(f"the tokenizer cannot encode {reprlib.repr(text)}: {error}") from error
        return np.array(encoding.ids, np.int32)

    def decode(self, ids: ArrayLike, skip_special_tokens: bool = True) -> str:
        """Text of `ids` [n] or of one id; ids without a token give nothing."""
        array = np.atleast_1d(np.asarray(ids))
        if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
            raise TypeError(f"ids must be integers [n], not {array.dtype} {list(array.shape)}: decode rows one by one")
        if len(array) and array.min() < 0:
            raise ValueError(f"{array.min()} is not a token id")
        return str(self.backend.decode(array.astype(np.int64).tolist(), skip_special_tokens=skip_special_tokens))

    def token_of(self, id: int) -> str | None:
        """The token as the vocabulary writes it, None for an id without one."""
        return self.backend.id_to_token(id) if id >= 0 else None

    def id_of(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def tokens(self) -> list[str | None]:
        """`token_of` for all ids, [n_tokens]."""
        tokens: list[str | None] = [None] * self.n_tokens
        for token, id in self.backend.get_vocab(with_added_tokens=True).items():
            tokens[id] = token
        return tokens

    def token_bytes(self, id: int) -> bytes:
        """What the token contributes to the text; b"" for an id without a token."""
        token = self.token_of(id)
        return b"" if token is None else self._to_bytes(token, id in self.added_ids)

    def pieces(self) -> tuple[bytes, NDArray[np.uint32]]:
        """`token_bytes` of all ids end to end, and their n_tokens + 1 offsets."""
        parts = [
            b"" if token is None else self._to_bytes(token, id in self.added_ids)
            for id, token in enumerate(self.tokens())
        ]
        offsets = np.zeros(len(parts) + 1, np.uint32)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        return b"".join(parts), offsets

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as the model's chat template writes it. `variables` are passed on to the template.

        ValueError without a template, or when it refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template")
        import jinja2

        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f"each message must be a dict with 'role' and 'content', found {message!r}")
        context: dict[str, Any] = {"tools": None, "documents": None, **self.special_tokens, **variables}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **context)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.id_of(token)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.special_tokens.get("pad_token")

    @property
    def unk_token(self) -> str | None:
        return self.special_tokens.get("unk_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._special_id("unk_token")

    @cached_property
    def _template(self) -> jinja2.Template:
        return _compile(self.chat_template or "")

    @cached_property
    def _spelling(self) -> tuple[bool, bool, list[tuple[str, str]]]:
        """How the decoder turns tokens into text: (byte-level, <0xXX> bytes, replacements)."""
        decoder = self.backend.decoder
        steps = [] if decoder is None else [json.loads(decoder.__getstate__())]
        byte_level = byte_fallback = False
        replacements = []
        while steps:
            step = steps.pop(0)
            match step["type"]:
                case "Sequence":
                    steps[:0] = step["decoders"]
                case "ByteLevel":
                    byte_level = True
                case "ByteFallback":
                    byte_fallback = True
                case "Metaspace":
                    replacements.append((step["replacement"], " "))
                case "Replace" if "String" in step["pattern"]:
                    replacements.append((step["pattern"]["String"], step["content"]))
        return byte_level, byte_fallback, replacements

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        return byte_alphabet()

    def _to_bytes(self, token: str, added: bool) -> bytes:
        byte_level, byte_fallback, replacements = self._spelling
        if added:
            return token.encode()
        if byte_level:
            alphabet = self._alphabet
            try:
                return bytes([alphabet[char] for char in token])
            except KeyError:
                return token.encode()
        if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()


def _token_text(value: object) -> str | None:
    """A special token in tokenizer_config.json: its text, or an object that holds it."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """From chat_template.jinja, chat_template.json or tokenizer_config.json; of several named ones, "default"."""
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        try:
            return jinja.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{jinja}: not UTF-8 text: {error}") from error
    old = folder / "chat_template.json"
    template = read_json(old).get("chat_template") if old.exists() else settings.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _compile(source: str) -> jinja2.Template:
    """A template as HuggingFace runs it: sandboxed, with the helpers that chat templates call."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks the assistant's words for training; here it is only its contents."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is not valid: {error}") from error
