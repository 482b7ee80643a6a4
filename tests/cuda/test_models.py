"""Whole models on CUDA against the CPU backend, which other tests compare with transformers; one trio with both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backend import EMULATED, library
from oracle import (
    ARCHITECTURES,
    FULL,
    ModelZoo,
    Transfer,
    assert_greedy,
    assert_logits_close,
    details,
    kl_divergence,
    load_hf,
    load_rast,
    random_prompts,
)

import rast


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAST_CUDA_PLUGIN", str(library()))


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    """The demonstration trio in float32: on CUDA, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAST_CUDA_PLUGIN", str(library()))
        models = [rast.load_demo(device=device, dtype="float32") for device in ("cuda", "cpu")]
    return models[0], models[1]


def both(*folders: Any, **options: Any) -> tuple[Any, Any]:
    """The same models on CUDA and on the CPU."""
    cuda = load_rast(*folders, **{**options, "device": "cuda"})
    assert cuda.info()["device"] == "cuda:0"
    return cuda, load_rast(*folders, **options)


def assert_same(got: Any, want: Any) -> None:
    """Two outputs of `details`: tokens equal, numbers equal up to rounding."""
    np.testing.assert_array_equal(got.sequences, want.sequences)
    assert got.finish_reason == want.finish_reason
    np.testing.assert_array_equal(got.base_token, want.base_token)
    for name in ("logprob", "base_logprob", "transfer_kl"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-3, atol=2e-4, err_msg=name)
    assert_logits_close(np.stack(got.logits), np.stack(want.logits), context="logits")
    got_scores, scores = np.stack(got.scores), np.stack(want.scores)
    np.testing.assert_array_equal(np.isfinite(got_scores), np.isfinite(scores))
    finite = np.isfinite(scores)
    assert_logits_close(got_scores[finite], scores[finite], context="scores")


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_architectures(zoo: ModelZoo, arch: str) -> None:
    """Prefill and decoding of every architecture; prompts below and above a block of the KV cache."""
    cuda, cpu = both(zoo.folder(arch))
    prompts = [ids for n in (1, 33, 70) for ids in random_prompts(1, cpu.vocab_size, seed=n, low=n, high=n)]
    for ids in prompts:
        assert_logits_close(cuda.forward(ids), cpu.forward(ids), context=f"{arch}, {len(ids)} tokens")
    assert_same(*(details(model, prompts, max_new_tokens=8, do_sample=False) for model in (cuda, cpu)))


@pytest.mark.parametrize("arch", ["qwen2", "llama", "qwen3", "mistral"] if FULL else ["qwen2", "llama"])
def test_trio_against_transformers(zoo: ModelZoo, arch: str) -> None:
    """Prefill, steps and greedy choice of HuggingFace's own code, with nothing of the CPU backend in between."""
    base, expert, anti = zoo.trio(arch)
    cuda = load_rast(base, expert, anti, device="cuda")
    oracle = Transfer(load_hf(base), [(load_hf(expert), load_hf(anti), 0.7)])
    prompts = np.stack(random_prompts(3, cuda.vocab_size, low=33, high=33))
    assert_logits_close(cuda.forward(prompts, transfer_strength=0.7), oracle(prompts), context="prefill")
    out = details(cuda, prompts, transfer_strength=0.7, max_new_tokens=12, do_sample=False)
    assert_logits_close(np.stack(out.logits, axis=1), oracle(out.sequences[:, :-1])[:, 32:], context="steps")
    for row in out.sequences:
        assert_greedy(oracle, row, 33)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("arch", ["qwen2", "llama", "qwen3", "mistral"] if FULL else ["llama", "qwen3"])
def test_half_precision(zoo: ModelZoo, arch: str, dtype: str) -> None:
    """Rounded as on the CPU: as far from float32 as that is, or less far from each other."""
    base, expert, anti = zoo.trio(arch, dtype=dtype)
    cuda, cpu = both(base, expert, anti, dtype=dtype)
    (ids,) = random_prompts(1, cpu.vocab_size, low=60, high=60)
    exact = load_rast(base, expert, anti).forward(ids)[0]
    got, want = cuda.forward(ids)[0], cpu.forward(ids)[0]
    assert kl_divergence(exact, got).mean() <= 1.5 * kl_divergence(exact, want).mean() + 1e-6
    assert kl_divergence(want, got).mean() <= 1.5 * kl_divergence(exact, want).mean() + 1e-6


def test_float32_weights_of_bfloat16_models(zoo: ModelZoo) -> None:
    """Weights are rounded to the activations' type when they are bound, and the other way round widened."""
    cuda, cpu = both(zoo.folder("qwen2", dtype="float32"), dtype="bfloat16")
    (ids,) = random_prompts(1, cpu.vocab_size, low=40, high=40)
    assert kl_divergence(cpu.forward(ids)[0], cuda.forward(ids)[0]).mean() < 2e-3
    cuda, cpu = both(zoo.folder("qwen2", dtype="bfloat16"), dtype="float32")
    assert_logits_close(cuda.forward(ids), cpu.forward(ids))


def test_demonstration(demo: tuple[Any, Any]) -> None:
    """The trio that the package carries: greedy and drawn tokens are the CPU's."""
    texts = ["40 + 18 + 62 + 7 + 33 mod 64 =", "29 + 19 + 39 + 17 + 15 + 12 mod 64 =", "4 + 52 + 36 + 49 mod 64 ="]
    prompts = [demo[1].tokenizer.encode(text) for text in texts]
    assert_same(*(details(model, prompts, do_sample=False) for model in demo))
    options: dict[str, Any] = dict(do_sample=True, num_return_sequences=3, seed=7)
    assert_same(*(details(model, prompts, **options) for model in demo))
    assert_same(*(details(model, prompts, **options, transfer_strength=0.4, transfer_start=3) for model in demo))


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.7, top_k=5),
        dict(top_p=0.8),
        dict(min_p=0.1, temperature=1.5),
        dict(repetition_penalty=1.3, top_k=20, top_p=0.9),
        dict(suppress_tokens=[3, 11, 40], bad_words_ids=[[5], [7, 9]], min_new_tokens=6),
    ],
    ids=str,
)
def test_options(demo: tuple[Any, Any], options: dict[str, Any]) -> None:
    prompts = random_prompts(5, 60, seed=3, low=2, high=40)
    options = dict(do_sample=True, seed=1, max_new_tokens=12) | options
    assert_same(*(details(model, prompts, **options) for model in demo))


def test_components_and_score(zoo: ModelZoo) -> None:
    base, expert, anti = zoo.trio()
    cuda, cpu = both(base, expert, anti)
    prompts = random_prompts(4, cpu.vocab_size, low=1, high=70)
    got, want = (model.forward(prompts, return_components=True) for model in (cuda, cpu))
    assert_logits_close(got.logits, want.logits)
    for parts in ((got.base, want.base), (got.experts[0], want.experts[0]), (got.antiexperts[0], want.antiexperts[0])):
        assert_logits_close(*parts)
    scores = [model.score(prompts) for model in (cuda, cpu)]
    for name in ("logprob", "base_logprob", "kl"):
        np.testing.assert_allclose(getattr(scores[0], name), getattr(scores[1], name), rtol=1e-3, atol=2e-4)
    np.testing.assert_array_equal(scores[0].base_token, scores[1].base_token)


def test_strength_zero_does_not_run_the_pair(zoo: ModelZoo) -> None:
    base, expert, anti = zoo.trio()
    cuda, cpu = both(base, expert, anti)
    (ids,) = random_prompts(1, cpu.vocab_size, low=20, high=20)
    before = cuda.cache_info()["rows"]
    out = cuda.forward(ids, transfer_strength=0, return_components=True)
    assert cuda.cache_info()["rows"] - before == 20
    assert np.isnan(out.experts[0]).all()
    assert_logits_close(out.logits, cpu.forward(ids, transfer_strength=0))


def test_pairs_of_other_shapes(zoo: ModelZoo) -> None:
    """Three classes, so three queues; different strengths in one batch, so different nets at different rows."""
    base, pairs = (
        zoo.folder("llama", seed=1, vocab_size=311),
        [
            rast.TransferPair(zoo.folder("qwen2", seed=2), zoo.folder("qwen2", seed=3), 0.8),
            rast.TransferPair(zoo.folder("qwen3", seed=4), None, 0.3),
        ],
    )
    cuda, cpu = both(base, pairs=pairs)
    prompts = random_prompts(6, 311, low=2, high=50)
    strength = [[0.8, 0.3], [0, 0.5], [1, 0], [0, 0], [-0.5, 0.2], [0.8, 0.3]]
    options: dict[str, Any] = dict(transfer_strength=strength, do_sample=True, seed=2, max_new_tokens=10)
    assert_same(*(details(model, prompts, **options) for model in (cuda, cpu)))


def test_small_cache_and_shared_prefixes(zoo: ModelZoo) -> None:
    """Sequences wait, give way and are computed again; common beginnings are computed once, tails copied."""
    common = random_prompts(1, 60, seed=5, low=36, high=36)[0]
    prompts = [np.concatenate([common, tail]) for tail in random_prompts(3, 60, seed=6, low=1, high=9)]
    options: dict[str, Any] = dict(num_return_sequences=2, do_sample=True, seed=3, max_new_tokens=70, pad_token_id=0)
    folders = zoo.trio(num_hidden_layers=1)
    cuda = load_rast(*folders, device="cuda", kv_cache_tokens=320, max_batch_rows=40)
    want = load_rast(*folders).generate(prompts, **options)
    np.testing.assert_array_equal(cuda.generate(prompts, **options), want)
    info = cuda.cache_info()
    assert info["preempted"] > 0 and info["reused"] > 0


def test_padded_vocabulary_and_missing_rows(zoo: ModelZoo) -> None:
    """Ids without a row in an active model are never drawn."""
    folders = [zoo.folder("qwen2", seed=seed, vocab_size=size) for seed, size in ((0, 327), (1, 311), (2, 311))]
    cuda, cpu = both(*folders)
    prompts = random_prompts(3, 311, low=3, high=30)
    got, want = (details(model, prompts, do_sample=False, max_new_tokens=6) for model in (cuda, cpu))
    assert_same(got, want)
    assert np.isneginf(np.stack(got.logits)[..., 311:]).all()


def test_renamed_special_tokens(zoo: ModelZoo) -> None:
    """Ids that mean something else in the pair: in a batch, drawn, and beside outputs that do not use the pair."""
    base = zoo.folder("qwen2", vocab_size=320, tokenizer="<s>,<fim>,</s>,<fim2>")
    pair = [zoo.folder("qwen2-tied", seed=s, vocab_size=310, tokenizer="<s>,<think>,</s>,</think>") for s in (1, 2)]
    with pytest.warns(UserWarning, match="think|fim"):
        cuda, cpu = both(base, *pair)
    prompts = random_prompts(5, 300, seed=2, low=1, high=40)
    for strength in (1.0, -0.7):
        assert_logits_close(*(model.forward(prompts, transfer_strength=strength) for model in (cuda, cpu)))
    strengths = [[1], [0], [0.5], [0], [-1]]
    for options in (dict(do_sample=False), dict(do_sample=True, seed=4, top_p=0.9, temperature=3.0)):
        options = dict(max_new_tokens=8, transfer_strength=strengths) | options
        assert_same(*(details(model, prompts, **options) for model in (cuda, cpu)))


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_roles_of_other_depths_and_types(zoo: ModelZoo, dtype: str) -> None:
    """None of which run together; "auto" is bfloat16 for the base, float32 and float16 for the pair."""
    shapes = [("bfloat16", 3, 0), ("float32", 1, 1), ("float16", 2, 2)]
    folders = [zoo.folder("qwen2", seed=seed, dtype=kind, num_hidden_layers=n) for kind, n, seed in shapes]
    cuda, cpu = both(*folders, dtype=dtype)
    prompts = random_prompts(4, cpu.vocab_size, seed=8, low=2, high=60)
    if dtype == "float32":
        assert_same(*(details(model, prompts, max_new_tokens=8, do_sample=False) for model in (cuda, cpu)))
        return
    assert len({net["dtype"] for net in cuda.info()["nets"]}) == 3
    exact, got, want = (model.forward(prompts[0], return_components=True) for model in (load_rast(*folders), cuda, cpu))
    assert_logits_close(got.experts[0], exact.experts[0], context="float32")
    for name in ("logits", "base", "antiexperts"):
        a, b, c = (np.asarray(getattr(parts, name)) for parts in (exact, got, want))
        assert 0 < kl_divergence(a, b).mean() <= 1.5 * kl_divergence(a, c).mean() + 1e-6, name


def assert_drafted(got: Any, plain: Any, context: str) -> None:
    """Rows of a generation with drafts are those without: on a real device up to the first near-tie, since products of
    other numbers of rows round differently."""
    logits, want = (np.stack(out.logits, axis=1) for out in (got, plain))
    start = got.sequences.shape[1] - logits.shape[1]
    for row in range(len(logits)):
        same = got.sequences[row, start:] == plain.sequences[row, start:]
        n = len(same) if same.all() else int(np.argmin(same))
        live = min(n + 1, int(np.isfinite(want[row].max(axis=1)).sum()))
        assert_logits_close(logits[row, :live], want[row, :live], context=f"{context}, row {row}")
        if n < len(same):
            assert not EMULATED, f"{context}, row {row}, token {n}"
            chosen = [want[row, n, out.sequences[row, start + n]] for out in (got, plain)]
            assert abs(chosen[0] - chosen[1]) <= 1e-3 * np.abs(want[row, n]).max(), f"{context}, row {row}, token {n}"


ALL = [(dtype, graphs) for dtype in ("float32", "bfloat16") for graphs in ("1", "0")]


@pytest.mark.parametrize(("dtype", "graphs"), ALL if FULL else [ALL[0], ALL[3]])
def test_drafts(zoo: ModelZoo, monkeypatch: pytest.MonkeyPatch, dtype: str, graphs: str) -> None:
    """Two pairs, the first near the target: greedy, penalties, masks and other strengths side by side."""
    monkeypatch.setenv("RAST_CUDA_GRAPHS", graphs)
    shape = dict(num_hidden_layers=1, vocab_size=311)
    base, expert, *others = (str(zoo.folder("qwen2", seed=seed, **shape)) for seed in range(4))
    pairs = [rast.TransferPair(expert, base, 0.8), rast.TransferPair(*others, 0.1)]
    cuda, cpu = both(base, pairs=pairs, dtype=dtype)
    prompts = random_prompts(4, 311, seed=6, low=3, high=40)
    every: dict[str, dict[str, Any]] = {
        "greedy": dict(do_sample=False),
        "penalty": dict(do_sample=False, repetition_penalty=1.3, suppress_tokens=[3, 4]),
        "strengths": dict(do_sample=False, transfer_strength=[[0.8, 0.1], [1, 0], [0, 0], [0.9, -0.1]]),
    }
    for name, options in every.items():
        options = dict(max_new_tokens=10) | options
        plain = details(cuda, prompts, num_assistant_tokens=0, **options)
        before = cuda.cache_info()
        for k in (3, "auto"):
            assert_drafted(details(cuda, prompts, num_assistant_tokens=k, **options), plain, f"{name}, {k} drafts")
        after = cuda.cache_info()
        assert after["accepted"] > before["accepted"], name
        assert after["rejected"] > before["rejected"], name
        if dtype == "float32":
            assert_same(plain, details(cpu, prompts, **options))


def test_drawn_drafts(zoo: ModelZoo) -> None:
    """Draws with drafts are the CPU's without them: keys of draws are seldom near-ties."""
    shape = dict(num_hidden_layers=1, vocab_size=311)
    base, expert = (str(zoo.folder("qwen2", seed=seed, **shape)) for seed in range(2))
    cuda, cpu = both(base, pairs=[rast.TransferPair(expert, base, 0.8)])
    prompts = random_prompts(4, 311, seed=6, low=3, high=40)
    options: dict[str, Any] = dict(
        do_sample=True, seed=3, top_k=20, top_p=0.95, num_return_sequences=2, max_new_tokens=10
    )
    want = details(cpu, prompts, num_assistant_tokens=0, **options)
    for k in (0, 2, "auto"):
        assert_same(details(cuda, prompts, num_assistant_tokens=k, **options), want)
    assert cuda.cache_info()["accepted"] > 0
