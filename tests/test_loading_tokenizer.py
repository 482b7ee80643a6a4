"""Tokenizers from folders and GGUF files: ids, text, bytes and chat templates as transformers gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from loading_files import edit_json, make_tokenizer
from test_loading_gguf import smollm2
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, processors

from rast.loading import Tokenizer, load_net
from rast.loading.gguf_tokenizer import gguf_tokenizer
from rast.loading.tokenizer import byte_alphabet

PATH = Path("model.gguf")

TEXTS = [
    "Hello, world! It's a test; we'll see, I'D say.",
    "def f(x):\n\treturn x**2  # ok\n\n\n",
    "Ünïcödé 日本語 العربية 🤗👩‍👩‍👧 e\u0301",
    "<|im_start|>user\nhi there<|im_end|>\n",
    "1,234.56 $9 and 2024-01-01",
    " leading,   inner and trailing  ",
    "\u00a0no-break\u2003space\x00\x01",
    "½ ² ٣٤",
    "",
    " ",
    "\n\r\n\t",
]


@pytest.fixture(scope="module")
def smol() -> Tokenizer:
    tokenizer = load_net(smollm2()).tokenizer
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def smol_hf() -> Any:
    path = smollm2()
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_smollm2_ids(smol: Tokenizer, smol_hf: Any) -> None:
    for text in TEXTS:
        ids = smol.encode(text)
        assert ids.dtype == np.int32
        if text != "½ ² ٣٤":  # transformers' conversion leaves out that "smollm" splits digits
            assert ids.tolist() == smol_hf(text)["input_ids"], text
        assert smol.decode(ids, skip_special_tokens=False) == text
        assert b"".join(map(smol.token_bytes, ids.tolist())) == text.encode()
    assert smol.decode(smol.encode("<|im_start|>hi<|im_end|>")) == "hi"


def test_smollm2_splits_digits(smol: Tokenizer) -> None:
    """As SmolLM2's own tokenizer and llama.cpp do: a run of spaces before a digit stays one token."""
    assert [smol.token_of(id) for id in smol.encode("a  12 3").tolist()] == ["a", "ĠĠ", "1", "2", "Ġ", "3"]


def test_smollm2_tables(smol: Tokenizer, smol_hf: Any) -> None:
    assert smol.n_tokens == 49152
    assert smol.tokens() == smol_hf.convert_ids_to_tokens(range(49152))
    pieces, offsets = smol.pieces()
    assert offsets.dtype == np.uint32
    assert offsets.shape == (49153,)
    assert offsets[-1] == len(pieces)
    for id in range(0, 49152, 97):
        assert pieces[offsets[id] : offsets[id + 1]] == smol.token_bytes(id)
    assert (smol.bos_token, smol.eos_token, smol.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert (smol.bos_token_id, smol.eos_token_id, smol.unk_token_id) == (1, 2, 0)
    assert {0, 1, 2} <= smol.special_ids <= smol.added_ids


def test_smollm2_chat_template(smol: Tokenizer, smol_hf: Any) -> None:
    messages = [{"role": "user", "content": "Hi <b>there</b>"}, {"role": "assistant", "content": "Hello"}]
    for prompt in (False, True):
        ours = smol.apply_chat_template(messages, add_generation_prompt=prompt)
        assert ours == smol_hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def save(folder: Path, backend: Backend, **settings: Any) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend", **settings}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def test_folder(tmp_path: Path) -> None:
    backend = make_tokenizer(special=["<|bos|>", "<|eos|>", "⁂ mark"])
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = save(
        tmp_path, backend, eos_token={"__type": "AddedToken", "content": "<|eos|>"}, bos_token="<|bos|>", pad_token=None
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "hello<|eos|> hell⁂ mark"]:
        for special in (False, True):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert ids.tolist() == theirs(text, add_special_tokens=special)["input_ids"]
            for skip in (False, True):
                assert tokenizer.decode(ids, skip) == theirs.decode(ids.tolist(), skip_special_tokens=skip)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == ("<|eos|>", "<|bos|>", None)
    assert tokenizer.eos_token_id == tokenizer.id_of("<|eos|>") == tokenizer.n_tokens - 2
    assert (tokenizer.pad_token_id, tokenizer.id_of("nothing"), tokenizer.token_of(10**6)) == (None, None, None)
    assert tokenizer.token_of(-1) is None
    assert tokenizer.token_bytes(tokenizer.n_tokens - 1) == "⁂ mark".encode()
    assert tokenizer.token_bytes(10**6) == b""


def test_holes_in_the_ids(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, Backend(models.BPE(vocab={"a": 0, "b": 5}, merges=[])))
    assert tokenizer.n_tokens == 6
    assert tokenizer.tokens() == ["a", None, None, None, None, "b"]
    pieces, offsets = tokenizer.pieces()
    assert (pieces, offsets.tolist()) == (b"ab", [0, 1, 1, 1, 1, 1, 2])


def test_bytes_of_sentencepiece_tokens(tmp_path: Path) -> None:
    vocab = {token: id for id, token in enumerate(["<unk>", "<0x0A>", "<0xE6>", "▁", "▁the", "<0xZZ>", "日"])}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    expected = [b"<unk>", b"\n", b"\xe6", b" ", b" the", b"<0xZZ>", "日".encode()]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert [save(tmp_path, backend).token_bytes(id) for id in range(7)] == expected
    backend.decoder = decoders.Metaspace()
    tokenizer = save(tmp_path, backend)
    assert [tokenizer.token_bytes(id) for id in (1, 4)] == [b"<0x0A>", b" the"]


def test_byte_alphabet() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_alphabet() == {char: byte for byte, char in bytes_to_unicode().items()}


TEMPLATE = (
    "{{ bos_token }}{%- for m in messages %}\n    {%- if m.role == 'stop' %}{% break %}{% endif %}\n"
    "[{{ m['role'] }}] {% generation %}{{ m.content | trim }}{% endgeneration %} {{ m | tojson }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if thinking is defined %} {{ thinking }}{% endif %}{% endif %}"
    "{% if messages | length > 3 %}{{ raise_exception('too <long>') }}{% endif %}{{ strftime_now('%%') }}"
)


def test_chat_template_as_transformers_renders_it(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, make_tokenizer(), chat_template=TEMPLATE, bos_token="<|eos|>")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": " <é> & "}, {"role": "stop", "content": ""}]
    for options in ({}, {"add_generation_prompt": False}, {"thinking": "hard"}):
        expected = theirs.apply_chat_template(messages, tokenize=False, **{"add_generation_prompt": True, **options})
        assert tokenizer.apply_chat_template(messages, **options) == expected
    with pytest.raises(ValueError, match="too <long>"):
        tokenizer.apply_chat_template(messages * 2)
    with pytest.raises(ValueError, match="each message must be a dict"):
        tokenizer.apply_chat_template(["hi"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "template",
    ["{{ messages.__class__.__mro__ }}", "{% for m in messages %}", "{{ messages.append(1) }}", "{{ 1 + messages }}"],
)
def test_bad_chat_templates(template: str, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, make_tokenizer(), chat_template=template)
    with pytest.raises(ValueError, match="chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_places_of_chat_templates(tmp_path: Path) -> None:
    assert save(tmp_path, make_tokenizer()).chat_template is None
    with pytest.raises(ValueError, match="no chat template"):
        save(tmp_path, make_tokenizer()).apply_chat_template([])
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert save(tmp_path, make_tokenizer(), chat_template=named).chat_template == "d"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert save(tmp_path, make_tokenizer(), chat_template="config").chat_template == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert save(tmp_path, make_tokenizer(), chat_template="config").chat_template == "jinja"


def test_bad_files(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None
    for text in ("", "{", "{}", '{"model": 1}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json: not a valid tokenizer"):
            Tokenizer.from_folder(tmp_path)
    save(tmp_path, make_tokenizer())
    edit_json(tmp_path / "tokenizer_config.json", eos_token=5)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer is not None
    assert tokenizer.eos_token is None
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: expected a JSON object"):
        Tokenizer.from_folder(tmp_path)


def byte_level(**metadata: Any) -> dict[str, Any]:
    tokens = [*byte_alphabet(), "he", "ll", "hell", "<|eos|>", "<think>", "[PAD261]"]
    kinds = [1] * 259 + [3, 4, 5]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
        "tokenizer.ggml.eos_token_id": 259,
        **{f"tokenizer.ggml.{key}": value for key, value in metadata.items()},
    }


def test_gguf_byte_level() -> None:
    tokenizer, warnings = gguf_tokenizer(byte_level(), PATH)
    assert warnings == []
    assert tokenizer is not None
    assert tokenizer.n_tokens == 261  # without the filler
    assert tokenizer.added_ids == {259, 260}
    assert tokenizer.special_ids == {259}
    assert tokenizer.encode("hello<think><|eos|>").tolist()[-2:] == [260, 259]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("")[:1].size == 0
    with_ends, _ = gguf_tokenizer(byte_level(add_bos_token=True, bos_token_id=259, add_eos_token=True), PATH)
    assert with_ends is not None
    assert with_ends.encode("he").tolist() == [259, 256, 259]
    assert with_ends.encode("he", add_special_tokens=False).tolist() == [256]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["ab", " 1234", "  ", " x"]),
        ("default", ["ab", " 1234", "  ", " x"]),
        ("smollm", ["ab", " ", "1", "2", "3", "4", "  ", " x"]),
        ("qwen2", ["ab", " ", "1", "2", "3", "4", "  ", " x"]),
        ("llama-bpe", ["ab", " ", "123", "4", "  ", " x"]),
        ("tekken", ["ab", " ", "1", "2", "3", "4", "  ", " x"]),
        ("novel", ["ab", " 1234", "  ", " x"]),
    ],
)
def test_gguf_splits(pre: str, expected: list[str]) -> None:
    tokenizer, warnings = gguf_tokenizer(byte_level(pre=pre), PATH)
    assert tokenizer is not None
    assert len(warnings) == (pre == "novel")
    parts = tokenizer.backend.pre_tokenizer.pre_tokenize_str("ab 1234   x")
    assert [part.replace("Ġ", " ") for part, _ in parts] == expected


def sentencepiece(**metadata: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = {"▁": -9.0, "h": -9.0, "e": -9.0, "l": -9.0, "o": -9.0, "he": -1.0, "ll": -2.0, "el": -1.5, "hell": -3.0}
    words |= {"▁hell": -4.0, "lo": -0.5}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + list(words),
        "tokenizer.ggml.scores": [0.0] * len(tokens) + list(words.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in metadata.items()},
    }


def test_gguf_sentencepiece() -> None:
    tokenizer, warnings = gguf_tokenizer(sentencepiece(), PATH)
    assert warnings == []
    assert tokenizer is not None

    def pieces(text: str) -> list[str | None]:
        return [tokenizer.token_of(id) for id in tokenizer.encode(text).tolist()]

    assert pieces("hello") == ["<s>", "▁", "he", "l", "lo"]  # the best score first: "lo", then "he"
    assert pieces("hell") == ["<s>", "▁hell"]
    assert pieces("日</s>he") == ["<s>", "▁", "<0xE6>", "<0x97>", "<0xA5>", "</s>", "▁", "he"]
    assert pieces("  he") == ["<s>", "▁", "▁", "▁", "he"]
    for text in ("hello 日本\n", " hell  hole"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    bare, _ = gguf_tokenizer(sentencepiece(add_space_prefix=False, add_bos_token=False), PATH)
    assert bare is not None
    assert [bare.token_of(id) for id in bare.encode("hell").tolist()] == ["hell"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level(tokens=None), "tokens must be a list"),
        (byte_level(tokens=[1, 2]), "tokens must be a list"),
        (byte_level(token_type=[1]), "token_type must have one entry"),
        (byte_level(merges=None), "merges is missing"),
        (byte_level(merges=["he"]), "not a pair"),
        (byte_level(merges=["hel lo"]), "do not fit"),
        (byte_level(eos_token_id=10**6), "eos_token_id must be below"),
        (byte_level(eos_token_id="x"), "eos_token_id must be below"),
        (sentencepiece(scores=None), "scores must have one entry"),
        (sentencepiece(scores=["x"] * 270), "do not fit"),
    ],
)
def test_bad_gguf_vocabulary(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        gguf_tokenizer(metadata, PATH)
    assert str(caught.value).startswith(str(PATH))


def test_gguf_without_a_known_vocabulary() -> None:
    for metadata in ({}, {"tokenizer.ggml.model": "bert"}):
        tokenizer, warnings = gguf_tokenizer(metadata, PATH)
        assert tokenizer is None
        assert "token ids only" in warnings[0]


def test_text_and_ids_of_the_wrong_kind(smol: Tokenizer) -> None:
    ids = smol.encode("Paris")
    assert smol.decode(ids[0]) == smol.decode(ids[:1])
    assert smol.decode([]) == ""
    with pytest.raises(ValueError, match="Unicode"):
        smol.encode("a\ud800")
    with pytest.raises(TypeError, match="string"):
        smol.encode(b"a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="one by one"):
        smol.decode(ids[None])
    with pytest.raises(ValueError, match="-1"):
        smol.decode([-1])
