"""Speculative transfer: drafts, the expert's or of earlier ids, change no token, number or statistic; and they help."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import FULL, N_TEXT_TOKENS, ModelZoo, load_rast, random_prompts
from test_invariance import OPTIONS, assert_same, cases, run
from test_properties import OPTIONS as ANY_OPTIONS
from test_properties import PROMPTS, VOCAB, bounded

import rast
from rast.demo import evaluate, paths
from rast.demo.problems import problems

DRAFTS = (1, 2, 3, 8, "auto")
N_TRIOS = 200 if FULL else 8


def drafts(model: Any) -> tuple[int, int]:
    """(checked, accepted) since the model was loaded."""
    info = model.cache_info()
    return info["drafted"], info["accepted"]


@pytest.fixture(scope="module")
def text_trio(zoo: ModelZoo) -> dict[str, Any]:
    """A target near its first expert: the antiexpert is the base itself, which leaves little of the base in the sum."""
    vocab = N_TEXT_TOKENS + 2
    base, expert, *others = (
        str(zoo.folder("qwen2", seed=s, vocab_size=vocab, tokenizer="<s>,</s>", num_hidden_layers=2)) for s in range(4)
    )
    return dict(base=base, pairs=[rast.TransferPair(expert, base, 0.7), rast.TransferPair(*others, 0.15)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_experts_drafts_change_nothing(text_trio: dict[str, Any], dtype: str, isa: str) -> None:
    model = load_rast(**text_trio, dtype=dtype)
    prompts = random_prompts(4, N_TEXT_TOKENS, seed=6, low=3, high=40)
    every = cases(run(model, prompts[0])[0]["tokens"].tolist())
    if not FULL and isa != rast._core.cpu_isas()[-1]:
        every = {name: every[name] for name in ("greedy", "warpers", "penalty", "sampled eos")}
    for name, options in every.items():
        want = run(model, prompts, num_assistant_tokens=0, **options)
        before = drafts(model)
        for k in DRAFTS:
            assert_same(run(model, prompts, num_assistant_tokens=k, **options), want, f"{name}, {k} drafts")
        checked, accepted = (b - a for a, b in zip(before, drafts(model), strict=True))
        if name not in ("all off", "short", "one pair off"):
            assert 0 < accepted < checked, name


def test_no_pair(text_trio: dict[str, Any]) -> None:
    """Drafts come from earlier ids; a greedy loop of a random model repeats itself."""
    model = load_rast(text_trio["base"])
    prompts = random_prompts(3, N_TEXT_TOKENS, seed=6, low=3, high=40)
    want = run(model, prompts, max_new_tokens=120, num_assistant_tokens=0)
    assert drafts(model) == (0, 0)
    for k in DRAFTS:
        assert_same(run(model, prompts, max_new_tokens=120, num_assistant_tokens=k), want, f"{k} drafts")
    checked, accepted = drafts(model)
    assert 0 < accepted < checked


@pytest.mark.parametrize("penalty", [1.0, 0.5, 1.5])
def test_expert_that_is_the_target(text_trio: dict[str, Any], penalty: float) -> None:
    """Every draft stands: a step gives one token more than it has drafts. A penalty counts the drafts before; one that
    favours what it counts makes each of them decide about the next."""
    model = load_rast(text_trio["base"], text_trio["pairs"][0].expert, text_trio["base"])
    (prompt,) = random_prompts(1, N_TEXT_TOKENS, seed=6, low=9, high=9)
    options = OPTIONS["sampled"] | {"max_new_tokens": 61, "repetition_penalty": penalty, "temperature": 0.3}
    want = run(model, prompt, num_assistant_tokens=0, **options)
    steps = model.cache_info()["steps"]
    assert_same(run(model, prompt, num_assistant_tokens=4, **options), want)
    checked, accepted = drafts(model)
    assert checked == accepted == 48
    assert model.cache_info()["steps"] - steps == 13
    out = model.generate(prompt, num_assistant_tokens=4, return_dict_in_generate=True, **options)
    assert (out.steps.tolist(), out.drafted.tolist(), out.accepted.tolist()) == ([13], [48], [48])


def test_batch_of_everything(text_trio: dict[str, Any]) -> None:
    """Other lengths, strengths and numbers of drafts side by side, with room for a few sequences only."""
    prompts = random_prompts(24, N_TEXT_TOKENS, seed=3, low=1, high=70)
    options = OPTIONS["sampled"] | {"max_new_tokens": 70}
    strengths = np.random.default_rng(0).choice([0.0, 0.7, 0.9], (len(prompts), 2))
    want = run(load_rast(**text_trio), prompts, num_assistant_tokens=0, transfer_strength=strengths, **options)
    for k, limits in (
        (3, {}),
        ("auto", {}),
        (3, dict(kv_cache_tokens=32 * 10)),
        (8, dict(max_batch_rows=16)),
        (5, dict(max_batch_size=3, num_threads=1)),
    ):
        model = load_rast(**text_trio, **limits)
        got = run(model, prompts, num_assistant_tokens=k, transfer_strength=strengths, **options)
        assert_same(got, want, f"{k} drafts, {limits}")
        info = model.cache_info()
        assert info["n_free"] == info["n_blocks"]
        assert info["accepted"] > 0 or k == "auto"  # which may find on a busy machine that drafts do not pay
        assert info["preempted"] > 0 or "kv_cache_tokens" not in limits


def test_requests_with_other_numbers_of_drafts(text_trio: dict[str, Any]) -> None:
    model = load_rast(**text_trio)
    prompts = random_prompts(12, N_TEXT_TOKENS, seed=9, low=1, high=70)
    numbers: list[Any] = [0, 1, 5, "auto"]
    options: dict[str, Any] = dict(do_sample=True, seed=3, max_new_tokens=40)
    requests = [
        rast.Request(prompt, i, options | {"num_assistant_tokens": numbers[i % 4]}) for i, prompt in enumerate(prompts)
    ]
    found = {sample.tag: sample.new_tokens for sample in model.generate_iter(requests)}
    for i, prompt in enumerate(prompts):
        (alone,) = run(model, prompt, num_assistant_tokens=0, **options)
        np.testing.assert_array_equal(found[i], alone["tokens"])


@pytest.fixture(scope="module")
def small_trios(zoo: ModelZoo) -> list[Any]:
    """Other shapes, vocabularies and types, all with an expert near the target."""
    trios = []
    for i in range(N_TRIOS):
        rng = np.random.default_rng(i)
        arch = str(rng.choice(["llama-bias", "qwen2-tied", "qwen3-tied", "mistral"]))
        shape: dict[str, Any] = dict(max_position_embeddings=96, num_hidden_layers=1)
        base, anti = (zoo.folder(arch, seed=1000 * s + i, vocab_size=VOCAB, **shape) for s in (0, 1))
        expert = zoo.folder(arch, seed=2000 + i, vocab_size=VOCAB + int(rng.choice([0, 3])), **shape)
        dtype = str(rng.choice(["float32", "bfloat16", "float16"]))
        pairs = [rast.TransferPair(expert, base if i % 2 else anti, 0.8)]
        if i % 3 == 0:
            pairs.append(rast.TransferPair(anti, None, -0.1))
        trios.append(load_rast(base, pairs=pairs, dtype=dtype))
    return trios


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("which", range(N_TRIOS))
@bounded(1 if FULL else 10)
@given(
    prompts=PROMPTS,
    options=st.fixed_dictionaries({}, optional=ANY_OPTIONS),
    k=st.sampled_from([1, 2, 5, "auto"]),
)
def test_any_options(small_trios: list[Any], which: int, prompts: Any, options: dict[str, Any], k: Any) -> None:
    model = small_trios[which]
    options = {name: value for name, value in options.items() if name != "num_assistant_tokens"} | {"seed": 5}
    if not options.get("do_sample"):
        options.pop("num_return_sequences", None)
    if isinstance(options.get("transfer_strength"), float):
        options["transfer_strength"] = abs(options["transfer_strength"]) / 2
    ids = [np.array(prompt) for prompt in prompts]
    want = run(model, ids, num_assistant_tokens=0, **options)
    assert_same(run(model, ids, num_assistant_tokens=k, **options), want)


@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_demonstration(how: str) -> None:
    """Every problem of the test set."""
    folders = paths()
    model = rast.RastForCausalLM.from_pretrained(
        folders["large-base"], expert=folders["small-rl"], antiexpert=folders["small-base"]
    )
    asked = list(islice(problems("test", 0), 500))
    options: dict[str, Any] = dict(do_sample=how == "sampled", seed=0)
    want = evaluate.attempt(model, asked, num_assistant_tokens=0, **options)
    for k in (4, "auto"):
        got = evaluate.attempt(model, asked, num_assistant_tokens=k, **options)
        for name in ("sequences", "logprob", "base_token", "base_logprob", "transfer_kl"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=f"{k}: {name}")
    checked, accepted = drafts(model)
    assert accepted > 0.3 * checked > 0


@pytest.mark.parametrize("value", [-1, 1.5, "many", True, 2**40])
def test_numbers_that_are_none(text_trio: dict[str, Any], value: Any) -> None:
    model = load_rast(text_trio["base"])
    with pytest.raises((TypeError, ValueError), match="num_assistant_tokens"):
        model.generate(np.arange(3), max_new_tokens=2, num_assistant_tokens=value)


@pytest.mark.parametrize("vocab", [N_TEXT_TOKENS, 100_000])
@pytest.mark.parametrize("want", [False, True])
def test_bytes_of_drafts_are_bounded(zoo: ModelZoo, vocab: int, want: bool) -> None:
    """60 times 8 rows of 100,000 logits are more than 128 MiB: some drafts have to wait. All of them stand."""
    base, expert = (zoo.folder("qwen2", seed=s, vocab_size=vocab, num_hidden_layers=1) for s in (0, 1))
    model = load_rast(base, expert, base)
    prompts = random_prompts(60, N_TEXT_TOKENS, seed=6, low=2, high=4)
    model.generate(prompts, max_new_tokens=9, num_assistant_tokens=7, return_dict_in_generate=True, output_scores=want)
    info = model.cache_info()
    assert info["drafted"] == info["accepted"] > 0
    assert (info["steps"] > 2) == (vocab > N_TEXT_TOKENS)  # the prompts, and one for all drafts if there is room


def test_more_drafts_than_room(text_trio: dict[str, Any]) -> None:
    """The context's end, the last token, and more drafts than a step has rows."""
    model = load_rast(**text_trio, max_context=40, max_batch_rows=8)
    (prompt,) = random_prompts(1, N_TEXT_TOKENS, seed=6, low=9, high=9)
    want = run(model, prompt, max_new_tokens=31, num_assistant_tokens=0)
    assert_same(run(model, prompt, max_new_tokens=31, num_assistant_tokens=1000), want)
    assert_same(
        run(model, prompt, max_new_tokens=1, num_assistant_tokens=5),
        run(model, prompt, max_new_tokens=1, num_assistant_tokens=0),
    )
