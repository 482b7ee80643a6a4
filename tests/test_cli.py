"""The command line, as users start it: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import N_TEXT_TOKENS, ModelZoo, edit_json, load_rast
from typer.testing import CliRunner

import rast

SIZE = N_TEXT_TOKENS + 2
PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def trio(zoo: ModelZoo) -> tuple[Path, Path, Path]:
    base = zoo.folder("qwen2", seed=0, vocab_size=320, tokenizer="<s>,</s>")
    expert = zoo.folder("qwen2-tied", seed=1, vocab_size=SIZE, tokenizer="<s>,</s>")
    antiexpert = zoo.folder("qwen2-tied", seed=2, vocab_size=SIZE, tokenizer="<s>,</s>")
    return base, expert, antiexpert


@pytest.fixture
def roles(trio: tuple[Path, Path, Path]) -> list[str]:
    base, expert, antiexpert = map(str, trio)
    return [base, "--expert", expert, "--antiexpert", antiexpert, "--dtype", "float32"]


def run(*args: str, text: str | None = None) -> Any:
    """In this process: quick. Standard output and error stay apart."""
    from rast.cli.commands import app

    return CliRunner().invoke(app, list(args), input=text)


def error_line(result: Any) -> str:
    """The only line on standard error."""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return str(line)


def expected(trio: tuple[Path, Path, Path], prompts: list[str], **options: Any) -> tuple[list[str], Any]:
    model = load_rast(*trio)
    out = model.generate([model.tokenizer.encode(p) for p in prompts], return_dict_in_generate=True, **options)
    return [model.tokenizer.decode(ids) for ids in out.new_tokens()], out


def test_generate_is_the_library(trio: tuple[Path, Path, Path], roles: list[str]) -> None:
    texts, _ = expected(trio, [PROMPT], do_sample=True, temperature=1.5, top_k=0, seed=7, max_new_tokens=12)
    options = ["--do-sample", "--temperature", "1.5", "--top-k", "0", "--seed", "7", "--max-new-tokens", "12"]
    result = run("generate", *roles, "--prompt", PROMPT, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == texts[0] + "\n"
    assert "12 tokens in " in result.stderr and "seed 7" in result.stderr and "tokens/s" in result.stderr
    assert run("generate", *roles, "--prompt", PROMPT, *options, "--stream").stdout == result.stdout
    assert run("generate", *roles, *options, text=PROMPT + "\n").stdout == result.stdout
    assert run("generate", *roles, *options, "--file", "-", text=PROMPT).stdout == result.stdout
    assert run("generate", *roles, *options, "--quiet", "-p", PROMPT).stderr == ""
    other = run("generate", *roles, "--prompt", PROMPT, *options, "--strength", "0")
    assert other.stdout != result.stdout


def test_generate_from_a_file_with_pairs(trio: tuple[Path, Path, Path], roles: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    base, expert, antiexpert = trio
    options = ["--max-new-tokens", "8", "--dtype", "float32", "--file", str(tmp_path / "prompt.txt")]
    want = run("generate", *roles, "--strength", "0.5", *options)
    got = run("generate", str(base), "--pair", f"{expert},{antiexpert},0.5", *options)
    assert want.exit_code == got.exit_code == 0
    assert got.stdout == want.stdout
    assert run("generate", str(base), "--pair", f"{expert},,-0.5", *options).exit_code == 0
    assert (
        run("generate", str(base), "--pair", f"{expert},{antiexpert}", "--pair", str(expert), *options).exit_code == 0
    )


def test_json(trio: tuple[Path, Path, Path], roles: list[str]) -> None:
    prompts = [PROMPT, "naïve café 你好"]
    texts, out = expected(trio, prompts, do_sample=True, num_return_sequences=2, seed=3, max_new_tokens=6)
    args = ["--do-sample", "--num-return-sequences", "2", "--seed", "3", "--max-new-tokens", "6", "--json"]
    result = run("generate", *roles, "-p", prompts[0], "-p", prompts[1], *args)
    answer = json.loads(result.stdout)
    assert answer["seed"] == 3 and answer["n_new_tokens"] == int(out.new_lengths.sum())
    assert [r["text"] for r in answer["results"]] == texts
    assert [r["prompt"] for r in answer["results"]] == [prompts[0]] * 2 + [prompts[1]] * 2
    assert [r["token_ids"] for r in answer["results"]] == [ids.tolist() for ids in out.new_tokens()]
    assert [r["finish_reason"] for r in answer["results"]] == out.finish_reason
    np.testing.assert_allclose([r["logprob"] for r in answer["results"]], np.nansum(out.logprob, axis=1), rtol=1e-5)
    plain = run("generate", *roles, "-p", prompts[0], "-p", prompts[1], *args[:-1])
    assert plain.stdout.count("--- prompt ") == 4
    assert all(text in plain.stdout for text in texts)


def test_stop_strings_and_ids(trio: tuple[Path, Path, Path], roles: list[str]) -> None:
    _, out = expected(trio, [PROMPT], max_new_tokens=10)
    first = int(out.new_tokens()[0][2])
    args = ["generate", *roles, "-p", PROMPT, "--max-new-tokens", "10", "--json"]
    answer = json.loads(run(*args, "--eos-token-id", str(first), "--eos-token-id", "1").stdout)
    assert answer["results"][0]["finish_reason"] == "eos"
    answer = json.loads(run(*args, "--bad-words-ids", f"[[{first}]]", "--suppress-tokens", "0").stdout)
    assert first not in answer["results"][0]["token_ids"]
    assert first in out.new_tokens()[0]


def test_chat(zoo: ModelZoo, tmp_path: Path, trio: tuple[Path, Path, Path]) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(trio[0], folder)
    args = ["generate", str(folder), "-p", "hello", "--max-new-tokens", "4", "--dtype", "float32"]
    refused = run(*args, "--chat")
    assert refused.exit_code == 2 and "chat template" in error_line(refused)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    written = "system: be kind\nuser: hello\nassistant:"
    plain = run("generate", str(folder), "-p", written, "--max-new-tokens", "4", "--dtype", "float32")
    assert run(*args, "--chat", "--system", "be kind").stdout == plain.stdout


def test_info(trio: tuple[Path, Path, Path], roles: list[str]) -> None:
    result = run("info", *roles)
    assert result.exit_code == 0, result.stderr
    for word in ("Qwen2ForCausalLM", "base", "expert", "antiexpert", "float32", "weights", "KV per token", "threads"):
        assert word in result.stdout
    facts = json.loads(run("info", *roles, "--json").stdout)
    model = load_rast(*trio, device="auto")
    assert facts == json.loads(json.dumps(model.info()))
    assert [net["roles"] for net in facts["nets"]] == [["base"], ["expert"], ["antiexpert"]]
    assert facts["isa"] in result.stdout
    assert run("info", str(trio[0]), "--expert", str(trio[0])).stdout.count("base, expert") == 2


def test_info_check(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.numpy import load_file, save_file

    good = run("info", str(trio[0]), "--check")
    assert good.exit_code == 0 and "finite" in good.stdout
    bad = tmp_path / "bad"
    shutil.copytree(trio[0], bad)
    tensors = load_file(bad / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][0, 1] = np.nan
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    result = run("info", str(bad), "--check")
    assert result.exit_code == 1 and name in result.stdout and "1 NaN" in result.stdout
    (found,) = json.loads(run("info", str(bad), "--check", "--json").stdout)["not_finite"]
    assert found["tensor"] == name and (found["n_nan"], found["n_inf"]) == (1, 0)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--do-sample", "--temperature", "0"], "temperature"),
        (["--do-sample", "--top-p", "2"], "top_p"),
        (["--max-new-tokens", "100000"], "context"),
        (["--num-return-sequences", "2", "--stream", "--do-sample"], "--stream"),
        (["--bad-words-ids", "[["], "--bad-words-ids"),
        (["--pair", "a,b,c"], "--pair"),
        (["--device", "tpu"], "device"),
        (["--dtype", "int3"], "dtype"),
        (["--file", "/no/such/file"], "/no/such/file"),
        (["--antiexpert", "x"], "expert"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(trio: tuple[Path, Path, Path], args: list[str], words: str) -> None:
    result = run("generate", str(trio[0]), "-p", PROMPT, *args)
    assert result.exit_code == 2
    assert words in error_line(result)


def test_missing_models_and_unknown_options(roles: list[str]) -> None:
    missing = run("generate", "/no/such/model", "-p", PROMPT)
    assert missing.exit_code == 2 and "/no/such/model" in error_line(missing)
    assert run("info", "/no/such/model").exit_code == 2
    unknown = run("generate", *roles, "-p", PROMPT, "--num-beams", "4")
    assert unknown.exit_code == 2 and "--num-beams" in unknown.stderr
    assert run("generate").exit_code == 2
    assert run("generate", *roles, text="").exit_code == 2  # an empty prompt: this tokenizer adds nothing


def test_failures_have_exit_code_1_and_debug_shows_them(trio: tuple[Path, Path, Path], monkeypatch: Any) -> None:
    result = run("generate", str(trio[0]), "-p", PROMPT, "--device", "cuda")
    assert result.exit_code == 1 and "CUDA" in error_line(result)
    monkeypatch.setenv("RAST_DEBUG", "1")
    with pytest.raises(RuntimeError, match="CUDA"):
        raise run("generate", str(trio[0]), "-p", PROMPT, "--device", "cuda").exception


def test_ctrl_c(trio: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rast.RastForCausalLM, "generate", interrupted)
    result = run("generate", str(trio[0]), "-p", PROMPT)
    assert result.exit_code == 130 and "interrupted" in result.stderr


@pytest.mark.parametrize(
    "start", ["import runpy; runpy.run_module('rast', run_name='__main__')", "from rast.cli import main; main()"]
)
@pytest.mark.parametrize("package", ["typer", "numpy", "rast.cli.common", "rast.modeling", "rast._core"])
def test_ctrl_c_while_it_starts(package: str, start: str) -> None:
    code = f"""
import sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == "{package}":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
sys.argv[1:] = ["generate", "no-such-model"]
{start}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.replace("\nerror: interrupted\n", "")) == (130, "", "")


def test_load_warnings_are_lines(trio: tuple[Path, Path, Path], zoo: ModelZoo) -> None:
    other = zoo.folder("qwen2-tied", seed=1, vocab_size=SIZE, tokenizer="<s>,<think>")
    result = run("generate", str(trio[0]), "--expert", str(other), "-p", PROMPT, "--max-new-tokens", "2")
    assert result.exit_code == 0
    assert any(line.startswith("warning: ") and "think" in line for line in result.stderr.splitlines())
    shown = run("info", str(trio[0]), "--expert", str(other))
    assert "warning: " in shown.stdout and shown.stderr == ""


def start(*args: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rast", *args], input=text, capture_output=True, text=True, timeout=120, check=False
    )


def test_as_a_process(roles: list[str]) -> None:
    result = start("generate", *roles, "--max-new-tokens", "3", text=PROMPT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == run("generate", *roles, "--max-new-tokens", "3", text=PROMPT).stdout
    assert start("--version").stdout == f"rast {rast.__version__}\n"
    failed = start("generate", *roles, "--do-sample", "--top-p", "0", text=PROMPT)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr


def test_system_message_without_chat(roles: list[str]) -> None:
    result = run("generate", *roles, "--prompt", PROMPT, "--system", "be brief")
    assert result.exit_code == 2
    assert "--chat" in error_line(result)


def test_prompt_file_that_is_not_text(roles: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompt.bin").write_bytes(b"a\xff")
    result = run("generate", *roles, "--file", str(tmp_path / "prompt.bin"))
    assert result.exit_code == 2
    assert "prompt.bin" in error_line(result)
