"""Every path of every kernel, and a small trio, in many orders of threads, blocks and streams, at the cheapest sizes.

$CUDA_SCHEDULES says how many orders (1), or which (0:25). tests/test_cuda_emulation.py runs this file under the
sanitizers, each case compares them with NumPy or with the CPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_attention
import test_ops
import test_transfer_step as step
from backend import library
from device import BF16, F16, F32, TYPES, Device, Memory
from safetensors.numpy import save_file

import rast

pytestmark = pytest.mark.filterwarnings("ignore:no model has a tokenizer")
FIRST, _, END = os.environ.get("CUDA_SCHEDULES", "1").rpartition(":")


@pytest.fixture(params=range(int(FIRST or 0), int(END)))
def device(device: Device, request: pytest.FixtureRequest) -> Iterator[Device]:
    """The library under test, which goes through a case in one order."""
    device.schedule(request.param)
    yield device
    device.schedule(0)


# ---- operations of one pass over the data ----------------------------------------------------------------------------

OPS: list[tuple[Any, tuple[Any, ...]]] = [
    *((test_ops.test_embed, (kind, 5, dim, 2)) for kind in TYPES.values() for dim in (31, 140)),
    *((test_ops.test_bias, (kind, 5, dim, 2)) for kind in TYPES.values() for dim in (31, 140)),
    *((test_ops.test_glu, (kind, 3, dim, 2)) for kind in TYPES.values() for dim in (31, 260)),
    *((test_ops.test_gather, (3, dim, 2)) for dim in (31, 140)),
    *((test_ops.test_norm, (BF16, True, 2, dim, group, 2)) for dim, group in ((64, 32), (70, 35), (515, 515))),
    (test_ops.test_norm, (F32, False, 1, 640, 640, 1)),
    (test_ops.test_norm, (F16, True, 1, 16400, 16400, 1)),  # more than 1024 threads keep in registers
    *((test_ops.test_norm_in_place, (group,)) for group in (40, 1000)),
    *((test_ops.test_copy_blocks, (stride, 2)) for stride in (24, 4097)),
    *((test_ops.test_convert, (source, target, 40, at)) for source in TYPES for target in TYPES for at in (0, 4)),
    *((test_ops.test_saved, case) for case in ((70, 2), (257, 3))),
    *(
        (test_ops.test_rope_kv, (kind, interleaved, 2, 1, head_dim, 2, head_dim))
        for kind in TYPES.values()
        for interleaved in (0, 1)
        for head_dim in (6, 16)
    ),
]


@pytest.mark.parametrize(("test", "arguments"), OPS, ids=lambda value: getattr(value, "__name__", None))
def test_operations(device: Device, memory: Memory, test: Any, arguments: tuple[Any, ...]) -> None:
    test(device, memory, *arguments)


# ---- attention -------------------------------------------------------------------------------------------------------

Segments = list[tuple[int, int]]
# (segments, window, padding of capacities): one chunk; partial results by row; partial results by segment
SHORT: list[tuple[Segments, int, tuple[int, int, int]]] = [
    ([(40, 1), (3, 2)], 0, (1, 1, 0)),
    ([(258, 1), (3, 1)], 0, (0, 0, 0)),
    ([(290, 3), (0, 9)], 40, (0, 0, 0)),
]
LONG: list[tuple[Segments, int, tuple[int, int, int]]] = [
    ([(30, 40), (3, 1), (0, 9)], 0, (2, 1, 0)),
    ([(70, 10)], 33, (0, 0, 0)),
]
ATTENTION = [
    *((F32, dim, 2, case) for dim in (6, 16) for case in (*SHORT, *LONG)),
    *((kind, dim, 2, case) for kind in (BF16, F16) for dim in (6, 264) for case in (*SHORT, *LONG)),
    *((kind, dim, group, SHORT[0]) for kind in (BF16, F16) for dim in (16, 72, 136) for group in (1, 2, 4)),
    *((kind, dim, 2, case) for kind in (BF16, F16) for dim in (16, 72, 136) for case in SHORT[1:]),
    *((kind, dim, 2, case) for kind in (BF16, F16) for dim in (40, 72, 88, 104, 136) for case in LONG),
    *((BF16, dim, 3, LONG[1]) for dim in (64, 80, 96, 128, 256)),
]


@pytest.mark.parametrize(("kind", "head_dim", "group", "case"), ATTENTION, ids=str)
def test_attention_(
    device: Device,
    memory: Memory,
    kind: int,
    head_dim: int,
    group: int,
    case: tuple[Segments, int, tuple[int, int, int]],
) -> None:
    segments, window, padding = case
    scene = test_attention.Scene(memory, segments, kind, head_dim, group, 1, padding=padding)
    scene.check(device, window)


def test_attention_many_segments(device: Device, memory: Memory) -> None:
    """More than a warp has lanes, the long one behind them."""
    test_attention.Scene(memory, [(2, 1)] * 33 + [(0, 9)], BF16, 16, 1, 1).check(device)


def test_attention_bad_values(device: Device, memory: Memory) -> None:
    for kind in (BF16, F16):
        with device.memory() as of_kind:
            test_attention.test_bad_values_stay_behind(device, of_kind, kind, 10, 25, "value", np.nan)


# ---- transfer step ---------------------------------------------------------------------------------------------------

FILTERS: list[tuple[str, dict[str, Any]]] = [
    *((shape, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}) for shape in ("normal", "zeros", "near", "wide")),
    *((shape, {"top_k": 2500}) for shape in ("normal", "zeros", "near")),
    *((shape, {"top_p": 0.9999}) for shape in ("normal", "near", "wide")),
    *((shape, {"top_p": 0.5, "temperature": 0.01}) for shape in ("normal", "near")),
    ("normal", {"min_p": 1e-6}),
    ("zeros", {"top_k": 1}),
]


@pytest.mark.parametrize(
    ("seed", "n_vocab", "n_terms"), [(1, 129, 3), (2, 513, 2), (5, 1027, 3), (8, 31, 1), (9, 700, 5), (4, 4200, 2)]
)
def test_transfer(device: Device, seed: int, n_vocab: int, n_terms: int) -> None:
    """All that an output can ask for, in one launch and in two; in one block, and where the last of two finishes."""
    scene = step.random_scene(seed, n_vocab, 4, n_terms)
    result = step.run(device, scene, step.ROWS | step.MEASURES)
    for o in range(scene.n_out):
        step.check(scene, o, result)
    step.check_drawn(scene, result)
    step.assert_same(step.run(device, scene, step.MEASURES, [1, 3]).out, result.out)
    np.testing.assert_array_equal(step.run(device, scene).out["token"], result.out["token"])


@pytest.mark.parametrize(("shape", "options"), FILTERS, ids=str)
def test_filters(device: Device, shape: str, options: dict[str, Any]) -> None:
    """Candidates that fit the list in shared memory, and more than that; all equal, and equal but for the last bits."""
    rng, n = np.random.default_rng(5), 4099
    x = rng.standard_normal(n)
    x = {"normal": x, "wide": 1e4 * x, "zeros": 0 * x, "near": 1 + rng.integers(0, 9, n) * 2.0**-23}[shape]
    scene = step.plain_scene([x[None].astype(np.float32)], flags=step.SAMPLE, stream=9, **options)
    result = step.run(device, scene, step.ROWS | step.MEASURES)
    step.check(scene, 0, result)
    np.testing.assert_array_equal(step.run(device, scene).out["token"], result.out["token"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_logits(device: Device, value: float) -> None:
    logits = [np.zeros((3, 700), np.float32) for _ in range(3)]
    logits[2][0, 650] = logits[1][1, 3] = value
    logits[0][2, 9] = logits[1][2, 9] = 3e38
    result = step.run(device, step.plain_scene(logits, slot=[0, 1, 2]), step.MEASURES)
    np.testing.assert_array_equal(result.out["bad"], [2, 1, 3])
    np.testing.assert_array_equal(result.drawn, -9)


def test_chains_of_drafts(device: Device) -> None:
    """Each output sees the drafts before it of its slot."""
    n = 36
    scene = step.plain_scene([np.full((n, 130), 8, np.float32)], repetition_penalty=2.0, slot=np.arange(n) % 2)
    scene.draw["draft"] = np.where(np.arange(n) < 2, -1, np.arange(n) * 3)
    want = np.full((n, 130), 8, np.float32)
    for o in range(n):
        want[o, 3 * np.arange(2 + o % 2, o + 1, 2)] = 4
    np.testing.assert_array_equal(step.run(device, scene, step.SCORES).rows["scores"], want)


# ---- a trio ----------------------------------------------------------------------------------------------------------


def save_model(folder: Path, seed: int, hidden: int, heads: int, kv_heads: int, layers: int = 1) -> str:
    """A random Llama with biases."""
    rng, vocab, inter, dim = np.random.default_rng(seed), 71, hidden + 9, 16
    q, kv = heads * dim, kv_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(layers):
        matrices = {"self_attn.q": (q, hidden), "self_attn.k": (kv, hidden), "self_attn.v": (kv, hidden)}
        matrices |= {"self_attn.o": (hidden, q), "mlp.gate": (inter, hidden), "mlp.up": (inter, hidden)}
        matrices |= {"mlp.down": (hidden, inter)}
        for name, shape in matrices.items():
            shapes[f"model.layers.{layer}.{name}_proj.weight"] = shape
            if name.startswith("self_attn"):
                shapes[f"model.layers.{layer}.{name}_proj.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (hidden,)
    folder.mkdir(parents=True)
    save_file(
        {
            name: (rng.normal(size=shape) / 4 * (4 if "lm_head" in name else 1)).astype(np.float32)
            for name, shape in shapes.items()
        },
        folder / "model.safetensors",
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inter,
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_position_embeddings": 256,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """A base, and a pair of its own shape."""
    folder = tmp_path_factory.mktemp("trio")
    pair = {name: save_model(folder / name, i, 24, 2, 1) for i, name in enumerate(("expert", "antiexpert"))}
    return save_model(folder / "base", 7, 40, 2, 1, layers=1), pair


def runs(model: Any) -> list[Any]:
    """A common beginning whose last block is copied, a long prompt, steps that become graphs; drafts; all the rows."""
    rng = np.random.default_rng(3)
    common = rng.integers(0, 71, 36)
    prompts = [np.concatenate([common, rng.integers(0, 71, n)]) for n in (1, 9)]
    calls: list[dict[str, Any]] = [
        dict(do_sample=False, num_assistant_tokens=0),
        dict(do_sample=True, seed=5, top_k=9, repetition_penalty=1.2, suppress_tokens=[3], num_assistant_tokens=3),
        dict(do_sample=True, seed=6, num_return_sequences=2, output_logits=True, output_scores=True),
    ]
    return [
        model.generate(prompts, max_new_tokens=4, pad_token_id=0, return_dict_in_generate=True, **call)
        for call in calls
    ]


def load(trio: tuple[str, dict[str, str]], **options: Any) -> Any:
    base, pair = trio
    return rast.RastForCausalLM.from_pretrained(base, **pair, **options)


@pytest.fixture(scope="module")
def expected(trio: tuple[str, dict[str, str]]) -> Callable[[str], list[Any]]:
    """What the CPU gives in float32, and the device in bfloat16, in the natural order."""

    @cache
    def expected(dtype: str) -> list[Any]:
        if dtype == "bfloat16":
            return runs(load(trio, device="cuda", dtype=dtype, kv_cache_tokens=512))
        # one thread: a sanitizer that does not know the core's code cannot see what orders its threads
        return runs(load(trio, device="cpu", dtype=dtype, num_threads=1))

    return expected


def test_trio(
    device: Device,
    trio: tuple[str, dict[str, str]],
    expected: Callable[[str], list[Any]],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tokens of float32 and bfloat16, in turns."""
    monkeypatch.setenv("RAST_CUDA_PLUGIN", str(library()))
    seed = request.node.callspec.params["device"]
    dtype = ("float32", "bfloat16")[seed % 2]
    device.schedule(0)
    want = expected(dtype)
    device.schedule(seed)
    model = load(trio, device="cuda", dtype=dtype, kv_cache_tokens=512)
    for got, once in zip(runs(model), want, strict=True):
        np.testing.assert_array_equal(got.sequences, once.sequences)
    info = model.cache_info()
    assert info["drafted"] and info["reused"]
