"""The contestants: each a class that a process of its own makes (`turns.py`), with the methods of `Peer`.

A module is imported only in its contestant's process, so that none carries another's libraries.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Generated(NamedTuple):
    """A greedy generation."""

    first: float  # seconds from the prompts to the first new token of each
    rest: float  # seconds of all tokens after it
    ids: Ids  # the new tokens, [batch, 1 + tokens]


class Peer(Protocol):
    """The models' logits are summed with coefficients 1, 1, −1; `roles` = 1 runs the base alone."""

    def facts(self) -> dict[str, Any]:
        """What the report says of it: `version`, `weight_bytes` and `kv_bytes_per_token` of each model, …"""

    def generate(self, prompts: Ids, tokens: int, roles: int) -> Generated:
        """1 + `tokens` greedy tokens after prompts [batch, length] that it has not seen before."""

    def steps(self, prompt: Ids, tokens: int, seconds: float, threads: int) -> list[float]:
        """Seconds of each greedy token after the first of prompt [length]; stops after so many tokens or seconds."""

    def workload(self, prompts: Ids, header: int, samples: int, tokens: int, batch: int, seed: int) -> list[float]:
        """Makes `samples` random samples of `tokens` tokens for each of prompts [n, length].

        Returns the seconds from the start to each step, as far as the contestant shows them, and to the end. The first
        `header` ids of all prompts are the same. At most `batch` sequences, a multiple of `samples`, run at once.
        """


CLASSES = {
    "memory": ("peers.memory", "Memory"),
    "rast": ("peers.rast_trio", "RastTrio"),
    "HuggingFace": ("peers.huggingface", "HuggingFaceTrio"),
    "llama.cpp": ("peers.llamacpp", "LlamaCppTrio"),
}

COEFFICIENTS = (1.0, 1.0, -1.0)  # base, expert, antiexpert


def find(kind: str) -> Any:
    """The contestant's class; ImportError if its library is missing or cannot be loaded."""
    module, name = CLASSES[kind]
    try:
        return getattr(importlib.import_module(module), name)
    except (OSError, RuntimeError) as error:
        raise ImportError(str(error)) from error
