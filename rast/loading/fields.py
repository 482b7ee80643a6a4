"""Checked access to the fields of a configuration object: types and ranges, with errors that name file and field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

INT32_MAX = 2**31 - 1


class Fields:
    """Typed reads of one JSON object. A field that is absent or null takes the default; without one it is an error."""

    def __init__(self, data: Mapping[str, Any], file: object, prefix: str = "") -> None:
        self._data = data
        self._prefix = prefix
        self.file = file

    def __contains__(self, name: str) -> bool:
        return name in self._data

    def get(self, name: str) -> Any:
        return self._data.get(name)

    def error(self, name: str, expected: str, value: object) -> ValueError:
        return ValueError(f"{self.file}: {self._prefix}{name} must be {expected}, found {value!r}")

    def _value(self, name: str, default: Any) -> Any:
        value = self._data.get(name)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{self.file}: {self._prefix}{name} is missing")
        return value

    def integer(self, name: str, default: int | None = None, *, most: int = INT32_MAX) -> int:
        """An integer from 1 to `most`."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise self.error(name, f"an integer from 1 to {most}", value)
        return value

    def number(self, name: str, default: float | None = None, above: float | None = None) -> float:
        """A finite number, greater than `above` if given."""
        value = self._value(name, default)
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if not ok or not math.isfinite(value) or (above is not None and value <= above):
            raise self.error(name, "a finite number" + ("" if above is None else f" above {above:g}"), value)
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false", value)
        return value
