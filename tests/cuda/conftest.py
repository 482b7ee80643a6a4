"""Fixtures for the tests of the CUDA kernels and backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from device import Device, Memory


@pytest.fixture(scope="session")
def device() -> Device:
    """The library under test and its device."""
    return Device()


@pytest.fixture
def memory(device: Device) -> Iterator[Memory]:
    """Device memory, freed when the test ends."""
    with device.memory() as memory:
        yield memory
