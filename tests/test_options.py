"""generate(), option by option, against transformers' generate on one base model in float32."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from oracle import (
    N_TEXT_TOKENS,
    ModelZoo,
    assert_logits_close,
    details,
    edit_json,
    hf_logits,
    load_hf,
    load_rast,
    make_tokenizer,
    processed,
    random_prompts,
)

VOCAB = 311


@pytest.fixture(scope="module")
def folder(zoo: ModelZoo) -> Path:
    return zoo.folder("llama", seed=3, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_rast(folder)


def hf_generate(folder: Path, prompts: np.ndarray, mask: np.ndarray | None = None, **options: Any) -> Any:
    hf = load_hf(folder)
    ids = torch.from_numpy(np.atleast_2d(prompts).astype(np.int64))
    attention = torch.ones_like(ids) if mask is None else torch.from_numpy(mask.astype(np.int64))
    options = {"pad_token_id": 0} | options
    return hf.generate(ids, attention_mask=attention, **options)


PROMPTS = np.stack(random_prompts(6, VOCAB, seed=11, low=12, high=12))


def greedy_tokens(folder: Path, row: int, n: int) -> list[int]:
    return hf_generate(folder, PROMPTS[row : row + 1], max_new_tokens=n, do_sample=False)[0, 12:].tolist()


def frequent(folder: Path, n: int = 6) -> list[int]:
    """Tokens that greedy decoding of PROMPTS brings early and often."""
    rows = hf_generate(folder, PROMPTS, max_new_tokens=12, do_sample=False)[:, 12:].numpy()
    ids, counts = np.unique(rows, return_counts=True)
    return [int(i) for i in ids[np.argsort(-counts, kind="stable")][:n]]


def test_greedy_with_each_option(model: Any, folder: Path) -> None:
    """Whole sequences, every option that changes greedy decoding."""
    often = frequent(folder)
    first = greedy_tokens(folder, 0, 4)
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "repetition_penalty > 1": dict(repetition_penalty=1.3),
        "repetition_penalty < 1": dict(repetition_penalty=0.8),
        "bad word": dict(bad_words_ids=[[often[0]]]),
        "bad words": dict(bad_words_ids=[[often[0]], [often[1]], [first[0], first[1]], first[1:4]]),
        "suppress": dict(suppress_tokens=often[:3]),
        "one eos": dict(eos_token_id=often[0]),
        "several eos": dict(eos_token_id=often[:4]),
        "other pad": dict(eos_token_id=often[:4], pad_token_id=17),
        "min_new_tokens": dict(eos_token_id=often[:4], min_new_tokens=9),
        "min_length": dict(eos_token_id=often[:4], min_length=20),
        "min_length shorter than the prompt": dict(eos_token_id=often[:4], min_length=5),
        "a bad word that is an eos": dict(eos_token_id=often[0], bad_words_ids=[[often[0]], [often[1]]]),
        "penalty and eos": dict(eos_token_id=often[:2], repetition_penalty=1.2, min_new_tokens=3),
        "all": dict(
            eos_token_id=often[:2],
            repetition_penalty=1.2,
            min_new_tokens=6,
            suppress_tokens=[often[2]],
            bad_words_ids=[[often[3]], [first[0], first[1]]],
        ),
    }
    for name, options in cases.items():
        options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0} | options
        want = hf_generate(folder, PROMPTS, **options).numpy()
        got = model.generate(PROMPTS, **options)
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_bad_word_as_long_as_the_context(model: Any, folder: Path) -> None:
    """As in transformers, a word counts as soon as all its tokens but the last fit before the next one."""
    prompt = PROMPTS[0, :1]
    first, second = hf_generate(folder, prompt, max_new_tokens=2, do_sample=False)[0, 1:].tolist()
    for word in ([int(prompt[0]), first], [int(prompt[0]), first, second], [first, second]):
        options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, bad_words_ids=[word])
        np.testing.assert_array_equal(model.generate(prompt, **options), hf_generate(folder, prompt, **options).numpy())


def test_lengths(model: Any, folder: Path) -> None:
    for options in (dict(max_length=20), dict(max_new_tokens=7), dict(max_length=14, max_new_tokens=5), dict()):
        want = hf_generate(folder, PROMPTS, **options).numpy()
        np.testing.assert_array_equal(model.generate(PROMPTS, pad_token_id=0, **options), want, err_msg=str(options))


@pytest.mark.parametrize("do_sample", [False, True])
def test_processed_scores_of_every_step(model: Any, folder: Path, do_sample: bool) -> None:
    """Rows of `scores` against HuggingFace's processors on HuggingFace's logits, fed with rast's own tokens."""
    often = frequent(folder)
    cases: list[dict[str, Any]] = [
        dict(),
        dict(temperature=0.6),
        dict(temperature=1.7, top_k=20),
        dict(top_k=0, top_p=0.9),
        dict(top_k=0, top_p=0.05),
        dict(top_k=0, min_p=0.1),
        dict(top_k=0, min_p=0.0),
        dict(top_k=1),
        dict(top_k=0),
        dict(top_k=1000),
        dict(temperature=1.5, top_k=40, top_p=0.8, min_p=0.02),
        dict(repetition_penalty=1.4, temperature=0.9, top_p=0.95),
        dict(bad_words_ids=[[often[0]], [often[1], often[2]]], suppress_tokens=[often[3]], top_p=0.9, top_k=0),
        dict(eos_token_id=often[:3], min_new_tokens=5, repetition_penalty=0.9),
        dict(eos_token_id=often[:3], min_length=16, suppress_tokens=[often[4]], temperature=2.0),
    ]
    for options in cases:
        if not do_sample and {"temperature", "top_k", "top_p", "min_p"} & options.keys():
            continue
        out = details(model, PROMPTS, do_sample=do_sample, seed=5, max_new_tokens=10, **options)
        for row, sequence in enumerate(out.sequences):
            want = hf_logits(load_hf(folder), sequence[:-1])[11:]
            for step in range(len(out.scores)):
                got = out.scores[step][row]
                if np.isnan(got).all():  # finished
                    assert step > 0 and sequence[12 + step - 1] in [*np.atleast_1d(options.get("eos_token_id", [])), 0]
                    continue
                ids = sequence[: 12 + step]
                expected = processed(want[step], ids, 12, do_sample=do_sample, **options)
                assert_logits_close(got, expected, context=f"{options}, row {row}, step {step}")
                assert np.isfinite(got[sequence[12 + step]])


def test_oracle_is_huggingface_generate(folder: Path) -> None:
    """The test's own chain of processors is the one that transformers' generate builds."""
    options = dict(
        do_sample=True,
        repetition_penalty=1.4,
        bad_words_ids=[[3], [5, 9]],
        eos_token_id=[7, 8],
        min_new_tokens=3,
        suppress_tokens=[1, 2],
        temperature=0.7,
        top_k=30,
        top_p=0.9,
        min_p=0.01,
    )
    out = hf_generate(
        folder,
        PROMPTS,
        max_new_tokens=4,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    for step in range(4):
        for row in range(len(PROMPTS)):
            ids = out.sequences[row, : 12 + step].numpy()
            want = processed(out.logits[step][row].numpy(), ids, 12, **options)
            np.testing.assert_allclose(out.scores[step][row].numpy(), want, rtol=1e-6)


def test_top_k_keeps_ties(zoo: ModelZoo, tmp_path: Path) -> None:
    from oracle import make_config, make_model

    hf = make_model(make_config("qwen2", vocab_size=64), seed=1)
    head = hf.lm_head.weight.data
    head[32:] = head[:32]  # every logit twice
    hf.save_pretrained(tmp_path)
    out = details(load_rast(tmp_path), np.array([1, 2, 3]), do_sample=True, top_k=3, max_new_tokens=1, seed=0)
    assert np.isfinite(out.scores[0][0]).sum() == 4


def test_argmax_takes_the_lowest_id_of_ties(zoo: ModelZoo, tmp_path: Path) -> None:
    from oracle import make_config, make_model

    hf = make_model(make_config("qwen2", vocab_size=64), seed=1)
    hf.lm_head.weight.data[32:] = hf.lm_head.weight.data[:32]
    hf.save_pretrained(tmp_path)
    assert load_rast(tmp_path).generate(np.arange(9), max_new_tokens=20)[0, 9:].max() < 32


def test_num_return_sequences_layout(model: Any, folder: Path) -> None:
    """Rows of one prompt are neighbours; greedy copies are equal; samples differ."""
    out = details(model, PROMPTS, do_sample=True, seed=2, num_return_sequences=3, max_new_tokens=6)
    assert out.sequences.shape == (18, 18)
    np.testing.assert_array_equal(out.sequences[:, :12], np.repeat(PROMPTS, 3, axis=0))
    assert out.logits[0].shape == out.scores[0].shape == (18, VOCAB)
    np.testing.assert_array_equal(out.logits[0][0], out.logits[0][1])
    assert len({tuple(row) for row in out.sequences.tolist()}) == 18
    with pytest.raises(ValueError, match="num_return_sequences"):  # as HuggingFace: greedy has one answer
        model.generate(PROMPTS, num_return_sequences=2, do_sample=False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model: Any, folder: Path, side: str) -> None:
    """Returned rows are left-padded, whatever the input; what padding holds is never looked at."""
    prompts = random_prompts(5, VOCAB, seed=3, low=2, high=15)
    width = max(map(len, prompts))
    ids = np.full((5, width), 10**6)
    mask = np.zeros((5, width), dtype=np.int64)
    for i, prompt in enumerate(prompts):
        where = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[i, where], mask[i, where] = prompt, 1
    options: dict[str, Any] = dict(max_new_tokens=8, repetition_penalty=1.2, pad_token_id=42, do_sample=False)
    got = model.generate(ids, attention_mask=mask, **options)
    assert got.shape == (5, width + 8)
    for prompt, row in zip(prompts, got, strict=True):
        np.testing.assert_array_equal(row[: width - len(prompt)], 42)
        np.testing.assert_array_equal(row[width - len(prompt) : width], prompt)
        np.testing.assert_array_equal(row[width:], hf_generate(folder, prompt, **options)[0, len(prompt) :].numpy())
    np.testing.assert_array_equal(model.generate(prompts, **options), got)


def test_forms_of_input_ids(model: Any) -> None:
    want = model.generate(PROMPTS, max_new_tokens=5)
    wide = np.zeros((6, 24), dtype=np.int64)
    wide[:, ::2] = PROMPTS
    forms: list[Any] = [
        PROMPTS.astype(np.int32),
        PROMPTS.astype(np.uint16),
        PROMPTS.astype(np.uint64),
        PROMPTS.astype(">i4"),
        np.asfortranarray(PROMPTS),
        wide[:, ::2],
        list(PROMPTS),
        np.flip(np.flip(PROMPTS, 1).copy(), 1),
    ]
    for form in forms:
        np.testing.assert_array_equal(model.generate(form, max_new_tokens=5), want)
    for mask in (np.ones((6, 12), dtype=bool), np.ones((6, 12), dtype=np.float32), np.ones((6, 12), dtype=np.uint8)):
        np.testing.assert_array_equal(model.generate(PROMPTS, attention_mask=mask, max_new_tokens=5), want)
    np.testing.assert_array_equal(model.generate(PROMPTS[0], max_new_tokens=5), want[:1])
    assert np.issubdtype(want.dtype, np.integer)


def test_rows_after_the_end(model: Any, folder: Path) -> None:
    """After eos: pad_token_id in sequences, NaN in logits, scores and statistics."""
    often = frequent(folder, 2)
    out = details(model, PROMPTS, eos_token_id=often, max_new_tokens=30, pad_token_id=42)
    ended = set(out.finish_reason)
    assert ended <= {"eos", "length"} and "eos" in ended
    lengths = []
    for row, reason in zip(out.sequences[:, 12:], out.finish_reason, strict=True):
        hits = np.flatnonzero(np.isin(row, often))
        assert (reason == "eos") == bool(len(hits))
        lengths.append(hits[0] + 1 if len(hits) else len(row))
    assert len(out.logits) == len(out.scores) == out.sequences.shape[1] - 12 == max(lengths)
    for i, n in enumerate(lengths):
        assert (out.sequences[i, 12 + n :] == 42).all()
        assert np.isfinite(out.logprob[i, :n]).all() and np.isnan(out.logprob[i, n:]).all()
        for step in range(max(lengths)):
            assert np.isnan(out.logits[step][i]).all() == np.isnan(out.scores[step][i]).all() == (step >= n)


def test_generation_config_json_is_the_default(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    edit_json(
        copy / "generation_config.json",
        do_sample=True,
        temperature=0.5,
        top_k=3,
        max_new_tokens=6,
        eos_token_id=[1, 2],
        pad_token_id=9,
        repetition_penalty=1.1,
        transformers_version="5.23.0",
    )
    model = load_rast(copy)
    out = model.generate(PROMPTS, seed=3, return_dict_in_generate=True, output_scores=True)
    assert out.sequences.shape[1] <= 18
    assert (np.isfinite(out.scores[0]).sum(axis=1) == 3).all()
    explicit = load_rast(folder).generate(
        PROMPTS,
        seed=3,
        do_sample=True,
        temperature=0.5,
        top_k=3,
        max_new_tokens=6,
        eos_token_id=[1, 2],
        pad_token_id=9,
        repetition_penalty=1.1,
    )
    np.testing.assert_array_equal(out.sequences, explicit)
    greedy = model.generate(PROMPTS, do_sample=False, repetition_penalty=1.0, eos_token_id=[1, 2])
    np.testing.assert_array_equal(
        greedy, load_rast(folder).generate(PROMPTS, max_new_tokens=6, eos_token_id=[1, 2], pad_token_id=9)
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=4),
        dict(logits_processor=[]),
        dict(stopping_criteria=[]),
        dict(no_repeat_ngram_size=2),
        dict(typical_p=0.9),
        dict(length_penalty=1.2),
        dict(max_tokens=3),
        dict(penalty_alpha=0.6),
        dict(best_of=2),
        dict(assistant_model=object()),
        dict(output_attentions=True),
    ],
)
def test_unsupported_options_are_named(model: Any, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        model.generate(PROMPTS, max_new_tokens=2, **options)


def test_neutral_values_of_unsupported_options_in_generation_config_json(folder: Path, tmp_path: Path) -> None:
    """Files written by transformers carry such fields; only values that would change the output are refused."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    edit_json(
        copy / "generation_config.json",
        num_beams=1,
        length_penalty=1.0,
        bos_token_id=1,
        use_cache=True,
        _from_model_config=True,
        output_attentions=False,
    )
    load_rast(copy).generate(PROMPTS, max_new_tokens=2)


def test_max_time(model: Any) -> None:
    out = details(model, PROMPTS, max_new_tokens=400, max_time=1e-6)
    assert out.sequences.shape[1] < 12 + 20
    assert set(out.finish_reason) == {"time"}
    start = time.monotonic()
    out = details(model, PROMPTS, max_new_tokens=400, max_time=30.0)
    assert set(out.finish_reason) == {"length"} and time.monotonic() - start < 30


@pytest.fixture(scope="module")
def text_model(zoo: ModelZoo) -> tuple[Any, Any, Path]:
    folder = zoo.folder("llama", seed=8, vocab_size=N_TEXT_TOKENS + 2, tokenizer="<s>,</s>")
    return load_rast(folder), make_tokenizer(("<s>", "</s>")), folder


def token_bytes(tokenizer: Any, ids: np.ndarray) -> list[bytes]:
    """Each token's bytes: byte-level BPE maps bytes to printable characters one to one."""
    from tokenizers.pre_tokenizers import ByteLevel

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    assert set(table) == set(ByteLevel.alphabet())
    special = ("<s>", "</s>")
    tokens = [tokenizer.id_to_token(int(i)) for i in ids]
    return [t.encode() if t in special else bytes(table[c] for c in t) for t in tokens]


def test_stop_strings(text_model: tuple[Any, Any, Path]) -> None:
    """Generation ends with the first token that completes a stop string; the token stays in the output."""
    model, tokenizer, _ = text_model
    prompt = np.array(tokenizer.encode("the quick").ids)
    free = model.generate(prompt, max_new_tokens=60, do_sample=True, temperature=1.3, seed=1)[0, len(prompt) :]
    pieces, before_all = token_bytes(tokenizer, free), b"the quick"
    n = 0
    for at in range(3, 40):
        whole = b"".join(pieces[at : at + 3])[1:-1] if at % 2 else pieces[at]
        try:
            stop = whole.decode()
        except UnicodeDecodeError:
            continue
        if not stop:
            continue
        n += 1
        string = stop.encode()
        before = before_all[len(before_all) - len(string) + 1 :]  # a stop string may begin in the prompt
        length = next(n for n in range(1, 61) if string in before + b"".join(pieces[:n]))
        for form in (stop, [stop], [stop, "never in the text"]):
            out = details(model, prompt, max_new_tokens=60, do_sample=True, temperature=1.3, seed=1, stop_strings=form)
            np.testing.assert_array_equal(out.sequences[0, len(prompt) :], free[:length], err_msg=repr(stop))
            assert out.finish_reason[0] == "stop"
    assert n >= 5


def test_stop_strings_are_huggingface_s(text_model: tuple[Any, Any, Path]) -> None:
    """Against transformers' own criterion, among them one that begins in the prompt."""
    model, tokenizer, folder = text_model
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    prompt = np.array(tokenizer.encode("the quick").ids)
    options: dict[str, Any] = dict(max_new_tokens=40, do_sample=False, repetition_penalty=1.3)
    text = tokenizer.decode(hf_generate(folder, prompt, **options)[0, len(prompt) :].tolist())
    ascii_runs = [run for run in re.findall(r"[ -~]{2,}", text) if len(run) >= 2]
    stops = [run[:2] for run in ascii_runs] + [run[-1:] for run in ascii_runs]
    if text[0].isascii():
        stops.append("ick" + text[0])
    assert len(stops) >= 4
    for stop in stops:
        want = hf_generate(folder, prompt, stop_strings=[stop], tokenizer=wrapped, **options).numpy()
        np.testing.assert_array_equal(model.generate(prompt, stop_strings=[stop], **options), want, err_msg=repr(stop))


def test_stop_strings_without_a_tokenizer(model: Any) -> None:
    with pytest.raises(ValueError, match=r"stop_strings|tokenizer"):
        model.generate(PROMPTS, max_new_tokens=3, stop_strings="x")


def test_max_time_gives_at_least_one_token(zoo: ModelZoo) -> None:
    model = load_rast(zoo.folder("qwen2"))
    out = model.generate(
        [[1, 2, 3], [4, 5]],
        max_new_tokens=30,
        max_time=1e-9,
        do_sample=True,
        num_return_sequences=3,
        return_dict_in_generate=True,
    )
    assert out.new_lengths.tolist() == [1] * 6
    assert set(out.finish_reason) == {"time"}


@pytest.mark.parametrize("option", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": -1}])
def test_greedy_decoding_reads_no_warper(zoo: ModelZoo, option: dict[str, float]) -> None:
    """HuggingFace refuses these values only where a warper is built from them."""
    model = load_rast(zoo.folder("qwen2"))
    prompt = np.arange(1, 6)
    want = model.generate(prompt, max_new_tokens=4)
    np.testing.assert_array_equal(model.generate(prompt, max_new_tokens=4, do_sample=False, **option), want)
    with pytest.raises(ValueError, match=next(iter(option))):
        model.generate(prompt, max_new_tokens=4, do_sample=True, **option)


def test_bad_value_in_generation_config_json_names_the_file(zoo: ModelZoo) -> None:
    model = load_rast(zoo.folder("qwen2"))
    model.generation_config["temperature"] = 0.0
    model.generate(np.arange(3), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"generation_config\.json.*temperature"):
        model.generate(np.arange(3), max_new_tokens=2, do_sample=True)


def test_progress_counts_sequences_and_tokens(zoo: ModelZoo) -> None:
    model = load_rast(zoo.folder("qwen2"))
    seen: list[tuple[int, int, int]] = []
    model.generate([[1, 2], [3]], max_new_tokens=3, eos_token_id=None, progress=lambda *now: seen.append(now))
    assert seen[-1] == (2, 2, 6)
    assert seen == sorted(seen)
