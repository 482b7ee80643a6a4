"""config.json -> NetConfig. What differs between the supported architectures is one table; all else is shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .fields import INT32_MAX, Fields
from .rope import inverse_frequencies, rope_parameters

if TYPE_CHECKING:
    from .._core import NetConfig


@dataclass(frozen=True)
class Architecture:
    """How one architecture differs, with the values transformers assumes for fields that a config.json leaves out."""

    model_type: str
    qkv_bias: bool = False  # always there; otherwise as `attention_bias` says, where `bias_options` holds it
    qk_norm: bool = False
    bias_options: frozenset[str] = frozenset()
    window: Literal["none", "by_layer", "all"] = "none"
    n_kv_heads: int | None = None  # None: as many as heads; so is a null
    head_dim: int | None = None  # None: hidden_size / heads
    bos_token_id: int | None = None
    eos_token_id: int | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        "llama", bias_options=frozenset({"attention_bias", "mlp_bias"}), bos_token_id=1, eos_token_id=2
    ),
    "MistralForCausalLM": Architecture("mistral", window="all", n_kv_heads=8, bos_token_id=1, eos_token_id=2),
    "Qwen2ForCausalLM": Architecture("qwen2", qkv_bias=True, window="by_layer"),
    "Qwen3ForCausalLM": Architecture(
        "qwen3", qk_norm=True, bias_options=frozenset({"attention_bias"}), window="by_layer", head_dim=128
    ),
}

_MOST_LAYERS = _WIDEST_HEAD = 65536  # far beyond any model; keeps what a corrupt config can make us allocate small
_DEFAULT_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28


def parse_config(data: Mapping[str, Any], file: object) -> tuple[str, NetConfig]:
    """(architecture, config) of the config.json contents `data`, every field checked.

    `file` only names the file in errors: ValueError (bad content), NotImplementedError (unsupported).
    """
    fields = Fields(data, file)
    name = _architecture(fields)
    arch = ARCHITECTURES[name]
    if data.get("quantization_config") is not None:
        raise NotImplementedError(
            f"{file}: quantization_config is not supported "
            "(supported: float32, bfloat16 and float16 weights, or a .gguf file)"
        )
    if data.get("hidden_act", "silu") not in ("silu", "swish"):
        raise NotImplementedError(f"{file}: hidden_act {data['hidden_act']!r} is not supported (supported: 'silu')")

    n_layers = fields.integer("num_hidden_layers", most=_MOST_LAYERS)
    hidden_size = fields.integer("hidden_size")
    n_heads = fields.integer("num_attention_heads")
    absent_kv_heads = n_heads if "num_key_value_heads" in fields else arch.n_kv_heads or n_heads
    n_kv_heads = fields.integer("num_key_value_heads", absent_kv_heads)
    if n_heads % n_kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads ({n_heads})", n_kv_heads)
    head_dim = fields.integer("head_dim", arch.head_dim or _head_dim(fields, hidden_size, n_heads), most=_WIDEST_HEAD)
    if head_dim % 2:
        raise fields.error("head_dim", "even", head_dim)
    if n_heads * head_dim > INT32_MAX:
        raise ValueError(f"{file}: num_attention_heads ({n_heads}) times head_dim ({head_dim}) is too large")

    theta, freq = inverse_frequencies(rope_parameters(fields), head_dim, file)
    attention_bias = "attention_bias" in arch.bias_options and fields.boolean("attention_bias", False)
    config: NetConfig = {
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "vocab_size": fields.integer("vocab_size"),
        "max_context": fields.integer("max_position_embeddings"),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6, above=0.0),
        "rope_theta": theta,
        "rope_freq": freq,
        "rope_attention": 1.0,
        "rope_interleaved": False,
        "window": _windows(fields, arch, n_layers),
        "qkv_bias": arch.qkv_bias or attention_bias,
        "o_bias": attention_bias,
        "mlp_bias": "mlp_bias" in arch.bias_options and fields.boolean("mlp_bias", False),
        "qk_norm": arch.qk_norm,
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", False),
    }
    return name, config


def token_ids(data: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The bos, eos and pad ids of a config.json, those that are set (or that its architecture implies)."""
    arch = ARCHITECTURES[architecture]
    ids = {
        "bos_token_id": data.get("bos_token_id", arch.bos_token_id),
        "eos_token_id": data.get("eos_token_id", arch.eos_token_id),
        "pad_token_id": data.get("pad_token_id"),
    }
    return {key: value for key, value in ids.items() if value is not None}


def _architecture(fields: Fields) -> str:
    names = fields.get("architectures")
    if names is None:
        names = [name for name, arch in ARCHITECTURES.items() if arch.model_type == fields.get("model_type")]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise fields.error("architectures", "a list of names", names)
    for name in names:
        if name in ARCHITECTURES:
            if fields.get("model_type") != ARCHITECTURES[name].model_type:
                raise fields.error(
                    "model_type", f"{ARCHITECTURES[name].model_type!r} for {name}", fields.get("model_type")
                )
            return str(name)
    found = ", ".join(names) or f"model_type {fields.get('model_type')!r}"
    raise NotImplementedError(
        f"{fields.file}: architecture {found} is not supported (supported: {', '.join(ARCHITECTURES)})"
    )


def _head_dim(fields: Fields, hidden_size: int, n_heads: int) -> int | None:
    if fields.get("head_dim") is not None:
        return None
    if hidden_size % n_heads:
        raise fields.error("hidden_size", f"a multiple of num_attention_heads ({n_heads})", hidden_size)
    return hidden_size // n_heads


def _windows(fields: Fields, arch: Architecture, n_layers: int) -> NDArray[np.int32] | None:
    """Sliding window of each layer, 0 = none, int32 [n_layers]; None when no layer has one."""
    if arch.window == "none":
        return None
    # null means "no window", but an absent field means the default.
    off = "sliding_window" in fields and fields.get("sliding_window") is None
    if arch.window == "by_layer" and not fields.boolean("use_sliding_window", False):
        off = True
    size = 0 if off else fields.integer("sliding_window", _DEFAULT_WINDOW)
    if arch.window == "all":
        return np.full(n_layers, size, np.int32) if size else None

    types = fields.get("layer_types")
    if types is None:
        first = fields.get("max_window_layers")
        first = _DEFAULT_MAX_WINDOW_LAYERS if first is None else first
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise fields.error("max_window_layers", "an integer from 0", first)
        sliding = [bool(size) and layer >= first for layer in range(n_layers)]
    else:
        if not isinstance(types, list) or len(types) != n_layers:
            raise fields.error("layer_types", f"a list of num_hidden_layers ({n_layers}) names", types)
        for kind in types:
            if kind not in ("full_attention", "sliding_attention"):
                raise NotImplementedError(
                    f"{fields.file}: layer type {kind!r} is not supported "
                    "(supported: full_attention, sliding_attention)"
                )
        sliding = [kind == "sliding_attention" for kind in types]
        if any(sliding) and not size:
            raise ValueError(f"{fields.file}: layer_types names sliding_attention, but no sliding window is in use")
    return np.array([size if on else 0 for on in sliding], np.int32) if any(sliding) else None
