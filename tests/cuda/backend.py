"""The CUDA backend for the tests of whole models: the emulated one, or with RAST_CUDA_LIBRARY that of a real device."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from device import EMULATED, ROOT, emulated_library


@cache
def library() -> Path:
    """The backend's shared object; the emulated one is built when it is out of date."""
    if not EMULATED:
        return Path(os.environ["RAST_CUDA_LIBRARY"])
    return emulated_library()


class Alive(ctypes.Structure):
    """What has been allocated and not freed, as cuda_emulation_alive tells."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "device_allocations",
            "device_bytes",
            "device_bytes_peak",
            "host_allocations",
            "host_registrations",
            "streams",
            "events",
            "graphs",
            "graph_execs",
            "cublas_handles",
        )
    ]

    def left(self) -> dict[str, int]:
        """What is not zero now."""
        values = {name: getattr(self, name) for name, _ in self._fields_ if name != "device_bytes_peak"}
        return {name: value for name, value in values.items() if value}


class Emulation:
    """The settings of the emulated devices (tests/cuda_emulation/include/cuda_emulation_api.h)."""

    def __init__(self) -> None:
        self.lib: Any = ctypes.CDLL(str(library().with_name("libcuda_emulated.so")))
        self.lib.cuda_emulation_memory.argtypes = [ctypes.c_size_t]
        self.lib.cuda_emulation_seed.argtypes = [ctypes.c_uint64]
        self.lib.cuda_emulation_fail_call.argtypes = [ctypes.c_uint64, ctypes.c_int]
        self.lib.cuda_emulation_fail_work.argtypes = [ctypes.c_uint64, ctypes.c_int]
        self.lib.cuda_emulation_calls.restype = ctypes.c_uint64
        self.lib.cuda_emulation_report.restype = ctypes.c_char_p
        self.defaults()

    def defaults(self) -> None:
        """One sound device of compute capability 9.0 with 4 GiB."""
        self.lib.cuda_emulation_fail_call(0, 0)
        self.lib.cuda_emulation_fail_work(0, 0)
        self.lib.cuda_emulation_driver(13000)
        self.lib.cuda_emulation_devices(1)
        self.lib.cuda_emulation_capability(90)
        self.lib.cuda_emulation_images(80)
        self.lib.cuda_emulation_vague_blas(0)
        self.lib.cuda_emulation_memory(4 << 30)
        self.lib.cuda_emulation_seed(0)
        self.lib.cuda_emulation_reset()

    def alive(self) -> Alive:
        out = Alive()
        self.lib.cuda_emulation_alive(ctypes.byref(out))
        return out


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints, with the backend as plugin."""
    variables = os.environ | {"RAST_CUDA_PLUGIN": str(library()), "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
