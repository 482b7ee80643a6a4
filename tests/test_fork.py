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
    return exit_status(pid)


def exit_status(pid: int) -> int:
    """-1: it hangs, and was killed."""
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


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_iterators_in_a_child(zoo: ModelZoo) -> None:
    """Reading one is an error there, leaving it is not; the parent reads on."""
    model = load_rast(zoo.folder("qwen2"), num_threads=2)
    samples = model.generate_iter(({"input_ids": PROMPT, "tag": i} for i in range(4)), max_new_tokens=1)
    stream = model.stream(PROMPT, max_new_tokens=4, eos_token_id=None)
    next(stream)
    next(samples)
    time.sleep(0.05)  # its source waits to be asked

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for iterator in (samples, stream):
                with pytest.raises(RuntimeError, match="fork"):
                    next(iterator)
            samples.close()
            del samples, stream, iterator
            status = 7
        finally:
            os._exit(status)
    assert exit_status(pid) == 7
    assert len(list(samples)) == 3 and len(list(stream)) == 3
    info = model.cache_info()
    assert info["n_free"] == info["n_blocks"]
