"""GGUF file -> config and tensors in HuggingFace's terms, used in place where the core knows their type."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .config import ARCHITECTURES, parse_config
from .fields import Fields
from .gguf_file import GgufFile, gguf_library
from .quantize import AS_GOOD, BLOCKS, NONE, Quantizer
from .weights import HEAD, QUANTIZED, STORED, Entry, Tensor, collect

if TYPE_CHECKING:
    from .._core import NetConfig

# general.architecture -> HuggingFace's name. Mistral models come as llama.
_ARCHITECTURES = {arch.model_type: name for name, arch in ARCHITECTURES.items() if arch.model_type != "mistral"}

_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"

_CHUNK = 1 << 22  # elements dequantized at a time


def gguf_net(
    file: GgufFile, dtype: str, quantization: str | None, progress: Callable[[str, int, int], None] | None
) -> tuple[str, NetConfig, dict[str, Tensor], list[str]]:
    """(architecture, config, tensors, warnings) of a GGUF file.

    Without `quantization`, matrices of a type in QUANTIZED are used in place, unless dtype is "float32". Dequantized
    tensors are float32 with dtype "float32", else bfloat16.
    """
    architecture, config = _config(file)
    entries = {_hf_name(name): entry for name, entry in file.entries.items() if name != _ROPE_FACTORS}
    target = "F32" if dtype == "float32" else "BF16"
    if quantization is not None and quantization in BLOCKS:
        return architecture, config, *_quantized(file, entries, config, quantization, progress)
    in_place: Collection[str] = () if dtype == "float32" or quantization == NONE else QUANTIZED

    def stays(entry: Entry) -> bool:
        return entry.dtype in STORED or (entry.dtype in in_place and len(entry.shape) == 2)

    total = sum(entry.buffer.size for entry in entries.values() if not stays(entry))
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(f"dequantizing {file.path.name}", done, total)

    def convert(entry: Entry) -> Tensor:
        return (entry.array(), entry.dtype) if stays(entry) else (dequantize(entry, target, advance), target)

    return architecture, config, *collect(entries, config, file.path, convert)


def _quantized(
    file: GgufFile,
    entries: Mapping[str, Entry],
    config: NetConfig,
    asked: str,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors, warnings) with matrices quantized to `asked`. Those that are of the like stay in place, others go
    through float32."""
    names = {entry.name: name for name, entry in entries.items()}

    def stays(entry: Entry) -> bool:
        return entry.dtype in QUANTIZED and (entry.dtype in AS_GOOD[asked] or not quantizer.fits(entry.shape[-1]))

    def convert(entry: Entry) -> Tensor:
        if len(entry.shape) != 2 or not stays(entry):
            return dequantize(entry, "F32", lambda n: None), "F32"
        if entry.dtype not in AS_GOOD[asked]:
            quantizer.leave(names[entry.name], entry.shape[-1])
        return entry.array(), entry.dtype

    quantizer = Quantizer(asked, file.path, progress)
    quantizer.total = sum(
        entry.buffer.size if entry.dtype in STORED else 4 * math.prod(entry.shape)
        for entry in entries.values()
        if len(entry.shape) == 2 and not stays(entry)
    )
    tensors, warnings = collect(entries, config, file.path, convert, quantizer)
    return tensors, warnings + quantizer.warnings()


def dequantize(entry: Entry, target: str, advance: Callable[[int], None]) -> NDArray[Any]:
    """`entry` as an array of the stored dtype `target` ("F32" or "BF16"); calls `advance(bytes)` as it goes."""
    out = np.empty(entry.shape, STORED[target][0])
    rows = out.reshape(-1, entry.shape[-1])
    begin = 0
    for values in dequantized_chunks(entry):
        rows[begin : begin + len(values)] = values if target == "F32" else bfloat16_bits(values)
        begin += len(values)
        advance(entry.buffer.size * len(values) // len(rows))
    return out


def dequantized_chunks(entry: Entry) -> Iterator[NDArray[np.float32]]:
    """Yields the rows of a quantized tensor in order, as float32 [some rows, row length]."""
    gguf = gguf_library(entry.file)
    kind = gguf.GGMLQuantizationType[entry.dtype]
    n_rows = int(np.prod(entry.shape[:-1], dtype=np.int64))
    data = entry.buffer.reshape(n_rows, -1)
    step = max(1, _CHUNK // max(1, entry.shape[-1]))
    for begin in range(0, n_rows, step):
        try:
            # Scales of a corrupt file may overflow; the values are what `rast info --check` is for.
            with np.errstate(all="ignore"):
                yield gguf.quants.dequantize(data[begin : begin + step], kind)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{entry.file}: tensor {entry.name!r} has type {entry.dtype}, which the gguf package cannot dequantize"
            ) from error


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of `values` rounded to bfloat16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = 0x7FC0
    return rounded


def gguf_token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """bos, eos and pad ids as a generation_config.json would hold them; an end-of-turn id counts as EOS."""
    ids: dict[str, Any] = {}
    for key, name in {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}.items():
        if f"tokenizer.ggml.{name}" in metadata:
            ids[key] = metadata[f"tokenizer.ggml.{name}"]
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    return ids | ({"eos_token_id": ends} if ends else {})


def _hf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TENSORS:
        return f"{_TENSORS[stem]}.{kind}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER_TENSORS:
        return f"model.layers.{parts[1]}.{_LAYER_TENSORS[parts[2]]}.{kind}"
    return name


def _config(file: GgufFile) -> tuple[str, NetConfig]:
    """The metadata as a config.json would say it, checked by the same code."""
    meta, path = file.metadata, file.path
    kind = meta.get("general.architecture")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        raise NotImplementedError(
            f"{path}: GGUF architecture {kind!r} is not supported (supported: {', '.join(_ARCHITECTURES)})"
        )
    if meta.get("split.count", 0) not in (0, 1):
        raise NotImplementedError(f"{path}: split GGUF files are not supported; merge them (llama-gguf-split --merge)")
    if meta.get(f"{kind}.expert_count", 0):
        raise NotImplementedError(f"{path}: mixtures of experts are not supported")
    fields = Fields(meta, path, prefix="metadata ")
    n_layers = fields.integer(f"{kind}.block_count")
    n_heads = fields.integer(f"{kind}.attention.head_count")
    hidden_size = fields.integer(f"{kind}.embedding_length")
    head_dim = fields.integer(f"{kind}.attention.key_length", max(1, hidden_size // n_heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(f"{kind}.{key}", head_dim) != head_dim:
            raise NotImplementedError(f"{path}: {kind}.{key} other than the head's width ({head_dim}) is not supported")
    if "token_embd.weight" not in file.entries:
        raise ValueError(f"{path}: tensor 'token_embd.weight' is missing")

    architecture = _ARCHITECTURES[kind]
    data = {
        "architectures": [architecture],
        "model_type": kind,
        "num_hidden_layers": n_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": n_heads,
        "num_key_value_heads": fields.integer(f"{kind}.attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "intermediate_size": fields.integer(f"{kind}.feed_forward_length"),
        "vocab_size": file.entries["token_embd.weight"].shape[0],
        "max_position_embeddings": fields.integer(f"{kind}.context_length"),
        "rms_norm_eps": fields.number(f"{kind}.attention.layer_norm_rms_epsilon", above=0.0),
        "rope_parameters": _rope(fields, kind),
        "attention_bias": "blk.0.attn_q.bias" in file.entries,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.entries,
        "tie_word_embeddings": not any(_hf_name(name) == HEAD for name in file.entries),
    }
    _, config = parse_config(data, path)
    config["o_bias"] = "blk.0.attn_output.bias" in file.entries
    # llama-type files have the rows of Q and K permuted for rotation in pairs (2i, 2i + 1).
    config["rope_interleaved"] = kind == "llama"
    if fields.get(f"{kind}.attention.sliding_window"):
        config["window"] = np.full(n_layers, fields.integer(f"{kind}.attention.sliding_window"), np.int32)
    if _ROPE_FACTORS in file.entries:
        config["rope_freq"] = _apply_rope_factors(file.entries[_ROPE_FACTORS], config["rope_freq"])
    return architecture, config


def _rope(fields: Fields, kind: str) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": fields.number(f"{kind}.rope.freq_base", 10000.0, above=0.0)}
    scaling = fields.get(f"{kind}.rope.scaling.type")
    old_factor = fields.get(f"{kind}.rope.scale_linear")
    if scaling == "linear" or (scaling is None and old_factor):
        key = f"{kind}.rope.scaling.factor"
        rope |= {"rope_type": "linear", "factor": fields.number(key, old_factor, above=0.0)}
    elif scaling not in (None, "none"):
        raise NotImplementedError(
            f"{fields.file}: rope scaling {scaling!r} is not supported in GGUF (supported: none, linear)"
        )
    return rope


def _apply_rope_factors(entry: Entry, freq: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Frequencies divided by the factors that the file holds: this is how llama3 scaling comes."""
    assert freq is not None
    if entry.dtype != "F32" or entry.shape != freq.shape:
        raise ValueError(
            f"{entry.file}: tensor {entry.name!r} must be F32 {list(freq.shape)}, "
            f"found {entry.dtype} {list(entry.shape)}"
        )
    factors = entry.array()
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ValueError(f"{entry.file}: tensor {entry.name!r} must hold finite factors above 0")
    scaled: NDArray[np.float32] = freq / factors
    return scaled
