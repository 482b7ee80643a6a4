"""What importing and loading cost: time above NumPy's own, and memory beside the mapped files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from oracle import ModelZoo


def run(code: str, *arguments: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


def test_import_time() -> None:
    code = "import time, numpy; start = time.perf_counter(); from rast import *; print(time.perf_counter() - start)"
    best = min(run(code)[0] for _ in range(5))
    assert best <= 0.15, f"import rast takes {best:.3f} s above NumPy"


def test_import_pulls_in_no_heavy_package() -> None:
    code = (
        "import sys; from rast import *\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'gguf', 'safetensors', 'huggingface_hub'};"
        "print(len(heavy & sys.modules.keys()))"
    )
    assert run(code) == [0]


def test_names_are_there() -> None:
    """They are imported when first used."""
    import rast

    for name in ("streaming", "demo", *rast.__all__):
        assert name in dir(rast)
        assert getattr(rast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rast.nothing  # noqa: B018


def test_weights_are_mapped_not_copied(zoo: ModelZoo) -> None:
    """Private memory grows by far less than the weights while a model loads and runs."""
    folder = zoo.folder("qwen2", dtype="bfloat16", vocab_size=40000, hidden_size=768, num_hidden_layers=1)
    code = """
import sys, numpy as np, rast
def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Anonymous:")) * 1024
rast.RastForCausalLM  # whatever is imported lazily
before = anonymous()
model = rast.RastForCausalLM.from_pretrained(sys.argv[1], device="cpu", dtype="bfloat16")
loaded = anonymous()
model.generate(np.arange(8), max_new_tokens=2)
print(loaded - before, anonymous() - before)
"""
    weights = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    assert weights > 100e6
    loaded, ran = run(code, str(folder))
    assert loaded < 0.25 * weights and ran < 0.5 * weights, (loaded, ran, weights)
