"""`rast bench`: what it reports, and that it reads the memory it says it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import ModelZoo
from typer.testing import CliRunner

from rast import _core
from rast.cli.commands import app


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, args)])


@pytest.fixture(scope="module")
def trio(zoo: ModelZoo) -> tuple[Path, Path, Path]:
    base, expert, antiexpert = zoo.trio()
    return base, expert, antiexpert


QUICK = ("--prompt-tokens", 8, "--new-tokens", 4, "--rounds", 1)


def test_json(trio: tuple[Path, Path, Path]) -> None:
    base, expert, antiexpert = trio
    options = (
        "--expert",
        expert,
        "--antiexpert",
        antiexpert,
        "--batch",
        1,
        "--batch",
        3,
        "--threads",
        1,
        "--threads",
        2,
    )
    result = run(base, *options, *QUICK, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["prompt_tokens"] == 8 and report["new_tokens"] == 4 and report["rounds"] == 1
    assert [net["roles"] for net in report["nets"]] == [["base"], ["expert"], ["antiexpert"]]
    assert report["peak_memory_bytes"] > 1 << 20
    rows = report["results"]
    assert [(row["threads"], row["batch"], row["system"]) for row in rows] == [
        (threads, batch, system) for threads in (1, 2) for batch in (1, 3) for system in ("base", "transfer", "drafts")
    ]
    weights = [net["weight_bytes"] for net in report["nets"]]
    kv = [net["kv_bytes_per_token"] for net in report["nets"]]
    for row in rows:
        assert row["prefill_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0
        if row["system"] == "drafts":
            assert row["acceptance"] is None or 0 <= row["acceptance"] <= 1
            assert 1 <= row["tokens_per_step"] <= 4 and 0 <= row["drafting_share"] < 1
            continue
        n = 3 if row["system"] == "transfer" else 1
        step = sum(weights[:n]) + row["batch"] * 10 * sum(kv[:n])  # 10: 8 of the prompt and half of 4
        share = row["decode_tokens_per_second"] / row["batch"] * step / row["memory_bytes_per_second"]
        assert row["roofline_share"] == pytest.approx(share, rel=0.01, abs=1e-4)
        assert len(row["pass_seconds"]) == n and min(row["pass_seconds"]) >= 0
        alone = row["batch"] / rows[rows.index(row) - (n == 3)]["decode_tokens_per_second"]
        assert row["pass_seconds"][0] == pytest.approx(alone, rel=0.01, abs=1e-6)


def test_drafts(zoo: ModelZoo) -> None:
    """The expert is the target: its drafts stand, whatever the clock says of their use."""
    base, expert = (str(zoo.folder("qwen2", seed=s, vocab_size=300, num_hidden_layers=2)) for s in range(2))
    options = ("--expert", expert, "--antiexpert", base, "--batch", 1, "--prompt-tokens", 4, "--new-tokens", 60)
    result = run(base, *options, "--rounds", 1, "--num-assistant-tokens", 4, "--json")
    assert result.exit_code == 0, result.stderr
    base_row, transfer, drafts = json.loads(result.stdout)["results"]
    assert drafts["acceptance"] == 1 and drafts["tokens_per_step"] == pytest.approx(5, abs=0.2)
    assert "pass_seconds" not in drafts and "acceptance" not in transfer
    assert len(base_row["pass_seconds"]) == 1 and len(transfer["pass_seconds"]) == 2
    lines = run(base, *options, "--rounds", 1).stdout.splitlines()
    assert any("of the drafts stand" in line or "no draft was tried" in line for line in lines)
    for wrong in ("-1", "many"):
        result = run(base, *options, "--num-assistant-tokens", wrong)
        assert result.exit_code != 0 and "num_assistant_tokens" in result.stderr and wrong in result.stderr


def test_text(trio: tuple[Path, Path, Path]) -> None:
    result = run(trio[0], *QUICK, "--batch", 2)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[3].split()[:3] == ["threads", "batch", "system"]
    assert len([line for line in lines if " base " in line]) == 1 and " transfer " not in result.stdout
    assert lines[-1].startswith("most memory resident at once")


@pytest.mark.parametrize("option", ["--batch", "--threads", "--prompt-tokens", "--new-tokens", "--rounds"])
def test_bad_options(trio: tuple[Path, Path, Path], option: str) -> None:
    result = run(trio[0], option, 0)
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {option} must be at least 1")


def test_prompt_beyond_the_context(trio: tuple[Path, Path, Path]) -> None:
    result = run(trio[0], "--prompt-tokens", 100_000)
    assert result.exit_code == 2 and "context" in result.stderr


@pytest.mark.parametrize("n", [0, 1, 7, 8, 63, 64, 255, 256, 257, 4099])
def test_memory_read_reads_everything(n: int) -> None:
    data = np.random.default_rng(n).integers(0, 256, n, dtype=np.uint8)
    words = np.zeros(-(-n // 8) * 8, np.uint8)
    words[:n] = data
    assert _core.memory_read(data) == int(np.bitwise_xor.reduce(words.view("<u8"), initial=0))
    with pytest.raises((ValueError, BufferError)):
        _core.memory_read(np.ones((4, 4))[:, ::2])
