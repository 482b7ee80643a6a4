"""The transfer: base + sum of strength * (expert - antiexpert), against separate HuggingFace models and NumPy."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from oracle import (
    N_TEXT_TOKENS,
    ModelZoo,
    Transfer,
    assert_greedy,
    assert_logits_close,
    details,
    edit_json,
    hf_logits,
    kl_divergence,
    load_hf,
    load_rast,
    log_softmax,
    make_config,
    make_model,
    make_tokenizer,
    random_prompts,
)

import rast

STRENGTHS = (0.0, 0.5, 1.0, -0.7)


@pytest.mark.parametrize("arch", ["qwen2", "llama", "qwen3", "mistral"])
def test_trio(zoo: ModelZoo, arch: str, isa: str) -> None:
    """Prefill, steps and greedy choice, for every strength."""
    base, expert, anti = zoo.trio(arch)
    model = load_rast(base, expert, anti)
    prompts = random_prompts(3, load_hf(base).config.vocab_size, low=13, high=13)
    for strength in STRENGTHS:
        oracle = Transfer(load_hf(base), [(load_hf(expert), load_hf(anti), strength)])
        got = model.forward(np.stack(prompts), transfer_strength=strength)
        assert_logits_close(got, oracle(np.stack(prompts)), context=f"prefill, strength {strength}")
        out = details(model, np.stack(prompts), transfer_strength=strength, max_new_tokens=20)
        want = oracle(out.sequences[:, :-1])[:, 12:]
        assert_logits_close(np.stack(out.logits, axis=1), want, context=f"steps, strength {strength}")
        for row in out.sequences:
            assert_greedy(oracle, row, 13)


def test_strength_of_the_model_is_the_default(zoo: ModelZoo) -> None:
    base, expert, anti = zoo.trio()
    (ids,) = random_prompts(1, 311, low=9, high=9)
    one = load_rast(base, expert, anti)
    half = load_rast(base, expert, anti, transfer_strength=0.5)
    np.testing.assert_array_equal(one.forward(ids), one.forward(ids, transfer_strength=1.0))
    np.testing.assert_array_equal(half.forward(ids), one.forward(ids, transfer_strength=0.5))
    np.testing.assert_array_equal(half.forward(ids, transfer_strength=1.0), one.forward(ids))


def test_no_pair_is_plain_generation(zoo: ModelZoo) -> None:
    base, expert, anti = zoo.trio()
    (ids,) = random_prompts(1, 311, low=9, high=9)
    np.testing.assert_array_equal(
        load_rast(base).forward(ids), load_rast(base, expert, anti).forward(ids, transfer_strength=0.0)
    )


def test_components(zoo: ModelZoo) -> None:
    base, expert, anti = zoo.trio()
    model = load_rast(base, expert, anti)
    (ids,) = random_prompts(1, 311, low=9, high=9)
    parts = model.forward(ids, return_components=True)
    for got, folder in ((parts.base, base), (parts.experts[0], expert), (parts.antiexperts[0], anti)):
        assert_logits_close(got, hf_logits(load_hf(folder), ids)[None])
    np.testing.assert_array_equal(parts.logits, model.forward(ids))


def test_logits_to_keep(zoo: ModelZoo) -> None:
    model = load_rast(*zoo.trio())
    prompts = np.stack(random_prompts(2, 311, low=9, high=9))
    np.testing.assert_array_equal(model.forward(prompts, logits_to_keep=2), model.forward(prompts)[:, -2:])


def two_pairs(zoo: ModelZoo) -> tuple[Path, list[Path]]:
    base, expert, anti = zoo.trio()
    _, expert2, anti2 = zoo.trio(seed=7)
    return base, [expert, anti, expert2, anti2]


@pytest.mark.parametrize("strengths", [(1.0, 0.5), (0.0, -0.7), (0.3, 0.0), (0.0, 0.0)])
def test_two_pairs(zoo: ModelZoo, strengths: tuple[float, float]) -> None:
    base, (e1, a1, e2, a2) = two_pairs(zoo)
    pairs = [rast.TransferPair(str(e1), str(a1), strengths[0]), rast.TransferPair(str(e2), str(a2), strengths[1])]
    (ids,) = random_prompts(1, 311, low=11, high=11)
    oracle = Transfer(
        load_hf(base),
        [(load_hf(e1), load_hf(a1), strengths[0]), (load_hf(e2), load_hf(a2), strengths[1])],
    )
    model = load_rast(base, pairs=pairs)
    assert_logits_close(model.forward(ids), oracle(ids)[None])
    ones = load_rast(base, pairs=[rast.TransferPair(p.expert, p.antiexpert, 1.0) for p in pairs])
    np.testing.assert_array_equal(ones.forward(ids, transfer_strength=list(strengths)), model.forward(ids))
    out = details(model, ids, max_new_tokens=12)
    assert_greedy(oracle, out.sequences[0], 11)


def test_expert_without_antiexpert(zoo: ModelZoo) -> None:
    base, expert, _ = zoo.trio()
    (ids,) = random_prompts(1, 311, low=11, high=11)
    model = load_rast(base, expert, transfer_strength=-0.5)
    assert_logits_close(model.forward(ids), Transfer(load_hf(base), [(load_hf(expert), None, -0.5)])(ids)[None])


def test_one_folder_in_two_roles_is_loaded_once(zoo: ModelZoo) -> None:
    """The base as antiexpert: (1 - strength) * base + strength * expert, from two models."""
    base, expert, _ = zoo.trio()
    (ids,) = random_prompts(1, 311, low=11, high=11)
    model = load_rast(base, expert, base, transfer_strength=0.25)
    want = 0.75 * hf_logits(load_hf(base), ids) + 0.25 * hf_logits(load_hf(expert), ids)
    assert_logits_close(model.forward(ids), want[None])
    assert len(model._core_model.net_info()) == 2
    same = load_rast(base, expert, expert)
    np.testing.assert_array_equal(same.forward(ids), load_rast(base).forward(ids))
    parts = model.forward(ids, return_components=True)
    np.testing.assert_array_equal(parts.antiexperts[0], parts.base)


def test_base_as_antiexpert_with_strength_one(zoo: ModelZoo) -> None:
    """The base's coefficient is 0: the expert alone decides, the statistics still compare it with the base, and before
    transfer_start the base draws as it is."""
    base, expert, _ = zoo.trio()
    (ids,) = random_prompts(1, 311, low=11, high=11)
    model = load_rast(base, expert, base)
    np.testing.assert_array_equal(model.forward(ids), load_rast(expert).forward(ids))
    out = details(model, ids, max_new_tokens=8, transfer_start=3)
    plain = hf_logits(load_hf(base), out.sequences[0, :-1])[10:]
    tuned = hf_logits(load_hf(expert), out.sequences[0, :-1])[10:]
    assert_logits_close(np.concatenate(out.logits), np.concatenate([plain[:3], tuned[3:]]))
    np.testing.assert_allclose(out.transfer_kl[0, 3:], kl_divergence(tuned, plain)[3:], rtol=1e-3)
    np.testing.assert_array_equal(out.transfer_kl[0, :3], 0)


def test_statistics(zoo: ModelZoo) -> None:
    base, expert, anti = zoo.trio()
    model = load_rast(base, expert, anti)
    prompts = np.stack(random_prompts(3, 311, low=13, high=13))
    out = details(model, prompts, do_sample=True, seed=4, max_new_tokens=16)
    new = out.sequences[:, 13:]
    combined = Transfer(load_hf(base), [(load_hf(expert), load_hf(anti), 1.0)])(out.sequences[:, :-1])[:, 12:]
    plain = hf_logits(load_hf(base), out.sequences[:, :-1])[:, 12:]

    def pick(rows: np.ndarray) -> np.ndarray:
        return np.take_along_axis(log_softmax(rows), new[..., None], axis=2)[..., 0]

    np.testing.assert_allclose(out.logprob, pick(combined), atol=2e-3)
    np.testing.assert_allclose(out.base_logprob, pick(plain), atol=2e-3)
    np.testing.assert_allclose(out.transfer_kl, kl_divergence(combined, plain), rtol=1e-3, atol=1e-4)
    chosen = np.take_along_axis(plain, out.base_token[..., None], axis=2)[..., 0]
    assert (plain.max(axis=2) - chosen).max() <= 1e-4
    for array in (out.logprob, out.base_logprob, out.transfer_kl, out.base_token):
        assert array.shape == new.shape


def test_transfer_start(zoo: ModelZoo) -> None:
    """The first new tokens come from the base alone, then the pair joins, having seen all tokens."""
    base, expert, anti = zoo.trio()
    model = load_rast(base, expert, anti)
    prompts = np.stack(random_prompts(2, 311, low=7, high=7))
    both = Transfer(load_hf(base), [(load_hf(expert), load_hf(anti), 1.0)])
    for start in (0, 1, 5, 30):
        out = details(model, prompts, transfer_start=start, max_new_tokens=12)
        want = np.concatenate(
            [
                hf_logits(load_hf(base), out.sequences[:, :-1])[:, 6 : 6 + start],
                both(out.sequences[:, :-1])[:, 6 + start :],
            ],
            axis=1,
        )
        assert_logits_close(np.stack(out.logits, axis=1), want, context=f"start {start}")


@pytest.mark.parametrize(("vocab", "pair_vocab"), [(320, 304), (304, 320)])
def test_differently_padded_vocabularies(zoo: ModelZoo, vocab: int, pair_vocab: int, isa: str) -> None:
    """Logits are as wide as the base's; ids without a row in an active model are -inf and never drawn."""
    base = zoo.folder("qwen2", vocab_size=vocab)
    expert = zoo.folder("qwen2-tied", seed=1, vocab_size=pair_vocab)
    anti = zoo.folder("qwen2-tied", seed=2, vocab_size=pair_vocab)
    model = load_rast(base, expert, anti)
    (ids,) = random_prompts(1, 304, low=9, high=9)
    common = min(vocab, pair_vocab)
    want = np.full((9, vocab), -np.inf, dtype=np.float32)
    want[:, :common] = (
        hf_logits(load_hf(base), ids)[:, :common]
        + hf_logits(load_hf(expert), ids)[:, :common]
        - hf_logits(load_hf(anti), ids)[:, :common]
    )
    assert_logits_close(model.forward(ids), want[None])
    out = details(model, ids, do_sample=True, temperature=50.0, top_k=0, num_return_sequences=40, seed=0)
    assert out.sequences.max() < common
    assert np.isfinite(out.logprob).all() and np.isfinite(out.transfer_kl).all()
    alone = model.forward(ids, transfer_strength=0.0)
    np.testing.assert_array_equal(alone, load_rast(base).forward(ids))


def test_prompt_id_without_a_row_names_the_model(zoo: ModelZoo) -> None:
    base = zoo.folder("qwen2", vocab_size=320)
    expert = zoo.folder("qwen2-tied", seed=1, vocab_size=304)
    model = load_rast(base, expert, zoo.folder("qwen2-tied", seed=2, vocab_size=304))
    with pytest.raises(ValueError, match=r"310.*expert|expert.*310"):
        model.generate(np.array([1, 310]), max_new_tokens=1)
    with pytest.raises(ValueError, match="310"):
        model.forward(np.array([1, 310]))
    model.generate(np.array([1, 310]), max_new_tokens=1, transfer_strength=0.0)
    with pytest.raises(ValueError, match="320"):
        model.generate(np.array([1, 320]), max_new_tokens=1, transfer_strength=0.0)


def test_rows_beyond_the_tokenizer_are_never_drawn(zoo: ModelZoo) -> None:
    size = N_TEXT_TOKENS + 2
    folder = zoo.folder("qwen2", vocab_size=320, tokenizer="<s>,</s>")
    (ids,) = random_prompts(1, size, low=9, high=9)
    want = hf_logits(load_hf(folder), ids)
    want[:, size:] = -np.inf
    assert_logits_close(load_rast(folder).forward(ids), want[None])


def test_renamed_special_tokens(zoo: ModelZoo) -> None:
    """An id that means another special token in the pair: softmax cannot see a constant added to a model's logits, so
    the id gets the difference of the log-sum-exps over the ids in common."""
    size = N_TEXT_TOKENS + 3
    base = zoo.folder("qwen2", vocab_size=320, tokenizer="<s>,</s>,<fim>")
    expert = zoo.folder("qwen2-tied", seed=1, vocab_size=310, tokenizer="<s>,</s>,<think>")
    anti = zoo.folder("qwen2-tied", seed=2, vocab_size=310, tokenizer="<s>,</s>,<think>")
    with pytest.warns(UserWarning, match="think|fim"):
        model = load_rast(base, expert, anti)
    (ids,) = random_prompts(1, N_TEXT_TOKENS, low=9, high=9)
    parts = [hf_logits(load_hf(folder), ids).astype(np.float64) for folder in (base, expert, anti)]
    renamed = size - 1
    for strength in (1.0, -0.7):
        want = np.full((9, 320), -np.inf)
        delta = parts[1][:, :renamed] - parts[2][:, :renamed]
        want[:, :renamed] = parts[0][:, :renamed] + strength * delta
        common = [np.log(np.exp(p[:, :renamed]).sum(axis=1)) for p in parts]
        want[:, renamed] = parts[0][:, renamed] + strength * (common[1] - common[2])
        got = model.forward(ids, transfer_strength=strength)
        assert_logits_close(got, want.astype(np.float32)[None], context=f"strength {strength}")


@pytest.mark.parametrize("role", ["expert", "antiexpert"])
def test_ordinary_tokens_that_differ_are_an_error(zoo: ModelZoo, role: str, tmp_path: Path) -> None:
    good = zoo.folder("qwen2-tied", seed=1, vocab_size=310, tokenizer="plain")
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    text = (bad / "tokenizer.json").read_text()
    tokenizer = make_tokenizer()
    token = next(t for t, i in tokenizer.get_vocab().items() if i == 20)
    other = next(t for t, i in tokenizer.get_vocab().items() if i == 21)
    swapped = text.replace(f'"{token}": 20,', f'"{other}": 20,', 1).replace(f'"{other}": 21,', f'"{token}": 21,', 1)
    assert swapped != text
    (bad / "tokenizer.json").write_text(swapped)
    pair = (bad, good) if role == "expert" else (good, bad)
    with pytest.raises(ValueError, match=r"\b2[01]\b"):
        load_rast(zoo.folder("qwen2", vocab_size=310, tokenizer="plain"), *pair)


def test_inactive_pair_contributes_nothing_even_nan(zoo: ModelZoo, tmp_path: Path) -> None:
    base = zoo.folder("qwen2")
    hf = make_model(make_config("qwen2-tied", vocab_size=311), seed=1)
    hf.get_input_embeddings().weight.data[:] = float("nan")
    hf.save_pretrained(tmp_path)
    model = load_rast(base, tmp_path, zoo.folder("qwen2-tied", seed=2, vocab_size=311))
    (ids,) = random_prompts(1, 311, low=9, high=9)
    np.testing.assert_array_equal(model.forward(ids, transfer_strength=0.0), load_rast(base).forward(ids))
    out = details(model, ids, transfer_strength=0.0)
    np.testing.assert_array_equal(out.sequences, details(load_rast(base), ids).sequences)
    with pytest.raises(RuntimeError, match="expert"):
        model.generate(ids, max_new_tokens=1)
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=24, transfer_strength=0.0), out.sequences)


def with_eos(zoo: ModelZoo, source: Path, target: Path, eos: object) -> Path:
    shutil.copytree(source, target)
    (target / "generation_config.json").unlink(missing_ok=True)
    edit_json(target / "config.json", eos_token_id=eos)
    return target


def test_eos_is_the_union_of_base_and_experts(zoo: ModelZoo, tmp_path: Path) -> None:
    base, expert, anti = zoo.trio()
    prompt = np.array([5, 9, 200])
    free = load_rast(base, expert, anti).generate(prompt, max_new_tokens=40, do_sample=True, seed=1)[0, 3:]
    first = [int(token) for i, token in enumerate(free) if token not in free[:i]]
    early, middle, late = first[2], first[5], first[9]
    model = load_rast(
        with_eos(zoo, base, tmp_path / "base", [late]),
        with_eos(zoo, expert, tmp_path / "expert", middle),
        with_eos(zoo, anti, tmp_path / "anti", early),  # an antiexpert's wish to stop is no reason to stop
    )
    out = details(model, prompt, do_sample=True, seed=1, max_new_tokens=40)
    np.testing.assert_array_equal(out.sequences[0, 3:], free[: list(free).index(middle) + 1])
    assert out.finish_reason[0] == "eos"
    out = details(model, prompt, do_sample=True, seed=1, max_new_tokens=40, eos_token_id=late)
    assert out.sequences.shape[1] == 3 + list(free).index(late) + 1


def test_context_limit_names_the_model(zoo: ModelZoo) -> None:
    base = zoo.folder("qwen2")
    expert = zoo.folder("qwen2-tied", seed=1, vocab_size=311, max_position_embeddings=64)
    anti = zoo.folder("qwen2-tied", seed=2, vocab_size=311)
    model = load_rast(base, expert, anti)
    prompt = np.arange(10)
    assert model.generate(prompt, max_new_tokens=54).shape == (1, 64)
    with pytest.raises(ValueError, match="expert"):
        model.generate(prompt, max_new_tokens=55)
    with pytest.raises(ValueError, match="expert"):
        model.forward(np.arange(65))
    assert model.generate(prompt, max_new_tokens=100, transfer_strength=0.0).shape == (1, 110)
    assert load_rast(base, expert, anti, max_context=128).generate(prompt, max_new_tokens=100).shape == (1, 110)
    with pytest.raises(ValueError, match="max_context"):
        load_rast(base, expert, anti, max_context=32).generate(prompt, max_new_tokens=30)


def test_pair_arguments(zoo: ModelZoo) -> None:
    base, expert, anti = zoo.trio()
    pair = rast.TransferPair(str(expert), str(anti), 1.0)
    with pytest.raises((TypeError, ValueError)):
        load_rast(base, expert, anti, pairs=[pair])
    with pytest.raises((TypeError, ValueError)):
        load_rast(base, None, anti)
    model = load_rast(base, pairs=[pair])
    for strength in (float("nan"), float("inf"), [1.0, 2.0], "much"):
        with pytest.raises((TypeError, ValueError), match="transfer_strength"):
            model.forward(np.arange(3), transfer_strength=strength)


def test_models_that_fit_together_load_without_a_warning(zoo: ModelZoo) -> None:
    base, expert, anti = (zoo.folder("qwen2", seed=s, vocab_size=310, tokenizer="<s>,</s>") for s in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_rast(base, expert, anti)
    assert model.load_warnings == []
