"""The benchmarks' own code, on tiny models: files, contestants, each benchmark once, tables and report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rast

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


def run(script: str, *args: Any, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / script), *map(str, args)]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)} | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def result(tmp_path: Path, script: str, models: Path, *args: Any, **variables: str) -> dict[str, Any]:
    path = tmp_path / "result.json"
    options = ("--trio", "tiny", "--folder", models, "--rounds", 1, "--json", path)
    done = run(script, *options, *args, **variables)
    assert done.returncode == 0, done.stderr
    assert "| tiny, " in done.stdout
    report: dict[str, Any] = json.loads(path.read_text())
    return report


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*tokenizer type 'none'")
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_gguf_files_hold_the_same_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    import gguf_models
    import models as benchmark_models

    shape = dict(benchmark_models.SHAPES["tiny"], model_type=kind, num_hidden_layers=2, intermediate_size=512)
    monkeypatch.setitem(benchmark_models.SHAPES, "test", shape)
    folder = benchmark_models.random_model(tmp_path / "model", "test", 3)
    ids = np.random.default_rng(0).integers(0, shape["vocab_size"], (2, 40))

    def logits(path: Path, dtype: str = "bfloat16") -> Any:
        return rast.RastForCausalLM.from_pretrained(str(path), device="cpu", dtype=dtype).forward(ids)

    want = logits(folder, "float32")
    # llama-type files hold the values of a head in another order, so that their sums round otherwise.
    atol = 0 if kind == "qwen2" else 2e-6
    np.testing.assert_allclose(logits(gguf_models.gguf_file(folder, 16), "float32"), want, rtol=0, atol=atol)
    for bits, name, least in ((8, "Q8_0", 0.999), (4, "Q4_0", 0.9)):
        path = gguf_models.gguf_file(folder, bits)
        types = rast.RastForCausalLM.from_pretrained(str(path), device="cpu").info()["nets"][0]["weight_types"]
        assert next(iter(types)) == name
        got = logits(path)
        assert least < np.corrcoef(got.ravel(), want.ravel())[0, 1] < 1
    written = path.stat().st_mtime_ns
    assert gguf_models.gguf_file(folder, 4).stat().st_mtime_ns == written  # not made again


# ---- contestants -----------------------------------------------------------------------------------------------------


def test_a_contestant_that_takes_too_long() -> None:
    from turns import Contestant, DidNotFinishError

    contestant = Contestant("memory", {}, threads=1)
    assert contestant.call("read") > 1e6
    with pytest.raises(DidNotFinishError, match="memory did not finish"):
        contestant.call("read", limit=0.0)


def test_a_contestant_that_fails() -> None:
    from turns import Contestant

    with pytest.raises(RuntimeError, match="no_such_method"), Contestant("memory", {}, threads=1) as contestant:
        contestant.call("no_such_method")


def test_variables_reach_the_contestant_only(models: Path) -> None:
    from models import random_trio
    from turns import Contestant

    files = [str(folder) for folder in random_trio(models, "tiny")]
    with Contestant("rast", {"RAST_CPU_ISA": "portable"}, files=files, threads=1, kv_tokens=256) as contestant:
        assert contestant.facts["isa"] == "portable"
    assert os.environ.get("RAST_CPU_ISA") != "portable"


def test_a_library_that_does_not_load_is_left_out(tmp_path: Path, models: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise RuntimeError('no library here')")
    path = os.pathsep.join([str(tmp_path), str(BENCHMARKS.parent)])
    names = ("--contestants", "rast", "llama.cpp")
    report = result(tmp_path, "prefill.py", models, "--prompt-tokens", 20, *names, PYTHONPATH=path)
    assert report["missing"] == {"llama.cpp": "no library here"}
    assert list(report["results"]) == ["rast"]


# ---- each benchmark --------------------------------------------------------------------------------------------------


def test_decode(tmp_path: Path, models: Path) -> None:
    names = ("--contestants", "rast", "HuggingFace")
    report = result(tmp_path, "decode.py", models, "--tokens", 4, "--batch", 1, 3, "--threads", 1, *names)
    assert set(report["batches"]) == {"1", "3"}
    for batch in report["batches"].values():
        assert set(batch["results"]) == {"memory", "rast trio", "rast base", "HuggingFace trio"}
        assert all(len(values) == 1 and values[0] > 0 for values in batch["results"].values())
        assert batch["agreement"]["rast trio"] == 1 and batch["agreement"]["HuggingFace trio"] > 0.6
    weights = {name: facts["weight_bytes"] for name, facts in report["contestants"].items() if name != "memory"}
    assert weights["rast"] == weights["HuggingFace"]


def test_decode_quantized(tmp_path: Path, models: Path) -> None:
    names = ("--contestants", "rast", "HuggingFace")
    report = result(tmp_path, "decode.py", models, "--bits", 8, "--tokens", 2, "--batch", 2, *names)
    assert set(report["contestants"]) == {"rast", "rast int8", "memory"}  # HuggingFace has no such weights
    assert report["batches"]["2"]["agreement"]["rast int8 trio"] > 0


def test_workload(tmp_path: Path, models: Path) -> None:
    size = ("--prompts", 3, "--samples", 2, "--header", 40, "--tokens", 4)
    report = result(tmp_path, "workload.py", models, *size, "--contestants", "rast", "HuggingFace")
    assert {trial["batch"] for trial in report["trials"]["HuggingFace"]} == {2, 4, 6}
    predicted = [trial["seconds"] for trial in report["trials"]["HuggingFace"]]
    assert predicted == sorted(predicted)
    for name in ("rast", "HuggingFace"):
        assert len(report["seconds"][name]) == 1 and report["seconds"][name][0] > 0
        assert report["peak_bytes"][name] > sum(report["contestants"][name]["weight_bytes"])
    assert report["contestants"]["rast"]["kv_budget_bytes"] > 0


def test_busy(tmp_path: Path, models: Path) -> None:
    size = ("--tokens", 3, "--threads", 2)
    report = result(tmp_path, "busy.py", models, *size, "--contestants", "rast")
    cases = report["step_seconds"]["rast"]
    assert set(cases) == {"quiet", "busy", "busy, one thread"}
    assert all(len(runs) == 1 and len(runs[0]) == 3 and min(runs[0]) > 0 for runs in cases.values())
    assert not report["did_not_finish"]


# ---- tables and report -----------------------------------------------------------------------------------------------

RUN = {"trio": "tiny", "bits": 16, "forced_isa": None, "missing": {}}
RAST = {"weight_bytes": [40, 30, 30], "kv_bytes_per_token": [1, 1, 0], "kv_budget_bytes": 100e6}
PEER = {"weight_bytes": [50, 30, 30]}


@pytest.fixture
def decode() -> dict[str, Any]:
    def speeds(factor: float) -> dict[str, Any]:
        trios = {
            "rast trio": [90.0, 10.0, 9.0],
            "llama.cpp trio": [4.0, 4.0, 4.0],
            "HuggingFace trio": [30.0, 5.0, 6.0],
        }
        bases = {"rast base": [20.0, 21.0, 1.0], "llama.cpp base": [16.0, 16.0, 16.0]}
        fast = {name: [factor * value for value in values] for name, values in (trios | bases).items()}
        return {"results": fast | {"memory": [4800.0, 2400.0, 2400.0]}}

    run = RUN | {"benchmark": "decode", "prompt_tokens": 6, "tokens": 8, "batches": {"1": speeds(1), "8": speeds(4)}}
    return run | {"contestants": {"rast": RAST, "llama.cpp": PEER, "HuggingFace": RAST, "memory": {}}}


@pytest.fixture
def workload() -> dict[str, Any]:
    run = RUN | {"benchmark": "workload", "prompts": 2, "samples": 3, "tokens": 10}
    seconds = {"rast": [2.0, 6.0, 1.0], "llama.cpp": [5.0, 15.0, 4.0]}
    trials = {"llama.cpp": [{"batch": 6, "options": {}, "seconds": 4.0}]}
    peaks = {"rast": 5e9, "llama.cpp": 7e9}
    return run | {
        "contestants": {"rast": RAST, "llama.cpp": PEER},
        "seconds": seconds,
        "trials": trials,
        "peak_bytes": peaks,
    }


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_decode_table(decode: dict[str, Any]) -> None:
    from tables import decode_table

    head, _, one, eight = map(cells, decode_table([decode]).splitlines())
    row = dict(zip(head, one, strict=True))
    assert row["rast"] == "10.0 (50%)"  # of 2400 bytes a second at 100 of weights and 10 tokens of 2 bytes a step
    assert row["llama.cpp"] == "4.00 (22%)"  # (110 + 20) · 4 / 2400
    assert row["rast : llama.cpp"] == "2.50 ×" and row["rast : HuggingFace"] == "2.00 ×"
    assert row["against batch 1"] == "–"
    row = dict(zip(head, eight, strict=True))
    assert row["batch"] == "8" and row["rast"] == "40.0 (54%)"  # (100 + 8 · 20) · 5 / 2400
    assert row["against batch 1"] == "4.00 ×"


def test_decode_table_without_peers(decode: dict[str, Any]) -> None:
    from tables import decode_table

    for batch in decode["batches"].values():
        batch["results"] = {name: values for name, values in batch["results"].items() if name[:4] in ("rast", "memo")}
    row = cells(decode_table([decode]).splitlines()[2])
    assert row[4:8] == ["–", "–", "–", "–"]


def test_workload_table(workload: dict[str, Any]) -> None:
    from tables import workload_table

    _, _, ours, theirs = map(cells, workload_table([workload]).splitlines())
    assert ours[1:] == ["rast", "–", "10", "2.00", "30.0", "1.00 ×", "5.00", "0.30"]
    assert theirs[1:] == ["llama.cpp", "6", "10", "5.00", "12.0", "2.50 ×", "7.00", "–"]


def test_busy_table() -> None:
    from tables import busy_table

    steps = {"quiet": [[0.1, 0.1]], "busy": [[0.2, 0.2, 0.8]], "busy, one thread": [[0.25], [0.35]]}
    run = RUN | {"contestants": {}, "did_not_finish": {"b": "…"}, "step_seconds": {"a": steps, "b": {}}}
    _, _, a, b = map(cells, busy_table([run]).splitlines())
    assert a[2:] == ["a", "10.0", "2.50", "3.43", "0.73 ×", "4.0 ×"]
    assert b[2:] == ["b", "–", "did not finish", "–", "–", "–"]


def test_report(tmp_path: Path, decode: dict[str, Any], workload: dict[str, Any]) -> None:
    results, folder = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    quantized = decode | {"bits": 8}
    for name, report in (("decode-16", decode), ("decode-8", quantized), ("workload", workload)):
        (results / f"{name}.json").write_text(json.dumps(report))
    text = tmp_path / "text.md"
    marks = ("decode tiny 16", "decode", "workload", "prefill", "decode qwen1.5b+0.5b")
    text.write_text("before\n" + "between\n".join(f"<!-- table: {mark} -->\nold\n<!-- end -->\n" for mark in marks))
    for _ in range(2):  # the second run finds its own tables
        done = run("report.py", results, "--folder", folder, text)
        assert done.returncode == 0, done.stderr
    before, sixteen, both, samples, prefill, qwen = text.read_text().split("<!-- table: ")
    assert before == "before\n" and sixteen.endswith("<!-- end -->\nbetween\n")
    assert sixteen.count("| tiny") == 2 and "Q8_0" not in sixteen and "old" not in sixteen
    assert both.count("| tiny") == 4 and both.count("Q8_0") == 2
    assert samples.count("| tiny") == 2
    assert "\nold\n" in prefill and "\nold\n" in qwen  # nothing was measured
    names = {path.name for path in folder.iterdir()}
    assert names == {"decode-16.json", "decode-8.json", "workload.json", "decode.svg", "workload.svg"}
    assert all((folder / name).read_text().startswith("<?xml") for name in names if name.endswith(".svg"))


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def test_yardsticks_of_a_gpu(tmp_path: Path) -> None:
    """What of that benchmark runs without one."""
    import gpu

    assert gpu.copy_bandwidth("cpu", 1) > 1e6
    assert gpu.product_speed("cpu", 64) > 1e5
    config = dict(hidden_size=8, num_attention_heads=4, num_hidden_layers=3, intermediate_size=10)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert gpu.operations(tmp_path) == 2 * 3 * 8 * (4 * 8 + 3 * 10)
    (tmp_path / "config.json").write_text(json.dumps(config | dict(num_key_value_heads=2, head_dim=6)))
    assert gpu.operations(tmp_path) == 2 * 3 * 8 * (2 * 24 + 2 * 12 + 3 * 10)
