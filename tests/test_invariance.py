"""A sequence gives bitwise the same tokens and numbers however it is computed: alone or in a batch, with any number of
threads, in any chunks, as one of many copies, and with any drafts checked along the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import FULL, N_TEXT_TOKENS, ModelZoo, load_rast, make_tokenizer, random_prompts

import rast

FIELDS = ("logprob", "base_logprob", "base_token", "transfer_kl")
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": dict(do_sample=False),
    "sampled": dict(do_sample=True, seed=3, temperature=1.2, top_k=0, top_p=0.9),
}


def run(model: Any, prompts: Any, **options: Any) -> list[dict[str, Any]]:
    """Everything that generate tells of each row, without padding."""
    options = {"max_new_tokens": 24, "pad_token_id": 0} | options
    out = model.generate(prompts, return_dict_in_generate=True, output_logits=True, output_scores=True, **options)
    rows = []
    for i, new in enumerate(out.new_tokens()):
        n = len(new)
        row = {name: getattr(out, name)[i, :n] for name in FIELDS}
        row |= {name: np.stack([step[i] for step in getattr(out, name)[:n]]) for name in ("logits", "scores")}
        rows.append({"tokens": new, "finish": out.finish_reason[i], **row})
    return rows


def assert_same(got: list[dict[str, Any]], want: list[dict[str, Any]], context: object = "") -> None:
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        for name in b:
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"{context}: {name} of row {i}")


@pytest.fixture(scope="module")
def trio(zoo: ModelZoo) -> tuple[Path, Path, Path]:
    return zoo.trio("llama", dtype="bfloat16", max_position_embeddings=2048)


PROMPTS = random_prompts(17, 1031, seed=4, low=1, high=60)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_alone_or_in_a_batch(trio: tuple[Path, ...], dtype: str, options: str, isa: str) -> None:
    model = load_rast(*trio, dtype=dtype)
    together = run(model, PROMPTS, **OPTIONS[options])
    for i in range(len(PROMPTS)) if FULL else (0, 7, 16):
        assert_same(run(model, PROMPTS[i], **OPTIONS[options]), together[i : i + 1], f"prompt {i}")


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "mistral", "llama-bias"])
def test_alone_or_in_a_batch_of_each_architecture(zoo: ModelZoo, arch: str, isa: str) -> None:
    model = load_rast(*zoo.trio(arch))
    prompts = random_prompts(9, 311, seed=4, low=1, high=60)
    together = run(model, prompts, **OPTIONS["sampled"])
    for i in (0, 5, 8):
        assert_same(run(model, prompts[i], **OPTIONS["sampled"]), together[i : i + 1], f"prompt {i}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_number_of_threads(trio: tuple[Path, ...], dtype: str, isa: str) -> None:
    want = run(load_rast(*trio, dtype=dtype, num_threads=1), PROMPTS, **OPTIONS["sampled"])
    for n in (2, 3, 7):
        model = load_rast(*trio, dtype=dtype, num_threads=n)
        assert model.info()["num_threads"] == n
        assert_same(run(model, PROMPTS, **OPTIONS["sampled"]), want, f"{n} threads")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_of_the_prompt(trio: tuple[Path, ...], dtype: str, isa: str) -> None:
    prompts = [*PROMPTS[:4], *random_prompts(2, 1031, seed=8, low=300, high=700)]
    want = run(load_rast(*trio, dtype=dtype, max_batch_rows=2048), prompts, **OPTIONS["sampled"])
    whole = load_rast(*trio, dtype=dtype, max_batch_rows=2048).forward(prompts[4])
    for rows in (7, 64, 100, 512):
        model = load_rast(*trio, dtype=dtype, max_batch_rows=rows)
        assert_same(run(model, prompts, **OPTIONS["sampled"]), want, f"{rows} rows a step")
        np.testing.assert_array_equal(model.forward(prompts[4]), whole)


def test_few_sequences_at_once(trio: tuple[Path, ...]) -> None:
    """Sequences join and leave between steps."""
    want = run(load_rast(*trio), PROMPTS, **OPTIONS["sampled"])
    for n in (1, 5):
        assert_same(run(load_rast(*trio, max_batch_size=n), PROMPTS, **OPTIONS["sampled"]), want, f"{n} at once")


def test_small_cache(trio: tuple[Path, ...]) -> None:
    """Memory for a few sequences only: the others wait or are computed again, with the same result."""
    model = load_rast(*trio)
    options = OPTIONS["sampled"] | {"max_new_tokens": 90}
    want = run(model, PROMPTS, **options)
    small = load_rast(*trio, kv_cache_tokens=32 * 8)
    assert_same(run(small, PROMPTS, **options), want)
    assert small.cache_info()["preempted"] > 0
    with pytest.raises(MemoryError):
        small.generate(np.arange(300), max_new_tokens=10)
    assert_same(run(small, PROMPTS[:2], **options), want[:2])


@pytest.mark.parametrize("options", OPTIONS)
def test_prefill_or_steps(trio: tuple[Path, ...], options: str, isa: str) -> None:
    """The logits of a generated sequence are bitwise those of forward on it."""
    for dtype in ("float32", "bfloat16"):
        model = load_rast(*trio, dtype=dtype)
        (row,) = run(model, PROMPTS[0], max_new_tokens=70, **OPTIONS[options])
        ids = np.concatenate([PROMPTS[0], row["tokens"]])
        np.testing.assert_array_equal(model.forward(ids[:-1])[0, len(PROMPTS[0]) - 1 :], row["logits"])


def test_copies_or_each_alone(trio: tuple[Path, ...]) -> None:
    """Copy j of a prompt is the j-th of any number of copies."""
    model = load_rast(*trio)
    want = run(model, PROMPTS[3], num_return_sequences=70, **OPTIONS["sampled"])
    for n in (1, 2, 9):
        assert_same(run(model, PROMPTS[3], num_return_sequences=n, **OPTIONS["sampled"]), want[:n], f"{n} copies")
    assert_same(run(model, [PROMPTS[3]] * 9, **OPTIONS["sampled"]), want[:9], "nine times the same prompt")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_common_header(trio: tuple[Path, ...], dtype: str, isa: str) -> None:
    """Prompts that share more than one of attention's segments of 256 keys, and samples that share a whole prompt."""
    (header,) = random_prompts(1, 1031, seed=5, low=330, high=330)
    prompts = [np.concatenate([header, own]) for own in random_prompts(4, 1031, seed=6, low=1, high=70)]
    model = load_rast(*trio, dtype=dtype)
    options = OPTIONS["sampled"] | {"num_return_sequences": 5}
    together = run(model, [*prompts, PROMPTS[2]], **options)
    assert model.cache_info()["reused"] > 4 * len(header)
    for i in (0, 3):
        alone = load_rast(*trio, dtype=dtype)
        assert_same(run(alone, prompts[i], **options), together[5 * i : 5 * i + 5], f"prompt {i}")
        assert_same(run(alone, prompts[i], **OPTIONS["sampled"]), together[5 * i : 5 * i + 1], f"prompt {i}, alone")


def test_strengths_side_by_side(trio: tuple[Path, ...]) -> None:
    """Requests of one batch with different strengths, 0 among them."""
    model = load_rast(*trio)
    strengths = [0.0, 1.0, -0.7, 0.25, 0.0]
    together = run(model, PROMPTS[:5], transfer_strength=np.array(strengths)[:, None], **OPTIONS["sampled"])
    for i, strength in enumerate(strengths):
        alone = run(model, PROMPTS[i], transfer_strength=strength, **OPTIONS["sampled"])
        assert_same(alone, together[i : i + 1], f"strength {strength}")


# ---- drafts ----------------------------------------------------------------------------------------------------------

Drafter = Callable[[int, int, np.ndarray, int], list[int]]


def draft_with(model: Any, drafter: Drafter) -> None:
    model._engine = model._new_engine()
    model._engine._set_drafter(drafter)


def random_drafter(vocab: int, seed: int) -> Drafter:
    rng = np.random.default_rng(seed)

    def draft(tag: int, sample: int, ids: np.ndarray, k: int) -> list[int]:
        return [int(t) for t in rng.integers(0, vocab, rng.integers(0, k + 1))]

    return draft


def scripted_drafter(sequences: dict[tuple[int, int], np.ndarray], wrong: float, vocab: int, seed: int) -> Drafter:
    """Guesses from the known continuations; each is wrong with that probability."""
    rng = np.random.default_rng(seed)

    def draft(tag: int, sample: int, ids: np.ndarray, k: int) -> list[int]:
        known = sequences[tag, sample]
        np.testing.assert_array_equal(known[: len(ids)], ids)
        guess = known[len(ids) : len(ids) + k].copy()
        mistakes = rng.random(len(guess)) < wrong
        guess[mistakes] = rng.integers(0, vocab, int(mistakes.sum()))
        return [int(t) for t in guess]

    return draft


@pytest.fixture(scope="module")
def text_trio(zoo: ModelZoo) -> dict[str, Any]:
    vocab = N_TEXT_TOKENS + 2
    base = zoo.folder("qwen2", seed=3, vocab_size=vocab, tokenizer="<s>,</s>")
    pair = [
        str(zoo.folder("qwen2-tied", seed=s, vocab_size=vocab, tokenizer="<s>,</s>", num_hidden_layers=2))
        for s in (1, 2, 4, 5)
    ]
    return dict(base=base, pairs=[rast.TransferPair(*pair[:2], 0.8), rast.TransferPair(*pair[2:], -0.4)])


def cases(free: list[int]) -> dict[str, dict[str, Any]]:
    """Options to draft with; `free` is a greedy continuation that shows what matters."""
    eos = [free[9], free[4]]
    tokenizer = make_tokenizer(("<s>", "</s>"))
    stops = [
        text for text in (tokenizer.decode([t]) for t in free[5:]) if text and "\N{REPLACEMENT CHARACTER}" not in text
    ]
    sampled: dict[str, Any] = dict(do_sample=True, seed=11, temperature=1.1)
    return {
        "greedy": dict(),
        "sampled": sampled | dict(top_k=0),
        "warpers": sampled | dict(top_k=20, top_p=0.8, min_p=0.01),
        "penalty": sampled | dict(repetition_penalty=1.5),
        "greedy penalty": dict(repetition_penalty=1.5),
        "bad words": dict(bad_words_ids=[[free[2]], [free[0], free[1]], [free[5], free[6], free[7]]]),
        "suppress": sampled | dict(suppress_tokens=[free[3], 5]),
        "eos": dict(eos_token_id=eos),
        "sampled eos": sampled | dict(eos_token_id=list(range(0, 300, 12))),
        "min_new_tokens": dict(eos_token_id=eos, min_new_tokens=7),
        "sampled min_new_tokens": sampled | dict(eos_token_id=list(range(0, 300, 5)), min_new_tokens=11),
        "stop strings": dict(stop_strings=stops[:2]),
        "sampled stop strings": sampled | dict(stop_strings=["e", "th"]),
        "transfer_start": dict(transfer_start=6),
        "sampled transfer_start": sampled | dict(transfer_start=1),
        "one pair off": sampled | dict(transfer_strength=[0.0, 0.7]),
        "all off": sampled | dict(transfer_strength=0.0),
        "copies": sampled | dict(num_return_sequences=4),
        "short": dict(max_new_tokens=3),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drafts_never_change_anything(text_trio: dict[str, Any], dtype: str, isa: str) -> None:
    """Random drafts, drafts that are mostly right, and drafts that are all right, for every option."""
    model = load_rast(**text_trio, dtype=dtype)
    prompts = random_prompts(4, N_TEXT_TOKENS, seed=6, low=3, high=40)
    free = run(model, prompts[0])[0]["tokens"].tolist()
    plain = load_rast(**text_trio, dtype=dtype)
    every = cases(free)
    if not FULL and isa != rast._core.cpu_isas()[-1]:
        every = {name: every[name] for name in ("greedy", "warpers", "penalty", "sampled eos")}
    for name, options in every.items():
        want = run(plain, prompts, num_assistant_tokens=0, **options)
        n = options.get("num_return_sequences", 1)
        sequences = {divmod(i, n): np.concatenate([prompts[i // n], row["tokens"]]) for i, row in enumerate(want)}
        for k in (1, 3, 8):
            drafters: dict[str, tuple[Drafter, bool]] = {
                "random": (random_drafter(N_TEXT_TOKENS, seed=k), False),
                "half right": (scripted_drafter(sequences, 0.4, N_TEXT_TOKENS, seed=k), True),
                "right": (scripted_drafter(sequences, 0.0, N_TEXT_TOKENS, seed=k), True),
            }
            for kind, (drafter, helps) in drafters.items():
                draft_with(model, drafter)
                assert_same(
                    run(model, prompts, num_assistant_tokens=k, **options), want, f"{name}, {kind} drafts of {k}"
                )
                info = model._engine.info()
                assert info["drafted"] > 0 and info["accepted"] <= info["drafted"]
                if helps:
                    assert info["accepted"] > 0, f"{name}, {kind} drafts of {k}"


def test_right_drafts_save_steps(text_trio: dict[str, Any]) -> None:
    model = load_rast(**text_trio)
    (prompt,) = random_prompts(1, N_TEXT_TOKENS, seed=6, low=9, high=9)
    want = run(model, prompt, max_new_tokens=60)
    sequences = {(0, 0): np.concatenate([prompt, want[0]["tokens"]])}
    draft_with(model, scripted_drafter(sequences, 0.0, N_TEXT_TOKENS, seed=0))
    assert_same(run(model, prompt, max_new_tokens=60, num_assistant_tokens=5), want)
    info = model._engine.info()
    assert info["accepted"] >= 49 and info["steps"] <= 14


@pytest.mark.parametrize("arch", ["mistral", "qwen3", "qwen2-window"])
def test_drafts_of_each_architecture(zoo: ModelZoo, arch: str) -> None:
    """Rejected drafts leave nothing behind in the cache, also where a window slides."""
    trio = zoo.trio(arch)
    prompts = random_prompts(3, 311, seed=6, low=1, high=50)
    want = run(load_rast(*trio), prompts, max_new_tokens=60, **OPTIONS["sampled"])
    model = load_rast(*trio)
    sequences = {(i, 0): np.concatenate([prompts[i], row["tokens"]]) for i, row in enumerate(want)}
    for drafter in (random_drafter(311, 0), scripted_drafter(sequences, 0.3, 311, 0)):
        draft_with(model, drafter)
        got = run(model, prompts, max_new_tokens=60, num_assistant_tokens=6, **OPTIONS["sampled"])
        assert_same(got, want, arch)


def test_drafts_of_nonsense(zoo: ModelZoo) -> None:
    """Ids without a row in some model, ids out of range, too many drafts: never fed, never drawn."""
    base = zoo.folder("qwen2", vocab_size=320)
    expert, anti = (zoo.folder("qwen2-tied", seed=s, vocab_size=304) for s in (1, 2))
    model = load_rast(base, expert, anti)
    want = run(model, np.arange(5))
    for guess in ([310, 319], [320], [-1], [2**31 - 1], [1] * 100, [5, -7, 3]):
        draft_with(model, lambda tag, sample, ids, k, guess=guess: guess)
        try:
            assert_same(run(model, np.arange(5), num_assistant_tokens=4), want, str(guess))
        except (ValueError, RuntimeError) as error:
            assert "draft" in str(error)  # noqa: PT017 - either outcome is right


def test_a_drafter_that_raises(zoo: ModelZoo) -> None:
    model = load_rast(zoo.folder("qwen2"))
    want = run(model, np.arange(5))

    def broken(*_: object) -> list[int]:
        raise KeyError("no guess")

    draft_with(model, broken)
    with pytest.raises(KeyError, match="no guess"):
        run(model, np.arange(5), num_assistant_tokens=4)
    model._engine._set_drafter(None)
    assert_same(run(model, np.arange(5), num_assistant_tokens=4), want)


def test_models_run_after_each_other(trio: tuple[Path, ...]) -> None:
    """Nothing of an earlier call shows in a later one."""
    model = load_rast(*trio)
    want = run(model, PROMPTS[:5], **OPTIONS["sampled"])
    model.generate(PROMPTS, max_new_tokens=40, do_sample=True)
    model.forward(PROMPTS[16])
    model.score(PROMPTS[15])
    assert_same(run(model, PROMPTS[:5], **OPTIONS["sampled"]), want)
    assert model._engine.info()["n_free"] == model._engine.info()["n_blocks"]
