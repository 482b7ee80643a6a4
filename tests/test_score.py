"""score(): log-probabilities and transfer statistics of given tokens, against NumPy on whole logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from oracle import ModelZoo, details, kl_divergence, load_rast, log_softmax, random_prompts


@pytest.fixture(scope="module")
def model(zoo: ModelZoo) -> Any:
    return load_rast(*zoo.trio())


def expected(model: Any, ids: np.ndarray, **options: Any) -> tuple[np.ndarray, ...]:
    parts = model.forward(ids, return_components=True, **options)
    combined, base = parts.logits[0, :-1], parts.base[0, :-1]

    def pick(rows: np.ndarray) -> np.ndarray:
        return np.take_along_axis(log_softmax(rows), ids[1:, None], axis=1)[:, 0]

    return pick(combined), pick(base), base.argmax(axis=1), kl_divergence(combined, base)


@pytest.mark.parametrize("strength", [1.0, -0.7, 0.0])
def test_score_is_numpy_on_forward(model: Any, strength: float) -> None:
    (ids,) = random_prompts(1, 311, seed=1, low=70, high=70)
    score = model.score(ids, transfer_strength=strength)
    logprob, base_logprob, base_token, kl = expected(model, ids, transfer_strength=strength)
    for got, want in ((score.logprob, logprob), (score.base_logprob, base_logprob), (score.kl, kl)):
        assert got.shape == (1, 70) and np.isnan(got[0, 0])
        np.testing.assert_allclose(got[0, 1:], want, rtol=1e-5, atol=2e-5)
    assert score.base_token[0, 0] == -1
    np.testing.assert_array_equal(score.base_token[0, 1:], base_token)
    np.testing.assert_allclose(score.sum(), [logprob.sum()], rtol=1e-5)
    np.testing.assert_allclose(score.perplexity, [np.exp(-logprob.mean())], rtol=1e-5)
    if strength == 0:
        np.testing.assert_array_equal(score.kl[0, 1:], 0)
        np.testing.assert_array_equal(score.logprob, score.base_logprob)


def test_score_is_laid_out_as_the_input(model: Any) -> None:
    prompts = random_prompts(4, 311, seed=2, low=1, high=30)
    width = max(map(len, prompts)) + 3
    for side in ("left", "right"):
        ids, mask = np.zeros((4, width), dtype=np.int64), np.zeros((4, width), dtype=np.int64)
        for i, prompt in enumerate(prompts):
            where = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
            ids[i, where], mask[i, where] = prompt, 1
        score = model.score(ids, attention_mask=mask)
        for i, prompt in enumerate(prompts):
            alone = model.score(prompt)
            for name in ("logprob", "base_logprob", "kl", "base_token"):
                row = getattr(score, name)[i]
                np.testing.assert_array_equal(row[mask[i] == 1], getattr(alone, name)[0], err_msg=name)
                rest = row[mask[i] == 0]
                assert (rest == -1).all() if name == "base_token" else np.isnan(rest).all()


def test_score_equals_generate(model: Any) -> None:
    """What generate said about its tokens is what score says about them, bit for bit."""
    (prompt,) = random_prompts(1, 311, seed=3, low=9, high=9)
    out = details(model, prompt, do_sample=True, seed=1, max_new_tokens=40)
    score = model.score(out.sequences)
    np.testing.assert_array_equal(score.logprob[:, 9:], out.logprob)
    np.testing.assert_array_equal(score.base_logprob[:, 9:], out.base_logprob)
    np.testing.assert_array_equal(score.base_token[:, 9:], out.base_token)
    np.testing.assert_array_equal(score.kl[:, 9:], out.transfer_kl)


def test_score_of_a_long_text_needs_no_logits(zoo: ModelZoo) -> None:
    """2000 tokens over several steps of the engine."""
    model = load_rast(zoo.folder("llama", max_position_embeddings=2048))
    (ids,) = random_prompts(1, 1031, low=2000, high=2000)
    score = model.score(ids)
    want = expected(model, ids)[0]
    np.testing.assert_allclose(score.logprob[0, 1:], want, rtol=1e-5, atol=2e-5)


def test_one_token(model: Any) -> None:
    score = model.score(np.array([5]))
    assert score.logprob.shape == (1, 1) and np.isnan(score.logprob).all() and score.sum()[0] == 0
