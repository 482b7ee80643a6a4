"""Reconciling the nets of one transfer: tokenizers, EOS and pad ids, context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loading_files import make_tokenizer

from rast.loading import LoadedNet, Reconciled, Tokenizer, reconcile

WORDS = ["one", "two", "three"]  # ids 259, 260, 261
SPECIAL = ["<|eos|>", "<|pad|>"]  # ids 262, 263


def net(
    name: str = "base",
    words: list[str] | None = None,
    special: list[str] | None = None,
    *,
    rows: int = 272,
    context: int = 100,
    tokenizer: bool = True,
    roles: dict[str, str] | None = None,
    **generation: Any,
) -> LoadedNet:
    backend = make_tokenizer(WORDS if words is None else words, SPECIAL if special is None else special)
    return LoadedNet(
        name=name,
        source=f"folder/{name}",
        path=Path(f"folder/{name}"),
        architecture="Qwen2ForCausalLM",
        config={"vocab_size": rows, "max_context": context},
        tensors={},
        dtype="float32",
        tokenizer=Tokenizer(backend, special_tokens=roles) if tokenizer else None,
        generation_config=generation,
        warnings=[],
    )


def uncommon(result: Reconciled) -> list[list[int]]:
    assert all(ids.dtype == np.int32 for ids in result.uncommon)
    return [ids.tolist() for ids in result.uncommon]


def test_same_tokenizers_padded_differently() -> None:
    base = net()
    result = reconcile(base, [(net("expert", rows=264), "expert"), (net("antiexpert", rows=512), "antiexpert")])
    assert result.n_valid == 264
    assert uncommon(result) == [[], [], []]
    assert result.warnings == []
    assert base.tokenizer is not None
    assert result.pieces is not None
    assert result.pieces[0] == base.tokenizer.pieces()[0]
    assert len(result.pieces[1]) == 265
    alone = reconcile(base, [])
    assert (alone.n_valid, uncommon(alone), alone.limiting_net) == (264, [[]], "base")


def test_an_ordinary_token_differs() -> None:
    other = net("pair 2 expert", words=["one", "deux", "trois"])
    message = (
        r"base \(folder/base\) and pair 2 expert \(folder/pair 2 expert\) differ: "
        r"id 260 is 'two' in base and 'deux' in pair 2 expert \(2 ids differ\)"
    )
    with pytest.raises(ValueError, match=message):
        reconcile(net(), [(net("expert"), "expert"), (other, "expert")])


def test_an_added_token_differs() -> None:
    other = net("expert", special=["<|eos|>", "<think>"])
    result = reconcile(net(), [(net("antiexpert"), "antiexpert"), (other, "expert")])
    assert uncommon(result) == [[], [], [263]]
    assert len(result.warnings) == 1
    assert "1 ids are other tokens in expert than in base" in result.warnings[0]
    assert "id 263: '<|pad|>' against '<think>'" in result.warnings[0]
    # Without a row for it, the id is no part of that net anyway.
    narrow = net("expert", special=["<|eos|>", "<think>"], rows=263)
    assert uncommon(reconcile(net(), [(narrow, "expert")])) == [[], []]


def test_an_added_token_in_place_of_an_ordinary_one() -> None:
    other = net("expert", words=["one", "two"], special=["<|new|>", "<|eos|>", "<|pad|>"])
    result = reconcile(net(), [(other, "expert")])
    assert uncommon(result) == [[], [261]]


def test_tokens_that_only_one_has() -> None:
    more = [*SPECIAL, "<a>", "<b>", "<c>", "<d>"]
    result = reconcile(net(), [(net("expert", special=more), "expert")])
    assert result.n_valid == 264
    assert uncommon(result) == [[], []]
    assert any(
        "4 tokens of expert are not in base and are never drawn ('<a>', '<b>', '<c>', ...)" in w
        for w in result.warnings
    )
    result = reconcile(net(special=more), [(net("expert"), "expert"), (net("antiexpert", rows=265), "antiexpert")])
    assert result.n_valid == 268
    assert uncommon(result) == [[], [264, 265, 266, 267], [264]]


def test_tokenizer_wider_than_the_embedding() -> None:
    result = reconcile(net(rows=263), [(net("expert"), "expert")])
    assert result.n_valid == 263
    assert uncommon(result) == [[], []]


def test_without_tokenizers() -> None:
    bare = [(net("expert", tokenizer=False), "expert"), (net("antiexpert", tokenizer=False), "antiexpert")]
    result = reconcile(net(tokenizer=False, rows=270), bare)
    assert (result.n_valid, result.pieces) == (270, None)
    assert uncommon(result) == [[], [], []]
    assert len(result.warnings) == 1
    assert "no model has a tokenizer" in result.warnings[0]
    assert reconcile(net(tokenizer=False), []).warnings == []
    assert reconcile(net(), bare).warnings == []
    only_expert = reconcile(net(tokenizer=False, rows=270), [(net("expert"), "expert")])
    assert (only_expert.n_valid, only_expert.warnings) == (264, [])
    pair = [(net("expert"), "expert"), (net("antiexpert", words=["eins", "zwei", "drei"]), "antiexpert")]
    with pytest.raises(ValueError, match="id 259 is 'one' in expert and 'eins' in antiexpert"):
        reconcile(net(tokenizer=False), pair)


def test_eos() -> None:
    others = [
        (net("expert", eos_token_id=[262, 5]), "expert"),
        (net("antiexpert", eos_token_id=9), "antiexpert"),
        (net("expert 2", eos_token_id=6), "expert"),
    ]
    result = reconcile(net(eos_token_id=262), others)
    assert result.eos_token_id == [262, 5, 6]
    assert result.pad_token_id == 262
    assert reconcile(net(), []).eos_token_id == []
    assert reconcile(net(), []).pad_token_id is None
    assert reconcile(net(roles={"eos_token": "<|eos|>"}), []).eos_token_id == [262]
    assert reconcile(net(roles={"eos_token": "<|eos|>"}, eos_token_id=3), []).eos_token_id == [3]


def test_eos_that_the_base_does_not_have() -> None:
    renamed = net("expert", special=["<|eos|>", "<|end|>", "<|more|>"], eos_token_id=[263, 264, 262])
    result = reconcile(net(), [(renamed, "expert")])
    assert result.eos_token_id == [262]
    assert [w for w in result.warnings if "EOS" in w] == [
        f"EOS id {id} of expert is not that token in base and is not used" for id in (263, 264)
    ]


def test_pad() -> None:
    assert reconcile(net(pad_token_id=7, eos_token_id=5), []).pad_token_id == 7
    assert reconcile(net(pad_token_id=-1, eos_token_id=5), []).pad_token_id == 5
    assert reconcile(net(roles={"pad_token": "<|pad|>"}, eos_token_id=5), []).pad_token_id == 263


@pytest.mark.parametrize(
    "generation",
    [
        {"eos_token_id": "2"},
        {"eos_token_id": True},
        {"eos_token_id": [2, None]},
        {"eos_token_id": -1},
        {"pad_token_id": 1.5},
    ],
)
def test_bad_ids(generation: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^folder/base: (eos|pad)_token_id must be a token id"):
        reconcile(net(**generation), [])


def test_context() -> None:
    others = [(net("expert", context=60), "expert"), (net("antiexpert", context=50), "antiexpert")]
    result = reconcile(net(context=100), others)
    assert (result.max_context, result.limiting_net) == (50, "antiexpert")
    result = reconcile(net(context=50), others)
    assert (result.max_context, result.limiting_net) == (50, "base")


def test_bad_role() -> None:
    with pytest.raises(ValueError, match="the role of expert must be 'expert' or 'antiexpert', found 'amateur'"):
        reconcile(net(), [(net("expert"), "amateur")])


def test_eos_beyond_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"^folder/expert: eos_token_id 272 is not below vocab_size \(272\)"):
        reconcile(net(), [(net("expert", eos_token_id=[1, 272]), "expert")])
