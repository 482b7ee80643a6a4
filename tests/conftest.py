"""Fixtures for all tests."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from oracle import ModelZoo

torch.set_num_threads(1)  # the models are small, and rast has threads of its own
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> ModelZoo:
    """Random models on disk, shared by all tests: never change their files."""
    return ModelZoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512bf16"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this machine has, forced on the models loaded in the test."""
    from rast import _core

    if request.param not in _core.cpu_isas():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("RAST_CPU_ISA", request.param)
    return str(request.param)
