"""The kernels' launchers and device memory, called with ctypes; C structs as Python sees them, passes, 16-bit floats.

The library is $RAST_CUDA_LIBRARY (kernels and backend with all symbols visible); by default the one built for the host
against the emulation in tests/cuda_emulation/ ($CUDA_EMULATION_FLAVOUR: its sanitizer), made when it is missing or old.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parents[2]
FULL = bool(os.environ.get("RAST_TEST_FULL"))
EMULATED = "RAST_CUDA_LIBRARY" not in os.environ
FLAVOUR = os.environ.get("CUDA_EMULATION_FLAVOUR", "plain")

F32, BF16, F16 = 0, 1, 2
TYPES = {"f32": F32, "bf16": BF16, "f16": F16}
BLOCK = 32
OF_ROWS, OF_OUTS = 0, 2

Array = npt.NDArray[Any]

I32, U64, SIZE, F = ctypes.c_int32, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_float
POINTER = ctypes.c_void_p

DrawType = np.dtype(
    [
        *((name, "f4") for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
        ("top_k", "i4"),
        ("flags", "u4"),
        ("stream", "u8"),
        ("position", "u4"),
        *((name, "i4") for name in ("target", "slot", "draft", "limit", "mask")),
        *((name, "i4") for name in ("logits_row", "scores_row", "parts_row")),
    ],
    align=True,
)
DrawnType = np.dtype(
    [
        ("token", "i4"),
        ("logprob", "f4"),
        ("base_token", "i4"),
        ("base_logprob", "f4"),
        ("kl", "f4"),
        ("bad", "i4"),
    ],
    align=True,
)


class RastWeight(ctypes.Structure):
    _fields_ = (("data", U64), ("out", I32), ("in_", I32), ("type", I32), ("stride", SIZE))


class RastMM(ctypes.Structure):
    _fields_ = (("x", U64), ("y", U64), ("w", POINTER), ("bias", POINTER))


class RastPass(ctypes.Structure):
    _fields_ = (
        *((name, I32) for name in ("n_models", "cap_rows", "cap_segs", "cap_out", "cap_ctx", "act_type")),
        *((name, U64) for name in ("count", "token", "drawn", "pos", "row_seg", "seg_row", "seg_ctx", "block_table")),
        ("table_stride", I32),
        *((name, U64) for name in ("prefix_blocks", "out_row")),
    )


class RastKV(ctypes.Structure):
    _fields_ = (
        ("base", POINTER),
        ("block_stride", SIZE),
        ("v_offset", SIZE),
        *((name, I32) for name in ("type", "n_heads", "n_kv_heads", "head_dim")),
    )


class RastLogits(ctypes.Structure):
    _fields_ = (
        *((name, I32) for name in ("n_terms", "n_out", "n_vocab", "n_valid")),
        ("terms", POINTER),
        *((name, U64) for name in ("coef", "draw", "history", "allowed")),
        ("history_words", I32),
        *((name, U64) for name in ("out", "drawn", "logits", "scores", "parts")),
    )


class RastTransferTerm(ctypes.Structure):
    _fields_ = (("logits", U64), ("stride", SIZE), ("n_rows", I32), ("uncommon", U64), ("n_uncommon", I32))


# What a launcher takes behind the stream.
_LAUNCHERS: dict[str, tuple[Any, ...]] = {
    "embed": (POINTER, POINTER, U64),
    "norm": (POINTER, ctypes.c_int, U64, U64, POINTER, I32, I32, F, U64, I32),
    "bias": (POINTER, POINTER, U64),
    "rope_kv": (POINTER, U64, U64, U64, U64, I32, POINTER),
    "attention": (POINTER, U64, POINTER, I32, F, U64, U64),
    "glu": (POINTER, U64, U64, I32, U64),
    "gather": (POINTER, U64, U64, I32, U64),
    "copy_blocks": (POINTER, I32, SIZE, U64, I32),
    "convert": (U64, I32, U64, I32, SIZE),
    "transfer": (POINTER, POINTER, I32, I32, U64),
    "saved": (U64, U64, I32, I32, U64, SIZE),
}
_SCRATCH: dict[str, tuple[Any, ...]] = {"attention": (POINTER, POINTER), "transfer": (POINTER, I32)}


# ---- 16-bit floats --------------------------------------------------------------------------------------------------


def encode(x: Array, kind: int) -> Array:
    """float32 values as they are stored: rounded to nearest even; uint16 bits where NumPy lacks the type."""
    x = np.ascontiguousarray(x, np.float32)
    if kind == F32:
        return x
    if kind == F16:
        with np.errstate(over="ignore"):
            return x.astype(np.float16)
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def decode(stored: Array, kind: int) -> Array:
    """The float32 values of what encode() gives."""
    if kind == BF16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def storage(shape: Sequence[int], kind: int) -> Array:
    """An array as encode() gives, of values that no test computes."""
    return encode(np.full(shape, 123.0, np.float32), kind)


# ---- device ---------------------------------------------------------------------------------------------------------


class Memory:
    """Allocations on the device."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.addresses: list[ctypes.c_void_p] = []
        self.kept: list[Any] = []

    def to_device(self, array: Array, misaligned: int = 0) -> int:
        """A copy of the array, `misaligned` bytes behind where an allocation begins."""
        array = np.ascontiguousarray(array)
        p = ctypes.c_void_p()
        assert self.library.cudaMalloc(ctypes.byref(p), SIZE(max(array.nbytes + misaligned, 1))) == 0
        self.addresses.append(p)
        address = int(p.value or 0) + misaligned
        if array.nbytes:
            assert self.library.cudaMemcpy(POINTER(address), POINTER(array.ctypes.data), SIZE(array.nbytes), 1) == 0
        return address

    def to_host(self, address: int, array: Array) -> Array:
        """Fills the array with what is at the address."""
        assert array.flags.c_contiguous
        assert self.library.cudaMemcpy(POINTER(array.ctypes.data), POINTER(address), SIZE(array.nbytes), 2) == 0
        return array

    def weights(self, arrays: Sequence[Array], kind: int, padding: int = 0, misaligned: int = 0) -> Any:
        """`const rast_weight *const *` of a matrix or vector for each model; rows are `padding` elements apart."""
        weights = []
        for array in arrays:
            rows = array.reshape(-1, array.shape[-1])
            padded = np.pad(encode(rows, kind), ((0, 0), (0, padding)))
            weights.append(
                RastWeight(self.to_device(padded, misaligned), len(rows), rows.shape[1], kind, padded.strides[0])
            )
        pointers = (ctypes.POINTER(RastWeight) * len(weights))(*(ctypes.pointer(w) for w in weights))
        self.kept += [weights, pointers]
        return pointers

    def free(self) -> None:
        for p in self.addresses:
            assert self.library.cudaFree(p) == 0


@cache
def emulated_library() -> Path:
    """Kernels and backend against the emulation; built when they are out of date."""
    sanitizer = "" if FLAVOUR == "plain" else FLAVOUR
    command = ["make", "--silent", "-j2", "-f", "tests/cuda_emulation/Makefile", f"SANITIZE={sanitizer}"]
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer's runtime
    made = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    return ROOT / "build" / "emulated" / FLAVOUR / "librast_cuda.so"


class Device:
    """The library. Launchers are methods: device.embed(pass, weights, y)."""

    def __init__(self) -> None:
        path = emulated_library() if EMULATED else Path(os.environ["RAST_CUDA_LIBRARY"])
        self.library = ctypes.CDLL(str(path))
        for name in ("cudaMalloc", "cudaMemcpy", "cudaFree", "cudaDeviceSynchronize", "cudaGetLastError"):
            getattr(self.library, name).restype = ctypes.c_int
        for name, arguments in _LAUNCHERS.items():
            if not hasattr(self.library, f"rast_kernel_{name}"):
                continue
            getattr(self.library, f"rast_kernel_{name}").argtypes = (POINTER, *arguments)
            getattr(self.library, f"rast_kernel_{name}").restype = None
        for name, arguments in _SCRATCH.items():
            if not hasattr(self.library, f"rast_kernel_{name}_scratch"):
                continue
            getattr(self.library, f"rast_kernel_{name}_scratch").argtypes = arguments
            getattr(self.library, f"rast_kernel_{name}_scratch").restype = SIZE

    def __getattr__(self, name: str) -> Any:
        if name not in _LAUNCHERS:
            raise AttributeError(name)
        launcher = getattr(self.library, f"rast_kernel_{name}")

        def launch(*arguments: Any) -> None:
            launcher(
                None, *(ctypes.addressof(x) if isinstance(x, ctypes.Structure | ctypes.Array) else x for x in arguments)
            )
            self.check()

        return launch

    def scratch(self, name: str, *arguments: Any) -> int:
        function = getattr(self.library, f"rast_kernel_{name}_scratch")
        return int(function(*(ctypes.addressof(x) if isinstance(x, ctypes.Structure) else x for x in arguments)))

    @contextlib.contextmanager
    def memory(self) -> Iterator[Memory]:
        memory = Memory(self.library)
        try:
            yield memory
        finally:
            memory.free()

    def schedule(self, seed: int) -> None:
        """Orders of threads, blocks and streams from now on, where devices are emulated; 0: the natural ones."""
        if EMULATED:
            self.library.cuda_emulation_seed(U64(seed))

    def check(self) -> None:
        assert self.library.cudaGetLastError() == 0
        assert self.library.cudaDeviceSynchronize() == 0


# ---- passes ---------------------------------------------------------------------------------------------------------

WRONG = 1 << 29  # in the padding of descriptors: used as an index, it leaves all memory


class Pass:
    """A pass of segments, each (keys before it, rows), on the device; capacities are padded beyond what lives.

    table: [segments, entries] logical blocks, no two equal.
    """

    def __init__(
        self,
        memory: Memory,
        rng: np.random.Generator,
        segments: Sequence[tuple[int, int]],
        n_models: int = 1,
        act_type: int = F32,
        tokens: Sequence[int] = (),
        drawn: Sequence[int] = (),
        outs: Sequence[int] = (),
        padding: tuple[int, int, int] = (3, 1, 2),
        cap_ctx: int = 0,
    ) -> None:
        self.segments = list(segments)
        self.n_rows = sum(n for _, n in segments)
        self.cap_rows, self.cap_segs = self.n_rows + padding[0], len(segments) + padding[1]
        self.outs, self.cap_out = list(outs), len(outs) + padding[2]
        cap_ctx = max(cap_ctx, *(before + n for before, n in segments))
        stride = -(-cap_ctx // BLOCK)
        self.positions = [before + i for before, n in segments for i in range(n)]
        self.row_seg = [s for s, (_, n) in enumerate(segments) for _ in range(n)]
        self.seg_row = list(np.cumsum([0] + [n for _, n in segments]))
        needed = [-(-(before + n) // BLOCK) for before, n in segments]
        self.n_blocks = sum(needed) + 2
        free = list(rng.permutation(self.n_blocks))
        self.table = np.full((self.cap_segs, stride), WRONG, np.int32)
        for s, n in enumerate(needed):
            self.table[s, :n] = [free.pop() for _ in range(n)]

        def ints(values: Sequence[int], cap: int) -> int:
            padded = np.full(cap, WRONG, np.int32)
            padded[: len(values)] = values
            return memory.to_device(padded)

        self.c = RastPass(
            n_models=n_models,
            cap_rows=self.cap_rows,
            cap_segs=self.cap_segs,
            cap_out=self.cap_out,
            cap_ctx=cap_ctx,
            act_type=act_type,
            count=ints([self.n_rows, len(segments), len(outs)], 3),
            token=ints(tokens, self.cap_rows),
            drawn=ints(drawn, len(drawn)),
            pos=ints(self.positions, self.cap_rows),
            row_seg=ints(self.row_seg, self.cap_rows),
            seg_row=ints(self.seg_row, self.cap_segs + 1),
            seg_ctx=ints([before + n for before, n in segments], self.cap_segs),
            block_table=memory.to_device(self.table),
            table_stride=stride,
            out_row=ints(outs, self.cap_out),
        )
