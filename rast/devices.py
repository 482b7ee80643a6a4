"""Which device a model runs on: the CPU, or a CUDA device through a plugin that is loaded when first asked for."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from rast import _core

PLUGIN = "RAST_CUDA_PLUGIN"
"""Environment variable: path of the CUDA backend, in place of the one beside this file."""

_CUBLAS = ("libcublasLt.so.13", "libcublas.so.13")  # in the order in which they need each other
_HINT = "see 'CUDA' in README.md, or use device='cpu'"


@dataclass(frozen=True)
class Device:
    """A device that was found to work, or the CPU."""

    kind: str  # "cpu" or "cuda", as _core.Model takes it
    index: int = 0
    plugin: str | None = None
    reason: str = ""  # why it is this one, where that was not asked for

    @property
    def name(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


def choose(device: str, *, quantized: bool = False) -> Device:
    """The device of a name: "cpu", "cuda", "cuda:N", or "auto", which is cuda where that works.

    `quantized`: the weights are to be quantized, which only the CPU does.

    Raises:
        ValueError: no such name; quantized weights on CUDA.
        RuntimeError: CUDA does not work here; the message says what is missing.
        MemoryError: the named device has no memory left to start with.
    """
    if not isinstance(device, str):
        raise TypeError(f"device must be a string, not {device!r}")
    match = re.fullmatch(r"cuda(?::(\d{1,6}))?", device)
    if device not in ("auto", "cpu") and not match:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', not {device!r}")
    if device == "cpu":
        return Device("cpu")
    if quantized:
        if match:
            raise ValueError(
                f"quantization='int8' and 'int4' are for the CPU, and device={device!r} computes with floats: "
                "use quantization='none' (or nothing), or device='cpu'"
            )
        return Device("cpu", reason="weights are quantized")
    try:
        return _cuda(int(match[1] or 0) if match else 0)
    except (RuntimeError, MemoryError) as error:
        if match and isinstance(error, MemoryError):
            raise
        if match:
            raise RuntimeError(f"device {device!r} cannot be used: {error}; {_HINT}") from None
        return Device("cpu", reason=str(error))


def _cuda(index: int) -> Device:
    """A device number, if it works."""
    path = os.environ.get(PLUGIN) or str(Path(__file__).with_name("_cuda.so"))
    if not os.path.exists(path):
        if os.environ.get(PLUGIN):
            raise RuntimeError(f"${PLUGIN} names {path}, which does not exist")
        raise RuntimeError("this build of rast has no CUDA backend (it is built where nvcc and cuBLAS are found)")
    _load_cublas()
    _core.check_device("cuda", index, path)
    return Device("cuda", index, path)


def _load_cublas() -> None:
    """Loads cuBLAS from NVIDIA's wheel, so that the plugin, which asks for it by name, gets this one."""
    folders = [Path(entry) / "nvidia" / "cu13" / "lib" for entry in sys.path]
    found = [folder for folder in folders if (folder / _CUBLAS[-1]).exists()]
    for path in [found[0] / name for name in _CUBLAS] if found else []:
        try:
            ctypes.CDLL(str(path))
        except OSError as error:
            raise RuntimeError(f"cuBLAS cannot be loaded: {error}") from None
