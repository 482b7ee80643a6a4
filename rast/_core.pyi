"""The C core. Private: `rast.RastForCausalLM` is the public way to it. Errors of the core arrive as ValueError
(arguments), MemoryError, RuntimeError (`NumericError`: NaN or Inf in logits; device errors) and NotImplementedError
(unsupported)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

class NumericError(RuntimeError):
    """NaN or Inf in a model's logits; the message names the model."""

class NetConfig(TypedDict, total=False):
    """Fields of `rast_config` in csrc/rast.h, same names. Missing optional ones are 0."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    rms_norm_eps: float
    rope_theta: float
    rope_freq: NDArray[np.float32] | None  # [head_dim / 2]
    rope_attention: float
    rope_interleaved: bool
    window: NDArray[np.int32] | None  # [n_layers]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool

class Net(TypedDict, total=False):
    name: str
    config: NetConfig
    # name -> (array, stored dtype "F32" | "BF16" | "F16" | "Q8_0" | "Q4_0" | "Q4_1" | "int8" | "int4" | "int4-64"). The
    # array is C-contiguous, native-endian, and has itemsize 4 (F32) or 2 (uint16 or float16), 1 or 2 dimensions;
    # quantized it is uint8 [rows, bytes of a row's blocks], the last three with rows to a multiple of TILE_ROWS. The
    # CPU uses it in place; the model keeps it alive.
    tensors: Mapping[str, tuple[NDArray[Any], str]]
    dtype: str  # "float32" | "bfloat16" | "float16"
    uncommon: NDArray[np.int32] | None

class NetInfo(TypedDict):
    name: str
    weight_bytes: int
    n_parameters: int
    device_bytes: int  # of the weights' copy on the device; 0: they are used in place
    kv_bytes_per_token: int
    dtype: str
    vocab_size: int
    max_context: int

def memory_read(array: NDArray[Any], /) -> int:
    """Reads a C-contiguous array once, at the memory's speed for one thread and without the GIL. Returns the exclusive
    or of its little-endian 64-bit words, the last one filled up with zeros."""

def cpu_isas() -> list[str]:
    """The instruction sets this machine can run, best last."""

def quantize(array: NDArray[Any], dtype: str, type: str, out: NDArray[np.uint8]) -> None:
    """Quantizes a matrix of dtype "F32", "BF16" or "F16" to "int8", "int4" or "int4-64"; out: [rows, bytes of a row],
    with rows to a multiple of TILE_ROWS."""

def check_device(device: str, index: int = 0, plugin: str | None = None) -> None:
    """Opens and closes a device ("cpu", "cuda"); RuntimeError says what is missing. plugin: the CUDA backend's path."""

class Model:
    def __init__(
        self,
        nets: Sequence[Net],
        *,
        device: str = "cpu",  # or "cuda"
        index: int = 0,
        plugin: str | None = None,  # cuda: path of the backend
        isa: str | None = None,
        num_threads: int = 0,
        n_valid: int = 0,
        pieces: tuple[bytes, NDArray[np.uint32]] | None = None,  # bytes of all tokens, n + 1 offsets
    ) -> None: ...
    @property
    def n_nets(self) -> int: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    def net_info(self) -> list[NetInfo]: ...

class Request(TypedDict, total=False):
    """Fields of `rast_request`, `rast_sampling` and `rast_stop`, flat, same names and defaults as "off"."""

    ids: NDArray[np.int32]  # [n], required
    coef: NDArray[np.float32]  # [n_nets], required
    max_new: int  # required
    tag: int
    seed: int  # 0 .. 2**64 - 1
    first_copy: int
    n_samples: int  # 1
    transfer_start: int
    do_sample: bool  # False
    temperature: float  # 1.0
    top_k: int
    top_p: float  # 1.0
    min_p: float
    repetition_penalty: float  # 1.0
    min_new_tokens: int
    suppress: NDArray[np.int32]
    bad_words: Sequence[NDArray[np.int32]]
    eos: NDArray[np.int32]
    stop_strings: Sequence[bytes]
    max_time: float
    n_draft: int  # -1: as many as give the most tokens a second
    draft_net: int  # 0: drafts come from earlier ids only
    want: int  # WANT_* flags or-ed
    prompt_from: int

class Result(TypedDict):
    """All that one sample gave. Arrays are absent (None) unless wanted."""

    tag: int
    sample: int
    tokens: NDArray[np.int32]  # [n] new tokens
    finish: str  # "eos" | "length" | "stop" | "time" | "cancelled" | "error"
    error: Exception | None  # with finish "error"; not raised by the engine
    steps: int  # in which it got tokens
    drafted: int  # drafts that these checked
    accepted: int  # and that stood: one token more each
    logprob: NDArray[np.float32] | None  # [n]
    base_token: NDArray[np.int32] | None  # [n]
    base_logprob: NDArray[np.float32] | None  # [n]
    kl: NDArray[np.float32] | None  # [n]
    logits: NDArray[np.float32] | None  # [n, n_vocab]
    scores: NDArray[np.float32] | None  # [n, n_vocab]
    parts: NDArray[np.float32] | None  # [n, n_nets, n_vocab]
    prompt: PromptResult | None  # with WANT_PROMPT; sample 0 only

class PromptResult(TypedDict):
    """Prompt positions prompt_from .. n_ids - 1, the same arrays; logprob etc. are about the next prompt token and NaN
    (base_token: still net 0's first choice) at the last position."""

    logprob: NDArray[np.float32] | None
    base_token: NDArray[np.int32] | None
    base_logprob: NDArray[np.float32] | None
    kl: NDArray[np.float32] | None
    logits: NDArray[np.float32] | None
    parts: NDArray[np.float32] | None

class EngineInfo(TypedDict):
    """Fields of `rast_engine_info`."""

    max_rows: int  # of one net in a step
    max_seqs: int  # samples that run at once
    n_blocks: int  # of block_tokens tokens each
    n_free: int  # held by no sample
    n_cached: int  # of the free ones, those that keep a prefix
    block_tokens: int
    kv_bytes: int
    steps: int
    rows: int  # computed, each net counted
    reused: int  # tokens taken from blocks instead of computed
    drafted: int
    accepted: int
    rejected: int  # the first draft of each run that did not stand
    draft_steps: int  # beside `steps`
    step_ns: int
    draft_ns: int
    preempted: int  # times that a sample gave its blocks up
    evicted: int  # blocks of kept prefixes that were used for something else
    device_bytes: int  # of a device with memory of its own, else 0; and of these:
    device_free: int
    device_weights: int
    device_work: int  # buffers of a step
    device_kept: int  # left free beside the KV cache, for the device's own needs and what requests may ask for

# (tag, sample, new token ids [n] int32, finish or None)
OnTokens = Callable[[int, int, NDArray[np.int32], str | None], None]

class Engine:
    """Runs requests on a model. Calls of all engines of a model wait for each other, without the GIL and in order of
    arrival; a call from inside another (`on_tokens`) is a RuntimeError, except `busy` and `info`."""

    def __init__(self, model: Model, *, kv_bytes: int = 0, max_rows: int = 0, max_seqs: int = 0) -> None: ...
    def run(self, requests: Sequence[Request], on_tokens: OnTokens | None = None) -> list[Result]:
        """Adds the requests, steps until all their samples ended, with the GIL released; results in the order of
        requests and samples. Without `on_tokens` it takes the GIL only now and then, to let signals in: an exception
        there (Ctrl-C) or in `on_tokens` ends these requests and is raised. What sessions have submitted goes on too."""
    @property
    def busy(self) -> bool: ...
    def info(self) -> EngineInfo: ...
    def _set_drafter(self, drafter: Callable[[int, int, NDArray[np.int32], int], Sequence[int]] | None) -> None:
        """For tests: drafter(tag, sample, ids, k) -> up to k guesses."""

class Session:
    """The requests of one caller. When it dies, they end and their blocks are free, at once or after the step that is
    running. `with session:` is a RuntimeError if another `with` block has it."""

    def __init__(self, engine: Engine) -> None: ...
    def submit(self, request: Request) -> int:
        """Queues a request. Returns its id."""
    def collect(self, seconds: float, append: Callable[[Result], object]) -> int:
        """Steps until a sample has ended, at most about so long; not at all if there are any. Calls `append` with those
        that have ended, and returns how many have not. An exception (Ctrl-C, memory) leaves everything as it is."""
    def step(self) -> list[Result]:
        """What each sample got since it was last taken (finish "" while it runs), after one step if none got anything.
        Empty also where a prompt's chunk gave no token yet."""
    def cancel(self, id: int) -> None:
        """Ends all samples of a request; their results have finish "cancelled"."""
    def stop(self, *, forget: bool = False) -> None:
        """Ends all that runs, without results and without waiting; with `forget`, what has ended is dropped too."""
    def __enter__(self) -> Session: ...
    def __exit__(self, *_: object) -> None: ...

WANT_LOGPROBS: int
WANT_STATS: int
WANT_LOGITS: int
WANT_SCORES: int
WANT_COMPONENTS: int
WANT_PROMPT: int
TILE_ROWS: int  # rows of a tile of quantized weights
