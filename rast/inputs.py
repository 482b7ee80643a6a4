"""Token ids in all the forms that callers have them in, made into one 1-D int32 array for each prompt."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Ids", "Mask", "Prompts", "as_array", "check_callable", "read_integer", "read_prompts"]

Ids = ArrayLike | Sequence[NDArray[np.integer[Any]]] | Sequence[Sequence[int]]
Mask = ArrayLike | Sequence[NDArray[Any]] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Prompts:
    """The prompts of one call without padding, and where they stood in the input."""

    ids: list[NDArray[np.int32]]
    start: list[int]
    """Index of a prompt's first token in its input row."""
    width: int
    """Length of the input's rows; of the longest for a list of different lengths."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def longest(self) -> int:
        return max(map(len, self.ids))


def read_prompts(input_ids: Ids, attention_mask: Mask | None = None) -> Prompts:
    """Strips padding and checks all that can be checked without a model.

    Raises:
        TypeError: text, floats, booleans.
        ValueError: wrong number of dimensions, an empty prompt, negative ids, a mask that does not fit the ids or has
            zeros between ones.
    """
    rows = _rows(input_ids, "input_ids")
    masks = None if attention_mask is None else _rows(attention_mask, "attention_mask")
    if masks is not None:
        _check_shape(masks, rows)
    ids: list[NDArray[np.int32]] = []
    start: list[int] = []
    for r, row in enumerate(rows):
        first, last = (0, len(row)) if masks is None else _span(masks[r], r)
        row = row[first:last]
        if not len(row):
            raise ValueError(f"input_ids: the prompt of row {r} is empty")
        if row.dtype.kind not in "iu":
            raise TypeError(f"input_ids must hold integers, not {row.dtype}")
        wrong = np.flatnonzero((row < 0) | (row > np.iinfo(np.int32).max))
        if len(wrong):
            raise ValueError(f"input_ids: {row[wrong[0]]} in row {r}, position {first + wrong[0]} is not a token id")
        ids.append(np.ascontiguousarray(row, dtype=np.int32))
        start.append(first)
    return Prompts(ids, start, max(map(len, rows)))


def _check_shape(masks: list[NDArray[Any]], rows: list[NDArray[Any]]) -> None:
    must = "attention_mask must have the shape of input_ids"
    if len(masks) != len(rows):
        raise ValueError(f"{must}: it has {len(masks)} rows, and they {len(rows)}")
    for r, (mask, row) in enumerate(zip(masks, rows, strict=True)):
        if len(mask) != len(row):
            raise ValueError(f"{must}: row {r} has {len(mask)} entries, and {len(row)} ids")


def check_callable(value: Any, name: str) -> None:
    """Callbacks may be None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable, not {value!r:.80}")


def read_integer(value: Any, name: str, low: int, high: int = 2**31 - 1) -> int:
    """Any integer, Python's or NumPy's, from low to high; an error that names the argument."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be an integer, not a boolean")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r:.80}") from None
    if number < low:
        raise ValueError(f"{name} must be {f'at least {low}' if low else 'non-negative'}, not {number}")
    if number > high:
        raise ValueError(f"{name} must be at most {high}, not {number}")
    return number


def as_array(value: Any, name: str) -> NDArray[Any]:
    """NumPy's array of value, or an error that names the argument."""
    if isinstance(value, list | tuple) and any(isinstance(v, bool) for v in value) and name == "input_ids":
        raise TypeError(f"{name} must hold integers, not booleans")
    try:
        return np.asarray(value)
    except ValueError:
        raise ValueError(
            f"{name} must be a regular array, but its parts have different lengths: {value!r:.80}"
        ) from None


def _rows(value: Any, name: str) -> list[NDArray[Any]]:
    """The 1-D rows of a 1-D or 2-D array, a list of numbers, or a list of rows."""
    if isinstance(value, str | bytes) or (isinstance(value, list | tuple) and any(isinstance(v, str) for v in value)):
        hint = ": use model.tokenizer.encode(text)" if name == "input_ids" else ""
        what = "integers" if name == "input_ids" else "zeros and ones"
        raise TypeError(f"{name} must hold {what}, not text{hint}")
    if isinstance(value, Mapping):
        raise TypeError(f"{name} must be ids, not a mapping: pass a tokenizer's output as **inputs")
    if isinstance(value, list | tuple) and any(
        isinstance(v, list | tuple | np.ndarray) and np.ndim(as_array(v, name)) for v in value
    ):
        rows = [as_array(v, name) for v in value]
        if any(row.ndim != 1 for row in rows):
            raise ValueError(f"{name} must be a list of 1-D rows, an array [batch, length] or one row [length]")
        return rows
    array = as_array(value, name)
    if array.dtype == object:
        raise TypeError(f"{name} must hold integers, not {type(value).__name__} {value!r:.80}")
    if array.ndim not in (1, 2):
        raise ValueError(
            f"{name} must be an array [batch, length], one row [length] or a list of rows, not {array.ndim}-D"
        )
    if array.ndim == 2 and not len(array):
        raise ValueError(f"{name} has no rows")
    return list(np.atleast_2d(array))


def _span(mask: NDArray[Any], row: int) -> tuple[int, int]:
    """First and end of the ones in a mask: zeros only before and after."""
    if len(mask) and mask.dtype.kind not in "biuf":
        raise TypeError(f"attention_mask must hold zeros and ones, not {mask.dtype}")
    ones = np.flatnonzero(mask)
    if not len(ones):
        return 0, 0
    if np.any(mask[ones] != 1):
        raise ValueError(f"attention_mask: row {row} has values other than 0 and 1")
    first, last = int(ones[0]), int(ones[-1]) + 1
    if last - first != len(ones):
        raise ValueError(f"attention_mask: row {row} has zeros between ones; padding is at the ends only")
    return first, last
