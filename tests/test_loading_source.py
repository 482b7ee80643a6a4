"""Finding a model source: local paths, and hub ids in a local cache, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from loading_files import save_model

from rast.loading import load_net
from rast.loading.source import resolve_source


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache that holds one model, as huggingface_hub lays it out."""
    repo = tmp_path / "cache" / "models--someone--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    save_model(repo / "snapshots" / commit, "Qwen2ForCausalLM")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (repo / "refs" / "v1").write_text(commit)
    return tmp_path / "cache"


def test_hub_id_in_the_cache(cache: Path) -> None:
    net = load_net("someone/tiny", cache_dir=cache, local_files_only=True)
    assert net.source == "someone/tiny"
    assert net.path.parent.name == "snapshots"
    again = load_net("someone/tiny", cache_dir=str(cache), local_files_only=True, revision="v1")
    assert again.key() == net.key()


@pytest.mark.parametrize("options", [{"revision": "v2"}, {}])
def test_hub_id_not_in_the_cache(cache: Path, options: dict[str, str]) -> None:
    name = "someone/tiny" if options else "someone/else"
    with pytest.raises(FileNotFoundError, match=f"{name}: no such local folder, and the Hugging Face Hub"):
        load_net(name, cache_dir=cache, local_files_only=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "/nothing", "..x/ /y", "nothing.gguf", "a/b.gguf", ""])
def test_no_such_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        resolve_source(name)


def test_bad_hub_id(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a--b\.\.c"):
        resolve_source("a--b..c", cache_dir=tmp_path, local_files_only=True)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("model") == Path("model")
    assert resolve_source(tmp_path / "model") == tmp_path / "model"
    assert resolve_source("~/model") == tmp_path / "model"
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match=r"expected a folder or a \.gguf file"):
        load_net("weights.bin")
