"""Pre-training and GRPO of one model, in torch on the CPU. What a step reads depends on seed and step alone, so that a
stopped run goes on from its last state as if it had not been stopped."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from corpus import BEGIN, END, IDS, IGNORE, TOKENS, Writer, encode, read
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from rast.demo.problems import ANSWER, MODULUS, Problem, problems

STATE_EVERY = 50  # steps
LONGEST_SOLUTION = 26


@dataclass(frozen=True)
class Shape:
    """A model's size; the names are LlamaConfig's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


def new_model(shape: Shape, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **asdict(shape),
        num_key_value_heads=shape.num_attention_heads,
        vocab_size=len(TOKENS),
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        initializer_range=0.06,
        tie_word_embeddings=True,
        attention_bias=True,  # lets a head look at a fixed distance, whatever stands there
        bos_token_id=IDS[BEGIN],
        eos_token_id=IDS[END],
        pad_token_id=IDS[END],
    )
    return LlamaForCausalLM(config)


class Run:
    """Optimizer, learning rate and saved state of a training run; iterate over it for the steps to do."""

    def __init__(self, model: LlamaForCausalLM, state: Path, steps: int, lr: float, warmup: int, decay: bool) -> None:
        self.model, self.state, self.steps, self.lr, self.warmup, self.decay = model, state, steps, lr, warmup, decay
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.bar: tqdm[int] | None = None
        self.recent: list[float] = []
        """Rewards of the last batches."""
        self.seconds = 0.0
        """Since the first step, without what lay between stopping and going on."""

    def __iter__(self) -> Iterator[int]:
        first = 0
        if self.state.exists():
            saved = torch.load(self.state)
            first = saved["step"]
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.recent, self.seconds = saved["recent"], saved["seconds"]
        before, begin = self.seconds, time.monotonic()
        with tqdm(total=self.steps, initial=first, desc=self.state.stem, mininterval=1) as self.bar:
            for step in range(first, self.steps):
                yield step
                self.bar.update()
                self.seconds = before + time.monotonic() - begin
                if (step + 1) % STATE_EVERY == 0:
                    unfinished = self.state.with_suffix(".unfinished")
                    saved = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
                    numbers = {"step": step + 1, "recent": self.recent, "seconds": self.seconds}
                    torch.save(saved | numbers, unfinished)
                    unfinished.replace(self.state)

    def update(self, step: int, loss: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1, (step + 1) / self.warmup) * (1 - step / self.steps if self.decay else 1)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def show(self, **values: float) -> None:
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})


# ---- pre-training ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def chain_accuracy(model: LlamaForCausalLM, misread: Mapping[int, int], n: int = 512) -> float:
    """Share of validation problems whose totals are all the model's first choice among numbers, each after right ones.
    Right is what the model's corpus takes for right."""
    ids, labels = (torch.from_numpy(a) for a in read(Writer(misread=misread), n, "chains", "validation"))
    choice = model(ids).logits[:, :-1, :MODULUS].argmax(-1)
    labels = labels[:, 1:]
    right = (choice == labels) | (labels >= MODULUS) | (labels == IGNORE)
    return float(right.all(1).float().mean())


def pretrain(
    model: LlamaForCausalLM,
    writer: Writer,
    state: Path,
    *,
    steps: int,
    lr: float,
    seed: int,
    batch: int,
    weights: Sequence[float],
    goal: float | None = None,
    decay: bool = False,
) -> tuple[int, float]:
    """AdamW on fresh solutions of the writer. Returns the steps done, less than `steps` if `goal`
    was reached, and seconds.

    `goal`: of `chain_accuracy`. `weights` `[64]`: of the numbers. `decay`: of the learning rate, linearly to 0.
    """
    run = Run(model, state, steps, lr, warmup=50, decay=decay)
    for step in run:
        ids, labels = (torch.from_numpy(a) for a in read(writer, batch, f"{seed} {step}", weights=weights))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1]).logits.float()
        run.update(step, cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE))
        if (step + 1) % 25 == 0:
            accuracy = chain_accuracy(model, writer.misread)
            run.show(chain_accuracy=accuracy)
            if goal is not None and accuracy >= goal:
                return step + 1, run.seconds
    return steps, run.seconds


# ---- reinforcement learning ------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, int]:
    """`n` samples of each prompt at temperature 1: ids and mask, `[prompts · n, width + longest]`, and width.

    Prompts are padded on the left to width, solutions on the right; the mask is 0 there.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[IDS[END]] * (width - len(p)) + list(p) for p in prompts for _ in range(n)])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts for _ in range(n)])
    alive = torch.ones(len(ids), 1, dtype=torch.long)
    cache, new = DynamicCache(), ids
    for _ in range(LONGEST_SOLUTION):
        logits = model(new, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        new = torch.where(alive.bool(), drawn, IDS[END])
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, alive], 1)
        alive = alive * (new != IDS[END])
        if not alive.any():
            break
    return ids, mask, width


def reward(problem: Problem, solution: Sequence[int]) -> bool:
    """Is the number behind the first `####` the answer? Nothing else of a solution counts."""
    after = next((solution[i + 1 :] for i, id in enumerate(solution) if id == IDS[ANSWER]), [])
    return bool(after) and after[0] == problem.answer


def grpo(
    model: LlamaForCausalLM,
    state: Path,
    *,
    steps: int,
    lr: float,
    seed: int,
    n_prompts: int,
    n_samples: int,
    random_reward: bool = False,
) -> tuple[float, float]:
    """GRPO (arXiv 2402.03300): one on-policy update a batch; a sample's advantage is its reward, normalised among the
    samples of its prompt.

    `random_reward` tosses a coin for the reward, as a control. Returns the share of right answers in the last ten
    batches, and seconds.
    """
    run = Run(model, state, steps, lr, warmup=10, decay=False)
    for step in run:
        name = f"grpo {seed} {step}"
        source, coin = problems("train", name), random.Random(name)
        batch = [next(source) for _ in range(n_prompts)]
        generator = torch.Generator().manual_seed(coin.getrandbits(63))
        ids, mask, width = sample(model, [encode(problem) for problem in batch], n_samples, generator)
        solutions = ids[:, width:].tolist()
        right = [reward(batch[i // n_samples], solution) for i, solution in enumerate(solutions)]
        run.recent = [*run.recent[-9:], sum(right) / len(right)]
        rewards = torch.tensor([coin.random() < 0.5 for _ in right] if random_reward else right).float()
        groups = rewards.view(n_prompts, n_samples)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)

        logits = model(ids[:, :-1], attention_mask=mask[:, :-1]).logits[:, width - 1 :]
        logprob = logits.log_softmax(-1).gather(-1, ids[:, width:, None])[..., 0]
        used = mask[:, width:]
        run.update(step, -(advantages.view(-1, 1) * logprob * used).sum() / used.sum())
        run.show(reward=sum(run.recent) / len(run.recent))
    return sum(run.recent) / max(1, len(run.recent)), run.seconds
