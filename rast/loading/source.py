"""Finds the local folder or file behind what the user named: a folder, a .gguf file, or a hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HUB_ID = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)

_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
]


def resolve_source(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local path of `source`; a hub id is downloaded into (or found in) the hub's cache.

    FileNotFoundError says what was looked for.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{name!r}: no such file or folder")

    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            token=token,
            local_files_only=local_files_only,
            allow_patterns=_HUB_FILES,
        )
    except (OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"{name}: no such local folder, and the Hugging Face Hub (or its local cache) "
            f"did not provide it{at}: {error}"
        ) from error
    return Path(folder)
