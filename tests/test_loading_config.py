"""config.json -> NetConfig: the same as transformers makes of it, and bad fields refused with a clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from loading_files import ARCHITECTURES, SIZES, make_model

from rast.loading.config import parse_config
from rast.loading.files import read_json
from rast.loading.rope import inverse_frequencies
from rast.loading.weights import expected_shapes

FILE = Path("folder/config.json")
BASIC: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}


def named(architecture: str) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": architecture.removesuffix("ForCausalLM").lower()}


def saved(model: Any) -> dict[str, Any]:
    return json.loads(model.config.to_json_string())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("architecture", "options"),
    [(name, {}) for name in ARCHITECTURES]
    + [(name, {"tie_word_embeddings": True}) for name in ARCHITECTURES]
    + [
        ("LlamaForCausalLM", {"attention_bias": True}),
        ("LlamaForCausalLM", {"mlp_bias": True}),
        ("LlamaForCausalLM", {"head_dim": 12}),
        ("Qwen3ForCausalLM", {"attention_bias": True}),
        ("MistralForCausalLM", {"head_dim": None}),
        ("Qwen2ForCausalLM", {"num_key_value_heads": 4}),
    ],
)
def test_tensors_and_frequencies_are_those_of_transformers(architecture: str, options: dict[str, Any]) -> None:
    model = make_model(architecture, **options)
    name, config = parse_config({**saved(model), "architectures": [architecture]}, FILE)
    assert name == architecture
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    assert expected_shapes(config) == shapes
    assert config["rope_freq"] is not None
    np.testing.assert_allclose(config["rope_freq"], model.model.rotary_emb.inv_freq.numpy(), rtol=2e-7)
    assert config["rms_norm_eps"] == model.config.rms_norm_eps
    assert config["max_context"] == model.config.max_position_embeddings


WINDOWS = [
    {"use_sliding_window": use, "sliding_window": size, "max_window_layers": first}
    for use in (False, True)
    for size in (None, 16)
    for first in (0, 1, 28)
] + [
    {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention", "full_attention"]},
    {"use_sliding_window": True},
    {},
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("options", WINDOWS)
def test_windows_are_those_of_transformers(architecture: str, options: dict[str, Any]) -> None:
    theirs = getattr(transformers, architecture).config_class(**SIZES, **options)
    match architecture:
        case "LlamaForCausalLM":
            expected = [0, 0]
        case "MistralForCausalLM":
            expected = [theirs.sliding_window or 0] * 2
        case _:
            expected = [theirs.sliding_window if kind == "sliding_attention" else 0 for kind in theirs.layer_types]
    window = parse_config({**named(architecture), **SIZES, **options}, FILE)[1]["window"]
    assert (window.tolist() if window is not None else [0, 0]) == expected
    saved_config = {**theirs.to_dict(), "architectures": [architecture]}
    window = parse_config(saved_config, FILE)[1]["window"]
    assert (window.tolist() if window is not None else [0, 0]) == expected


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "old",
    [
        {},
        {"rope_theta": 500000.0},
        {"rope_scaling": None, "rope_theta": 1e6},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 3}, "rope_theta": 50000},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 500000.0},
    ],
)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_frequencies_in_both_styles(old: dict[str, Any], head_dim: int) -> None:
    sizes = {**SIZES, "head_dim": head_dim, "max_position_embeddings": 512}
    theirs = transformers.LlamaConfig(**sizes, **json.loads(json.dumps(old)))
    expected = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs).inv_freq.numpy()
    new = {"rope_parameters": theirs.to_dict()["rope_parameters"]}
    for style in (old, new):
        config = parse_config({**BASIC, **sizes, **style}, FILE)[1]
        assert config["rope_freq"] is not None
        assert config["rope_freq"].dtype == np.float32
        np.testing.assert_allclose(config["rope_freq"], expected, rtol=3e-7)
        assert config["rope_theta"] == theirs.rope_parameters["rope_theta"]


def test_defaults_of_absent_fields() -> None:
    small = {key: value for key, value in BASIC.items() if key not in ("head_dim", "num_key_value_heads")}
    config = parse_config(small, FILE)[1]
    assert (config["head_dim"], config["n_kv_heads"], config["rms_norm_eps"]) == (8, 4, 1e-6)
    assert parse_config({**small, **named("Qwen3ForCausalLM")}, FILE)[1]["head_dim"] == 128
    mistral = {**small, **named("MistralForCausalLM"), "num_attention_heads": 16}
    assert parse_config(mistral, FILE)[1]["n_kv_heads"] == 8
    no_name = {**{key: value for key, value in BASIC.items() if key != "architectures"}, "model_type": "qwen2"}
    assert parse_config(no_name, FILE)[0] == "Qwen2ForCausalLM"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size must be an integer from 1"),
        ({"hidden_size": 2**40}, "hidden_size must be an integer from 1"),
        ({"hidden_size": "32"}, "hidden_size must be an integer"),
        ({"hidden_size": 32.0}, "hidden_size must be an integer"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"hidden_size": 33, "head_dim": None}, "hidden_size must be a multiple"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must be a divisor"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"num_attention_heads": 2**20, "num_key_value_heads": 1, "head_dim": 2**14}, "too large"),
        ({"intermediate_size": []}, "intermediate_size"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
        ({"model_type": "gpt2"}, "model_type must be 'llama' for LlamaForCausalLM, found 'gpt2'"),
        ({"model_type": None}, "model_type must be 'llama'"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a finite number above 0"),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({**named("MistralForCausalLM"), "sliding_window": 0}, "sliding_window"),
        (
            {**named("Qwen2ForCausalLM"), "layer_types": ["sliding_attention"] * 2},
            "no sliding window is in use",
        ),
        ({**named("Qwen3ForCausalLM"), "layer_types": ["full_attention"]}, "layer_types must be a list"),
        (
            {**named("Qwen2ForCausalLM"), "use_sliding_window": True, "max_window_layers": -1},
            "max_window_layers",
        ),
    ],
)
def test_bad_fields(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_config({**BASIC, **change}, FILE)
    assert str(caught.value).startswith(str(FILE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported .*Qwen2ForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2.* is not supported"),
        ({"hidden_act": "gelu"}, "gelu.* is not supported .*silu"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn.* is not supported .*default, linear, llama3"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({**named("Qwen2ForCausalLM"), "layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
    ],
)
def test_unsupported(change: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message) as caught:
        parse_config({**BASIC, **change}, FILE)
    assert str(caught.value).startswith(str(FILE))


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '"x"', "[" * 100000, '{"a": "\ud800'.encode("utf-8", "surrogatepass")]
)
def test_bad_json(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="JSON") as caught:
        read_json(path)
    assert str(caught.value).startswith(str(path))


def test_frequencies_that_overflow() -> None:
    with pytest.raises(ValueError, match="not finite"):
        inverse_frequencies({"rope_type": "default", "rope_theta": 1e-300}, 128, FILE)
