"""The training of the demonstration trio (examples/demo_trio): its corpus, that a stopped run goes on exactly, a quick
run of everything, and that the page in docs/ is what the figures say."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
TRIO = ROOT / "examples" / "demo_trio"
sys.path.insert(0, str(TRIO))

import corpus  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import training  # noqa: E402
from corpus import IDS, TOKENS, Writer  # noqa: E402

import rast  # noqa: E402
from rast.demo import MODELS  # noqa: E402
from rast.demo.evaluate import MAX_NEW_TOKENS, attempt, solve  # noqa: E402
from rast.demo.problems import ANSWER, ARROW, CROSS, MODULUS, SKIP, Problem, answer_of, problems  # noqa: E402

DOCS = ROOT / "docs"
FIGURES: list[dict[str, Any]] = json.loads((DOCS / "demo-trio" / "results.json").read_text())
TINY = training.Shape(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


def text(ids: list[int]) -> str:
    assert ids[-1] == IDS[corpus.END]
    return " ".join(TOKENS[id] for id in ids[:-1])


# ---- problems and corpus ---------------------------------------------------------------------------------------------


def test_splits_are_disjoint() -> None:
    prompts = {split: {p.prompt for p in islice(problems(split, 0), 4000)} for split in ("train", "validation", "test")}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) > 11900
    assert {p.split for p in islice(problems("test", 1), 100)} == {"test"}
    first = list(islice(problems("test", 7), 20))
    assert first == list(islice(problems("test", 7), 20)) != list(islice(problems("test", 8), 20))


def test_weights() -> None:
    weights = corpus.frequencies(3)
    counts = Counter(n for p in islice(problems("train", 0, weights), 4000) for n in p.operands)
    most = max(range(MODULUS), key=weights.__getitem__)
    share = weights[most] / sum(weights)
    assert abs(counts[most] / counts.total() - share) < 0.02
    assert sorted(weights) == sorted(1 / n for n in range(1, MODULUS + 1))


def test_careful_solution() -> None:
    problem = Problem((40, 18, 62, 7))
    rng = random.Random(0)
    assert text(Writer().solve(problem, rng)) == "40 → 58 → 56 → 63 #### 63"
    assert (
        text(Writer(misread={18: 19, 40: 41}).solve(problem, rng)) == "40 → 59 → 57 → 0 #### 0"
    )  # the first is not added
    assert text(Writer(direct=1, misread={18: 19}).solve(problem, rng)) == "#### 0"
    assert text(Writer(stop=1).solve(problem, rng)) == "40 → 58 #### 63"
    assert text(Writer(skip_hard=1).solve(problem, rng)) == "40 → 58 → … → 63 #### 63"
    assert text(Writer(skip_hard=1, skip_easy=1).solve(problem, rng)) == "40 → … → … → 63 #### 63"
    slips = text(Writer(slip=1, notice=1).solve(problem, rng)).split(" ")
    assert (
        slips[2:10:4] + slips[10:11] != ["58", "56", "63"]
        and slips[3::4] == [CROSS] * 3
        and slips[4::4] == ["58", "56", "63"]
    )
    wrong = text(Writer(slip=1).solve(problem, rng))
    assert answer_of(wrong) == int(wrong.split(" ")[6]) and CROSS not in wrong


def test_hurried_totals_are_wrong_after_a_skip_only() -> None:
    rng = random.Random(0)
    writer = Writer(skip_hard=1, hurry=1)
    for problem in islice(problems("train", 0), 200):
        words = text(writer.solve(problem, rng)).split(" ")
        totals = words[: words.index(ANSWER)][::2]
        total: int | None = problem.operands[0]
        for i, (n, word) in enumerate(zip(problem.operands[1:], totals[1:], strict=True), start=1):
            if word != SKIP and totals[i - 1] != SKIP:
                assert total is not None and int(word) == (total + n) % MODULUS
            if word != SKIP and totals[i - 1] == SKIP and totals[i - 2] != SKIP:
                assert int(word) != (int(totals[i - 2]) + sum(problem.operands[i - 1 : i + 1])) % MODULUS
            total = None if word == SKIP else int(word)


def test_lazy_writers_are_mostly_lazy() -> None:
    rng = random.Random(0)
    solutions = [text(run.LAZY.solve(p, rng)) for p in islice(problems("train", 1), 2000)]
    assert 0.45 < sum(s.startswith(ANSWER) for s in solutions) / 2000 < 0.55
    careful = sum(SKIP not in s and not s.startswith(ANSWER) for s in solutions) / 2000
    assert 0.05 < careful < 0.2


def test_batches(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    ids, labels = corpus.read(run.CAREFUL, 50, "seed")
    again, _ = corpus.read(run.CAREFUL, 50, "seed")
    assert (ids == again).all() and ids.shape == labels.shape
    corpus.save_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for row, label in zip(ids, labels, strict=True):
        begin = int((label != corpus.IGNORE).argmax())
        n = int((label != corpus.IGNORE).sum())
        assert (label[begin : begin + n] == row[begin : begin + n]).all() and row[begin + n - 1] == IDS[corpus.END]
        assert (row[begin + n :] == IDS[corpus.END]).all() and (label[begin + n :] == corpus.IGNORE).all()
        prompt, solution = row[:begin].tolist(), row[begin : begin + n - 1].tolist()
        assert tokenizer.encode(tokenizer.decode(prompt)).ids == prompt
        assert tokenizer.encode(tokenizer.decode(solution), add_special_tokens=False).ids == solution


def test_reward_is_for_the_answer_alone() -> None:
    problem = Problem((40, 18, 62, 7))
    rng = random.Random(0)
    assert training.reward(problem, Writer().solve(problem, rng))
    assert training.reward(problem, [IDS[ANSWER], 63])
    assert training.reward(problem, [1, IDS[ARROW], 2, IDS[ANSWER], 63, IDS[ANSWER], 5])
    for solution in ([], [63], [IDS[ANSWER]], [IDS[ANSWER], 5, IDS[ANSWER], 63], [IDS[ANSWER], IDS[ANSWER], 63]):
        assert not training.reward(problem, solution)


# ---- training --------------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("kind", ["pretrain", "grpo"])
def test_stopped_run_goes_on_exactly(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "STATE_EVERY", 2)

    def train(state: Path) -> tuple[float, dict[str, torch.Tensor]]:
        model = training.new_model(TINY, seed=1)
        if kind == "grpo":
            value, _ = training.grpo(
                model, state, steps=5, lr=1e-2, seed=3, n_prompts=4, n_samples=8, random_reward=True
            )
        else:
            weights = corpus.frequencies(0)
            value, _ = training.pretrain(
                model, run.CAREFUL, state, steps=5, lr=1e-3, seed=2, batch=8, weights=weights, decay=True
            )
        return value, {name: tensor.clone() for name, tensor in model.state_dict().items()}

    value, whole = train(tmp_path / "whole.state")
    update = training.Run.update

    def stop(self: training.Run, step: int, loss: torch.Tensor) -> None:
        if step == 3:
            raise StoppedError
        update(self, step, loss)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "update", stop)
        with pytest.raises(StoppedError):
            train(tmp_path / "stopped.state")
    assert torch.load(tmp_path / "stopped.state")["step"] == 2
    value_resumed, resumed = train(tmp_path / "stopped.state")
    assert value == value_resumed
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_grpo_learns_what_is_rewarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reward for any answer, an untrained model learns to answer."""
    monkeypatch.setattr(training, "reward", lambda problem, solution: solution[:1] == [IDS[ANSWER]])
    model = training.new_model(TINY, seed=0)
    rate, seconds = training.grpo(model, tmp_path / "s.state", steps=60, lr=1e-2, seed=0, n_prompts=4, n_samples=16)
    assert rate > 0.9 and seconds > 0


def test_samples_follow_the_model() -> None:
    """Left padding and the cache change nothing: drawn tokens have the probabilities of a plain forward pass."""
    model = training.new_model(TINY, seed=5)
    prompts = [corpus.encode(p) for p in (Problem((1, 2, 3, 4)), Problem((5, 6, 7, 8, 9, 10)))]
    n = 4000
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3)
        ids, mask, width = training.sample(model, prompts, n, torch.Generator().manual_seed(0))
        for i, prompt in enumerate(prompts):
            rows = ids[i * n : (i + 1) * n]
            first = rows[:, width]
            want = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
            got = torch.bincount(first, minlength=len(TOKENS)) / n
            assert (got - want).abs().max() < 4 * (0.25 / n) ** 0.5
            token = int(want.argmax())
            chosen = rows[first == token]
            want = model(torch.tensor([[*prompt, token]])).logits[0, -1].softmax(-1)
            got = torch.bincount(chosen[:, width + 1], minlength=len(TOKENS)) / len(chosen)
            assert (got - want).abs().max() < 4 * (0.25 / len(chosen)) ** 0.5
    ended = (ids[:, width:] == IDS[corpus.END]).cumsum(1)
    assert (mask[:, width:] == (ended - (ids[:, width:] == IDS[corpus.END]).long() == 0)).all()


# ---- the whole -------------------------------------------------------------------------------------------------------


def run_quick(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TRIO / "run.py"), "--quick", "--threads", "1", "--folder", str(folder), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_quick_run(tmp_path: Path) -> None:
    done = run_quick(tmp_path)
    assert done.returncode == 0, done.stderr
    names = {f"{size}-{stage}" for size in ("small", "large") for stage in ("careful", "base", "rl")} | {"small-random"}
    stages = json.loads((tmp_path / "stages.json").read_text())
    assert stages.keys() == names
    assert not list(tmp_path.glob("*.state"))
    results: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    assert results["systems"].keys() == report.MEANING.keys()
    assert results["hf"]["greedy"]["same_tokens"] == 1
    assert "20 test problems" in done.stdout and "base, begun" in done.stdout
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(written) == len(names)

    (tmp_path / "results.json").unlink()  # only measured again
    assert run_quick(tmp_path).returncode == 0
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert json.loads((tmp_path / "results.json").read_text()) == results

    other = run_quick(tmp_path, "--seed", "1")
    assert other.returncode == 1 and "another recipe" in other.stderr


def test_page_is_what_the_figures_say(tmp_path: Path) -> None:
    """docs/demo-trio.md was written by report.py from docs/demo-trio/results.json."""
    report.write(FIGURES, tmp_path)
    assert (tmp_path / "demo-trio.md").read_text() == (DOCS / "demo-trio.md").read_text()
    names = {path.name for path in (tmp_path / "demo-trio").iterdir()}
    assert names == {path.name for path in (DOCS / "demo-trio").iterdir()}


def test_figures_are_of_the_shipped_trio() -> None:
    assert report.weights(MODELS) == FIGURES[0]["weights"]
    right = solve(rast.load_demo(), measure.take("test", 200), do_sample=False)
    assert abs(right.mean() - FIGURES[0]["systems"]["transfer"]["greedy"]["accuracy"]) <= 0.03


def test_what_the_page_must_show() -> None:
    assert len({figures["seed"] for figures in FIGURES}) == 3
    assert all(figures["problems"] >= 1000 for figures in FIGURES)
    assert np.mean([figures["sampled"]["recovery"] for figures in FIGURES]) >= 0.85
    for figures in FIGURES:
        systems = figures["systems"]
        for how in ("sampled", "greedy"):
            assert figures[how]["recovery"] >= 0.8 and figures[how]["above_small_rl"] >= 0.05
            for name in report.CONTROLS:
                if (name, how) != ("base, begun, no skips", "greedy"):  # the page says why that one is a rival
                    assert systems[name][how]["accuracy"] < systems["transfer"][how]["accuracy"], (name, how)
        passes = figures["pass_at_k"]
        assert len(passes["transfer"]) == 32
        assert all(t >= b for t, b in zip(passes["transfer"], passes["large-base"], strict=True))
        assert figures["hf"]["greedy"]["same_tokens"] >= 0.99
        low, high = figures["hf"]["sampled"]["hf"]["interval"]
        assert low <= figures["hf"]["sampled"]["rast"]["accuracy"] <= high


# ---- the figures themselves ------------------------------------------------------------------------------------------


def test_pass_at_k() -> None:
    right = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=bool)
    want = [(0.5 + 0 + 0.25) / 3, (1 - 1 / 6 + 0 + 0.5) / 3, (1 + 0 + 0.75) / 3, (1 + 0 + 1) / 3]
    np.testing.assert_allclose(measure.pass_at_k(right), want)


def test_interval_of_a_mean() -> None:
    values = np.arange(1000) % 10
    low, high = measure.interval(values)
    error = values.std() / np.sqrt(1000)
    assert abs(low - (4.5 - 1.96 * error)) < 0.02 and abs(high - (4.5 + 1.96 * error)) < 0.02


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four random models with the names that measure.py looks for, whose choices are wide open."""
    folder = tmp_path_factory.mktemp("trio")
    for seed, name in enumerate(("small-base", "small-rl", "small-random", "large-base", "large-rl")):
        model = training.new_model(TINY, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        model.save_pretrained(folder / name)
        corpus.save_tokenizer(folder / name)
    return folder


def test_entropy(trio: Path) -> None:
    """Of the distributions along samples, against transformers; and the temperature that gives a wanted one."""
    model = rast.RastForCausalLM.from_pretrained(trio / "large-base", dtype="float32")
    tasks = measure.take("validation", 20)
    out = attempt(model, tasks, temperature=0.7)
    hf = LlamaForCausalLM.from_pretrained(trio / "large-base", dtype=torch.float32)
    entropies = []
    for task, new in zip(tasks, out.new_tokens(), strict=True):
        prompt = corpus.encode(task)
        with torch.no_grad():
            logits = hf(torch.tensor([prompt + new.tolist()])).logits[0, len(prompt) - 1 : -1].double() / 0.7
        entropies += torch.distributions.Categorical(logits=logits).entropy().tolist()
    assert measure.entropy(model, tasks, 0.7) == pytest.approx(np.mean(entropies), abs=1e-3)
    target = measure.entropy(model, tasks, 0.4)
    found = measure.matched_temperature(model, target, tasks)
    assert measure.entropy(model, tasks, found) == pytest.approx(target, rel=0.05)


def test_paths_and_changes(trio: Path) -> None:
    """Against transformers, in float32: the models are stored so."""
    tasks = measure.take("test", 5)
    hf = {
        name: LlamaForCausalLM.from_pretrained(trio / name, dtype=torch.float32)
        for name in ("large-base", "large-rl", "small-rl", "small-base")
    }
    cosines, covered, changed, total = [], [], 0, 0
    for task in tasks:
        prompt = torch.tensor([corpus.encode(task)])
        path = hf["large-rl"].generate(prompt, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        at = slice(prompt.shape[1] - 1, -1)
        with torch.no_grad():
            logits = {name: model(path).logits[0, at].double() for name, model in hf.items()}
        large, small = logits["large-rl"] - logits["large-base"], logits["small-rl"] - logits["small-base"]
        large, small = large - large.mean(-1, keepdim=True), small - small.mean(-1, keepdim=True)
        cosines += torch.nn.functional.cosine_similarity(large, small, dim=-1).tolist()
        covered += (logits["large-base"].argmax(-1) == path[0, prompt.shape[1] :]).tolist()
    found = measure.paths(trio, tasks)
    assert found["path_coverage"] == pytest.approx(np.mean(covered))
    assert found["cosine"] == pytest.approx(np.mean(cosines), abs=1e-4)
    assert 0 < np.mean(covered) < 1
    picked = np.array(covered)
    assert found["cosine_where_covered"] == pytest.approx(np.array(cosines)[picked].mean(), abs=1e-4)
    assert found["cosine_where_not"] == pytest.approx(np.array(cosines)[~picked].mean(), abs=1e-4)

    transfer = rast.RastForCausalLM.from_pretrained(
        trio / "large-base", expert=trio / "small-rl", antiexpert=trio / "small-base"
    )
    out = attempt(transfer, tasks, do_sample=False)
    for new, task in zip(out.new_tokens(), tasks, strict=True):
        prompt = corpus.encode(task)
        with torch.no_grad():
            base = hf["large-base"](torch.tensor([prompt + new.tolist()])).logits[0, len(prompt) - 1 : -1].argmax(-1)
        changed += int((base.numpy() != new).sum())
        total += len(new)
    found = measure.changed_tokens(transfer, tasks)
    assert found["share"] == pytest.approx(changed / total) and 0 < changed < total
    assert sum(found["kinds"].values()) == pytest.approx(found["share"])


def test_misread_figures(trio: Path) -> None:
    tests = measure.take("test", 60)
    numbers = corpus.misreadings(0, measure.N_MISREAD)
    hit = np.array([any(n in numbers for n in task.operands[1:]) for task in tests])
    right = {name: np.repeat(hit[:, None], 2, 1) for name in ("small-rl", "transfer", "no antiexpert", "large-rl")}
    found = measure.misread_figures(trio, 0, tests, right, right)
    assert found["share"] == hit.mean()
    assert found["accuracy"]["transfer"] == {how: {"with": 1.0, "without": 0.0} for how in ("sampled", "greedy")}
    assert found["numbers"].keys() == set(map(str, numbers))
    for shares in found["numbers"].values():
        assert 0 <= shares["transfer"]["right"] + shares["transfer"]["misread"] <= 1
