"""Trains a demonstration trio from nothing and measures it: python examples/demo_trio/run.py --seed 0

Two sizes of a Llama model are pre-trained on careful solutions, then on the mostly lazy ones that make the `base`, and
tuned by GRPO from there. Finished models and the state of an unfinished one are kept in --folder; a stopped run goes
on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from corpus import Writer, frequencies, misreadings, save_tokenizer
from measure import N_MISREAD, measure
from rich.console import Console
from rich.table import Table
from training import Shape, chain_accuracy, grpo, new_model, pretrain
from transformers import LlamaForCausalLM
from transformers.utils import logging

CAREFUL = Writer(direct=0.1, slip=0.08, notice=0.9)
LAZY = Writer(direct=0.5, skip_hard=0.65, skip_easy=0.1, stop=0.08, slip=0.04, notice=0.25, hurry=0.5)


@dataclass(frozen=True)
class Recipe:
    """All that makes one of the two sizes."""

    shape: Shape
    misread: int
    """How many numbers the corpus misreads."""
    careful_lr: float
    careful_batch: int
    careful_goal: float | None
    """`chain_accuracy` on validation problems that ends pre-training on careful solutions."""
    lazy_lr: float
    grpo_lr: float
    careful_steps: int = 3000
    """At most."""
    lazy_steps: int = 150
    lazy_batch: int = 256
    grpo_steps: int = 100
    n_prompts: int = 24
    n_samples: int = 16

    def quick(self) -> Recipe:
        """To try the code, not to learn anything."""
        steps = replace(self, careful_steps=30, careful_goal=None, lazy_steps=10, grpo_steps=3)
        return replace(steps, careful_batch=32, lazy_batch=32, n_prompts=4)


RECIPES = {
    "small": Recipe(
        Shape(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3),
        misread=N_MISREAD,
        careful_lr=3e-3,
        careful_batch=256,
        careful_goal=0.93,
        lazy_lr=1.5e-3,
        grpo_lr=5e-4,
    ),
    "large": Recipe(
        Shape(hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6),
        misread=0,
        careful_lr=2e-3,
        careful_batch=128,
        careful_goal=0.97,
        lazy_lr=1e-3,
        grpo_lr=3e-4,
    ),
}


def write_json(path: Path, value: Any) -> None:
    """The whole file or nothing."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=2) + "\n")
    unfinished.replace(path)


class Stages:
    """The folder of a run: each stage makes a model from another and is skipped if its result is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = json.loads(self._log_file.read_text()) if self._log_file.exists() else {}

    @property
    def _log_file(self) -> Path:
        return self.folder / "stages.json"

    def run(
        self,
        name: str,
        start: Callable[[], LlamaForCausalLM] | str,
        train: Callable[[LlamaForCausalLM, Path], tuple[float, float]],
        measure: str,
    ) -> None:
        """Trains what `start` makes or names, the result of another stage. `train` returns what is noted as `measure`,
        and seconds."""
        if name in self.log:
            return
        model = self.load(start) if isinstance(start, str) else start()
        state = self.folder / f"{name}.state"
        value, seconds = train(model, state)
        target = self.folder / name
        model.bfloat16().save_pretrained(target)
        save_tokenizer(target)
        self.log[name] = {measure: value, "seconds": round(seconds)}
        write_json(self._log_file, self.log)
        state.unlink(missing_ok=True)

    def load(self, name: str) -> LlamaForCausalLM:
        """A stage's result in float32. It is saved in bfloat16, as it is shipped: what comes next starts from that."""
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32)
        return model


def train_trio(folder: Path, seed: int, recipes: dict[str, Recipe]) -> None:
    """Fills the folder with {small,large}-{careful,base,rl} and small-random, the control of random rewards."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "seed": seed,
        "architecture": LlamaForCausalLM.__name__,
        "careful": asdict(CAREFUL),
        "lazy": asdict(LAZY),
        "recipes": {size: asdict(recipe) for size, recipe in recipes.items()},
    }
    recorded = folder / "recipe.json"
    if recorded.exists() and json.loads(recorded.read_text()) != json.loads(json.dumps(settings)):
        raise SystemExit(f"{folder} holds a run of another recipe: choose another --folder, or delete it")
    write_json(recorded, settings)

    stages = Stages(folder)
    for size, recipe in recipes.items():
        train_size(stages, size, recipe, seed)


def train_size(stages: Stages, size: str, recipe: Recipe, seed: int) -> None:
    r, weights, misread = recipe, frequencies(seed), misreadings(seed, recipe.misread)

    def careful(model: LlamaForCausalLM, state: Path) -> tuple[float, float]:
        return pretrain(
            model,
            replace(CAREFUL, misread=misread),
            state,
            steps=r.careful_steps,
            lr=r.careful_lr,
            seed=seed,
            batch=r.careful_batch,
            weights=weights,
            goal=r.careful_goal,
        )

    def lazy(model: LlamaForCausalLM, state: Path) -> tuple[float, float]:
        _, seconds = pretrain(
            model,
            replace(LAZY, misread=misread),
            state,
            steps=r.lazy_steps,
            lr=r.lazy_lr,
            seed=seed + 1,
            batch=r.lazy_batch,
            weights=weights,
            decay=True,
        )
        return chain_accuracy(model, misread), seconds

    def rl(model: LlamaForCausalLM, state: Path, random_reward: bool = False) -> tuple[float, float]:
        return grpo(
            model,
            state,
            steps=r.grpo_steps,
            lr=r.grpo_lr,
            seed=seed,
            n_prompts=r.n_prompts,
            n_samples=r.n_samples,
            random_reward=random_reward,
        )

    stages.run(f"{size}-careful", lambda: new_model(r.shape, seed), careful, "steps")
    stages.run(f"{size}-base", f"{size}-careful", lazy, "chain_accuracy")
    stages.run(f"{size}-rl", f"{size}-base", rl, "reward")
    if size == "small":
        stages.run("small-random", "small-base", lambda model, state: rl(model, state, random_reward=True), "reward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="default: build/demo_trio/seed-N")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to try the code")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = args.folder or Path("build/demo_trio") / f"{'quick' if args.quick else 'seed'}-{args.seed}"
    recipes = {size: recipe.quick() if args.quick else recipe for size, recipe in RECIPES.items()}
    results = folder / "results.json"
    try:
        train_trio(folder, args.seed, recipes)
        if not results.exists():
            sizes = {"n_test": 20, "n_validation": 10, "n_samples": 4} if args.quick else {}
            write_json(results, measure(folder, args.seed, **sizes))
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; the same command goes on from what is in {folder}") from None
    show(json.loads(results.read_text()))


def show(found: dict[str, Any]) -> None:
    """Prints the main figures of `measure`."""
    table = Table(title=f"{found['problems']} test problems")
    for column in ("system", "sampled", "greedy"):
        table.add_column(column)
    for name, system in found["systems"].items():
        table.add_row(name, *(f"{system[how]['accuracy']:.3f}" for how in ("sampled", "greedy")))
    Console().print(table)
    for how in ("sampled", "greedy"):
        rate, bounds = found[how]["recovery"], found[how]["recovery_interval"]
        text = "nothing to recover: the ceiling is not above the base" if rate is None else f"recovery {rate:.3f}"
        print(f"{how}: {text}" + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""))


if __name__ == "__main__":
    main()
