"""The model of what a step costs (benchmarks/gpu_costs.py) against what the emulation counts, and the page against it.

Bytes: each of our kernels alone, in the emulation's counting flavour, which a process of its own loads: run as a
program, this file counts and prints. Launches: those of a decode step of a whole trio.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import backend
import numpy as np
import pytest
from device import (
    BF16,
    BLOCK,
    F32,
    OF_ROWS,
    Array,
    Device,
    DrawnType,
    DrawType,
    Memory,
    Pass,
    RastKV,
    RastLogits,
    RastTransferTerm,
)
from oracle import ModelZoo, load_rast

ROOT = Path(__file__).parents[2]

KERNELS = {  # of an op of the model
    "attention": "short_kernel",
    "merge": "merge_kernel",
    "prefill": "long_kernel",
    "product": "cublasGemm",
}


def load_costs() -> ModuleType:
    path = ROOT / "benchmarks" / "gpu_costs.py"
    spec = importlib.util.spec_from_file_location("gpu_costs", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_costs"] = module
    spec.loader.exec_module(module)
    return module


COSTS = load_costs()


class Counts(ctypes.Structure):
    """As cuda_emulation_counters fills it (tests/cuda_emulation/include/cuda_emulation_api.h)."""

    names = "launches blocks threads load_requests load_sectors load_bytes store_requests store_sectors store_bytes"
    names += " atomic_requests atomic_sectors atomic_bytes distinct_load_sectors distinct_store_sectors"
    _fields_ = [(name, ctypes.c_uint64) for name in names.split()]


def counted(library: Any, op: str) -> Counts:
    """Of the kernels of an op of the model, since the counters were cleared."""
    counts = Counts()
    library.cuda_emulation_counters(KERNELS.get(op.split(",")[0], f"{op}_kernel").encode(), ctypes.byref(counts))
    return counts


# ---- what is counted: a launcher with arguments of the shapes that the model is given -------------------------------

NETS = [
    COSTS.Net("two heads a KV head", 2, 512, 4, 2, 1408, 4096, tied=True, head_dim=128),
    COSTS.Net("seven", 2, 896, 14, 2, 1216, 4096, tied=True, head_dim=64),
]
MODELS = 2


def floats(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


def cache_of(memory: Memory, p: Pass, net: Any) -> RastKV:
    """The KV cache of a layer: its values do not matter."""
    bytes_ = 2 * net.kv_heads * net.head_dim * BLOCK * 2
    zeros = np.zeros(p.n_blocks * bytes_, np.uint8)
    base = (ctypes.c_uint64 * p.c.n_models)(*(memory.to_device(zeros) for _ in range(p.c.n_models)))
    memory.kept.append(base)
    return RastKV(ctypes.addressof(base), bytes_, bytes_ // 2, BF16, net.heads, net.kv_heads, net.head_dim)


def attend(device: Device, memory: Memory, net: Any, segments: list[tuple[int, int]]) -> None:
    p = decoding(memory, segments)
    kv, q = cache_of(memory, p, net), memory.to_device(floats(MODELS, p.cap_rows, net.heads * net.head_dim))
    scratch = device.scratch("attention", p.c, kv)
    room = memory.to_device(np.zeros(max(scratch, 1), np.uint8))
    device.attention(p.c, q, kv, 0, 0.1, q_out(memory, p, net), room if scratch else 0)


def q_out(memory: Memory, p: Pass, net: Any) -> int:
    return memory.to_device(np.zeros((MODELS, p.cap_rows, net.heads * net.head_dim), np.uint16))


def decoding(memory: Memory, segments: list[tuple[int, int]], outs: int = 0) -> Pass:
    """A pass whose capacities are the engine's."""
    rows, most = sum(n for _, n in segments), max(before + n for before, n in segments)
    padding = tuple(COSTS.bucket(n) - n for n in (rows, len(segments), max(outs, 1)))
    return Pass(
        memory,
        np.random.default_rng(rows),
        segments,
        MODELS,
        BF16,
        tokens=[7 * i % 64 for i in range(rows)],
        outs=range(outs),
        padding=padding,
        cap_ctx=COSTS.bucket(most),
    )


def draw_greedily(device: Device, memory: Memory, outs: int, vocab: int, terms: int) -> None:
    draw = np.zeros(outs, DrawType)
    for name in ("temperature", "top_p", "repetition_penalty"):
        draw[name] = 1
    for name in ("target", "draft", "mask"):
        draw[name] = -1
    draw["slot"] = np.arange(outs)
    step = RastLogits(
        n_terms=terms,
        n_out=outs,
        n_vocab=vocab,
        n_valid=vocab,
        coef=memory.to_device(np.ones((outs, terms), np.float32)),
        draw=memory.to_device(draw),
        out=memory.to_device(np.zeros(outs, DrawnType)),
        drawn=memory.to_device(np.zeros(outs, np.int32)),
    )
    logits = (memory.to_device(floats(outs, vocab)) for _ in range(terms))
    all_terms = (RastTransferTerm * terms)(*(RastTransferTerm(x, vocab, vocab, 0, 0) for x in logits))
    scratch = memory.to_device(np.zeros(device.scratch("transfer", step, outs), np.uint8))
    device.transfer(step, all_terms, 0, outs, scratch)


Case = tuple[list[Any], Callable[[Device, Memory], None]]


def cases_of(net: Any, contexts: list[int]) -> Iterator[Case]:
    """Launches as the model has them, and a call that makes them, of a decode step."""
    segments, rows, q = [(n - 1, 1) for n in contexts], len(contexts), net.heads * net.head_dim
    kv = net.kv_heads * net.head_dim

    def array(memory: Memory, p: Pass, width: int) -> int:
        return memory.to_device(floats(MODELS, p.cap_rows, width))

    def weights(memory: Memory, *shape: int) -> Any:
        return memory.weights([floats(*shape) for _ in range(MODELS)], BF16)

    def embed(device: Device, memory: Memory) -> None:
        p = decoding(memory, segments)
        device.embed(p.c, weights(memory, 64, net.hidden), array(memory, p, net.hidden))

    def norm(add: bool) -> Callable[[Device, Memory], None]:
        def call(device: Device, memory: Memory) -> None:
            p = decoding(memory, segments)
            x, more = array(memory, p, net.hidden), array(memory, p, net.hidden) if add else 0
            y = memory.to_device(np.zeros((MODELS, p.cap_rows, net.hidden), np.uint16))
            device.norm(p.c, OF_ROWS, x, more, weights(memory, net.hidden), net.hidden, net.hidden, 1e-6, y, BF16)

        return call

    def bias(device: Device, memory: Memory) -> None:
        p = decoding(memory, segments)
        device.bias(p.c, weights(memory, q), array(memory, p, q))

    def rope_kv(device: Device, memory: Memory) -> None:
        p = decoding(memory, segments)
        table = memory.to_device(floats(max(contexts), net.head_dim))
        arrays = (array(memory, p, width) for width in (q, kv, kv))
        device.rope_kv(p.c, *arrays, table, 0, cache_of(memory, p, net))

    def glu(device: Device, memory: Memory) -> None:
        p = decoding(memory, segments)
        y = memory.to_device(np.zeros((MODELS, p.cap_rows, net.inter), np.uint16))
        device.glu(p.c, array(memory, p, net.inter), array(memory, p, net.inter), net.inter, y)

    def gather(device: Device, memory: Memory) -> None:
        p = decoding(memory, segments, outs=rows)
        y = memory.to_device(np.zeros((MODELS, p.cap_out, net.hidden), np.float32))
        device.gather(p.c, array(memory, p, net.hidden), array(memory, p, net.hidden), net.hidden, y)

    yield [COSTS.embed(rows, net)], embed
    for add in (False, True):
        yield [COSTS.norm(rows, net.hidden, net.hidden, net.act, add=add)], norm(add)
    yield [COSTS.bias(rows, q, net.act)], bias
    yield [COSTS.rope_kv(rows, net)], rope_kv
    yield list(COSTS.attention(contexts, net)), lambda device, memory: attend(device, memory, net, segments)
    yield [COSTS.glu(rows, net)], glu
    yield [COSTS.gather(rows, net)], gather


def other_cases() -> Iterator[Case]:
    """What depends on no decode step's rows, or is not a part of one."""
    net = NETS[0]

    def copy(device: Device, memory: Memory) -> None:
        stride = net.kv_token_bytes * BLOCK
        base = (ctypes.c_uint64 * MODELS)(*(memory.to_device(np.zeros(6 * stride, np.uint8)) for _ in range(MODELS)))
        device.copy_blocks(base, MODELS, stride, memory.to_device(np.array([(4, 1), (0, 3)], np.int32)), 2)

    def convert(device: Device, memory: Memory) -> None:
        given = memory.to_device(floats(20000))
        device.convert(given, F32, memory.to_device(np.zeros(20000, np.uint16)), BF16, 20000)

    def saved(device: Device, memory: Memory) -> None:
        logits, rows = memory.to_device(floats(5, 4000)), memory.to_device(np.array([3, 1], np.int32))
        out = memory.to_device(np.zeros((2, 4000), np.float32))
        launch = device.library.rast_kernel_saved
        launch.argtypes = (
            ctypes.c_void_p,
            *[ctypes.c_uint64] * 2,
            *[ctypes.c_int32] * 2,
            ctypes.c_uint64,
            ctypes.c_size_t,
        )
        launch(None, logits, rows, 2, 4000, out, 4000)
        device.check()

    for other in NETS:
        yield [COSTS.prefill(70, 33, other)], lambda device, memory, net=other: attend(device, memory, net, [(70, 33)])
    yield [COSTS.copy_blocks(2, net)], copy
    yield [COSTS.convert(20000, 4, 2)], convert
    yield [COSTS.saved(2, 4000)], saved
    for outs, vocab, terms in ((1, 32000, 3), (3, 9000, 2)):
        yield (
            [COSTS.transfer(outs, vocab, terms)],
            lambda device, memory, shape=(outs, vocab, terms): draw_greedily(device, memory, *shape),
        )


def all_cases() -> Iterator[Case]:
    for net, contexts in zip(NETS, ([600], [40, 300, 270]), strict=True):
        yield from cases_of(net, contexts)
    yield from other_cases()


def count_all() -> list[dict[str, Any]]:
    """For each launch of each case the model's figures and what was counted."""
    device, found = Device(), []
    for launches, call in all_cases():
        with device.memory() as memory:
            device.library.cuda_emulation_counters_clear()
            call(device, memory)
            for launch in launches:
                counts = counted(device.library, launch.op)
                alone = launch.op in ("convert", "saved", "transfer")
                model = launch if alone else launch.batched(MODELS)
                found.append(
                    dict(
                        op=launch.op,
                        launches=counts.launches,
                        model=[model.bytes, model.again],
                        distinct=COSTS.SECTOR * (counts.distinct_load_sectors + counts.distinct_store_sectors),
                        asked=COSTS.SECTOR * (counts.load_sectors + counts.store_sectors),
                    )
                )
    return found


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    make = ["make", "--silent", "-j2", "-f", "tests/cuda_emulation/Makefile", "SANITIZE=count"]
    made = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    library = ROOT / "build" / "emulated" / "count" / "librast_cuda.so"
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "tests", "tests/cuda"))
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"RAST_CUDA_LIBRARY": str(library), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return list(json.loads(done.stdout))


def test_every_kernel_is_counted(found: list[dict[str, Any]]) -> None:
    """Each launch of the model was one launch, and each kernel of ours is among them."""
    assert all(case["launches"] == 1 for case in found), found
    sources = (ROOT / "kernels").glob("*.cu")
    names = {name for path in sources for name in re.findall(r"__global__[^;{]*?(\w+)\([^)]*\) \{", path.read_text())}
    assert {KERNELS.get(case["op"], f"{case['op']}_kernel") for case in found} == names


def test_bytes_of_device_memory(found: list[dict[str, Any]]) -> None:
    """Sectors that a kernel touches, each once: what the model has as bytes."""
    for case in found:
        assert case["distinct"] == pytest.approx(case["model"][0], rel=0.1), case


def test_bytes_through_the_cache(found: list[dict[str, Any]]) -> None:
    """All sectors that its warps ask for: no kernel asks twice for more than the model says."""
    for case in found:
        assert case["asked"] == pytest.approx(sum(case["model"]), rel=0.1), case


def test_launches_of_a_decode_step(zoo: ModelZoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more token is one more decode step: with split attention, and with more rows than a short segment has."""
    monkeypatch.setenv("RAST_CUDA_PLUGIN", str(backend.library()))
    monkeypatch.setenv("RAST_CUDA_GRAPHS", "0")
    shape = dict(hidden_size=64, intermediate_size=104, num_attention_heads=4, num_key_value_heads=2, vocab_size=311)
    folders = zoo.trio("qwen2", **shape)
    model = load_rast(*folders, device="cuda", dtype="bfloat16")
    layers = [json.loads((folder / "config.json").read_text())["num_hidden_layers"] for folder in folders]
    base, small = (COSTS.Net("", n, 64, 4, 2, 104, 311, tied=False, head_dim=16) for n in layers[:2])
    library = backend.Emulation().lib

    def launches(prompts: list[Array], n: int) -> dict[str, int]:
        library.cuda_emulation_counters_clear()
        model.generate(prompts, max_new_tokens=n, do_sample=False, num_assistant_tokens=0, pad_token_id=0)
        ops = [*KERNELS, "transfer", "embed", "norm", "bias", "rope_kv", "glu", "gather"]
        return {op: counted(library, op).launches for op in ops}

    for lengths in ([5], [300, 7], [4] * 9):
        # not the same prompts twice, whose beginnings are kept
        two, three = (launches([(np.arange(k) + n) % 300 for k in lengths], n) for n in (2, 3))
        expected = Counter(launch.op.split(",")[0] for launch in COSTS.step(base, small, [n + 2 for n in lengths]))
        assert {op: three[op] - two[op] for op in three} == {op: expected[op] for op in three}, lengths


def test_memory_plan(zoo: ModelZoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model takes on the device when it has been loaded, all but the allocations' alignment."""
    monkeypatch.setenv("RAST_CUDA_PLUGIN", str(backend.library()))
    backend.Emulation()
    shape = dict(hidden_size=64, intermediate_size=104, num_attention_heads=4, num_key_value_heads=2, vocab_size=311)
    folders = zoo.trio("qwen2", **shape)
    layers = [json.loads((folder / "config.json").read_text())["num_hidden_layers"] for folder in folders]
    base, small = (COSTS.Net("", n, 64, 4, 2, 104, 311, tied=False, head_dim=16) for n in layers[:2])
    for context in (200, 5000):
        info = load_rast(*folders, device="cuda", dtype="bfloat16", max_context=context).cache_info()
        work = COSTS.workspace([base, small, small], 9, context)
        assert info["device_work"] == pytest.approx(work, rel=1e-3)
        assert info["device_kept"] == COSTS.KEPT_BYTES + COSTS.on_demand(311)


def test_the_page_is_what_the_model_says() -> None:
    assert (ROOT / "docs" / "gpu-costs.md").read_text() == COSTS.page(), (
        "python benchmarks/gpu_costs.py > docs/gpu-costs.md"
    )


if __name__ == "__main__":
    json.dump(count_all(), sys.stdout)
