"""The transfer step on the device, against NumPy in float64 and against the CPU backend on the same logits."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from device import FULL, Device, DrawnType, DrawType, RastLogits, RastTransferTerm
from op_tables import host_library

SAMPLE, LOGPROB, STATS, LOGITS, SCORES, PARTS = 1, 2, 4, 8, 16, 32
MEASURES, ROWS = LOGPROB | STATS, LOGITS | SCORES | PARTS
SLOTS, MASKS = 8, 3

Array = npt.NDArray[Any]


# ---- scenes ---------------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """What a transfer step is given: logits of the terms, coefficients, draws, history and masks."""

    n_vocab: int
    n_valid: int
    logits: list[Array]  # a term [n_out, rows]: ids below min(rows, n_vocab) have a logit
    uncommon: list[Array]
    coef: Array  # [n_out, n_terms] float32
    draw: Array  # [n_out] DrawType
    history: Array  # [SLOTS, words] uint32
    allowed: Array  # [MASKS, words] uint32
    padding: int = 0  # floats after each row of logits

    @property
    def n_out(self) -> int:
        return len(self.draw)

    @property
    def n_terms(self) -> int:
        return len(self.logits)

    @property
    def words(self) -> int:
        return (self.n_vocab + 31) // 32


@dataclass
class Result:
    out: Array
    drawn: Array
    rows: dict[str, Array] = field(default_factory=dict)  # logits, scores [n_out, n_vocab], parts [.., n_terms, ..]


def plain_draws(n: int, **fields: Any) -> Array:
    draw = np.zeros(n, DrawType)
    for name, value in {"temperature": 1, "top_p": 1, "repetition_penalty": 1}.items():
        draw[name] = value
    for name in ("target", "slot", "draft", "mask"):
        draw[name] = -1
    for name, value in fields.items():
        draw[name] = value
    return draw


def plain_scene(logits: list[Array], coef: Array | None = None, **fields: Any) -> Scene:
    """A scene without history and masks, all of whose outputs draw with the same options."""
    n_out, n_vocab = logits[0].shape
    words = (n_vocab + 31) // 32
    if coef is None:
        coef = np.ones((n_out, len(logits)), np.float32)
    return Scene(
        n_vocab,
        n_vocab,
        [np.asarray(x, np.float32) for x in logits],
        [np.zeros(0, np.int32) for _ in logits],
        coef,
        plain_draws(n_out, **fields),
        np.zeros((SLOTS, words), np.uint32),
        np.full((MASKS, words), 0xFFFFFFFF, np.uint32),
    )


def random_draw(rng: np.random.Generator, draw: Array, n_vocab: int) -> None:
    """Random options for one output."""
    draw["stream"] = rng.integers(1 << 64, dtype=np.uint64)
    draw["position"] = rng.integers(4096)
    draw["flags"] = SAMPLE if rng.random() < 0.75 else 0
    if rng.random() < 0.5:
        draw["temperature"] = rng.choice([0.05, 0.3, 0.7, 1.3, 2.0])
    if rng.random() < 0.35:
        draw["top_k"] = rng.integers(1, 60 if rng.random() < 0.7 else 2 * n_vocab + 1)
    if rng.random() < 0.35:
        draw["top_p"] = rng.choice([1e-6, 0.05, 0.3, 0.8, 0.95, 0.999])
    if rng.random() < 0.25:
        draw["min_p"] = rng.choice([1e-4, 0.02, 0.3, 1.0])
    if rng.random() < 0.4:
        draw["repetition_penalty"] = rng.choice([0.7, 1.1, 1.5])
    if rng.random() < 0.3:
        draw["mask"] = rng.integers(MASKS)
    if rng.random() < 0.15:
        draw["target"] = rng.integers(n_vocab)
    elif rng.random() < 0.1:
        draw["target"] = -2
    if rng.random() < 0.15:
        draw["limit"] = rng.integers(1, n_vocab + 20)


def random_scene(seed: int, n_vocab: int, n_out: int, n_terms: int) -> Scene:
    rng = np.random.default_rng(seed)
    scale, ties = rng.choice([0.1, 1.0, 4.0, 30.0]), rng.random() < 0.3
    words = (n_vocab + 31) // 32
    logits, uncommon = [], []
    for m in range(n_terms):
        rows = n_vocab if m == 0 or rng.random() < 0.5 else int(rng.integers(n_vocab // 2 + 1, n_vocab + 200))
        x = rng.standard_normal((n_out, rows), np.float32) * np.float32(scale)
        logits.append(np.round(x * 2) / 2 if ties else x)
        some = m > 0 and rng.random() < 0.4
        uncommon.append(np.unique(rng.integers(0, rows, rng.integers(1, 80) if some else 0)).astype(np.int32))
    coef = np.ones((n_out, n_terms), np.float32)
    for m in range(1, n_terms):
        coef[:, m] = (0.5 if m % 2 else -0.5) * rng.integers(1, 4, n_out)
    coef[:, 1:][rng.random((n_out, n_terms - 1)) < 0.3] = 0
    if rng.random() < 0.1 and n_terms > 1:
        coef[rng.integers(n_out), 0] = 0
    for m in range(n_terms):  # what is switched off must not matter
        logits[m][(coef[:, m] == 0) & (m > 0)] = np.nan
    draw = plain_draws(n_out)
    for o in range(n_out):
        random_draw(rng, draw[o : o + 1], n_vocab)
        if o < SLOTS * 4:  # runs of up to four outputs of one slot: the last draw and drafts
            draw["slot"][o] = o // 4
            draw["draft"][o] = rng.integers(n_vocab) if o % 4 else -1
    bits = rng.integers(1 << 32, size=(4, SLOTS, words), dtype=np.uint32)
    return Scene(
        n_vocab,
        n_vocab if rng.random() < 0.5 else n_vocab // 2 + 1,
        logits,
        uncommon,
        coef,
        draw,
        bits[0] & bits[1] & bits[2],
        (bits[0] | bits[3])[:MASKS],
        int(rng.choice([0, 1, 4])),
    )


# ---- runs -----------------------------------------------------------------------------------------------------------


def with_rows(scene: Scene, flags: int) -> Array:
    draw = scene.draw.copy()
    draw["flags"] |= flags
    for name in ("logits_row", "scores_row", "parts_row"):
        draw[name] = np.arange(scene.n_out)[::-1]  # rows lie where the output says
    return draw


def empty_rows(scene: Scene) -> dict[str, Array]:
    shape = (scene.n_out, scene.n_vocab)
    rows = {"logits": np.empty(shape, np.float32), "scores": np.empty(shape, np.float32)}
    return rows | {"parts": np.empty((scene.n_out, scene.n_terms, scene.n_vocab), np.float32)}


def step_of(scene: Scene, address: Any) -> RastLogits:
    """rast_logits without terms and outputs; address(array) puts an array where the step finds it."""
    return RastLogits(
        n_terms=scene.n_terms,
        n_out=scene.n_out,
        n_vocab=scene.n_vocab,
        n_valid=scene.n_valid,
        coef=address(scene.coef),
        history=address(scene.history),
        allowed=address(scene.allowed),
        history_words=scene.words,
    )


def run(device: Device, scene: Scene, flags: int = 0, pieces: list[int] | None = None) -> Result:
    """Runs the kernel, all outputs in one launch or in several of `pieces` outputs."""
    with device.memory() as memory:
        step = step_of(scene, memory.to_device)
        rows = empty_rows(scene)
        outputs = {"out": np.zeros(scene.n_out, DrawnType), "drawn": np.full(SLOTS, -9, np.int32)} | rows
        for name, array in outputs.items():
            setattr(step, name, memory.to_device(array))
        step.draw = memory.to_device(with_rows(scene, flags))
        terms, at = (RastTransferTerm * scene.n_terms)(), 0
        uncommon = [memory.to_device(ids) if len(ids) else 0 for ids in scene.uncommon]
        for n in pieces or [scene.n_out]:
            for m, logits in enumerate(scene.logits):
                live = min(logits.shape[1], scene.n_vocab)
                padded = np.full((n, live + scene.padding), np.nan, np.float32)
                padded[:, :live] = logits[at : at + n, :live]
                terms[m] = RastTransferTerm(
                    memory.to_device(padded),
                    padded.shape[1],
                    logits.shape[1],
                    uncommon[m],
                    len(scene.uncommon[m]),
                )
            size = device.library.rast_kernel_transfer_scratch(ctypes.byref(step), n)
            room = np.full(size, 0xFF, np.uint8)
            room[: 4 * 1024] = 0  # RAST_KERNEL_OUTPUTS counters
            scratch = memory.to_device(room)
            device.library.rast_kernel_transfer(0, ctypes.byref(step), terms, at, n, scratch)
            memory.to_host(scratch, room)
            assert not room[: 4 * 1024].any()
            at += n
        device.check()
        for name, array in outputs.items():
            memory.to_host(getattr(step, name), array)
    return Result(outputs["out"], outputs["drawn"], {name: array[::-1] for name, array in rows.items()})


class RastTerm(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_uint64),
        ("saved", ctypes.c_uint64),
        ("saved_row", ctypes.c_uint64),
        ("head", ctypes.c_void_p),
        ("hidden_type", ctypes.c_int32),
        ("n_rows", ctypes.c_int32),
        ("uncommon", ctypes.c_void_p),
        ("n_uncommon", ctypes.c_int32),
    )


@pytest.fixture(scope="session")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The CPU backend's transfer step as a C function."""
    return host_library(tmp_path_factory.mktemp("cpu"), "transfer_on_cpu.c").transfer_on_cpu


def run_on_cpu(cpu: Any, scene: Scene, flags: int = 0) -> Result:
    alive: list[Array] = []

    def address(array: Array) -> int:
        alive.append(np.ascontiguousarray(array))
        return int(alive[-1].ctypes.data)

    step = step_of(scene, address)
    rows = empty_rows(scene)
    outputs = {"out": np.zeros(scene.n_out, DrawnType), "drawn": np.full(SLOTS, -9, np.int32)} | rows
    for name, array in outputs.items():
        setattr(step, name, array.ctypes.data)
    step.draw = address(with_rows(scene, flags))
    terms = (RastTerm * scene.n_terms)()
    for m, logits in enumerate(scene.logits):
        saved = np.full((scene.n_out, scene.n_vocab), -np.inf, np.float32)
        live = min(logits.shape[1], scene.n_vocab)
        saved[:, :live] = logits[:, :live]
        ids = scene.uncommon[m]
        terms[m] = RastTerm(
            0, address(saved), 0, None, 0, logits.shape[1], address(ids) if len(ids) else None, len(ids)
        )
    step.terms = ctypes.addressof(terms)
    error = ctypes.create_string_buffer(600)
    assert cpu(ctypes.byref(step), 1, error) == 0, error.raw[4:]
    return Result(outputs["out"], outputs["drawn"], {name: array[::-1] for name, array in rows.items()})


# ---- the reference, in the plainest way -----------------------------------------------------------------------------


def philox(stream: int, position: int, n: int) -> Array:
    """32 random bits of each of the ids 0 .. n - 1, as csrc/rng.h says."""
    low = np.uint64(0xFFFFFFFF)
    k0, k1 = stream & 0xFFFFFFFF, stream >> 32
    c0 = np.arange((n + 3) // 4, dtype=np.uint64)
    c1, c2, c3 = np.full_like(c0, position), np.zeros_like(c0), np.zeros_like(c0)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), p1 & low
        c2, c3 = (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).ravel()[:n]


def gumbel(draw: Array, n: int) -> Array:
    u = (philox(int(draw["stream"]), int(draw["position"]), n).astype(np.float64) + 0.5) / 2**32
    return np.asarray(-np.log(-np.log(u)))


def unpack(words: Array, n: int) -> Array:
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:n].astype(bool)


def limit_of(scene: Scene, o: int) -> int:
    limits = [scene.n_valid, scene.n_vocab]
    limits += [x.shape[1] for m, x in enumerate(scene.logits) if scene.coef[o, m] != 0]
    if scene.draw["limit"][o] > 0:
        limits.append(int(scene.draw["limit"][o]))
    return min(limits)


def term_rows(scene: Scene, o: int) -> Array:
    """[n_terms, n_vocab] logits, -inf where a term has no row."""
    rows = np.full((scene.n_terms, scene.n_vocab), -np.inf, np.float32)
    for m, x in enumerate(scene.logits):
        live = min(x.shape[1], scene.n_vocab)
        rows[m, :live] = x[o, :live]
    return rows


def combined_of(scene: Scene, o: int, rows: Array) -> tuple[Array, Array]:
    """The combined logits, and which of them are uncommon."""
    limit, coef = limit_of(scene, o), scene.coef[o]
    active = [m for m in range(scene.n_terms) if coef[m] != 0]
    uncommon = np.zeros(scene.n_vocab, bool)
    for m in active:
        ids = scene.uncommon[m]
        uncommon[ids[ids < scene.n_vocab]] = m > 0
    uncommon[limit:] = False
    common = ~uncommon
    common[limit:] = False
    total = np.full(scene.n_vocab, -np.inf, np.float32)
    total[:limit] = 0
    for m in active:
        x = rows[m].copy()
        if m > 0:
            x[uncommon] = log_sum_exp(rows[m][common]) if common.any() else 0
        total[:limit] = total[:limit] + coef[m] * x[:limit]
    return total, uncommon


def processed_of(scene: Scene, o: int, logits: Array) -> Array:
    d = scene.draw[o]
    x = logits.copy()
    if d["repetition_penalty"] != 1 and d["slot"] >= 0:
        seen = unpack(scene.history[d["slot"]], scene.n_vocab)
        for p in range(o, -1, -1):
            if scene.draw["slot"][p] != d["slot"]:
                continue
            if scene.draw["draft"][p] < 0:
                break
            seen[scene.draw["draft"][p]] = True
        penalised = np.where(x > 0, x / d["repetition_penalty"], x * d["repetition_penalty"])
        x = np.where(seen, penalised, x)
    if d["mask"] >= 0:
        x[~unpack(scene.allowed[d["mask"]], scene.n_vocab)] = -np.inf
    return np.asarray(x / d["temperature"] if d["flags"] & SAMPLE else x)


def filtered_of(d: Array, x: Array) -> Array:
    """HuggingFace's warpers: 1 stays, 0 goes, 2: so near to the boundary that rounding decides."""
    fate = (x > -np.inf).astype(np.int8)
    if not d["flags"] & SAMPLE or not fate.any():
        return fate
    top = x.max()
    if 0 < d["top_k"] < fate.sum():
        fate[x < np.partition(x, len(x) - d["top_k"])[len(x) - d["top_k"]]] = 0
    if d["top_p"] < 1:
        values, counts = np.unique(x[fate == 1], return_counts=True)
        mass = np.exp(values.astype(np.float64) - top) * counts
        slack = np.cumsum(mass) / mass.sum() - (1 - np.float64(d["top_p"]))
        at = np.searchsorted(values, np.where(fate == 1, x, values[0]))
        near = np.where(np.abs(slack) < 1e-6, 2, slack > 0)
        near[-1] = 1
        fate = np.where(fate == 1, near[at], 0).astype(np.int8)
    if d["min_p"] > 0:
        with np.errstate(under="ignore"):
            slack = np.exp(x.astype(np.float64) - top) - np.float64(d["min_p"])
        near = np.where(np.abs(slack) < 1e-6, 2, slack >= 0)
        near[x == top] = 1
        fate = np.where((fate == 0) | (near == 0), 0, np.maximum(fate, near)).astype(np.int8)
    return fate


def log_sum_exp(x: Array) -> float:
    top = np.float64(x.max()) if len(x) else -np.inf
    return float(top + np.log(np.sum(np.exp(x - top)))) if top > -np.inf else -np.inf


def first_bad(scene: Scene, o: int, rows: Array) -> int:
    for m, x in enumerate(scene.logits):
        live = min(x.shape[1], scene.n_vocab)
        if scene.coef[o, m] != 0 and not np.isfinite(rows[m, :live]).all():
            return m
    return -1


def check(scene: Scene, o: int, result: Result) -> None:
    """Compares all that an output gave, with rows and statistics, with the reference."""
    d, out, n_vocab = scene.draw[o], result.out[o], scene.n_vocab
    rows, limit = term_rows(scene, o), limit_of(scene, o)
    bad = first_bad(scene, o, rows)
    if bad >= 0:
        assert (out["bad"], out["token"]) == (bad, -1)
        assert np.isnan([out["logprob"], out["kl"], out["base_logprob"]]).all()
        return
    for m in range(scene.n_terms):
        part = result.rows["parts"][o, m]
        expected = rows[m] if m == 0 or scene.coef[o, m] != 0 else np.full(n_vocab, np.nan, np.float32)
        np.testing.assert_array_equal(part, expected, f"output {o}, term {m}")
    logits = result.rows["logits"][o]
    combined, uncommon = combined_of(scene, o, rows)
    np.testing.assert_array_equal(logits[~uncommon], combined[~uncommon], f"output {o}")
    np.testing.assert_allclose(logits[uncommon], combined[uncommon], rtol=1e-5, atol=1e-4)

    scores = result.rows["scores"][o]
    processed = processed_of(scene, o, logits)
    fate = filtered_of(d, processed)
    if not d["flags"] & SAMPLE:
        fate[:] = 1
    kept = scores == processed
    np.testing.assert_array_equal(kept[fate == 1], True, f"output {o}: {d}")
    gone = np.isneginf(scores)
    np.testing.assert_array_equal(gone[fate == 0], True, f"output {o}: {d}")
    assert (kept | gone)[fate == 2].all()

    keys = scores.astype(np.float64) + (gumbel(d, n_vocab) if d["flags"] & SAMPLE else 0)
    token = int(np.argmax(keys)) if keys.max() > -np.inf else -1
    if d["target"] == -1:
        assert out["token"] == token, f"output {o}: {d}"
        assert out["bad"] == (-2 if token < 0 else -1)
    else:
        token = max(int(d["target"]), -1)
        assert (out["token"], out["bad"]) == (token, -1)

    base = rows[0]
    if np.isnan(base).any():
        return
    lse, base_lse = log_sum_exp(logits[:limit]), log_sum_exp(base[: scene.n_valid])
    live = logits[:limit].astype(np.float64)
    kl = float(np.sum(np.exp(live - lse) * (live - lse - (base[:limit].astype(np.float64) - base_lse))))
    assert out["base_token"] == int(np.argmax(base[:limit]))
    # the sum of differences is as exact as its greatest terms allow
    size = float(np.sum(np.exp(live - lse) * np.abs(live - base[:limit])))
    np.testing.assert_allclose(out["kl"], max(kl, 0), rtol=3e-5, atol=3e-6 * (1 + size), err_msg=f"output {o}")
    if token >= 0:
        expected = np.float64(logits[token]) - lse if token < n_vocab else -np.inf
        np.testing.assert_allclose(out["logprob"], expected, rtol=1e-5, atol=1e-5)
        expected = np.float64(base[token]) - base_lse if token < scene.n_valid else -np.inf
        np.testing.assert_allclose(out["base_logprob"], expected, rtol=1e-5, atol=1e-5)
    else:
        assert np.isnan([out["logprob"], out["base_logprob"]]).all()


def check_drawn(scene: Scene, result: Result) -> None:
    """The slot's token is the one of its last output."""
    expected = np.full(SLOTS, -9)
    for slot in range(SLOTS):
        of_slot = np.flatnonzero(scene.draw["slot"] == slot)
        if len(of_slot) and result.out["token"][of_slot[-1]] >= 0:
            expected[slot] = result.out["token"][of_slot[-1]]
    np.testing.assert_array_equal(result.drawn, expected)


def assert_same(a: Array, b: Array) -> None:
    for name in a.dtype.names or ():
        np.testing.assert_array_equal(a[name], b[name], name)


# ---- tests ----------------------------------------------------------------------------------------------------------

VOCABS = [1, 2, 5, 31, 127, 128, 129, 511, 512, 513, 1000, 1027, 2531]


@pytest.mark.parametrize("seed", range(300 if FULL else 26))
def test_random_scenes(device: Device, cpu: Any, seed: int) -> None:
    rng = np.random.default_rng([1, seed])
    n_vocab, n_out, n_terms = VOCABS[seed % len(VOCABS)], int(rng.choice([1, 2, 5, 9])), int(rng.integers(1, 6))
    scene = random_scene(seed, n_vocab, n_out, n_terms)
    full = run(device, scene, ROWS | MEASURES)
    for o in range(n_out):
        check(scene, o, full)
    check_drawn(scene, full)

    # Rows that nobody asks for, and how outputs are spread over launches, change nothing.
    measured = run(device, scene, MEASURES)
    assert_same(measured.out, full.out)
    pieces = run(device, scene, ROWS | MEASURES, [1] * (n_out // 2) + [n_out - n_out // 2])
    assert_same(pieces.out, full.out)
    np.testing.assert_array_equal(pieces.drawn, full.drawn)
    plain = run(device, scene)
    np.testing.assert_array_equal(plain.out["token"], full.out["token"])
    assert np.isnan(plain.out["logprob"]).all()
    assert np.isnan(plain.out["kl"]).all()
    compare_with_cpu(scene, full, run_on_cpu(cpu, scene, ROWS | MEASURES))


def compare_with_cpu(scene: Scene, result: Result, expected: Result) -> None:
    for name in ("token", "bad", "base_token"):
        np.testing.assert_array_equal(result.out[name], expected.out[name], name)
    np.testing.assert_array_equal(result.drawn, expected.drawn)
    for name in ("logprob", "base_logprob"):
        np.testing.assert_allclose(result.out[name], expected.out[name], rtol=2e-5, atol=2e-5)
    for o in np.flatnonzero(expected.out["bad"] < 0):
        _, uncommon = combined_of(scene, int(o), term_rows(scene, int(o)))
        for name in ("logits", "scores"):
            ours, theirs = result.rows[name][o], expected.rows[name][o]
            np.testing.assert_array_equal(ours[~uncommon], theirs[~uncommon], f"{name} of output {o}")
            np.testing.assert_allclose(ours[uncommon], theirs[uncommon], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(result.rows["parts"][o], expected.rows["parts"][o])


@pytest.mark.parametrize("n_vocab", [32003, 151936, 152064])
def test_large_vocabularies(device: Device, cpu: Any, n_vocab: int) -> None:
    scene = random_scene(n_vocab, n_vocab, 6 if FULL else 3, 3)
    result = run(device, scene, ROWS | MEASURES)
    for o in range(scene.n_out):
        check(scene, o, result)
    compare_with_cpu(scene, result, run_on_cpu(cpu, scene, ROWS | MEASURES))


def test_warps_that_take_several_units(device: Device) -> None:
    """So many outputs and ids that units outnumber warps: as with few outputs a launch."""
    n_out, n_vocab = (70, 152064) if FULL else (48, 45001)
    scene = random_scene(2, n_vocab, n_out, 1)
    result = run(device, scene, MEASURES)
    pieces = run(device, scene, MEASURES, [n_out // 2, n_out - n_out // 2 - 3, 3])
    assert_same(result.out, pieces.out)
    np.testing.assert_array_equal(result.drawn, pieces.drawn)
    some = replace(scene, logits=[x[-3:] for x in scene.logits], coef=scene.coef[-3:], draw=scene.draw[-3:])
    expected = run(device, some, ROWS | MEASURES)
    assert_same(result.out[-3:], expected.out)
    for o in range(3):
        check(some, o, expected)


def test_many_rows_and_draws(device: Device, cpu: Any) -> None:
    """Thousands of draws from the same logits: the same tokens as on the CPU."""
    rng = np.random.default_rng(7)
    cases: list[tuple[int, float, dict[str, Any]]] = [
        (67, 0.5, {}),
        (515, 2.0, {"temperature": 0.8}),
        (300, 1.0, {"top_k": 20}),
        (300, 1.0, {"top_p": 0.9, "min_p": 0.01}),
    ]
    for n_vocab, scale, options in cases:
        logits = [np.repeat(rng.standard_normal((1, n_vocab)) * scale, 70, axis=0) for _ in range(3)]
        for position in range(40 if FULL else 8):
            coef = np.tile(np.array([[1, 1, -1]], np.float32), (70, 1))
            scene = plain_scene(logits, coef, flags=SAMPLE, position=position, **options)
            scene.draw["stream"] = rng.integers(1 << 63, size=70)
            result, expected = run(device, scene, MEASURES), run_on_cpu(cpu, scene, MEASURES)
            np.testing.assert_array_equal(result.out["token"], expected.out["token"])


def test_draws_follow_the_softmax(device: Device) -> None:
    """Chi-squared at a significance of 1e-4, with and without filters."""
    rng = np.random.default_rng(11)
    logits = (rng.standard_normal(24) * 1.5).astype(np.float32)
    rounds = 12 if FULL else 2
    choices: list[dict[str, Any]] = [{}, {"temperature": 1.7}, {"top_k": 9}, {"top_p": 0.7}, {"min_p": 0.2}]
    for options in choices:
        counts = np.zeros(24)
        n = 384
        scene = plain_scene([np.repeat(logits[None], n, axis=0)], flags=SAMPLE, **options)
        for position in range(rounds):
            scene.draw["stream"], scene.draw["position"] = rng.integers(1 << 63, size=n), position
            counts += np.bincount(run(device, scene).out["token"], minlength=24)
        d = scene.draw[0]
        x = (logits / d["temperature"]).astype(np.float64)
        kept = filtered_of(d, logits / d["temperature"]) > 0
        assert counts[~kept].sum() == 0
        expected = np.exp(x[kept] - log_sum_exp(x[kept])) * counts.sum()
        freedom = kept.sum() - 1
        statistic = np.sum((counts[kept] - expected) ** 2 / expected)
        bound = freedom * (1 - 2 / (9 * freedom) + 3.719 * np.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
        assert statistic < bound, options


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_logits_name_the_first_term(device: Device, cpu: Any, value: float) -> None:
    rng = np.random.default_rng(3)
    logits = [rng.standard_normal((9, 700)).astype(np.float32) for _ in range(4)]
    coef = np.ones((9, 4), np.float32)
    scene = plain_scene(logits, coef)
    scene.n_valid = 600
    scene.draw["slot"] = np.arange(9) % SLOTS
    logits = scene.logits
    logits[2][1, 650] = value  # beyond what can be drawn
    logits[3][2, 0] = logits[1][2, 599] = value
    logits[1][3, 5], coef[3, 1] = value, 0
    logits[0][4, 699] = value
    logits[0][5, 3], coef[5, 0] = value, 0
    logits[0][6, 9], logits[1][6, 9] = 3e38, 3e38  # only the sum is infinite
    logits[0][7, 650], logits[1][7, 650] = 3e38, 3e38  # where nothing can be drawn
    result = run(device, scene, LOGPROB)
    np.testing.assert_array_equal(result.out["bad"], [-1, 2, 1, -1, 0, -1, 4, -1, -1])
    expected = run_on_cpu(cpu, scene, LOGPROB)
    for name in ("bad", "token"):
        np.testing.assert_array_equal(result.out[name], expected.out[name])
    np.testing.assert_array_equal(result.drawn, expected.drawn)


def test_ties_go_to_the_lowest_id_and_stay_together(device: Device, cpu: Any) -> None:
    flat = np.zeros((5, 1500), np.float32)
    flat[0, [700, 701, 1400]] = 1
    flat[1] = -1e-9
    flat[2, 1499] = 2
    flat[3, ::3] = 4
    greedy = run(device, plain_scene([flat]), MEASURES)
    np.testing.assert_array_equal(greedy.out["token"], [700, 0, 1499, 0, 0])
    np.testing.assert_array_equal(greedy.out["base_token"], [700, 0, 1499, 0, 0])
    choices: list[dict[str, Any]] = [{"top_k": 2}, {"top_k": 1}, {"top_p": 0.5}, {"top_p": 1e-6}, {"min_p": 1.0}]
    for options in choices:
        scene = plain_scene([flat], flags=SAMPLE, stream=5, **options)
        result = run(device, scene, ROWS | MEASURES)
        for o in range(5):
            check(scene, o, result)
        compare_with_cpu(scene, result, run_on_cpu(cpu, scene, ROWS | MEASURES))


def test_nothing_to_draw(device: Device) -> None:
    scene = plain_scene([np.zeros((3, 40), np.float32)], flags=SAMPLE, mask=0, slot=[0, 1, 2])
    scene.allowed[:] = 0
    scene.draw["top_k"] = [0, 5, 0]
    scene.draw["top_p"] = [1, 1, 0.5]
    result = run(device, scene, ROWS | MEASURES)
    np.testing.assert_array_equal(result.out["bad"], -2)
    np.testing.assert_array_equal(result.out["token"], -1)
    np.testing.assert_array_equal(result.drawn, -9)
    assert np.isneginf(result.rows["scores"]).all()
    np.testing.assert_allclose(result.out["kl"], 0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 3000},
        {"top_k": 2500, "top_p": 0.99},
        {"top_p": 0.9999},
        {"top_p": 0.5, "temperature": 0.01},
        {"top_k": 8000, "temperature": 0.02},
        {"min_p": 1e-6},
        {"top_p": 0.3, "min_p": 0.5, "temperature": 5.0},
        {"top_k": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", ["normal", "wide", "zeros", "near", "steps"])
def test_filters_on_unusual_rows(device: Device, cpu: Any, options: dict[str, Any], shape: str) -> None:
    """More candidates than the list holds, logits spread far, all equal, equal but for the last bits."""
    rng = np.random.default_rng(5)
    n = 9001
    x = {
        "normal": rng.standard_normal(n),
        "wide": rng.standard_normal(n) * 1e4,
        "zeros": np.where(rng.random(n) < 0.5, 0.0, -0.0),
        "near": 1 + rng.integers(0, 9, n) * 2.0**-23,
        "steps": rng.integers(-30, 2, n).astype(float),
    }[shape]
    scene = plain_scene([x[None].astype(np.float32)], flags=SAMPLE, stream=9, **options)
    result = run(device, scene, ROWS | MEASURES)
    check(scene, 0, result)
    compare_with_cpu(scene, result, run_on_cpu(cpu, scene, ROWS | MEASURES))
    plain = run(device, scene)
    np.testing.assert_array_equal(plain.out["token"], result.out["token"])


def test_as_many_terms_as_a_launch_takes(device: Device, cpu: Any) -> None:
    scene = random_scene(64, 777, 3, 64)
    result = run(device, scene, ROWS | MEASURES)
    for o in range(scene.n_out):
        check(scene, o, result)
    compare_with_cpu(scene, result, run_on_cpu(cpu, scene, ROWS | MEASURES))


def test_drafts_of_earlier_outputs_count_as_seen(device: Device) -> None:
    """Forty drafts of one slot, another slot's outputs between them: each output sees the drafts before it."""
    n, n_vocab = 80, 600
    scene = plain_scene([np.full((n, n_vocab), 8, np.float32)], repetition_penalty=2.0)
    scene.draw["slot"] = np.arange(n) % 2
    scene.draw["draft"] = np.where(np.arange(n) < 2, -1, np.arange(n) * 7)
    scene.draw["draft"][51] = -1  # another chain of slot 1 begins
    scores = run(device, scene, SCORES, [33, 47]).rows["scores"]
    for o in range(n):
        starts = 2 if o % 2 == 0 or o < 51 else 52
        seen = [p * 7 for p in range(starts, o + 1) if p % 2 == o % 2]
        expected = np.full(n_vocab, 8, np.float32)
        expected[seen] = 4
        np.testing.assert_array_equal(scores[o], expected, f"output {o}")


def test_a_seed_decides_regardless_of_position_in_the_batch(device: Device) -> None:
    scene = random_scene(21, 1027, 9, 3)
    alone = run(device, scene, MEASURES, [1] * 9)
    assert_same(alone.out, run(device, scene, MEASURES).out)
    twice = replace(scene, padding=3)  # rows at other addresses, not aligned to 16 bytes
    assert_same(run(device, twice, MEASURES).out, alone.out)
