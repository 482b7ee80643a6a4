"""Folders of safetensors: same tensors as transformers, in place in the mapped file; broken folders refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading_files import ARCHITECTURES, edit_json, make_tokenizer, save_model, write_safetensors
from safetensors.numpy import load_file, save_file

from rast.loading import is_mapped, load_net

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    save_model(folder, "LlamaForCausalLM")
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A fresh copy of a float32 Llama to break."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.uint16).numpy()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("sharded", [False, True])
def test_tensors(architecture: str, stored: str, sharded: bool, tmp_path: Path) -> None:
    size = "10KB" if sharded else "1GB"
    model = save_model(tmp_path, architecture, DTYPES[stored], max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    net = load_net(tmp_path, name="expert")
    assert (net.name, net.source, net.path, net.architecture) == ("expert", str(tmp_path), tmp_path, architecture)
    assert net.dtype == NAMES[stored]
    assert net.tokenizer is None
    assert net.warnings == []
    state = model.state_dict()
    assert net.tensors.keys() == state.keys()
    for name, (array, dtype) in net.tensors.items():
        assert dtype == stored
        assert array.flags.c_contiguous
        assert not array.flags.writeable
        assert is_mapped(array)
        np.testing.assert_array_equal(array, bits(state[name]))


def test_dtype_fixes_the_rounding_only(folder: Path) -> None:
    net = load_net(folder, dtype="bfloat16")
    assert net.dtype == "bfloat16"
    assert {dtype for _, dtype in net.tensors.values()} == {"F32"}
    with pytest.raises(ValueError, match="dtype must be 'auto' or one of float32, bfloat16, float16"):
        load_net(folder, dtype="int8")


def test_key(folder: Path, original: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    net = load_net(folder)
    assert net.key() == load_net(str(link), name="expert").key() == load_net(folder, dtype="float32").key()
    assert net.key() != load_net(folder, dtype="bfloat16").key()
    assert net.key() != load_net(original).key()
    hash(net.key())


def test_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6], "temperature": 0.6}')
    edit_json(folder / "config.json", eos_token_id=7, bos_token_id=8)
    assert load_net(folder).generation_config == {"eos_token_id": [5, 6], "temperature": 0.6, "bos_token_id": 8}
    (folder / "generation_config.json").unlink()
    assert load_net(folder).generation_config == {"eos_token_id": 7, "bos_token_id": 8}
    edit_json(folder / "config.json", remove=("eos_token_id",), bos_token_id=None)
    assert load_net(folder).generation_config == {"eos_token_id": 2}  # what LlamaConfig assumes
    (folder / "generation_config.json").write_text("nonsense")
    with pytest.raises(ValueError, match=r"generation_config\.json: not valid JSON"):
        load_net(folder)


def test_tied_head(tmp_path: Path) -> None:
    save_model(tmp_path, "Qwen2ForCausalLM", tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    net = load_net(tmp_path)
    assert net.config["tie_word_embeddings"]
    assert "lm_head.weight" not in net.tensors

    head = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": head.copy()}, path)
    net = load_net(tmp_path)
    assert net.config["tie_word_embeddings"]
    assert "lm_head.weight" not in net.tensors

    save_file({**tensors, "lm_head.weight": head + 1}, path)
    net = load_net(tmp_path)
    assert not net.config["tie_word_embeddings"]
    np.testing.assert_array_equal(net.tensors["lm_head.weight"][0], head + 1)
    assert any("lm_head.weight differs from the embedding" in warning for warning in net.warnings)

    save_file({name: t for name, t in tensors.items() if "embed" not in name} | {"lm_head.weight": head}, path)
    net = load_net(tmp_path)
    assert net.config["tie_word_embeddings"]
    np.testing.assert_array_equal(net.tensors["model.embed_tokens.weight"][0], head)


def test_extra_tensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    harmless = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file(tensors | harmless, path)
    assert not any("not used" in warning for warning in load_net(folder).warnings)
    save_file(tensors | harmless | {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}, path)
    assert any("1 tensors are not used" in w and "q_proj.bias" in w for w in load_net(folder).warnings)
    save_file(tensors | {"counter": np.ones(3, np.int64)}, path)  # a dtype that matters only where it is used
    assert "counter" not in load_net(folder).tensors


def test_misaligned_tensors_are_copied(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    header, data = {}, b""
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    raw = json.dumps(header).encode()
    write_safetensors(path, raw + b" " * (1 + -len(raw) % 4), data)  # one beyond a multiple of four
    net = load_net(folder)
    assert any(f"{len(tensors)} tensors are not aligned" in warning for warning in net.warnings)
    for name, (array, _) in net.tensors.items():
        assert array.flags.aligned
        np.testing.assert_array_equal(array, tensors[name])


def test_mixed_dtypes(folder: Path) -> None:
    """Norms in float32 among 16-bit matrices: the matrices decide."""
    path = folder / "model.safetensors"
    tensors = {name: t if t.ndim == 1 else t.astype(np.float16) for name, t in load_file(path).items()}
    save_file(tensors, path)
    net = load_net(folder)
    assert net.dtype == "float16"
    assert net.tensors["model.norm.weight"][1] == "F32"


def test_missing_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(ValueError, match=f"tensor '{name}', shape \\[48, 32\\], is missing") as caught:
        load_net(folder)
    assert str(caught.value).startswith(str(path))
    save_file({key: tensor for key, tensor in tensors.items() if "norm" not in key}, path)
    with pytest.raises(ValueError, match=r"is missing \(and 4 more\)"):
        load_net(folder)


@pytest.mark.parametrize("shape", [(48, 31), (48,), (48, 32, 1), (32, 48), (0, 32)])
def test_wrong_shape(folder: Path, shape: tuple[int, ...]) -> None:
    path = folder / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**load_file(path), name: np.zeros(shape, np.float32)}, path)
    with pytest.raises(ValueError, match=r"the config asks for \[48, 32\]") as caught:
        load_net(folder)
    assert str(caught.value).startswith(f"{path}: tensor {name!r} has shape {list(shape)}")


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int64])
def test_unsupported_dtype(folder: Path, dtype: type[np.generic]) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), "model.norm.weight": np.zeros(32, dtype)}, path)
    with pytest.raises(NotImplementedError, match=r"'model.norm.weight' has dtype .*supported: F32, BF16, F16"):
        load_net(folder)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 0.5, -1])
def test_truncated(folder: Path, length: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * length) if isinstance(length, float) else length])
    with pytest.raises(ValueError, match=r"not a valid safetensors file|the file is empty") as caught:
        load_net(folder)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b"3", b"{}\xff", b"[" * 10000, b"\xff" * 64])
def test_header_that_is_no_object(folder: Path, header: bytes) -> None:
    path = folder / "model.safetensors"
    write_safetensors(path, header, bytes(8))
    with pytest.raises(ValueError, match="not a valid safetensors file: the header is not"):
        load_net(folder)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="the header ends beyond the file"):
        load_net(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F31"}, "F31"),
        ({"dtype": 5}, "is described by"),
        ({"shape": 32}, "is described by"),
        ({"shape": [-32]}, "is described by"),
        ({"shape": [32.0]}, "is described by"),
        ({"shape": [True]}, "is described by"),
        ({"shape": [31]}, r"F32 \[31\], has 128 bytes"),
        ({"shape": [2**62, 2**62]}, "has 128 bytes"),
        ({"data_offsets": [0]}, "is described by"),
        ({"data_offsets": None}, "is described by"),
        ({"data_offsets": [128, 0]}, "lies at bytes 128 to 0"),
        ({"data_offsets": [-4, 124]}, "lies at bytes -4 to 124"),
        ({"data_offsets": [0, 2**63]}, "lies at bytes"),
        ({"data_offsets": [0, 128]}, "invalid offset"),  # another tensor's place: the library's own words
    ],
)
def test_damaged_header(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["model.norm.weight"].update(change)
    write_safetensors(path, header, data[start:])
    with pytest.raises((ValueError, NotImplementedError), match=message) as caught:
        load_net(folder)
    assert str(caught.value).startswith(str(path))
    if message != "invalid offset":
        assert "'model.norm.weight'" in str(caught.value)


def test_random_damage(folder: Path) -> None:
    """Flipped bytes in the header: loads, or says why not, and never anything else."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    loaded = refused = 0
    for _ in range(200):
        broken = bytearray(data)
        for position in rng.integers(0, header_end, rng.integers(1, 4)):
            broken[position] = rng.integers(0, 256)
        path.write_bytes(broken)
        try:
            load_net(folder)
        except (ValueError, NotImplementedError) as error:
            refused += str(folder) in str(error)
        else:
            loaded += 1
    assert loaded + refused == 200
    assert refused > 150


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        load_net(folder)
    (folder / "model-q4.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"name the file itself to load .*model-q4.gguf"):
        load_net(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(NotImplementedError, match="convert them to safetensors"):
        load_net(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_net(folder)


def test_bad_index(tmp_path: Path) -> None:
    save_model(tmp_path, "LlamaForCausalLM", max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    name = "model.norm.weight"
    shard = good["weight_map"][name]

    def fails(kind: type[Exception], message: str, weight_map: Any) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(kind, match=message) as caught:
            load_net(tmp_path)
        assert str(caught.value).startswith(str(index))

    fails(ValueError, "weight_map must be an object", None)
    fails(ValueError, "'model.norm.weight' is mapped to 3", {name: 3})
    fails(ValueError, "not a file name", {name: "../outside.safetensors"})
    fails(FileNotFoundError, "'gone.safetensors', which holds tensor 'model.norm.weight'", {name: "gone.safetensors"})
    other = next(file for file in good["weight_map"].values() if file != shard)
    fails(ValueError, f"tensor 'model.norm.weight' is not in shard '{other}'", {**good["weight_map"], name: other})
    fails(ValueError, "'model.norm.weight', shape", {k: v for k, v in good["weight_map"].items() if k != name})
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: not valid JSON"):
        load_net(tmp_path)


def test_tokenizer_larger_than_the_embedding(folder: Path) -> None:
    make_tokenizer().save(str(folder / "tokenizer.json"))
    net = load_net(folder)
    assert net.tokenizer is not None
    assert any("the tokenizer has 260 tokens, the embedding 96 rows" in warning for warning in net.warnings)
