"""Every architecture, weight dtype and instruction set computes what transformers computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import (
    ARCHITECTURES,
    FULL,
    ModelZoo,
    assert_greedy,
    assert_logits_close,
    details,
    edit_json,
    hf_logits,
    kl_divergence,
    load_hf,
    load_rast,
    make_config,
    make_model,
    random_prompts,
)

LENGTHS = (1, 2, 31, 33, 70)  # around the KV block of 32, beyond every sliding window


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_prefill_logits(zoo: ModelZoo, arch: str, isa: str) -> None:
    folder = zoo.folder(arch)
    hf, model = load_hf(folder), load_rast(folder)
    for length in LENGTHS:
        (ids,) = random_prompts(1, hf.config.vocab_size, seed=length, low=length, high=length)
        got = model.forward(ids)
        assert got.dtype == np.float32
        assert_logits_close(got, hf_logits(hf, ids)[None], context=f"{arch}, {isa}, {length} tokens")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_stepwise_logits(zoo: ModelZoo, arch: str, isa: str) -> None:
    folder = zoo.folder(arch, seed=1)
    hf, model = load_hf(folder), load_rast(folder)
    prompts = np.stack(random_prompts(3, hf.config.vocab_size, seed=5, low=21, high=21))
    out = details(model, prompts, max_new_tokens=24, do_sample=True, seed=3)
    assert len(out.logits) == 24
    want = hf_logits(hf, out.sequences[:, :-1])[:, 20:]
    assert_logits_close(np.stack(out.logits, axis=1), want, context=f"{arch}, {isa}")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_64_steps_20_prompts(zoo: ModelZoo, arch: str) -> None:
    folder = zoo.folder(arch, seed=2)
    hf, model = load_hf(folder), load_rast(folder)
    prompts = random_prompts(20, hf.config.vocab_size, seed=7)
    out = model.generate(prompts, max_new_tokens=64, do_sample=False, pad_token_id=0)
    width = max(map(len, prompts))
    assert out.shape == (20, width + 64)
    for prompt, row in zip(prompts, out, strict=True):
        row = row[width - len(prompt) :]
        np.testing.assert_array_equal(row[: len(prompt)], prompt)
        assert_greedy(lambda ids: hf_logits(hf, ids), row, len(prompt))


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2-window", "qwen3"])
def test_long_prompt(zoo: ModelZoo, arch: str) -> None:
    """Longer than what one step of the engine takes."""
    folder = zoo.folder(arch, max_position_embeddings=2048)
    hf, model = load_hf(folder), load_rast(folder)
    (ids,) = random_prompts(1, hf.config.vocab_size, low=1100, high=1100)
    assert_logits_close(model.forward(ids), hf_logits(hf, ids)[None], context=arch)
    out = details(model, ids, max_new_tokens=4)
    assert_greedy(lambda ids: hf_logits(hf, ids), out.sequences[0], 1100)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
@pytest.mark.parametrize("arch", list(ARCHITECTURES) if FULL else ["qwen2-tied", "llama-bias", "qwen3", "mistral"])
def test_16_bit_weights_in_float32(zoo: ModelZoo, arch: str, stored: str, isa: str) -> None:
    """16-bit weights multiplied as they are, nothing else rounded: HuggingFace with the upcast weights."""
    folder = zoo.folder(arch, dtype=stored)
    hf, model = load_hf(folder), load_rast(folder)
    (ids,) = random_prompts(1, hf.config.vocab_size, seed=2, low=45, high=45)
    assert_logits_close(model.forward(ids), hf_logits(hf, ids)[None], context=f"{arch}, {stored}, {isa}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("arch", list(ARCHITECTURES) if FULL else ["qwen2", "llama", "qwen3", "mistral"])
def test_16_bit_computation_no_worse_than_huggingface(zoo: ModelZoo, arch: str, dtype: str, isa: str) -> None:
    """Mean KL to float32 on the same stored weights, prefill and one token at a time."""
    folder = zoo.folder(arch, dtype=dtype)
    exact, rounded = load_hf(folder), load_hf(folder, dtype)
    model = load_rast(folder, dtype=dtype)
    prompts = np.stack(random_prompts(4, exact.config.vocab_size, seed=9, low=60, high=60))
    want = hf_logits(exact, prompts)
    theirs = kl_divergence(want, hf_logits(rounded, prompts)).mean()
    ours = kl_divergence(want, model.forward(prompts)).mean()
    assert 0 < ours <= theirs, (ours, theirs)
    out = details(model, prompts[:, :8], max_new_tokens=50, do_sample=True, seed=1)
    steps = kl_divergence(hf_logits(exact, out.sequences[:, :-1])[:, 7:], np.stack(out.logits, axis=1)).mean()
    reference = kl_divergence(
        hf_logits(exact, out.sequences[:, :-1])[:, 7:], hf_logits(rounded, out.sequences[:, :-1])[:, 7:]
    ).mean()
    assert steps <= reference, (steps, reference)


def test_dtype_auto_is_as_stored(zoo: ModelZoo) -> None:
    for stored in ("float32", "bfloat16", "float16"):
        folder = zoo.folder("qwen2", dtype=stored)
        (ids,) = random_prompts(1, 311, low=20, high=20)
        np.testing.assert_array_equal(
            load_rast(folder, dtype="auto").forward(ids), load_rast(folder, dtype=stored).forward(ids)
        )


@pytest.mark.parametrize("arch", ["llama-linear", "llama-llama3", "llama", "qwen3"])
def test_rope_fields_of_transformers_4(zoo: ModelZoo, arch: str, tmp_path: Path) -> None:
    """Older files say rope_theta and rope_scaling where newer ones say rope_parameters."""
    folder = tmp_path / "model"
    shutil.copytree(zoo.folder(arch), folder)
    rope = dict(json.loads((folder / "config.json").read_text())["rope_parameters"])
    theta = rope.pop("rope_theta")
    scaling = None if rope["rope_type"] == "default" else rope
    edit_json(
        folder / "config.json", rope_parameters=..., rope_theta=theta, rope_scaling=scaling, torch_dtype="float32"
    )
    hf = load_hf(zoo.folder(arch))
    (ids,) = random_prompts(1, hf.config.vocab_size, low=70, high=70)
    assert_logits_close(load_rast(folder).forward(ids), hf_logits(hf, ids)[None], context=arch)


def test_sharded_weights(tmp_path: Path) -> None:
    hf = make_model(make_config("qwen2"), seed=4)
    hf.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    (ids,) = random_prompts(1, 311, low=20, high=20)
    assert_logits_close(load_rast(tmp_path).forward(ids), hf_logits(hf, ids)[None])


def test_logits_beyond_exponential_range(zoo: ModelZoo) -> None:
    """Logits of several hundreds: softmax and log-probabilities stay finite and right."""
    folder = zoo.folder("qwen2", seed=6, logit_std=200.0)
    hf, model = load_hf(folder), load_rast(folder)
    (ids,) = random_prompts(1, 311, low=20, high=20)
    out = details(model, ids, max_new_tokens=8, do_sample=True, seed=0)
    want = torch.log_softmax(torch.from_numpy(hf_logits(hf, out.sequences[0, :-1])[19:]).double(), -1).numpy()
    picked = np.take_along_axis(want, out.sequences[0, 20:, None], axis=1)[:, 0]
    np.testing.assert_allclose(out.logprob[0], picked, atol=0.2)
