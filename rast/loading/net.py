"""Loads one net: everything that the core and the interface need to know of a model source."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import parse_config, token_ids
from .files import read_json
from .gguf import gguf_net, gguf_token_ids
from .gguf_file import read_gguf
from .gguf_tokenizer import gguf_tokenizer
from .quantize import BLOCKS, Quantizer, check_name
from .safetensors import check_format, read_folder
from .source import resolve_source
from .tokenizer import Tokenizer
from .weights import DTYPES, STORED, Tensor, collect, matrix_dtype

if TYPE_CHECKING:
    from .._core import NetConfig

Progress = Callable[[str, int, int], None]
"""progress(what, done, total), in bytes."""


@dataclass
class LoadedNet:
    """One model as loaded. Arrays are views of the memory-mapped files wherever the stored type allows."""

    name: str
    """The role, as messages call it: "base", "expert", ..."""
    source: str
    """What the user gave."""
    path: Path
    """The local folder or file."""
    architecture: str
    config: NetConfig
    tensors: dict[str, Tensor]
    """HuggingFace name -> (array, stored dtype); 16-bit floats as uint16, quantized rows as uint8 [rows, bytes], those
    that were made at load with rows to a multiple of 16."""
    dtype: str
    """Rounding mode: "float32" | "bfloat16" | "float16"."""
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any]
    """generation_config.json, with the bos, eos and pad ids of config.json where it has none."""
    warnings: list[str]
    files: tuple[Path, ...] = field(default=(), repr=False)
    """The files this was made from, with links resolved."""
    quantization: str | None = None
    """As asked for; None: as stored."""

    def key(self) -> Hashable:
        """Equal for two roles that are the same files in the same dtype and quantization, which need loading once."""
        return self.files, self.dtype, self.quantization

    def weight_types(self) -> dict[str, int]:
        """Bytes of the tensors of each stored dtype, most first."""
        types: Counter[str] = Counter()
        for array, dtype in self.tensors.values():
            types[dtype] += array.nbytes
        return dict(types.most_common())


def load_net(
    source: str | os.PathLike[str],
    *,
    name: str = "base",
    dtype: str = "auto",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    quantization: str | None = None,
    progress: Progress | None = None,
) -> LoadedNet:
    """Loads `source`: a folder in HuggingFace's layout, a .gguf file, or a hub id.

    `dtype` ("auto": as the matrices are stored; bfloat16 for quantized ones) fixes where the core rounds.
    `quantization` says what matrices are made into: "int8", "int4" (groups of 32), "int4-64" or "none" (floats). None:
    they stay as stored, but quantized GGUF tensors of other types than Q8_0, Q4_0 and Q4_1, and with dtype "float32"
    all of them, are dequantized: to float32 with dtype "float32", else to bfloat16. `progress` hears of long work.

    Raises FileNotFoundError (says what was looked for), ValueError (bad content, naming the file), NotImplementedError
    (what is supported instead), ImportError (which package to install).
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, found {dtype!r}")
    if quantization is not None:
        check_name(quantization)
    path = resolve_source(
        source, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
    )
    if path.is_dir():
        net = _load_folder(path, dtype, quantization, progress)
    elif path.suffix.lower() == ".gguf":
        net = _load_gguf(path, dtype, quantization, progress)
    else:
        raise ValueError(f"{path}: expected a folder or a .gguf file")
    net.name, net.source, net.quantization = name, os.fspath(source), quantization
    rows = net.config["vocab_size"]
    if net.tokenizer is not None and net.tokenizer.n_tokens > rows:
        net.warnings.append(
            f"{path}: the tokenizer has {net.tokenizer.n_tokens} tokens, the embedding {rows} rows; "
            "tokens beyond them cannot be used"
        )
    return net


def _load_folder(folder: Path, dtype: str, quantization: str | None, progress: Progress | None) -> LoadedNet:
    config_path = folder / "config.json"
    if not config_path.exists():
        raise FileNotFoundError(f"{folder}: no config.json there")
    data = read_json(config_path)
    architecture, config = parse_config(data, config_path)
    weights_path, entries = read_folder(folder)
    quantizer = None
    if quantization is not None and quantization in BLOCKS:
        quantizer = Quantizer(quantization, weights_path, progress)
        quantizer.total = sum(entry.buffer.size for entry in entries.values() if len(entry.shape) == 2)
    tensors, warnings = collect(entries, config, weights_path, quantize=quantizer)
    if quantizer is not None:
        warnings += quantizer.warnings()
    shards = {entry.file for entry in entries.values()}
    check_format(sorted(shards))
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    for key, id in token_ids(data, architecture).items():
        if generation.get(key) is None:
            generation[key] = id
    used = {config_path, weights_path, folder / "tokenizer.json", generation_path} | shards
    return LoadedNet(
        name="",
        source="",
        path=folder,
        architecture=architecture,
        config=config,
        tensors=tensors,
        dtype=matrix_dtype(entries) if dtype == "auto" else dtype,
        tokenizer=Tokenizer.from_folder(folder),
        generation_config=generation,
        warnings=warnings,
        files=tuple(sorted({path.resolve() for path in used})),
    )


def _load_gguf(path: Path, dtype: str, quantization: str | None, progress: Progress | None) -> LoadedNet:
    file = read_gguf(path)
    architecture, config, tensors, warnings = gguf_net(file, dtype, quantization, progress)
    tokenizer, tokenizer_warnings = gguf_tokenizer(file.metadata, path)
    if dtype == "auto":
        quantized = any(entry.dtype not in STORED for entry in file.entries.values())
        dtype = "bfloat16" if quantized else matrix_dtype(file.entries)
    return LoadedNet(
        name="",
        source="",
        path=path,
        architecture=architecture,
        config=config,
        tensors=tensors,
        dtype=dtype,
        tokenizer=tokenizer,
        generation_config=gguf_token_ids(file.metadata),
        warnings=warnings + tokenizer_warnings,
        files=(path.resolve(),),
    )
