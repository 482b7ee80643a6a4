"""The engine against itself: random requests together, under tight budgets, give bitwise what each gives alone.

At the level of `_core`, so that unequal vocabularies, drafts, prompt rows and budgets meet in every combination.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_binding import VOCAB, make_config, make_net, make_request

from rast import _core

EXAMPLES = 400 if os.environ.get("RAST_TEST_FULL") else 60
SMALL_VOCAB = VOCAB // 2
WANT = _core.WANT_LOGPROBS | _core.WANT_STATS | _core.WANT_LOGITS


@pytest.fixture(scope="module")
def model() -> _core.Model:
    """Three nets of one shape; the last one has rows for half of the ids only."""
    nets = [make_net(seed) for seed in range(3)]
    small = dict(nets[2]["tensors"])
    small["model.embed_tokens.weight"] = (
        nets[2]["tensors"]["model.embed_tokens.weight"][0][:SMALL_VOCAB].copy(),
        "F32",
    )
    nets[2] |= {"tensors": small, "config": make_config(vocab_size=SMALL_VOCAB)}
    return _core.Model(nets, num_threads=2)


@st.composite
def requests(draw: st.DrawFn) -> Any:
    max_new = draw(st.integers(1, 12))
    request = make_request(
        ids=np.array(draw(st.lists(st.integers(0, SMALL_VOCAB - 1), min_size=1, max_size=70)), np.int32),
        coef=np.array([1, *draw(st.sampled_from([(0, 0), (1, -1), (0.5, 0), (0, -0.7)]))], np.float32),
        max_new=max_new,
        seed=draw(st.integers(0, 9)),
        n_samples=draw(st.integers(1, 4)),
        do_sample=draw(st.booleans()),
        temperature=draw(st.sampled_from([0.7, 3.0])),
        top_k=draw(st.sampled_from([0, 5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.4])),
        transfer_start=draw(st.sampled_from([0, 0, 3])),
        eos=np.array(draw(st.lists(st.integers(0, VOCAB - 1), max_size=2)), np.int32),
        n_draft=draw(st.integers(0, 5)),
        want=WANT | draw(st.sampled_from([0, _core.WANT_PROMPT])),
    )
    return request


def assert_same(got: Any, want: Any) -> None:
    assert got["error"] is None and want["error"] is None
    assert got["finish"] == want["finish"]
    for part, other in ((got, want), (got["prompt"] or {}, want["prompt"] or {})):
        for name in ("tokens", "logprob", "base_token", "base_logprob", "kl", "logits"):
            if part.get(name) is not None:
                np.testing.assert_array_equal(part[name], other[name], err_msg=name)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(requests(), min_size=1, max_size=5),
    st.sampled_from([1, 3, 16, 0]),
    st.sampled_from([1, 2, 0]),
    st.integers(0, 3),
)
def test_together_as_alone(model: _core.Model, batch: list[Any], max_rows: int, max_seqs: int, spare: int) -> None:
    alone = _core.Engine(model)
    want = [result for request in batch for result in alone.run([request | {"n_draft": 0}])]
    token = sum(net["kv_bytes_per_token"] for net in model.net_info())
    blocks = max(-(-(len(r["ids"]) + r["max_new"]) // 32) for r in batch) + spare
    engine = _core.Engine(model, kv_bytes=blocks * 32 * token, max_rows=max_rows, max_seqs=max_seqs)
    known = {}  # (request, sample) -> its tokens, so that some drafts stand
    position = 0
    for tag, request in enumerate(batch):
        request["tag"] = tag
        for sample in range(request["n_samples"]):
            known[tag, sample] = want[position]["tokens"]
            position += 1

    def drafter(tag: int, sample: int, ids: np.ndarray, k: int) -> list[int]:
        n_new = len(ids) - len(batch[tag]["ids"])
        right = known[tag, sample][n_new : n_new + k].tolist()
        return [*right[: 1 + n_new % 3], *([VOCAB - 1, 0, 7, 1, 2][: k - len(right[: 1 + n_new % 3])])]

    engine._set_drafter(drafter)
    results = engine.run(batch)
    assert len(results) == len(want)
    for got, expected in zip(results, want, strict=True):
        assert_same(got, expected)
    info = engine.info()
    assert info["n_free"] == info["n_blocks"]


def test_ids_of_one_net_only_are_never_drawn_before_the_pair_joins(model: _core.Model) -> None:
    """The pair will have to read what the base draws alone."""
    request = make_request(
        transfer_start=6, max_new=12, do_sample=True, temperature=50.0, n_samples=40, want=_core.WANT_LOGPROBS
    )
    for result in _core.Engine(model).run([request]):
        assert result["error"] is None
        assert result["tokens"].max() < SMALL_VOCAB


def test_a_prompt_is_evaluated_once(model: _core.Model) -> None:
    with pytest.raises(ValueError, match="n_samples"):
        _core.Engine(model).run([make_request(max_new=0, n_samples=2, want=_core.WANT_PROMPT)])


def test_drafts_leave_rows_for_the_others(model: _core.Model) -> None:
    engine = _core.Engine(model, max_rows=8, max_seqs=4)
    engine._set_drafter(lambda tag, sample, ids, k: [0] * k)
    engine.add(make_request(max_new=100, n_draft=8, tag=0))
    engine.step()
    engine.add(make_request(max_new=4, tag=1))
    seen = [result["tag"] for _ in range(20) for result in engine.step()]
    assert 1 in seen
