"""The CUDA emulation itself (tests/cuda_emulation/): what it computes, in which order, and what it reports.

CUDA_EMULATION_FLAVOUR says which build these tests load (plain); test_flavour runs the kernels' tests in the others.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from ctypes import byref, c_char_p, c_float, c_int, c_longlong, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests" / "cuda_emulation"
FLAVOUR = os.environ.get("CUDA_EMULATION_FLAVOUR", "plain")
FAULTS = (HERE / "planted" / "faults.cu").read_text().splitlines()
SILENT = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "atexit_sleep_ms=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
BAD_VALUE, NO_MEMORY, BAD_LAUNCH, NOT_READY, ILLEGAL, FAILED = 1, 2, 9, 600, 700, 719
UNSUPPORTED, INVALIDATED, UNMATCHED, UNJOINED, ISOLATION, IMPLICIT, CAPTURED = 900, 901, 903, 904, 905, 906, 907
TO_DEVICE, TO_HOST = 1, 2


def build(flavour: str, name: str) -> Path:
    made = ROOT / "build" / "emulated" / flavour / "planted" / name
    run = subprocess.run(
        ["make", "-s", "-j2", "-f", str(HERE / "Makefile"), f"SANITIZE={'' if flavour == 'plain' else flavour}", made],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return made


class Counts(ctypes.Structure):
    names = "launches blocks threads load_requests load_sectors load_bytes store_requests store_sectors store_bytes"
    names += " atomic_requests atomic_sectors atomic_bytes distinct_load_sectors distinct_store_sectors"
    _fields_ = [(name, c_uint64) for name in names.split()]


class Alive(ctypes.Structure):
    names = "device_allocations device_bytes device_bytes_peak host_allocations host_registrations"
    names += " streams events graphs graph_execs cublas_handles"
    _fields_ = [(name, c_uint64) for name in names.split()]


class Dim3(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in "xyz"]


class Device:
    """The library with planted/correct.cu; arrays that live as long as a test."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL(str(build(FLAVOUR, "correct.so")))
        self.lib.cuda_emulation_report.restype = c_char_p
        self.lib.cuda_emulation_kernel.restype = c_char_p
        self.held: list[c_void_p] = []

    def array(self, values: Any) -> c_void_p:
        values = np.ascontiguousarray(values)
        p = c_void_p()
        assert self.lib.cudaMalloc(byref(p), c_size_t(values.nbytes)) == 0
        assert self.lib.cudaMemcpy(p, values.ctypes.data_as(c_void_p), c_size_t(values.nbytes), TO_DEVICE) == 0
        self.held.append(p)
        return p

    def read(self, p: c_void_p, shape: Any, dtype: Any) -> Any:
        out = np.empty(shape, dtype)
        assert self.lib.cudaMemcpy(out.ctypes.data_as(c_void_p), p, c_size_t(out.nbytes), TO_HOST) == 0
        return out

    def stream(self, flags: int = 1) -> c_void_p:
        s = c_void_p()
        assert self.lib.cudaStreamCreateWithFlags(byref(s), flags) == 0
        return s

    def event(self) -> c_void_p:
        e = c_void_p()
        assert self.lib.cudaEventCreateWithFlags(byref(e), 2) == 0
        return e

    def affine(self, y: c_void_p, a: float, b: float, stream: Any) -> None:
        self.lib.launch_affine(y, c_float(a), c_float(b), stream)


@pytest.fixture(scope="module")
def library() -> Device:
    return Device()


@pytest.fixture
def cuda(library: Device) -> Iterator[Device]:
    lib = library.lib
    lib.cuda_emulation_seed(c_uint64(0))
    yield library
    lib.cuda_emulation_devices(1)
    lib.cuda_emulation_driver(13000)
    lib.cuda_emulation_capability(90)
    lib.cuda_emulation_memory(c_size_t(4 << 30))
    lib.cuda_emulation_fail_call(c_uint64(0), 0)
    lib.cuda_emulation_fail_work(c_uint64(0), 0)
    lib.cuda_emulation_reset()
    for p in library.held:
        lib.cudaFree(p)
    library.held.clear()
    lib.cuda_emulation_reset()


# ---- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kernels_blocks(cuda: Device, seed: int) -> None:
    lib, rng = cuda.lib, np.random.default_rng(seed)
    lib.cuda_emulation_seed(c_uint64(seed))
    x = rng.normal(size=(9, 128)).astype(np.float32)
    out = cuda.array(np.zeros(9, np.float32))
    lib.launch_sum(cuda.array(x), out, 9)
    np.testing.assert_allclose(cuda.read(out, 9, np.float32), x.sum(1), atol=1e-4)
    for threads in (32, 96, 1024):
        ids = rng.integers(0, 99, (3, threads)).astype(np.int32)
        out = cuda.array(ids)
        lib.launch_reverse(cuda.array(ids), out, 3, threads, 3, c_size_t(4 * threads))
        np.testing.assert_array_equal(cuda.read(out, ids.shape, np.int32), ids[:, ::-1])
    ids = rng.integers(0, 99, 64).astype(np.int32)
    out = cuda.array(ids)
    lib.launch_exchange(cuda.array(ids), out)
    np.testing.assert_array_equal(cuda.read(out, 64, np.int32), ids + 1)
    ids = rng.integers(0, 99, 20).astype(np.int32)
    out = cuda.array(np.zeros(1, np.int32))
    lib.launch_last_block(cuda.array(ids), cuda.array(ids), cuda.array(np.zeros(1, np.int32)), out, 20)
    assert cuda.read(out, 1, np.int32)[0] == 2 * ids.sum()


def test_kernels_operations(cuda: Device) -> None:
    n, rng = 64, np.random.default_rng(0)
    v = rng.integers(-8, 9, n).astype(np.int32)
    out, total = cuda.array(np.zeros((12, n), np.int32)), cuda.array(np.array([0, -99, 99, 0, 0], np.int32))
    cuda.lib.launch_operations(cuda.array(v), out, total, n)
    got, sums = cuda.read(out, (12, n), np.int32), cuda.read(total, 5, np.int32)
    i = np.arange(32)
    for warp, g in ((v[:32], got[:, :32]), (v[32:], got[:, 32:])):
        ballot = int(np.sum((warp > 0) * (1 << i.astype(np.int64))))
        assert set(g[0].view(np.uint32)) == {ballot}
        assert set(g[1]) == {int((warp > 6).any()) + 2 * int((warp > -9).all())}
        assert set(g[2]) == {warp[3]}
        np.testing.assert_array_equal(g[3], warp[i // 8 * 8 + 3])
        np.testing.assert_array_equal(g[4], warp[np.where(i < 2, i, i - 2)])
        np.testing.assert_array_equal(g[5], warp[np.where(i % 16 + 5 < 16, np.minimum(i + 5, 31), i)])
        np.testing.assert_array_equal(g[6], warp[i ^ 9])
        np.testing.assert_array_equal(g[7, :16], warp[i[:16] ^ 1])
        assert set(g[7, 16:].view(np.uint32)) == {ballot & 0xFFFF0000}
        bits = np.float32(warp[1]).view(np.int32)
        brev = np.array([int(f"{int(x):032b}"[::-1], 2) for x in warp.view(np.uint32)], np.uint32).view(np.int32)
        np.testing.assert_array_equal(g[11], bits ^ brev)
    assert set(got[8]) == {(v > 0).sum()}
    assert set(got[9]) == {int((v == 7).any()) + 2}
    unsigned = [int(x) for x in v.view(np.uint32)]
    want = [
        x.bit_count() + 100 * (32 - x.bit_length()) + 10000 * ((x & -x).bit_length()) for x in unsigned
    ]  # popc, clz, ffs
    np.testing.assert_array_equal(got[10], want)
    assert list(sums[:4]) == [v.sum(), v.max(), v.min(), np.bitwise_or.reduce(v)]
    assert sums[4:5].view(np.float32)[0] == v.sum()


def bf16(x: Any) -> Any:
    """float32 → bfloat16 bits, to nearest even."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def test_kernels_fragments(cuda: Device) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 16, 16)).astype(np.float32)
    out = cuda.array(np.zeros((16, 16), np.float32))
    half = [x.astype(np.float16) for x in (a, b)]
    cuda.lib.launch_product_half(cuda.array(half[0]), cuda.array(half[1]), out)
    want = 2 * half[0].astype(np.float64) @ half[1].astype(np.float64).T
    np.testing.assert_allclose(cuda.read(out, (16, 16), np.float32), want, atol=1e-5)
    brain = [bf16(x) for x in (a, b)]
    cuda.lib.launch_product_bf16(cuda.array(brain[0]), cuda.array(brain[1]), out)
    wide = [(x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for x in brain]
    np.testing.assert_allclose(cuda.read(out, (16, 16), np.float32), 2 * wide[0] @ wide[1].T, atol=1e-5)


def test_kernels_conversions(cuda: Device) -> None:
    """Every half and bfloat16 value, the midpoints between neighbours, and what lies just beside these."""
    everything = np.arange(1 << 16, dtype=np.uint16)
    for kind in ("half", "bf16"):
        if kind == "half":
            exact = everything.view(np.float16).astype(np.float32)
        else:
            exact = (everything.astype(np.uint32) << 16).view(np.float32)
        exact = np.sort(exact[np.isfinite(exact)])
        middle = ((exact[1:].astype(np.float64) + exact[:-1]) / 2).astype(np.float32)
        beside = [np.nextafter(middle, np.float32(s)) for s in (np.inf, -np.inf)]
        large = np.array([np.inf, -np.inf, 3.4e38, -3.4e38, 65519.99, 65520, 1e-45, -1e-45], np.float32)
        x = np.concatenate([exact, middle, *beside, large, [np.float32(np.nan)]]).astype(np.float32)
        out, back = cuda.array(np.zeros(len(x), np.uint16)), cuda.array(np.zeros(len(x), np.float32))
        getattr(cuda.lib, f"launch_convert_{kind}")(cuda.array(x), out, back, len(x))
        got, wide = cuda.read(out, len(x), np.uint16)[:-1], cuda.read(back, len(x), np.float32)
        with np.errstate(over="ignore"):
            want = x[:-1].astype(np.float16).view(np.uint16) if kind == "half" else bf16(x[:-1])
        np.testing.assert_array_equal(got, want)
        assert np.isnan(wide[-1])
        again = (
            want.view(np.float16).astype(np.float32)
            if kind == "half"
            else (want.astype(np.uint32) << 16).view(np.float32)
        )
        np.testing.assert_array_equal(wide[:-1].view(np.uint32), again.view(np.uint32))


GROUPS = 5


def groups(cuda: Device, prior: int, peek: bool) -> tuple[Any, Any, Any]:
    """Tiles behind a wait that leaves out `prior` groups of copies, behind one for all, and as they must be."""
    x = np.arange(GROUPS * 32, dtype=np.int32).reshape(GROUPS, 32)
    out = cuda.array(np.full((2, GROUPS, 32), -5, np.int32))
    cuda.lib.launch_groups(cuda.array(x), out, GROUPS, prior, int(peek))
    got = cuda.read(out, (2, GROUPS, 32), np.int32)
    x[2] = 0
    return got[0], got[1], x


@pytest.mark.parametrize("prior", range(GROUPS + 2))
def test_kernels_copies_in_groups(cuda: Device, prior: int) -> None:
    there = max(GROUPS - prior, 0)
    early, late, want = groups(cuda, prior, peek=False)
    np.testing.assert_array_equal(early, np.where(np.arange(GROUPS)[:, None] < there, want, -5))
    np.testing.assert_array_equal(late, want)


def test_copies_come_at_their_wait(cuda: Device) -> None:
    for prior in range(GROUPS + 2):
        early, late, want = groups(cuda, prior, peek=True)
        there = max(GROUPS - prior, 0)
        np.testing.assert_array_equal(early, np.where(np.arange(GROUPS)[:, None] < there, want, -1))
        np.testing.assert_array_equal(late, want)


def test_kernels_find_fresh_shared_memory(cuda: Device) -> None:
    out = cuda.array(np.zeros(8, np.uint32))
    cuda.lib.launch_fresh(out, 4)
    assert set(cuda.read(out, 8, np.uint32)) == {0xFFFFFFFF}
    p = c_void_p()
    cuda.lib.cudaMalloc(byref(p), c_size_t(64))
    cuda.held.append(p)
    assert set(cuda.read(p, 16, np.uint32)) == {0xFFFFFFFF}


def test_kernels_order(cuda: Device) -> None:
    """Threads and blocks run in their order without a seed, and with one in an order that the seed fixes."""
    seen = {}
    for seed in (0, 1, 2, 1):
        cuda.lib.cuda_emulation_seed(c_uint64(seed))
        ticket = cuda.array(np.zeros((8, 64), np.int32))
        cuda.lib.launch_order(cuda.array(np.zeros(1, np.int32)), ticket, 8, 64)
        got = cuda.read(ticket, (8, 64), np.int32)
        assert sorted(got.ravel()) == list(range(512))
        assert seed not in seen or (seen[seed] == got).all()
        seen[seed] = got
    assert (seen[0].ravel() == np.arange(512)).all()
    assert not (seen[1] == seen[2]).all()
    for seed in (1, 2):
        assert (np.diff(seen[seed][0]) < 0).any()  # threads
        assert (np.diff(seen[seed].min(1)) < 0).any()  # blocks


def test_kernels_are_named_and_counted(cuda: Device) -> None:
    cuda.lib.cuda_emulation_counters_clear()
    cuda.lib.launch_order(cuda.array(np.zeros(1, np.int32)), cuda.array(np.zeros((8, 64), np.int32)), 8, 64)
    cuda.lib.launch_sum(cuda.array(np.zeros(256, np.float32)), cuda.array(np.zeros(2, np.float32)), 2)
    cuda.lib.cudaDeviceSynchronize()
    assert [cuda.lib.cuda_emulation_kernel(i) for i in range(3)] == [b"order_kernel", b"sum_kernel<128>", None]
    counts = Counts()
    assert cuda.lib.cuda_emulation_counters(b"order", byref(counts)) == 1
    assert (counts.launches, counts.blocks, counts.threads) == (1, 8, 512)
    assert cuda.lib.cuda_emulation_counters(None, byref(counts)) == 2
    assert (counts.launches, counts.blocks, counts.threads) == (2, 10, 768)


if FLAVOUR == "count":

    def counted(cuda: Device, name: str, launch: Any) -> Counts:
        cuda.lib.cuda_emulation_counters_clear()
        launch()
        assert cuda.lib.cudaDeviceSynchronize() == 0
        counts = Counts()
        assert cuda.lib.cuda_emulation_counters(name.encode(), byref(counts)) == 1
        return counts

    def test_kernels_transactions(cuda: Device) -> None:
        n = 1024
        x, y = cuda.array(np.zeros(32 * n, np.float32)), cuda.array(np.zeros(n, np.float32))
        whole, part = Dim3(n // 64, 1, 1), Dim3(64, 1, 1)
        c = counted(cuda, "copy", lambda: cuda.lib.launch_copy(x, y, n, byref(whole), byref(part), None))
        assert (c.load_requests, c.load_sectors, c.load_bytes) == (n // 32, n // 8, 4 * n)
        assert (c.store_requests, c.store_sectors, c.store_bytes) == (n // 32, n // 8, 4 * n)
        assert (c.distinct_load_sectors, c.distinct_store_sectors) == (n // 8, n // 8)
        c = counted(cuda, "copy", lambda: cuda.lib.launch_copy(x, y, n - 7, byref(whole), byref(part), None))
        assert (c.load_requests, c.load_sectors, c.load_bytes) == (n // 32, n // 8, 4 * (n - 7))
        c = counted(cuda, "strided", lambda: cuda.lib.launch_strided(x, y, n, 32))
        assert (c.load_requests, c.load_sectors, c.load_bytes) == (n // 32, n, 4 * n)
        c = counted(cuda, "strided", lambda: cuda.lib.launch_strided(x, y, n, 0))
        assert (c.load_requests, c.load_sectors, c.distinct_load_sectors) == (n // 32, n // 32, 1)
        c = counted(cuda, "rows", lambda: cuda.lib.launch_rows(x, y, n, 5))
        assert (c.load_requests, c.load_sectors, c.load_bytes) == (5 * n // 32, 5 * n // 8, 20 * n)
        c = counted(cuda, "vector", lambda: cuda.lib.launch_vector(x, y, n))
        assert (c.load_requests, c.load_sectors, c.load_bytes) == (n // 128, n // 8, 4 * n)
        assert (c.store_requests, c.store_sectors, c.store_bytes) == (n // 128, n // 8, 4 * n)
        for seed in (0, 3):
            cuda.lib.cuda_emulation_seed(c_uint64(seed))
            c = counted(cuda, "sum", lambda: cuda.lib.launch_sum(x, y, 8))
            assert (c.load_sectors, c.store_sectors, c.store_bytes) == (8 * 16, 8, 32)
            c = counted(cuda, "order", lambda: cuda.lib.launch_order(y, x, 4, 64))
            assert (c.atomic_requests, c.atomic_sectors, c.atomic_bytes) == (8, 8, 4 * 256)


# ---- faults ----------------------------------------------------------------------------------------------------------

REPORTED = {  # name → flavours, and what they must say
    **dict.fromkeys(
        [
            "block_race",
            "missing_barrier",
            "warp_race",
            "shuffle_race",
            "other_warp",
            "later_warp",
            "missing_wait",
            "late_wait",
            "short_wait",
            "missing_commit",
            "reused_stage",
            "changed_source",
            "grid_race",
            "grid_barrier_race",
            "fence",
        ],
        (["thread"], "data race"),
    ),
    **dict.fromkeys(["missing_event", "graph_race", "host_race"], (["thread"], "data race")),
    **dict.fromkeys(["read_bounds", "write_bounds", "dynamic_shared"], (["address"], "use-after-poison")),
    "freed": (["address"], "use-after-poison|SEGV"),
    "fixed_shared": (["address"], "out of bounds|global-buffer-overflow"),
    "alignment": (["address"], "misaligned address"),
    "copy_source": (["address"], "use-after-poison"),
    "copy_target": (["plain", "address"], "copy to what is not shared memory"),
    "copy_alignment": (["plain", "address"], "not aligned to its size"),
    "host_pointer": (["plain", "address", "thread"], "an argument points to host memory"),
    "hidden_host_pointer": (["count"], "reads host memory"),
    "device_on_host": (["count"], "host code touches device memory"),
    "product_bounds": (["plain"], "cublasSgemm reads bytes 0 to 80 of an allocation of 76 bytes"),
    "ended_barrier": (["plain", "address", "thread"], "divergent barrier: 40 of 64 threads .* 24 threads have ended"),
    "begun_barrier": (["plain"], "divergent barrier: 40 of 64 threads .* 24 threads have ended"),
    "two_barriers": (["plain", "thread"], "divergent barrier"),
    "ended_lane": (["plain"], "names lanes that have ended|the thread has ended, but lanes wait for it"),
    "unnamed_lane": (["plain"], "reads lane 16, which its mask 0x0000ffff does not name"),
    "not_in_mask": (["plain"], "does not name the calling lane"),
    "different": (["plain"], "lanes of a warp at different operations"),
    "fragment": (["plain"], "is not aligned"),
}
COUNTED = ["read_bounds", "write_bounds", "freed", "dynamic_shared"]  # the counting flavour's own checks
CASES = [(name, flavour, said) for name, (flavours, said) in REPORTED.items() for flavour in flavours]
CASES += [(name, "count", "reads|writes") for name in COUNTED]
NO_LINE = {"host_pointer", "product_bounds"}


def run_fault(flavour: str, *arguments: str, **environment: str) -> tuple[int, str]:
    command = [str(build(flavour, "faults")), *arguments]
    if flavour == "thread":  # its shadow memory wants addresses where they always are
        command = ["setarch", "-R", *command]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **SILENT, **environment}
    )
    return run.returncode, run.stderr + run.stdout


@pytest.mark.parametrize(("name", "flavour", "said"), CASES)
def test_fault_is_reported(name: str, flavour: str, said: str) -> None:
    status, text = run_fault(flavour, name, "wrong")
    assert status != 0, text
    assert re.search(said, text), text
    if name not in NO_LINE:
        lines = [i + 1 for i, line in enumerate(FAULTS) if re.search(rf"// FAULT .*\b{name}\b", line)]
        assert any(re.search(rf"faults\.cu:{line}\b", text) for line in lines), text
    if name not in {"host_race", "device_on_host", "product_bounds"}:
        assert "_kernel" in text


@pytest.mark.parametrize("flavour", ["plain", "address", "thread", "count"])
@pytest.mark.parametrize("seed", range(3))
def test_right_twins_are_silent(flavour: str, seed: int) -> None:
    status, text = run_fault(flavour, "all", "right", CUDA_EMULATION_SEED=str(seed))
    assert (status, text.strip("0\n")) == (0, "")


def test_every_fault_has_a_case() -> None:
    names = set(re.findall(r"FAULT\((\w+)\)", "\n".join(FAULTS))) - {"name"}
    assert names == set(REPORTED)


if FLAVOUR == "plain":
    RUNTIMES = {"address": ["libasan.so", "libstdc++.so.6"], "thread": ["libtsan.so"], "count": []}
    FULL = bool(os.environ.get("RAST_TEST_FULL"))
    # 50 orders of all kernels and a trio in the long tests; in the short ones 3, without large blocks, which are slow
    ORDERS = [f"{first}:{first + 10}" for first in range(1, 51, 10)] if FULL else ["1:4"]
    SHORT = {"address": "not trio", "thread": "attention and (72 or 136) or transfer or rope"}
    # each in a process of its own: ThreadSanitizer's barriers take time by the most threads that there ever were
    ALONE = ["test_norm", "test_attention", "test_trio"]
    PARTS = [*ALONE, f"not ({' or '.join(ALONE)})"]
    # the tests of the backend are about the host's side: one order will do
    KERNELS = ["test_ops.py", "test_attention.py", "test_transfer_step.py", "test_matrix.py", "test_backend.py"]

    def run_flavour(flavour: str, *arguments: str, **environment: str) -> None:
        """pytest, with a sanitizer's runtime in Python; its reports end the process."""
        found = [
            subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
            for name in RUNTIMES[flavour]
        ]
        command = ["setarch", "-R", "env", f"LD_PRELOAD={' '.join(found)}", sys.executable, "-m", "pytest", "-q"]
        variables = {**os.environ, **SILENT, "CUDA_EMULATION_FLAVOUR": flavour, "PYTHONMALLOC": "malloc"}
        variables |= {"TSAN_OPTIONS": "atexit_sleep_ms=0 halt_on_error=1", **environment}
        run = subprocess.run(
            [*command, "-p", "no:cacheprovider", "--capture=sys", *arguments],
            capture_output=True,
            text=True,
            env=variables,
            cwd=ROOT,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert "Sanitizer" not in run.stdout + run.stderr

    @pytest.mark.parametrize("flavour", RUNTIMES)
    def test_flavour(flavour: str) -> None:
        """The kernels' tests above."""
        build(flavour, "correct.so")
        run_flavour(flavour, "--noconftest", "-k", "test_kernels", __file__)

    @pytest.mark.parametrize("orders", ORDERS)
    @pytest.mark.parametrize(
        ("flavour", "part"), [(flavour, part) for flavour in SHORT for part in (PARTS if FULL else [SHORT[flavour]])]
    )
    def test_schedules(flavour: str, part: str, orders: str) -> None:
        """No race, no access out of bounds in rast's kernels and backend, in whatever order things run."""
        tests = ["--confcutdir=tests/cuda", "tests/cuda/test_schedules.py"]
        run_flavour(flavour, "-k", part, *tests, CUDA_SCHEDULES=orders)

    if FULL:

        @pytest.mark.parametrize("name", KERNELS)
        def test_kernels_and_backend_under_address_sanitizer(name: str) -> None:
            conftest = [] if name == "test_backend.py" else ["--confcutdir=tests/cuda"]
            run_flavour("address", *conftest, f"tests/cuda/{name}", CUDA_EMULATION_SEED="1", RAST_TEST_FULL="")


# ---- launches, devices, errors ---------------------------------------------------------------------------------------


def test_launch_limits(cuda: Device) -> None:
    lib, x, y = cuda.lib, cuda.array(np.ones(64, np.float32)), cuda.array(np.zeros(64, np.float32))

    def launch(grid: tuple[int, int, int], block: tuple[int, int, int]) -> int:
        lib.launch_copy(x, y, 64, byref(Dim3(*grid)), byref(Dim3(*block)), None)
        error = lib.cudaPeekAtLastError()
        assert lib.cudaGetLastError() == error
        assert lib.cudaGetLastError() == 0
        return int(error)

    assert launch((1, 1, 1), (64, 1, 1)) == 0
    assert launch((1, 65535, 1), (1, 1, 1)) == 0
    for grid in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 65536, 1), (1, 1, 65536), (1 << 31, 1, 1)):
        assert launch(grid, (32, 1, 1)) == BAD_LAUNCH
    for block in ((0, 1, 1), (1025, 1, 1), (1, 1025, 1), (1, 1, 65), (64, 32, 1)):
        assert launch((1, 1, 1), block) == BAD_LAUNCH
    i = cuda.array(np.zeros(32, np.int32))
    for allowed, shared, error in (
        (None, 48 << 10, 0),
        (None, (48 << 10) + 1, BAD_VALUE),
        (100 << 10, 100 << 10, 0),
        (100 << 10, (100 << 10) + 1, BAD_VALUE),
        (227 << 10, 227 << 10, 0),
    ):
        if allowed:
            assert lib.allow_reverse(allowed) == 0
        lib.launch_reverse(i, i, 1, 32, 1, c_size_t(shared))
        assert lib.cudaGetLastError() == error
    assert lib.allow_reverse((227 << 10) + 1) == BAD_VALUE
    lib.allow_reverse(48 << 10)
    lib.cudaGetLastError()
    assert lib.cudaDeviceSynchronize() == 0


def test_devices(cuda: Device) -> None:
    lib, n = cuda.lib, c_int()
    lib.cuda_emulation_devices(2)
    assert (lib.cudaGetDeviceCount(byref(n)), n.value) == (0, 2)
    p = cuda.array(np.zeros(4))
    assert lib.cudaSetDevice(1) == 0
    lib.launch_affine(p, c_float(1), c_float(1), cuda.stream())  # a stream of this device: fine
    assert lib.cudaGetLastError() == 0
    other = cuda.stream()
    assert lib.cudaSetDevice(2) == 101
    assert lib.cudaSetDevice(0) == 0
    lib.launch_affine(p, c_float(1), c_float(1), other)
    assert lib.cudaGetLastError() == 400
    lib.cuda_emulation_capability(75)
    lib.launch_affine(p, c_float(1), c_float(1), None)
    assert lib.cudaGetLastError() == 209
    lib.cuda_emulation_driver(12040)
    assert lib.cudaGetDeviceCount(byref(n)) == 35
    assert (lib.cudaDriverGetVersion(byref(n)), n.value) == (0, 12040)
    lib.cuda_emulation_driver(13000)
    lib.cuda_emulation_devices(0)
    assert lib.cudaGetDeviceCount(byref(n)) == 100
    assert lib.cudaMalloc(byref(c_void_p()), c_size_t(4)) == 100


def test_memory(cuda: Device) -> None:
    lib, p, q, free, total = cuda.lib, c_void_p(), c_void_p(), c_size_t(), c_size_t()
    before, alive = Alive(), Alive()
    lib.cuda_emulation_alive(byref(before))
    assert lib.cudaMemGetInfo(byref(free), byref(total)) == 0
    most = total.value - free.value + (1 << 20)  # others may hold some
    lib.cuda_emulation_memory(c_size_t(most))
    assert lib.cudaMalloc(byref(p), c_size_t(700_000)) == 0
    assert p.value % 256 == 0
    assert lib.cudaMemGetInfo(byref(free), byref(total)) == 0
    assert (free.value, total.value) == ((1 << 20) - 700_000, most)
    assert lib.cudaMalloc(byref(q), c_size_t(400_000)) == NO_MEMORY
    assert lib.cudaMalloc(byref(q), c_size_t(2**64 - 1)) == NO_MEMORY
    assert lib.cudaGetLastError() == NO_MEMORY
    assert lib.cudaFree(p) == 0
    assert lib.cudaFree(p) == BAD_VALUE
    assert lib.cudaFree(None) == 0
    assert lib.cudaMalloc(byref(q), c_size_t(400_000)) == 0
    host = np.zeros(400_000, np.uint8)
    at = host.ctypes.data_as(c_void_p)
    assert lib.cudaMemcpy(q, at, c_size_t(400_000), TO_DEVICE) == 0
    for to, source, n, kind in (
        (q, at, 400_001, TO_DEVICE),
        (q, at, 4, TO_HOST),
        (at, q, 4, TO_DEVICE),
        (q, at, 4, 3),
        (at, c_void_p(q.value + 1), 400_000, TO_HOST),
        (p, at, 4, TO_DEVICE),  # freed
    ):
        assert lib.cudaMemcpy(to, source, c_size_t(n), kind) == BAD_VALUE
    assert lib.cudaMemcpy(at, q, c_size_t(4), 4) == 0
    assert lib.cudaMemset(q, 0, c_size_t(400_001)) == BAD_VALUE
    assert lib.cudaHostRegister(at, c_size_t(400_000), 0) == 0
    assert lib.cudaHostRegister(c_void_p(at.value + 8), c_size_t(4), 0) == 712
    assert lib.cudaHostUnregister(at) == 0
    assert lib.cudaHostUnregister(at) == 713
    lib.cuda_emulation_alive(byref(alive))
    assert alive.device_allocations == before.device_allocations + 1
    assert alive.device_bytes == before.device_bytes + 400_000
    assert alive.host_registrations == before.host_registrations
    assert lib.cudaFree(q) == 0


def test_injected_failures(cuda: Device) -> None:
    lib, p = cuda.lib, c_void_p()
    x = cuda.array(np.zeros(32, np.float32))
    lib.cuda_emulation_fail_call(c_uint64(2), NO_MEMORY)
    assert lib.cudaDeviceSynchronize() == 0
    assert lib.cudaMalloc(byref(p), c_size_t(4)) == NO_MEMORY
    assert lib.cudaMalloc(byref(p), c_size_t(4)) == 0
    cuda.held.append(p)
    lib.cuda_emulation_fail_call(c_uint64(1), FAILED)
    cuda.affine(x, 1, 1, None)
    assert lib.cudaGetLastError() == FAILED  # which corrupts the context
    assert lib.cudaMalloc(byref(c_void_p()), c_size_t(4)) == FAILED
    assert lib.cudaFree(p) == FAILED
    lib.cuda_emulation_reset()
    assert lib.cudaFree(p) == BAD_VALUE == lib.cudaGetLastError()  # gone with its context
    x = cuda.array(np.zeros(32, np.float32))
    lib.cuda_emulation_fail_call(c_uint64(1), NO_MEMORY)
    assert lib.cublasCreate_v2(byref(p)) == 3
    lib.cuda_emulation_fail_work(c_uint64(2), ILLEGAL)
    for _ in range(3):
        cuda.affine(x, 1, 1, None)
    assert lib.cudaGetLastError() == 0  # the error comes when work runs, and stays
    assert lib.cudaDeviceSynchronize() == ILLEGAL
    assert lib.cudaMalloc(byref(p), c_size_t(4)) == ILLEGAL
    assert lib.cudaGetLastError() == lib.cudaGetLastError() == ILLEGAL
    s, e = c_void_p(1), c_void_p(1)
    assert lib.cudaStreamCreate(byref(s)) == lib.cudaEventCreate(byref(e)) == lib.cudaFree(x) == ILLEGAL
    lib.cuda_emulation_devices(2)  # the other one has a context of its own
    assert lib.cudaSetDevice(1) == 0
    assert lib.cudaMalloc(byref(p), c_size_t(4)) == 0
    assert lib.cudaSetDevice(0) == ILLEGAL
    lib.cuda_emulation_reset()
    assert lib.cudaSetDevice(0) == 0
    assert lib.cudaFree(x) == BAD_VALUE


# ---- streams and graphs ----------------------------------------------------------------------------------------------


def two_streams(cuda: Device, seed: int, wait: bool, flags: int = 1) -> float:
    """y = 0; a: y = y * 2 + 1; b: y = y * 3, after a's if it waits: 3, else 3 or 1."""
    lib = cuda.lib
    a, b, e = cuda.stream(flags), cuda.stream(flags), cuda.event()
    y = cuda.array(np.zeros(32, np.float32))
    assert lib.cudaDeviceSynchronize() == 0
    lib.cuda_emulation_seed(c_uint64(seed))
    cuda.affine(y, 2, 1, a)
    assert lib.cudaEventRecord(e, a) == 0
    if wait:
        assert lib.cudaStreamWaitEvent(b, e, 0) == 0
    cuda.affine(y, 3, 0, b)
    assert lib.cudaDeviceSynchronize() == 0
    return float(cuda.read(y, 32, np.float32)[5])


def test_streams_run_in_any_order_that_events_allow(cuda: Device) -> None:
    assert {two_streams(cuda, seed, wait=True) for seed in range(20)} == {3}
    assert {two_streams(cuda, seed, wait=False) for seed in range(1, 20)} == {1, 3}
    assert two_streams(cuda, 0, wait=False) == 3


def test_work_is_queued(cuda: Device) -> None:
    lib, s, e = cuda.lib, cuda.stream(), cuda.event()
    pinned = c_void_p()
    assert lib.cudaMallocHost(byref(pinned), c_size_t(128)) == 0
    host = np.ctypeslib.as_array(ctypes.cast(pinned, ctypes.POINTER(c_float)), (32,))
    y = cuda.array(np.zeros(32, np.float32))
    host[:] = 1
    assert lib.cudaMemcpyAsync(y, pinned, c_size_t(128), TO_DEVICE, s) == 0
    host[:] = 5  # pinned memory is read when the copy runs
    cuda.affine(y, 1, 1, s)
    assert lib.cudaEventRecord(e, s) == 0
    assert lib.cudaEventQuery(e) == NOT_READY
    while lib.cudaEventQuery(e) == NOT_READY:
        pass
    assert cuda.read(y, 32, np.float32)[0] == 6
    pageable = np.full(32, 2, np.float32)
    assert lib.cudaMemcpyAsync(y, pageable.ctypes.data_as(c_void_p), c_size_t(128), TO_DEVICE, s) == 0
    pageable[:] = 9  # pageable memory was read at the call
    assert lib.cudaMemcpyAsync(pinned, y, c_size_t(128), TO_HOST, s) == 0
    assert host[0] == 5
    assert lib.cudaStreamQuery(s) == NOT_READY
    assert lib.cudaStreamSynchronize(s) == 0
    assert host[0] == 2
    assert lib.cudaStreamQuery(s) == 0
    cuda.affine(y, 1, 1, s)
    assert lib.cudaStreamDestroy(s) == 0  # what is queued runs
    assert cuda.read(y, 32, np.float32)[0] in (2, 3)
    assert lib.cudaDeviceSynchronize() == 0
    assert cuda.read(y, 32, np.float32)[0] == 3
    assert lib.cudaStreamSynchronize(s) == 400
    assert lib.cudaFreeHost(pinned) == 0


def test_legacy_stream_waits_for_blocking_streams(cuda: Device) -> None:
    for seed in range(1, 12):
        cuda.lib.cuda_emulation_seed(c_uint64(seed))
        s, y = cuda.stream(0), cuda.array(np.zeros(32, np.float32))
        cuda.affine(y, 1, 1, s)
        cuda.affine(y, 2, 0, None)
        cuda.affine(y, 1, 1, s)
        assert cuda.lib.cudaDeviceSynchronize() == 0
        assert cuda.read(y, 32, np.float32)[0] == 3


def test_graph(cuda: Device) -> None:
    """Fork to a second stream and join; replayed, with the arguments of the capture and the memory of the day."""
    lib, a, b = cuda.lib, cuda.stream(), cuda.stream()
    fork, join = cuda.event(), cuda.event()
    y, z = cuda.array(np.zeros(32, np.float32)), cuda.array(np.zeros(32, np.float32))
    lib.cudaDeviceSynchronize()
    assert lib.cudaStreamBeginCapture(a, 0) == 0
    cuda.affine(y, 1, 1, a)
    assert lib.cudaEventRecord(fork, a) == 0
    assert lib.cudaStreamWaitEvent(b, fork, 0) == 0
    assert lib.cudaMemcpyAsync(z, y, c_size_t(128), 3, b) == 0
    cuda.affine(z, 10, 0, b)
    assert lib.cudaEventRecord(join, b) == 0
    assert lib.cudaEventQuery(join) == CAPTURED  # and the capture is spoiled
    graph, nodes = c_void_p(), c_size_t()
    assert lib.cudaStreamEndCapture(a, byref(graph)) == INVALIDATED
    assert graph.value is None
    lib.cudaGetLastError()

    assert lib.cudaStreamBeginCapture(a, 0) == 0
    cuda.affine(y, 1, 1, a)
    assert lib.cudaEventRecord(fork, a) == 0
    assert lib.cudaStreamWaitEvent(b, fork, 0) == 0
    assert lib.cudaMemcpyAsync(z, y, c_size_t(128), 3, b) == 0
    cuda.affine(z, 10, 0, b)
    assert lib.cudaEventRecord(join, b) == 0
    assert lib.cudaStreamWaitEvent(a, join, 0) == 0
    cuda.affine(y, 2, 0, a)
    assert lib.cudaStreamEndCapture(a, byref(graph)) == 0
    assert lib.cudaGraphGetNodes(graph, None, byref(nodes)) == 0
    assert nodes.value == 4
    executable = c_void_p()
    assert lib.cudaGraphInstantiate(byref(executable), graph, c_longlong(0)) == 0
    assert lib.cudaGraphDestroy(graph) == 0
    assert cuda.read(y, 32, np.float32)[0] == 0  # nothing has run
    want = 0.0
    for seed in range(8):
        lib.cuda_emulation_seed(c_uint64(seed))
        assert lib.cudaGraphLaunch(executable, a) == 0
        assert lib.cudaStreamSynchronize(a) == 0
        want += 1
        assert cuda.read(z, 32, np.float32)[0] == 10 * want
        want *= 2
        assert cuda.read(y, 32, np.float32)[0] == want
    assert lib.cudaGraphExecDestroy(executable) == 0


def test_capture_faults(cuda: Device) -> None:
    lib, a, b, e = cuda.lib, cuda.stream(), cuda.stream(), cuda.event()
    y, graph, p = cuda.array(np.zeros(32, np.float32)), c_void_p(), c_void_p()
    host = np.zeros(32, np.float32)

    def capture(call: Any, mode: int = 0) -> tuple[int, int]:
        """What a call during a capture returns, and what ends the capture."""
        assert lib.cudaStreamBeginCapture(a, mode) == 0
        cuda.affine(y, 1, 1, a)
        result = call()
        ended = lib.cudaStreamEndCapture(a, byref(graph))
        lib.cudaGetLastError()
        if not ended:
            assert lib.cudaGraphDestroy(graph) == 0
        return int(result), int(ended)

    spoiled = (UNSUPPORTED, INVALIDATED)
    assert capture(lambda: 0) == (0, 0)
    assert capture(lambda: lib.cudaMalloc(byref(p), c_size_t(4))) == spoiled
    assert capture(lambda: lib.cudaMalloc(byref(p), c_size_t(4)), mode=1) == spoiled
    assert capture(lambda: lib.cudaMalloc(byref(p), c_size_t(4)), mode=2) == (0, 0)
    cuda.held.append(p)
    assert capture(lambda: lib.cudaStreamSynchronize(a)) == spoiled
    assert capture(lambda: lib.cudaDeviceSynchronize()) == spoiled
    assert capture(lambda: lib.cudaStreamQuery(a)) == spoiled
    at = host.ctypes.data_as(c_void_p)
    assert capture(lambda: lib.cudaMemcpyAsync(y, at, c_size_t(128), TO_DEVICE, a)) == spoiled
    assert capture(lambda: lib.cudaMemcpy(y, at, c_size_t(128), TO_DEVICE)) == spoiled
    assert lib.cudaEventRecord(e, b) == 0
    assert capture(lambda: lib.cudaStreamWaitEvent(a, e, 0)) == (ISOLATION, INVALIDATED)

    def fork() -> int:
        assert lib.cudaEventRecord(e, a) == 0
        assert lib.cudaStreamWaitEvent(b, e, 0) == 0
        cuda.affine(y, 1, 1, b)
        return 0

    assert capture(fork) == (0, UNJOINED)
    assert capture(lambda: (fork(), lib.cudaStreamEndCapture(b, byref(graph)))[1]) == (UNMATCHED, INVALIDATED)
    assert lib.cudaEventSynchronize(e) == CAPTURED  # it was last recorded in a capture
    assert lib.cudaStreamBeginCapture(None, 0) == UNSUPPORTED
    assert lib.cudaStreamEndCapture(a, byref(graph)) == 401
    blocking = cuda.stream(0)
    assert lib.cudaStreamBeginCapture(blocking, 2) == 0
    assert lib.cudaMemsetAsync(y, 0, c_size_t(4), None) == IMPLICIT
    assert lib.cudaStreamEndCapture(blocking, byref(graph)) == INVALIDATED
    lib.cudaGetLastError()
    assert lib.cudaDeviceSynchronize() == 0
    assert cuda.read(y, 32, np.float32)[0] == 0  # no capture has run anything


# ---- cuBLAS ----------------------------------------------------------------------------------------------------------

F32, F16, BF16 = 0, 2, 14
COMPUTE = 68


def stored(x: Any, kind: int) -> tuple[Any, Any]:
    """As it lies on the device, and the values that are there."""
    if kind == F32:
        return x.astype(np.float32), x.astype(np.float32).astype(np.float64)
    if kind == F16:
        return x.astype(np.float16), x.astype(np.float16).astype(np.float64)
    bits = bf16(x.astype(np.float32))
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.fixture
def handle(cuda: Device) -> Iterator[c_void_p]:
    h = c_void_p()
    assert cuda.lib.cublasCreate_v2(byref(h)) == 0
    yield h
    assert cuda.lib.cublasDestroy_v2(h) == 0
    assert cuda.lib.cublasDestroy_v2(h) == 1


@pytest.mark.parametrize("entry", ["GemmEx", "StridedBatchedEx", "BatchedEx"])
@pytest.mark.parametrize("ta", [0, 1])
@pytest.mark.parametrize("tb", [0, 1])
def test_gemm(cuda: Device, handle: c_void_p, entry: str, ta: int, tb: int) -> None:
    lib, rng = cuda.lib, np.random.default_rng(ta + 2 * tb)
    for kind, kind_c, m, n, k, beta in (
        (F32, F32, 5, 3, 7, 0.5),
        (BF16, F32, 17, 1, 40, 0.0),
        (BF16, BF16, 1, 6, 33, -1.0),
        (F16, F32, 3, 4, 1, 0.0),
        (F16, F16, 8, 8, 16, 2.0),
    ):
        batch = 1 if entry == "GemmEx" else 3
        lda, ldb, ldc = (k if ta else m) + 2, (n if tb else k) + 1, m + 3
        if entry == "BatchedEx":  # takes matrices that begin at multiples of 16 bytes
            lda, ldb, ldc = (-(-ld // 8) * 8 for ld in (lda, ldb, ldc))
        raw_a, a = stored(rng.normal(size=(batch, m if ta else k, lda)), kind)  # columns of `ld`
        raw_b, b = stored(rng.normal(size=(batch, k if tb else n, ldb)), kind)
        start = rng.normal(size=(batch, n, ldc))
        if beta == 0:
            start[:, :, :m] = np.nan  # not read
        raw_c, c = stored(start, kind_c)
        if beta == 0:
            raw_c, c = raw_c.copy(), np.where(np.isnan(start), 0, c)
        da, db, dc = cuda.array(raw_a), cuda.array(raw_b), cuda.array(raw_c)
        alpha, scale = c_float(1.5), c_float(beta)
        head = (handle, ta, tb, m, n, k, byref(alpha))
        if entry == "GemmEx":
            status = lib.cublasGemmEx(*head, da, kind, lda, db, kind, ldb, byref(scale), dc, kind_c, ldc, COMPUTE, -1)
        elif entry == "StridedBatchedEx":
            strides = [c_longlong(x[0].size) for x in (raw_a, raw_b, raw_c)]
            status = lib.cublasGemmStridedBatchedEx(
                *(*head, da, kind, lda, strides[0], db, kind, ldb, strides[1], byref(scale)),
                *(dc, kind_c, ldc, strides[2], batch, COMPUTE, -1),
            )
        else:
            tables = [
                cuda.array(np.array([p.value + i * x[0].nbytes for i in range(batch)], np.uint64))
                for p, x in ((da, raw_a), (db, raw_b), (dc, raw_c))
            ]
            status = lib.cublasGemmBatchedEx(
                *(*head, tables[0], kind, lda, tables[1], kind, ldb, byref(scale)),
                *(tables[2], kind_c, ldc, batch, COMPUTE, -1),
            )
        assert status == 0
        left = a[:, :, : k if ta else m]  # [batch, columns, rows] of what is stored
        right = b[:, :, : n if tb else k]
        op_a = left if ta else left.transpose(0, 2, 1)  # [batch, m, k]
        op_b = right if tb else right.transpose(0, 2, 1)  # [batch, k, n]
        want = 1.5 * op_a @ op_b + beta * c[:, :, :m].transpose(0, 2, 1)
        got = cuda.read(dc, raw_c.shape, raw_c.dtype)
        wide = (got.astype(np.uint32) << 16).view(np.float32) if kind_c == BF16 else got.astype(np.float32)
        tolerance = {F32: 1e-5, F16: 2e-3, BF16: 1e-2}[kind_c]
        np.testing.assert_allclose(wide[:, :, :m].transpose(0, 2, 1), want, rtol=tolerance, atol=tolerance)
        np.testing.assert_array_equal(got[:, :, m:], raw_c[:, :, m:])  # between columns: untouched


def test_gemm_faults(cuda: Device, handle: c_void_p) -> None:
    lib, p, one = cuda.lib, cuda.array(np.zeros(64, np.float32)), c_float(1)

    def gemm(
        m: int = 4,
        lda: int = 4,
        ldb: int = 4,
        ldc: int = 4,
        ta: int = 0,
        ab: int = F32,
        b: int = F32,
        c: int = F32,
        compute: int = COMPUTE,
        h: Any = handle,
        at: Any = p,
    ) -> int:
        tail = (p, b, ldb, byref(one), p, c, ldc, compute, -1)
        return int(lib.cublasGemmEx(h, ta, 0, m, 4, 4, byref(one), at, ab, lda, *tail))

    assert gemm() == 0
    assert gemm(m=-1) == gemm(lda=3) == gemm(ldb=3) == gemm(ldc=3) == gemm(ta=5) == 7
    assert gemm(m=6, lda=6, ldc=6) == 0
    assert gemm(m=6, lda=4, ldc=6) == 7
    assert gemm(m=6, lda=4, ldc=6, ta=1) == 0
    assert gemm(ab=F16, c=BF16) == gemm(ab=F16, b=F32) == gemm(compute=64) == gemm(ab=1, b=1) == 15
    assert gemm(at=c_void_p(p.value + 2)) == 7
    assert gemm(h=None) == 1
    assert lib.cudaDeviceSynchronize() == 0
    assert lib.cublasSetWorkspace_v2(handle, p, c_size_t(256)) == 0
    assert lib.cublasSetWorkspace_v2(handle, p, c_size_t(257)) == 7
    assert lib.cublasSetWorkspace_v2(handle, c_void_p(p.value + 16), c_size_t(16)) == 7
    stream = cuda.stream()
    assert lib.cublasSetStream_v2(handle, stream) == 0
    assert gemm() == 0
    assert lib.cudaStreamQuery(stream) in (0, NOT_READY)
    assert lib.cudaStreamSynchronize(stream) == 0
    lib.cublasSetStream_v2(handle, None)
