"""fork(): a child has the parent's model but not its threads, and must say so at once."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from oracle import ModelZoo, load_rast

PROMPT = np.arange(1, 5)


def in_child(model: object) -> int:
    """Exit status of a forked child that generates: 7 for the RuntimeError that names fork()."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            model.generate(PROMPT, max_new_tokens=2)  # type: ignore[attr-defined]
        except RuntimeError as error:
            status = 7 if "fork()" in str(error) else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return -1


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("busy", [False, True])
def test_child_gets_an_error(zoo: ModelZoo, busy: bool) -> None:
    model = load_rast(zoo.folder("qwen2"), num_threads=2)
    want = model.generate(PROMPT, max_new_tokens=5)
    thread = threading.Thread(target=lambda: model.generate([PROMPT] * 32, max_new_tokens=60))
    if busy:
        thread.start()
        time.sleep(0.05)
    assert in_child(model) == 7
    if busy:
        thread.join()
    np.testing.assert_array_equal(model.generate(PROMPT, max_new_tokens=5), want)
