"""stream() and streamers: the same tokens as generate, as they come; stopping early; Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import ModelZoo, load_rast, random_prompts

OPTIONS: dict[str, Any] = dict(max_new_tokens=20, do_sample=True, seed=2)


@pytest.fixture(scope="module")
def model(zoo: ModelZoo) -> Any:
    return load_rast(*zoo.trio())


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.puts: list[np.ndarray] = []
        self.ended = 0

    def put(self, value: Any) -> None:
        assert not self.ended
        self.puts.append(np.array(value))

    def end(self) -> None:
        self.ended += 1


def test_stream_is_generate(model: Any) -> None:
    (prompt,) = random_prompts(1, 311, low=9, high=9)
    pieces = list(model.stream(prompt, **OPTIONS))
    assert all(piece.ndim == 1 and len(piece) >= 1 for piece in pieces)
    np.testing.assert_array_equal(np.concatenate(pieces), model.generate(prompt, **OPTIONS)[0, 9:])


def test_stream_of_a_batch(model: Any) -> None:
    prompts = np.stack(random_prompts(3, 311, low=9, high=9))
    want = model.generate(prompts, num_return_sequences=2, **OPTIONS)[:, 9:]
    rows: list[list[int]] = [[] for _ in range(6)]
    order = []
    for row, ids in model.stream(prompts, num_return_sequences=2, **OPTIONS):
        rows[row].extend(ids)
        order.append(row)
    np.testing.assert_array_equal(rows, want)
    assert set(order[:12]) == set(range(6))  # all move on together


def test_stream_comes_while_it_is_computed(model: Any) -> None:
    start = time.perf_counter()
    stream = model.stream(np.arange(5), max_new_tokens=400)
    next(stream)
    first = time.perf_counter() - start
    for _ in stream:
        pass
    assert first < 0.3 * (time.perf_counter() - start)


def test_stream_left_early(model: Any) -> None:
    want = model.generate(np.arange(5), **OPTIONS)
    stream = model.stream(np.arange(5), max_new_tokens=400)
    next(stream)
    np.testing.assert_array_equal(model.generate(np.arange(5), **OPTIONS), want)  # another call in between
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    for _ in model.stream(np.arange(5), max_new_tokens=400):
        break
    np.testing.assert_array_equal(model.generate(np.arange(5), **OPTIONS), want)


def test_two_streams_side_by_side(model: Any) -> None:
    a, b = np.arange(5), np.arange(7)
    mixed = list(zip(model.stream(a, **OPTIONS), model.stream(b, **OPTIONS), strict=True))
    np.testing.assert_array_equal(np.concatenate([x for x, _ in mixed]), model.generate(a, **OPTIONS)[0, 5:])
    np.testing.assert_array_equal(np.concatenate([y for _, y in mixed]), model.generate(b, **OPTIONS)[0, 7:])


def test_stream_checks_arguments_at_once(model: Any) -> None:
    with pytest.raises(ValueError, match="temperature"):
        model.stream(np.arange(5), do_sample=True, temperature=0.0)
    with pytest.raises(TypeError, match="num_beams"):
        model.stream(np.arange(5), num_beams=2)


def test_stream_that_does_not_fit_fails_at_the_call(zoo: ModelZoo) -> None:
    model = load_rast(*zoo.trio(), kv_cache_tokens=64)
    with pytest.raises(MemoryError, match="for 128 tokens"):
        model.stream(np.arange(60), max_new_tokens=40)
    with pytest.raises(MemoryError, match="for 128 tokens"):
        model.stream([np.arange(5), np.arange(60)], max_new_tokens=40)
    assert not model._engine.busy  # type: ignore[union-attr]
    model.stream(np.arange(20), max_new_tokens=40)  # nobody reads it
    assert not model._engine.busy  # type: ignore[union-attr]
    assert sum(map(len, model.stream(np.arange(20), max_new_tokens=40))) == 40


def test_a_stream_that_is_dropped_ends_at_once(model: Any) -> None:
    stream = model.stream(np.arange(5), max_new_tokens=400)
    next(stream)
    assert model._engine.busy
    del stream
    assert not model._engine.busy


def test_stream_ends_at_eos(model: Any) -> None:
    free = model.generate(np.arange(5), **OPTIONS)[0, 5:]
    pieces = np.concatenate(list(model.stream(np.arange(5), eos_token_id=int(free[6]), **OPTIONS)))
    np.testing.assert_array_equal(pieces, free[: list(free).index(free[6]) + 1])


def test_streamer_protocol(model: Any) -> None:
    """As transformers: the prompt first, then new ids, then end."""
    recorder = Recorder()
    out = model.generate(np.arange(5), streamer=recorder, **OPTIONS)
    np.testing.assert_array_equal(recorder.puts[0], np.arange(5)[None])
    np.testing.assert_array_equal(np.concatenate(recorder.puts[1:]), out[0, 5:])
    assert len(recorder.puts) <= 21 and recorder.ended == 1  # a step may give several
    with pytest.raises(ValueError, match="streamer"):
        model.generate(np.zeros((2, 3), dtype=int), streamer=Recorder(), **OPTIONS)


def test_text_streamer_of_transformers_takes_what_put_gives(zoo: ModelZoo, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from oracle import N_TEXT_TOKENS, make_tokenizer
    from transformers import PreTrainedTokenizerFast, TextStreamer

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(("<s>", "</s>")))
    model = load_rast(zoo.folder("llama", seed=8, vocab_size=N_TEXT_TOKENS + 2, tokenizer="<s>,</s>"))

    class AsTensor(TextStreamer):
        def put(self, value: Any) -> None:
            super().put(torch.from_numpy(value))

    prompt = np.array(tokenizer("the quick").input_ids)
    out = model.generate(prompt, streamer=AsTensor(tokenizer), max_new_tokens=20)
    assert capsys.readouterr().out.strip() == tokenizer.decode(out[0]).strip()


def test_own_text_streamer(zoo: ModelZoo) -> None:
    import io

    from oracle import N_TEXT_TOKENS, make_tokenizer

    from rast.streaming import TextStreamer

    tokenizer = make_tokenizer(("<s>", "</s>"))
    model = load_rast(zoo.folder("llama", seed=8, vocab_size=N_TEXT_TOKENS + 2, tokenizer="<s>,</s>"))
    prompt = np.array(tokenizer.encode("the quick").ids)
    for seed in range(3):
        file = io.StringIO()
        out = model.generate(
            prompt,
            streamer=TextStreamer(model.tokenizer, skip_prompt=True, file=file),
            max_new_tokens=40,
            do_sample=True,
            seed=seed,
        )
        assert file.getvalue() == tokenizer.decode(out[0, len(prompt) :].tolist()) + "\n"


@pytest.mark.parametrize("at", [1, 2, 7])
def test_exception_in_a_streamer(model: Any, at: int) -> None:
    class Broken(Recorder):
        def put(self, value: Any) -> None:
            super().put(value)
            if len(self.puts) > at:
                raise KeyError("broken streamer")

    want = model.generate(np.arange(5), **OPTIONS)
    with pytest.raises(KeyError, match="broken streamer"):
        model.generate(np.arange(5), streamer=Broken(), **OPTIONS)
    np.testing.assert_array_equal(model.generate(np.arange(5), **OPTIONS), want)


def test_generate_inside_a_streamer(model: Any) -> None:
    """A second use of the engine while it runs is an error, or works; never a deadlock or a crash."""
    want = model.generate(np.arange(5), **OPTIONS)

    class Nested(Recorder):
        def put(self, value: Any) -> None:
            super().put(value)
            if len(self.puts) == 3:
                model.generate(np.arange(4), max_new_tokens=2)

    with contextlib.suppress(RuntimeError):
        np.testing.assert_array_equal(model.generate(np.arange(5), streamer=Nested(), **OPTIONS), want)
    np.testing.assert_array_equal(model.generate(np.arange(5), **OPTIONS), want)


def test_calls_from_several_threads(model: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    prompts = random_prompts(8, 311, seed=5)
    want = [model.generate(prompt, **OPTIONS) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(lambda p: model.generate(p, **OPTIONS), prompts), want, strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("call", ["generate", "forward", "stream"])
def test_ctrl_c(zoo: ModelZoo, call: str) -> None:
    """SIGINT in the middle of long work: KeyboardInterrupt within about a second, and the model works on."""
    folder: Path = zoo.folder(
        "qwen2", max_position_embeddings=100000, hidden_size=288, intermediate_size=2000, num_hidden_layers=12
    )
    code = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
    import numpy as np, rast
    model = rast.RastForCausalLM.from_pretrained(sys.argv[1], device="cpu", dtype="float32")
    want = model.generate(np.arange(5), max_new_tokens=5)
    print("ready", flush=True)
    try:
        if sys.argv[2] == "generate":
            model.generate(np.arange(5), max_new_tokens=99000)
        elif sys.argv[2] == "forward":
            model.forward(np.arange(99000) % 311, logits_to_keep=1)
        else:
            for _ in model.stream(np.arange(5), max_new_tokens=99000):
                pass
    except KeyboardInterrupt:
        print("interrupted", time.time(), flush=True)
        assert (model.generate(np.arange(5), max_new_tokens=5) == want).all()
        print("works on", flush=True)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(folder), call],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.7)
            sent = time.time()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert "works on" in out, err
    assert float(out.split()[1]) - sent < 1.5
