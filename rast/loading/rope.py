"""Inverse frequencies of rotary position embeddings, scaling applied, for the rope types that are supported.

Computed in float32 step by step as transformers does, so that long contexts see the same angles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .fields import Fields

ROPE_TYPES = ("default", "linear", "llama3")


def rope_parameters(config: Fields) -> dict[str, Any]:
    """The rope settings of a config.json: `rope_parameters` (transformers 5), `rope_scaling` and `rope_theta` (4)."""
    params: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise config.error(key, "an object or null", value)
        if value:
            params = dict(value)
            break
    params.setdefault("rope_type", params.get("type", "default"))
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(key) is not None:
            # Only the original context length overrides what the object says, as in transformers.
            params[key] = config.get(key) if key.startswith("original") else params.get(key, config.get(key))
    params.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return params


def inverse_frequencies(params: Mapping[str, Any], head_dim: int, file: object) -> tuple[float, NDArray[np.float32]]:
    """(theta, frequencies float32 [head_dim / 2]) for settings as `rope_parameters` returns them."""
    fields = Fields(params, file, prefix="rope_parameters.")
    rope_type = params["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise NotImplementedError(
            f"{file}: rope type {rope_type!r} is not supported (supported: {', '.join(ROPE_TYPES)})"
        )
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise NotImplementedError(f"{file}: partial_rotary_factor other than 1 is not supported")
    theta = fields.number("rope_theta", 10000.0, above=0.0)

    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    with np.errstate(all="ignore"):  # the result is checked
        freq = np.float32(1.0) / np.power(theta, exponent.astype(np.float64)).astype(np.float32)
        if rope_type == "linear":
            freq = freq / np.float32(fields.number("factor", above=0.0))
        elif rope_type == "llama3":
            freq = _llama3(freq, fields)
    freq = freq.astype(np.float32)
    if not np.isfinite(freq).all():
        raise ValueError(f"{file}: the rope settings {dict(params)!r} give frequencies that are not finite")
    return theta, freq


def _llama3(freq: NDArray[np.float32], fields: Fields) -> NDArray[np.float32]:
    """Long waves are slowed by `factor`, short ones kept, those between blended."""
    factor = fields.number("factor", above=0.0)
    low = fields.number("low_freq_factor", above=0.0)
    high = fields.number("high_freq_factor", above=low)
    original = fields.integer("original_max_position_embeddings")
    wavelength = np.float32(2 * math.pi) / freq
    smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * freq / np.float32(factor) + smooth * freq
    scaled = np.where(wavelength > original / low, freq / np.float32(factor), blended)
    return np.where(wavelength < original / high, freq, scaled).astype(np.float32)
