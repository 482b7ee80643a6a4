"""Generation options: HuggingFace's names, meaning and defaults, in one table.

Options come in layers, each over the one before: HuggingFace's defaults, the base's generation_config.json, the call's
`generation_config`, the call's own arguments. In the last, None turns an option off; in the others it says nothing.
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, TypedDict, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rast.inputs import as_array, read_integer

if TYPE_CHECKING:
    from rast._core import Request

__all__ = ["GenerateKwargs", "GenerationOptions", "transfer_strengths"]


class GenerateKwargs(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`."""

    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    min_length: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    num_return_sequences: int | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    stop_strings: str | Sequence[str] | None
    max_time: float | None
    return_dict_in_generate: bool | None
    output_scores: bool | None
    output_logits: bool | None
    num_assistant_tokens: int | None
    transfer_strength: ArrayLike | None
    transfer_start: int | None
    seed: int | None


# ---- checks: (name, value) -> value as the core wants it ----------------------------------------------------------

Check = Callable[[str, Any], Any]


def _integer(low: int, high: int = 2**31 - 1) -> Check:
    def check(name: str, value: Any) -> int:
        return read_integer(value, f"`{name}`", low, high)

    return check


def _number(fits: Callable[[float], bool], must: str) -> Check:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
            raise TypeError(f"`{name}` must be a number, but is {value!r}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and fits(number)):
            raise ValueError(f"`{name}` (={value}) has to be {must}")
        return number

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, but is {value!r}")
    return bool(value)


_token_id = _integer(0)


def _token_ids(name: str, value: Any) -> NDArray[np.int32]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"`{name}` must be a list of token ids, but is {value!r}")
    return np.array([_token_id(name, v) for v in value], dtype=np.int32)


def _one_or_more_ids(name: str, value: Any) -> NDArray[np.int32]:
    many = isinstance(value, list | tuple) or np.ndim(value) > 0
    return _token_ids(name, value if many else [value])


def _id_sequences(name: str, value: Any) -> list[NDArray[np.int32]]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"`{name}` must be a list of lists of token ids, but is {value!r}")
    words = [_token_ids(name, word) for word in value]
    if not words or not all(map(len, words)):
        raise ValueError(f"`{name}` has to be a non-empty list of non-empty lists, but is {value!r}")
    return words


def _strings(name: str, value: Any) -> list[bytes]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) for s in strings):
        raise TypeError(f"`{name}` must be a string or a list of strings, but is {value!r}")
    if not all(strings):
        raise ValueError(f"`{name}` must not hold an empty string")
    return [s.encode() for s in strings]


AUTO_DRAFTS = -1


def _drafts(name: str, value: Any) -> int:
    if isinstance(value, str):
        if value == "auto":
            return AUTO_DRAFTS
        raise ValueError(f"`{name}` must be an integer >= 0 or 'auto', but is {value!r}")
    return cast(int, _integer(0, 2**31 - 1)(name, value))


def _as_is(name: str, value: Any) -> Any:
    return value  # checked where the number of pairs is known


# ---- the tables ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Option:
    check: Check
    default: Any  # HuggingFace's, used when no layer says anything
    off: Any = None  # what None in the call means


_TEMPERATURE = _number(lambda x: x > 0, "a strictly positive float; for greedy decoding set `do_sample=False`")
_NO_IDS = np.empty(0, dtype=np.int32)
_OPTIONS: dict[str, _Option] = {
    "max_new_tokens": _Option(_integer(1), None),
    "max_length": _Option(_integer(1), None),
    "min_new_tokens": _Option(_integer(0), None),
    "min_length": _Option(_integer(0), 0, 0),
    "do_sample": _Option(_flag, False, False),
    "temperature": _Option(_TEMPERATURE, 1.0, 1.0),
    "top_k": _Option(_integer(0), 50, 0),
    "top_p": _Option(_number(lambda x: 0 < x <= 1, "a float > 0 and <= 1"), 1.0, 1.0),
    "min_p": _Option(_number(lambda x: 0 <= x <= 1, "a float in the [0, 1] interval"), 0.0, 0.0),
    "repetition_penalty": _Option(_number(lambda x: x > 0, "a strictly positive float"), 1.0, 1.0),
    "num_return_sequences": _Option(_integer(1, 2**24), 1, 1),
    "eos_token_id": _Option(_one_or_more_ids, _NO_IDS, _NO_IDS),
    "pad_token_id": _Option(_token_id, None),
    "bad_words_ids": _Option(_id_sequences, (), ()),
    "suppress_tokens": _Option(_token_ids, _NO_IDS, _NO_IDS),
    "stop_strings": _Option(_strings, (), ()),
    "max_time": _Option(_number(lambda x: x > 0, "a strictly positive number of seconds"), 0.0, 0.0),
    "return_dict_in_generate": _Option(_flag, False, False),
    "output_scores": _Option(_flag, False, False),
    "output_logits": _Option(_flag, False, False),
    "num_assistant_tokens": _Option(_drafts, AUTO_DRAFTS, 0),
    "transfer_strength": _Option(_as_is, None),
    "transfer_start": _Option(_integer(0), 0, 0),
    "seed": _Option(_integer(0, 2**64 - 1), None),
}

# HuggingFace's options that are not supported, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "early_stopping": (None, False),
    "length_penalty": (None, 1),
    "diversity_penalty": (None, 0),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "typical_p": (None, 1),
    "top_h": (None,),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "exponential_decay_length_penalty": (None,),
    "renormalize_logits": (None, False),
    "remove_invalid_values": (None, False),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None,),
    "guidance_scale": (None, 1),
    "watermarking_config": (None,),
    "token_healing": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "use_cache": (None, True),
    "use_mtp": (None, False),
    "assistant_model": (None,),
    "assistant_early_exit": (None,),
    "assistant_ensemble_weight": (None,),
    "prompt_lookup_num_tokens": (None,),
    "speculation_type": (None,),
    "custom_generate": (None,),
    "logits_processor": (None,),
    "stopping_criteria": (None,),
    "prefix_allowed_tokens_fn": (None,),
    "negative_prompt_ids": (None,),
    "negative_prompt_attention_mask": (None,),
    "synced_gpus": (None, False),
}

# Fields of a GenerationConfig that decide how something is computed or recorded, never what comes out.
_WITHOUT_EFFECT = frozenset(
    {
        "transformers_version",
        "_from_model_config",
        "_commit_hash",
        "bos_token_id",
        "decoder_start_token_id",
        "is_assistant",
        "low_memory",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "return_legacy_cache",
        "compile_config",
        "disable_compile",
        "prefill_chunk_size",
        "continuous_batching_config",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
        "max_matching_ngram_size",
    }
)

_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")
_DEFAULT_NEW_TOKENS = 20  # HuggingFace's, when no layer gives a length


def _neutral(name: str, value: Any) -> bool:
    return any(value is v or (type(value) is not bool and v is not None and value == v) for v in _NEUTRAL[name])


def _config_dict(config: Any) -> dict[str, Any]:
    """A `generation_config` argument as a dict: a mapping, or a transformers.GenerationConfig (has `to_dict`)."""
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        if not hasattr(config, "to_dict"):
            raise TypeError(f"`generation_config` must be a dict or a GenerationConfig, but is {config!r}")
        config = config.to_dict()
    return {k: v for k, v in config.items() if v is not None and k not in _WITHOUT_EFFECT - {"num_assistant_tokens"}}


def _refuse_unsupported(call: Mapping[str, Any], config: Mapping[str, Any], file: Mapping[str, Any]) -> None:
    for name, value in {**config, **call}.items():
        if name not in _OPTIONS and not (name in _NEUTRAL and _neutral(name, value)):
            shown = f"{name}={value!r}" if name in _NEUTRAL else name
            raise TypeError(f"{shown} is not supported; supported options are {', '.join(_OPTIONS)}")
    for name, value in file.items():
        if name in _NEUTRAL and not _neutral(name, value) and name not in call and name not in config:
            raise ValueError(
                f"the base's generation_config.json asks for {name}={value!r}, which is not supported; "
                f"to go without, pass {name}={_NEUTRAL[name][-1]!r}"
            )


# ---- the options of one call ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationOptions:
    """Checked options of one call, off values filled in. Lengths wait for the prompts: see `lengths`."""

    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    min_length: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    num_return_sequences: int
    eos_token_id: NDArray[np.int32]
    pad_token_id: int
    bad_words_ids: Sequence[NDArray[np.int32]]
    suppress_tokens: NDArray[np.int32]
    stop_strings: Sequence[bytes]
    max_time: float
    return_dict_in_generate: bool
    output_scores: bool
    output_logits: bool
    num_assistant_tokens: int
    transfer_strength: Any
    transfer_start: int
    seed: int
    asked: frozenset[str]
    """Names that the call itself or its `generation_config` gave."""

    @classmethod
    def resolve(
        cls,
        call: Mapping[str, Any],
        generation_config: Any,
        file: Mapping[str, Any],
        *,
        n_vocab: int,
        has_tokenizer: bool,
        together: bool = True,
        stacklevel: int = 3,
    ) -> GenerationOptions:
        """Merges the layers and checks every value.

        Args:
            call: keyword arguments of the call.
            generation_config: a dict, a transformers.GenerationConfig or None.
            file: the base's generation_config.json.
            n_vocab: ids must be below.
            has_tokenizer: whether stop strings can be used.
            together: False: do not look at how the options fit together, because others may come over them.
            stacklevel: of warnings.

        Raises:
            TypeError: an option that is not supported, or a value of the wrong type.
            ValueError: a value out of range.
        """
        config = _config_dict(generation_config)
        _refuse_unsupported(call, config, file)
        given = {k: v for k, v in file.items() if k in _OPTIONS and v is not None and k not in _WITHOUT_EFFECT}
        given |= {**config, **call}
        greedy = not given.get("do_sample")
        values: dict[str, Any] = {}
        for name, option in _OPTIONS.items():
            if name not in given:
                values[name] = option.default
            elif given[name] is None:
                values[name] = option.off
            else:
                try:
                    values[name] = option.check(name, given[name])
                except ValueError as error:
                    if greedy and name in _SAMPLING_ONLY:  # as in HuggingFace: nobody reads it
                        values[name] = option.off
                    elif name in call or name in config:
                        raise
                    else:
                        raise ValueError(f"the base's generation_config.json: {error}") from None

        eos = values["eos_token_id"]
        if values["pad_token_id"] is None:
            values["pad_token_id"] = int(eos[0]) if len(eos) else 0
        # A word that is just an end-of-sequence id stays allowed, as in HuggingFace.
        values["bad_words_ids"] = [w for w in values["bad_words_ids"] if len(w) > 1 or w[0] not in eos]
        if values["seed"] is None:
            values["seed"] = secrets.randbits(53)
        asked = frozenset(name for name, value in {**config, **call}.items() if value is not None)
        options = cls(**values, asked=asked)
        options._check_model(n_vocab, has_tokenizer)
        if together:
            options._check_together(stacklevel + 1)
        return options

    def _check_model(self, n_vocab: int, has_tokenizer: bool) -> None:
        ids = {"eos_token_id": self.eos_token_id, "suppress_tokens": self.suppress_tokens}
        ids |= {"bad_words_ids": np.concatenate(self.bad_words_ids)} if self.bad_words_ids else {}
        for name, values in ids.items():
            if len(values) and values.max() >= n_vocab:
                raise ValueError(f"`{name}` has the id {values.max()}, but the vocabulary has {n_vocab} ids")
        if self.stop_strings and not has_tokenizer:
            raise ValueError("`stop_strings` needs a tokenizer, and the base came without one")

    def _check_together(self, stacklevel: int) -> None:
        if self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError(
                "Greedy methods (do_sample != True) do not support `num_return_sequences` different than 1 "
                f"(got {self.num_return_sequences})"
            )
        idle = [name for name in _SAMPLING_ONLY if name in self.asked and getattr(self, name) != _OPTIONS[name].off]
        if idle and not self.do_sample:
            warnings.warn(f"{', '.join(idle)} has an effect with do_sample=True only", UserWarning, stacklevel)
        if {"max_new_tokens", "max_length"} <= self.asked:
            warnings.warn(
                "both max_new_tokens and max_length are given: max_new_tokens counts", UserWarning, stacklevel
            )
        if (self.output_scores or self.output_logits) and not self.return_dict_in_generate:
            warnings.warn(
                "output_scores and output_logits have an effect with return_dict_in_generate=True only",
                UserWarning,
                stacklevel,
            )

    def lengths(self, longest: int, context: int) -> tuple[int, int]:
        """(max, min) number of new tokens, for prompts of at most `longest` tokens and models for `context` tokens.

        As in HuggingFace, `max_length` counts the padded prompt, and a limit that the caller did not ask for bends to
        the context.

        Raises:
            ValueError: `max_length` leaves no room behind the prompt.
        """
        if self.max_new_tokens is not None:
            most, asked = self.max_new_tokens, "max_new_tokens" in self.asked
        elif self.max_length is not None:
            most, asked = self.max_length - longest, "max_length" in self.asked
            if most <= 0:
                raise ValueError(
                    f"the longest prompt has {longest} tokens, but `max_length` is {self.max_length}: "
                    "increase `max_length` or, better, set `max_new_tokens`"
                )
        else:
            most, asked = _DEFAULT_NEW_TOKENS, False
        if not asked:
            most = max(1, min(most, context - longest))
        least = self.min_length - longest if self.min_new_tokens is None else self.min_new_tokens
        return most, max(0, least)

    def request(self, longest: int, context: int) -> Request:
        """The part of a request that all prompts of the call share."""
        most, least = self.lengths(longest, context)
        request: Request = {
            "max_new": most,
            "seed": self.seed,
            "n_samples": self.num_return_sequences,
            "transfer_start": self.transfer_start,
            "do_sample": self.do_sample,
            "repetition_penalty": self.repetition_penalty,
            "min_new_tokens": least,
            "suppress": self.suppress_tokens,
            "bad_words": self.bad_words_ids,
            "eos": self.eos_token_id,
            "stop_strings": self.stop_strings,
            "max_time": self.max_time,
            "n_draft": self.num_assistant_tokens,
        }
        if self.do_sample:  # as in HuggingFace, greedy decoding takes the penalties, but no warpers
            request |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        return request


def transfer_strengths(value: Any, default: NDArray[np.float64], batch: int) -> NDArray[np.float64]:
    """λ for each request and pair: float64 `[batch, pairs]`.

    Args:
        value: a number for all pairs, one number for each pair, or `[batch, pairs]`; None: `default`.
        default: `[pairs]`.
        batch: number of prompts.
    """
    n_pairs = len(default)
    if value is None:
        return np.tile(default, (batch, 1))
    array = as_array(value, "`transfer_strength`")
    if array.dtype.kind not in "iuf":
        raise TypeError(f"`transfer_strength` must hold numbers, but is {value!r}")
    if not n_pairs:
        raise ValueError("`transfer_strength` needs an expert, and this model has none")
    if not (np.abs(array) <= np.finfo(np.float32).max).all():  # false for NaN too
        raise ValueError(f"`transfer_strength` must be finite, but is {value!r}")
    if array.shape not in ((), (n_pairs,), (batch, n_pairs)):
        raise ValueError(
            f"`transfer_strength` has shape {list(array.shape)}; it must be one number, [{n_pairs}] (one for each "
            f"pair) or [{batch}, {n_pairs}] (prompts, pairs)"
        )
    return np.broadcast_to(array.astype(np.float64), (batch, n_pairs))
