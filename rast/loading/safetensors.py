"""Tensors of a folder of safetensors files, single or sharded, each file memory-mapped once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .files import Bytes, map_file, read_json
from .weights import STORED, Entry

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_folder(folder: Path) -> tuple[Path, dict[str, Entry]]:
    """(the file that says what belongs to the model, its tensors by name)."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.exists():
        return single, _read_file(single)
    if index.exists():
        return index, _read_shards(index)
    if any(folder.glob("pytorch_model*.bin")):
        raise NotImplementedError(
            f"{folder}: only PyTorch .bin weights are there; convert them to safetensors "
            "(in transformers: model.save_pretrained(folder))"
        )
    ggufs = sorted(folder.glob("*.gguf"))
    hint = f"; name the file itself to load {ggufs[0]}" if ggufs else ""
    raise FileNotFoundError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there{hint}")


def check_format(files: Iterable[Path]) -> None:
    """Has the safetensors library check whole files: no gaps, no overlaps, nothing that it does not know.

    Worth doing after `read_folder`'s entries are checked against a config: those messages name the tensor.
    """
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: not a valid safetensors file: {error}") from error


def _read_file(path: Path) -> dict[str, Entry]:
    """The tensors of one file, each within the file and as large as its shape says; ValueError if not."""
    data = map_file(path)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if start > len(data):
        raise ValueError(
            f"{path}: not a valid safetensors file: the header ends beyond the file (truncated or corrupt)"
        )
    try:
        header = json.loads(data[8:start].tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a valid safetensors file: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a valid safetensors file: the header is not a JSON object")
    return {name: _entry(path, name, info, data[start:]) for name, info in header.items() if name != "__metadata__"}


def _entry(path: Path, name: str, info: object, data: Bytes) -> Entry:
    match info:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            sizes_ok = all(type(size) is int and size >= 0 for size in shape)
        case _:
            sizes_ok = False
    if not sizes_ok:
        raise ValueError(f"{path}: not a valid safetensors file: tensor {name!r} is described by {info!r}")
    if not 0 <= begin <= end <= len(data):
        raise ValueError(
            f"{path}: not a valid safetensors file: tensor {name!r} lies at bytes {begin} to {end} of {len(data)} "
            "(truncated?)"
        )
    if dtype in STORED and end - begin != math.prod(shape) * np.dtype(STORED[dtype][0]).itemsize:
        raise ValueError(
            f"{path}: not a valid safetensors file: tensor {name!r}, {dtype} {shape}, has {end - begin} bytes"
        )
    return Entry(path, name, dtype, tuple(shape), data[begin:end])


def _read_shards(index: Path) -> dict[str, Entry]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: weight_map must be an object, found {weight_map!r}")
    shards: dict[str, dict[str, Entry]] = {}
    entries = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index}: tensor {tensor!r} is mapped to {shard!r}, which is not a file name")
        if shard not in shards:
            if not (index.parent / shard).exists():
                raise FileNotFoundError(f"{index}: shard {shard!r}, which holds tensor {tensor!r}, is not there")
            shards[shard] = _read_file(index.parent / shard)
        if tensor not in shards[shard]:
            raise ValueError(f"{index}: tensor {tensor!r} is not in shard {shard!r}")
        entries[tensor] = shards[shard][tensor]
    return entries
