"""The demonstration in the package: where its four tiny models lie, and the three of them that make a transfer.

`rast.demo.problems` has the problems that they solve, `rast.demo.evaluate` measures how well, `rast demo` shows it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rast.modeling import RastForCausalLM

__all__ = ["MODELS", "NAMES", "load_demo", "paths"]

MODELS = Path(__file__).parent / "models"
"""The folder that holds a folder for each name."""
NAMES = ("small-base", "small-rl", "large-base", "large-rl")
"""A small and a large model before RL, and each after it."""
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def paths() -> dict[str, Path]:
    """The models' folders, in HuggingFace's layout, by the names in `NAMES`.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
    """
    folders = {name: MODELS / name for name in NAMES}
    missing = [path for folder in folders.values() for path in map(folder.joinpath, _FILES) if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"the demonstration's models are incomplete, so this installation of rast is broken: {missing[0]} "
            f"is missing ({len(missing)} of {len(NAMES) * len(_FILES)} files)"
        )
    return folders


def load_demo(**options: Any) -> RastForCausalLM:
    """The demonstration's transfer, large-base + λ · (small-rl − small-base), with its `tokenizer`.

    Args:
        **options: as in `RastForCausalLM.from_pretrained`, without the models: transfer_strength, dtype, num_threads, …

    Raises:
        FileNotFoundError: the models are missing.
        TypeError, ValueError: as `from_pretrained`.
    """
    given = options.keys() & {"base", "expert", "antiexpert", "pairs"}
    if given:
        raise TypeError(f"load_demo() chooses the models itself and takes no {', '.join(sorted(given))}")
    folders = paths()
    return RastForCausalLM.from_pretrained(
        folders["large-base"], expert=folders["small-rl"], antiexpert=folders["small-base"], **options
    )
