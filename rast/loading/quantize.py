"""Quantized weights: what the option is called, which roles it is for, and quantizing matrices as they are loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .weights import Tensor

# Types that matrices are quantized to -> (elements of a block, bytes of a row's block). See csrc/rast.h.
BLOCKS: Mapping[str, tuple[int, int]] = {"int8": (32, 34), "int4": (32, 20), "int4-64": (64, 36)}

NONE = "none"  # floats, whatever the file holds
QUANTIZATIONS = (NONE, *BLOCKS)

# Types that a file may hold and that are taken for what was asked for.
AS_GOOD: Mapping[str, frozenset[str]] = {
    "int8": frozenset({"Q8_0"}),
    "int4": frozenset({"Q4_0", "Q4_1"}),
    "int4-64": frozenset(),
}

_CHUNK = 1 << 22  # elements a thread quantizes at a time
_ARENA = 1 << 26  # bytes that matrices share: NumPy asks for huge pages for such, not for each of them
_LINE = 64  # bytes of a cache line, where matrices begin

Quantization = str | Mapping[str, str | None] | None


def quantization_by_role(option: Quantization, roles: Iterable[str]) -> dict[str, str | None]:
    """What each of `roles` ("base", "expert", "expert 2", …) is quantized to; None: as stored.

    `option` is one name for all, or a mapping to names or None; "expert" and "antiexpert" there mean those of every
    pair.
    """
    roles = list(roles)
    if option is None or isinstance(option, str):
        option = {} if option is None else dict.fromkeys(roles, option)
    elif not isinstance(option, Mapping):
        raise TypeError(f"quantization must be a name, a mapping from roles to names or None, not {option!r}")
    known = list(dict.fromkeys(name for role in roles for name in (role, role.split()[0])))
    for role, name in option.items():
        if role not in known:
            raise ValueError(f"quantization names the role {role!r}; the roles here are {', '.join(known)}")
        if name is not None:
            check_name(name)
    return {role: option.get(role, option.get(role.split()[0])) for role in roles}


def check_name(name: object) -> None:
    if not isinstance(name, str) or name not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, not {name!r}")


def aligned(memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return memory[-memory.ctypes.data % _LINE :]


class Quantizer:
    """Quantizes matrices to one type; remembers those that it cannot.

    Set `total` to the bytes of all matrices that will come, for `progress`.
    """

    def __init__(self, type: str, file: Path, progress: Callable[[str, int, int], None] | None) -> None:
        self.type = type
        self.total = 0
        self._file = file
        self._progress = progress
        self._done = 0
        self._left: list[tuple[str, int]] = []
        self._arena = np.empty(0, np.uint8)  # what is left of it

    def fits(self, columns: int) -> bool:
        return columns % BLOCKS[self.type][0] == 0

    def leave(self, name: str, columns: int) -> None:
        self._left.append((name, columns))

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """A matrix [rows, columns] quantized: uint8 [rows of whole tiles, bytes of a row]."""
        array, dtype = tensor
        group, block = BLOCKS[self.type]
        tile = _core.TILE_ROWS
        rows, columns = array.shape
        if not self.fits(columns):
            self.leave(name, columns)
            self._advance(array.nbytes)
            return tensor
        out = self._new(-(-rows // tile) * tile, columns // group * block)
        step = max(1, _CHUNK // max(1, columns * tile)) * tile

        def part(begin: int) -> int:
            chunk = array[begin : begin + step]
            _core.quantize(chunk, dtype, self.type, out[begin : begin + step])
            return chunk.nbytes

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            try:
                for done in pool.map(part, range(0, rows, step)):
                    self._advance(done)
            except ValueError as error:
                raise ValueError(
                    f"{self._file}: tensor {name!r} cannot be quantized to {self.type}: {error}"
                ) from error
        return out, self.type

    def _new(self, rows: int, row_bytes: int) -> NDArray[np.uint8]:
        size = rows * row_bytes
        if size > _ARENA // 4:  # large enough by itself; what is left of the arena serves smaller ones
            out = aligned(np.empty(size + _LINE, np.uint8))
        else:
            if aligned(self._arena).size < size:
                self._arena = np.empty(max(size + _LINE, min(_ARENA, self.total)), np.uint8)
            out = aligned(self._arena)
            self._arena = out[size:]
        return out[:size].reshape(rows, row_bytes)

    def _advance(self, n_bytes: int) -> None:
        self._done += n_bytes
        if self._progress is not None:
            self._progress(f"quantizing {self._file.name}", self._done, self.total)

    def warnings(self) -> list[str]:
        if not self._left:
            return []
        name, columns = self._left[0]
        return [
            f"{self._file}: {len(self._left)} matrices stay as they are stored, because their rows are not a multiple "
            f"of {BLOCKS[self.type][0]} (first: {name!r}, rows of {columns})"
        ]
