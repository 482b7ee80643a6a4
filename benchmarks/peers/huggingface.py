"""The usual loop over three HuggingFace models: a cached forward each, logits added up in float32."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
import transformers

from . import COEFFICIENTS, Generated, Ids


class HuggingFaceTrio:
    def __init__(self, files: list[str], threads: int) -> None:
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._models = [load(folder, dtype=torch.bfloat16).eval() for folder in files]

    def facts(self) -> dict[str, Any]:
        return {
            "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "weight_bytes": [sum(p.numel() * p.element_size() for p in m.parameters()) for m in self._models],
        }

    def _step(self, ids: torch.Tensor, caches: list[Any], roles: int) -> torch.Tensor:
        """Combined logits [batch, vocab] after `ids` [batch, n], which join the caches."""
        total: torch.Tensor | None = None
        for i, model in enumerate(self._models[:roles]):
            out = model(ids, past_key_values=caches[i], use_cache=True, logits_to_keep=1)
            caches[i] = out.past_key_values
            part = out.logits[:, -1].float()
            total = part if total is None else total.add_(part, alpha=COEFFICIENTS[i])
        assert total is not None
        return total

    @torch.inference_mode()
    def generate(self, prompts: Ids, tokens: int, roles: int) -> Generated:
        caches: list[Any] = [None] * roles
        start = time.perf_counter()
        ids = [self._step(torch.from_numpy(prompts), caches, roles).argmax(-1, keepdim=True)]
        first = time.perf_counter()
        for _ in range(tokens):
            ids.append(self._step(ids[-1], caches, roles).argmax(-1, keepdim=True))
        end = time.perf_counter()
        return Generated(first - start, end - first, torch.cat(ids, 1).numpy())

    @torch.inference_mode()
    def steps(self, prompt: Ids, tokens: int, seconds: float, threads: int) -> list[float]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        caches: list[Any] = [None] * len(self._models)
        ids = self._step(torch.from_numpy(prompt[None]), caches, len(caches)).argmax(-1, keepdim=True)
        result: list[float] = []
        while len(result) < tokens and sum(result) < seconds:
            start = time.perf_counter()
            ids = self._step(ids, caches, len(caches)).argmax(-1, keepdim=True)
            result.append(time.perf_counter() - start)
        torch.set_num_threads(before)
        return result

    @torch.inference_mode()
    def workload(self, prompts: Ids, header: int, samples: int, tokens: int, batch: int, seed: int) -> list[float]:
        """Header and prompts are computed once each; their caches are repeated for what follows them."""
        torch.manual_seed(seed)
        roles, group = len(self._models), batch // samples
        times = []
        start = time.perf_counter()
        heads: list[Any] = [None] * roles
        self._step(torch.from_numpy(prompts[:1, :header]), heads, roles)
        for i in range(0, len(prompts), group):
            tails = torch.from_numpy(prompts[i : i + group, header:])
            caches = copy.deepcopy(heads)
            for cache in caches:
                cache.batch_repeat_interleave(len(tails))
            logits = self._step(tails, caches, roles).repeat_interleave(samples, 0)
            for cache in caches:
                cache.batch_repeat_interleave(samples)
            for left in range(tokens, 0, -1):
                ids = torch.multinomial(logits.softmax(-1), 1)
                times.append(time.perf_counter() - start)
                if left > 1:
                    logits = self._step(ids, caches, roles)
        return times
