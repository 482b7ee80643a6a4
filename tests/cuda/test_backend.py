"""The CUDA backend: choice of device, graphs, and what happens when things go wrong, as the emulation makes them."""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from backend import EMULATED, Emulation, library, run_python
from oracle import FULL, ModelZoo, load_rast, random_prompts

import rast
from rast import _core, devices

needs_emulation = pytest.mark.skipif(not EMULATED, reason="a real device does not fail on demand")

# Types that the core quantizes to -> (elements of a block, bytes of a row's block).
BLOCKS = {"int8": (32, 34), "int4": (32, 20), "int4-64": (64, 36)}
TILE = _core.TILE_ROWS
LATE_STEP = 19  # one call in so many fails; in the long form all do, shared out among so many tests

OUT_OF_MEMORY, NOT_SUPPORTED, LAUNCH_FAILURE, ILLEGAL_ADDRESS = 2, 801, 719, 700  # of cudaError


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAST_CUDA_PLUGIN", str(library()))
    monkeypatch.setenv("CUDA_EMULATION_QUIET", "1")


@pytest.fixture
def emulation() -> Iterator[Any]:
    """Sound before and after; None on a real device."""
    emulation = Emulation() if EMULATED else None
    yield emulation
    if emulation:
        emulation.defaults()


@pytest.fixture(scope="module")
def folders(zoo: ModelZoo) -> tuple[Path, Path, Path]:
    return zoo.trio("llama-bias", num_hidden_layers=1)


def generate(model: Any, **options: Any) -> Any:
    prompts = random_prompts(3, 300, seed=4, low=2, high=35)
    options = dict(do_sample=True, seed=5, max_new_tokens=6, pad_token_id=0) | options
    return model.generate(prompts, return_dict_in_generate=True, **options)


def rast_info(*arguments: str) -> str:
    """What the command prints."""
    from typer.testing import CliRunner  # perhaps not there on a GPU machine

    from rast.cli.commands import app

    return CliRunner().invoke(app, ["info", *arguments]).output


# ---- which device ----------------------------------------------------------------------------------------------------


def test_device_names(folders: tuple[Path, Path, Path]) -> None:
    for name in ("cuda", "cuda:0", "auto"):
        info = load_rast(folders[0], device=name).info()
        assert (info["device"], info["device_reason"]) == ("cuda:0", "")
    for name in ("gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", ""):
        with pytest.raises(ValueError, match=re.escape(repr(name))):
            load_rast(folders[0], device=name)


@needs_emulation
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("driver", 0, "no NVIDIA driver"),
        ("driver", 12080, r"too old.*CUDA 12\.8.*13\.0"),
        ("devices", 0, "no CUDA device"),
        ("capability", 75, r"capability 7\.5.*8\.0"),
    ],
)
def test_machine_without_a_usable_device(
    emulation: Emulation, folders: tuple[Path, Path, Path], setting: str, value: int, message: str
) -> None:
    getattr(emulation.lib, f"cuda_emulation_{setting}")(value)
    with pytest.raises(RuntimeError, match=message):
        load_rast(folders[0], device="cuda")
    info = load_rast(folders[0], device="auto").info()
    assert info["device"] == "cpu"
    assert re.search(message, info["device_reason"])
    output = rast_info(str(folders[0]))
    assert re.search(f"not on CUDA: .*{message}", output) and "device: cpu" in output, output


@needs_emulation
def test_device_that_nothing_was_compiled_for(emulation: Emulation, folders: tuple[Path, Path, Path]) -> None:
    emulation.lib.cuda_emulation_images(90)
    emulation.lib.cuda_emulation_capability(86)
    with pytest.raises(RuntimeError, match=r"no kernels for compute capability 8\.6"):
        load_rast(folders[0], device="cuda")
    assert "no kernels" in load_rast(folders[0], device="auto").info()["device_reason"]
    emulation.lib.cuda_emulation_capability(90)
    load_rast(folders[0], device="cuda")


@needs_emulation
def test_other_devices_are_left_alone(folders: tuple[Path, Path, Path]) -> None:
    """A context takes hundreds of MiB: none is made on the thread's device of before, unless it has one."""
    code = f"""
import ctypes, os
from pathlib import Path
import numpy as np, rast
emulation = ctypes.CDLL(str(Path(os.environ["RAST_CUDA_PLUGIN"]).with_name("libcuda_emulated.so")))
device = ctypes.c_int(-1)
def use():
    model = rast.RastForCausalLM.from_pretrained({str(folders[0])!r}, device="cuda:1", dtype="float32")
    model.generate(np.arange(5), max_new_tokens=3, do_sample=False, pad_token_id=0)
    print(model.info()["device"], emulation.cuda_emulation_contexts())
use()
assert emulation.cudaSetDevice(0) == 0
use()
assert emulation.cudaGetDevice(ctypes.byref(device)) == 0
print(device.value)
"""
    out = run_python(code, CUDA_EMULATION_DEVICES="2")
    assert out.split() == ["cuda:1", "2", "cuda:1", "3", "0"]


@needs_emulation
def test_device_numbers(emulation: Emulation, folders: tuple[Path, Path, Path]) -> None:
    with pytest.raises(RuntimeError, match="no such device.*shows 1"):
        load_rast(folders[0], device="cuda:1")
    emulation.lib.cuda_emulation_devices(2)
    first, second = (load_rast(*folders, device=name) for name in ("cuda:0", "cuda:1"))
    assert second.info()["device"] == "cuda:1"
    for _ in range(2):  # in turn: each call selects its own
        np.testing.assert_array_equal(generate(first).sequences, generate(second).sequences)
    current = ctypes.c_int(-1)
    emulation.lib.cudaGetDevice(ctypes.byref(current))
    assert current.value == 0  # and leaves the caller's as it was


@needs_emulation
def test_plugins_that_are_none(
    emulation: Emulation, folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    for path, message in (
        (tmp_path / "missing.so", "does not exist"),
        (broken, "cannot be loaded"),
        (library().with_name("libcuda_emulated.so"), "not a backend"),
    ):
        monkeypatch.setenv(devices.PLUGIN, str(path))
        with pytest.raises(RuntimeError, match=message):
            load_rast(folders[0], device="cuda")
        assert re.search(message, load_rast(folders[0], device="auto").info()["device_reason"])
    with pytest.raises(RuntimeError, match="no path was given"):
        _core.check_device("cuda")
    with pytest.raises(ValueError, match="tpu"):
        _core.check_device("tpu")


def test_quantization_is_for_the_cpu(folders: tuple[Path, Path, Path]) -> None:
    for option in ("int8", "int4", {"base": "int4-64"}):
        with pytest.raises(ValueError, match="for the CPU"):
            load_rast(folders[0], device="cuda", quantization=option)
    assert load_rast(folders[0], device="auto", quantization="none").info()["device"] == "cuda:0"


def test_after_fork(folders: tuple[Path, Path, Path]) -> None:
    """The child gets an error, frees the model without a crash, and the parent goes on."""
    code = f"""
import os, sys
import numpy as np
from rast import _core
import rast
model = rast.RastForCausalLM.from_pretrained({str(folders[0])!r}, device="cuda", dtype="float32")
first = model.generate(np.arange(5), max_new_tokens=3, do_sample=False, pad_token_id=0)
child = os.fork()
if child == 0:
    try:
        model._process = os.getpid()  # past Python's own check
        model.generate(np.arange(5), max_new_tokens=3, pad_token_id=0)
    except RuntimeError as error:
        del model
        os._exit(7 if "fork" in str(error) else 8)
    os._exit(9)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert (model.generate(np.arange(5), max_new_tokens=3, do_sample=False, pad_token_id=0) == first).all()
print("alive")
"""
    assert run_python(code).strip() == "alive"


# ---- memory ----------------------------------------------------------------------------------------------------------


@needs_emulation
def test_everything_is_released(emulation: Emulation, folders: tuple[Path, Path, Path]) -> None:
    model = load_rast(*folders, device="cuda", kv_cache_tokens=512)
    generate(model, output_logits=True, output_scores=True, repetition_penalty=1.2, suppress_tokens=[3])
    assert emulation.alive().left()
    del model
    assert emulation.alive().left() == {}


@needs_emulation
def test_too_little_memory_at_load(emulation: Emulation, folders: tuple[Path, Path, Path]) -> None:
    """Weights: said before anything is copied. The cache: before it is made."""
    emulation.lib.cuda_emulation_memory(100 << 10)
    with pytest.raises(MemoryError, match=r"weights of all models take [\d.]+ MiB.*[\d.]+ MiB are free"):
        load_rast(*folders, device="cuda")
    with pytest.raises(
        MemoryError, match=r"KV cache for \d+ tokens takes \d+ bytes, and \d+ are free: there is room for"
    ):
        load_with(emulation, folders, 180 << 20, kv_cache_tokens=1 << 20, max_context=65536)
    plan = (
        r"of the device's 180\.0 MiB [\d.]+ are free beside [\d.]+ MiB of weights and [\d.]+ MiB of a step's workspace"
    )
    with pytest.raises(MemoryError, match=plan):
        load_with(emulation, folders, 180 << 20, kv_cache_tokens=1 << 20, max_context=65536)
    with pytest.raises(MemoryError, match=r"no memory for 32\.0 MiB of the workspace: .* holds [\d.]+ MiB of weights"):
        load_with(emulation, folders, 24 << 20)
    assert emulation.alive().left() == {}


def load_with(emulation: Emulation, folders: tuple[Path, Path, Path], memory: int, **options: Any) -> Any:
    emulation.lib.cuda_emulation_memory(memory)
    return load_rast(*folders, device="cuda", **options)


@needs_emulation
def test_too_little_memory_in_use(emulation: Emulation, folders: tuple[Path, Path, Path]) -> None:
    """A step that needs more than there is fails; the model is sound, and goes on when there is memory again."""
    want = generate(load_rast(*folders, device="cuda", kv_cache_tokens=512), output_logits=True)
    model = load_with(emulation, folders, 4 << 30, kv_cache_tokens=512)
    np.testing.assert_array_equal(generate(model).sequences, want.sequences)
    emulation.lib.cuda_emulation_memory(emulation.alive().device_bytes + 1000)
    with pytest.raises(MemoryError, match="no memory for .* of the workspace"):
        generate(model, output_logits=True)
    emulation.lib.cuda_emulation_memory(4 << 30)
    got = generate(model, output_logits=True)
    np.testing.assert_array_equal(got.sequences, want.sequences)
    np.testing.assert_array_equal(np.stack(got.logits), np.stack(want.logits))


@needs_emulation
def test_cache_takes_what_is_left(emulation: Emulation, folders: tuple[Path, Path, Path]) -> None:
    """The plan adds up to the device's memory, and holds: the largest steps find all their buffers there."""
    memory = 768 << 20
    model = load_with(emulation, folders, memory, max_context=65536, max_batch_size=16)
    info = model.cache_info()
    assert info["device_bytes"] == memory
    assert info["device_weights"] + info["device_work"] + info["kv_bytes"] + info["device_free"] == memory
    assert info["device_weights"] == sum(net["device_bytes"] for net in model._core_model.net_info())
    one_block = info["kv_bytes"] // info["n_blocks"]
    assert 0 <= info["device_free"] - info["device_kept"] < one_block + info["kv_bytes"] // 50
    assert 256 << 20 < info["device_kept"] < 300 << 20
    prompts = random_prompts(8, 300, seed=4, low=30, high=60)
    options: dict[str, Any] = dict(max_new_tokens=2, pad_token_id=0, eos_token_id=None)
    model.generate(prompts, num_assistant_tokens=0, **options)
    model.generate(prompts, num_assistant_tokens=4, do_sample=False, **options)
    model.generate([np.arange(600) % 290], num_assistant_tokens=0, **options)
    model.generate(prompts, transfer_strength=[[0], [1]] * 4, num_assistant_tokens=0, do_sample=False, **options)
    grown = model.cache_info()["device_work"] - info["device_work"]
    assert grown < 1 << 20, grown  # descriptors of a step, rows of drafts
    del model
    total = sum(net["device_bytes"] for net in load_rast(*folders, device="cuda")._core_model.net_info())
    model = load_rast(*folders, device="cuda", max_memory=total + (4 << 20))
    assert 3 << 20 < model.cache_info()["kv_bytes"] <= 4 << 20
    with pytest.raises(ValueError, match="max_memory"):
        load_rast(*folders, device="cuda", max_memory=total)


@needs_emulation
def test_info_shows_the_plan(folders: tuple[Path, Path, Path]) -> None:
    arguments = [str(folders[0]), "--device", "cuda"]
    output = rast_info(*arguments)
    assert re.search(r"device memory: 4\.0 GiB: weights .* workspace .* KV cache .*\([\d,]+ tokens\)", output), output
    memory = json.loads(rast_info(*arguments, "--json"))["memory"]
    parts = ("device_weights", "device_work", "kv_bytes", "device_free")
    assert sum(memory[name] for name in parts) == memory["device_bytes"] == 4 << 30


# ---- errors of the device --------------------------------------------------------------------------------------------


def n_objects(left: dict[str, int]) -> int:
    return sum(left.values()) - left.get("device_bytes", 0)


@needs_emulation
def test_every_call_may_fail(emulation: Emulation, folders: tuple[Path, Path, Path]) -> None:
    """The n-th call of a load and a run fails: an exception or the right result, and all is released. A device that
    has failed is not used again; one that ran out of memory is."""
    want = generate(load_rast(*folders, device="cuda", kv_cache_tokens=256)).sequences
    before = emulation.lib.cuda_emulation_calls()
    model = load_rast(*folders, device="cuda", kv_cache_tokens=256)
    at_load = emulation.lib.cuda_emulation_calls() - before
    generate(model)
    n_calls = emulation.lib.cuda_emulation_calls() - before
    del model
    # all of some stretches: opening, the first weights, the end of loading and the first steps
    sweep = range(1, n_calls + 1) if FULL else [*range(1, 40, 5), *range(at_load - 6, n_calls + 1, n_calls // 25)]
    failed = 0
    kinds: set[tuple[bool, bool]] = set()  # memory was missing; and that was said
    lost: dict[str, int] = {}
    for i, n in enumerate(sweep):
        for error in (OUT_OF_MEMORY, (NOT_SUPPORTED, LAUNCH_FAILURE)[i % 2]):
            emulation.lib.cuda_emulation_fail_call(n, error)
            model, told = None, False
            try:
                model = load_rast(*folders, device="cuda", kv_cache_tokens=256)
                got = generate(model)
                np.testing.assert_array_equal(got.sequences, want)
            except (RuntimeError, MemoryError) as exception:
                failed += 1
                told = True
                kinds.add((error == OUT_OF_MEMORY, isinstance(exception, MemoryError)))
                emulation.lib.cuda_emulation_fail_call(0, 0)
                if model is not None and isinstance(exception, MemoryError):
                    np.testing.assert_array_equal(generate(model).sequences, want)
                elif model is not None:
                    with pytest.raises(RuntimeError, match="has failed and is not used any more"):
                        generate(model)
            emulation.lib.cuda_emulation_fail_call(0, 0)
            del model
            if error == LAUNCH_FAILURE:  # corrupts the context: nothing works in this process any more
                with pytest.raises(RuntimeError, match="start a new one"):
                    load_rast(folders[0], device="cuda")
                emulation.lib.cuda_emulation_reset()
                assert emulation.alive().left() == {}
                lost = {}
                continue
            left = emulation.alive().left()
            if told:
                assert left == lost, (n, error)
            else:  # a call that releases something may have failed, and nothing else
                assert n_objects(left) <= n_objects(lost) + 1, (n, error)
                lost = left
            emulation.lib.cuda_emulation_reset()
    assert failed > len(sweep)
    assert kinds == {(True, True), (False, False)}


@needs_emulation
@pytest.mark.parametrize("n", [1, 40, *range(150, 250, 13)])
def test_error_in_the_middle_of_a_step(
    emulation: Emulation, folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """Work fails as it runs, as after an illegal access: the model says so, refuses and lets go; the process lives, but
    can use the device no more. The later ones fail in steps that run behind another one."""
    monkeypatch.setenv("RAST_CUDA_GRAPHS", "0")
    model = load_rast(*folders, device="cuda", kv_cache_tokens=256)
    emulation.lib.cuda_emulation_fail_work(n, ILLEGAL_ADDRESS)
    emulation.lib.cuda_emulation_devices(2)
    with pytest.raises(RuntimeError, match="cuda:0 failed while.*start a new one"):
        generate(model, num_assistant_tokens=0, eos_token_id=None, max_new_tokens=12)
    with pytest.raises(RuntimeError, match="not used any more.*start a new one"):
        generate(model)
    del model
    with pytest.raises(RuntimeError, match="cannot be used: an illegal memory access.*start a new one"):
        load_rast(folders[0], device="cuda:0")
    assert "start a new one" in load_rast(folders[0], device="auto").info()["device_reason"]
    generate(load_rast(*folders, device="cuda:1", kv_cache_tokens=256))  # another device has its own context
    emulation.defaults()  # a new process
    assert emulation.alive().left() == {}
    generate(load_rast(*folders, device="cuda", kv_cache_tokens=256))


@needs_emulation
@pytest.mark.parametrize("vague", [0, 1])
@pytest.mark.parametrize("first", range(1, LATE_STEP + 1) if FULL else [1])
def test_no_memory_for_what_cuda_loads_late(
    emulation: Emulation, folders: tuple[Path, Path, Path], first: int, vague: int
) -> None:
    """Kernels are loaded when first launched, cuBLAS's too, and graphs take memory at their first launch: whatever call
    of a step finds none, it is out of memory, or done without, and the model goes on."""
    options: dict[str, Any] = dict(num_assistant_tokens=0, eos_token_id=None, max_new_tokens=4)
    model = load_with(emulation, folders, 4 << 30, kv_cache_tokens=256)
    before = emulation.lib.cuda_emulation_calls()
    want = generate(model, **options).sequences
    n_calls = emulation.lib.cuda_emulation_calls() - before
    emulation.lib.cuda_emulation_vague_blas(vague)
    told = []
    for n in range(first, n_calls + 1, LATE_STEP):
        model = load_with(emulation, folders, 4 << 30, kv_cache_tokens=256)
        emulation.lib.cuda_emulation_memory(emulation.alive().device_bytes + (40 << 20))
        emulation.lib.cuda_emulation_fail_call(n, OUT_OF_MEMORY)
        try:
            np.testing.assert_array_equal(generate(model, **options).sequences, want)
        except MemoryError as error:
            told.append(str(error))
        emulation.lib.cuda_emulation_fail_call(0, 0)
        np.testing.assert_array_equal(generate(model, **options).sequences, want)
    assert len(told) > 3
    assert all(re.search(r"no memory (while|for) .*MiB are free|page-locked", text) for text in told), told


# ---- a step ahead ----------------------------------------------------------------------------------------------------


def queued(emulation: Emulation) -> int:
    """Kernels that were submitted and have not run; afterwards they have."""
    counts = [(ctypes.c_uint64 * 14)() for _ in range(2)]
    emulation.lib.cuda_emulation_counters(None, counts[0])
    assert emulation.lib.cudaDeviceSynchronize() == 0
    emulation.lib.cuda_emulation_counters(None, counts[1])
    return int(counts[1][0] - counts[0][0])


@needs_emulation
@pytest.mark.parametrize("graphs", ["1", "0"])
def test_next_step_is_submitted_before_this_one_is_collected(
    emulation: Emulation, folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, graphs: str
) -> None:
    """When a step's token is out, the device already has the next step; but for the first, a prompt's, and the last."""
    monkeypatch.setenv("RAST_CUDA_GRAPHS", graphs)
    (prompt,) = random_prompts(1, 300, seed=4, low=9, high=9)
    options: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, num_assistant_tokens=0, eos_token_id=None)
    found = {}
    for ahead in ("1", "0"):
        monkeypatch.setenv("RAST_RUN_AHEAD", ahead)
        model = load_rast(*folders, device="cuda", kv_cache_tokens=512)
        found[ahead] = [(len(ids), queued(emulation)) for ids in model.stream(prompt, **options)]
    assert [n for n, _ in found["0"]] == [n for n, _ in found["1"]] == [1] * 12
    assert [kernels for _, kernels in found["0"]] == [0] * 12
    kernels = [kernels for _, kernels in found["1"]]
    assert kernels[0] == kernels[-1] == 0 and len(set(kernels[1:-1])) == 1 and kernels[1] > 20, kernels


def varied(model: Any) -> list[Any]:
    """Samples that end when nobody expects it, that wait for each other, and that cannot run ahead."""
    prompts = random_prompts(6, 300, seed=6, low=1, high=40)
    plain: dict[str, Any] = dict(do_sample=True, seed=3, max_new_tokens=18, pad_token_id=0, num_assistant_tokens=0)
    calls: list[dict[str, Any]] = [
        dict(eos_token_id=list(range(0, 300, 12)), num_return_sequences=2, temperature=1.3),
        dict(do_sample=False, min_new_tokens=5, eos_token_id=list(range(0, 300, 3))),
        dict(transfer_strength=[[1], [0], [0.5]] * 2, transfer_start=4, eos_token_id=[7]),
        dict(repetition_penalty=1.2, eos_token_id=None, max_new_tokens=5),
        dict(suppress_tokens=[3, 4], top_k=9, eos_token_id=list(range(0, 300, 30))),
        dict(num_assistant_tokens="auto", eos_token_id=[5, 6]),
    ]
    return [model.generate(prompts, return_dict_in_generate=True, **(plain | call)) for call in calls]


@needs_emulation
@pytest.mark.parametrize("graphs", ["1", "0"])
@pytest.mark.parametrize("tokens", [512, 128])
def test_running_ahead_changes_nothing(
    emulation: Emulation, folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, tokens: int, graphs: str
) -> None:
    """Bit by bit (products of the emulation do not depend on the number of rows), in any order that streams allow."""
    monkeypatch.setenv("RAST_CUDA_GRAPHS", graphs)
    outputs = []
    for ahead, seed in (("0", 0), ("1", 0), *(("1", seed) for seed in range(1, 8 if FULL else 2))):
        monkeypatch.setenv("RAST_RUN_AHEAD", ahead)
        model = load_rast(*folders, device="cuda", kv_cache_tokens=tokens, max_batch_size=6)
        emulation.lib.cuda_emulation_seed(seed)
        outputs.append(varied(model))
        assert emulation.lib.cuda_emulation_report() == b""
    for other in outputs[1:]:
        for want, got in zip(outputs[0], other, strict=True):
            np.testing.assert_array_equal(got.sequences, want.sequences)
            assert got.finish_reason == want.finish_reason
            np.testing.assert_array_equal(got.logprob, want.logprob)


@needs_emulation
def test_stopping_while_a_step_runs(emulation: Emulation, folders: tuple[Path, Path, Path]) -> None:
    """A stream that is left, a request whose time is over: what was under way does not matter to the next."""
    before = emulation.alive().left()
    model = load_rast(*folders, device="cuda", kv_cache_tokens=256)
    prompts = random_prompts(2, 300, seed=8, low=20, high=40)
    options: dict[str, Any] = dict(do_sample=False, num_assistant_tokens=0, eos_token_id=None, pad_token_id=0)
    want = model.generate(prompts, max_new_tokens=30, **options)
    for n in range(1, 7):
        stream = model.stream(prompts[0], max_new_tokens=60, **options)
        for _ in range(n):
            next(stream)
        stream.close()
        np.testing.assert_array_equal(model.generate(prompts, max_new_tokens=30, **options), want)
    timed = model.generate(prompts, max_new_tokens=200, max_time=0.02, return_dict_in_generate=True, **options)
    assert set(timed.finish_reason) <= {"time", "length"}
    np.testing.assert_array_equal(model.generate(prompts, max_new_tokens=30, **options), want)
    stream = model.stream(prompts[0], max_new_tokens=60, **options)
    next(stream), next(stream), next(stream)
    del stream, model  # with a step under way
    assert emulation.alive().left() == before


# ---- graphs ----------------------------------------------------------------------------------------------------------


def steps(model: Any) -> list[Any]:
    """Calls whose steps differ in all that a graph's key must hold: batch, context, rows, masks, histories, pairs."""
    long = dict(max_new_tokens=12, min_new_tokens=12, eos_token_id=1)
    calls: list[dict[str, Any]] = [
        long,
        dict(output_logits=True),
        dict(num_return_sequences=3, output_scores=True, top_k=5),
        dict(repetition_penalty=1.3, output_logits=True, num_return_sequences=4),
        long | dict(transfer_strength=[[1], [0], [0.5]]),
        dict(suppress_tokens=[3, 4], output_scores=True),
        long | dict(do_sample=False),
        dict(output_logits=True, num_return_sequences=2),
    ]
    return [generate(model, **call) for call in calls]


@pytest.mark.parametrize("seed", range(20) if FULL else range(2))
def test_graphs_change_nothing(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, seed: int, emulation: Emulation | None
) -> None:
    """Replayed steps give the numbers of recorded ones, bit by bit, in any order that streams allow."""
    outputs = []
    for graphs in ("1", "0"):
        monkeypatch.setenv("RAST_CUDA_GRAPHS", graphs)
        model = load_rast(*folders, device="cuda", kv_cache_tokens=2048)
        if emulation:
            emulation.lib.cuda_emulation_seed(seed)
        outputs.append(steps(model))
        if emulation:
            assert (emulation.alive().graph_execs > 8) == (graphs == "1")
            assert emulation.lib.cuda_emulation_report() == b""
        del model
    for with_graphs, without in zip(*outputs, strict=True):
        np.testing.assert_array_equal(with_graphs.sequences, without.sequences)
        for name in ("logprob", "base_logprob", "transfer_kl", "logits", "scores"):
            np.testing.assert_array_equal(getattr(with_graphs, name), getattr(without, name), err_msg=name)


@pytest.mark.parametrize(
    ("type", "vocab", "hidden"),
    [
        *((type, 67, 64) for type in ("int8", "int4", "int4-64", "Q8_0", "Q4_0", "Q4_1")),
        ("int4", 21_900, 96),  # more than one buffer, of which 21,845 rows would fit
    ],
)
def test_dequantized_on_the_way(type: str, vocab: int, hidden: int, folders: tuple[Path, Path, Path]) -> None:
    """Blocks of quantized types arrive as the numbers they stand for."""
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "model.layers.0.input_layernorm.weight": (hidden,),
        "model.layers.0.post_attention_layernorm.weight": (hidden,),
        **{f"model.layers.0.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"},
        "model.layers.0.mlp.gate_proj.weight": (128, hidden),
        "model.layers.0.mlp.up_proj.weight": (128, hidden),
        "model.layers.0.mlp.down_proj.weight": (hidden, 128),
    }
    weights = {name: rng.normal(size=shape).astype(np.float32) / 4 for name, shape in shapes.items()}
    config: _core.NetConfig = dict(
        n_layers=1, n_heads=hidden // 32, n_kv_heads=hidden // 32, head_dim=32, hidden_size=hidden,
        intermediate_size=128, vocab_size=vocab, max_context=64, rms_norm_eps=1e-5, rope_theta=1e4,
        tie_word_embeddings=True,
    )  # fmt: skip

    def logits(tensors: Any) -> Any:
        net: _core.Net = dict(name="net", config=config, tensors=tensors, dtype="float32")
        model = _core.Model([net], device="cuda", plugin=os.environ[devices.PLUGIN])
        request: _core.Request = dict(
            ids=np.arange(9, dtype=np.int32), coef=np.ones(1, np.float32), max_new=0,
            want=_core.WANT_PROMPT | _core.WANT_LOGITS,
        )  # fmt: skip
        (result,) = _core.Engine(model, kv_bytes=1 << 20).run([request])
        return result["prompt"]["logits"]

    blocks: dict[str, Any] = {}
    floats: dict[str, Any] = {}
    for name, array in weights.items():
        if array.ndim == 1:
            blocks[name] = floats[name] = (array, "F32")
        elif type in BLOCKS:
            group, block = BLOCKS[type]
            out = np.zeros((-(-len(array) // TILE) * TILE, array.shape[1] // group * block), np.uint8)
            _core.quantize(array, "F32", type, out)
            blocks[name], floats[name] = (out, type), (dequantized(out, type, array.shape), "F32")
        else:
            kind = gguf.GGMLQuantizationType[type]
            out = gguf.quants.quantize(array, kind)
            blocks[name], floats[name] = (out, type), (gguf.quants.dequantize(out, kind), "F32")
    np.testing.assert_array_equal(logits(blocks), logits(floats))


def dequantized(stored: Any, type: str, shape: tuple[int, ...]) -> Any:
    """By the definition of the types in csrc/rast.h."""
    tile, group, n_scales = TILE, (64 if type == "int4-64" else 32), (1 if type == "int8" else 2)
    block = tile * (2 * n_scales + (group if type == "int8" else group // 2))
    blocks = stored.reshape(len(stored) // tile, -1, block)
    scales = blocks[..., : 2 * tile * n_scales].copy().view(np.float16).astype(np.float32)
    scales = scales.reshape(*blocks.shape[:2], n_scales, tile, 1)
    words = blocks[..., 2 * tile * n_scales :].reshape(*blocks.shape[:2], -1, tile, 4)
    q = words.swapaxes(2, 3).reshape(*blocks.shape[:2], tile, -1)  # [tiles, blocks, rows, bytes]
    if type == "int8":
        values = scales[:, :, 0] * q.view(np.int8)
    else:
        halves = q.reshape(*q.shape[:3], -1, 1, 16)
        numbers = np.concatenate([halves & 15, halves >> 4], axis=-2).reshape(*q.shape[:3], group)
        values = scales[:, :, 0] * numbers + scales[:, :, 1]
    return np.ascontiguousarray(values.swapaxes(1, 2).reshape(len(stored), -1)[: shape[0]])


def test_info_names_the_device(folders: tuple[Path, Path, Path]) -> None:
    model = load_rast(folders[0], device="cuda")
    assert "sm_" in model.info()["isa"] and "cuda:0: " in repr(model)
    assert isinstance(model, rast.RastForCausalLM)
