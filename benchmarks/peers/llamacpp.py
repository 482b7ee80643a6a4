"""llama.cpp through llama-cpp-python: a context for each model, their logits added up in NumPy.

The low-level interface, without copies that it could do without: one `llama_batch` for all contexts, filled through
NumPy views, and logits added up in the buffer that the base's context wrote.
"""

from __future__ import annotations

import ctypes
import time
from importlib.metadata import version
from typing import Any

import llama_cpp as lib
import numpy as np
from numpy.typing import NDArray

from . import COEFFICIENTS, Generated, Ids

UBATCH = 512  # llama.cpp's default: rows computed at once
CELL_BLOCK = 256  # its caches are padded to this


@lib.llama_log_callback
def _quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    if level == 4:  # errors
        print(text.decode(errors="replace"), end="")


class _Batch:
    """Tokens for `llama_decode`: the C struct and NumPy views of it."""

    def __init__(self, capacity: int) -> None:
        self.c = lib.llama_batch_init(capacity, 0, 1)
        view = np.ctypeslib.as_array
        self.token: NDArray[np.int32] = view(self.c.token, (capacity,))
        self.position: NDArray[np.int32] = view(self.c.pos, (capacity,))
        self.wanted: NDArray[np.int8] = view(self.c.logits, (capacity,))
        view(self.c.n_seq_id, (capacity,))[:] = 1

    def fill(self, ids: Ids, begin: int, sequences: list[int]) -> None:
        """ids [n, length] at positions from `begin`, for n sequences; logits are wanted of each one's last."""
        n, length = ids.shape
        size = n * length
        self.c.n_tokens = size
        self.token[:size] = ids.reshape(-1)
        self.position[:size] = np.tile(np.arange(begin, begin + length), n)
        self.wanted[:size] = 0
        self.wanted[length - 1 : size : length] = 1
        for i in range(size):
            self.c.seq_id[i][0] = sequences[i // length]

    def advance(self, ids: NDArray[Any]) -> None:
        """The next token, ids [n], of the n sequences of a batch of single tokens."""
        self.token[: len(ids)] = ids
        self.position[: len(ids)] += 1


class LlamaCppTrio:
    def __init__(self, files: list[str], threads: int, kv_unified: bool = True) -> None:
        lib.llama_log_set(_quiet, ctypes.c_void_p())
        lib.llama_backend_init()
        self._threads = threads
        self._unified = kv_unified
        params = lib.llama_model_default_params()
        self._models = []
        for file in files:
            model = lib.llama_model_load_from_file(file.encode(), params)
            if not model:
                raise ValueError(f"llama.cpp cannot load {file}")
            self._models.append(model)
        self._vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._models[0]))
        self._contexts: list[Any] = []
        self._opened = (0, 0, 0)
        self._batch = _Batch(1)

    def facts(self) -> dict[str, Any]:
        features = lib.llama_print_system_info().decode()
        return {
            "version": f"llama-cpp-python {version('llama_cpp_python')}",
            "features": [f.split("=")[0].strip(" :") for f in features.split("|") if f.strip().endswith("= 1")],
            "weight_bytes": [lib.llama_model_size(model) for model in self._models],
        }

    def _open(self, sequences: int, length: int, cells: int) -> None:
        """Contexts for so many sequences of at most `length` tokens, `cells` tokens together; empty ones.

        With a unified cache, common prefixes take their cells once, and each token looks at the cells of all sequences;
        else each sequence has cells of its own.
        """
        if (sequences, length, cells) != self._opened:
            self.close()
            params = lib.llama_context_default_params()
            own = -(-length // CELL_BLOCK) * CELL_BLOCK
            params.n_ctx = -(-cells // CELL_BLOCK) * CELL_BLOCK if self._unified else sequences * own
            params.n_batch = max(UBATCH, sequences)
            params.n_ubatch = UBATCH
            params.n_seq_max = sequences
            params.n_threads = params.n_threads_batch = self._threads
            params.kv_unified = self._unified
            params.no_perf = True
            for model in self._models:
                context = lib.llama_init_from_model(model, params)
                if not context:
                    raise MemoryError("llama.cpp cannot make a context")
                self._contexts.append(context)
            self._opened = (sequences, length, cells)
            self._batch = _Batch(params.n_batch)
        for context in self._contexts:
            lib.llama_memory_clear(lib.llama_get_memory(context), False)

    def close(self) -> None:
        for context in self._contexts:
            lib.llama_free(context)
        self._contexts.clear()
        lib.llama_batch_free(self._batch.c)
        self._batch = _Batch(1)
        self._opened = (0, 0, 0)

    def _step(self, rows: int, roles: int) -> NDArray[np.float32]:
        """Runs the batch; combined logits [rows, vocab], in the base's own buffer."""
        logits = []
        for context in self._contexts[:roles]:
            status = lib.llama_decode(context, self._batch.c)
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
            pointer = lib.llama_get_logits(context)
            logits.append(np.ctypeslib.as_array(pointer, (rows, self._vocab)))
        total = logits[0]
        for part, coefficient in zip(logits[1:], COEFFICIENTS[1:], strict=False):
            if coefficient > 0:
                np.add(total, part, out=total)
            else:
                np.subtract(total, part, out=total)
        return total

    def _prefill(self, ids: Ids, begin: int, sequences: list[int], roles: int) -> NDArray[np.float32]:
        """Combined logits after ids [n, length]; whole sequences at a time, as many as a batch takes."""
        group = max(1, UBATCH // ids.shape[1])
        rows = []
        for i in range(0, len(ids), group):
            part = ids[i : i + group]
            if part.shape[1] > UBATCH:
                raise ValueError(f"prompts of at most {UBATCH} tokens")
            self._batch.fill(part, begin, sequences[i : i + group])
            step = self._step(len(part), roles)
            rows.append(step if len(ids) <= group else step.copy())  # the next call overwrites it
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def generate(self, prompts: Ids, tokens: int, roles: int) -> Generated:
        n, length = prompts.shape
        self._open(n, length + tokens, n * (length + tokens))
        sequences = list(range(n))
        start = time.perf_counter()
        ids = [self._prefill(prompts, 0, sequences, roles).argmax(-1)]
        first = time.perf_counter()
        if tokens:
            self._batch.fill(ids[0][:, None], length, sequences)
        for i in range(tokens):
            if i:
                self._batch.advance(ids[-1])
            ids.append(self._step(n, roles).argmax(-1))
        end = time.perf_counter()
        return Generated(first - start, end - first, np.stack(ids, 1))

    def steps(self, prompt: Ids, tokens: int, seconds: float, threads: int) -> list[float]:
        self._open(1, len(prompt) + tokens, len(prompt) + tokens)
        for context in self._contexts:
            lib.llama_set_n_threads(context, threads, threads)
        roles = len(self._contexts)
        token = self._prefill(prompt[None], 0, [0], roles).argmax(-1)
        self._batch.fill(token[:, None], len(prompt), [0])
        result: list[float] = []
        while len(result) < tokens and sum(result) < seconds:
            start = time.perf_counter()
            token = self._step(1, roles).argmax(-1)
            self._batch.advance(token)
            result.append(time.perf_counter() - start)
        for context in self._contexts:
            lib.llama_set_n_threads(context, self._threads, self._threads)
        return result

    def workload(self, prompts: Ids, header: int, samples: int, tokens: int, batch: int, seed: int) -> list[float]:
        """The header is computed once a group, each prompt once; their cells are shared (or copied, if not unified)."""
        rng = np.random.default_rng(seed)
        length, group, roles = prompts.shape[1], batch // samples, len(self._models)
        times = []
        start = time.perf_counter()
        for i in range(0, len(prompts), group):
            part = prompts[i : i + group]
            n = len(part) * samples
            own = length - header + samples * tokens
            self._open(group * samples, length + tokens, header + group * own)
            firsts = list(range(0, n, samples))  # the sequence of each prompt that computes it
            self._prefill(part[:1, :header], 0, firsts[:1], roles)
            self._copy(firsts[0], firsts[1:], roles)
            logits = np.repeat(self._prefill(part[:, header:], header, firsts, roles), samples, 0)
            for first in firsts:
                self._copy(first, list(range(first + 1, first + samples)), roles)
            ids = draw(logits, rng)
            times.append(time.perf_counter() - start)
            self._batch.fill(ids[:, None], length, list(range(n)))
            for _ in range(tokens - 1):
                ids = draw(self._step(n, roles), rng)
                self._batch.advance(ids)
                times.append(time.perf_counter() - start)
        return times

    def _copy(self, source: int, targets: list[int], roles: int) -> None:
        for context in self._contexts[:roles]:
            memory = lib.llama_get_memory(context)
            for target in targets:
                lib.llama_memory_seq_cp(memory, source, target, -1, -1)


def draw(logits: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int64]:
    """A token of each row of logits [n, vocab] at temperature 1; overwrites them. Row by row, in the cache."""
    ids = np.empty(len(logits), np.int64)
    uniform = rng.random(len(logits))
    for i, row in enumerate(logits):
        row -= row.max()
        np.exp(row, out=row)
        sums = np.cumsum(row, out=row)
        ids[i] = min(np.searchsorted(sums, uniform[i] * sums[-1], side="right"), len(row) - 1)
    return ids
