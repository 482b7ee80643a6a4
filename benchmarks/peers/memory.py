"""The yardstick: how fast threads read memory when they do nothing else."""

from __future__ import annotations

from typing import Any

from rast.cli.bench import MemoryRead


class Memory:
    def __init__(self, threads: int) -> None:
        self._read = MemoryRead(threads, repeats=5)

    def facts(self) -> dict[str, Any]:
        return {}

    def read(self) -> float:
        """Bytes a second."""
        return self._read()
