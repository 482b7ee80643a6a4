"""Contestants in processes of their own that take turns, so that changes in the machine's speed meet all alike."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peers

START_LIMIT = 600.0  # seconds: loading, perhaps quantizing
CALL_LIMIT = 600.0


class MissingError(Exception):
    """A contestant's library is not installed."""


class DidNotFinishError(Exception):
    """A contestant took longer than its limit; its process is gone."""


def _memory_status(name: str) -> int:
    """A size of this process, in bytes: VmHWM is the most that was resident, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


def _serve(pipe: Connection, kind: str, options: dict[str, Any]) -> None:
    """Runs in the contestant's process: makes it, then answers calls of its methods until the pipe is closed."""
    try:
        peer = peers.find(kind)(**options)
        pipe.send(("value", peer.facts()))
        while True:
            method, args = pipe.recv()
            value = _memory_status("VmHWM") if method == "peak_bytes" else getattr(peer, method)(*args)
            pipe.send(("value", value))
    except (EOFError, BrokenPipeError):
        pass  # nobody asks any more
    except ImportError as error:
        pipe.send(("missing", str(error)))
    except Exception:
        pipe.send(("error", traceback.format_exc()))


class Contestant:
    """A peer in a process of its own. Its methods are called by name, one at a time."""

    def __init__(self, kind: str, variables: dict[str, str], **options: Any) -> None:
        """`variables` of the environment are set for it; `options` are its class's."""
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self.kind = kind
        self._process = context.Process(target=_serve, args=(other, kind, options), daemon=True)
        before = os.environ.copy()
        os.environ.pop("OPENBLAS_CORETYPE", None)  # would bind NumPy's BLAS to the code of another CPU
        os.environ.update(variables)
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        other.close()
        self.facts: dict[str, Any] = self._receive(START_LIMIT)

    def call(self, method: str, *args: Any, limit: float = CALL_LIMIT) -> Any:
        self._pipe.send((method, args))
        return self._receive(limit)

    def _receive(self, limit: float) -> Any:
        if not self._pipe.poll(limit):
            self.close()
            raise DidNotFinishError(f"{self.kind} did not finish in {limit:.0f} s")
        try:
            outcome, value = self._pipe.recv()
        except EOFError:
            self.close()
            raise RuntimeError(f"the process of {self.kind} ended (exit status {self._process.exitcode})") from None
        if outcome == "value":
            return value
        self.close()
        raise MissingError(value) if outcome == "missing" else RuntimeError(f"{self.kind}: {value}")

    def cpu_seconds(self) -> float:
        """CPU time of its process so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OtherWork:
    """What share of the machine's CPU time went to other processes (or other virtual machines) since it was made."""

    def __init__(self, contestants: list[Contestant]) -> None:
        self._contestants = contestants
        self._start = self._now()

    def _now(self) -> tuple[float, float, float]:
        fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        tick = os.sysconf("SC_CLK_TCK")
        idle = fields[3] + fields[4]
        own = sum(os.times()[:2]) + sum(contestant.cpu_seconds() for contestant in self._contestants)
        return sum(fields) / tick, (sum(fields) - idle) / tick, own

    def share(self) -> float:
        total, busy, own = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return max(0.0, busy - own) / total if total else 0.0


def measure(runs: dict[str, Callable[[], float]], rounds: int, warm_up: bool = True) -> dict[str, list[float]]:
    """`rounds` results of each, taking turns. A round before them warms everything up and is not counted."""
    results: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(0 if warm_up else 1, rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            value = run()
            if i:
                results[name].append(value)
            took = time.perf_counter() - start
            print(f"  {f'round {i}' if i else 'warm-up'}: {name} {value:.4g} ({took:.1f} s)", file=sys.stderr)
    return results
