"""rast._core on its own: conversions, results, errors, signals, threads and memory. Needs NumPy and pytest only."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import tracemalloc
import weakref
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from rast import _core

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INNER = 61, 32, 2, 4, 2, 8, 48
EVERYTHING = (
    _core.WANT_LOGPROBS
    | _core.WANT_STATS
    | _core.WANT_LOGITS
    | _core.WANT_SCORES
    | _core.WANT_COMPONENTS
    | _core.WANT_PROMPT
)
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")

Tensors = dict[str, tuple[np.ndarray, str]]


def make_config(**changes: Any) -> dict[str, Any]:
    return {
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "n_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "vocab_size": VOCAB,
        "max_context": 1 << 17,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "qkv_bias": True,
        "tie_word_embeddings": True,
    } | changes


def make_tensors(seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {at + f"{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[at + f"self_attn.{name}_proj.weight"] = (heads * HEAD_DIM, HIDDEN)
            shapes[at + f"self_attn.{name}_proj.bias"] = (heads * HEAD_DIM,)
        shapes[at + "self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes |= {at + f"mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[at + "mlp.down_proj.weight"] = (HIDDEN, INNER)
    return {name: (rng.normal(0, 0.4, shape).astype(np.float32), "F32") for name, shape in shapes.items()}


def make_net(seed: int = 0, **changes: Any) -> Any:
    return {
        "name": f"net {seed}",
        "config": make_config(),
        "tensors": make_tensors(seed),
        "dtype": "float32",
        "uncommon": None,
    } | changes


def make_request(**changes: Any) -> Any:
    return {
        "ids": np.array([3, 1, 4, 1, 5], np.int32),
        "coef": np.array([1, 1, -1], np.float32),
        "max_new": 8,
    } | changes


@pytest.fixture(scope="module")
def model() -> _core.Model:
    return _core.Model([make_net(seed) for seed in range(3)], num_threads=2)


@pytest.fixture
def engine(model: _core.Model) -> _core.Engine:
    return _core.Engine(model, kv_bytes=1 << 27)


def tokens(engine: _core.Engine, **changes: Any) -> list[int]:
    (result,) = engine.run([make_request(**changes)])
    return result["tokens"].tolist()


# ---- what comes back -------------------------------------------------------------------------------------------------


def test_model_describes_itself(model: _core.Model) -> None:
    assert (model.n_nets, model.n_vocab, model.num_threads) == (3, VOCAB, 2)
    assert model.isa in _core.cpu_isas()
    info = model.net_info()
    assert [net["name"] for net in info] == ["net 0", "net 1", "net 2"]
    n = sum(array.size for array, _ in make_tensors(0).values())
    assert info[0] == {
        "name": "net 0",
        "weight_bytes": 4 * n,
        "n_parameters": n,
        "device_bytes": 0,
        "kv_bytes_per_token": 2 * 4 * LAYERS * KV_HEADS * HEAD_DIM,
        "dtype": "float32",
        "vocab_size": VOCAB,
        "max_context": 1 << 17,
    }


def test_results_hold_what_is_wanted(engine: _core.Engine) -> None:
    (result,) = engine.run([make_request(want=EVERYTHING, tag=2**63, prompt_from=2, n_samples=1)])
    shapes = {"tokens": (8,), "logprob": (8,), "base_token": (8,), "base_logprob": (8,), "kl": (8,)}
    shapes |= {"logits": (8, VOCAB), "scores": (8, VOCAB), "parts": (8, 3, VOCAB)}
    for name, shape in shapes.items():
        array: np.ndarray = result[name]
        assert array.shape == shape, name
        assert array.dtype == (np.int32 if "token" in name else np.float32), name
        assert array.flags.writeable and array.flags.c_contiguous
    assert (result["tag"], result["sample"], result["finish"], result["error"]) == (2**63, 0, "length", None)
    prompt = result["prompt"]
    assert prompt is not None and set(prompt) == {"logprob", "base_token", "base_logprob", "kl", "logits", "parts"}
    assert prompt["logits"] is not None and prompt["logits"].shape == (3, VOCAB)
    assert prompt["parts"] is not None and prompt["parts"].shape == (3, 3, VOCAB)
    assert prompt["logprob"] is not None and np.isnan(prompt["logprob"]).tolist() == [False, False, True]

    logits, parts = result["logits"], result["parts"]
    assert logits is not None and parts is not None and result["logprob"] is not None
    np.testing.assert_allclose(logits, parts[:, 0] + parts[:, 1] - parts[:, 2], atol=1e-4)
    np.testing.assert_array_equal(logits.argmax(1), result["tokens"])
    log_softmax = logits.max(1) - np.log(np.exp(logits).sum(1))
    np.testing.assert_allclose(result["logprob"], log_softmax, atol=1e-5)


def test_results_hold_nothing_else(engine: _core.Engine) -> None:
    (result,) = engine.run([make_request()])
    assert result["tokens"].shape == (8,)
    absent = {"logprob", "base_token", "base_logprob", "kl", "logits", "scores", "parts", "prompt", "error"}
    assert all(result[name] is None for name in absent)


def test_prompt_alone(engine: _core.Engine) -> None:
    want = _core.WANT_PROMPT | _core.WANT_LOGITS
    (result,) = engine.run([make_request(max_new=0, want=want)])
    assert result["tokens"].shape == (0,)
    assert result["logits"] is not None and result["logits"].shape == (0, VOCAB)
    assert result["prompt"] is not None and result["prompt"]["logits"] is not None
    assert result["prompt"]["logits"].shape == (5, VOCAB)


def test_results_come_in_order(engine: _core.Engine) -> None:
    requests = [make_request(tag=10 * i, n_samples=i, max_new=9 - 2 * i, do_sample=True, seed=i) for i in (1, 2, 3)]
    results = engine.run(requests)
    assert [(r["tag"], r["sample"]) for r in results] == [(10, 0), (20, 0), (20, 1), (30, 0), (30, 1), (30, 2)]
    assert [len(r["tokens"]) for r in results] == [7, 5, 5, 3, 3, 3]
    assert engine.run([]) == []
    alone = engine.run(requests[2:])
    assert [r["tokens"].tolist() for r in alone] == [r["tokens"].tolist() for r in results[3:]]


def test_steps_give_what_run_gives(engine: _core.Engine) -> None:
    want = EVERYTHING & ~_core.WANT_PROMPT
    (whole,) = engine.run([make_request(want=want)])
    session = _core.Session(engine)
    session.submit(make_request(want=want, tag=7))
    parts = []
    while engine.busy:
        parts += session.step()
    assert session.step() == []
    assert {part["tag"] for part in parts} == {7}
    assert [part["finish"] for part in parts if part["finish"]] == ["length"]
    for name in ("tokens", "logprob", "kl", "logits", "scores", "parts"):
        pieces = [part[name] for part in parts if len(part["tokens"])]
        np.testing.assert_array_equal(np.concatenate(pieces), whole[name])


def test_cancel(engine: _core.Engine) -> None:
    session = _core.Session(engine)
    id = session.submit(make_request(max_new=1000))
    session.step()
    with pytest.raises(ValueError, match="id"):
        _core.Session(engine).cancel(id)  # another's
    session.cancel(id)
    finishes = []
    while engine.busy:
        finishes += [part["finish"] for part in session.step()]
    assert finishes[-1] == "cancelled"
    with pytest.raises(ValueError, match="id"):
        session.cancel(id + 1000)


def test_on_tokens_sees_every_token(engine: _core.Engine) -> None:
    seen: dict[tuple[int, int], list[int]] = {}
    finishes: dict[tuple[int, int], str | None] = {}

    def on_tokens(tag: int, sample: int, ids: np.ndarray, finish: str | None) -> None:
        assert ids.dtype == np.int32
        assert finishes.get((tag, sample)) is None
        seen.setdefault((tag, sample), []).extend(ids.tolist())
        finishes[tag, sample] = finish

    requests = [make_request(tag=i, n_samples=2, do_sample=True, seed=i) for i in range(3)]
    results = engine.run(requests, on_tokens)
    assert seen == {(r["tag"], r["sample"]): r["tokens"].tolist() for r in results}
    assert set(finishes.values()) == {"length"}


def test_stops(engine: _core.Engine, model: _core.Model) -> None:
    plain = tokens(engine)
    (result,) = engine.run([make_request(eos=np.array([plain[3]], np.int32))])
    assert result["finish"] == "eos"
    assert result["tokens"].tolist() == plain[: plain.index(plain[3]) + 1]
    pieces = b"".join(b"<%02d>" % i for i in range(VOCAB)), np.arange(0, 4 * VOCAB + 1, 4, dtype=np.uint32)
    spelling = _core.Engine(_core.Model([make_net(seed) for seed in range(3)], pieces=pieces), kv_bytes=1 << 24)
    (result,) = spelling.run([make_request(stop_strings=[b"never", b"%02d><%02d" % tuple(plain[2:4])])])
    assert result["finish"] == "stop"
    assert result["tokens"].tolist() == plain[:4]


def test_info_counts(engine: _core.Engine) -> None:
    engine.run([make_request()])
    info = engine.info()
    assert 0 < info["kv_bytes"] <= 1 << 27
    assert info["n_blocks"] >= info["n_free"] > 0
    assert info["steps"] > 0 and info["rows"] >= 12
    assert (info["drafted"], info["accepted"]) == (0, 0)


def test_drafts_change_nothing(engine: _core.Engine) -> None:
    plain = tokens(engine, max_new=40, do_sample=True, seed=5)
    rng = np.random.default_rng(0)
    calls = []

    def drafter(tag: int, sample: int, ids: np.ndarray, k: int) -> list[int]:
        calls.append(ids.copy())
        truth = plain[len(ids) - 5 :][:k]
        return [int(rng.integers(VOCAB)) if rng.random() < 0.3 else token for token in truth]

    engine._set_drafter(drafter)
    assert tokens(engine, max_new=40, do_sample=True, seed=5, n_draft=4) == plain
    info = engine.info()
    assert 0 < info["accepted"] < info["drafted"]
    assert all(call[5:].tolist() == plain[: len(call) - 5] for call in calls)

    def failing(*_: Any) -> list[int]:
        raise LookupError("no guess")

    engine._set_drafter(failing)
    with pytest.raises(LookupError, match="no guess"):
        tokens(engine, n_draft=2)
    engine._set_drafter(lambda *_: ["a"])
    with pytest.raises(TypeError, match="guess"):
        tokens(engine, n_draft=2)
    engine._set_drafter(None)
    assert tokens(engine, max_new=40, do_sample=True, seed=5, n_draft=2) == plain


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"top_pp": 1.0}, TypeError, "unknown key 'top_pp'"),
        ({7: 1.0}, TypeError, "unknown key 7"),
        ({"ids": np.array([], np.int32)}, ValueError, "the prompt is empty"),
        ({"ids": np.array([1, VOCAB], np.int32)}, ValueError, "id 61 at position 1"),
        ({"ids": np.array([-1], np.int32)}, ValueError, "id -1 at position 0"),
        ({"ids": np.array([1, 2])}, TypeError, "ids must have dtype int32, not int64"),
        ({"ids": np.array([1, 2], ">i4")}, TypeError, "ids must have dtype int32"),
        ({"ids": np.array([[1, 2]], np.int32)}, ValueError, "ids must have 1 dimension, not 2"),
        ({"ids": [1, 2]}, TypeError, "ids must be a 1-D int32 array, not list"),
        ({"coef": np.ones(3)}, TypeError, "coef must have dtype float32"),
        ({"coef": np.ones(2, np.float32)}, ValueError, "2 coefficients for 3 nets"),
        ({"max_new": -1}, ValueError, "max_new = -1"),
        ({"max_new": 2**31}, ValueError, "max_new = 2147483648 is out of range"),
        ({"max_new": 1.0}, TypeError, "max_new must be an integer, not float"),
        ({"max_new": "1"}, TypeError, "max_new must be an integer, not str"),
        ({"seed": -1}, ValueError, "seed = -1 is out of range"),
        ({"seed": 2**64}, ValueError, "seed = 18446744073709551616 is out of range"),
        ({"n_samples": 2**32}, ValueError, "n_samples"),
        ({"n_samples": 0}, ValueError, "n_samples = 0"),
        ({"do_sample": 1}, TypeError, "do_sample must be a bool, not int"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, not str"),
        ({"temperature": 1e300}, ValueError, "temperature = 1e.300 is out of range"),
        ({"temperature": 0.0, "do_sample": True}, ValueError, "temperature"),
        ({"temperature": float("nan"), "do_sample": True}, ValueError, "temperature"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"min_p": -0.1}, ValueError, "min_p"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty"),
        ({"max_time": None}, TypeError, "max_time must be a number, not NoneType"),
        ({"max_time": -1.0}, ValueError, "max_time"),
        ({"bad_words": 3}, TypeError, "bad_words must be a sequence, not int"),
        ({"bad_words": [[1]]}, TypeError, "bad_words must be a 1-D int32 array, not list"),
        ({"bad_words": [np.array([], np.int32)]}, ValueError, "bad word 0 is empty"),
        ({"bad_words": [np.array([VOCAB], np.int32)]}, ValueError, "bad_words: token id 61"),
        ({"suppress": np.array([VOCAB], np.int32)}, ValueError, "suppress: token id 61"),
        ({"eos": np.array([-5], np.int32)}, ValueError, "eos: token id -5"),
        ({"stop_strings": ["text"]}, TypeError, "stop_strings must hold bytes, not str"),
        ({"stop_strings": [b"text"]}, ValueError, "stop strings need"),  # the model has no pieces
        ({"want": _core.WANT_PROMPT, "prompt_from": 5}, ValueError, "prompt_from"),
    ],
)
def test_bad_request(engine: _core.Engine, changes: Any, error: type[Exception], message: str) -> None:
    good = tokens(engine)
    with pytest.raises(error, match=message):
        engine.run([make_request(), make_request() | changes])
    assert not engine.busy
    assert tokens(engine) == good


def test_incomplete_request(engine: _core.Engine) -> None:
    for key in ("ids", "coef", "max_new"):
        request = make_request()
        del request[key]
        with pytest.raises(TypeError, match=f"request: key '{key}' is missing"):
            engine.run([request])
    with pytest.raises(TypeError, match="request must be a dict, not list"):
        engine.run([[]])
    with pytest.raises(TypeError):
        engine.run(3)
    with pytest.raises(TypeError, match="on_tokens must be callable"):
        engine.run([], 3)


def test_request_of_numpy_scalars_and_strided_arrays(engine: _core.Engine) -> None:
    plain = tokens(engine, top_k=7, temperature=0.5, do_sample=True)
    ids = np.array([3, 0, 1, 0, 4, 0, 1, 0, 5], np.int32)[::2]
    given = tokens(
        engine, ids=ids, top_k=np.int64(7), temperature=np.float64(0.5), do_sample=np.bool_(True), max_new=np.uint8(8)
    )
    assert given == plain
    assert tokens(engine, bad_words=[], stop_strings=(), eos=np.zeros(0, np.int32)) == tokens(engine)


def test_dict_that_changes_while_it_is_read(engine: _core.Engine) -> None:
    request = make_request()

    class Index:
        def __index__(self) -> int:
            request.clear()
            return 8

    request["max_new"] = Index()
    assert len(engine.run([request])[0]["tokens"]) == 8


BAD_NETS: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda net: net | {"nam": "x"}, TypeError, r"nets\[1\]: unknown key 'nam'"),
    (lambda net: net | {"name": 3}, TypeError, "name must be a str, not int"),
    (lambda net: net | {"name": "a\0b"}, ValueError, "NUL"),
    (lambda net: net | {"dtype": "int8"}, ValueError, "'int8' is not one of float32, bfloat16, float16"),
    (lambda net: net | {"uncommon": np.zeros(2, np.int64)}, TypeError, "uncommon must have dtype int32"),
    (lambda net: net | {"uncommon": np.array([VOCAB], np.int32)}, ValueError, "uncommon id 61"),
    (lambda net: net | {"tensors": 3}, TypeError, "tensors must be a mapping"),
    (lambda net: net | {"config": make_config(n_layer=1)}, TypeError, r"nets\[1\] config: unknown key 'n_layer'"),
    (lambda net: net | {"config": {"n_layers": 1}}, TypeError, "config: key 'n_heads' is missing"),
    (lambda net: net | {"config": make_config(n_layers=2**40)}, ValueError, "n_layers"),
    (lambda net: net | {"config": make_config(n_layers=3)}, ValueError, "model.layers.2"),
    (lambda net: net | {"config": make_config(n_heads=0)}, ValueError, "n_heads = 0"),
    (lambda net: net | {"config": make_config(n_kv_heads=3)}, ValueError, "n_kv_heads = 3"),
    (lambda net: net | {"config": make_config(head_dim=-8)}, ValueError, "head_dim = -8"),
    (lambda net: net | {"config": make_config(rms_norm_eps=-1.0)}, ValueError, "rms_norm_eps"),
    (lambda net: net | {"config": make_config(vocab_size=VOCAB + 1)}, ValueError, "embed_tokens"),
    (lambda net: net | {"config": make_config(qkv_bias=1)}, TypeError, "qkv_bias must be a bool"),
    (lambda net: net | {"config": make_config(tie_word_embeddings=False)}, ValueError, "lm_head"),
    (
        lambda net: net | {"config": make_config(window=np.zeros(5, np.int32))},
        ValueError,
        "window must have 2 elements, not 5",
    ),
    (
        lambda net: net | {"config": make_config(rope_freq=np.ones(8, np.float32))},
        ValueError,
        "rope_freq must have 4 elements, not 8",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_NETS)
def test_bad_net(change: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _core.Model([make_net(0), change(make_net(1))])


def unaligned(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)


BAD_TENSORS: list[tuple[Callable[[np.ndarray], Any], type[Exception], str]] = [
    (lambda a: a, TypeError, "must be a pair"),
    (lambda a: (a.tolist(), "F32"), TypeError, "must be a pair"),
    (lambda a: (a, 32), TypeError, "must be a str"),
    (lambda a: (a, "F64"), ValueError, "'F64' is not one of F32, BF16, F16"),
    (lambda a: (a.astype(np.float64), "F32"), TypeError, "dtype float64 cannot hold F32"),
    (lambda a: (a, "BF16"), TypeError, "dtype float32 cannot hold BF16"),
    (lambda a: (a.astype(np.float16), "BF16"), TypeError, "dtype float16 cannot hold BF16"),
    (lambda a: (a.astype(">f4"), "F32"), ValueError, "native byte order"),
    (lambda a: (np.asfortranarray(a), "F32"), ValueError, "C-contiguous"),
    (lambda a: (unaligned(a), "F32"), ValueError, "aligned"),
    (lambda a: (a[None], "F32"), ValueError, "must have 1 or 2 dimensions, not 3"),
    (lambda a: (a[:-1], "F32"), ValueError, "q_proj"),
    (lambda a: (a.reshape(-1), "F32"), ValueError, "q_proj"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_TENSORS)
def test_bad_tensor(change: Callable[[np.ndarray], Any], error: type[Exception], message: str) -> None:
    net = make_net(0)
    name = "model.layers.1.self_attn.q_proj.weight"
    net["tensors"][name] = change(net["tensors"][name][0])
    with pytest.raises(error, match=message) as caught:
        _core.Model([net])
    assert "q_proj" in str(caught.value)


@pytest.mark.parametrize("name", list(make_tensors(0)))
def test_missing_tensor(name: str) -> None:
    net = make_net(0)
    del net["tensors"][name]
    with pytest.raises(ValueError, match=name):
        _core.Model([net])


def test_bad_model_arguments() -> None:
    net = make_net(0)
    with pytest.raises(ValueError, match=r".+"):
        _core.Model([])
    with pytest.raises(NotImplementedError, match="sse9"):
        _core.Model([net], isa="sse9")
    with pytest.raises(TypeError, match="num_threads must be an integer"):
        _core.Model([net], num_threads=1.5)
    with pytest.raises(ValueError, match="n_threads = -1"):
        _core.Model([net], num_threads=-1)
    with pytest.raises(ValueError, match="n_valid"):
        _core.Model([net], n_valid=-1)
    with pytest.raises(TypeError, match="pieces"):
        _core.Model([net], pieces=b"abc")
    for offsets in ([], [0, 2, 1], [0, 4]):
        with pytest.raises(ValueError, match="offsets"):
            _core.Model([net], pieces=(b"abc", np.array(offsets, np.uint32)))
    with pytest.raises(TypeError, match="Model"):
        _core.Engine(net)
    model = _core.Model([net])
    with pytest.raises(ValueError, match="kv_bytes = -1 is out of range"):
        _core.Engine(model, kv_bytes=-1)
    with pytest.raises(MemoryError, match=r".+"):
        _core.Engine(model, kv_bytes=1)


def test_tensors_of_other_kinds(engine: _core.Engine) -> None:
    """Any mapping, arrays that cannot be written, float16 as numbers or as bits."""
    net = make_net(0, dtype="float16")
    halves = {name: (array.astype(np.float16), "F16") for name, (array, _) in net["tensors"].items()}
    bits = {name: (array.view(np.uint16), "F16") for name, (array, _) in halves.items()}
    for array, _ in halves.values():
        array.flags.writeable = False
    outputs = []
    for tensors in (UserDict(halves), bits):
        own = _core.Engine(_core.Model([net | {"tensors": tensors}]), kv_bytes=1 << 24)
        outputs.append(tokens(own, coef=np.ones(1, np.float32)))
    assert outputs[0] == outputs[1]


def test_error_of_one_request_is_its_own() -> None:
    nets = [make_net(seed) for seed in range(3)]
    nets[2]["tensors"]["model.norm.weight"][0][:] = np.nan
    engine = _core.Engine(_core.Model(nets), kv_bytes=1 << 24)
    alone = np.array([1, 0, 0], np.float32)
    bad, good = engine.run([make_request(), make_request(coef=alone)])
    assert bad["finish"] == "error"
    assert isinstance(bad["error"], _core.NumericError) and "net 2" in str(bad["error"])
    assert good["finish"] == "length" and good["error"] is None and len(good["tokens"]) == 8


# ---- interruptions and threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 5])
def test_exception_in_on_tokens(engine: _core.Engine, at: int) -> None:
    good = tokens(engine)
    calls = 0

    def on_tokens(*_: Any) -> None:
        nonlocal calls
        if calls == at:
            raise ArithmeticError("enough")
        calls += 1

    with pytest.raises(ArithmeticError, match="enough"):
        engine.run([make_request(n_samples=2), make_request(max_new=2)], on_tokens)
    assert not engine.busy
    assert tokens(engine) == good


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


@pytest.mark.parametrize("on_tokens", [None, lambda *_: None])
def test_interrupt_leaves_the_engine_usable(engine: _core.Engine, on_tokens: Any) -> None:
    good = tokens(engine)
    begin = time.monotonic()
    with alarm(0.2), pytest.raises(KeyboardInterrupt):
        engine.run([make_request(max_new=100_000)], on_tokens)
    assert time.monotonic() - begin < 5
    assert not engine.busy
    assert tokens(engine) == good


def test_no_call_inside_another(engine: _core.Engine, model: _core.Model) -> None:
    other = _core.Engine(model, kv_bytes=1 << 22)
    session = _core.Session(engine)
    calls = (lambda: engine.run([]), session.step, lambda: session.submit(make_request()), lambda: other.run([]))
    n_refused = 0

    def on_tokens(*_: Any) -> None:
        nonlocal n_refused
        for call in calls:
            with pytest.raises(RuntimeError, match="in use"):
                call()
            n_refused += 1
        info = engine.info()  # this is allowed
        assert engine.busy == (n_refused == len(calls)) == (info["n_free"] < info["n_blocks"])

    engine.run([make_request(max_new=2)], on_tokens)
    assert n_refused == 2 * len(calls)
    assert not engine.busy


class Hold:
    """Runs a request in a thread until told to stop: the model is in use meanwhile."""

    def __init__(self, engine: _core.Engine) -> None:
        started, self.stop = threading.Event(), threading.Event()

        def on_tokens(*_: Any) -> None:
            started.set()
            if self.stop.is_set():
                raise StopIteration

        def work() -> None:
            with pytest.raises(StopIteration):
                engine.run([make_request(max_new=100_000)], on_tokens)

        self.thread = threading.Thread(target=work)
        self.thread.start()
        started.wait()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def test_calls_come_in_order_of_arrival(engine: _core.Engine, model: _core.Model) -> None:
    others = [_core.Engine(model, kv_bytes=1 << 22)]
    order: list[int] = []

    def work(i: int) -> None:
        assert len(tokens(engine)) == 8
        order.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    with Hold(engine):
        for thread in threads:
            thread.start()
            time.sleep(0.03)
        others.clear()  # an engine may die while its model is busy
        gc.collect()
        assert order == []
    for thread in threads:
        thread.join(20)
    assert order == list(range(5))


def test_waiting_can_be_interrupted(engine: _core.Engine) -> None:
    with Hold(engine):
        for call in (lambda: engine.run([]), engine.info, _core.Session(engine).step):
            with alarm(0.05), pytest.raises(KeyboardInterrupt):
                call()
    assert len(tokens(engine)) == 8


def test_a_session_ends_with_its_object(engine: _core.Engine) -> None:
    """Between two steps, without a step of its own, whoever is using the model."""

    def n_held() -> int:
        info = engine.info()
        return info["n_blocks"] - info["n_free"]

    session = _core.Session(engine)
    for _ in range(3):
        session.submit(make_request(max_new=1000, n_samples=3))
    session.step()
    steps = engine.info()["steps"]
    assert n_held() > 0
    del session
    assert n_held() == 0 and not engine.busy and engine.info()["steps"] == steps

    session = _core.Session(engine)
    session.submit(make_request(max_new=1))
    session.submit(make_request(max_new=1000, tag=1))
    engine.run([make_request()])  # takes them along
    session.stop()
    results: list[Any] = []
    assert session.collect(1.0, results.append) == 0  # what had ended is kept
    assert n_held() == 0 and [r["finish"] for r in results] == ["length"]

    session.submit(make_request(max_new=1000))
    session.step()
    stopped = False

    def on_tokens(*_: Any) -> None:
        nonlocal session, stopped
        if not stopped:
            stopped = True
            before = n_held()
            session.stop()
            del session  # while it waits to be stopped
            assert n_held() == before
            session = _core.Session(engine)

    engine.run([make_request(max_new=2)], on_tokens)
    assert stopped and n_held() == 0 and not engine.busy


def test_a_session_is_for_one_block_at_a_time(engine: _core.Engine) -> None:
    session = _core.Session(engine)
    with session:
        with pytest.raises(RuntimeError, match="being read"), session:
            pass
        with pytest.raises(RuntimeError, match="being read"), session:
            pass
    with session:
        session.step()


def test_gil_is_free_while_it_runs(engine: _core.Engine) -> None:
    ticks = 0
    done = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    begin = time.monotonic()
    with alarm(0.3), pytest.raises(KeyboardInterrupt):
        engine.run([make_request(max_new=100_000)])
    before, elapsed = ticks, time.monotonic() - begin
    done.set()
    thread.join()
    assert before > 20 * elapsed


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_model_keeps_its_arrays_and_lets_them_go() -> None:
    net = make_net(0)
    array = weakref.ref(net["tensors"]["model.norm.weight"][0])
    refcount = sys.getrefcount(array())
    model = _core.Model([net])
    engine = _core.Engine(model, kv_bytes=1 << 22)
    with_model = sys.getrefcount(array())  # outside of assert, which keeps a reference of its own
    assert with_model == refcount + 1
    del net, model
    gc.collect()
    assert array() is not None  # by the engine
    assert len(tokens(engine, coef=np.ones(1, np.float32))) == 8
    del engine
    gc.collect()
    assert array() is None


def test_cycle_through_the_drafter_is_collected(model: _core.Model) -> None:
    engine = _core.Engine(model, kv_bytes=1 << 22)

    class Drafter:
        def __init__(self, engine: _core.Engine) -> None:
            self.engine = engine

        def __call__(self, *_: Any) -> list[int]:
            return []

    drafter = Drafter(engine)
    engine._set_drafter(drafter)
    dead = weakref.ref(drafter)
    del engine, drafter
    gc.collect()
    assert dead() is None


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_stays_flat(engine: _core.Engine) -> None:
    def once() -> None:
        engine.run([make_request(want=EVERYTHING, n_samples=2, bad_words=[np.array([1, 2], np.int32)])])
        with pytest.raises(ValueError, match=r".+"):
            engine.run([make_request(), make_request(top_k=-1)])
        with pytest.raises(TypeError):
            _core.Model([make_net(0), make_net(1, name=3)])
        own = _core.Engine(_core.Model([make_net(0)], num_threads=1), kv_bytes=1 << 20)
        session = _core.Session(own)
        session.submit(make_request(coef=np.ones(1, np.float32)))
        session.step()
        with pytest.raises(ValueError, match=r".+"):
            session.submit(make_request(coef=np.ones(1, np.float32), top_k=-1))

    for _ in range(20):
        once()
    gc.collect()
    tracemalloc.start()
    once()
    gc.collect()
    traced, real = tracemalloc.get_traced_memory()[0], resident()
    for _ in range(200):
        once()
    gc.collect()
    growth = tracemalloc.get_traced_memory()[0] - traced
    tracemalloc.stop()
    assert growth < 32 << 10
    assert SANITIZED or resident() - real < 8 << 20  # AddressSanitizer keeps freed memory for a while
