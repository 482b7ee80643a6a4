"""Reading files at the border: JSON objects and read-only memory maps, with errors that name the file."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. FileNotFoundError; ValueError naming the file when it is anything else."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def map_file(path: Path) -> Bytes:
    """The bytes of `path`, memory-mapped read-only. The map lives as long as any view of it.

    ValueError for an empty file; MemoryError when the address space does not hold it.
    """
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path}: the file is empty")
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(f"{path}: no memory to map the file") from error
    # A step reads all weights once: with huge pages, where the file system has them, fewer misses of the TLB.
    with contextlib.suppress(OSError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.ndarray(len(mapped), np.uint8, mapped)


def is_mapped(array: Any) -> bool:
    """Whether it is a view of a mapped file, which takes no memory of its own."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)
