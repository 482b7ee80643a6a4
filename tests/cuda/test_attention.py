"""Attention over the paged cache, against NumPy in float64. What a row must not see is NaN: keys and values behind its
position and before its window, the rest of its blocks, other blocks, other rows' queries.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import pytest
from device import BF16, BLOCK, F16, F32, FULL, Array, Device, Memory, Pass, RastKV, RastPass, decode, encode, storage
from test_ops import key_order

Segments = Sequence[tuple[int, int]]
ROUNDING = {F32: 2.0**-23, BF16: 2.0**-8, F16: 2.0**-11}
SHORT = 8  # SHORT_SEGMENT of kernels/attention.h


class Scene:
    """A pass, its cache on the device and the same as arrays: kv [models][segments] [2, kv_heads, context, dim]."""

    def __init__(
        self,
        memory: Memory,
        segments: Segments,
        kind: int,
        head_dim: int,
        heads: int,
        kv_heads: int,
        n_models: int = 1,
        seed: int = 0,
        padding: tuple[int, int, int] = (3, 1, 2),
        cap_ctx: int = 0,
        act_type: int | None = None,
    ) -> None:
        rng = np.random.default_rng([seed, kind, head_dim, heads, kv_heads])
        act_type = kind if act_type is None else act_type
        self.memory, self.kind, self.heads, self.kv_heads, self.dim = memory, kind, heads, kv_heads, head_dim
        self.p = Pass(memory, rng, segments, n_models, act_type, padding=padding, cap_ctx=cap_ctx)
        self.q = rng.normal(0, 2, (n_models, self.p.cap_rows, heads, head_dim)).astype(np.float32)
        self.q[:, self.p.n_rows :] = np.nan
        self.kv = [
            [rng.normal(0, 1, (2, kv_heads, before + n, head_dim)).astype(np.float32) for before, n in segments]
            for _ in range(n_models)
        ]
        self.scale = np.float32(1 / np.sqrt(head_dim))

    def run(self, device: Device, window: int = 0) -> Array:
        """Outputs [models, cap_rows, heads, dim]; nothing but rows of the pass may be written."""
        p, size = self.p, BLOCK * self.dim
        cache = encode(np.full((len(self.kv), p.n_blocks, 2, self.kv_heads, size), np.nan), self.kind)
        order = key_order(self.kind, self.dim)
        for m, model in enumerate(self.kv):
            for s, (k, v) in enumerate(model):
                for at in range(0, k.shape[1], BLOCK):
                    block, n = p.table[s, at // BLOCK], min(BLOCK, k.shape[1] - at)
                    cache[m, block, 0][:, order[:, :n]] = encode(k[:, at : at + n].transpose(0, 2, 1), self.kind)
                    cache[m, block, 1][:, : n * self.dim] = encode(v[:, at : at + n], self.kind).reshape(len(k), -1)
        base = (ctypes.c_uint64 * len(cache))(*(self.memory.to_device(c) for c in cache))
        kv = RastKV(
            ctypes.addressof(base),
            cache.strides[1],
            cache.strides[2],
            self.kind,
            self.heads,
            self.kv_heads,
            self.dim,
        )
        act = p.c.act_type
        y = self.memory.to_device(storage(self.q.shape, act))
        scratch = device.scratch("attention", p.c, kv)
        room = self.memory.to_device(np.full(scratch, 0xFF, np.uint8))  # NaN as floats
        device.attention(p.c, self.memory.to_device(self.q), kv, window, float(self.scale), y, room if scratch else 0)
        got = self.memory.to_host(y, storage(self.q.shape, act))
        np.testing.assert_array_equal(got[:, p.n_rows :], storage(got[:, p.n_rows :].shape, act))
        return decode(got, act)

    def expected(self, m: int, row: int, window: int = 0) -> tuple[Array, Array]:
        """The row's output [heads, dim], and how far off it may be before it is stored: by float32 sums of scores
        and by rounding of probabilities, where they are factors on tensor cores.
        """
        seg, hi = self.p.row_seg[row], self.p.positions[row] + 1
        lo = max(0, hi - window) if window else 0
        k, v = (decode(encode(x[:, lo:hi], self.kind), self.kind).astype(np.float64) for x in self.kv[m][seg])
        q = self.q[m, row] * self.scale
        if self.on_tensor_cores(row):
            q = decode(encode(q, self.kind), self.kind)
        group = self.heads // self.kv_heads
        scores = np.einsum("hgd,hkd->hgk", q.astype(np.float64).reshape(self.kv_heads, group, self.dim), k)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        y, size = (np.einsum("hgk,hkd->hgd", p, x).reshape(self.heads, self.dim) for x in (v, abs(v)))
        terms = np.einsum("hgd,hkd->hgk", abs(q).astype(np.float64).reshape(self.kv_heads, group, self.dim), abs(k))
        inner = ROUNDING[self.kind] if self.on_tensor_cores(row) else 0
        return y, (inner + 2.0**-22 * terms.max() + 2e-6) * size

    def on_tensor_cores(self, row: int) -> bool:
        _, n = self.p.segments[self.p.row_seg[row]]
        return n > SHORT and self.kind != F32 and self.dim % 8 == 0 and self.dim <= 256

    def check(self, device: Device, window: int = 0, rows: Sequence[int] | None = None) -> None:
        got = self.run(device, window)
        for m in range(len(self.kv)):
            for row in range(self.p.n_rows) if rows is None else rows:
                want, inner = self.expected(m, row, window)
                allowed = ROUNDING[self.p.c.act_type] * abs(want) + inner
                error = abs(got[m, row] - want)
                assert np.all(error <= allowed), (
                    f"model {m}, row {row}: {np.max(error / allowed)} times what is allowed"
                )


KINDS = {"f32": F32, "bf16": BF16, "f16": F16}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
sixteen = pytest.mark.parametrize("kind", [BF16, F16], ids=["bf16", "f16"])


@kinds
@pytest.mark.parametrize("head_dim", [2, 6, 8, 40, 64, 70, 80, 96, 104, 128, 256, 264, 510, 512])
def test_head_sizes(device: Device, memory: Memory, kind: int, head_dim: int) -> None:
    Scene(memory, [(40, 1), (0, 12), (3, 3)], kind, head_dim, heads=4, kv_heads=2).check(device)


@kinds
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (6, 2), (4, 1), (7, 1), (8, 1), (10, 1)])
def test_groups(device: Device, memory: Memory, kind: int, heads: int, kv_heads: int) -> None:
    Scene(memory, [(33, 1), (2, 20)], kind, 64, heads, kv_heads, n_models=2).check(device)


@kinds
@pytest.mark.parametrize("group", [1, 2, 4, 7])
def test_one_row_each(device: Device, memory: Memory, kind: int, group: int) -> None:
    """Decoding: no pass of these capacities can hold more than a few rows for each segment."""
    segments = [(context, 1) for context in (0, 1, 30, 31, 32, 63, 64, 255, 256, 300)]
    Scene(memory, segments, kind, 64, 2 * group, 2, padding=(0, 0, 0)).check(device)


@kinds
@pytest.mark.parametrize("n", [1, 2, 5, 8, 9, 23, 70])
@pytest.mark.parametrize("before", [0, 1, 31, 250, 700])
def test_rows(device: Device, memory: Memory, kind: int, n: int, before: int) -> None:
    """Rows to verify and chunks of a prompt, inside a block, across blocks and across chunks of the context."""
    if not FULL and (n + before) % 2:
        before += 1
    Scene(memory, [(before, n)], kind, 64, 6, 2, padding=(0, 0, 0)).check(device)


@kinds
@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 64, 100, 257, 5000])
def test_windows(device: Device, memory: Memory, kind: int, window: int) -> None:
    Scene(memory, [(290, 4), (0, 40), (100, 17), (310, 1)], kind, 64, 4, 2).check(device, window)


@kinds
@pytest.mark.parametrize("context", [1000, 4100])
def test_long_contexts(device: Device, memory: Memory, kind: int, context: int) -> None:
    scene = Scene(memory, [(context - 1, 1), (context - 3, 3), (context - 10, 10)], kind, 64, 2, 1, cap_ctx=8192)
    scene.check(device)


def test_chunks_grow_with_the_capacity(device: Device, memory: Memory) -> None:
    """Room for partial results is bounded: a context of up to 64 Ki keys has 64 chunks of 1024."""
    Scene(memory, [(2100, 2), (40, 1)], BF16, 64, 2, 1, cap_ctx=65536).check(device)
    Scene(memory, [(2100, 2), (40, 1)], BF16, 64, 2, 1, cap_ctx=65536).check(device, window=1030)


def test_room_of_many_rows_is_bounded(device: Device, memory: Memory) -> None:
    """512 rows of 16 heads of 256 would have 16 chunks of 256 keys: they get 4 of 1024, which fit 64 MiB."""
    scene = Scene(memory, [(2100, 2), (40, 1)], BF16, 256, 16, 8, cap_ctx=4096, padding=(509, 62, 2))
    assert 30 << 20 < device.scratch("attention", scene.p.c, RastKV(n_heads=16, head_dim=256)) <= 64 << 20
    scene.check(device)


def test_most_room_of_smaller_passes(device: Device) -> None:
    """What is made ready at load is enough for every pass, and not much more."""
    at_most = device.library.rast_kernel_attention_scratch_at_most
    at_most.restype = ctypes.c_size_t
    rng, nearest = np.random.default_rng(6), 0.0
    for _ in range(3000):
        kv = RastKV(n_heads=int(rng.integers(1, 65)), head_dim=int(rng.choice([16, 64, 128, 256])))
        large = [int(2 ** rng.uniform(0, top)) for top in (2, 10, 7, 18)]
        small = [int(rng.integers(1, n + 1)) for n in large]
        most, wanted = (
            function(ctypes.byref(RastPass(n_models=m, cap_rows=r, cap_segs=s, cap_ctx=c)), ctypes.byref(kv))
            for function, (m, r, s, c) in (
                (at_most, large),
                (device.library.rast_kernel_attention_scratch, small),
            )
        )
        assert wanted <= most <= 64 << 20
        nearest = max(nearest, wanted / most if most else 0)
    assert nearest > 0.9


@kinds
def test_mixed_batch(device: Device, memory: Memory, kind: int) -> None:
    """Short and long segments of one pass, more of them than a warp has lanes: every row once."""
    rng = np.random.default_rng(5)
    segments = [(int(rng.integers(0, 90)), int(n)) for n in rng.choice([1, 1, 1, 3, 8, 9, 14], 45)]
    Scene(memory, segments, kind, 16, 4, 2).check(device)


@kinds
def test_short_segments_behind_a_long_one(device: Device, memory: Memory, kind: int) -> None:
    """Partial results have room for the rows that short segments can have, which are fewer than the pass's."""
    Scene(memory, [(0, 60), (400, 3), (500, 1)], kind, 16, 4, 2, n_models=2, padding=(0, 0, 0)).check(device)


@sixteen
def test_other_output_type(device: Device, memory: Memory, kind: int) -> None:
    Scene(memory, [(33, 1), (2, 20)], kind, 64, 2, 1, act_type=F32).check(device)


@kinds
@pytest.mark.parametrize("n", [1, 4, 20])
def test_large_scores(device: Device, memory: Memory, kind: int, n: int) -> None:
    """Scores of hundreds, that grow and that fall along the context."""
    for slope in (1, -1):
        scene = Scene(memory, [(299, n)], kind, 64, 2, 1)
        scene.q[:] = np.where(np.isnan(scene.q), scene.q, 8)
        ramp = np.linspace(-8, 8, 299 + n, dtype=np.float32)[::slope]
        scene.kv[0][0][0][:] = ramp[:, None] + scene.kv[0][0][0] / 16
        scene.check(device)


@kinds
@pytest.mark.parametrize(("before", "n"), [(0, 1), (30, 6), (250, 8), (10, 25), (0, 70)])
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_values_stay_behind(
    device: Device, memory: Memory, kind: int, before: int, n: int, which: str, bad: float
) -> None:
    """A position that went wrong: rows before it are as always, it and those after it are not finite."""
    scene = Scene(memory, [(before, n), (7, 3)], kind, 64, 4, 2)
    want = scene.run(device)
    wrong = before + n // 2
    scene.kv[0][0][int(which == "value")][1, wrong, 3] = bad
    got = scene.run(device)
    for row in range(scene.p.n_rows):
        sees = row < n and scene.p.positions[row] >= wrong
        np.testing.assert_array_equal(got[0, row, :2], want[0, row, :2])  # the other KV head's
        if not sees:
            np.testing.assert_array_equal(got[0, row], want[0, row])
        elif which == "value" or np.isnan(bad):
            assert not np.isfinite(got[0, row, 2:]).all(axis=-1).any()


@kinds
def test_bad_query_stays_alone(device: Device, memory: Memory, kind: int) -> None:
    scene = Scene(memory, [(30, 6), (10, 25)], kind, 64, 4, 2)
    want = scene.run(device)
    bad = [(2, 1), (9, 3)]
    for row, head in bad:
        scene.q[0, row, head, 5] = np.nan
    got = scene.run(device)
    for row, head in bad:
        assert np.isnan(got[0, row, head]).all()
        got[0, row, head] = want[0, row, head]
    np.testing.assert_array_equal(got[0, : scene.p.n_rows], want[0, : scene.p.n_rows])


@kinds
def test_repeats_and_belongs_to_the_sequence(device: Device, memory: Memory, kind: int) -> None:
    """The same bits again, and in a pass of other capacities with other segments beside it."""
    alone = Scene(memory, [(400, 1)], kind, 64, 6, 2, padding=(0, 0, 0))
    want = alone.run(device)
    np.testing.assert_array_equal(alone.run(device)[0, 0], want[0, 0])
    batch = Scene(memory, [(3, 12), (400, 1), (17, 1)], kind, 64, 6, 2, seed=1, cap_ctx=4096)
    batch.q[0, 12], batch.kv[0][1] = alone.q[0, 0], alone.kv[0][0]
    np.testing.assert_array_equal(batch.run(device)[0, 12], want[0, 0])


@pytest.mark.parametrize("seed", range(60 if FULL else 12))
def test_random(device: Device, memory: Memory, seed: int) -> None:
    rng = np.random.default_rng([77, seed])
    kind, head_dim = int(rng.integers(0, 3)), 2 * int(rng.integers(1, 66)) if seed % 2 else 8 * int(rng.integers(1, 33))
    kv_heads, group = int(rng.integers(1, 4)), int(rng.integers(1, 10))
    segments = [
        (int(rng.integers(0, 330)), int(rng.integers(1, rng.choice([2, 9, 40])))) for _ in range(rng.integers(1, 5))
    ]
    window = int(rng.choice([0, 0, rng.integers(1, 300)]))
    padding = tuple(int(x) for x in rng.integers(0, 40, 3))
    Scene(
        memory,
        segments,
        kind,
        head_dim,
        kv_heads * group,
        kv_heads,
        int(rng.integers(1, 4)),
        seed,
        (padding[0], padding[1], 0),
    ).check(device, window)
