"""Reconciles the nets of one transfer: which ids mean the same in all, where generation ends, how far context goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .net import LoadedNet
from .tokenizer import Tokenizer

_SHOWN = 3  # examples in a message


@dataclass
class Reconciled:
    """What holds for the base and the others together. `uncommon` is in the order base, others."""

    n_valid: int
    """Ids from here on are never drawn: the tokenizer's size, or the embedding's rows without one."""
    uncommon: list[NDArray[np.int32]]
    """Per net, sorted: ids it has a row for, but that mean another token there than in the base. Empty for the base."""
    eos_token_id: list[int]
    """The base's, then the experts'."""
    pad_token_id: int | None
    pieces: tuple[bytes, NDArray[np.uint32]] | None
    """Bytes of all tokens end to end, and their offsets [n + 1]; None without a tokenizer."""
    max_context: int
    """The least of all nets."""
    limiting_net: str
    warnings: list[str]


def reconcile(base: LoadedNet, others: Sequence[tuple[LoadedNet, str]]) -> Reconciled:
    """Reconciles `base` with (net, role) pairs; role is "expert" or "antiexpert".

    ValueError when two tokenizers differ in an ordinary token. A net without tokenizer is taken to share the others'.
    """
    for net, role in others:
        if role not in ("expert", "antiexpert"):
            raise ValueError(f"the role of {net.name} must be 'expert' or 'antiexpert', found {role!r}")
    nets = [base, *(net for net, _ in others)]
    warnings: list[str] = []
    rows = base.config["vocab_size"]
    reference = next((net for net in nets if net.tokenizer is not None), None)
    uncommon: list[NDArray[np.int32]] = [np.zeros(0, np.int32) for _ in nets]
    if reference is None or reference.tokenizer is None:
        n_valid, pieces = rows, None
        if others:
            warnings.append("no model has a tokenizer; their token ids are taken to mean the same")
    else:
        n_valid, pieces = min(reference.tokenizer.n_tokens, rows), reference.tokenizer.pieces()
        tokens = reference.tokenizer.tokens()[:n_valid]
        for i, net in enumerate(nets):
            if net.tokenizer is not None and net is not reference:
                uncommon[i] = _compare(reference, tokens, net, net.tokenizer, warnings)

    limiting = min(nets, key=lambda net: net.config["max_context"])
    eos = _eos(base, others, uncommon, n_valid, warnings)
    return Reconciled(
        n_valid=n_valid,
        uncommon=uncommon,
        eos_token_id=eos,
        pad_token_id=_pad(base, eos),
        pieces=pieces,
        max_context=limiting.config["max_context"],
        limiting_net=limiting.name,
        warnings=warnings,
    )


def _compare(
    reference: LoadedNet, tokens: list[str | None], net: LoadedNet, tokenizer: Tokenizer, warnings: list[str]
) -> NDArray[np.int32]:
    """Ids below len(tokens) that `net` has a row for and that are not the reference's token there."""
    assert reference.tokenizer is not None
    added = reference.tokenizer.added_ids | tokenizer.added_ids
    theirs = tokenizer.tokens()
    rows = net.config["vocab_size"]
    padded = theirs[: len(tokens)] + [None] * (len(tokens) - len(theirs))
    differ = [id for id, (ours, other) in enumerate(zip(tokens, padded, strict=True)) if ours != other and id < rows]
    ordinary = [id for id in differ if tokens[id] is not None and padded[id] is not None and id not in added]
    if ordinary:
        id = ordinary[0]
        more = f" ({len(ordinary)} ids differ)" if len(ordinary) > 1 else ""
        raise ValueError(
            f"the tokenizers of {reference.name} ({reference.source}) and {net.name} ({net.source}) differ: id {id} is "
            f"{tokens[id]!r} in {reference.name} and {padded[id]!r} in {net.name}{more}"
        )
    if differ:
        shown = "; ".join(f"id {id}: {tokens[id]!r} against {padded[id]!r}" for id in differ[:_SHOWN])
        warnings.append(
            f"{len(differ)} ids are other tokens in {net.name} than in {reference.name} and count as not common "
            f"({shown}{'; ...' if len(differ) > _SHOWN else ''})"
        )
    beyond = [token for token in theirs[len(tokens) : rows] if token is not None]
    if beyond:
        shown = ", ".join(map(repr, beyond[:_SHOWN]))
        warnings.append(
            f"{len(beyond)} tokens of {net.name} are not in {reference.name} and are never drawn "
            f"({shown}{', ...' if len(beyond) > _SHOWN else ''})"
        )
    return np.array(differ, np.int32)


def _eos(
    base: LoadedNet,
    others: Sequence[tuple[LoadedNet, str]],
    uncommon: Sequence[NDArray[np.int32]],
    n_valid: int,
    warnings: list[str],
) -> list[int]:
    """The base's EOS ids, then those of the experts that mean the same token in the base."""
    roles = ["base", *(role for _, role in others)]
    eos: list[int] = []
    for net, role, differing in zip([base, *(net for net, _ in others)], roles, uncommon, strict=True):
        if role == "antiexpert":
            continue
        for id in _net_eos(net):
            if id >= n_valid or id in differing:
                warnings.append(f"EOS id {id} of {net.name} is not that token in {base.name} and is not used")
            elif id not in eos:
                eos.append(id)
    return eos


def _net_eos(net: LoadedNet) -> list[int]:
    value: Any = net.generation_config.get("eos_token_id")
    if value is None:
        id = None if net.tokenizer is None else net.tokenizer.eos_token_id
        return [] if id is None else [id]
    ids = value if isinstance(value, list) else [value]
    for id in ids:
        if _check_id(net, "eos_token_id", id) >= net.config["vocab_size"]:
            raise ValueError(f"{net.path}: eos_token_id {id} is not below vocab_size ({net.config['vocab_size']})")
    return ids


def _pad(base: LoadedNet, eos: Sequence[int]) -> int | None:
    """The base's pad id, or its tokenizer's, or (as in transformers) its first EOS id."""
    value = base.generation_config.get("pad_token_id")
    if value is not None and value != -1:  # -1 stands for "none" in old configs
        return _check_id(base, "pad_token_id", value)
    id = None if base.tokenizer is None else base.tokenizer.pad_token_id
    return id if id is not None else next(iter(eos), None)


def _check_id(net: LoadedNet, key: str, id: Any) -> int:
    if isinstance(id, bool) or not isinstance(id, int) or id < 0:
        raise ValueError(f"{net.path}: {key} must be a token id or a list of them, found {id!r}")
    return id
