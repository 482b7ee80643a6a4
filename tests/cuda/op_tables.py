"""Op tables of the backends (csrc/backends/backend.h), called as the engine does: the CPU's and CUDA's alike."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from device import I32, POINTER, ROOT, SIZE, U64, Array, F, RastWeight, encode

_ERROR_BYTES = 504
_INT = ctypes.c_int

_OPS: dict[str, tuple[Any, ...]] = {  # rast_ops: functions in their order, (result, arguments ...)
    "open": (_INT, POINTER, POINTER, POINTER),
    "close": (None, POINTER),
    "isa": (ctypes.c_char_p, POINTER),
    "n_threads": (I32, POINTER),
    "alloc": (_INT, POINTER, SIZE, _INT, POINTER, POINTER),
    "release": (None, POINTER, U64),
    "memory": (_INT, POINTER, POINTER, POINTER),
    "bind": (_INT, POINTER, POINTER, I32, POINTER, POINTER),
    "unbind": (None, POINTER, POINTER),
    "queue_new": (_INT, POINTER, POINTER, POINTER),
    "queue_free": (None, POINTER),
    "begin": (_INT, POINTER, U64),
    "submit": (_INT, POINTER, POINTER, POINTER),
    "reserve": (_INT, POINTER, POINTER),
    "wait": (_INT, POINTER, U64, POINTER),
    "depend": (None, POINTER, U64),
    "copy": (None, POINTER, U64, U64, SIZE, _INT),
    "embed": (None, POINTER, POINTER, POINTER, U64),
    "norm": (None, POINTER, POINTER, _INT, U64, U64, POINTER, I32, I32, F, U64, I32),
    "matmul": (None, POINTER, POINTER, POINTER, I32),
    "rope_kv": (None, POINTER, POINTER, U64, U64, U64, U64, I32, POINTER),
    "attention": (None, POINTER, POINTER, U64, POINTER, I32, F, U64),
    "glu": (None, POINTER, POINTER, U64, U64, I32, U64),
    "gather": (None, POINTER, POINTER, U64, U64, I32, U64),
    "combine": (None, POINTER, POINTER),
    "copy_blocks": (None, POINTER, POINTER, I32, SIZE, U64, I32),
}


class RastOps(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        *((name, I32) for name in ("replays", "overlaps", "asynchronous", "copies_weights", "cache_percent")),
        *((name, ctypes.CFUNCTYPE(*types)) for name, types in _OPS.items()),
    )


class RastPlugin(ctypes.Structure):
    _fields_ = (("abi", ctypes.c_uint32), ("ops_bytes", SIZE), ("ops", ctypes.POINTER(RastOps)))


class RastDevice(ctypes.Structure):
    _fields_ = (*((name, I32) for name in ("kind", "index", "n_threads")), ("isa", POINTER), ("plugin", POINTER))


class RastTensor(ctypes.Structure):
    _fields_ = (("name", POINTER), ("data", POINTER), ("dtype", I32), ("n_dims", I32), ("shape", SIZE * 2))


def host_library(folder: Path, source: str) -> Any:
    """A C file of this folder with the core, for the host."""
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer's runtime
    library, archive = folder / f"{source}.so", ROOT / "build" / "librast.a"
    compiler = ["cc", "-shared", "-fPIC", "-std=c11", "-pthread", str(Path(__file__).with_name(source)), str(archive)]
    for command in (["make", "--silent", "build/librast.a"], [*compiler, "-lm", "-ldl", "-o", str(library)]):
        made = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stdout + made.stderr
    return ctypes.CDLL(str(library))


class Table:
    """An open device. Ops are methods that are given a queue: run() makes one."""

    def __init__(self, ops: RastOps, n_threads: int = 0) -> None:
        assert ops.name in (b"cpu", b"cuda")
        self.ops, self.on_cpu = ops, ops.name == b"cpu"
        self.error = ctypes.create_string_buffer(_ERROR_BYTES)
        self.context, self.queue = ctypes.c_void_p(), ctypes.c_void_p()
        device = RastDevice(kind=0 if self.on_cpu else 1, n_threads=n_threads)
        self._must(ops.open(ctypes.byref(device), ctypes.byref(self.context), self.error))
        self._must(ops.queue_new(self.context, ctypes.byref(self.queue), self.error))
        self.allocated: list[U64] = []
        self.bound: list[RastWeight] = []
        self.kept: list[Any] = []

    def _must(self, status: int) -> None:
        assert status == 0, self.error.raw[4:].split(b"\0")[0].decode()

    def close(self) -> None:
        self.free()
        self.ops.queue_free(self.queue)
        self.ops.close(self.context)

    def free(self) -> None:
        """Releases all arrays and weights."""
        for weight in self.bound:
            self.ops.unbind(self.context, ctypes.byref(weight))
        for address in self.allocated:
            self.ops.release(self.context, address)
        for values in (self.bound, self.allocated, self.kept):
            values.clear()

    def run(self, record: Callable[[Any], None]) -> None:
        """Submits what record(queue) records, and waits."""
        event = U64()
        assert self.ops.begin(self.queue, 0) == 0
        record(self.queue)
        self._must(self.ops.submit(self.queue, ctypes.byref(event), self.error))
        self._must(self.ops.wait(self.context, event, self.error))

    def to_device(self, array: Array) -> int:
        """A copy of the array."""
        array, address = np.ascontiguousarray(array), U64()
        self._must(self.ops.alloc(self.context, max(array.nbytes, 1), 0, ctypes.byref(address), self.error))
        self.allocated.append(address)
        self.run(lambda q: self.ops.copy(q, address, array.ctypes.data, array.nbytes, 0))
        return int(address.value)

    def to_host(self, address: int, array: Array) -> Array:
        """Fills the array with what is at the address."""
        assert array.flags.c_contiguous
        self.run(lambda q: self.ops.copy(q, array.ctypes.data, address, array.nbytes, 1))
        return array

    def weights(self, arrays: Sequence[Array], kind: int, act_type: int) -> Any:
        """`const rast_weight *const *` of a matrix or vector for each model."""
        first = len(self.bound)
        for array in arrays:
            stored = encode(array, kind)
            self.kept.append(stored)
            shape = (SIZE * 2)(*stored.shape)
            tensor = RastTensor(data=stored.ctypes.data, dtype=kind, n_dims=stored.ndim, shape=shape)
            weight = RastWeight()
            self._must(self.ops.bind(self.context, ctypes.byref(tensor), act_type, ctypes.byref(weight), self.error))
            self.bound.append(weight)
        made = self.bound[first:]
        pointers = (ctypes.POINTER(RastWeight) * len(made))(*(ctypes.pointer(w) for w in made))
        self.kept.append(pointers)
        return pointers
