"""The GGUF container: metadata and tensor table of a mapped file, every length checked against the file.

The header is read here rather than with the `gguf` library's reader, which takes seconds for a large vocabulary and
trusts the counts in the file. The library is asked for what it knows best: the quantized types that are not used in
place.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .files import Bytes, map_file
from .weights import QUANTIZED, STORED, Entry

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4

# GGUF value type -> NumPy dtype; strings and arrays apart.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9

# Tensor types that are used in place, by their number in the file.
_PLAIN = {0: "F32", 1: "F16", 30: "BF16"}
_BLOCKS = {2: "Q4_0", 3: "Q4_1", 8: "Q8_0"}


@dataclass(frozen=True)
class GgufFile:
    path: Path
    metadata: dict[str, Any]  # numbers, bools, strings, and lists of them
    entries: dict[str, Entry]  # by the names in the file; dtype is the type's name, e.g. "Q4_1"


def gguf_library(path: Path) -> ModuleType:
    """The `gguf` package, which dequantizing needs."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"{path}: quantized GGUF files need the gguf package: pip install rast[gguf]") from error
    return gguf


def read_gguf(path: Path) -> GgufFile:
    """Reads the header of `path`. ValueError if it is truncated or corrupt."""
    data = map_file(path)
    reader = _Reader(path, data)
    if bytes(data[:4]) != _MAGIC:
        raise ValueError(f"{path}: not a GGUF file (it begins with {bytes(data[:4])!r})")
    reader.position = 4
    version = reader.scalar("<u4")
    if version not in _VERSIONS:
        raise NotImplementedError(
            f"{path}: GGUF version {version} is not supported (supported: 2 and 3, little-endian)"
        )
    n_tensors, n_fields = reader.scalar("<u8"), reader.scalar("<u8")

    metadata: dict[str, Any] = {}
    for _ in range(n_fields):
        key = reader.string()
        if key in metadata:
            raise ValueError(f"{path}: metadata field {key!r} occurs twice")
        metadata[key] = reader.value(reader.scalar("<u4"), key)

    table = []
    for _ in range(n_tensors):
        name, n_dims = reader.string(), reader.scalar("<u4")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise ValueError(f"{path}: tensor {name!r} has {n_dims} dimensions")
        shape = tuple(reader.scalar("<u8") for _ in range(n_dims))[::-1]  # stored innermost first
        table.append((name, shape, reader.scalar("<u4"), reader.scalar("<u8")))

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"{path}: general.alignment must be a power of two, found {alignment!r}")
    start = -(-reader.position // alignment) * alignment
    entries: dict[str, Entry] = {}
    for name, shape, type_number, offset in table:
        if name in entries:
            raise ValueError(f"{path}: tensor {name!r} occurs twice")
        dtype, n_bytes = _layout(path, name, shape, type_number)
        if start + offset + n_bytes > len(data):
            raise ValueError(
                f"{path}: tensor {name!r} ends at byte {start + offset + n_bytes}, "
                f"the file has {len(data)} (truncated?)"
            )
        entries[name] = Entry(path, name, dtype, shape, data[start + offset : start + offset + n_bytes])
    return GgufFile(path, metadata, entries)


def _layout(path: Path, name: str, shape: tuple[int, ...], type_number: int) -> tuple[str, int]:
    """(type name, size in bytes) of a tensor."""
    if type_number in _PLAIN:
        dtype = _PLAIN[type_number]
        return dtype, math.prod(shape) * np.dtype(STORED[dtype][0]).itemsize
    if type_number in _BLOCKS:
        dtype = _BLOCKS[type_number]
        block, block_bytes = QUANTIZED[dtype]
    else:
        gguf = gguf_library(path)
        try:
            kind = gguf.GGMLQuantizationType(type_number)
        except ValueError as error:
            raise ValueError(f"{path}: tensor {name!r} has an unknown type, number {type_number}") from error
        dtype = kind.name
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError(f"{path}: tensor {name!r}: rows of {shape[-1]} are not a multiple of {dtype}'s {block}")
    return dtype, math.prod(shape) // block * block_bytes


class _Reader:
    """Walks the header; every read is checked against the end of the file."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self._path = path
        self._data = data
        self.position = 0

    def _take(self, n: int) -> Bytes:
        begin = self.position
        if n > len(self._data) - begin:
            raise ValueError(f"{self._path}: the header ends beyond the file (truncated or corrupt at byte {begin})")
        self.position = begin + n
        return self._data[begin : self.position]

    def scalar(self, dtype: str) -> Any:
        return self._take(np.dtype(dtype).itemsize).view(dtype)[0].item()

    def string(self) -> str:
        raw = self._take(self.scalar("<u8")).tobytes()
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path}: text in the header is not UTF-8 (byte {self.position})") from error

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, length = self.scalar("<u4"), self.scalar("<u8")
            if kind == _STRING:
                return self._strings(length)
            if kind in _SCALARS:
                dtype = np.dtype(_SCALARS[kind])
                return self._take(length * dtype.itemsize).view(dtype).tolist()
        elif kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        raise ValueError(f"{self._path}: metadata field {key!r} has an unknown type, number {kind}")

    def _strings(self, length: int) -> list[str]:
        """An array of strings: vocabularies and merges, hundreds of thousands of them, hence apart from `string`."""
        if length * 8 > len(self._data) - self.position:
            raise ValueError(f"{self._path}: an array of {length} strings does not fit the file (truncated or corrupt)")
        data, position, size = self._data.data, self.position, len(self._data)
        strings = []
        try:
            for _ in range(length):
                begin = position + 8
                position = begin + struct.unpack_from("<Q", data, position)[0]
                if position > size:
                    raise ValueError(
                        f"{self._path}: a string in the header ends beyond the file (truncated or corrupt)"
                    )
                strings.append(str(data[begin:position], "utf-8"))
        except (struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"{self._path}: corrupt array of strings in the header: {error}") from error
        self.position = position
        return strings
