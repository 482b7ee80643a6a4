"""The C library without Python: its unit tests (tests/c), and the example that generates from C."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import rast

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / ("sanitize" if os.environ.get("RAST_SANITIZE") else "")
UNIT_TESTS = sorted(path.stem for path in (ROOT / "tests" / "c").glob("test_*.c"))


def build(name: str) -> Path:
    """Builds a program of the Makefile; returns it."""
    program = BUILD / name
    made = subprocess.run(
        ["make", "--silent", "-j2", str(program.relative_to(ROOT))], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return program


@pytest.mark.parametrize("name", UNIT_TESTS)
def test_unit(name: str) -> None:
    run = subprocess.run([build(f"tests/{name}")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def write_model(folder: Path, hidden: int, layers: int, vocab: int, tied: bool, seed: int) -> Path:
    """A random Qwen2 model as HuggingFace saves it."""
    rng = np.random.default_rng(seed)
    heads, kv_heads, head_dim, inner = 4, 2, hidden // 4, 2 * hidden
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {at + f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        for name, out in (("q", heads * head_dim), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)):
            shapes |= {at + f"self_attn.{name}_proj.weight": (out, hidden), at + f"self_attn.{name}_proj.bias": (out,)}
        shapes[at + "self_attn.o_proj.weight"] = (hidden, heads * head_dim)
        shapes |= {at + f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[at + "mlp.down_proj.weight"] = (hidden, inner)
    tensors = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "tie_word_embeddings": tied,
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("trio")
    return [
        write_model(folder / "base", 64, 3, 97, tied=False, seed=1),
        write_model(folder / "expert", 32, 2, 97, tied=True, seed=2),
        write_model(folder / "antiexpert", 32, 2, 97, tied=True, seed=3),
    ]


def generate(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([build("generate"), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.filterwarnings("ignore:.*tokenizer")
@pytest.mark.parametrize("n_models", [1, 3])
def test_example_generates_as_python_does(trio: list[Path], n_models: int) -> None:
    prompt = [5, 17, 3, 96, 41]
    pair = {"expert": trio[1], "antiexpert": trio[2]} if n_models == 3 else {}
    model = rast.RastForCausalLM.from_pretrained(trio[0], **pair)
    expected = model.generate(np.array(prompt), max_new_tokens=24, do_sample=False)[0, len(prompt) :]
    run = generate(24, *trio[:n_models], "--", *prompt)
    assert run.returncode == 0, run.stderr
    assert [int(word) for word in run.stdout.split()] == expected.tolist()


def test_example_reports_errors(trio: list[Path], tmp_path: Path) -> None:
    run = generate(4, trio[0], "--", 97)
    assert run.returncode != 0
    assert "97" in run.stderr
    folder = tmp_path / "truncated"
    folder.mkdir()
    (folder / "config.json").write_bytes((trio[0] / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes((trio[0] / "model.safetensors").read_bytes()[:-100])
    run = generate(4, folder, "--", 1)
    assert run.returncode == 1
    assert "does not lie inside the file" in run.stderr
