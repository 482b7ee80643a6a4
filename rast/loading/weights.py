"""The tensors of a net: which ones a config asks for, and arrays over the mapped file, presence and shape checked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .files import Bytes

if TYPE_CHECKING:
    from .._core import NetConfig

Tensor = tuple[NDArray[Any], str]

# Stored dtype -> (array type, name of the rounding mode). 16-bit floats stay raw bits: NumPy has no bfloat16.
STORED: Mapping[str, tuple[type[np.generic], str]] = {
    "F32": (np.float32, "float32"),
    "BF16": (np.uint16, "bfloat16"),
    "F16": (np.uint16, "float16"),
}
# Quantized dtype that a file may hold -> (elements of a block, its bytes); arrays of them are uint8 [rows, bytes of a
# row]. See csrc/rast.h.
QUANTIZED: Mapping[str, tuple[int, int]] = {"Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20)}
DTYPES = tuple(name for _, name in STORED.values())

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Entry:
    """One tensor as it lies in a file."""

    file: Path
    name: str  # in the file
    dtype: str  # "F32", "BF16", "F16" or a type of the file's format that needs conversion
    shape: tuple[int, ...]
    buffer: Bytes  # its bytes, a view of the mapped file

    def array(self) -> NDArray[Any]:
        """The tensor, in place (in a copy where it is not aligned); for the dtypes in STORED and, as rows of blocks, in
        QUANTIZED."""
        if self.dtype in QUANTIZED:
            group, block = QUANTIZED[self.dtype]
            return self.buffer.reshape(*self.shape[:-1], self.shape[-1] // group * block)
        array = self.buffer.view(STORED[self.dtype][0]).reshape(self.shape)
        return array if self.aligned else array.copy()

    @property
    def aligned(self) -> bool:
        return bool(self.buffer.ctypes.data % np.dtype(STORED[self.dtype][0]).itemsize == 0)


def expected_shapes(config: NetConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a net, in HuggingFace's names."""
    hidden, ff, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["n_heads"] * head_dim, config["n_kv_heads"] * head_dim
    matrices = {  # name -> (shape, has a bias)
        "self_attn.q_proj": ((q, hidden), config["qkv_bias"]),
        "self_attn.k_proj": ((kv, hidden), config["qkv_bias"]),
        "self_attn.v_proj": ((kv, hidden), config["qkv_bias"]),
        "self_attn.o_proj": ((hidden, q), config["o_bias"]),
        "mlp.gate_proj": ((ff, hidden), config["mlp_bias"]),
        "mlp.up_proj": ((ff, hidden), config["mlp_bias"]),
        "mlp.down_proj": ((hidden, ff), config["mlp_bias"]),
    }
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for name, (shape, has_bias) in matrices.items():
        layer[f"{name}.weight"] = shape
        if has_bias:
            layer[f"{name}.bias"] = shape[:1]
    if config["qk_norm"]:
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (head_dim,)

    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes[HEAD] = (config["vocab_size"], hidden)
    for i in range(config["n_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def collect(
    entries: Mapping[str, Entry],
    config: NetConfig,
    file: object,
    convert: Callable[[Entry], Tensor] | None = None,
    quantize: Callable[[str, Tensor], Tensor] | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors, warnings) of a net from the entries of its files, by HuggingFace name.

    `convert` makes an array of a dtype that cannot be used in place; without it such a dtype is NotImplementedError.
    `quantize` takes matrices of floats, by their HuggingFace name.
    May clear `config["tie_word_embeddings"]` when the file holds a head of its own.
    """
    entries = dict(entries)
    warnings = _settle_tied_head(entries, config)
    shapes = expected_shapes(config)
    missing = [name for name in shapes if name not in entries]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"{file}: tensor {missing[0]!r}, shape {list(shapes[missing[0]])}, is missing{more}")

    tensors: dict[str, Tensor] = {}
    misaligned = []
    for name, shape in shapes.items():
        entry = entries[name]
        if entry.shape != shape:
            raise ValueError(
                f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}, the config asks for {list(shape)}"
            )
        if entry.dtype in STORED:
            if not entry.aligned:
                misaligned.append(entry.name)
            tensors[name] = entry.array(), entry.dtype
        elif convert is not None:
            tensors[name] = convert(entry)
        else:
            raise NotImplementedError(
                f"{entry.file}: tensor {entry.name!r} has dtype {entry.dtype}, which is not supported "
                f"(supported: {', '.join(STORED)})"
            )
        if quantize is not None and len(shape) == 2 and tensors[name][1] in STORED:
            tensors[name] = quantize(name, tensors[name])
    if misaligned:
        warnings.append(
            f"{file}: {len(misaligned)} tensors are not aligned to their elements and were copied "
            f"(first: {misaligned[0]!r})"
        )
    unused = [name for name in entries if name not in shapes and not name.endswith("rotary_emb.inv_freq")]
    if unused:
        warnings.append(f"{file}: {len(unused)} tensors are not used by this architecture (first: {unused[0]!r})")
    return tensors, warnings


def matrix_dtype(entries: Mapping[str, Entry]) -> str:
    """The rounding mode that fits the stored matrices of floats: that of most of their elements."""
    elements: Counter[str] = Counter()
    for entry in entries.values():
        if len(entry.shape) == 2 and entry.dtype in STORED:
            elements[entry.dtype] += math.prod(entry.shape)
    return STORED[max(elements, key=lambda dtype: elements[dtype])][1]


def _settle_tied_head(entries: dict[str, Entry], config: NetConfig) -> list[str]:
    """A config that ties head and embedding while the file holds both: tied if they are equal, as in transformers."""
    if not config["tie_word_embeddings"] or HEAD not in entries:
        return []
    head = entries.pop(HEAD)
    embedding = entries.setdefault(EMBEDDING, head)
    if (head.dtype, head.shape) == (embedding.dtype, embedding.shape) and np.array_equal(head.buffer, embedding.buffer):
        return []
    entries[HEAD] = head
    config["tie_word_embeddings"] = False
    return [f"{head.file}: {HEAD} differs from the embedding that the config ties it to; each is used as it is"]
