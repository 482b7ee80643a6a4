"""`rast info`: what the models are and what they need."""

from __future__ import annotations

import json
import warnings
from typing import Annotated, Any

import typer

from rast.cli import common

# What of RastForCausalLM.cache_info() says where a device's memory goes.
_MEMORY = (
    "device_bytes",
    "device_free",
    "device_weights",
    "device_work",
    "device_kept",
    "kv_bytes",
    "n_blocks",
    "block_tokens",
)


@common.loads_models()
def info(
    load: common.Load,
    check: Annotated[bool, typer.Option("--check", help="Also look for NaN and Inf in the weights.")] = False,
    as_json: common.Json = False,
) -> None:
    """Show architecture, size and memory of each role, the device, and warnings. With --check, exit code 1 if weights
    hold NaN or Inf."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they are part of the output
        model = load()
    facts = model.info()
    if facts["device"] != "cpu":
        plan = model.cache_info()
        facts["memory"] = {name: plan[name] for name in _MEMORY}
    if check:
        facts["not_finite"] = _check([net["path"] for net in facts["nets"]])
    typer.echo(json.dumps(facts, ensure_ascii=False) if as_json else _as_text(facts))
    if facts.get("not_finite"):
        raise typer.Exit(1)


def _check(paths: list[str]) -> list[dict[str, Any]]:
    """The tensors that hold NaN or Inf."""
    from rast.loading import scan

    with common.progress_bar() as progress:
        found = [finding for path in paths for finding in scan(path, progress=progress)]
    return [{"file": str(f.file), "tensor": f.tensor, "n_nan": f.n_nan, "n_inf": f.n_inf} for f in found]


def _size(n_bytes: int) -> str:
    size, units = float(n_bytes), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _as_text(facts: dict[str, Any]) -> str:
    nets = facts["nets"]
    context = facts["max_context"]
    rows = [
        ["", *(", ".join(net["roles"]) for net in nets)],
        ["architecture", *(net["architecture"] for net in nets)],
        ["parameters", *(f"{net['n_parameters']:,}" for net in nets)],
        ["dtype", *(net["dtype"] for net in nets)],
        ["stored as", *(", ".join(net["weight_types"]) for net in nets)],
        ["weights", *(_size(net["weight_bytes"]) for net in nets)],
        ["KV per token", *(_size(net["kv_bytes_per_token"]) for net in nets)],
        [f"KV of {context:,} tokens", *(_size(net["kv_bytes_per_token"] * context) for net in nets)],
        ["vocabulary", *(f"{net['vocab_size']:,}" for net in nets)],
        ["ids not in common", *(f"{net['n_uncommon_ids']:,}" for net in nets)],
        ["context", *(f"{net['max_context']:,}" for net in nets)],
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{', '.join(net['roles'])}: {net['source']}" for net in nets]
    lines += ["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows), ""]
    if facts["transfer_strength"]:
        lines.append(f"transfer strength: {', '.join(f'{s:g}' for s in facts['transfer_strength'])}")
    threads = f", {facts['num_threads']} threads" if facts["device"] == "cpu" else ""
    lines.append(f"device: {facts['device']}, {facts['isa']}{threads}")
    if facts["device_reason"]:
        lines.append(f"not on CUDA: {facts['device_reason']}")
    if memory := facts.get("memory"):
        lines.append(
            f"device memory: {_size(memory['device_bytes'])}: weights {_size(memory['device_weights'])}, workspace "
            f"{_size(memory['device_work'])}, KV cache {_size(memory['kv_bytes'])} "
            f"({memory['n_blocks'] * memory['block_tokens']:,} tokens); {_size(memory['device_free'])} are free, "
            f"{_size(memory['device_kept'])} of them for CUDA itself and what requests ask for"
        )
    lines += [f"warning: {text}" for text in facts["warnings"]]
    if "not_finite" in facts:
        lines += [
            f"not finite: {f['file']}: {f['tensor']} has {f['n_nan']} NaN and {f['n_inf']} Inf"
            for f in facts["not_finite"]
        ] or ["check: all weights are finite"]
    return "\n".join(lines)
