"""Fixtures for all tests."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from oracle import ModelZoo

from rast import _core

torch.set_num_threads(1)  # the models are small, and rast has threads of its own
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> ModelZoo:
    """Random models on disk, shared by all tests: never change their files."""
    return ModelZoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(params=_core.cpu_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this machine has, forced on the models loaded in the test."""
    monkeypatch.setenv("RAST_CPU_ISA", request.param)
    return str(request.param)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"instruction sets tested: {', '.join(_core.cpu_isas())}")
