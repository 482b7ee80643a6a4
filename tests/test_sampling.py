"""Draws follow the exact distribution of transformers' warpers; copies are independent; seeds replay.

Tests of distribution are chi-squared with fixed seeds and a significance level fixed in advance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import FULL, ModelZoo, Transfer, details, hf_logits, load_hf, load_rast, log_softmax, processed

SIGNIFICANCE = 1e-4
DRAWS = 40000 if FULL else 10000
PROMPT = np.array([3, 50, 7, 19, 19])


def assert_distribution(counts: np.ndarray, probabilities: np.ndarray, context: object = "") -> None:
    """Chi-squared of counts against probabilities; rare outcomes are pooled."""
    total = counts.sum()
    assert counts[probabilities == 0].sum() == 0, f"{context}: drawn with probability 0"
    expected = probabilities * total
    order = np.argsort(expected, kind="stable")
    rare = order[np.cumsum(expected[order]) < 5.0]
    keep = np.setdiff1d(np.arange(len(expected)), rare)
    keep = keep[expected[keep] >= 5.0]
    rest = np.setdiff1d(np.arange(len(expected)), keep)
    observed = np.append(counts[keep], counts[rest].sum())
    wanted = np.append(expected[keep], expected[rest].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    if len(wanted) == 1:
        return
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    half = torch.tensor([(len(wanted) - 1) / 2, statistic / 2], dtype=torch.float64)
    p_value = float(torch.special.gammaincc(half[0], half[1]))
    assert p_value > SIGNIFICANCE, f"{context}: p = {p_value:g}, chi-squared {statistic:g} of {len(wanted)} bins"


@pytest.fixture(scope="module")
def folder(zoo: ModelZoo) -> Path:
    return zoo.folder("llama", seed=5, vocab_size=96, logit_std=1.5)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_rast(folder)


def exact(folder: Path, ids: np.ndarray, prompt_length: int, **options: Any) -> np.ndarray:
    row = hf_logits(load_hf(folder), ids)[-1]
    return np.exp(log_softmax(processed(row, ids, prompt_length, do_sample=True, **options)))


CASES: list[dict[str, Any]] = [
    dict(top_k=0),
    dict(),  # top_k = 50
    dict(top_k=0, temperature=0.5),
    dict(top_k=0, temperature=2.5),
    dict(top_k=7),
    dict(top_k=0, top_p=0.7),
    dict(top_k=0, min_p=0.2),
    dict(top_k=0, repetition_penalty=1.8),
    dict(top_k=0, repetition_penalty=0.6),
    dict(temperature=1.4, top_k=30, top_p=0.8, min_p=0.05, repetition_penalty=1.2),
    dict(top_k=0, suppress_tokens=[1, 2, 3], bad_words_ids=[[4], [19, 6]], top_p=0.9),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_first_token(model: Any, folder: Path, case: int) -> None:
    options = CASES[case]
    rows = model.generate(PROMPT, do_sample=True, max_new_tokens=1, num_return_sequences=DRAWS, seed=case, **options)
    assert rows.shape == (DRAWS, 6)
    counts = np.bincount(rows[:, 5], minlength=96)
    assert_distribution(counts, exact(folder, PROMPT, 5, **options), options)


def test_first_token_of_a_trio(zoo: ModelZoo, folder: Path) -> None:
    expert, anti = (zoo.folder("qwen2-tied", seed=s, vocab_size=96, logit_std=1.5) for s in (1, 2))
    model = load_rast(folder, expert, anti)
    oracle = Transfer(load_hf(folder), [(load_hf(expert), load_hf(anti), 0.8)])
    options: dict[str, Any] = dict(do_sample=True, temperature=1.1, top_p=0.9, top_k=0)
    rows = model.generate(
        PROMPT, max_new_tokens=1, num_return_sequences=DRAWS, seed=2, transfer_strength=0.8, **options
    )
    want = np.exp(log_softmax(processed(oracle(PROMPT)[-1], PROMPT, 5, **options)))
    assert_distribution(np.bincount(rows[:, 5], minlength=96), want)


def test_joint_distribution_of_two_tokens(model: Any, folder: Path) -> None:
    options: dict[str, Any] = dict(top_k=8, temperature=1.3, repetition_penalty=1.3)
    rows = model.generate(PROMPT, do_sample=True, max_new_tokens=2, num_return_sequences=DRAWS, seed=1, **options)
    first = exact(folder, PROMPT, 5, **options)
    joint = np.zeros((96, 96))
    for token in np.flatnonzero(first):
        joint[token] = first[token] * exact(folder, np.append(PROMPT, token), 5, **options)
    counts = np.bincount(rows[:, 5] * 96 + rows[:, 6], minlength=96 * 96)
    assert_distribution(counts, joint.ravel())


def test_copies_are_independent(model: Any, folder: Path) -> None:
    """Joint distribution of neighbouring copies, of copies 64 apart, and of two prompts under one seed."""
    options: dict[str, Any] = dict(top_k=8, temperature=1.5)
    other = np.array([8, 1, 44])
    rows = model.generate(
        [PROMPT, other], do_sample=True, max_new_tokens=1, num_return_sequences=DRAWS, seed=3, pad_token_id=0, **options
    )[:, -1]
    mine, theirs = rows[:DRAWS], rows[DRAWS:]
    p, q = exact(folder, PROMPT, 5, **options), exact(folder, other, 3, **options)
    half = DRAWS // 128 * 128
    far = mine[:half].reshape(-1, 2, 64)
    for name, a, b, pb in (
        ("neighbours", mine[0:half:2], mine[1:half:2], p),
        ("64 apart", far[:, 0].ravel(), far[:, 1].ravel(), p),
        ("two prompts", mine, theirs, q),
    ):
        assert_distribution(np.bincount(a * 96 + b, minlength=96 * 96), np.outer(p, pb).ravel(), name)


def test_positions_are_independent(model: Any, zoo: ModelZoo, tmp_path: Path) -> None:
    """Where the distribution cannot depend on what was drawn, neither may the draws: all-equal logits."""
    from oracle import make_config, make_model

    hf = make_model(make_config("qwen2", vocab_size=6), seed=1)
    hf.lm_head.weight.data[:] = 0
    hf.save_pretrained(tmp_path)
    rows = load_rast(tmp_path).generate(
        np.array([1]), do_sample=True, max_new_tokens=8, num_return_sequences=DRAWS // 4, seed=0, top_k=0
    )[:, 1:]
    for a in range(8):
        for b in range(a + 1, 8):
            assert_distribution(np.bincount(rows[:, a] * 6 + rows[:, b], minlength=36), np.full(36, 1 / 36), (a, b))


def test_rare_tokens_are_drawn(tmp_path: Path) -> None:
    """A token of probability 1e-3 beside one of .999: the random numbers resolve small probabilities."""
    from oracle import make_config, make_model

    hf = make_model(make_config("llama-bias", vocab_size=16), seed=1)
    row = hf_logits(hf, PROMPT % 16)[-1]
    hidden = np.linalg.lstsq(hf.lm_head.weight.detach().numpy(), row, rcond=None)[0]
    wanted = np.full(16, -30.0)
    wanted[3], wanted[12] = np.log(0.999), np.log(0.001)
    hf.lm_head.weight.data = torch.from_numpy(np.outer(wanted, hidden) / (hidden @ hidden)).float()
    p = np.exp(log_softmax(hf_logits(hf, PROMPT % 16)[-1]))
    assert abs(p[12] - 0.001) < 1e-5
    hf.save_pretrained(tmp_path)
    rows = load_rast(tmp_path).generate(
        PROMPT % 16, do_sample=True, max_new_tokens=1, num_return_sequences=20000, seed=0, top_k=0
    )
    counts = np.bincount(rows[:, -1], minlength=16)
    assert counts[3] + counts[12] == 20000
    assert_distribution(counts[[3, 12]], p[[3, 12]] / p[[3, 12]].sum())


def test_seeds(model: Any) -> None:
    options: dict[str, Any] = dict(do_sample=True, max_new_tokens=12, return_dict_in_generate=True)
    one = model.generate(PROMPT, seed=1, **options)
    assert one.seed == 1
    np.testing.assert_array_equal(model.generate(PROMPT, seed=1, **options).sequences, one.sequences)
    assert (model.generate(PROMPT, seed=2, **options).sequences != one.sequences).any()
    free = [model.generate(PROMPT, **options) for _ in range(3)]
    assert len({out.seed for out in free}) == 3
    for out in free:
        np.testing.assert_array_equal(model.generate(PROMPT, seed=out.seed, **options).sequences, out.sequences)
    model.generate(PROMPT, seed=2**64 - 1, **options)
    for seed in (-1, 2**64, 1.5, "x"):
        with pytest.raises((TypeError, ValueError, OverflowError), match="seed"):
            model.generate(PROMPT, seed=seed, **options)


def test_duplicates_in_one_call_continue_the_copy_count(model: Any) -> None:
    options: dict[str, Any] = dict(do_sample=True, max_new_tokens=10, seed=6)
    other = np.array([8, 1, 44, 2, 2])
    four = model.generate(PROMPT, num_return_sequences=4, **options)
    twice = model.generate(np.stack([PROMPT, other, PROMPT]), num_return_sequences=2, **options)
    np.testing.assert_array_equal(np.concatenate([twice[:2], twice[4:]]), four)
    np.testing.assert_array_equal(model.generate(other, num_return_sequences=2, **options), twice[2:4])
    np.testing.assert_array_equal(model.generate(PROMPT, num_return_sequences=2, **options), four[:2])


def test_logprob_is_of_the_unprocessed_distribution(model: Any, folder: Path) -> None:
    out = details(model, PROMPT, do_sample=True, temperature=0.3, top_k=3, repetition_penalty=1.5, seed=0)
    want = log_softmax(hf_logits(load_hf(folder), out.sequences[0, :-1])[4:])
    picked = np.take_along_axis(want, out.sequences[0, 5:, None], axis=1)[:, 0]
    np.testing.assert_allclose(out.logprob[0], picked, atol=1e-3)
