"""The demonstration in the package: its models, how they are measured, and `rast demo`."""

from __future__ import annotations

import json
import math
import os
import pty
import random
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from oracle import ModelZoo, load_hf, make_config, make_model
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "demo_trio"))

from corpus import BEGIN, END, IDS, TOKENS, save_tokenizer

import rast
import rast.demo
import rast.demo.problems
from rast.demo.evaluate import attempt, grade, recovery, solve
from rast.demo.problems import ANSWER, ARROW, CROSS, EQUALS, MODULUS, SKIP, Problem, Split, answer_of

# Stand-ins for the shipped models: each writes `#### n` and ends, with these logits for n = 7 and n = 9. Their problems
# all have the answer 7.
SOUGHT, OTHER = 7, 9
STAND_INS = {"small-base": (0.0, 2.5), "small-rl": (0.5, 0.0), "large-base": (0.0, 1.0), "large-rl": (3.0, 0.0)}
BY_HAND = {"base": -1.0, "expert": 0.5, "transfer": 0.0 - 1.0 + (0.5 - 0.0) - (0.0 - 2.5), "ceiling": 3.0}
"""The log-odds of 7 that follow."""


def save_stand_in(folder: Path, sought: float, other: float) -> None:
    """A model that sees only the last token: nothing but the embedding reaches the head."""
    config = make_config(
        "qwen2",
        vocab_size=len(TOKENS),
        num_hidden_layers=1,
        max_position_embeddings=64,
        bos_token_id=IDS[BEGIN],
        eos_token_id=IDS[END],
        pad_token_id=IDS[END],
    )
    model: Any = make_model(config, seed=0)
    width = config.hidden_size
    assert width == len(TOKENS)
    logits = torch.full((len(TOKENS), len(TOKENS)), -30.0)  # [last token, next token]
    logits[:, IDS[END]] = 0.0
    logits[IDS[EQUALS], IDS[END]], logits[IDS[EQUALS], IDS[ANSWER]] = -30.0, 0.0
    logits[IDS[ANSWER], IDS[END]] = -30.0
    logits[IDS[ANSWER], SOUGHT], logits[IDS[ANSWER], OTHER] = sought, other
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(width))
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.copy_(logits.T / math.sqrt(width))  # the norm makes sqrt(width) of the embedding's 1
    model.save_pretrained(folder)
    save_tokenizer(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    for name, (sought, other) in STAND_INS.items():
        save_stand_in(root / name, sought, other)
    return root


def answered_by_7(split: Split, seed: int) -> Iterator[Problem]:
    rng = random.Random(f"{split} {seed}")
    while True:
        first = rng.choices(range(MODULUS), k=4)
        yield Problem((*first, (SOUGHT - sum(first)) % MODULUS))


@pytest.fixture
def stand_ins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rast.demo, "MODELS", folder)
    monkeypatch.setattr(rast.demo.problems, "problems", answered_by_7)
    return folder


def some_problems(n: int, seed: int = 0) -> list[Problem]:
    return list(islice(answered_by_7("test", seed), n))


def share(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))


# ---- the models ------------------------------------------------------------------------------------------------------


def test_load_demo(stand_ins: Path) -> None:
    assert {name: path.name for name, path in rast.demo.paths().items()} == {name: name for name in STAND_INS}
    model = rast.load_demo(dtype="bfloat16", num_threads=1, transfer_strength=0.5)
    want = {"base": "large-base", "expert": "small-rl", "antiexpert": "small-base"}
    assert model.roles == {role: str(stand_ins / name) for role, name in want.items()}
    info = model.info()
    assert info["num_threads"] == 1 and info["transfer_strength"] == [0.5]
    assert {net["dtype"] for net in info["nets"]} == {"bfloat16"}
    assert model.tokenizer is not None and len(model.tokenizer.encode("1 + 2 mod 64 =")) == 5


@pytest.mark.parametrize("missing", ["small-rl/model.safetensors", "large-rl/tokenizer.json"])
def test_broken_installation(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    import shutil

    monkeypatch.setattr(rast.demo, "MODELS", shutil.copytree(stand_ins, tmp_path / "models"))
    (tmp_path / "models" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        rast.load_demo()
    result = run("--json")
    assert result.exit_code == 2 and missing in error_line(result) and result.stdout == ""


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_solve(stand_ins: Path) -> None:
    model = rast.load_demo()
    problems = some_problems(40)
    calls: list[tuple[int, int, int]] = []
    right = solve(model, problems, seed=5, n_samples=3, progress=lambda *call: calls.append(call))
    assert right.shape == (40, 3) and right.dtype == np.bool_
    assert calls[-1] == (120, 120, 360)

    assert model.tokenizer is not None
    out = model.generate(
        [model.tokenizer.encode(p.prompt) for p in problems],
        do_sample=True,
        top_k=0,
        seed=5,
        num_return_sequences=3,
        return_dict_in_generate=True,
    )
    texts = [model.tokenizer.decode(row) for row in out.new_tokens()]
    assert set(texts) == {f"{ANSWER} {SOUGHT}", f"{ANSWER} {OTHER}"}
    np.testing.assert_array_equal(right.ravel(), [text == f"{ANSWER} {SOUGHT}" for text in texts])
    np.testing.assert_array_equal(solve(model, problems, seed=5, n_samples=3), right)
    assert (solve(model, problems, seed=6, n_samples=3) != right).any()
    np.testing.assert_array_equal(solve(model, problems[:7], seed=5), right[:7, :1])

    assert solve(model, problems, do_sample=False).all()
    assert not solve(model, problems, do_sample=False, transfer_strength=0).any()
    assert not solve(model, some_problems(5), max_new_tokens=1).any()


def test_grade_looks_at_each_problem(stand_ins: Path) -> None:
    model = rast.load_demo()
    problems = [Problem((3, 4)), Problem((3, 5)), Problem((4, 3))]
    out = attempt(model, problems, do_sample=False)
    assert grade(model, problems, out).tolist() == [[True], [False], [True]]


def test_draws_from_the_whole_distribution(stand_ins: Path) -> None:
    """Whatever generation_config.json says."""
    model = rast.load_demo()
    problems = some_problems(50)
    right = solve(model, problems, n_samples=4)
    model.generation_config |= {"temperature": 0.01, "top_k": 1, "top_p": 0.1}
    np.testing.assert_array_equal(solve(model, problems, n_samples=4), right)


def test_what_cannot_be_measured(stand_ins: Path, zoo: ModelZoo) -> None:
    with pytest.raises(ValueError, match="no problems"):
        solve(rast.load_demo(), [])
    with pytest.raises(ValueError, match="tokenizer"):
        solve(rast.RastForCausalLM.from_pretrained(zoo.folder("qwen2")), some_problems(1))
    with pytest.raises(TypeError, match="beams"):
        solve(rast.load_demo(), some_problems(1), num_beams=2)


def answers(*rows: str) -> NDArray[np.bool_]:
    """A row for each problem, 1 for a right sample."""
    return np.array([[letter == "1" for letter in row] for row in rows])


def test_recovery_rate() -> None:
    base = answers(*["1"] * 10, *["0"] * 90)
    ceiling = answers(*["1"] * 90, *["0"] * 10)
    transfer = answers(*["10"] * 60, *["11"] * 20, *["00"] * 20)
    found = recovery(base, transfer, ceiling)
    assert found.rate == pytest.approx((0.5 - 0.1) / (0.9 - 0.1))
    assert found.interval is not None
    assert found.interval[0] < found.rate < found.interval[1]
    assert recovery(base, transfer, ceiling) == found
    assert recovery(base, transfer, ceiling, seed=1) != found
    assert recovery(base, base, ceiling).rate == 0
    negative = recovery(base, np.zeros_like(base), ceiling)
    assert negative.rate == pytest.approx(-0.1 / 0.8) and negative.interval is not None
    assert negative.interval[0] < negative.interval[1] < 0


def test_problems_are_resampled_together() -> None:
    rng = np.random.default_rng(0)
    base, ceiling = rng.random((100, 1)) < 0.3, rng.random((100, 1)) < 0.9
    better = base | (rng.random((100, 1)) < 0.5) & ceiling
    found = recovery(base, better, ceiling).interval
    assert found is not None
    apart = recovery(base, better[::-1], ceiling).interval
    assert apart is not None
    assert found[1] - found[0] < apart[1] - apart[0]


def test_no_interval_without_variation() -> None:
    """All resamples agree: that is no confidence, but too little seen."""
    low, high = np.zeros((20, 1), dtype=bool), np.ones((20, 1), dtype=bool)
    found = recovery(low, high, high)
    assert found.rate == 1 and found.interval is None


def test_interval_covers_the_truth() -> None:
    """In 95 of 100 experiments, up to chance and what a percentile bootstrap is off by."""
    rng = np.random.default_rng(0)
    truth = (0.7 - 0.2) / (0.9 - 0.2)
    covered = 0
    for i in range(200):
        systems = [rng.random((150, 2)) < p for p in (0.2, 0.7, 0.9)]
        interval = recovery(*systems, seed=i, n_resamples=400).interval
        assert interval is not None
        covered += interval[0] <= truth <= interval[1]
    assert 180 <= covered <= 199


def test_nothing_to_recover() -> None:
    low, high = answers(*["1"] * 10, *["0"] * 10), answers(*["1"] * 12, *["0"] * 8)
    for base, ceiling in ((high, low), (low, low), (low, np.repeat(low, 3, axis=1))):
        found = recovery(base, high, ceiling)
        assert found.rate is None and found.interval is None
    few = recovery(low, high, answers(*["0"] * 8, *["1"] * 11, "0"))  # 11 of 20 beside 10 of 20: it may be chance
    assert few.rate == pytest.approx(2.0) and few.interval is None
    one = recovery(answers("0"), answers("1"), answers("1"))
    assert one.rate == 1 and one.interval is None


def test_recovery_of_different_problems() -> None:
    five, six = np.ones((5, 1), dtype=bool), np.ones((6, 1), dtype=bool)
    for systems in ((five, five, six), (five[:, 0], five[:, 0], five[:, 0]), (five[:0],) * 3):
        with pytest.raises(ValueError, match="same problems"):
            recovery(*systems)


# ---- the command -----------------------------------------------------------------------------------------------------


def run(*args: str) -> Any:
    """In this process: quick. Standard output and error stay apart."""
    from rast.cli.commands import app

    return CliRunner().invoke(app, ["demo", *args])


def error_line(result: Any) -> str:
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return str(line)


def test_json(stand_ins: Path) -> None:
    result = run("--json", "--problems", "400", "--seed", "3", "--num-threads", "1")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    speed = facts.pop("tokens_per_second")
    assert speed.keys() == BY_HAND.keys() and all(rate > 0 for rate in speed.values())
    assert facts.keys() == {"accuracy", "recovery_rate", "recovery_rate_interval", "problems"}
    accuracy = facts["accuracy"]
    assert accuracy.keys() == BY_HAND.keys() and facts["problems"] == 400
    for name, log_odds in BY_HAND.items():
        p = share(log_odds)
        assert abs(accuracy[name] - p) < 4 * math.sqrt(p * (1 - p) / 400), name
    want = (accuracy["transfer"] - accuracy["base"]) / (accuracy["ceiling"] - accuracy["base"])
    assert facts["recovery_rate"] == pytest.approx(want)
    low, high = facts["recovery_rate_interval"]
    assert low < want < high

    again = run("--json", "--problems", "400", "--seed", "3", "--show", "0")
    assert json.loads(again.stdout)["accuracy"] == accuracy
    assert json.loads(run("--json", "--problems", "400", "--seed", "4").stdout)["accuracy"] != accuracy


def test_greedy_and_strength(stand_ins: Path) -> None:
    facts = json.loads(run("--json", "--problems", "20", "--no-do-sample").stdout)
    assert facts["accuracy"] == {"base": 0, "expert": 1, "transfer": 1, "ceiling": 1}
    assert facts["recovery_rate"] == 1 and facts["recovery_rate_interval"] is None
    weak = json.loads(run("--json", "--problems", "20", "--no-do-sample", "--transfer-strength", "0.1").stdout)
    assert weak["accuracy"]["transfer"] == weak["recovery_rate"] == 0


def test_as_text(stand_ins: Path) -> None:
    result = run("--problems", "50", "--show", "2", "--no-do-sample", "--transfer-strength", "1.5")
    assert result.exit_code == 0 and result.stderr == ""
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    for problem in some_problems(2):
        at = lines.index(f"{problem.prompt} {SOUGHT}")
        assert lines[at + 1 : at + 3] == ["  base alone: #### 9  wrong", "  transfer:   #### 7[9]  right"]
    assert sum("base alone: " in line for line in lines) == 2
    figures = {line.split()[0]: line.split()[1:3] for line in lines if " % " in line}
    assert figures["base"] == ["0.0", "%"] and figures["transfer"] == figures["ceiling"] == ["100.0", "%"]
    assert "large-base + 1.5 · (small-rl − small-base)" in result.stdout
    assert lines[-2:] == [
        "recovery rate, (transfer − base) / (ceiling − base): 100.0 %",
        "95 % interval, bootstrap over problems: none, too few problems that differ",
    ]
    drawn = run("--problems", "200").stdout.splitlines()
    assert re.fullmatch(r"95 % interval, bootstrap over problems: -?[\d.]+ % to [\d.]+ %", drawn[-1])
    assert "base alone: " not in run("--problems", "5", "--show", "0").stdout


def test_no_gap_is_said(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    models = shutil.copytree(stand_ins, tmp_path / "models")
    shutil.rmtree(models / "large-rl")
    shutil.copytree(models / "large-base", models / "large-rl")
    monkeypatch.setattr(rast.demo, "MODELS", models)
    lines = run("--problems", "20", "--no-do-sample").stdout.splitlines()
    assert "recovery rate: none, since the ceiling (0.0 %) is not above the base (0.0 %)" in lines
    facts = json.loads(run("--problems", "20", "--no-do-sample", "--json").stdout)
    assert facts["recovery_rate"] is None and facts["recovery_rate_interval"] is None


def test_on_a_terminal(stand_ins: Path) -> None:
    code = (
        "import pathlib, sys, rast.demo; rast.demo.MODELS = pathlib.Path(sys.argv.pop(1));"
        "from rast.cli import main; main()"
    )
    command = [sys.executable, "-c", code, str(stand_ins), "demo", "--problems", "20", "--no-do-sample"]
    env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    terminal, other_end = pty.openpty()
    process = subprocess.Popen(
        command, stdout=other_end, stderr=other_end, env=env | {"TERM": "xterm-256color", "COLUMNS": "100"}
    )
    os.close(other_end)
    shown = b""
    while True:
        ready, _, _ = select.select([terminal], [], [], 60)
        assert ready, shown
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    assert process.wait(timeout=60) == 0, shown
    text = shown.decode()
    assert text.count("\x1b[1;32m7\x1b[0m\x1b[2m[9]\x1b[0m") == 3  # marked in the transfer's column
    assert "base alone" in text and "recovery rate" in text
    for name in ("base", "expert", "transfer", "ceiling"):
        assert re.search(rf"{name} .*20/20.*sequences, .*60.* tokens", text), name  # the last state of its bar


def test_load_demo_chooses_the_models() -> None:
    for options in ({"expert": "x"}, {"pairs": []}, {"base": "x", "antiexpert": "y"}):
        with pytest.raises(TypeError, match=f"takes no {', '.join(sorted(options))}"):
            rast.load_demo(**options)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--problems", "0"], "--problems"),
        (["--show", "-1"], "--show"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64)], "--seed"),
        (["--transfer-strength", "nan"], "transfer_strength"),
        (["--num-threads", "0"], "num_threads"),
    ],
)
def test_bad_options(stand_ins: Path, args: list[str], words: str) -> None:
    for more in ([], ["--json"]):
        result = run(*args, *more)
        assert result.exit_code == 2
        assert words in error_line(result)
    assert "Traceback" not in result.stderr
    with pytest.raises(ValueError, match=words):
        raise run(*args, "--debug").exception


def test_ctrl_c(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rast.RastForCausalLM, "generate", interrupted)
    result = run("--json")
    assert result.exit_code == 130 and "error: interrupted" in result.stderr and result.stdout == ""


# ---- the models in the package ---------------------------------------------------------------------------------------


def test_shipped_models_recover_the_gap() -> None:
    command = [sys.executable, "-m", "rast", "demo", "--json", "--problems", "200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    accuracy = facts["accuracy"]
    assert accuracy.keys() == facts["tokens_per_second"].keys() == {"base", "expert", "transfer", "ceiling"}
    assert facts["problems"] == 200
    assert facts["recovery_rate"] >= 0.8
    low, high = facts["recovery_rate_interval"]
    assert low <= facts["recovery_rate"] <= high
    assert accuracy["transfer"] > accuracy["expert"] and accuracy["transfer"] > accuracy["base"]


@pytest.mark.parametrize(("quantization", "sampled", "greedy"), [("int8", 0.87, 0.98), ("int4", 0.85, 0.97)])
def test_shipped_models_quantized(quantization: str, sampled: float, greedy: float) -> None:
    """Of 1000 problems 90.8 % sampled and all greedily without; 90.7 and 100 % in int8, 89.4 and 99.9 % in int4."""
    problems = list(islice(rast.demo.problems.problems("test", 0), 300))
    model = rast.load_demo(quantization=quantization)
    assert all(quantization in net["weight_types"] for net in model.info()["nets"])
    assert solve(model, problems, n_samples=4).mean() >= sampled
    assert solve(model, problems, do_sample=False).mean() >= greedy


def test_shipped_models_are_small() -> None:
    files = [file for path in rast.demo.paths().values() for file in path.iterdir()]
    assert sum(file.stat().st_size for file in files) <= 12e6


@pytest.mark.parametrize("name", rast.demo.NAMES)
def test_shipped_models_in_transformers(name: str) -> None:
    path = rast.demo.paths()[name]
    model = rast.RastForCausalLM.from_pretrained(path, dtype="float32")
    assert model.tokenizer is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    hf = load_hf(path)
    for problem in islice(rast.demo.problems.problems("test", 0), 10):
        ids = model.tokenizer.encode(problem.prompt)
        assert tokenizer(problem.prompt).input_ids == ids.tolist()
        want = hf.generate(torch.from_numpy(ids.astype(np.int64))[None], do_sample=False, max_new_tokens=32)
        np.testing.assert_array_equal(model.generate(ids, do_sample=False, max_new_tokens=32), want.numpy())


def test_shipped_tokenizer() -> None:
    tokenizer = rast.load_demo().tokenizer
    assert tokenizer is not None
    for problem in islice(rast.demo.problems.problems("test", 1), 20):
        text = f"{problem.prompt} {problem.operands[0]} {ARROW} {SKIP} {ARROW} 63 {CROSS} 0 {ANSWER} {problem.answer}"
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and answer_of(text) == problem.answer
        assert None not in [tokenizer.token_of(int(id)) for id in ids]
    with pytest.raises(ValueError, match="hello"):
        tokenizer.encode("hello")


def test_answer_of() -> None:
    assert answer_of("40 → 58 #### 58") == 58
    assert answer_of("#### 5 #### 6") == 5
    for text in ("", "40 → 58", "####", "#### →", "#### #### 5", "#### → 5"):
        assert answer_of(text) is None
