"""Scans the tensors of a model for NaN and Inf, without loading it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .gguf import dequantized_chunks
from .gguf_file import read_gguf
from .net import Progress
from .safetensors import check_format, read_folder
from .source import resolve_source
from .weights import STORED, Entry

_CHUNK = 1 << 24  # elements looked at in one go

# Stored dtype -> (bits without the sign, the bits of Inf; NaN lies above).
_BITS = {"F32": (0x7FFFFFFF, 0x7F800000), "BF16": (0x7FFF, 0x7F80), "F16": (0x7FFF, 0x7C00)}


@dataclass(frozen=True)
class Finding:
    """A tensor with values that are not finite."""

    file: Path
    tensor: str
    n_nan: int
    n_inf: int

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.tensor!r} has {self.n_nan} NaN and {self.n_inf} Inf"


def scan(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
) -> list[Finding]:
    """The tensors of `source` (as `load_net` takes it) that hold NaN or Inf, in the file's order; [] if all is well.

    Safetensors of types that no net can use (integers, say) are passed over. Raises what `load_net` does.
    """
    path = resolve_source(
        source, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
    )
    folder = path.is_dir()
    entries = read_folder(path)[1] if folder else read_gguf(path).entries
    if folder:
        check_format(sorted({entry.file for entry in entries.values()}))
    total = sum(entry.buffer.size for entry in entries.values())
    done = 0
    findings = []
    for entry in entries.values():
        n_nan = n_inf = 0
        if entry.dtype in STORED:
            n_nan, n_inf = _count(_stored_chunks(entry), *_BITS[entry.dtype])
        elif not folder:
            chunks = (np.ascontiguousarray(values).view(np.uint32) for values in dequantized_chunks(entry))
            n_nan, n_inf = _count(chunks, *_BITS["F32"])
        if n_nan or n_inf:
            findings.append(Finding(entry.file, entry.name, n_nan, n_inf))
        done += entry.buffer.size
        if progress is not None:
            progress(f"checking {entry.file.name}", done, total)
    return findings


def _stored_chunks(entry: Entry) -> Iterator[NDArray[Any]]:
    """The bits of a tensor as unsigned integers, some at a time."""
    bits = entry.array().reshape(-1).view(np.uint32 if entry.dtype == "F32" else np.uint16)
    for begin in range(0, bits.size, _CHUNK):
        yield bits[begin : begin + _CHUNK]


def _count(chunks: Iterable[NDArray[Any]], mask: int, infinity: int) -> tuple[int, int]:
    """(number of NaN, number of Inf) among floats given as unsigned integers."""
    n_nan = n_inf = 0
    for bits in chunks:
        magnitude = bits & bits.dtype.type(mask)
        n_inf += int(np.count_nonzero(magnitude == infinity))
        n_nan += int(np.count_nonzero(magnitude > infinity))
    return n_nan, n_inf
