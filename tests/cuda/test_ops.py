"""The kernels but attention and the transfer step, against NumPy in float64."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from device import (
    BF16,
    BLOCK,
    F16,
    F32,
    FULL,
    OF_OUTS,
    OF_ROWS,
    TYPES,
    Array,
    Device,
    Memory,
    Pass,
    RastKV,
    decode,
    encode,
    storage,
)

ROUNDING = {F32: 2.0**-22, BF16: 2.0**-8, F16: 2.0**-10}
kinds = pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)


def rows_of(rng: np.random.Generator, *shape: int) -> Array:
    return rng.normal(0, 1, shape).astype(np.float32)


def close(got: Array, kind: int, want: Array, slack: float = 1e-6) -> None:
    """What is stored is the wanted value, rounded to its type."""
    np.testing.assert_allclose(decode(got, kind).astype(np.float64), want, rtol=ROUNDING[kind] + 4 * slack, atol=slack)


def untouched(got: Array, kind: int) -> None:
    np.testing.assert_array_equal(got, storage(got.shape, kind))


def some(values: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """All cases in the long tests, every third in the short ones."""
    return values if FULL else values[::3]


SHAPES = some([(n, dim, m) for n in (1, 5, 33, 70) for dim in (1, 31, 64, 250, 1028) for m in (1, 3)])


@kinds
@pytest.mark.parametrize(("n", "dim", "n_models"), SHAPES)
def test_embed(device: Device, memory: Memory, kind: int, n: int, dim: int, n_models: int) -> None:
    rng = np.random.default_rng([1, kind, n, dim, n_models])
    tables = [rows_of(rng, 40, dim) for _ in range(n_models)]
    drawn = [int(t) for t in rng.integers(0, 40, 7)]
    tokens = [int(t) for t in rng.integers(-7, 40, n)]
    p = Pass(memory, rng, [(0, n)], n_models, tokens=tokens, drawn=drawn)
    y = memory.to_device(storage((n_models, p.cap_rows, dim), F32))
    device.embed(p.c, memory.weights(tables, kind, padding=dim % 3), y)
    got = memory.to_host(y, storage((n_models, p.cap_rows, dim), F32))
    ids = [t if t >= 0 else drawn[-1 - t] for t in tokens]
    for m in range(n_models):
        np.testing.assert_array_equal(got[m, :n], decode(encode(tables[m], kind), kind)[ids])
    untouched(got[:, n:], F32)


NORMS = some(
    [
        (n, dim, group, m)
        for n in (1, 7, 70)
        for dim, group in ((1, 1), (64, 64), (70, 35), (128, 32), (514, 514), (1536, 1536), (1030, 1030))
        for m in (1, 2)
    ]
)


@kinds
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(("n", "dim", "group", "n_models"), [*NORMS, (1, 18000, 18000, 1), (1, 4500, 4501 - 1, 1)])
def test_norm(
    device: Device, memory: Memory, kind: int, joined: bool, n: int, dim: int, group: int, n_models: int
) -> None:
    rng = np.random.default_rng([2, kind, n, dim, group, joined])
    extent = OF_OUTS if n % 2 else OF_ROWS
    p = Pass(memory, rng, [(0, n)], n_models, outs=range(n))
    cap = p.cap_out if extent == OF_OUTS else p.cap_rows
    x, add = storage((n_models, cap, dim), F32), storage((n_models, cap, dim), F32)
    x[:, :n], add[:, :n] = rows_of(rng, n_models, n, dim), rows_of(rng, n_models, n, dim)
    x[-1, n // 2, dim // 2] = np.nan
    w = [rows_of(rng, group) for _ in range(n_models)]
    at = memory.to_device(x)
    y = memory.to_device(storage(x.shape, kind))
    device.norm(
        p.c, extent, at, memory.to_device(add) if joined else 0, memory.weights(w, kind), dim, group, 1e-5, y, kind
    )
    stream, got = memory.to_host(at, x.copy()), memory.to_host(y, storage(x.shape, kind))
    want = (x + add if joined else x)[:, :n]
    np.testing.assert_array_equal(stream[:, :n], want)
    np.testing.assert_array_equal(stream[:, n:], x[:, n:])
    untouched(got[:, n:], kind)
    groups = want.astype(np.float64).reshape(n_models, n, -1, group)
    scaled = groups / np.sqrt(np.mean(groups**2, axis=-1, keepdims=True) + 1e-5)
    weight = np.stack([decode(encode(v, kind), kind) for v in w]).astype(np.float64)
    close(got[:, :n], kind, (scaled * weight[:, None, None]).reshape(n_models, n, dim), 2e-6)


@pytest.mark.parametrize("group", [40, 160, 1000])
def test_norm_in_place(device: Device, memory: Memory, group: int) -> None:
    rng = np.random.default_rng([3, group])
    p = Pass(memory, rng, [(0, 5)])
    x, w = rows_of(rng, 1, p.cap_rows, 2 * group), rows_of(rng, group)
    y = memory.to_device(x)
    device.norm(p.c, OF_ROWS, y, 0, memory.weights([w], F32), 2 * group, group, 1e-6, y, F32)
    got = memory.to_host(y, x.copy())
    groups = x.astype(np.float64).reshape(1, -1, 2, group)
    want = groups / np.sqrt(np.mean(groups**2, axis=-1, keepdims=True) + 1e-6) * w
    close(got[:, :5], F32, want.reshape(x.shape)[:, :5])
    np.testing.assert_array_equal(got[:, 5:], x[:, 5:])


@kinds
@pytest.mark.parametrize(("n", "dim", "n_models"), SHAPES)
def test_bias(device: Device, memory: Memory, kind: int, n: int, dim: int, n_models: int) -> None:
    rng = np.random.default_rng([4, kind, n, dim])
    p = Pass(memory, rng, [(0, n)], n_models)
    x = rows_of(rng, n_models, p.cap_rows, dim)
    bias = [rows_of(rng, dim) for _ in range(n_models)]
    y = memory.to_device(x)
    device.bias(p.c, memory.weights(bias, kind), y)
    got = memory.to_host(y, x.copy())
    for m in range(n_models):
        np.testing.assert_array_equal(got[m, :n], x[m, :n] + decode(encode(bias[m], kind), kind))
    np.testing.assert_array_equal(got[:, n:], x[:, n:])


@kinds
@pytest.mark.parametrize(("n", "dim", "n_models"), SHAPES)
def test_glu(device: Device, memory: Memory, kind: int, n: int, dim: int, n_models: int) -> None:
    rng = np.random.default_rng([5, kind, n, dim])
    p = Pass(memory, rng, [(0, n)], n_models, act_type=kind)
    gate, up = 20 * rows_of(rng, n_models, p.cap_rows, dim), rows_of(rng, n_models, p.cap_rows, dim)
    gate[:, :, 0], up[-1, 0, -1] = -200, np.nan
    y = memory.to_device(storage(gate.shape, kind))
    device.glu(p.c, memory.to_device(gate), memory.to_device(up), dim, y)
    got = memory.to_host(y, storage(gate.shape, kind))
    wide = gate.astype(np.float64)
    close(got[:, :n], kind, (wide / (1 + np.exp(-wide)) * up)[:, :n])
    untouched(got[:, n:], kind)


@pytest.mark.parametrize(("n", "dim", "n_models"), SHAPES)
def test_gather(device: Device, memory: Memory, n: int, dim: int, n_models: int) -> None:
    rng = np.random.default_rng([6, n, dim])
    outs = [int(o) for o in rng.integers(-1, n, 2 * n)]
    p = Pass(memory, rng, [(0, n)], n_models, outs=outs)
    x, add = rows_of(rng, n_models, p.cap_rows, dim), rows_of(rng, n_models, p.cap_rows, dim)
    x[:, 0], outs[0] = np.nan, -1
    shape = (n_models, p.cap_out, dim)
    y = memory.to_device(storage(shape, F32))
    p = Pass(memory, rng, [(0, n)], n_models, outs=outs)
    device.gather(p.c, memory.to_device(x), memory.to_device(add), dim, y)
    got = memory.to_host(y, storage(shape, F32))
    want = np.where(np.array(outs)[:, None] < 0, np.float32(0), (x + add)[:, outs])
    np.testing.assert_array_equal(got[:, : len(outs)], want)
    untouched(got[:, len(outs) :], F32)


@pytest.mark.parametrize("stride", [1, 24, 4096, 70001, 33000 * 16])
@pytest.mark.parametrize("n_models", [1, 3])
def test_copy_blocks(device: Device, memory: Memory, stride: int, n_models: int) -> None:
    rng = np.random.default_rng([7, stride])
    pairs = np.array([(4, 1), (4, 2), (0, 3)], np.int32)
    before = [rng.integers(0, 256, (6, stride), np.uint8) for _ in range(n_models)]
    base = (ctypes.c_uint64 * n_models)(*(memory.to_device(b) for b in before))
    device.copy_blocks(base, n_models, stride, memory.to_device(pairs), len(pairs))
    for m in range(n_models):
        want = before[m].copy()
        for source, target in pairs:
            want[target] = before[m][source]
        np.testing.assert_array_equal(memory.to_host(base[m], before[m].copy()), want)


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize(("n", "misaligned"), [(1, 0), (1027, 0), (8192, 0), (1027, 4)])
def test_convert(device: Device, memory: Memory, source: str, target: str, n: int, misaligned: int) -> None:
    """Every value: halves between two neighbours, subnormal, infinite and NaN."""
    rng = np.random.default_rng(8)
    x = rng.integers(0, 1 << 32, n, np.uint32).view(np.float32)
    special = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-11,
        65519.0,
        65520.0,
        2**-24,
        2**-25,
    ]
    x[: len(special)] = special[:n]
    given = encode(x, TYPES[source])
    out = storage((n + 3,), TYPES[target])
    y = memory.to_device(out, misaligned)
    device.convert(memory.to_device(given, misaligned), TYPES[source], y, TYPES[target], n)
    got = memory.to_host(y, out)
    with np.errstate(over="ignore"):
        want = decode(encode(decode(given, TYPES[source]), TYPES[target]), TYPES[target])
    np.testing.assert_array_equal(decode(got[:n], TYPES[target]), want)
    untouched(got[n:], TYPES[target])


@pytest.mark.parametrize(("n_vocab", "padding"), [(1, 0), (70, 2), (257, 3), (1028, 0)])
def test_saved(device: Device, memory: Memory, n_vocab: int, padding: int) -> None:
    """Kept rows replace some rows of a product, whose padding stays."""
    rng = np.random.default_rng([9, n_vocab])
    row = np.array([2, -1, 0, 2, -1], np.int32)
    saved, logits = rows_of(rng, 3, n_vocab), rows_of(rng, len(row), n_vocab + padding)
    at = memory.to_device(logits)
    device.saved(memory.to_device(saved), memory.to_device(row), len(row), n_vocab, at, n_vocab + padding)
    want = logits.copy()
    want[row >= 0, :n_vocab] = saved[row[row >= 0]]
    np.testing.assert_array_equal(memory.to_host(at, logits.copy()), want)


def key_order(kind: int, head_dim: int) -> Array:
    """[head_dim, BLOCK]: where in a head's K a dimension of a token is (kernels/attention.h)."""
    x = 2 if head_dim % 8 else (4 if kind == F32 else 8)
    d, token = np.meshgrid(np.arange(head_dim), np.arange(BLOCK), indexing="ij")
    return (d // x * BLOCK + token) * x + d % x


ROPES = some(
    [
        (heads, kv_heads, head_dim, m, 1000 * m + head_dim)
        for heads, kv_heads in ((1, 1), (4, 2), (7, 1))
        for head_dim in (2, 6, 16, 64, 72, 80, 128, 256, 510)
        for m in (1, 2)
    ]
)


@kinds
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "n_models", "seed"), ROPES)
def test_rope_kv(
    device: Device,
    memory: Memory,
    kind: int,
    interleaved: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    n_models: int,
    seed: int,
) -> None:
    rng = np.random.default_rng([9, seed])
    p = Pass(memory, rng, [(0, 3), (30, 5), (64, 1), (95, 1)], n_models)
    q = rows_of(rng, n_models, p.cap_rows, heads, head_dim)
    k, v = (rows_of(rng, n_models, p.cap_rows, kv_heads, head_dim) for _ in range(2))
    angles = rng.uniform(-4, 4, (96, head_dim // 2)).astype(np.float32)
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    cache = storage((n_models, p.n_blocks, 2, kv_heads, head_dim * BLOCK), kind)
    bases = [memory.to_device(c) for c in cache]
    base = (ctypes.c_uint64 * n_models)(*bases)
    kv = RastKV(ctypes.addressof(base), cache.strides[1], cache.strides[2], kind, heads, kv_heads, head_dim)
    at = memory.to_device(q)
    device.rope_kv(p.c, at, memory.to_device(k), memory.to_device(v), memory.to_device(table), interleaved, kv)

    def rotated(x: Array) -> Array:
        pairs = (x[..., ::2], x[..., 1::2]) if interleaved else np.split(x, 2, axis=-1)
        a, b = (pair.astype(np.float64) for pair in pairs)
        c, s = (table[p.positions, :, i][:, None] for i in range(2))
        a, b = a * c - b * s, b * c + a * s
        return np.stack([a, b], axis=-1).reshape(x.shape) if interleaved else np.concatenate([a, b], axis=-1)

    n = p.n_rows
    got = memory.to_host(at, q.copy())
    np.testing.assert_array_equal(got[:, n:], q[:, n:])
    written = np.zeros(cache.shape, bool)
    order = key_order(kind, head_dim)
    for m in range(n_models):
        close(got[m, :n], F32, rotated(q[m, :n]))
        after, keys = memory.to_host(bases[m], cache[m].copy()), rotated(k[m, :n])
        for r, position in enumerate(p.positions):
            block, token = p.table[p.row_seg[r], position // BLOCK], position % BLOCK
            close(after[block, 0][:, order[:, token]], kind, keys[r])
            values = slice(token * head_dim, (token + 1) * head_dim)
            np.testing.assert_array_equal(after[block, 1][:, values], encode(v[m, r], kind))
            written[m, block, 0, :, order[:, token]] = written[m, block, 1, :, values] = True
        np.testing.assert_array_equal(after[~written[m]], cache[m][~written[m]])
