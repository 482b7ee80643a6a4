"""The model that users hold: a base and its transfer pairs, loaded once and run as one."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rast import _core, devices
from rast.batching import GenerateIterator, Request
from rast.generation import GenerateKwargs, GenerationOptions, transfer_strengths
from rast.inputs import Ids, Mask, Prompts, check_callable, read_integer, read_prompts
from rast.outputs import ForwardOutput, GenerateOutput, ScoreOutput

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from rast.loading import LoadedNet, Progress, Quantization, Reconciled, Tokenizer
    from rast.streaming import Streamer

__all__ = ["RastForCausalLM", "Source", "TransferPair"]

Source = str | os.PathLike[str]
"""A local folder, a Hugging Face Hub id or a .gguf file."""


@dataclass(frozen=True)
class TransferPair:
    """Adds strength · (expert − antiexpert) to the base's logits; without an antiexpert, strength · expert."""

    expert: Source
    antiexpert: Source | None = None
    strength: float = 1.0


@dataclass
class _Net:
    """A distinct model and all the roles that it plays."""

    loaded: LoadedNet
    max_context: int
    roles: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{' and '.join(self.roles)} ({self.loaded.source})"

    @property
    def config(self) -> _core.NetConfig:
        config = self.loaded.config.copy()
        config["max_context"] = self.max_context
        return config

    @property
    def vocab_size(self) -> int:
        size: int = self.loaded.config["vocab_size"]
        return size


class RastForCausalLM:
    """Decodes with logits = base + Σ λᵢ · (expertᵢ − antiexpertᵢ). Made by `from_pretrained`.

    Token ids go in and come out as NumPy arrays; `tokenizer` turns text into ids and back. Methods may be called from
    several threads; they take turns.

    Attributes:
        tokenizer: the base's tokenizer, or None if it came without one.
        generation_config: defaults of `generate`: the base's generation_config.json, with the end-of-sequence ids of
            base and experts. Changes to it take effect.
        load_warnings: what was warned of while loading.
    """

    tokenizer: Tokenizer | None
    generation_config: dict[str, Any]
    load_warnings: list[str]

    def __init__(
        self,
        nets: list[_Net],
        pairs: list[tuple[int, int | None]],
        strengths: NDArray[np.float64],
        *,
        device: devices.Device,
        num_threads: int | None,
        max_context: int | None,
        kv_cache_tokens: int | None,
        max_memory: int | str | None,
        max_batch_rows: int | None,
        max_batch_size: int | None,
    ) -> None:
        """Use `from_pretrained`. `pairs` holds indices into `nets`, whose first is the base."""
        from rast.loading import reconcile

        others = [(net.loaded, _main_role(net)) for net in nets[1:]]
        agreed: Reconciled = reconcile(nets[0].loaded, others)
        self._nets = nets
        self._pairs = pairs
        self._strengths = strengths
        self._roles = np.zeros((len(pairs), len(nets)))  # coefficients = base + strengths @ roles
        for i, (expert, antiexpert) in enumerate(pairs):
            self._roles[i, expert] += 1
            if antiexpert is not None:
                self._roles[i, antiexpert] -= 1
        self._max_context = max_context
        self._uncommon = [len(ids) for ids in agreed.uncommon]
        core_nets: list[_core.Net] = [
            {
                "name": net.name,
                "config": net.config,
                "tensors": net.loaded.tensors,
                "dtype": net.loaded.dtype,
                "uncommon": uncommon,
            }
            for net, uncommon in zip(nets, agreed.uncommon, strict=True)
        ]
        self._device = device
        self._core_model = _core.Model(
            core_nets,
            device=device.kind,
            index=device.index,
            plugin=device.plugin,
            num_threads=num_threads or 0,
            n_valid=agreed.n_valid,
            pieces=agreed.pieces,
        )
        self._budget = {
            "kv_bytes": _kv_bytes(self._core_model.net_info(), nets, kv_cache_tokens, max_memory),
            "max_rows": max_batch_rows or 0,
            "max_seqs": max_batch_size or 0,
        }
        self._engine = self._new_engine()
        self._process = os.getpid()
        self._can_stop_at_strings = agreed.pieces is not None
        self.tokenizer = nets[0].loaded.tokenizer
        self.generation_config = {
            **nets[0].loaded.generation_config,
            "eos_token_id": agreed.eos_token_id or None,
            "pad_token_id": agreed.pad_token_id,
        }
        self.load_warnings = [text for net in nets for text in net.loaded.warnings] + agreed.warnings

    @classmethod
    def from_pretrained(
        cls,
        base: Source,
        *,
        expert: Source | None = None,
        antiexpert: Source | None = None,
        transfer_strength: float = 1.0,
        pairs: Sequence[TransferPair] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        quantization: Quantization = None,
        num_threads: int | None = None,
        max_context: int | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        kv_cache_tokens: int | None = None,
        max_memory: int | str | None = None,
        max_batch_rows: int | None = None,
        max_batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Loads a base and its transfer pairs; on the CPU weights stay in the mapped files, unless `quantization`
        is given.

        Args:
            base: local folder, Hugging Face Hub id or .gguf file of the model that is steered.
            expert: the small tuned model.
            antiexpert: the same small model before tuning; without it the expert's logits are added as they are.
            transfer_strength: λ, any finite number.
            pairs: instead of the three before, for several pairs; with neither, plain generation.
            device: "cpu", "cuda", "cuda:N" (a device number), or "auto": cuda if it can be used, else the CPU.
            dtype: "float32", "bfloat16", "float16" or "auto" (as stored): rounding of the inputs of matrix products.
            quantization: what the matrices, embedding and head among them, are made into at load: "int8" (groups of 32
                with a scale), "int4" (groups of 32 with scale and minimum), "int4-64" (groups of 64) or "none" (floats,
                whatever the file holds); or a mapping from roles to these, {"base": "int4", "expert": "int8"}, where
                "expert" means that of every pair and "expert 2" that of the second. None, also for a role: as stored;
                Q8_0, Q4_0 and Q4_1 of a GGUF file then stay in place unless dtype is "float32". Products with quantized
                weights round their inputs once more, to int8 in groups of 32; all else is as `dtype` says. For the
                CPU: CUDA takes none of these but "none", and turns a file's quantized tensors into floats of `dtype` on
                the device.
            num_threads: None: one for each core that this process may use.
            max_context: overrides the context limit of all models.
            revision: of the base on the Hub (branch, tag or commit); the other models use their default branch.
            cache_dir, token, local_files_only: as in huggingface_hub.
            kv_cache_tokens: tokens, over all sequences, whose keys and values fit into memory at once, rounded up to
                blocks of 32. What has ended stays while there is room, for prompts that begin alike; when there is no
                room, sequences wait, or are computed again. None: what max_memory leaves, else half of the memory
                that is free now (CUDA: 90 % of the device's).
            max_memory: bytes, or a string such as "2GiB" or "500mb": limits the keys and values of all models together
                with the weights that had to be copied or converted (mapped files can be dropped and do not count; on
                CUDA all weights are copies).
                The buffers of one step come on top. Memory is used as it is needed, up to the limit.
            max_batch_rows: most tokens that one step runs through a model (prompt chunks); None: 512.
            max_batch_size: most sequences that run at once, more wait their turn; None: 64.
            progress: called while loading, see `rast.loading.Progress`.

        Raises:
            ValueError: arguments, files or tokenizers that do not fit together; the message names them.
            FileNotFoundError: no such model.
            NotImplementedError: an architecture, rope type or weight format that is not supported.
            RuntimeError: the device is not available.
        """
        from rast.loading import load_net, quantization_by_role

        num_threads = _limit(num_threads, "num_threads", 4096)
        max_context = _limit(max_context, "max_context", 2**28)
        max_batch_rows = _limit(max_batch_rows, "max_batch_rows", 2**20)
        max_batch_size = _limit(max_batch_size, "max_batch_size", 2**20)
        kv_cache_tokens = _limit(kv_cache_tokens, "kv_cache_tokens", None)
        check_callable(progress, "progress")
        wanted = _pairs(expert, antiexpert, transfer_strength, pairs)
        numbers = [f" {i + 1}" if len(wanted) > 1 else "" for i in range(len(wanted))]
        roles = [f"expert{n}" for n in numbers] + [f"antiexpert{n}" for n in numbers]
        quantizations = quantization_by_role(quantization, ["base", *roles])
        strengths = np.zeros(len(wanted))
        _check_source(base, "base")
        for i, (pair, number) in enumerate(zip(wanted, numbers, strict=True)):
            _check_source(pair.expert, f"expert{number}")
            if pair.antiexpert is not None:
                _check_source(pair.antiexpert, f"antiexpert{number}")
            strengths[i] = _strength(pair.strength, f"strength{number}" if pairs else "transfer_strength")
        chosen = devices.choose(device, quantized=any(q not in (None, "none") for q in quantizations.values()))

        nets: list[_Net] = []
        by_source: dict[tuple[str, str | None, str | None], int] = {}
        by_key: dict[Hashable, int] = {}

        def load(source: Source, role: str, revision: str | None = None) -> int:
            asked = (os.fspath(source), revision, quantizations[role])
            if asked not in by_source:
                loaded = load_net(
                    source,
                    name=role,
                    dtype=dtype,
                    revision=revision,
                    cache_dir=cache_dir,
                    token=token,
                    local_files_only=local_files_only,
                    quantization=quantizations[role],
                    progress=progress,
                )
                index = by_source[asked] = by_key.setdefault(loaded.key(), len(nets))
                if index == len(nets):
                    nets.append(_Net(loaded, max_context or loaded.config["max_context"]))
            nets[by_source[asked]].roles.append(role)
            return by_source[asked]

        load(base, "base", revision)
        indices: list[tuple[int, int | None]] = []
        for pair, number in zip(wanted, numbers, strict=True):
            e = load(pair.expert, f"expert{number}")
            a = None if pair.antiexpert is None else load(pair.antiexpert, f"antiexpert{number}")
            indices.append((e, a))
        model = cls(
            nets,
            indices,
            strengths,
            device=chosen,
            num_threads=num_threads,
            max_context=max_context,
            kv_cache_tokens=kv_cache_tokens,
            max_memory=max_memory,
            max_batch_rows=max_batch_rows,
            max_batch_size=max_batch_size,
        )
        for text in model.load_warnings:
            warnings.warn(text, UserWarning, stacklevel=2)
        return model

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """The base's dimensions; a copy."""
        return {"architecture": self._nets[0].loaded.architecture, **self._nets[0].loaded.config}

    @property
    def roles(self) -> dict[str, str]:
        """Role → source, e.g. {"base": "Qwen/Qwen2.5-7B", "expert": …}."""
        return {role: str(net.loaded.source) for net in self._nets for role in net.roles}

    @property
    def transfer_strength(self) -> NDArray[np.float64]:
        """`[pairs]` default λ of each pair; a copy."""
        return self._strengths.copy()

    @property
    def vocab_size(self) -> int:
        """Width of the logits: rows of the base's embedding."""
        return self._core_model.n_vocab

    @property
    def max_context(self) -> int:
        """Most tokens of a sequence with all models active."""
        return min(net.max_context for net in self._nets)

    def info(self) -> dict[str, Any]:
        """All that `rast info` shows, as plain Python values."""
        return {
            "device": self._device.name,
            "device_reason": self._device.reason,
            "isa": self._core_model.isa,
            "num_threads": self._core_model.num_threads,
            "vocab_size": self.vocab_size,
            "max_context": self.max_context,
            "nets": [
                {
                    "roles": list(net.roles),
                    "source": str(net.loaded.source),
                    "path": str(net.loaded.path),
                    "architecture": net.loaded.architecture,
                    "dtype": core["dtype"],
                    "n_parameters": core["n_parameters"],
                    "weight_bytes": core["weight_bytes"],
                    "weight_types": net.loaded.weight_types(),
                    "kv_bytes_per_token": core["kv_bytes_per_token"],
                    "vocab_size": core["vocab_size"],
                    "max_context": core["max_context"],
                    "n_uncommon_ids": uncommon,
                }
                for net, core, uncommon in zip(self._nets, self._core_model.net_info(), self._uncommon, strict=True)
            ],
            "transfer_strength": self._strengths.tolist(),
            "warnings": list(self.load_warnings),
        }

    def cache_info(self) -> dict[str, int]:
        """State and counters of the KV cache that all calls share.

        `n_blocks` of `block_tokens` tokens, `kv_bytes` altogether; `n_free`: held by no sequence; `n_cached`: of these,
        the ones that keep a prefix. `steps`; `rows`: tokens computed, each model counted; `reused`: tokens the base did
        not compute again; `preempted`: times that a sequence had to make room; `evicted`: kept blocks given up.
        `drafted`: drafts that were checked; `accepted`: those that stood; `rejected`: first ones of a run that did not;
        `draft_steps`: passes of the expert that drew them; `step_ns`, `draft_ns`: what these and the steps have taken.
        On CUDA, in bytes: `device_bytes`, the device's memory; `device_free`; `device_weights`; `device_work`, buffers
        of a step; `device_kept`, what was left free beside the KV cache for CUDA itself and for what requests ask for.
        """
        info: Mapping[str, Any] = self._shared_engine().info()
        return dict(info)

    def __repr__(self) -> str:
        info = self.info()
        lines = [
            f"  {' and '.join(net['roles'])}: {net['source']} "
            f"({net['architecture']}, {net['n_parameters'] / 1e6:,.1f} M parameters, {net['dtype']}, "
            f"weights {next(iter(net['weight_types']))})"
            for net in info["nets"]
        ]
        if self._pairs:
            lines.append(f"  transfer_strength: {', '.join(f'{s:g}' for s in self._strengths)}")
        threads = f", {info['num_threads']} threads" if self._device.kind == "cpu" else ""
        lines.append(f"  {info['device']}: {info['isa']}{threads}")
        return "RastForCausalLM(\n" + "\n".join(lines) + "\n)"

    # ---- decoding --------------------------------------------------------------------------------------------------

    def generate(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        *,
        generation_config: Any = None,
        streamer: Streamer | None = None,
        progress: Callable[[int, int, int], None] | None = None,
        **options: Unpack[GenerateKwargs],
    ) -> Any:
        """Continues prompts. Option names, meaning and defaults are those of transformers' GenerationConfig, overlaid
        by the base's generation_config.json.

        Args:
            input_ids: integers `[batch, length]` or `[length]`, or a list of 1-D arrays of different lengths.
            attention_mask: the shape of input_ids; zeros mark padding at the left or right end of a row.
            generation_config: a dict or transformers.GenerationConfig, under the options given here.
            streamer: gets new tokens as they come (`put`, `end`); for one sequence.
            progress: called after each step with (finished sequences, all sequences, new tokens so far).
            **options: see `rast.generation.GenerateKwargs`. Not in transformers: `transfer_strength` (one number, one
                for each pair, or `[batch, pairs]`; a pair with 0 is not run), `transfer_start` (new tokens drawn from
                the base alone before the pairs join) and `seed` (None: from the system).

        Returns:
            int64 `[batch · num_return_sequences, width + T]`: left-padded prompt, new tokens, `pad_token_id`. With
            `return_dict_in_generate=True` a `GenerateOutput`.

        Raises:
            TypeError: an option that is not supported, a wrong type.
            ValueError: an empty prompt, ids without a row in an active model, too many tokens for its context, options
                out of range.
            RuntimeError: NaN or Inf in a model's logits (`rast._core.NumericError`).
        """
        prompts = read_prompts(input_ids, attention_mask)
        opts = self._options(options, generation_config)
        requests = self._requests(prompts, opts, _wanted(opts))
        check_callable(progress, "progress")
        on_tokens = None
        if streamer is not None:
            if len(prompts) * opts.num_return_sequences != 1:
                raise ValueError("a streamer takes one sequence at a time: one prompt, num_return_sequences=1")
            if not (hasattr(streamer, "put") and hasattr(streamer, "end")):
                raise TypeError(f"streamer must have put() and end(), not be {streamer!r}")
            streamer.put(prompts.ids[0][None].astype(np.int64))
        if streamer is not None or progress is not None:
            on_tokens = _listener(streamer, progress, len(prompts) * opts.num_return_sequences)

        results = self._run(requests, on_tokens)
        if streamer is not None:
            streamer.end()
        return _generated(prompts, opts, results, self.vocab_size, self.tokenizer)

    def stream(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        *,
        generation_config: Any = None,
        **options: Unpack[GenerateKwargs],
    ) -> Iterator[Any]:
        """Like `generate`, as an iterator over new tokens while they are drawn.

        Bad arguments raise here, not at the first step, and so does a request that the KV cache has no room for.
        Leaving the loop early (or `close()`, or no reference any more) ends the generation.
        Other calls may run between the steps.

        Yields:
            For one sequence, its new ids: int64 `[n]`, n ≥ 1. For several, `(row, ids)`, where row counts as in the
            output of `generate`.
        """
        prompts = read_prompts(input_ids, attention_mask)
        opts = self._options(options, generation_config)
        if opts.return_dict_in_generate:
            raise ValueError("stream() yields token ids only: return_dict_in_generate does not apply")
        session = _core.Session(self._shared_engine())
        for request in self._requests(prompts, opts, want=0):
            session.submit(request)
        return self._steps(session, len(prompts), opts.num_return_sequences)

    def generate_iter(
        self, requests: Iterable[Request | Mapping[str, Any]], *, generation_config: Any = None, **options: Any
    ) -> GenerateIterator:
        """Continues any number of prompts, and yields each sequence when it ends, in any order.

        Requests join as others end, so the model always runs as many sequences as it can. Each has options of its own;
        a bad one fails alone. A sequence gets the same tokens as from `generate` with its prompt, options and seed.

        Example:
            requests = (rast.Request(ids, tag=i, options={"seed": i}) for i, ids in enumerate(prompts))
            for sample in model.generate_iter(requests, max_new_tokens=256, do_sample=True):
                print(sample.tag, model.tokenizer.decode(sample.new_tokens))

        Args:
            requests: `rast.Request` objects, or dicts with `input_ids`, perhaps `tag` and `copy`, and options. May be
                a generator: it is asked for the next one when there is place. What is no list or other sequence is
                read by a thread of its own, so that it may wait, for input or for samples of earlier requests, while
                samples come out.
            generation_config: as in `generate`.
            **options: of all requests that do not say otherwise; see `rast.generation.GenerateKwargs`. Without a seed
                every request gets one from the system.

        Returns:
            An iterator over `rast.Sample`, with `cancel(tag)` and `close()`. An exception of `requests` comes out when
            all samples that have ended are out; then, and after Ctrl-C, nothing runs any more, and the model is free.

        Raises:
            TypeError, ValueError: of `requests` itself, and of options that are wrong whatever a request says.
        """
        self._check_process()
        if isinstance(requests, Mapping | Request | str | bytes | np.ndarray) or not isinstance(requests, Iterable):
            raise TypeError(f"requests must be an iterable of requests, not {type(requests).__name__}")
        shared = self._options(cast(GenerateKwargs, options), generation_config, together=False)
        self._coefficients(shared.transfer_strength, 1)
        return GenerateIterator(self, requests, generation_config, options)

    @overload
    def forward(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        *,
        return_components: Literal[False] = False,
        logits_to_keep: int = 0,
        transfer_strength: ArrayLike | None = None,
    ) -> NDArray[np.float32]: ...

    @overload
    def forward(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        *,
        return_components: Literal[True],
        logits_to_keep: int = 0,
        transfer_strength: ArrayLike | None = None,
    ) -> ForwardOutput: ...

    def forward(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        *,
        return_components: bool = False,
        logits_to_keep: int = 0,
        transfer_strength: ArrayLike | None = None,
    ) -> NDArray[np.float32] | ForwardOutput:
        """Combined logits of the next token at every position.

        Args:
            input_ids, attention_mask: as in `generate`.
            return_components: also return each model's own logits.
            logits_to_keep: only the last so many tokens of each prompt, aligned at their end; 0: all.
            transfer_strength: as in `generate`.

        Returns:
            float32 `[batch, length, vocab]`, laid out as the input with zeros at padding; a `ForwardOutput` with
            `return_components`. −inf where an id cannot be drawn (an active model has no row for it, or it is beyond
            the tokenizer).

        Raises:
            As `generate`.
        """
        logits_to_keep = read_integer(logits_to_keep, "logits_to_keep", 0)
        prompts = read_prompts(input_ids, attention_mask)
        want = _core.WANT_LOGITS | (_core.WANT_COMPONENTS if return_components else 0)
        results = self._evaluate(prompts, transfer_strength, want, logits_to_keep or prompts.width)

        if logits_to_keep:
            width = min(logits_to_keep, prompts.longest)
            ends = [width] * len(prompts)
        else:
            width = prompts.width
            ends = [start + len(ids) for start, ids in zip(prompts.start, prompts.ids, strict=True)]
        logits = np.zeros((len(prompts), width, self.vocab_size), dtype=np.float32)
        parts = np.zeros((len(self._nets) if return_components else 0, *logits.shape), dtype=np.float32)
        for row, (result, end) in enumerate(zip(results, ends, strict=True)):
            start = end - len(result["logits"])
            logits[row, start:end] = result.pop("logits")  # the rows are large: keep one copy
            if return_components:
                parts[:, row, start:end] = result.pop("parts").swapaxes(0, 1)
        if not return_components:
            return logits
        return ForwardOutput(
            logits=logits,
            base=parts[0],
            experts=[parts[e] for e, _ in self._pairs],
            antiexperts=[None if a is None else parts[a] for _, a in self._pairs],
        )

    def score(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        *,
        transfer_strength: ArrayLike | None = None,
    ) -> ScoreOutput:
        """Log-probability of each token under combined model and base, and how far they differ. Logits are not kept.

        Args and errors are those of `forward`.
        """
        prompts = read_prompts(input_ids, attention_mask)
        results = self._evaluate(prompts, transfer_strength, _core.WANT_LOGPROBS | _core.WANT_STATS, prompts.width)
        shape = (len(prompts), prompts.width)
        out = ScoreOutput(
            logprob=np.full(shape, np.nan, dtype=np.float32),
            base_logprob=np.full(shape, np.nan, dtype=np.float32),
            base_token=np.full(shape, -1, dtype=np.int64),
            kl=np.full(shape, np.nan, dtype=np.float32),
        )
        for row, result in enumerate(results):
            first = prompts.start[row]
            scored = slice(first + 1, first + len(prompts.ids[row]))  # what position i says is about token i + 1
            for name in ("logprob", "base_logprob", "base_token", "kl"):
                getattr(out, name)[row, scored] = result[name][:-1]
        return out

    # ---- requests and results --------------------------------------------------------------------------------------

    def _options(self, call: GenerateKwargs, generation_config: Any, together: bool = True) -> GenerationOptions:
        return GenerationOptions.resolve(
            call,
            generation_config,
            self.generation_config,
            n_vocab=self.vocab_size,
            has_tokenizer=self._can_stop_at_strings,
            together=together,
            stacklevel=4,
        )

    def _coefficients(self, strength: Any, batch: int) -> NDArray[np.float32]:
        """`[batch, nets]` factors of the nets' logits in the sum."""
        coefficients = transfer_strengths(strength, self._strengths, batch) @ self._roles
        coefficients[:, 0] += 1
        return coefficients.astype(np.float32)

    def _draft_net(self, coefficients: NDArray[np.float32]) -> int:
        """The net that drafts: the first expert that is part of the sum, and not the base itself; 0: none."""
        return next((int(expert) for expert, _ in self._pairs if expert and coefficients[expert]), 0)

    def _active(self, coefficients: NDArray[Any]) -> list[_Net]:
        """Nets that run: the base, and those with a part in the sum."""
        return self._nets[:1] + [net for net, c in zip(self._nets[1:], coefficients[1:], strict=True) if c]

    def _check(self, prompts: Prompts, coefficients: NDArray[np.float32], n_new: int) -> None:
        """Every id has a row in every active net, and every sequence fits into its context."""
        for row, ids in enumerate(prompts.ids):
            for net in self._active(coefficients[row]):
                if ids.max() >= net.vocab_size:
                    at = int(np.argmax(ids >= net.vocab_size))
                    raise ValueError(
                        f"input_ids: {ids[at]} (row {row}, position {prompts.start[row] + at}) has no row in "
                        f"{net.name}, whose vocabulary has {net.vocab_size} ids"
                    )
                if len(ids) + n_new > net.max_context:
                    new = f" and {n_new} new ones" if n_new else ""
                    limit = "max_context" if self._max_context else f"the context of {net.name}"
                    where = f"row {row}: " if len(prompts) > 1 else ""
                    raise ValueError(f"{where}{len(ids)} tokens{new} exceed {limit}, {net.max_context} tokens")

    def _requests(self, prompts: Prompts, opts: GenerationOptions, want: int) -> list[_core.Request]:
        coefficients = self._coefficients(opts.transfer_strength, len(prompts))
        context = min(net.max_context for net in self._active(np.any(coefficients, axis=0)))
        shared = opts.request(prompts.longest, context)
        self._check(prompts, coefficients, shared["max_new"])
        copies: defaultdict[bytes, int] = defaultdict(int)  # equal prompts in one call draw from different streams
        requests: list[_core.Request] = []
        for row, ids in enumerate(prompts.ids):
            copy = copies[ids.tobytes()]
            copies[ids.tobytes()] += opts.num_return_sequences
            requests.append(
                {
                    **shared,
                    "ids": ids,
                    "coef": coefficients[row],
                    "draft_net": self._draft_net(coefficients[row]),
                    "tag": row,
                    "first_copy": copy,
                    "want": want,
                }
            )
        return requests

    def _read_request(
        self, request: Request, config: Any, options: Mapping[str, Any]
    ) -> tuple[_core.Request, int | None]:
        """A request of `generate_iter` for the core, and its seed if somebody chose one."""
        prompts = read_prompts(request.input_ids)
        if len(prompts) != 1:
            raise ValueError(f"a request has one prompt, and this one has {len(prompts)}")
        if not isinstance(request.options, Mapping):
            raise TypeError(f"a request's options must be a dict, not {request.options!r}")
        if request.copy is not None:
            read_integer(request.copy, "copy", 0, 2**32 - 1)
        opts = self._options(cast(GenerateKwargs, {**options, **request.options}), config)
        (made,) = self._requests(prompts, opts, _wanted(opts))
        return made, opts.seed if "seed" in opts.asked else None

    def _evaluate(self, prompts: Prompts, strength: Any, want: int, keep: int) -> list[dict[str, Any]]:
        """What the prompts' last `keep` positions say, one dict of arrays for each prompt."""
        coefficients = self._coefficients(strength, len(prompts))
        self._check(prompts, coefficients, 0)
        requests: list[_core.Request] = [
            {
                "ids": ids,
                "coef": coefficients[row],
                "max_new": 0,
                "tag": row,
                "want": want | _core.WANT_PROMPT,
                "prompt_from": max(0, len(ids) - keep),
            }
            for row, ids in enumerate(prompts.ids)
        ]
        return [dict(result["prompt"] or {}) for result in self._run(requests)]

    def _check_process(self) -> None:
        """A lock that another thread held during fork() would never open in the child."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "this model was loaded before fork(), and its threads stayed behind: load it in the child"
            )

    def __reduce__(self) -> Any:
        raise TypeError("a model cannot be pickled or copied: call from_pretrained again where it is needed")

    def _shared_engine(self) -> _core.Engine:
        """The engine of all calls. They wait for each other inside it."""
        self._check_process()
        return self._engine

    def _new_engine(self) -> _core.Engine:
        return _core.Engine(self._core_model, **self._budget)

    def _run(self, requests: list[_core.Request], on_tokens: _core.OnTokens | None = None) -> list[_core.Result]:
        results = self._shared_engine().run(requests, on_tokens)
        for result in results:
            _raise_error(result, len(requests))
        return results

    def _steps(self, session: _core.Session, n_prompts: int, n_samples: int) -> Iterator[Any]:
        """The loop of `stream`; other calls can run in between."""
        n_left = n_prompts * n_samples
        one = n_left == 1
        try:
            while n_left:
                self._check_process()
                for result in session.step():
                    _raise_error(result, n_prompts)
                    n_left -= result["finish"] != ""
                    if len(result["tokens"]):
                        ids = result["tokens"].astype(np.int64)
                        yield ids if one else (result["tag"] * n_samples + result["sample"], ids)
        finally:
            session.stop(forget=True)


def _listener(
    streamer: Streamer | None, progress: Callable[[int, int, int], None] | None, n_sequences: int
) -> _core.OnTokens:
    """What the engine calls with each sample's new tokens."""
    n_done = n_tokens = 0

    def on_tokens(tag: int, sample: int, ids: NDArray[np.int32], finish: str | None) -> None:
        nonlocal n_done, n_tokens
        n_done += finish is not None
        n_tokens += len(ids)
        if streamer is not None and len(ids):
            streamer.put(ids.astype(np.int64))
        if progress is not None:
            progress(n_done, n_sequences, n_tokens)

    return on_tokens


def _check_source(source: Any, role: str) -> None:
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{role} must be a folder, a Hugging Face Hub id or a .gguf file, not {source!r:.80}")


def _strength(value: Any, name: str) -> float:
    """λ of one pair."""
    if np.ndim(value) or isinstance(value, str | bytes) or value is None:
        raise TypeError(f"{name} must be a number, not {value!r:.80}")
    return float(transfer_strengths(value, np.zeros(1), 1)[0, 0])


def _pairs(
    expert: Source | None, antiexpert: Source | None, strength: float, pairs: Sequence[TransferPair] | None
) -> list[TransferPair]:
    """The pairs that the arguments of `from_pretrained` name."""
    given = _strength(strength, "transfer_strength") != 1
    if pairs is not None:
        if expert is not None or antiexpert is not None or given:
            raise ValueError("give either pairs or expert, antiexpert and transfer_strength, not both")
        if isinstance(pairs, TransferPair) or not isinstance(pairs, Sequence):
            raise TypeError(f"pairs must be a list of TransferPair objects, not {pairs!r}")
        for pair in pairs:
            if not isinstance(pair, TransferPair):
                raise TypeError(f"pairs must hold TransferPair objects, not {pair!r}")
        return list(pairs)
    if expert is None and antiexpert is not None:
        raise ValueError("an antiexpert needs an expert")
    if expert is None and given:
        raise ValueError("transfer_strength needs an expert")
    return [] if expert is None else [TransferPair(expert, antiexpert, strength)]


def _wanted(opts: GenerationOptions) -> int:
    """What the core shall tell of each new token."""
    if not opts.return_dict_in_generate:
        return 0
    want = _core.WANT_LOGPROBS | _core.WANT_STATS
    return want | (_core.WANT_SCORES if opts.output_scores else 0) | (_core.WANT_LOGITS if opts.output_logits else 0)


def _limit(value: Any, name: str, most: int | None = 2**31 - 1) -> int | None:
    """A limit that from_pretrained was given; most None: checked later."""
    if value is None:
        return None
    return read_integer(value, name, 1, sys.maxsize if most is None else most)


_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{kind}b": base ** (power + 1)
    for power, prefix in enumerate("kmgt")
    for kind, base in (("", 1000), ("i", 1024))
}


def _bytes(max_memory: int | str) -> int:
    """The number of bytes that `max_memory` means."""
    wrong = f'max_memory must be a number of bytes or a string such as "2GiB", not {max_memory!r:.80}'
    if isinstance(max_memory, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", max_memory, re.ASCII | re.IGNORECASE)
        if not match or match[2].lower() not in _UNITS:
            raise ValueError(wrong)
        max_memory = int(Fraction(match[1]) * _UNITS[match[2].lower()])
    try:
        return read_integer(max_memory, "max_memory", 1, sys.maxsize)
    except TypeError:
        raise TypeError(wrong) from None


def _kv_bytes(
    info: list[_core.NetInfo], nets: list[_Net], kv_cache_tokens: int | None, max_memory: int | str | None
) -> int:
    """Bytes for keys and values; 0: the core's default."""
    from rast.loading import is_mapped

    block = 32 * sum(net["kv_bytes_per_token"] for net in info)
    wanted = 0
    if kv_cache_tokens is not None:
        read_integer(kv_cache_tokens, "kv_cache_tokens", 1, sys.maxsize // block * 32)
        wanted = -(-kv_cache_tokens // 32) * block
    if max_memory is None:
        return wanted
    arrays = {id(part): part for net in nets for tensor in net.loaded.tensors.values() for part in tensor}
    copied = sum(net["device_bytes"] for net in info)
    if not copied:
        copied = sum(part.nbytes for part in arrays.values() if isinstance(part, np.ndarray) and not is_mapped(part))
    room = _bytes(max_memory) - copied
    if room < max(wanted, block):
        raise ValueError(
            f"max_memory = {max_memory!r} is too small: copied weights take {copied} bytes, and keys and values of "
            f"{kv_cache_tokens or 32} tokens {wanted or block}: {copied + (wanted or block)} bytes would be enough"
        )
    return wanted or room


def _main_role(net: _Net) -> Literal["expert", "antiexpert"]:
    """For what depends on the role, such as whose end-of-sequence ids count: an expert anywhere is an expert."""
    return "expert" if any(role.startswith("expert") for role in net.roles) else "antiexpert"


def _raise_error(result: _core.Result, n_prompts: int) -> None:
    error = result["error"]
    if error is not None:
        raise error if n_prompts == 1 else type(error)(f"row {result['tag']}: {error}")


def _generated(
    prompts: Prompts,
    opts: GenerationOptions,
    results: list[_core.Result],
    n_vocab: int,
    tokenizer: Tokenizer | None,
) -> NDArray[np.int64] | GenerateOutput:
    """Results of all samples as padded arrays."""
    width = prompts.longest
    lengths = np.array([len(result["tokens"]) for result in results], dtype=np.int64)
    shape = (len(results), int(lengths.max()))
    sequences = np.full((shape[0], width + shape[1]), opts.pad_token_id, dtype=np.int64)
    for row, result in enumerate(results):
        prompt = prompts.ids[result["tag"]]
        sequences[row, width - len(prompt) : width] = prompt
        sequences[row, width : width + lengths[row]] = result["tokens"]
    if not opts.return_dict_in_generate:
        return sequences

    def padded(name: Literal["logprob", "base_logprob", "kl", "base_token", "scores", "logits"]) -> NDArray[Any]:
        tail = (n_vocab,) if name in ("scores", "logits") else ()
        fill, dtype = (-1, np.int64) if name == "base_token" else (np.nan, np.float32)
        out = np.full(shape + tail, fill, dtype=dtype)
        for row, result in enumerate(results):
            out[row, : lengths[row]] = result[name]
            result[name] = None  # the rows are large: keep one copy
        return out

    def steps(name: Literal["scores", "logits"]) -> tuple[NDArray[np.float32], ...]:
        return tuple(padded(name).swapaxes(0, 1))

    output = GenerateOutput(
        sequences=sequences,
        new_lengths=lengths,
        finish_reason=[result["finish"] for result in results],
        logprob=padded("logprob"),
        base_logprob=padded("base_logprob"),
        base_token=padded("base_token"),
        transfer_kl=padded("kl"),
        seed=opts.seed,
        scores=steps("scores") if opts.output_scores else None,
        logits=steps("logits") if opts.output_logits else None,
        steps=np.array([result["steps"] for result in results]),
        drafted=np.array([result["drafted"] for result in results]),
        accepted=np.array([result["accepted"] for result in results]),
    )
    output.tokenizer = tokenizer
    return output
