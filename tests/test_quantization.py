"""Quantized weights: the option and its roles, GGUF's types in place, results that belong to a sequence, and what
quantizing costs in quality."""

from __future__ import annotations

import itertools
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from loading_files import gguf_name, make_model, save_model, write_gguf
from oracle import ModelZoo, kl_divergence, load_rast, random_prompts
from safetensors.torch import load_file
from test_invariance import OPTIONS, assert_same, run
from test_loading_safetensors import is_mapped
from test_smollm2 import gguf_path

from rast import _core
from rast.loading import load_net, quantization_by_role, quantize

Kind = gguf.GGMLQuantizationType
# What the core quantizes to, and GGUF's type with the same blocks, row by row.
TYPES = {"int8": "Q8_0", "int4": "Q4_1", "int4-64": ""}
BLOCKS = {"int8": (32, 34), "int4": (32, 20), "int4-64": (64, 36)}
TILE = _core.TILE_ROWS


def matrices(path: Path, **options: Any) -> dict[str, tuple[np.ndarray, str]]:
    return {name: tensor for name, tensor in load_net(path, **options).tensors.items() if tensor[0].ndim == 2}


def quantized(matrix: np.ndarray, dtype: str) -> np.ndarray:
    """float32 to a type of the core, or by the gguf library to one of its own."""
    if dtype not in BLOCKS:
        return gguf.quants.quantize(matrix, Kind[dtype])
    group, block = BLOCKS[dtype]
    out = np.full((-(-len(matrix) // TILE) * TILE, matrix.shape[1] // group * block), 77, np.uint8)
    _core.quantize(matrix, "F32", dtype, out)
    return out


def from_tiles(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Rows of blocks, those that fill up the last tile included."""
    head = 2 if dtype == "int8" else 4
    blocks = stored.reshape(len(stored) // TILE, -1, TILE * BLOCKS[dtype][1])  # of a tile
    scales = blocks[..., : TILE * head].reshape(*blocks.shape[:2], head // 2, TILE, 2)
    words = blocks[..., TILE * head :].reshape(*blocks.shape[:2], -1, TILE, 4)
    by_row = [part.transpose(0, 3, 1, 2, 4).reshape(len(stored), blocks.shape[1], -1) for part in (scales, words)]
    return np.concatenate(by_row, axis=2).reshape(len(stored), -1)


def dequantized(stored: np.ndarray, dtype: str, n_rows: int) -> np.ndarray:
    """By the gguf library; a block of 64 is two of its blocks of 32 with the same scale and minimum."""
    rows = from_tiles(stored, dtype) if dtype in BLOCKS else stored
    if dtype == "int4-64":
        blocks = rows.reshape(-1, 36)
        halves = [np.concatenate([blocks[:, :4], blocks[:, 4 + at : 20 + at]], axis=1) for at in (0, 16)]
        rows, dtype = np.stack(halves, axis=1).reshape(len(rows), -1), "int4"
    assert not rows[n_rows:].any()
    return gguf.quants.dequantize(np.ascontiguousarray(rows[:n_rows]), Kind[TYPES.get(dtype, dtype)])


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", TYPES)
def test_quantized_at_load(name: str, dtype: str, zoo: ModelZoo) -> None:
    folder = zoo.folder("llama", dtype=dtype, hidden_size=192, intermediate_size=320, vocab_size=101)
    steps: list[tuple[str, int, int]] = []
    net = load_net(folder, quantization=name, progress=lambda *args: steps.append(args))
    floats = {key: t.float().numpy() for key, t in load_file(folder / "model.safetensors").items()}
    assert (net.dtype, net.warnings) == (dtype, [])
    assert net.weight_types().keys() == {name, {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]}
    for key, (array, stored) in net.tensors.items():
        if array.ndim == 1:
            assert is_mapped(array)
            continue
        assert stored == name
        group = BLOCKS[stored][0]
        want = floats[key].reshape(-1, group)
        got = dequantized(array, stored, len(floats[key])).reshape(-1, group)
        step = np.abs(want).max(1) / 127 if name == "int8" else np.ptp(want, axis=1) / 15
        rounding = np.abs(want).max(1) * 2**-10  # scale and minimum are float16
        assert (np.abs(got - want) <= (0.501 * step + rounding)[:, None]).all(), key
        assert (np.abs(got - want).max(1) >= 0.2 * step).mean() > 0.9  # it is quantized indeed
    assert {what for what, _, _ in steps} == {"quantizing model.safetensors"}
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    assert steps[-1][1] == steps[-1][2]


def test_matrices_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sizes, each has its own part, aligned to a cache line."""
    monkeypatch.setattr(quantize, "_ARENA", 100_000)
    rng = np.random.default_rng(0)
    made = []
    quantizer = quantize.Quantizer("int8", Path("file"), None)
    for i, rows in enumerate(rng.permutation([1, 16, 17, 100, 300, 600, 900, 20, 33, 2000, 5])):
        matrix = rng.standard_normal((rows, 96)).astype(np.float32)
        quantizer.total += matrix.nbytes
        made.append((matrix, quantizer(str(i), (matrix, "F32"))[0]))
    for matrix, stored in made:
        assert stored.ctypes.data % 64 == 0
        np.testing.assert_array_equal(stored, quantized(matrix, "int8"))


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_gguf_types_stay_in_place(
    kind: Kind, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    hf = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[architecture]
    write_gguf(path, make_model(hf, hidden_size=64, intermediate_size=96), architecture, kind)
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    same = {"int8": "Q8_0", "int4": kind.name if kind != Kind.Q8_0 else ""}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)  # not needed for this
        nets = [load_net(path), load_net(path, dtype="float16")]
        nets += [load_net(path, quantization=name) for name, stored in same.items() if stored == kind.name]
    assert len(nets) == 3
    for net in nets:
        assert net.dtype == ("float16" if net is nets[1] else "bfloat16")
        for name, (array, stored) in net.tensors.items():
            assert is_mapped(array)
            assert stored == (kind.name if array.ndim == 2 else "F32")
            if array.ndim == 2:
                np.testing.assert_array_equal(array, raw[gguf_name(name)].data)
    # and on request not
    for options, stored in (
        (dict(dtype="float32"), "F32"),
        (dict(quantization="none"), "BF16"),
        (dict(quantization="none", dtype="float32"), "F32"),
    ):
        assert {dtype for _, dtype in matrices(path, **options).values()} == {stored}


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q5_1, Kind.F16])
@pytest.mark.parametrize("name", TYPES)
def test_gguf_to_another_type(kind: Kind, name: str, tmp_path: Path) -> None:
    """Through float32, the gguf library's values."""
    path = tmp_path / "model.gguf"
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=8)
    write_gguf(path, make_model("Qwen2ForCausalLM", **sizes), "qwen2", kind)
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    steps: list[tuple[str, int, int]] = []
    in_place = (kind, name) in ((Kind.Q8_0, "int8"), (Kind.Q4_0, "int4"))
    found = matrices(path, quantization=name, progress=lambda *args: steps.append(args))
    for key, (array, stored) in found.items():
        assert is_mapped(array) == in_place
        if in_place:
            continue
        assert stored == name
        source = raw[gguf_name(key)]
        exact = gguf.quants.dequantize(source.data, source.tensor_type).astype(np.float32)
        np.testing.assert_array_equal(array, quantized(exact, stored), err_msg=key)
    assert bool(steps) != in_place
    if steps:
        assert {what for what, _, _ in steps} == {"quantizing model.gguf"}
        assert steps[-1][1] == steps[-1][2]
        assert all(a[1] <= b[1] for a, b in itertools.pairwise(steps))


def test_rows_that_are_no_multiple_of_the_group(zoo: ModelZoo, tmp_path: Path) -> None:
    folder = zoo.folder("llama", hidden_size=96, intermediate_size=101, num_attention_heads=4)
    net = load_net(folder, quantization="int8")
    stored = {name: dtype for name, (array, dtype) in net.tensors.items() if array.ndim == 2}
    assert {name for name, dtype in stored.items() if dtype == "F32"} == {
        f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)
    }
    assert net.warnings == [
        f"{folder / 'model.safetensors'}: 3 matrices stay as they are stored, because their rows are not a multiple "
        "of 32 (first: 'model.layers.0.mlp.down_proj.weight', rows of 101)"
    ]
    path = tmp_path / "model.gguf"
    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=8)
    write_gguf(path, make_model("Qwen2ForCausalLM", **sizes), "qwen2", Kind.Q8_0)
    with pytest.warns(UserWarning, match=r"2 matrices stay .* multiple of 64 .*down_proj.*rows of 96"):
        model = load_rast(path, quantization="int4-64", dtype="auto")
    (facts,) = model.info()["nets"]
    assert list(facts["weight_types"]) == ["int4-64", "Q8_0", "F32"]
    assert facts["weight_bytes"] == sum(facts["weight_types"].values())
    assert np.isfinite(model.forward(np.arange(9))).all()


# ---- the option ------------------------------------------------------------------------------------------------------


def test_roles() -> None:
    roles = ["base", "expert 1", "antiexpert 1", "expert 2", "antiexpert 2"]
    assert quantization_by_role(None, roles) == dict.fromkeys(roles)
    assert quantization_by_role("int8", roles) == dict.fromkeys(roles, "int8")
    got = quantization_by_role({"base": "int4", "expert": "int8", "expert 2": "none"}, roles)
    assert got == dict(zip(roles, ["int4", "int8", None, "none", None], strict=True))
    got = quantization_by_role({"base": None, "expert": "int8", "expert 2": None}, roles)
    assert got == dict(zip(roles, [None, "int8", None, None, None], strict=True))
    for option, kind, message in (
        ("int3", ValueError, "one of none, int8, int4, int4-64, not 'int3'"),
        ({"base": "q8"}, ValueError, "not 'q8'"),
        ({"base": 8}, ValueError, "not 8"),
        ({"expert 3": "int8"}, ValueError, "role 'expert 3'; the roles here are base, expert 1, expert, "),
        (8, TypeError, "not 8"),
        (["int8"], TypeError, "mapping"),
    ):
        with pytest.raises(kind, match=message):
            quantization_by_role(option, roles)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'antiexpert'; the roles here are base"):
        quantization_by_role({"antiexpert": "int8"}, ["base"])


@pytest.fixture(scope="module")
def trio(zoo: ModelZoo) -> tuple[Path, Path, Path]:
    sizes = dict(hidden_size=192, intermediate_size=320, max_position_embeddings=2048)
    return zoo.trio("llama", dtype="bfloat16", **sizes)


def test_each_role_as_asked(trio: tuple[Path, ...]) -> None:
    model = load_rast(*trio, quantization={"base": "int4", "expert": "int8"})
    assert [next(iter(net["weight_types"])) for net in model.info()["nets"]] == ["int4", "int8", "BF16"]
    assert "weights int8" in repr(model)
    with pytest.raises(ValueError, match="int5"):
        load_rast(*trio, quantization="int5")
    with pytest.raises(ValueError, match="role 'antiexpert'"):
        load_rast(trio[0], quantization={"antiexpert": "int8"})
    # the same files, quantized in one role only, are two nets; in both they are one
    model = load_rast(trio[0], trio[1], trio[1], quantization={"expert": "int8"})
    assert [net["roles"] for net in model.info()["nets"]] == [["base"], ["expert"], ["antiexpert"]]
    assert (model.score(np.arange(20)).kl[0, 1:] > 0).all()
    model = load_rast(trio[0], trio[1], trio[1], quantization="int8")
    assert [net["roles"] for net in model.info()["nets"]] == [["base"], ["expert", "antiexpert"]]


def test_memory(trio: tuple[Path, ...]) -> None:
    plain, *small = (
        load_rast(trio[0], quantization=name).info()["nets"][0] for name in (None, "int8", "int4", "int4-64")
    )
    for facts, bits in zip(small, (8.5, 5, 4.5), strict=True):
        assert facts["n_parameters"] == plain["n_parameters"]
        assert facts["weight_bytes"] == pytest.approx(plain["n_parameters"] * bits / 8, rel=0.01)
        assert facts["weight_bytes"] == sum(facts["weight_types"].values())


def test_command_line(trio: tuple[Path, ...]) -> None:
    def rast_info(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rast", "info", str(trio[0]), "--expert", str(trio[1]), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    shown = rast_info("--quantization", "base=int4-64, expert=int8", "--json")
    assert shown.returncode == 0, shown.stderr
    assert [list(net["weight_types"]) for net in json.loads(shown.stdout)["nets"]] == [
        ["int4-64", "BF16"],
        ["int8", "BF16"],
    ]
    shown = rast_info("--quantization", "int8")
    assert "stored as" in shown.stdout and shown.stdout.count("int8, BF16") == 2
    for value, message in (("int2", "int2"), ("base=int8,int4", "ROLE=NAME"), ("bass=int8", "'bass'")):
        shown = rast_info("--quantization", value)
        assert shown.returncode == 2
        assert message in shown.stderr


# ---- results ---------------------------------------------------------------------------------------------------------


def logits_of(net: Any, ids: np.ndarray, isa: str) -> np.ndarray:
    """Logits of every position, by the core alone."""
    parts = {"name": "net", "config": net.config, "tensors": net.tensors, "dtype": net.dtype}
    engine = _core.Engine(_core.Model([parts], isa=isa, num_threads=2), kv_bytes=1 << 22)
    request: Any = {
        "ids": ids.astype(np.int32),
        "coef": np.ones(1, np.float32),
        "max_new": 0,
        "want": _core.WANT_PROMPT | _core.WANT_LOGITS,
    }
    (result,) = engine.run([request])
    assert result["error"] is None and result["prompt"] is not None
    assert result["prompt"]["logits"] is not None
    return result["prompt"]["logits"]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", *BLOCKS])
def test_products_are_those_of_the_dequantized_weights(kind: str, isa: str, tmp_path: Path) -> None:
    """A head of quantized rows, under a body of floats: the logits are those of the gguf library's values, but for
    the hidden state's own rounding to 8 bits, which is computed here too and bounded."""
    n_vocab = 101
    save_model(tmp_path, hidden_size=64, vocab_size=n_vocab)
    net = load_net(tmp_path)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, n_vocab, 40)
    rows = np.eye(n_vocab, 64, dtype=np.float32)
    net.tensors["lm_head.weight"] = rows, "F32"
    hidden = logits_of(net, ids, isa)[:, :64].astype(np.float64)

    weights = rng.standard_normal((n_vocab, 64)) * rng.uniform(0.1, 10, (n_vocab, 1))
    raw = quantized(weights.astype(np.float32), kind)
    head = dequantized(raw, kind, n_vocab).astype(np.float64)
    net.tensors["lm_head.weight"] = raw, kind
    got = logits_of(net, ids, isa)

    groups = hidden.reshape(-1, 2, 32)
    scale = np.abs(groups).max(2, keepdims=True) / 127
    rounded = (np.rint(groups / scale) * scale).reshape(hidden.shape)
    sizes = np.abs(rounded) @ np.abs(head).T
    np.testing.assert_array_less(np.abs(got - rounded @ head.T), 1e-5 * sizes)
    bound = (np.repeat(scale / 2, 32, axis=2).reshape(hidden.shape) * 1.001) @ np.abs(head).T
    np.testing.assert_array_less(np.abs(got - hidden @ head.T), bound + 1e-5 * sizes)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", *BLOCKS])
def test_embedding_rows_are_the_dequantized_ones(kind: str, isa: str, tmp_path: Path) -> None:
    save_model(tmp_path, hidden_size=64, vocab_size=101)
    net = load_net(tmp_path)
    ids = np.arange(101)
    raw = quantized(net.tensors["model.embed_tokens.weight"][0], kind)
    net.tensors["model.embed_tokens.weight"] = raw, kind
    got = logits_of(net, ids, isa)
    net.tensors["model.embed_tokens.weight"] = np.ascontiguousarray(dequantized(raw, kind, 101)), "F32"
    np.testing.assert_array_equal(got, logits_of(net, ids, isa))


PROMPTS = random_prompts(17, 1031, seed=4, low=1, high=60)
SOME = (0, 7, 16)


@pytest.mark.parametrize("quantization", TYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_alone_or_in_a_batch(trio: tuple[Path, ...], quantization: str, options: str, isa: str) -> None:
    model = load_rast(*trio, dtype="bfloat16", quantization=quantization)
    together = run(model, PROMPTS, **OPTIONS[options])
    for i in SOME:
        assert_same(run(model, PROMPTS[i], **OPTIONS[options]), together[i : i + 1], f"prompt {i}")


MIXED = {"base": "int4", "expert": "int8", "antiexpert": "int4-64"}


@pytest.mark.parametrize("quantization", ["int8", {"expert": "int4"}])
def test_first_step_without_the_pair(trio: tuple[Path, ...], quantization: Any) -> None:
    """Models that do not run in a step leave nothing behind that its transfer could read."""
    alone = load_rast(trio[0], quantization="int8" if quantization == "int8" else None).generate(
        [[1, 2, 3]], max_new_tokens=4
    )
    model = load_rast(*trio, quantization=quantization)
    np.testing.assert_array_equal(model.generate([[1, 2, 3]], max_new_tokens=4, transfer_strength=0), alone)
    late = load_rast(*trio, quantization=quantization).generate([[1]], max_new_tokens=4, transfer_start=2)
    np.testing.assert_array_equal(model.generate([[1]], max_new_tokens=4, transfer_start=2), late)
    assert np.isfinite(
        load_rast(*trio, quantization=quantization).score([[1, 2, 3]], transfer_strength=0).logprob[0, 1:]
    ).all()


def test_number_of_threads(trio: tuple[Path, ...], isa: str) -> None:
    want = run(load_rast(*trio, num_threads=1, quantization=MIXED), PROMPTS, **OPTIONS["sampled"])
    for n in (2, 3, 7):
        model = load_rast(*trio, num_threads=n, quantization=MIXED)
        assert_same(run(model, PROMPTS, **OPTIONS["sampled"]), want, f"{n} threads")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_of_the_prompt(trio: tuple[Path, ...], dtype: str, isa: str) -> None:
    prompts = [*PROMPTS[:4], *random_prompts(2, 1031, seed=8, low=300, high=700)]
    options: dict[str, Any] = dict(dtype=dtype, quantization=MIXED)
    want = run(load_rast(*trio, max_batch_rows=2048, **options), prompts, **OPTIONS["sampled"])
    whole = load_rast(*trio, max_batch_rows=2048, **options).forward(prompts[4])
    for rows in (7, 100, 512):
        model = load_rast(*trio, max_batch_rows=rows, **options)
        assert_same(run(model, prompts, **OPTIONS["sampled"]), want, f"{rows} rows a step")
        np.testing.assert_array_equal(model.forward(prompts[4]), whole)


def test_prefill_or_steps(trio: tuple[Path, ...], isa: str) -> None:
    model = load_rast(*trio, dtype="bfloat16", quantization=MIXED)
    (row,) = run(model, PROMPTS[0], max_new_tokens=70, **OPTIONS["sampled"])
    ids = np.concatenate([PROMPTS[0], row["tokens"]])
    np.testing.assert_array_equal(model.forward(ids[:-1])[0, len(PROMPTS[0]) - 1 :], row["logits"])


# ---- quality ---------------------------------------------------------------------------------------------------------

TEXT = """\
The lighthouse stood at the end of a long spit of sand, and for as long as anyone in the village could remember its
keeper had been a woman named Ada. She lit the lamp at dusk, wrote down the weather in a blue book, and slept in the
morning. When the railway came, people said that ships would soon stop calling at the harbour. They were right about
the ships, but not about the lamp: the fishermen paid for the oil themselves.

Photosynthesis is the process by which green plants turn light into chemical energy. Water is split in the leaves,
oxygen is set free, and carbon dioxide from the air is built into sugar. The equation is usually written with six
molecules of each, though many steps lie in between.

def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)
"""


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    model = load_rast(gguf_path(), dtype="auto")
    assert model.tokenizer is not None
    return np.array(model.tokenizer.encode(TEXT))


def test_what_quantizing_costs(ids: np.ndarray) -> None:
    """KL to bfloat16 on a real model and text, nats a token. The file's own type is Q4_1 but for its embedding, so that
    int4 rounds only that anew, and groups of 64 round everything anew."""
    path = gguf_path()
    want = load_rast(path, dtype="bfloat16", quantization="none").forward(ids)[0]
    kl = {
        name: kl_divergence(want, load_rast(path, dtype="bfloat16", quantization=name).forward(ids)[0]).mean()
        for name in (None, "int8", "int4", "int4-64")
    }
    # measured: 0.003, 0.005, 0.07, 0.45
    assert 0 < kl[None] < 0.008
    assert kl[None] < kl["int8"] < 0.012
    assert kl["int8"] < kl["int4"] < 0.14
    assert kl["int4"] < kl["int4-64"] < 0.9


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_values_that_cannot_be_quantized(tmp_path: Path) -> None:
    """NaN and Inf are what they are without quantizing: an error that names the model, once it runs. A value beyond
    what a float16 scale reaches is an error at once."""
    for value in (np.nan, np.inf):
        model = make_model("Qwen2ForCausalLM", hidden_size=64, intermediate_size=96)
        model.model.layers[0].mlp.up_proj.weight.data[3, 5] = value
        model.save_pretrained(tmp_path)
        for name in TYPES:
            with pytest.raises(_core.NumericError, match="base"):
                load_rast(tmp_path, quantization=name).forward(np.arange(5))
            with pytest.raises(_core.NumericError, match="base"):
                load_rast(tmp_path, quantization=name).generate(np.arange(5), max_new_tokens=2)
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = 1e20
    model.save_pretrained(tmp_path)
    for name in ("int8", "int4"):
        with pytest.raises(ValueError, match=r"model\.safetensors: .*mlp\.up_proj.*too large"):
            load_net(tmp_path, quantization=name)


@pytest.mark.parametrize(
    ("array", "dtype", "kind", "message"),
    [
        (np.zeros((96, 35), np.uint8), "Q8_0", ValueError, "blocks of 34 bytes"),
        (np.zeros(68, np.uint8), "Q8_0", ValueError, "must be a matrix"),
        (np.zeros((96, 68), np.int8), "Q8_0", TypeError, "dtype int8 cannot hold Q8_0"),
        (np.zeros((96, 34), np.uint8), "Q8_0", ValueError, r"shape \[96, 32\], the config asks for \[96, 64\]"),
        (np.zeros((96, 136), np.uint8)[:, ::2], "Q8_0", ValueError, "C-contiguous"),
        (np.zeros((96, 34), np.uint8), "Q5_0", ValueError, "'Q5_0' is not one of F32, BF16, F16, Q8_0, Q4_0, Q4_1"),
        (np.zeros((101, 68), np.uint8), "int8", ValueError, r"shape \[101, 64\], the config asks for \[112, 64\]"),
        (np.zeros((112, 34), np.uint8), "int4-64", ValueError, "blocks of 36 bytes"),
    ],
)
def test_bad_tensors(array: np.ndarray, dtype: str, kind: type[Exception], message: str, tmp_path: Path) -> None:
    save_model(tmp_path, hidden_size=64, vocab_size=101 if dtype == "int8" else 96)
    net = load_net(tmp_path)
    tensors = net.tensors | {"lm_head.weight": (array, dtype)}
    with pytest.raises(kind, match=message):
        _core.Model([{"name": "net", "config": net.config, "tensors": tensors, "dtype": "float32"}])
    vector = net.tensors | {"model.norm.weight": (np.zeros((1, 68), np.uint8), "Q8_0")}
    with pytest.raises(ValueError, match="model.norm.weight"):
        _core.Model([{"name": "net", "config": net.config, "tensors": vector, "dtype": "float32"}])


def test_bad_arguments_of_quantize() -> None:
    rows, out = np.zeros((17, 64), np.float32), np.zeros((32, 68), np.uint8)
    _core.quantize(rows, "F32", "int8", out)
    for args, kind in (
        ((rows, "F32", "int8", out[:17]), ValueError),
        ((rows, "F32", "int4", out), ValueError),
        ((rows[:, :33].copy(), "F32", "int8", out), ValueError),
        ((rows, "BF16", "int8", out), TypeError),
        ((rows[:, ::2], "F32", "int8", out), TypeError),
        ((rows, "F32", "int8", out[:, ::-1]), TypeError),
        ((rows.view(np.uint8), "Q8_0", "int8", out), TypeError),
        ((rows, "F32", "Q4_0", np.zeros((17, 36), np.uint8)), NotImplementedError),
        ((rows, "F32", "Q8_0", np.zeros((17, 68), np.uint8)), NotImplementedError),
        ((rows, "F32", "F32", np.zeros((17, 256), np.uint8)), NotImplementedError),
        ((rows, "F32", "Q3", out), ValueError),
    ):
        with pytest.raises(kind):
            _core.quantize(*args)
    read_only = out.copy()
    read_only.flags.writeable = False
    with pytest.raises(TypeError):
        _core.quantize(rows, "F32", "int8", read_only)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sample") / "model.gguf"
    write_gguf(path, make_model("Qwen2ForCausalLM", hidden_size=64, intermediate_size=96), "qwen2", Kind.Q4_1)
    return path.read_bytes()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files(sample: bytes, tmp_path: Path) -> None:
    """Flipped bytes anywhere: the model runs, or says why not, and nothing is read beyond the file."""
    path = tmp_path / "model.gguf"
    header = sample.index(b"output_norm.weight") + 64
    rng = np.random.default_rng(0)
    ran = refused = 0
    for round in range(300):
        broken = bytearray(sample)
        for position in rng.integers(0, header if round % 3 else len(sample), rng.integers(1, 4)):
            broken[position] = rng.integers(0, 256)
        path.write_bytes(broken)
        try:
            load_rast(path, dtype="auto", num_threads=1).forward(np.arange(7))
        except (ValueError, NotImplementedError, _core.NumericError):
            refused += 1
        else:
            ran += 1
    assert ran + refused == 300
    assert ran > 50 and refused > 50


def test_truncated_files(sample: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for length in [*range(0, len(sample), 997), len(sample) - 64]:
        path.write_bytes(sample[:length])
        with pytest.raises(ValueError, match=r"model\.gguf: ") as caught:
            load_net(path)
        assert str(caught.value).startswith(str(path))


def test_rows_that_are_no_blocks(sample: bytes, tmp_path: Path) -> None:
    """A shape whose rows are not whole blocks is refused with the tensor's name, whichever the type."""
    path = tmp_path / "model.gguf"
    name = b"blk.0.ffn_up.weight"
    at = sample.index(name) + len(name) + 4
    for columns in (63, 48, 1):
        path.write_bytes(sample[:at] + struct.pack("<Q", columns) + sample[at + 8 :])
        with pytest.raises(ValueError, match=rf"blk\.0\.ffn_up\.weight.*rows of {columns} .*Q4_1's 32"):
            load_net(path)
