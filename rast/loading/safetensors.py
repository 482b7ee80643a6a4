"""Tensors of a folder of safetensors files, single or sharded, each file memory-mapped once."""

from __future__ import annotations

import json
from pathlib import Path

from .files import map_file, read_json
from .weights import Entry

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_folder(folder: Path) -> tuple[Path, dict[str, Entry]]:
    """(the file that says what belongs to the model, its tensors by name)."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.exists():
        return single, read_file(single)
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


def read_file(path: Path) -> dict[str, Entry]:
    """The tensors of one file; ValueError if it is truncated or corrupt."""
    from safetensors import SafetensorError, safe_open

    try:
        # Opening checks the header, and that the tensors tile the rest of the file without gap or overlap.
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not a valid safetensors file: {error}") from error
    data = map_file(path)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        entries[name] = Entry(path, name, info["dtype"], tuple(info["shape"]), data[start + begin : start + end])
    return entries


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
            shards[shard] = read_file(index.parent / shard)
        if tensor not in shards[shard]:
            raise ValueError(f"{index}: tensor {tensor!r} is not in shard {shard!r}")
        entries[tensor] = shards[shard][tensor]
    return entries
