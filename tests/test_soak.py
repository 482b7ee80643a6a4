"""Many requests of random length and options through generate_iter, with room for few of them at once: memory stays
flat, every block comes back, and a sequence is what it is alone. RAST_TEST_FULL=1: 20,000 requests."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from oracle import FULL, N_TEXT_TOKENS, ModelZoo, load_rast

import rast

N_REQUESTS = 20_000 if FULL else 300
CHECKED = 0.02  # share of requests that are run again, alone
# Bytes. 20,000 requests would leave more than 4 MiB if only their prompts stayed behind; few ones still warm up.
MOST_GROWTH = (4 if FULL else 16) << 20


def memory() -> int:
    """Bytes of memory that are this process's own."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def random_request(index: int) -> rast.Request:
    """Request `index`, the same whenever it is asked for."""
    rng = np.random.default_rng(index)
    header = np.random.default_rng(rng.integers(3)).integers(0, N_TEXT_TOKENS, 300)
    header = header[: rng.choice([0, 20, 32, 90, 128, 300])]
    own = rng.integers(0, N_TEXT_TOKENS, rng.integers(0 if len(header) else 1, 60))
    ids = np.concatenate([header, own])
    options: dict[str, Any] = {
        "max_new_tokens": int(rng.choice([1, 3, 10, 20, 80])),
        "do_sample": bool(rng.integers(4)),
        "temperature": float(rng.choice([0.5, 1.0, 2.0])),
        "top_k": int(rng.choice([0, 0, 5])),
        "top_p": float(rng.choice([1.0, 1.0, 0.9])),
        "repetition_penalty": float(rng.choice([1.0, 1.0, 1.2])),
        "transfer_strength": float(rng.choice([0.0, 0.5, 1.0, 1.0])),
        "transfer_start": int(rng.choice([0, 0, 4])),
        "num_return_sequences": 1 if rng.integers(8) else 3,
        "seed": int(rng.integers(100)),
    }
    if rng.integers(6) == 0:
        options["stop_strings"] = ["e", "th"]
    if rng.integers(3) == 0:
        options["eos_token_id"] = rng.integers(0, N_TEXT_TOKENS, 9).tolist()
    if not options["do_sample"]:
        options = {name: options[name] for name in options if name not in ("temperature", "top_k", "top_p")}
        options["num_return_sequences"] = 1
    return rast.Request(ids, tag=index, options=options)


def test_many_requests(zoo: ModelZoo) -> None:
    vocab = N_TEXT_TOKENS + 2
    base = zoo.folder("qwen2", seed=3, vocab_size=vocab, tokenizer="<s>,</s>")
    pair = [
        zoo.folder("qwen2-tied", seed=seed, vocab_size=vocab, tokenizer="<s>,</s>", num_hidden_layers=2)
        for seed in (1, 2)
    ]
    model = load_rast(base, *pair, kv_cache_tokens=32 * 24, max_batch_size=16, num_threads=2)
    solo = load_rast(base, *pair, kv_cache_tokens=32 * 24, num_threads=1)
    checked = np.random.default_rng(0).random(N_REQUESTS) < CHECKED
    levels: list[int] = []  # memory in use, ten times
    outstanding: dict[int, int] = {}

    def requests() -> Iterator[rast.Request]:
        for index in range(N_REQUESTS):
            request = random_request(index)
            outstanding[index] = (request.options or {})["num_return_sequences"]
            yield request

    expected: dict[int, Any] = {}
    n_samples = 0
    for n_samples, sample in enumerate(model.generate_iter(requests()), 1):
        index = int(sample.tag)
        assert sample.error is None, (index, sample.error)
        outstanding[index] -= 1
        if not outstanding[index]:
            del outstanding[index]
        if checked[index]:
            if index not in expected:
                request = random_request(index)
                expected[index] = solo.generate(
                    request.input_ids, return_dict_in_generate=True, **(request.options or {})
                ).new_tokens()
            np.testing.assert_array_equal(sample.new_tokens, expected[index][sample.index], err_msg=str(index))
        if n_samples % (N_REQUESTS // 10) == 0:
            levels.append(memory())
    assert not outstanding
    assert n_samples > N_REQUESTS
    assert len(expected) == np.count_nonzero(checked) > 0
    info = model.cache_info()
    assert info["n_free"] == info["n_blocks"] == 24
    assert info["preempted"] > 0 and info["reused"] > 0 and info["evicted"] > 0
    assert levels[-1] - levels[len(levels) // 4] < MOST_GROWTH, levels
