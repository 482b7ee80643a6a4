"""A benchmark's model as a GGUF file, for llama.cpp and rast to read the same weights from: BF16, Q8_0 or Q4_0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

TYPES = {16: "BF16", 8: "Q8_0", 4: "Q4_0"}  # bits of a weight -> type of the matrices

_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROWS = 4096  # of a matrix that are quantized at a time


def gguf_file(folder: Path, bits: int) -> Path:
    """The file beside the safetensors in `folder`; written unless it is there."""
    path = folder / f"model-{TYPES[bits]}.gguf"
    if not path.exists():
        part = path.with_suffix(".part")
        _write(folder, TYPES[bits], part)
        part.rename(path)
    return path


def _write(folder: Path, matrix_type: str, path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, config["model_type"])
    _metadata(writer, config)
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
        if config["tie_word_embeddings"]:
            names = [name for name in names if name != "lm_head.weight"]
        for name in names:
            shape = tensors.get_slice(name).get_shape()
            kind = _type(shape, matrix_type)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            n_bytes = int(np.prod(shape)) // block * size
            writer.add_tensor_info(_gguf_name(name), shape, np.dtype(np.float32), n_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in names:
            tensor = tensors.get_tensor(name)
            if config["model_type"] == "llama" and "q_proj" in name:
                tensor = _interleaved(tensor, config["num_attention_heads"])
            elif config["model_type"] == "llama" and "k_proj" in name:
                tensor = _interleaved(tensor, config["num_key_value_heads"])
            writer.write_tensor_data(_encode(tensor, _type(list(tensor.shape), matrix_type)))
    writer.close()


def _metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")  # the benchmarks work on token ids


def _type(shape: list[int], matrix_type: str) -> gguf.GGMLQuantizationType:
    """Vectors stay float32, as llama.cpp wants them; rows that no blocks fit into stay BF16."""
    kind = gguf.GGMLQuantizationType[matrix_type]
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    return kind if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else gguf.GGMLQuantizationType.BF16


def _encode(tensor: torch.Tensor, kind: gguf.GGMLQuantizationType) -> NDArray[Any]:
    if kind == gguf.GGMLQuantizationType.BF16:
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
    if kind == gguf.GGMLQuantizationType.F32:
        return tensor.float().numpy()
    parts = [gguf.quants.quantize(rows.float().numpy(), kind) for rows in tensor.split(_ROWS)]
    return np.concatenate(parts)


def _interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head in the order that rotates pairs (2i, 2i + 1), as llama-type files have them; safetensors
    rotate (i, i + half)."""
    rows = tensor.shape[0] // heads
    order = torch.arange(rows).reshape(2, rows // 2).T.reshape(-1)
    return tensor.reshape(heads, rows, -1)[:, order].reshape(tensor.shape)


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[rest]}.{kind}"
