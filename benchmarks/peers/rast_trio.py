"""rast: one model of three roles, without drafts: these would stand or fall with weights that mean something."""

from __future__ import annotations

import time
import warnings
from typing import Any

import rast

from . import Generated, Ids


class RastTrio:
    def __init__(self, files: list[str], threads: int, kv_tokens: int, quantization: str | None = None) -> None:
        self._files = files
        self._threads = threads
        self._options = dict(kv_cache_tokens=kv_tokens, quantization=quantization, device="cpu", dtype="bfloat16")
        self._models: dict[int, Any] = {}

    def _model(self, threads: int | None = None) -> Any:
        """With so many threads. Models share the mapped files."""
        n = threads or self._threads
        if n not in self._models:
            base, expert, antiexpert = self._files
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*token")  # the files have no tokenizer
                self._models[n] = rast.RastForCausalLM.from_pretrained(
                    base, expert=expert, antiexpert=antiexpert, num_threads=n, **self._options
                )
        return self._models[n]

    def facts(self) -> dict[str, Any]:
        info = self._model().info()
        return {
            "version": rast.__version__,
            "isa": info["isa"],
            "weight_bytes": [net["weight_bytes"] for net in info["nets"]],
            "kv_bytes_per_token": [net["kv_bytes_per_token"] for net in info["nets"]],
            "kv_budget_bytes": self._model().cache_info()["kv_bytes"],
        }

    def generate(self, prompts: Ids, tokens: int, roles: int) -> Generated:
        model = self._model()

        def run(n: int) -> tuple[float, Ids]:
            start = time.perf_counter()
            strength = {"transfer_strength": 0.0} if roles == 1 else {}
            out = model.generate(
                prompts, max_new_tokens=n, do_sample=False, eos_token_id=None, num_assistant_tokens=0, **strength
            )
            return time.perf_counter() - start, out[:, prompts.shape[1] :]

        first, ids = run(1)
        if not tokens:
            return Generated(first, 0.0, ids)
        again, _ = run(1)  # the prompts are in the cache by now, for this run and for the next
        whole, ids = run(1 + tokens)
        return Generated(first, max(whole - again, 1e-9), ids)

    def steps(self, prompt: Ids, tokens: int, seconds: float, threads: int) -> list[float]:
        stream = self._model(threads).stream(
            prompt, max_new_tokens=1 + tokens, do_sample=False, eos_token_id=None, num_assistant_tokens=0
        )
        next(stream)
        result = []
        start = last = time.perf_counter()
        for ids in stream:
            now = time.perf_counter()
            result += [(now - last) / len(ids)] * len(ids)
            last = now
            if now - start > seconds:
                break
        stream.close()
        return result

    def workload(self, prompts: Ids, header: int, samples: int, tokens: int, batch: int, seed: int) -> list[float]:
        start = time.perf_counter()
        out = self._model().generate(
            prompts,
            num_return_sequences=samples,
            max_new_tokens=tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            seed=seed,
            eos_token_id=None,
            num_assistant_tokens=0,
        )
        assert out.shape == (len(prompts) * samples, prompts.shape[1] + tokens)
        return [time.perf_counter() - start]
