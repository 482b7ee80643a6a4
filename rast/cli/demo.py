"""`rast demo`: what a transfer does, shown and measured with the tiny models in the package."""

from __future__ import annotations

import json
import sys
import time
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

import rast
from rast.cli import common

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from rich.text import Text

    from rast.demo.problems import Problem
    from rast.display import Span

Systems = dict[str, tuple[rast.RastForCausalLM, dict[str, Any]]]
"""By name: the model, and the options of `generate` that make it this system."""


def demo(
    n_problems: Annotated[int, typer.Option("--problems", metavar="N", help="How many problems to measure on.")] = 500,
    n_shown: Annotated[int, typer.Option("--show", metavar="N", help="How many of them to show first.")] = 3,
    do_sample: Annotated[
        bool, typer.Option("--do-sample/--no-do-sample", help="Draw at temperature 1, or take the best.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of problems and draws.")] = 0,
    transfer_strength: Annotated[float, typer.Option("--transfer-strength", "--strength", help="λ.")] = 1.0,
    num_threads: common.NumThreads = None,
    as_json: common.Json = False,
    debug: common.Debug = False,
) -> None:
    """Solve problems with the tiny models in the package: with the large base alone, with what RL taught the small
    one transferred to it, and with the small and the large model after RL."""
    with common.report_errors(debug):
        if n_problems < 1:
            raise ValueError(f"--problems must be at least 1, not {n_problems}")
        if n_shown < 0:
            raise ValueError(f"--show must not be negative, but is {n_shown}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"--seed must be from 0 to 2**64 - 1, not {seed}")
        from rast.demo.problems import problems

        chosen = list(islice(problems("test", seed), n_problems))
        decoding = {"do_sample": do_sample, "seed": seed}
        systems = _load(transfer_strength, num_threads)
        if as_json:
            typer.echo(json.dumps(_measure(systems, chosen, decoding)))
            return
        _print_introduction(transfer_strength)
        if n_shown:
            _print_solutions(systems, chosen[:n_shown])
        _print_figures(systems, _measure(systems, chosen, decoding), decoding)


def _load(transfer_strength: float, num_threads: int | None) -> Systems:
    from rast.demo import load_demo, paths

    trio = load_demo(transfer_strength=transfer_strength, num_threads=num_threads)
    expert, ceiling = (
        rast.RastForCausalLM.from_pretrained(paths()[name], num_threads=num_threads)
        for name in ("small-rl", "large-rl")
    )
    return {
        "base": (trio, {"transfer_strength": 0.0}),
        "expert": (expert, {}),
        "transfer": (trio, {}),
        "ceiling": (ceiling, {}),
    }


def _measure(systems: Systems, problems: Sequence[Problem], decoding: dict[str, Any]) -> dict[str, Any]:
    """What --json prints."""
    from rast.demo.evaluate import attempt, grade, recovery

    right: dict[str, NDArray[Any]] = {}
    speed: dict[str, float] = {}
    for name, (model, options) in systems.items():
        with common.sequence_progress(True, name) as progress:
            start = time.perf_counter()
            out = attempt(model, problems, progress=progress, **decoding, **options)
            speed[name] = round(int(out.new_lengths.sum()) / (time.perf_counter() - start), 1)
        right[name] = grade(model, problems, out)
    found = recovery(right["base"], right["transfer"], right["ceiling"])
    return {
        "accuracy": {name: float(answers.mean()) for name, answers in right.items()},
        "recovery_rate": found.rate,
        "recovery_rate_interval": found.interval and list(found.interval),
        "problems": len(problems),
        "tokens_per_second": speed,
    }


# ---- as text: rich on a terminal, else plain -------------------------------------------------------------------------


def _print(*lines: Text | str) -> None:
    for line in lines:
        if sys.stdout.isatty():
            from rich.console import Console

            Console(highlight=False).print(line, markup=False)
        else:
            typer.echo(str(line))


def _print_introduction(transfer_strength: float) -> None:
    _print(
        "Sums modulo 64, by tiny language models. RL taught a small one to write down",
        "every total; transfer gives that to a large one that never saw RL:",
        "",
        f"    transfer = large-base + {transfer_strength:g} · (small-rl − small-base)",
        "",
    )


def _print_solutions(systems: Systems, problems: Sequence[Problem]) -> None:
    """Greedy solutions of base and transfer, where a mark is the transfer's work and not chance: side by side on a
    terminal, else one under the other."""
    from rich.text import Text

    from rast.demo.evaluate import attempt, grade
    from rast.display import spans

    columns: dict[str, list[Text]] = {}
    for name in ("base", "transfer"):
        model, options = systems[name]
        assert model.tokenizer is not None  # else `attempt` raises
        out = attempt(model, problems, do_sample=False, **options)
        right = grade(model, problems, out)[:, 0]
        columns[name] = []
        for row, ids in enumerate(out.new_tokens()):
            solution = (
                _marked(spans(model.tokenizer, out, row)) if name == "transfer" else Text(model.tokenizer.decode(ids))
            )
            verdict = Text("right", "green") if right[row] else Text("wrong", "red")
            columns[name].append(Text("  ").join([solution, verdict]))
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table("problem", "base alone", "transfer", show_lines=True)
        for problem, base, transfer in zip(problems, columns["base"], columns["transfer"], strict=True):
            table.add_row(f"{problem.prompt} {problem.answer}", base, transfer)
        Console(highlight=False).print(table)
    else:
        for problem, base, transfer in zip(problems, columns["base"], columns["transfer"], strict=True):
            _print(f"{problem.prompt} {problem.answer}", f"  base alone: {base}", f"  transfer:   {transfer}")
    legend = Text.assemble(
        ("58", "bold green"), ("[12]", "dim"), ": the transfer's 58 where the base's first choice is 12; greedy"
    )
    _print(legend, "")


def _marked(spans: Iterable[Span]) -> Text:
    """The tokens' text; behind those that are not the base's first choice, that choice in brackets."""
    from rich.text import Text

    text = Text()
    for span in spans:
        word = span.text.lstrip()
        text.append(span.text.removesuffix(word))
        text.append(word, "bold green" if span.changed else "")
        if span.changed and word:
            text.append(f"[{span.base_label.strip()}]", "dim")
    return text


def _print_figures(systems: Systems, figures: dict[str, Any], decoding: dict[str, Any]) -> None:
    trio = systems["transfer"][0]
    info = trio.info()
    meaning = {
        "base": "large-base alone",
        "expert": "small-rl alone",
        "transfer": f"large-base + {trio.transfer_strength[0]:g} · (small-rl − small-base)",
        "ceiling": "large-rl alone",
    }
    accuracy = figures["accuracy"]
    drawn = "drawn at temperature 1" if decoding["do_sample"] else "greedy"
    threads = f"{info['num_threads']} thread{'s' if info['num_threads'] > 1 else ''}"
    _print(
        f"{figures['problems']} test problems, {drawn}, seed {decoding['seed']}; "
        f"{info['device']}: {info['isa']}, {threads}",
        "",
        "          accuracy   tokens/s",
        *(
            f"{name:<8}  {_percent(accuracy[name]):>8}   {figures['tokens_per_second'][name]:>8,.0f}   {text}"
            for name, text in meaning.items()
        ),
        "",
        *_recovery(figures),
    )


def _recovery(figures: dict[str, Any]) -> list[str]:
    from rast.demo.evaluate import LEVEL

    accuracy, rate, interval = figures["accuracy"], figures["recovery_rate"], figures["recovery_rate_interval"]
    if rate is None:
        base, ceiling = _percent(accuracy["base"]), _percent(accuracy["ceiling"])
        return [f"recovery rate: none, since the ceiling ({ceiling}) is not above the base ({base})"]
    sure = "none, too few problems that differ"
    if interval:
        sure = f"{_percent(interval[0])} to {_percent(interval[1])}"
    return [
        f"recovery rate, (transfer − base) / (ceiling − base): {_percent(rate)}",
        f"{100 * LEVEL:.0f} % interval, bootstrap over problems: {sure}",
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
