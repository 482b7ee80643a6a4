"""Every op of the op table, on the CPU backend and on CUDA, against NumPy in float64, over types and sizes.

RAST_TEST_FULL=1 runs all combinations of what is listed here; otherwise a sample that has every value of every list.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import test_transfer_step as step
from device import (
    BF16,
    BLOCK,
    EMULATED,
    F16,
    F32,
    FULL,
    OF_OUTS,
    OF_ROWS,
    TYPES,
    Array,
    Device,
    DrawnType,
    Pass,
    RastKV,
    RastMM,
    decode,
    emulated_library,
    encode,
    storage,
)
from op_tables import RastOps, RastPlugin, Table, host_library
from test_ops import close, rows_of, untouched

KINDS = list(TYPES.values())
ROWS = [1, 2, 3, 5, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 70]
SIZES = [1, 2, 3, 17, 31, 64, 65, 100, 250, 515, 1030]
MODELS = [1, 3]
HEAD_SIZES = [64, 80, 96, 128, 256]
GROUPS = [1, 2, 3, 4, 5, 6, 7, 8]
CONTEXTS = [1, 2, 31, 32, 33, 64, 65, 255, 257]
LONG_CONTEXTS = [1000, 1025, 4100]


def cases(*lists: Sequence[Any], times: int = 1) -> list[tuple[Any, ...]]:
    """All combinations; or, in the short tests, so few that every value comes `times` times or a little more."""
    if FULL:
        return list(itertools.product(*lists))
    rng, n = np.random.default_rng(len(lists)), times * max(len(values) for values in lists)
    return list(zip(*([values[i % len(values)] for i in rng.permutation(n)] for values in lists), strict=True))


@pytest.fixture(scope="module")
def opened(device: Device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Table]]:
    host = host_library(tmp_path_factory.mktemp("cpu"), "cpu_ops.c")
    host.cpu_ops.restype = ctypes.POINTER(RastOps)
    plugin = RastPlugin.in_dll(device.library, "rast_backend_plugin")
    assert plugin.ops_bytes == ctypes.sizeof(RastOps)
    tables = [Table(host.cpu_ops().contents, n_threads=1), Table(plugin.ops.contents)]
    yield tables
    for table in tables:
        table.close()


@pytest.fixture
def tables(opened: list[Table]) -> Iterator[list[Table]]:
    """The CPU's and CUDA's."""
    yield opened
    for table in opened:
        table.free()


def equal(results: list[Array]) -> Array:
    """What both backends gave, bit for bit."""
    np.testing.assert_array_equal(results[0], results[1])
    return results[1]


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "n", "dim", "n_models"), cases(KINDS, ROWS, SIZES, MODELS))
def test_embed(tables: list[Table], kind: int, n: int, dim: int, n_models: int) -> None:
    rng = np.random.default_rng([1, n, dim])
    embeddings = [rows_of(rng, 40, dim) for _ in range(n_models)]
    drawn, tokens = [int(t) for t in rng.integers(0, 40, 7)], [int(t) for t in rng.integers(-7, 40, n)]
    results = []
    for table in tables:
        p = Pass(table, rng, [(0, n)], n_models, tokens=tokens, drawn=drawn)
        out = storage((n_models, p.cap_rows, dim), F32)
        y, w = table.to_device(out), table.weights(embeddings, kind, kind)
        table.run(lambda q, p=p, w=w, y=y, t=table: t.ops.embed(q, ctypes.byref(p.c), w, y))
        results.append(table.to_host(y, out))
    got = equal(results)
    ids = [t if t >= 0 else drawn[-1 - t] for t in tokens]
    for m in range(n_models):
        np.testing.assert_array_equal(got[m, :n], decode(encode(embeddings[m], kind), kind)[ids])
    untouched(got[:, n:], F32)


NORMS = [*((dim, dim) for dim in SIZES), (2048, 2048), (5000, 5000), (256, 64), (70, 35), (1280, 128)]


@pytest.mark.parametrize(
    ("kind", "joined", "extent", "n", "sizes", "n_models"),
    cases(KINDS, [False, True], [OF_ROWS, OF_OUTS], ROWS[::3] if FULL else ROWS, NORMS, MODELS),
)
def test_norm(
    tables: list[Table], kind: int, joined: bool, extent: int, n: int, sizes: tuple[int, int], n_models: int
) -> None:
    dim, group = sizes
    rng = np.random.default_rng([2, n, dim])
    values, more = rows_of(rng, 2, n_models, n, dim)
    weights = [rows_of(rng, group) for _ in range(n_models)]
    stream = values + more if joined else values
    groups = stream.astype(np.float64).reshape(n_models, n, -1, group)
    scaled = groups / np.sqrt(np.mean(groups**2, axis=-1, keepdims=True) + 1e-5)
    factor = np.stack([decode(encode(v, kind), kind) for v in weights]).astype(np.float64)
    want = (scaled * factor[:, None, None]).reshape(n_models, n, dim)
    for table in tables:
        p = Pass(table, rng, [(0, n)], n_models, outs=range(n))
        cap = p.cap_out if extent == OF_OUTS else p.cap_rows
        x, add = storage((n_models, cap, dim), F32), storage((n_models, cap, dim), F32)
        x[:, :n], add[:, :n] = values, more
        at, y = table.to_device(x), table.to_device(storage(x.shape, kind))
        addend, w = table.to_device(add) if joined else 0, table.weights(weights, kind, kind)
        arguments = (ctypes.byref(p.c), extent, at, addend, w, dim, group, 1e-5, y, kind)
        table.run(lambda q, t=table, a=arguments: t.ops.norm(q, *a))
        x[:, :n] = stream
        np.testing.assert_array_equal(table.to_host(at, x.copy()), x)
        got = table.to_host(y, storage(x.shape, kind))
        close(got[:, :n], kind, want, 2e-6)
        untouched(got[:, n:], kind)


@pytest.mark.parametrize(("kind", "n", "dim", "n_models"), cases(KINDS, ROWS, SIZES, MODELS))
def test_glu(tables: list[Table], kind: int, n: int, dim: int, n_models: int) -> None:
    rng = np.random.default_rng([3, n, dim])
    gate, up = rows_of(rng, 2, n_models, n + 3, dim)
    gate *= 20
    gate[:, :, 0] = -200
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        want = (wide / (1 + np.exp(-wide)) * up)[:, :n]
    for table in tables:
        p = Pass(table, rng, [(0, n)], n_models, act_type=kind)
        y = table.to_device(storage(gate.shape, kind))
        arguments = (ctypes.byref(p.c), table.to_device(gate), table.to_device(up), dim, y)
        table.run(lambda q, t=table, a=arguments: t.ops.glu(q, *a))
        got = table.to_host(y, storage(gate.shape, kind))
        close(got[:, :n], kind, want, 2e-6)
        untouched(got[:, n:], kind)


@pytest.mark.parametrize(("n", "dim", "n_models"), cases(ROWS, SIZES, MODELS))
def test_gather(tables: list[Table], n: int, dim: int, n_models: int) -> None:
    rng = np.random.default_rng([4, n, dim])
    outs = [int(o) for o in rng.integers(-1, n, 2 * n)]
    x, add = rows_of(rng, 2, n_models, n + 3, dim)
    results = []
    for table in tables:
        p = Pass(table, rng, [(0, n)], n_models, outs=outs)
        out = storage((n_models, p.cap_out, dim), F32)
        y = table.to_device(out)
        arguments = (ctypes.byref(p.c), table.to_device(x), table.to_device(add), dim, y)
        table.run(lambda q, t=table, a=arguments: t.ops.gather(q, *a))
        results.append(table.to_host(y, out))
    got = equal(results)
    want = np.where(np.array(outs)[:, None] < 0, np.float32(0), (x + add)[:, outs])
    np.testing.assert_array_equal(got[:, : len(outs)], want)
    untouched(got[:, len(outs) :], F32)


@pytest.mark.parametrize(("stride", "n_pairs", "n_models"), cases([1, 24, 4096, 70001], [1, 3, 40], MODELS))
def test_copy_blocks(tables: list[Table], stride: int, n_pairs: int, n_models: int) -> None:
    rng = np.random.default_rng([5, stride])
    before = rng.integers(0, 256, (n_models, 2 * n_pairs, stride), np.uint8)
    pairs = np.stack([rng.integers(0, n_pairs, n_pairs), n_pairs + rng.permutation(n_pairs)], axis=1).astype(np.int32)
    want = before.copy()
    want[:, pairs[:, 1]] = before[:, pairs[:, 0]]
    for table in tables:
        bases = [table.to_device(blocks) for blocks in before]
        base, at = (ctypes.c_uint64 * n_models)(*bases), table.to_device(pairs)
        table.run(lambda q, t=table, b=base, at=at: t.ops.copy_blocks(q, b, n_models, stride, at, n_pairs))
        for m in range(n_models):
            np.testing.assert_array_equal(table.to_host(bases[m], before[m].copy()), want[m])


# ---- products -------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1), (3, 65), (31, 64), (64, 250), (130, 33), (257, 515)]  # (out, in)
PRODUCTS = [(kind, kind) for kind in KINDS] + [(BF16, F32), (F16, F32), (F32, BF16)]  # types of weights, activations


@pytest.mark.parametrize(("types", "n", "shape", "n_models"), cases(PRODUCTS, ROWS, SHAPES, MODELS, times=2))
def test_matmul(tables: list[Table], types: tuple[int, int], n: int, shape: tuple[int, int], n_models: int) -> None:
    """Jobs as the engine gives them: queries, keys, values of one input; with biases, but for one."""
    (kind, act), (out, n_in) = types, shape
    rng = np.random.default_rng([6, n, out, n_in])
    outs, biased = [out, (out + 1) // 2, (out + 1) // 2], [True, True, False]
    x = encode(rows_of(rng, n_models, n + 3, n_in), act)
    given = decode(x, act).astype(np.float64)[:, :n]
    # values that both types hold: a device may turn weights into the type of the activations
    matrices = [[decode(encode(rows_of(rng, o, n_in), act), act) for _ in range(n_models)] for o in outs]
    biases = [[rows_of(rng, o) for _ in range(n_models)] for o in outs]
    for table in tables:
        p = Pass(table, rng, [(0, n)], n_models, act_type=act)
        at, jobs, ys = table.to_device(x), (RastMM * len(outs))(), []
        for job, o, matrix, bias, has_bias in zip(jobs, outs, matrices, biases, biased, strict=True):
            ys.append(table.to_device(storage((n_models, p.cap_rows, o), F32)))
            job.x, job.y = at, ys[-1]
            job.w = ctypes.addressof(table.weights(matrix, kind, act))
            job.bias = ctypes.addressof(table.weights(bias, kind, act)) if has_bias else None
        table.run(lambda q, t=table, p=p, jobs=jobs: t.ops.matmul(q, ctypes.byref(p.c), jobs, len(jobs)))
        for y, o, matrix, bias, has_bias in zip(ys, outs, matrices, biases, biased, strict=True):
            got = table.to_host(y, storage((n_models, p.cap_rows, o), F32))
            for m in range(n_models):
                w = decode(encode(matrix[m], kind), kind).astype(np.float64)
                b = decode(encode(bias[m], kind), kind).astype(np.float64) * has_bias
                size = abs(given[m]) @ abs(w).T + abs(b)
                error = abs(got[m, :n] - (given[m] @ w.T + b))
                assert np.all(error <= (8 + np.sqrt(n_in)) * 2.0**-24 * size), np.max(error / size)


@pytest.mark.skipif(not EMULATED, reason="calls are counted by the emulation")
@pytest.mark.parametrize(("out", "n_in", "calls"), [(64, 250, 2), (2049, 16384, 3)])
def test_large_products_are_not_batched(tables: list[Table], out: int, n_in: int, calls: int) -> None:
    """Two jobs of one shape, and a third of another: up to 64 MiB of weights the first two are one call."""
    table, rng, outs = tables[-1], np.random.default_rng(3), [out, out, 8]
    p = Pass(table, rng, [(0, 1)], 1, act_type=BF16)
    x, jobs = table.to_device(np.ones((p.cap_rows, n_in), np.uint16)), (RastMM * 3)()
    weights = {o: ctypes.addressof(table.weights([np.ones((o, n_in), np.float32)], BF16, BF16)) for o in outs}
    for job, o in zip(jobs, outs, strict=True):
        job.x, job.y, job.w = x, table.to_device(storage((1, p.cap_rows, o), F32)), weights[o]
    emulation = ctypes.CDLL(str(emulated_library().with_name("libcuda_emulated.so")))
    emulation.cuda_emulation_counters_clear()
    table.run(lambda q: table.ops.matmul(q, ctypes.byref(p.c), jobs, 3))
    counts = (ctypes.c_uint64 * 14)()
    emulation.cuda_emulation_counters(b"cublasGemm", counts)
    assert counts[0] == calls


# ---- rope, cache and attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "interleaved", "head_dim", "group", "n"),
    cases(KINDS, [0, 1], [2, 6, 70, *HEAD_SIZES], GROUPS, ROWS[::3] if FULL else ROWS),
)
def test_rope(tables: list[Table], kind: int, interleaved: int, head_dim: int, group: int, n: int) -> None:
    """Queries. Keys and values come back through attention, below."""
    rng = np.random.default_rng([7, head_dim, group, n])
    queries, keys = rows_of(rng, 2, n + 3, group, head_dim), rows_of(rng, 2, n + 3, 1, head_dim)
    angles = rng.uniform(-4, 4, (n + 30, head_dim // 2)).astype(np.float32)
    turns = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    want = rotated(queries[:, :n].astype(np.float64), turns[30:], interleaved)
    for table in tables:
        p = Pass(table, rng, [(30, n)], 2)
        kv = cache_of(table, p, kind, group, 1, head_dim)
        at = table.to_device(queries)
        k, v, turned = table.to_device(keys), table.to_device(keys), table.to_device(turns)
        arguments = (ctypes.byref(p.c), at, k, v, turned, interleaved, ctypes.byref(kv))
        table.run(lambda q, t=table, a=arguments: t.ops.rope_kv(q, *a))
        got = table.to_host(at, queries.copy())
        close(got[:, :n], F32, want)
        np.testing.assert_array_equal(got[:, n:], queries[:, n:])


def rotated(x: Array, turns: Array, interleaved: int) -> Array:
    """x [.., rows, heads, dim] by turns [rows, dim / 2] (cos, sin)."""
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else np.split(x, 2, axis=-1)
    c, s = turns[:, None, :, 0], turns[:, None, :, 1]
    a, b = a * c - b * s, b * c + a * s
    return np.stack([a, b], axis=-1).reshape(x.shape) if interleaved else np.concatenate([a, b], axis=-1)


def cache_of(table: Table, p: Pass, kind: int, heads: int, kv_heads: int, head_dim: int) -> RastKV:
    """A cache of NaNs: nobody may see what no pass has written."""
    half = BLOCK * kv_heads * head_dim
    nothing = encode(np.full((p.n_blocks, 2, half), np.nan), kind)
    base = (ctypes.c_uint64 * p.c.n_models)(*(table.to_device(nothing) for _ in range(p.c.n_models)))
    table.kept.append(base)
    size = half * nothing.itemsize
    return RastKV(ctypes.addressof(base), 2 * size, size, kind, heads, kv_heads, head_dim)


def quarter_turns(n: int, head_dim: int) -> Array:
    """[n, head_dim / 2] (cos, sin) that turn exactly."""
    quarter = np.arange(n)[:, None] * (1 + np.arange(head_dim // 2)) % 4
    return np.stack([np.array(values, np.float32)[quarter] for values in ((1, 0, -1, 0), (0, 1, 0, -1))], axis=-1)


class Attention:
    """A pass over sequences, all of whose keys go through rope_kv: those before the pass in a pass of their own."""

    def __init__(
        self, kind: int, head_dim: int, group: int, segments: list[tuple[int, int]], window: int = 0, n_models: int = 1
    ) -> None:
        rng = np.random.default_rng([8, kind, head_dim, group, len(segments), segments[0][0]])
        self.kind, self.dim, self.group, self.window, self.n_models = kind, head_dim, group, window, n_models
        self.kv_heads = 1 + group % 2
        self.segments, self.interleaved = segments, group // 2 % 2
        self.q = [[2 * rows_of(rng, n, self.kv_heads * group, head_dim) for _, n in segments] for _ in range(n_models)]
        self.kv = [[rows_of(rng, 2, b + n, self.kv_heads, head_dim) for b, n in segments] for _ in range(n_models)]
        self.turns = quarter_turns(max(b + n for b, n in segments), head_dim)
        self.scale = np.float32(1 / np.sqrt(head_dim))

    def run(self, table: Table) -> Array:
        """[models, rows, heads, dim]"""
        rng = np.random.default_rng(len(self.segments))
        p = Pass(table, rng, self.segments, self.n_models, self.kind)
        kv = cache_of(table, p, self.kind, self.kv_heads * self.group, self.kv_heads, self.dim)
        turns, passes = table.to_device(self.turns), []
        earlier = [s for s, (before, _) in enumerate(self.segments) if before]
        if earlier:
            first = Pass(table, rng, [(0, self.segments[s][0]) for s in earlier], self.n_models, self.kind)
            first.c.block_table = table.to_device(np.ascontiguousarray(p.table[earlier]))
            first.c.table_stride = p.c.table_stride
            queries = np.zeros((self.n_models, first.cap_rows, self.kv_heads * self.group, self.dim), np.float32)
            kept = [[model[s][:, : self.segments[s][0]] for s in earlier] for model in self.kv]
            passes.append((first, table.to_device(queries), *self.upload(table, first, kept)))
        new = [[x[:, b:] for x, (b, _) in zip(model, self.segments, strict=True)] for model in self.kv]
        q = self.padded(p, [np.concatenate(model) for model in self.q])
        passes.append((p, table.to_device(q), *self.upload(table, p, new)))
        y = table.to_device(storage(q.shape, self.kind))

        def record(queue: Any) -> None:
            for which, at, k, v in passes:
                table.ops.rope_kv(queue, ctypes.byref(which.c), at, k, v, turns, self.interleaved, ctypes.byref(kv))
            arguments = (self.window, float(self.scale), y)
            table.ops.attention(queue, ctypes.byref(p.c), passes[-1][1], ctypes.byref(kv), *arguments)

        table.run(record)
        got = table.to_host(y, storage(q.shape, self.kind))
        untouched(got[:, p.n_rows :], self.kind)
        return decode(got[:, : p.n_rows], self.kind)

    def padded(self, p: Pass, models: list[Array]) -> Array:
        rows = np.full((len(models), p.cap_rows, *models[0].shape[1:]), np.nan, np.float32)
        rows[:, : p.n_rows] = models
        return rows

    def upload(self, table: Table, p: Pass, models: list[list[Array]]) -> tuple[int, int]:
        joined = [np.concatenate(segments, axis=1) for segments in models]
        k, v = (table.to_device(self.padded(p, [model[i] for model in joined])) for i in range(2))
        return k, v

    def expected(self, m: int, s: int, on_tensor_cores: bool) -> tuple[Array, Array]:
        """A segment's rows [n, heads, dim], and how far off they may be: test_attention.Scene.expected says why."""
        before, n = self.segments[s]
        k, v = (decode(encode(x, self.kind), self.kind).astype(np.float64) for x in self.stored(m, s))
        q = rotated(self.q[m][s], self.turns[before:][:n], self.interleaved) * self.scale
        if on_tensor_cores:
            q = decode(encode(q, self.kind), self.kind)
        q = q.astype(np.float64).reshape(n, self.kv_heads, self.group, self.dim)
        position, key = before + np.arange(n)[:, None], np.arange(before + n)
        seen = (key <= position) & (key > position - self.window if self.window else True)
        by_head, values = k.transpose(1, 2, 0)[None], v.transpose(1, 0, 2)[None]
        scores = np.where(seen[:, None, None], q @ by_head, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        terms = np.where(seen[:, None, None], abs(q) @ abs(by_head), 0).max(axis=-1, keepdims=True)
        rounding = {F32: 2.0**-23, BF16: 2.0**-8, F16: 2.0**-11}[self.kind]
        y = weights @ values
        inner = (rounding if on_tensor_cores else 0) + 2.0**-22 * terms + 2e-6
        allowed = rounding * abs(y) + inner * (weights @ abs(values))
        shape = (n, self.kv_heads * self.group, self.dim)
        return y.reshape(shape), allowed.reshape(shape)

    def stored(self, m: int, s: int) -> tuple[Array, Array]:
        keys, values = self.kv[m][s]
        return rotated(keys, self.turns[: len(keys)], self.interleaved), values

    def check(self, tables: list[Table]) -> None:
        for table in tables:
            got, first = self.run(table), 0
            for s, (_, n) in enumerate(self.segments):
                for m in range(self.n_models):
                    want, allowed = self.expected(m, s, not table.on_cpu and n > 8 and self.kind != F32)
                    error = abs(got[m, first : first + n] - want)
                    assert np.all(error <= allowed), (table.ops.name, s, m, np.max(error / allowed))
                first += n


@pytest.mark.parametrize(
    ("kind", "head_dim", "group", "n", "alone"),
    cases([F32, BF16], HEAD_SIZES, GROUPS, ROWS[::3] if FULL else ROWS, [True, False], times=2),
)
def test_attention(tables: list[Table], kind: int, head_dim: int, group: int, n: int, alone: bool) -> None:
    """n rows of one sequence each, of all contexts; or n sequences of one row each."""
    contexts = CONTEXTS if FULL else CONTEXTS[group % 3 :: 3]
    if alone:
        segments = [(max(context - n, 0), n) for context in contexts if context >= n or context == contexts[-1]]
    else:
        segments = [(contexts[i % len(contexts)] - 1, 1) for i in range(n)]
    Attention(kind, head_dim, group, segments).check(tables)


@pytest.mark.parametrize(
    ("kind", "head_dim", "group", "context"), cases([F32, BF16], HEAD_SIZES, GROUPS, LONG_CONTEXTS)
)
def test_attention_long(tables: list[Table], kind: int, head_dim: int, group: int, context: int) -> None:
    turn = HEAD_SIZES.index(head_dim) + group + context
    n = ROWS[turn % len(ROWS)] if FULL else 1 + turn % 10
    Attention(kind, head_dim, group, [(context - n, n), (40, 1)]).check(tables)


@pytest.mark.parametrize(
    ("kind", "head_dim", "group", "n", "window"),
    cases([F32, BF16], HEAD_SIZES, [1, 4, 7], [1, 8, 40], [1, 31, 33, 200]),
)
def test_attention_window(tables: list[Table], kind: int, head_dim: int, group: int, n: int, window: int) -> None:
    Attention(kind, head_dim, group, [(290, n), (0, n), (31, n)], window, n_models=2).check(tables)


# ---- the transfer step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "n_out", "n_vocab", "n_terms", "hidden"),
    cases(KINDS, [1, 2, 5, 9, 33, 70], [31, 129, 513, 1027, 2531], [1, 2, 3, 5], [33, 64, 100]),
)
def test_combine(tables: list[Table], kind: int, n_out: int, n_vocab: int, n_terms: int, hidden: int) -> None:
    """Heads and all that follows: parts against products in NumPy, the rest against what follows from these parts."""
    rng = np.random.default_rng([9, n_out, n_vocab, hidden])
    scene = step.random_scene(n_out * n_vocab + n_terms, n_vocab, n_out, n_terms)
    states = [rows_of(rng, n_out, hidden) * 0.4 for _ in scene.logits]
    heads = [rows_of(rng, x.shape[1], hidden) for x in scene.logits]
    for m in range(1, n_terms):  # what is switched off must not matter
        states[m][scene.coef[:, m] == 0] = np.nan
    results = []
    for table in tables:
        result = combine(table, scene, kind, states, heads)
        mine = step.Scene(**vars(scene))
        mine.logits = []
        for m, (x, w) in enumerate(zip(states, heads, strict=True)):
            live = min(len(w), n_vocab)
            stored = [decode(encode(v, kind), kind).astype(np.float64) for v in (x, w[:live])]
            part, used = result.rows["parts"][:, m, :live], (scene.coef[:, m] != 0) | (m == 0)
            size = abs(stored[0]) @ abs(stored[1]).T
            error = abs(part - stored[0] @ stored[1].T)[used]
            assert np.all(error <= (8 + np.sqrt(hidden)) * 2.0**-24 * size[used])
            mine.logits.append(np.pad(part, ((0, 0), (0, len(w) - live))))
        for o in range(n_out):
            step.check(mine, o, result)
        step.check_drawn(mine, result)
        results.append(result)
    for o in np.flatnonzero(results[0].out["token"] != results[1].out["token"]):
        # logits that differ in the last bits draw differently where two ids are as good, or one is at a filter's border
        keys = results[0].rows["scores"][o].astype(np.float64)
        keys += step.gumbel(scene.draw[o], n_vocab) if scene.draw[o]["flags"] & step.SAMPLE else 0
        chosen, other = (keys[result.out["token"][o]] for result in results)
        assert other == -np.inf or abs(chosen - other) <= 1e-3, (o, chosen, other)


def test_arrays_of_a_step_are_read_again(tables: list[Table]) -> None:
    """Ids that mean another token, at the address of others that were given before."""
    rng = np.random.default_rng(10)
    scene = step.plain_scene([np.zeros((2, 129), np.float32)] * 2)
    states, heads = list(rows_of(rng, 2, 2, 8)), list(rows_of(rng, 2, 129, 8))
    scene.uncommon[1] = np.array([3, 60], np.int32)
    for table in tables:
        for ids in ([3, 60], [4, 99]):
            scene.uncommon[1][:] = ids
            rows = combine(table, scene, F32, states, heads).rows
            others = rows["logits"] - rows["parts"].sum(axis=1)
            np.testing.assert_array_equal(np.flatnonzero(abs(others[0]) > 1e-3), ids)


def combine(table: Table, scene: step.Scene, kind: int, states: list[Array], heads: list[Array]) -> step.Result:
    given, rows = step.step_of(scene, table.to_device), step.empty_rows(scene)
    outputs = {"out": np.zeros(scene.n_out, DrawnType), "drawn": np.full(step.SLOTS, -9, np.int32)} | rows
    for name, array in outputs.items():
        setattr(given, name, table.to_device(array))
    given.draw = table.to_device(step.with_rows(scene, step.ROWS | step.MEASURES))
    terms = (step.RastTerm * scene.n_terms)()
    for term, x, w, ids in zip(terms, states, heads, scene.uncommon, strict=True):
        head = table.weights([w], kind, kind)
        term.hidden, term.head = table.to_device(encode(x, kind)), ctypes.addressof(head[0].contents)
        term.hidden_type, term.n_rows = kind, len(w)
        if len(ids):
            term.uncommon, term.n_uncommon = ids.ctypes.data, len(ids)
    given.terms = ctypes.addressof(terms)
    table.run(lambda q: table.ops.combine(q, ctypes.byref(given)))
    for name, array in outputs.items():
        table.to_host(getattr(given, name), array)
    return step.Result(outputs["out"], outputs["drawn"], {name: array[::-1] for name, array in rows.items()})
