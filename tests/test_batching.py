"""What many requests cost and how they end: rows that are computed once, blocks that come back, `generate_iter`.

That sharing and preemption change no result is tested in test_engine.py; here it is counted.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
from oracle import FULL, ModelZoo, load_rast, random_prompts
from test_binding import VOCAB, make_net, make_request

import rast
from rast import _core
from rast.modeling import _bytes

# ---- the core: rows and blocks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_net() -> _core.Model:
    return _core.Model([make_net(1)], num_threads=2)


def request(ids: Any, **changes: Any) -> Any:
    return make_request(ids=np.array(ids, np.int32), coef=np.ones(1, np.float32), do_sample=True, **changes)


def ids_of(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()  # type: ignore[no-any-return]


def new_engine(model: _core.Model, n_blocks: int = 400, **budget: int) -> _core.Engine:
    token = sum(net["kv_bytes_per_token"] for net in model.net_info())
    return _core.Engine(model, kv_bytes=n_blocks * 32 * token, **budget)


def rows(engine: _core.Engine, *requests: Any) -> int:
    """Rows that these requests cost beyond one for each new token."""
    before = engine.info()["rows"]
    results = engine.run(requests)
    assert all(result["error"] is None for result in results)
    info = engine.info()
    assert info["n_free"] == info["n_blocks"]
    return info["rows"] - before - sum(len(result["tokens"]) for result in results)


@pytest.mark.parametrize("max_rows", [0, 40])
def test_a_common_header_is_computed_once(one_net: _core.Model, max_rows: int) -> None:
    header = ids_of(0, 256)
    own = [ids_of(i + 1, 3 + 5 * i) for i in range(8)]
    engine = new_engine(one_net, max_rows=max_rows)
    requests = [request(header + ids, max_new=9, seed=i) for i, ids in enumerate(own)]
    assert rows(engine, *requests) == 256 + sum(len(ids) - 1 for ids in own)
    assert engine.info()["reused"] == 7 * 256
    more = [request(header + ids_of(50, 20), max_new=3), request(ids_of(51, 20), max_new=3)]
    assert rows(engine, *more) == 19 + 19  # the header was kept


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 65, 100])
@pytest.mark.parametrize("max_seqs", [0, 3])
def test_samples_compute_their_prompt_once(one_net: _core.Model, n: int, max_seqs: int) -> None:
    engine = new_engine(one_net, max_seqs=max_seqs)
    assert rows(engine, request(ids_of(0, n), n_samples=16, max_new=5)) == n - 1
    assert rows(engine, request(ids_of(0, n), n_samples=2, max_new=40)) == 0
    assert rows(engine, request(ids_of(0, n + 1), max_new=1)) <= 1 + n % 32


def test_a_conversation_goes_on_where_it_ended(one_net: _core.Model) -> None:
    engine = new_engine(one_net)
    prompt = ids_of(3, 50)
    (first,) = engine.run([request(prompt, max_new=70)])
    turn = [*prompt, *first["tokens"].tolist(), *ids_of(4, 10)]
    assert rows(engine, request(turn, max_new=4)) == len(turn) - 1 - 96  # of 119 computed tokens, three blocks are full


def test_nets_are_filled_one_by_one() -> None:
    """What the base alone has computed is not computed again when the pair joins."""
    model = _core.Model([make_net(seed) for seed in range(3)], num_threads=2)
    engine = new_engine(model)
    prompt = np.array(ids_of(0, 96 + 10), np.int32)
    alone = make_request(ids=prompt, coef=np.array([1, 0, 0], np.float32), max_new=1)
    trio = make_request(ids=prompt, coef=np.array([1, 1, -1], np.float32), max_new=1)
    assert rows(engine, alone) == 105
    trios = 6 * 3 - 6  # each net has its row of each drawn token's logits
    assert rows(engine, trio | {"n_samples": 6}) == 2 * 105 + trios
    assert rows(engine, trio | {"n_samples": 6}) == trios
    assert rows(engine, alone) == 0
    want = new_engine(model).run([trio | {"want": _core.WANT_LOGITS}])
    got = engine.run([trio | {"want": _core.WANT_LOGITS}])
    np.testing.assert_array_equal(got[0]["logits"], want[0]["logits"])


def test_reported_positions_are_computed(one_net: _core.Model) -> None:
    engine = new_engine(one_net)
    scored = request(ids_of(0, 100), max_new=0, want=_core.WANT_PROMPT | _core.WANT_LOGPROBS)
    want = engine.run([scored])[0]["prompt"]["logprob"]
    assert len(want) == 100
    assert rows(engine, scored) == 100
    assert rows(engine, scored | {"prompt_from": 70}) == 36
    assert rows(engine, scored | {"prompt_from": 64}) == 36
    assert rows(engine, scored | {"prompt_from": 63}) == 68
    got = engine.run([scored | {"prompt_from": 70}, scored])
    np.testing.assert_array_equal(got[0]["prompt"]["logprob"], want[70:])
    np.testing.assert_array_equal(got[1]["prompt"]["logprob"], want)


def test_the_prefix_used_longest_ago_goes_first(one_net: _core.Model) -> None:
    engine = new_engine(one_net, n_blocks=12)
    a, b, c = (request(ids_of(i, 127), max_new=1) for i in range(3))
    assert [rows(engine, r) for r in (a, b, a)] == [126, 126, 0]
    assert rows(engine, c) == 126  # four blocks of a, four of b, four that were free
    assert engine.info()["evicted"] == 0
    assert rows(engine, request(ids_of(9, 33), max_new=1)) == 32  # takes b's last two
    assert engine.info()["evicted"] == 2
    assert rows(engine, b) == 126 - 64
    assert rows(engine, c) == 0


def test_the_first_never_gives_way(one_net: _core.Model) -> None:
    """Ten sequences that grow to five blocks each, room for six blocks: they end in order, and without thrashing."""
    engine = new_engine(one_net, n_blocks=6)
    batch = [request(ids_of(i, 20), max_new=120, seed=i, tag=i) for i in range(10)]
    want = [new_engine(one_net).run([r])[0]["tokens"].tolist() for r in batch]
    ended = []
    results = engine.run(batch, lambda tag, sample, ids, finish: ended.append(tag) if finish else None)
    assert [r["tokens"].tolist() for r in results] == want
    assert ended == list(range(10))
    info = engine.info()
    assert 0 < info["preempted"] <= 20
    assert info["rows"] <= 2 * 10 * 140
    assert info["n_free"] == info["n_blocks"]


def test_waiting_samples_can_be_cancelled(one_net: _core.Model) -> None:
    engine = new_engine(one_net, n_blocks=4, max_seqs=2)
    session = _core.Session(engine)
    first = session.submit(request(ids_of(0, 20), max_new=50, n_samples=300, tag=1))
    session.submit(request(ids_of(1, 20), max_new=3, tag=2))
    for _ in range(3):
        session.step()
    session.cancel(first)
    results = session.step()
    assert sorted(r["sample"] for r in results if r["finish"] == "cancelled") == list(range(300))
    finish = [r["finish"] for _ in range(4) for r in session.step()]
    assert finish[-1] == "length" and not engine.busy
    assert engine.info()["n_free"] == engine.info()["n_blocks"]


def test_samples_in_any_state_can_be_dropped(one_net: _core.Model) -> None:
    """Running, waiting with their blocks given up, and not begun; the others go on as if they had been alone."""
    others = [request(ids_of(7 + i, 20), max_new=60, seed=i, tag=i) for i in range(3)]
    want = [new_engine(one_net).run([other])[0]["tokens"].tolist() for other in others]
    engine = new_engine(one_net, n_blocks=5, max_seqs=4)
    dropped, kept = _core.Session(engine), _core.Session(engine)
    kept.submit(others[0])
    dropped.submit(request(ids_of(0, 20), max_new=100, n_samples=300))
    kept.submit(others[1])
    dropped.submit(request(ids_of(1, 20), max_new=100))
    kept.submit(others[2])
    got: list[list[int]] = [[], [], []]
    while engine.busy:
        for result in kept.step():
            got[result["tag"]] += result["tokens"].tolist()
        if engine.info()["preempted"]:
            dropped = None  # type: ignore[assignment]
    assert dropped is None and got == want
    assert engine.info()["n_free"] == engine.info()["n_blocks"]


def test_a_deadline_ends_requests_that_have_not_begun(one_net: _core.Model) -> None:
    engine = new_engine(one_net, max_seqs=1)
    results = engine.run(
        [
            request(ids_of(0, 5), max_new=3000, tag=1),
            request(ids_of(1, 5), max_new=5, n_samples=3, tag=2, max_time=1e-3),
            request(ids_of(1, 5), max_new=5, tag=3),
        ]
    )
    assert [(r["tag"], r["finish"], len(r["tokens"])) for r in results] == [
        (1, "length", 3000),
        *[(2, "time", 0)] * 3,
        (3, "length", 5),
    ]


def test_sessions_share_an_engine(one_net: _core.Model) -> None:
    engine = new_engine(one_net)
    good = [r["tokens"].tolist() for r in engine.run([request(ids_of(i, 9), max_new=30, seed=i) for i in range(3)])]
    first, second = _core.Session(engine), _core.Session(engine)
    first.submit(request(ids_of(0, 9), max_new=30, seed=0, tag=5))
    second.submit(request(ids_of(1, 9), max_new=30, seed=1, tag=6))
    (own,) = engine.run([request(ids_of(2, 9), max_new=30, seed=2)])  # takes the others along
    assert own["tokens"].tolist() == good[2]
    got: list[Any] = []
    assert first.collect(10.0, got.append) == 0
    assert [(one["tag"], one["tokens"].tolist()) for one in got] == [(5, good[0])]
    assert first.collect(10.0, got.append) == 0 and len(got) == 1
    first.submit(request(ids_of(2, 9), max_new=10_000))
    first.step()
    del first
    assert second.collect(10.0, got.append) == 0
    assert [(two["tag"], two["tokens"].tolist()) for two in got[1:]] == [(6, good[1])]
    assert engine.info()["n_free"] == engine.info()["n_blocks"]


# ---- the budget ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trio(zoo: ModelZoo) -> tuple[Path, Path, Path]:
    return zoo.trio("qwen2", max_position_embeddings=2048)


def kv_bytes(model: rast.RastForCausalLM) -> int:
    return sum(net["kv_bytes_per_token"] for net in model.info()["nets"])


def test_budget(trio: tuple[Path, ...]) -> None:
    per_token = kv_bytes(load_rast(*trio))
    for options, n_blocks in (
        (dict(kv_cache_tokens=1), 1),
        (dict(kv_cache_tokens=100), 4),
        (dict(max_memory=per_token * 100), 3),
        (dict(max_memory=f"{per_token * 320 / 1024} KiB"), 10),
        (dict(max_memory=f"{per_token * 320 / 1000}KB", kv_cache_tokens=64), 2),
        (dict(max_memory=f" {per_token * 320 / 1000:f} kb "), 10),
        (dict(max_memory=f"{per_token * 320 * 10}"), 100),
        (dict(max_memory=np.uint32(per_token * 320)), 10),
        (dict(kv_cache_tokens=np.int16(100), max_batch_size=np.uint8(3), max_batch_rows=np.int64(40)), 4),
    ):
        info = load_rast(*trio, **options).cache_info()
        assert info["n_blocks"] == info["n_free"] == n_blocks, options
        assert info["kv_bytes"] == n_blocks * 32 * per_token
    assert load_rast(*trio).cache_info()["n_blocks"] >= 64 * 64


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(max_memory=100), ValueError, "bytes would be enough"),
        (dict(max_memory="1KB", kv_cache_tokens=10_000), ValueError, "10000 tokens"),
        (dict(max_memory="2 GiBB"), ValueError, "2GiB"),
        (dict(max_memory="lots"), ValueError, "lots"),
        (dict(max_memory=0), ValueError, "max_memory"),
        (dict(max_memory=1.5), TypeError, "max_memory"),
        (dict(max_memory=True), TypeError, "max_memory"),
        (dict(kv_cache_tokens=0), ValueError, "kv_cache_tokens"),
        (dict(kv_cache_tokens="5"), TypeError, "kv_cache_tokens"),
        (dict(kv_cache_tokens=np.float64(5)), TypeError, "kv_cache_tokens"),
        (dict(kv_cache_tokens=np.bool_(True)), TypeError, "kv_cache_tokens"),
        (dict(kv_cache_tokens=2**70), ValueError, "kv_cache_tokens must be at most [0-9]{10,},"),
        (dict(kv_cache_tokens=10**18), ValueError, "kv_cache_tokens must be at most [0-9]{10,},"),
        (dict(max_memory=2**70), ValueError, "max_memory must be at most 9223372036854775807,"),
        (dict(max_memory="9e9"), ValueError, "max_memory"),
        (dict(max_memory="."), ValueError, "max_memory"),
        (dict(max_memory="99999999999TiB"), ValueError, "max_memory must be at most 9223372036854775807,"),
        (dict(max_batch_rows=2**70), ValueError, "max_batch_rows must be at most 1048576,"),
        (dict(max_batch_size=10**18), ValueError, "max_batch_size must be at most 1048576,"),
        (dict(max_context=2**70), ValueError, "max_context must be at most 268435456,"),
        (dict(num_threads=2**70), ValueError, "num_threads must be at most 4096,"),
    ],
)
def test_wrong_budgets(trio: tuple[Path, ...], options: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        load_rast(*trio, **options)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2gib", 2 << 30),
        ("500kB", 500_000),
        (".5GiB", 1 << 29),
        ("3.MiB", 3 << 20),
        ("7", 7),
        (" 1 b ", 1),
        ("1TB", 10**12),
    ],
)
def test_units(text: str, size: int) -> None:
    assert _bytes(text) == size


def test_a_budget_too_small_says_what_is_enough(trio: tuple[Path, ...]) -> None:
    model = load_rast(*trio, kv_cache_tokens=64)
    with pytest.raises(MemoryError, match="for 128 tokens") as caught:
        model.generate(np.arange(90), max_new_tokens=10)
    assert "room for 64" in str(caught.value)
    load_rast(*trio, kv_cache_tokens=128).generate(np.arange(90), max_new_tokens=10)


# ---- generate_iter ---------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = dict(max_new_tokens=20, do_sample=True)


@pytest.fixture(scope="module")
def model(trio: tuple[Path, ...]) -> rast.RastForCausalLM:
    """Room for eight blocks: sequences wait and give way."""
    return load_rast(*trio, kv_cache_tokens=256, max_batch_size=6)


@pytest.fixture(scope="module")
def roomy(trio: tuple[Path, ...]) -> rast.RastForCausalLM:
    return load_rast(*trio)


def assert_idle(model: rast.RastForCausalLM) -> None:
    info = model.cache_info()
    assert info["n_free"] == info["n_blocks"]
    assert not model._engine.busy


def test_the_same_as_generate(model: rast.RastForCausalLM, roomy: rast.RastForCausalLM) -> None:
    """Each request with options of its own, from a generator, in a cache that is too small for all."""
    cases: list[dict[str, Any]] = [
        dict(seed=1),
        dict(seed=2, temperature=0.5, num_return_sequences=3),
        dict(do_sample=False, max_new_tokens=100, seed=0),
        dict(seed=3, transfer_strength=0.0, max_new_tokens=90),
        dict(seed=4, transfer_strength=0.5, eos_token_id=list(range(0, 300, 9))),
        dict(seed=5, top_k=0, repetition_penalty=1.3, max_new_tokens=60, num_return_sequences=2),
        dict(seed=6, transfer_start=4, min_new_tokens=3),
        dict(seed=7, max_new_tokens=1),
    ]
    prompts = random_prompts(24, 311, seed=2, low=1, high=90)
    wanted = [cases[i % len(cases)] for i in range(len(prompts))]
    got: dict[tuple[int, int], rast.Sample] = {}
    source = (rast.Request(ids, tag=i, options=o) for i, (ids, o) in enumerate(zip(prompts, wanted, strict=True)))
    for sample in model.generate_iter(source, return_dict_in_generate=True, output_logits=True, **OPTIONS):
        assert sample.error is None and (sample.tag, sample.index) not in got
        got[sample.tag, sample.index] = sample
    for i, (ids, options) in enumerate(zip(prompts, wanted, strict=True)):
        out = roomy.generate(ids, return_dict_in_generate=True, output_logits=True, **OPTIONS | options)
        for j, new in enumerate(out.new_tokens()):
            sample = got.pop((i, j))
            n = len(new)
            np.testing.assert_array_equal(sample.new_tokens, new)
            assert (sample.finish_reason, sample.seed) == (out.finish_reason[j], out.seed)
            for name in ("logprob", "base_logprob", "base_token", "transfer_kl"):
                np.testing.assert_array_equal(getattr(sample, name), getattr(out, name)[j, :n])
            np.testing.assert_array_equal(sample.logits, np.stack([step[j] for step in out.logits[:n]]))
            assert sample.scores is None
    assert not got
    assert model.cache_info()["preempted"] > 0
    assert_idle(model)


def test_equal_requests_differ(roomy: rast.RastForCausalLM) -> None:
    prompt = np.arange(5)
    (again, *_) = want = roomy.generate([prompt] * 3, seed=4, **OPTIONS)[:, 5:]
    got = {s.tag: s for s in roomy.generate_iter([dict(input_ids=prompt, tag=i) for i in range(3)], seed=4, **OPTIONS)}
    np.testing.assert_array_equal([got[i].new_tokens for i in range(3)], want)
    (third,) = roomy.generate_iter([rast.Request(prompt, copy=2)], seed=4, **OPTIONS)
    np.testing.assert_array_equal(third.new_tokens, want[2])
    free = list(roomy.generate_iter([rast.Request(prompt)] * 2, **OPTIONS))
    assert free[0].seed != free[1].seed and free[0].new_tokens.tolist() != free[1].new_tokens.tolist()
    (same,) = roomy.generate_iter([rast.Request(prompt, options=dict(seed=free[0].seed))], **OPTIONS)
    np.testing.assert_array_equal(same.new_tokens, free[0].new_tokens)
    (plain,) = roomy.generate_iter([dict(input_ids=prompt, seed=4)], **OPTIONS)
    np.testing.assert_array_equal(plain.new_tokens, again)
    assert plain.tag is None and plain.logprob is None


def test_the_source_is_asked_when_there_is_place(model: rast.RastForCausalLM) -> None:
    asked = 0

    def source() -> Iterator[rast.Request]:
        nonlocal asked
        while True:  # endless
            asked += 1
            yield rast.Request(np.arange(3), options=dict(num_return_sequences=2, max_new_tokens=2 + asked % 7))

    samples = model.generate_iter(source(), do_sample=True)
    for n in range(1, 60):
        next(samples)
        assert asked <= (n + 1) // 2 + 3  # six at once, two a request
    samples.close()
    with pytest.raises(StopIteration):
        next(samples)
    assert_idle(model)


def test_a_bad_request_fails_alone(model: rast.RastForCausalLM) -> None:
    bad: list[Any] = [
        dict(input_ids=[1, 2], tag=0, temperature=-1.0),
        dict(input_ids=[1, 2], tag=1, no_such_option=3),
        dict(input_ids=[], tag=2),
        dict(input_ids=[10**6], tag=3),
        dict(input_ids=np.arange(200), tag=4, max_new_tokens=100),  # more than the cache holds
        dict(input_ids=np.arange(200), tag=5, max_new_tokens=10_000),  # more than the context
        dict(input_ids=[[1, 2], [3, 4]], tag=6),
        dict(tag=7),
        "text",
        rast.Request("text", tag=9),
        rast.Request([1], tag=10, options=5),  # type: ignore[arg-type]
        rast.Request([1], tag=11, copy=-1),
    ]
    good = [dict(input_ids=[1, 2, 3], tag=f"good {i}", seed=i) for i in range(len(bad))]
    mixed = [request for pair in zip(good, bad, strict=True) for request in pair]
    samples = list(model.generate_iter(mixed, **OPTIONS))
    failed = [s for s in samples if s.error is not None]
    assert [s.tag for s in failed] == [0, 1, 2, 3, 4, 5, 6, 7, None, 9, 10, 11]
    assert all(s.finish_reason == "error" and not len(s.new_tokens) for s in failed)
    kinds = [type(s.error) for s in failed]
    values = [ValueError, TypeError, ValueError, ValueError, MemoryError, ValueError, ValueError]
    assert kinds == [*values, TypeError, TypeError, TypeError, TypeError, ValueError]
    for sample in samples:
        if sample.error is None:
            i = int(sample.tag.split()[1])
            np.testing.assert_array_equal(sample.new_tokens, model.generate([1, 2, 3], seed=i, **OPTIONS)[0, 3:])
    assert len(samples) == 2 * len(bad)
    assert_idle(model)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(temperature=-1.0, do_sample=True), ValueError, "temperature"),
        (dict(no_such_option=3), TypeError, "no_such_option"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens"),
        (dict(max_new_tokens=2**70), ValueError, "max_new_tokens` must be at most 2147483647"),
        (dict(transfer_strength=[1, 2, 3]), ValueError, "transfer_strength"),
        (dict(transfer_strength="x"), TypeError, "transfer_strength"),
        (dict(eos_token_id=10**6), ValueError, "eos_token_id"),
        (dict(stop_strings="x"), ValueError, "tokenizer"),
        (dict(generation_config=5), TypeError, "generation_config"),
        (dict(generation_config={"top_p": 7.0, "do_sample": True}), ValueError, "top_p"),
        (dict(seed=-1), ValueError, "seed"),
    ],
)
def test_bad_options_of_all_requests(model: rast.RastForCausalLM, options: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        model.generate_iter([dict(input_ids=[1])], **options)


def test_options_of_the_call_that_fit_with_those_of_requests(model: rast.RastForCausalLM) -> None:
    samples = list(model.generate_iter([dict(input_ids=[1], do_sample=True)], num_return_sequences=3, max_new_tokens=2))
    assert [s.error for s in samples] == [None] * 3


def test_numpy_numbers(model: rast.RastForCausalLM) -> None:
    want = model.generate([1, 2], max_new_tokens=5, do_sample=True, seed=3, num_return_sequences=3, top_k=7)
    options: Any = dict(max_new_tokens=np.int16(5), do_sample=np.bool_(True), seed=np.uint64(3), top_k=np.int8(7))
    got = model.generate(np.array([1, 2], np.uint8), num_return_sequences=np.int64(3), **options)
    np.testing.assert_array_equal(got, want)
    requests = [rast.Request([1, 2], tag=i, copy=np.uint32(i)) for i in range(3)]  # type: ignore[arg-type]
    for sample in model.generate_iter(requests, **options):
        np.testing.assert_array_equal(sample.new_tokens, want[sample.tag, 2:])
    logits = model.forward([1, 2, 3], logits_to_keep=np.int64(2))  # type: ignore[call-overload]
    np.testing.assert_array_equal(logits, model.forward([1, 2, 3])[:, 1:])


@pytest.mark.parametrize("source", [5, "x", np.array([[1, 2]]), rast.Request([1]), dict(input_ids=[1])])
def test_what_is_no_source(model: rast.RastForCausalLM, source: Any) -> None:
    with pytest.raises(TypeError, match="requests"):
        model.generate_iter(source)


def test_cancel(model: rast.RastForCausalLM) -> None:
    requests = [rast.Request([1, 2], tag="long", options=dict(max_new_tokens=200)), rast.Request([3], tag="short")]
    samples = model.generate_iter(requests, do_sample=True, num_return_sequences=2, max_new_tokens=3)
    assert [next(samples).tag for _ in range(2)] == ["short"] * 2
    samples.cancel("no such request")
    samples.cancel("long")
    rest = list(samples)
    assert [(s.tag, s.finish_reason) for s in rest] == [("long", "cancelled")] * 2
    assert 0 < len(rest[0].new_tokens) < 200
    assert_idle(model)

    samples = model.generate_iter([rast.Request([i], tag=i, options=dict(max_new_tokens=1 + i)) for i in range(2)])
    assert next(samples).tag == 0
    model.generate([5], max_new_tokens=9)  # takes the other one along, to its end
    samples.cancel(1)
    assert [s.finish_reason for s in samples] == ["length"]


def test_an_exception_of_the_source(model: rast.RastForCausalLM) -> None:
    """It fails when asked for the eighth request. What has ended by then comes out before the exception."""

    def source() -> Iterator[rast.Request]:
        for i in range(7):
            yield rast.Request([1 + i], tag=i, options=dict(max_new_tokens=2 if i < 6 else 200))
        raise LookupError("no more")

    samples = model.generate_iter(source(), do_sample=True, seed=1)
    seen: list[int] = []

    def read() -> None:
        for sample in samples:
            np.testing.assert_array_equal(
                sample.new_tokens, model.generate([1 + sample.tag], max_new_tokens=2, do_sample=True, seed=1)[0, 1:]
            )
            seen.append(sample.tag)

    with pytest.raises(LookupError, match="no more"):
        read()
    assert sorted(seen) == list(range(6))
    assert list(samples) == []
    assert_idle(model)


def test_an_exception_of_the_source_while_another_thread_runs(model: rast.RastForCausalLM) -> None:
    """What ended in the other thread's steps is delivered all the same."""
    other = threading.Thread(target=lambda: model.generate([3, 1, 4], max_new_tokens=40, eos_token_id=None))

    def source() -> Iterator[Any]:
        for i in range(3):
            yield {"input_ids": [1 + i, 2], "tag": i}
        other.start()
        time.sleep(0.05)
        raise RuntimeError("no more")

    samples = []
    iterator = model.generate_iter(source(), max_new_tokens=1, eos_token_id=None)
    with pytest.raises(RuntimeError, match="no more"):
        samples.extend(iter(lambda: next(iterator), None))
    other.join()
    info = model.cache_info()
    assert info["n_free"] == info["n_blocks"]
    assert sorted(sample.tag for sample in samples) == [0, 1, 2]
    assert all(sample.finish_reason == "length" for sample in samples)


def test_a_slow_source_holds_up_nobody(model: rast.RastForCausalLM) -> None:
    taken = 0

    def source() -> Iterator[Any]:
        nonlocal taken
        for i in range(8):
            time.sleep(0.06)
            taken += 1
            yield {"input_ids": [1 + i, 2], "tag": i}

    iterator = model.generate_iter(source(), max_new_tokens=1)
    next(iterator)
    assert taken < 8
    assert len(list(iterator)) == 7


def test_a_source_that_blocks_holds_up_nobody(model: rast.RastForCausalLM) -> None:
    """It waits for samples of the requests that it gave."""
    seen: Queue[int] = Queue()

    def source() -> Iterator[Any]:
        for i in range(4):
            yield {"input_ids": [1 + i, 2], "tag": i}
            assert seen.get(timeout=30) == i

    for sample in model.generate_iter(source(), max_new_tokens=3):
        seen.put(sample.tag)
    assert seen.empty()
    assert_idle(model)


def n_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("leave", ["close", "drop", "interrupt"])
def test_leaving_a_source_that_blocks(model: rast.RastForCausalLM, leave: str) -> None:
    """The source's thread ends when the source lets it, and closes the source."""
    n_before = n_threads()
    go_on, closed = threading.Event(), threading.Event()

    def source() -> Iterator[Any]:
        try:
            yield {"input_ids": [1], "max_new_tokens": 1}
            yield {"input_ids": [2], "max_new_tokens": 200}
            go_on.wait()
            yield {"input_ids": [3]}
        finally:
            closed.set()

    samples = model.generate_iter(source(), eos_token_id=None)
    next(samples)
    if leave == "close":
        samples.close()
    elif leave == "drop":
        del samples
    else:
        with alarm(0.3), pytest.raises(KeyboardInterrupt):
            list(samples)
    assert_idle(model)
    go_on.set()
    assert closed.wait(10)
    while n_threads() > n_before:
        time.sleep(0.01)


def test_a_source_is_closed_with_its_iterator(model: rast.RastForCausalLM) -> None:
    closed = False

    def source() -> Iterator[Any]:
        nonlocal closed
        try:
            while True:
                yield {"input_ids": [1], "max_new_tokens": 1}
        finally:
            closed = True

    with model.generate_iter(source()) as samples:
        next(samples)
    assert closed


def test_a_source_is_read_by_one_thread(model: rast.RastForCausalLM) -> None:
    threads = set()
    number: ContextVar[int] = ContextVar("number", default=0)
    number.set(7)

    def source() -> Iterator[Any]:
        for i in range(20):
            threads.add(threading.get_ident())
            assert number.get() == 7
            time.sleep(0.005 * (i % 3))
            yield {"input_ids": [1 + i], "max_new_tokens": 1 + i}

    assert all(sample.error is None for sample in model.generate_iter(source()))
    assert len(threads) == 1

    n_before = n_threads()
    samples = model.generate_iter([{"input_ids": [1], "max_new_tokens": 1}] * 3)
    next(samples)
    assert n_threads() == n_before  # a list needs none


def test_an_endless_bad_source(model: rast.RastForCausalLM) -> None:
    iterator = model.generate_iter(itertools.repeat({"input_ids": []}))
    assert all(next(iterator).error is not None for _ in range(300))
    iterator.close()


def test_an_error_that_is_kept_keeps_nothing_running(model: rast.RastForCausalLM) -> None:
    iterator = model.generate_iter([{"input_ids": []}, {"input_ids": [1, 2, 3]}], max_new_tokens=40, eos_token_id=None)
    gc.disable()
    try:
        sample = next(iterator)
        assert sample.error is not None
        del iterator
        model.generate([9], max_new_tokens=1)
        info = model.cache_info()
        assert info["n_free"] == info["n_blocks"]
    finally:
        gc.enable()


def test_tags_that_are_arrays(model: rast.RastForCausalLM) -> None:
    tags: list[Any] = [np.arange(2), "b", np.array([]), None, (1, "x")]
    requests = [{"input_ids": [1 + i, 2], "tag": tag} for i, tag in enumerate(tags)]
    requests.append({"input_ids": [9], "tag": "first", "max_new_tokens": 2})
    iterator = model.generate_iter(requests, max_new_tokens=30, eos_token_id=None)
    assert next(iterator).tag == "first"
    for tag in (np.arange(3), "zzz", np.array(["b"]), np.arange(2)):
        iterator.cancel(tag)
    finish = {str(sample.tag): sample.finish_reason for sample in iterator}
    assert finish == {"[0 1]": "cancelled", "b": "length", "[]": "length", "None": "length", "(1, 'x')": "length"}


def test_leaving_gives_everything_back(model: rast.RastForCausalLM) -> None:
    endless = dict(max_new_tokens=240)

    def requests() -> list[rast.Request]:
        return [rast.Request([i], tag=i, options=endless if i else dict(max_new_tokens=1)) for i in range(9)]

    for sample in model.generate_iter(requests()):
        assert sample.tag == 0
        break
    assert not model._engine.busy  # type: ignore[union-attr] # the iterator is gone
    assert_idle(model)
    with model.generate_iter(requests()) as samples:
        next(samples)
    assert_idle(model)
    samples.close()


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def iter_until_interrupt() -> Iterator[rast.Request]:
    yield rast.Request([1], options=dict(max_new_tokens=2000))
    yield rast.Request([])
    raise KeyboardInterrupt


def test_interrupt(trio: tuple[Path, ...]) -> None:
    model = load_rast(*trio)
    want = model.generate([7], seed=0, **OPTIONS)
    requests = [rast.Request([i], tag=i, options=dict(max_new_tokens=2000 if i else 1)) for i in range(8)]
    samples = model.generate_iter(requests)
    assert next(samples).tag == 0
    with alarm(0.2), pytest.raises(KeyboardInterrupt):
        next(samples)
    assert_idle(model)
    assert list(samples) == []
    # what ended before the interrupt is kept
    samples = model.generate_iter(iter_until_interrupt())
    with pytest.raises(KeyboardInterrupt):
        next(samples)
    assert_idle(model)
    assert [s.error is not None for s in samples] == [True]
    np.testing.assert_array_equal(model.generate([7], seed=0, **OPTIONS), want)


INTERRUPTS = """
import random, signal, sys, threading, time
import numpy as np, rast

model = rast.load_demo(num_threads=1)
prompt, call, seconds, rng = np.arange(3, 23), sys.argv[1], float(sys.argv[2]), random.Random(0)

def requests():
    for i in range(300):
        yield {"input_ids": prompt, "tag": i}

def work():
    if call == "list":
        yield from model.generate_iter(list(requests()), max_new_tokens=1)
    elif call == "generator":
        yield from model.generate_iter(requests(), max_new_tokens=1)
    for _ in range(300):
        if call == "stream":
            yield from model.stream(prompt, max_new_tokens=2)
        if call == "generate":
            yield model.generate(prompt, max_new_tokens=1)

for _ in work():
    break
signal.signal(signal.SIGALRM, signal.default_int_handler)  # a clock of our own presses Ctrl-C
n = n_leaks = n_other = 0
end = time.monotonic() + seconds
while time.monotonic() < end:
    try:
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 5e-3))
        for _ in work():
            pass
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        n += 1
    except Exception as error:
        print(repr(error))
        n_other += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    info = model.cache_info()
    n_leaks += info["n_free"] != info["n_blocks"]
thread = threading.Thread(target=lambda: print("works", model.generate(prompt, max_new_tokens=2).shape), daemon=True)
thread.start()
thread.join(10)
print(n, n_leaks, n_other, flush=True)
"""


@pytest.mark.parametrize("call", ["list", "generator", "stream", "generate"])
def test_interrupts_at_any_moment(call: str) -> None:
    """The model is never left in use, no block stays taken, and nothing but KeyboardInterrupt comes out."""
    arguments = [sys.executable, "-c", INTERRUPTS, call, "30" if FULL else "1.5"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *before, works, last = done.stdout.splitlines()
    assert not before and works == "works (1, 22)", done.stdout
    n, n_leaks, n_other = map(int, last.split())
    assert n > 100 and n_leaks == 0 and n_other == 0
    assert done.stderr == ""


def test_two_threads(model: rast.RastForCausalLM, roomy: rast.RastForCausalLM) -> None:
    prompts = random_prompts(12, 311, seed=5, low=1, high=60)
    want = [roomy.generate(p, seed=i, **OPTIONS)[0, len(p) :] for i, p in enumerate(prompts)]
    wrong: list[Any] = []

    def iterate(order: list[int]) -> None:
        requests = [rast.Request(prompts[i], tag=i, options=dict(seed=i)) for i in order]
        got = {s.tag: s.new_tokens for s in model.generate_iter(requests, **OPTIONS)}
        wrong.extend(i for i in order if not np.array_equal(got.get(i), want[i]))

    def generate() -> None:
        for i, prompt in enumerate(prompts):
            if not np.array_equal(model.generate(prompt, seed=i, **OPTIONS)[0, len(prompt) :], want[i]):
                wrong.append(("generate", i))

    def stream() -> None:
        for i in (2, 5):
            got = np.concatenate(list(model.stream(prompts[i], seed=i, **OPTIONS)))
            if not np.array_equal(got, want[i]):
                wrong.append(("stream", i))

    work = [lambda: iterate(list(range(12))), lambda: iterate(list(range(11, -1, -1))), generate, stream]
    threads = [threading.Thread(target=call) for call in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert_idle(model)


def test_reading_from_inside(model: rast.RastForCausalLM) -> None:
    """A source may use the model, but not the iterator that asks it; a streamer must not use the model."""

    def source() -> Iterator[rast.Request]:
        yield rast.Request(model.generate([1, 2], max_new_tokens=4)[0], tag="from generate")
        with pytest.raises(RuntimeError, match="being read"):
            samples.__next__()
        yield rast.Request([1], tag="second")

    samples = model.generate_iter(source(), max_new_tokens=4)
    assert {s.tag for s in samples} == {"from generate", "second"}

    inner = model.generate_iter([rast.Request([1])])

    class Streamer:
        def put(self, value: Any) -> None:
            if value.ndim == 1:
                next(inner)

        def end(self) -> None: ...

    with pytest.raises(RuntimeError, match="in use"):
        model.generate([1, 2], max_new_tokens=4, streamer=Streamer())
    assert_idle(model)


def test_soak(zoo: ModelZoo) -> None:
    """Random lengths and options; every block comes back, and one in fifty is checked against its solo run."""
    trio = zoo.trio("qwen2", max_position_embeddings=2048)
    model, alone = load_rast(*trio, kv_cache_tokens=640), load_rast(*trio)
    n = 20_000 if FULL else 500
    rng = np.random.default_rng(3)
    header = rng.integers(0, 311, 70)
    checked: dict[int, dict[str, Any]] = {}

    def source() -> Iterator[dict[str, Any]]:
        for i in range(n):
            own = rng.integers(0, 311, 1 + int(rng.geometric(0.05)))
            options = dict(
                input_ids=np.concatenate([header[: rng.choice([0, 10, 64, 70])], own]),
                max_new_tokens=int(rng.choice([1, 5, 20, 40, 250], p=[0.1, 0.3, 0.3, 0.27, 0.03])),
                seed=i,
                temperature=float(rng.choice([0.5, 1.0, 2.0])),
                top_k=int(rng.choice([0, 5])),
                transfer_strength=float(rng.choice([0.0, 1.0])),
                num_return_sequences=int(rng.choice([1, 1, 3])),
            )
            if i % 50 == 7:
                checked[i] = options
            yield {**options, "tag": i}

    count = 0
    for sample in model.generate_iter(source(), do_sample=True):
        assert sample.error is None
        count += 1
        if sample.tag in checked and sample.index == 0:
            options = checked.pop(sample.tag)
            want = alone.generate(do_sample=True, **options)[0, len(options["input_ids"]) :]
            np.testing.assert_array_equal(sample.new_tokens, want[: len(sample.new_tokens)])
    assert count > n and not checked
    assert model.cache_info()["preempted"] > 0
    assert_idle(model)


def test_streams_share_the_cache(roomy: rast.RastForCausalLM) -> None:
    (prompt,) = random_prompts(1, 311, seed=9, low=100, high=100)
    new = np.concatenate(list(roomy.stream(prompt, seed=1, **OPTIONS)))
    before = roomy.cache_info()
    again = roomy.stream(np.concatenate([prompt, new, prompt[:3]]), seed=2, **OPTIONS)
    next(again)
    assert roomy.cache_info()["reused"] - before["reused"] == 96
    again.close()  # type: ignore[attr-defined]
    assert_idle(roomy)
