"""scan: finds NaN and Inf in the files, names them, and reports progress."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from loading_files import make_model, write_gguf

from rast.loading import scan

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
def test_folder(tmp_path: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    model = make_model("Qwen2ForCausalLM", dtype)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    seen: list[tuple[str, int, int]] = []
    assert scan(tmp_path, progress=lambda *args: seen.append(args)) == []
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2] == sum(p.numel() * p.element_size() for p in model.parameters())

    with torch.no_grad():
        weight = model.get_parameter(NAME)
        weight[0, :3] = torch.nan
        weight[1, 0] = torch.inf
        weight[1, 1] = -torch.inf
        weight[2, 0] = torch.finfo(dtype).max
        model.get_parameter("model.norm.weight")[0] = -torch.inf
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    findings = {finding.tensor: finding for finding in scan(tmp_path)}
    assert findings.keys() == {NAME, "model.norm.weight"}
    assert (findings[NAME].n_nan, findings[NAME].n_inf) == (3, 2)
    assert findings[NAME].file.suffix == ".safetensors"
    assert str(findings["model.norm.weight"]).endswith("tensor 'model.norm.weight' has 0 NaN and 1 Inf")


def test_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = make_model("Qwen2ForCausalLM", hidden_size=64, intermediate_size=64)
    write_gguf(path, model, "qwen2", gguf.GGMLQuantizationType.Q8_0)
    assert scan(path) == []
    with torch.no_grad():
        model.get_parameter("model.layers.0.input_layernorm.weight")[0] = torch.nan
    write_gguf(path, model, "qwen2", gguf.GGMLQuantizationType.Q8_0)
    data = np.fromfile(path, np.uint8)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    data[tensor.data_offset : tensor.data_offset + 2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    data.tofile(path)
    findings = {finding.tensor: (finding.n_nan, finding.n_inf) for finding in scan(path)}
    assert findings.keys() == {"blk.0.attn_norm.weight", "blk.1.ffn_up.weight"}
    assert findings["blk.0.attn_norm.weight"] == (1, 0)
    assert sum(findings["blk.1.ffn_up.weight"]) == 32  # the scale spoils its whole block


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        scan(tmp_path)
