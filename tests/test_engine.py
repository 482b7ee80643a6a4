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

EXAMPLES = 400 if os.environ.get("RAST_TEST_FULL") else 100
SMALL_VOCAB = VOCAB // 2
HEADERS = np.random.default_rng(0).integers(0, SMALL_VOCAB, (2, 100)).tolist()
WANT = _core.WANT_LOGPROBS | _core.WANT_STATS | _core.WANT_LOGITS
WANTS = [0, WANT, WANT | _core.WANT_SCORES, _core.WANT_SCORES, _core.WANT_LOGPROBS | _core.WANT_COMPONENTS]


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
    max_new = draw(st.integers(1, 12) | st.integers(70, 150))
    header = HEADERS[draw(st.integers(0, 1))][: draw(st.sampled_from([0, 0, 31, 32, 40, 64, 65, 100]))]
    own = draw(st.lists(st.integers(0, SMALL_VOCAB - 1), min_size=0 if header else 1, max_size=40))
    request = make_request(
        ids=np.array([*header, *own], np.int32),
        coef=np.array([1, *draw(st.sampled_from([(0, 0), (1, -1), (0.5, 0), (0, -0.7)]))], np.float32),
        max_new=max_new,
        seed=draw(st.integers(0, 9)),
        n_samples=draw(st.integers(1, 4)),
        do_sample=draw(st.booleans()),
        temperature=draw(st.sampled_from([0.7, 3.0])),
        top_k=draw(st.sampled_from([0, 5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.4])),
        transfer_start=draw(st.sampled_from([0, 0, 3])),
        eos=np.array(draw(st.sampled_from([[], [], [5], [3, VOCAB - 1]])), np.int32),
        n_draft=draw(st.integers(0, 5)),
        want=draw(st.sampled_from(WANTS)) | draw(st.sampled_from([0, _core.WANT_PROMPT])),
    )
    request["prompt_from"] = draw(st.integers(0, len(request["ids"]) - 1))
    return request


def assert_same(got: Any, want: Any) -> None:
    assert got["error"] is None and want["error"] is None
    assert got["finish"] == want["finish"]
    for part, other in ((got, want), (got["prompt"] or {}, want["prompt"] or {})):
        for name in ("tokens", "logprob", "base_token", "base_logprob", "kl", "logits", "scores", "parts"):
            if part.get(name) is not None:
                np.testing.assert_array_equal(part[name], other[name], err_msg=name)


class Drafter:
    """Guesses of which some are right."""

    def __init__(self, batch: list[Any], want: list[Any]) -> None:
        self.batch = batch
        self.known: dict[tuple[int, int], Any] = {}
        position = 0
        for tag, request in enumerate(batch):
            request["tag"] = tag
            for sample in range(request["n_samples"]):
                self.known[tag, sample] = want[position]["tokens"]
                position += 1

    def __call__(self, tag: int, sample: int, ids: np.ndarray, k: int) -> list[int]:
        n_new = len(ids) - len(self.batch[tag]["ids"])
        right = self.known[tag, sample][n_new : n_new + k].tolist()
        return [*right[: 1 + n_new % 3], *([VOCAB - 1, 0, 7, 1, 2][: k - len(right[: 1 + n_new % 3])])]


def budget(model: _core.Model, n_blocks: int) -> int:
    return n_blocks * 32 * sum(net["kv_bytes_per_token"] for net in model.net_info())


def assert_idle(engine: _core.Engine) -> None:
    info = engine.info()
    assert info["n_free"] == info["n_blocks"] >= info["n_cached"]


@pytest.fixture(scope="module")
def seen(model: _core.Model) -> Any:
    """Counters of all engines of the property test: what it is about did happen."""
    counts = {"preempted": 0, "reused": 0, "evicted": 0, "accepted": 0}
    yield counts
    assert all(counts.values()), counts


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(requests(), min_size=1, max_size=5),
    st.sampled_from([1, 3, 16, 0]),
    st.sampled_from([1, 2, 0]),
    st.integers(0, 5),
)
def test_together_as_alone(
    model: _core.Model, seen: dict[str, int], batch: list[Any], max_rows: int, max_seqs: int, spare: int
) -> None:
    want = [result for request in batch for result in _core.Engine(model).run([request | {"n_draft": 0}])]
    blocks = max(-(-(len(r["ids"]) + r["max_new"]) // 32) for r in batch) + spare
    engine = _core.Engine(model, kv_bytes=budget(model, blocks), max_rows=max_rows, max_seqs=max_seqs)
    engine._set_drafter(Drafter(batch, want))
    for _ in range(2):  # the second time with what the first left in the cache
        results = engine.run(batch)
        assert len(results) == len(want)
        for got, expected in zip(results, want, strict=True):
            assert_same(got, expected)
        assert_idle(engine)
    for name in seen:
        seen[name] += engine.info()[name]  # type: ignore[literal-required]


def test_ids_of_one_net_only_are_never_drawn_before_the_pair_joins(model: _core.Model) -> None:
    """The pair will have to read what the base draws alone."""
    request = make_request(
        transfer_start=6, max_new=12, do_sample=True, temperature=50.0, n_samples=40, want=_core.WANT_LOGPROBS
    )
    for result in _core.Engine(model).run([request]):
        assert result["error"] is None
        assert result["tokens"].max() < SMALL_VOCAB


@pytest.mark.parametrize("n_samples", [1, 8])
@pytest.mark.parametrize("order", [[0, 1], [1, 0], [0, 1, 0], [0, 0.5, 1]])
def test_a_prompt_with_and_without_transfer_is_computed_once(
    model: _core.Model, n_samples: int, order: list[float]
) -> None:
    """Its last block too, by each net: the one who needs it first computes it for all."""
    engine = _core.Engine(model)
    batch = [
        make_request(
            ids=np.array(HEADERS[0][:70], np.int32),
            coef=np.array([1, strength, -strength], np.float32),
            max_new=1,
            n_samples=n_samples,
            tag=tag,
        )
        for tag, strength in enumerate(order)
    ]
    results = engine.run(batch)
    draws = sum(n_samples * (3 if strength else 1) for strength in order)
    assert engine.info()["rows"] == 3 * 69 + draws
    for request, got in zip(np.repeat(np.array(batch), n_samples), results, strict=True):
        assert_same(got, _core.Engine(model).run([request | {"n_samples": 1}])[0])


def test_a_prompt_is_evaluated_once(model: _core.Model) -> None:
    with pytest.raises(ValueError, match="n_samples"):
        _core.Engine(model).run([make_request(max_new=0, n_samples=2, want=_core.WANT_PROMPT)])


def test_drafts_leave_rows_for_the_others(model: _core.Model) -> None:
    engine = _core.Engine(model, max_rows=8, max_seqs=4)
    engine._set_drafter(lambda tag, sample, ids, k: [0] * k)
    session = _core.Session(engine)
    session.submit(make_request(max_new=100, n_draft=8, tag=0))
    session.step()
    session.submit(make_request(max_new=4, tag=1))
    seen = [result["tag"] for _ in range(20) for result in session.step()]
    assert 1 in seen
