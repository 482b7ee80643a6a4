"""What the tests compare rast with: small random HuggingFace models, the three-model loop, HuggingFace's processors."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import PreTrainedModel

TRANSFORMERS_4 = transformers.__version__.startswith("4.")  # a GPU machine's own (make test-gpu)
DTYPE = "torch_dtype" if TRANSFORMERS_4 else "dtype"

FULL = os.environ.get("RAST_TEST_FULL") == "1"

LOGITS_TOLERANCE = 2e-4  # of the logits' scale, float32
NEAR_TIE = 1e-4  # greedy choices may differ where HuggingFace's top two are this close

# Sizes are odd on purpose: no multiple of a vector width, grouped heads from 1 to 4, head_dim not hidden / heads.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": dict(model_type="qwen2", hidden_size=72, num_attention_heads=6, num_key_value_heads=2),
    "qwen2-tied": dict(
        model_type="qwen2",
        hidden_size=56,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=77,
        vocab_size=257,
        tie_word_embeddings=True,
    ),
    "qwen2-window": dict(
        model_type="qwen2",
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
    ),
    "llama": dict(
        model_type="llama",
        hidden_size=160,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=333,
        vocab_size=1031,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "llama-linear": dict(
        model_type="llama",
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "llama-llama3": dict(
        model_type="llama",
        hidden_size=96,
        num_attention_heads=3,
        num_key_value_heads=1,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama-bias": dict(
        model_type="llama",
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=1,
        attention_bias=True,
        mlp_bias=True,
        rms_norm_eps=1e-5,
    ),
    "qwen3": dict(
        model_type="qwen3",
        hidden_size=60,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
    ),
    "qwen3-tied": dict(
        model_type="qwen3",
        hidden_size=40,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
    ),
    "mistral": dict(
        model_type="mistral",
        hidden_size=56,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=20,
        sliding_window=11,
    ),
    "mistral-full": dict(
        model_type="mistral",
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
    ),
}

DEFAULTS: dict[str, Any] = dict(
    num_hidden_layers=3,
    intermediate_size=101,
    vocab_size=311,
    max_position_embeddings=512,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
    tie_word_embeddings=False,
)


def make_config(arch: str, **changes: Any) -> Any:
    """The configuration of one entry of ARCHITECTURES, with changes."""
    options = DEFAULTS | ARCHITECTURES[arch] | changes
    if TRANSFORMERS_4 and "rope_parameters" in options:
        rope = dict(options.pop("rope_parameters"))
        options["rope_theta"] = rope.pop("rope_theta")
        options["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    return transformers.AutoConfig.for_model(**options)


def make_model(config: Any, seed: int, logit_std: float = 3.0) -> PreTrainedModel:
    """A random float32 model with logits of that standard deviation, random biases and random norm weights."""
    model = transformers.AutoModelForCausalLM.from_config(config, **{DTYPE: torch.float32}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif parameter.dim() == 1:  # norms
                parameter.copy_(1 + 0.1 * noise)
            elif name == "lm_head.weight" or (config.tie_word_embeddings and "embed" in name):
                parameter.copy_(logit_std * noise / parameter.shape[1] ** 0.5)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(1.2 * noise / parameter.shape[1] ** 0.5)
    return model


class ModelZoo:
    """Random models as folders on disk, each made once a session."""

    def __init__(self, root: Path):
        self.root = root
        self._made: dict[tuple[Any, ...], Path] = {}

    def folder(
        self,
        arch: str = "qwen2",
        seed: int = 0,
        dtype: str = "float32",
        tokenizer: str | None = None,
        logit_std: float = 3.0,
        **changes: Any,
    ) -> Path:
        """`tokenizer`: None, "plain", or special tokens' names joined by commas (see make_tokenizer)."""
        key = (arch, seed, dtype, tokenizer, logit_std, repr(sorted(changes.items())))
        if key not in self._made:
            path = self.root / f"{arch}-{seed}-{dtype}-{len(self._made)}"
            model = make_model(make_config(arch, **changes), seed, logit_std)
            model.to(getattr(torch, dtype)).save_pretrained(path)
            if tokenizer is not None:
                names = () if tokenizer == "plain" else tuple(tokenizer.split(","))
                make_tokenizer(names).save(str(path / "tokenizer.json"))
            self._made[key] = path
        return self._made[key]

    def trio(self, arch: str = "qwen2", seed: int = 0, **options: Any) -> tuple[Path, Path, Path]:
        """A base and a smaller expert and antiexpert with the same vocabulary."""
        vocab = (DEFAULTS | ARCHITECTURES[arch])["vocab_size"]
        small = dict(num_hidden_layers=2, vocab_size=vocab) | options
        return (
            self.folder(arch, seed, **options),
            self.folder("qwen2-tied", seed + 1000, **small),
            self.folder("qwen2-tied", seed + 2000, **small),
        )


@lru_cache(maxsize=64)
def load_hf(path: Path, dtype: str = "float32") -> PreTrainedModel:
    """The stored weights in HuggingFace's code, computing in `dtype`."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, **{DTYPE: getattr(torch, dtype)}).eval()


def hf_logits(model: PreTrainedModel, ids: NDArray[Any] | Sequence[int]) -> NDArray[np.float32]:
    """Logits [length, vocab] (or [batch, length, vocab] of 2-D ids without padding)."""
    array = np.asarray(ids, dtype=np.int64)
    with torch.inference_mode():
        out = model(torch.from_numpy(np.atleast_2d(array)), use_cache=False).logits.float().numpy()
    return out if array.ndim == 2 else out[0]


@dataclasses.dataclass
class Transfer:
    """The three-model loop's logits: base + sum of strength * (expert - antiexpert), from whole forward passes."""

    base: PreTrainedModel
    pairs: Sequence[tuple[PreTrainedModel, PreTrainedModel | None, float]] = ()

    def __call__(self, ids: NDArray[Any] | Sequence[int]) -> NDArray[np.float32]:
        total = hf_logits(self.base, ids).copy()
        for expert, antiexpert, strength in self.pairs:
            if strength != 0:
                delta = hf_logits(expert, ids)
                if antiexpert is not None:
                    delta = delta - hf_logits(antiexpert, ids)
                total += np.float32(strength) * delta
        return total


def assert_logits_close(
    got: NDArray[Any], want: NDArray[Any], tolerance: float = LOGITS_TOLERANCE, context: object = ""
) -> None:
    """Equal where -inf; elsewhere the largest difference is at most `tolerance` of the logits' scale."""
    assert got.shape == want.shape, (got.shape, want.shape, context)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(got), finite, err_msg=str(context))
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=str(context))
    scale = float(np.abs(want[finite]).max())
    worst = float(np.abs(got[finite] - want[finite]).max())
    assert worst <= tolerance * scale, f"{context}: max difference {worst:g} at scale {scale:g}"


def assert_greedy(logits: Any, sequence: NDArray[Any], prompt_length: int, tie: float = NEAR_TIE) -> None:
    """Every new token of `sequence` is the oracle's first choice after what precedes it, up to near-ties."""
    rows = logits(sequence[:-1])[prompt_length - 1 :]
    chosen = np.take_along_axis(rows, sequence[prompt_length:, None], axis=1)[:, 0]
    behind = rows.max(axis=1) - chosen
    assert behind.max(initial=0) <= tie, f"new token {behind.argmax()}: {behind.max():g} behind the oracle's choice"


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Along the last axis, in float64."""
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl_divergence(p_logits: NDArray[Any], q_logits: NDArray[Any]) -> NDArray[np.float64]:
    """KL(softmax(p) || softmax(q)) along the last axis, nats."""
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q)).sum(axis=-1)


def processed(
    logits: NDArray[Any], ids: NDArray[Any] | Sequence[int], prompt_length: int, **options: Any
) -> NDArray[np.float32]:
    """One row of scores as HuggingFace's processors and warpers make them, in HuggingFace's order."""
    p = transformers.generation.logits_process
    chain = transformers.LogitsProcessorList()
    eos = options.get("eos_token_id")
    eos = None if eos is None else torch.tensor(np.atleast_1d(eos))
    if options.get("repetition_penalty", 1.0) != 1.0:
        chain.append(p.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if options.get("bad_words_ids"):
        chain.append(p.NoBadWordsLogitsProcessor(options["bad_words_ids"], eos))
    if options.get("min_length") and eos is not None:
        chain.append(p.MinLengthLogitsProcessor(options["min_length"], eos))
    if options.get("min_new_tokens") and eos is not None:
        chain.append(p.MinNewTokensLengthLogitsProcessor(prompt_length, options["min_new_tokens"], eos))
    if options.get("suppress_tokens"):
        chain.append(p.SuppressTokensLogitsProcessor(options["suppress_tokens"]))
    if options.get("do_sample"):
        if options.get("temperature", 1.0) != 1.0:
            chain.append(p.TemperatureLogitsWarper(options["temperature"]))
        if options.get("top_k", 50):
            chain.append(p.TopKLogitsWarper(options.get("top_k", 50)))
        if options.get("top_p", 1.0) < 1.0:
            chain.append(p.TopPLogitsWarper(options["top_p"]))
        if options.get("min_p") is not None:
            chain.append(p.MinPLogitsWarper(options["min_p"]))
    row = torch.from_numpy(np.array(logits, dtype=np.float32)[None])
    return chain(torch.from_numpy(np.array(ids, dtype=np.int64)[None]), row)[0].numpy()


def random_prompts(n: int, vocab: int, seed: int = 0, low: int = 1, high: int = 40) -> list[NDArray[np.int64]]:
    """`n` prompts of random lengths low..high."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, rng.integers(low, high + 1)) for _ in range(n)]


CORPUS = (
    "the quick brown fox jumps over the lazy dog. she said that the answer is forty two, and the other one is twelve. "
    "let us think step by step: first add the numbers, then divide the sum by their count. naïve café déjà vu 你好 😀"
)
N_TEXT_TOKENS = 300  # ordinary tokens of make_tokenizer


def make_tokenizer(special: Sequence[str] = ()) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer`: N_TEXT_TOKENS ordinary tokens, then the special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_TEXT_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    assert tokenizer.get_vocab_size() == N_TEXT_TOKENS
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


def edit_json(path: Path, **changes: Any) -> None:
    """Sets top-level keys of a JSON file; a value of ... removes the key."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def load_rast(base: Path, expert: Path | None = None, antiexpert: Path | None = None, **options: Any) -> Any:
    """`RastForCausalLM.from_pretrained` in float32 unless told otherwise."""
    import rast

    options = {"dtype": "float32", "device": "cpu"} | options
    return rast.RastForCausalLM.from_pretrained(
        str(base),
        expert=None if expert is None else str(expert),
        antiexpert=None if antiexpert is None else str(antiexpert),
        **options,
    )


def details(model: Any, prompts: Any, **options: Any) -> Any:
    """`generate` with everything it can return; rows do not end early and padding is 0 unless told otherwise."""
    options = {"pad_token_id": 0, "max_new_tokens": 24} | options
    return model.generate(prompts, return_dict_in_generate=True, output_logits=True, output_scores=True, **options)
