"""What the commands share: options that name models, loading with progress, errors as one line and an exit code."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

import rast

if TYPE_CHECKING:
    from rast.loading import Progress

Base = Annotated[str, typer.Argument(metavar="BASE", help="Base model: folder, Hugging Face Hub id or .gguf file.")]
Expert = Annotated[str | None, typer.Option(help="Small tuned model.")]
Antiexpert = Annotated[str | None, typer.Option(help="The small model before tuning.")]
Pair = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PAIR",
        help="EXPERT,ANTIEXPERT,STRENGTH; once for each of several pairs. ANTIEXPERT may be empty, STRENGTH left out.",
    ),
]
Strength = Annotated[float, typer.Option("--transfer-strength", "--strength", help="λ of --expert.")]
Device = Annotated[str, typer.Option(help="auto (cuda where it can be used), cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Quantization = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Weights as int8, int4, int4-64 or none (floats); or by role: base=int4,expert=int8. Default: as stored.",
    ),
]
NumThreads = Annotated[int | None, typer.Option(help="Default: one for each core.")]
MaxContext = Annotated[int | None, typer.Option(help="Override the models' context limit.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the base on the Hub.")]
CacheDir = Annotated[str | None, typer.Option(help="Cache of downloads.")]
LocalFilesOnly = Annotated[bool, typer.Option("--local-files-only", help="Download nothing.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", envvar="RAST_DEBUG")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _naming(
    base: Base,
    expert: Expert = None,
    antiexpert: Antiexpert = None,
    pair: Pair = None,
    transfer_strength: Strength = 1.0,
) -> None:
    """The parameters of all commands that load models, before their own."""


def _loading(
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    num_threads: NumThreads = None,
    max_context: MaxContext = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
    debug: Debug = False,
) -> None:
    """Those behind their own. Names and meaning are those of `from_pretrained`."""


Load = Callable[..., "rast.RastForCausalLM"]
"""`from_pretrained` of what the options say, with a progress bar; keyword arguments come over them."""


def loads_models(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function whose first parameter is a `Load`: adds the options that name and load models, but
    for those that the command goes without, and reports errors."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = _parameters(command)[1:]
        parameters = [*_parameters(_naming), *own, *(p for p in _parameters(_loading) if p.name not in without)]

        @functools.wraps(command)
        def run(**options: Any) -> None:
            mine = {parameter.name: options.pop(parameter.name) for parameter in own}
            with report_errors(options.pop("debug")):
                command(functools.partial(_load, options), **mine)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _parameters(function: Callable[..., None]) -> list[inspect.Parameter]:
    """As keyword arguments, which may come in any order."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [p.replace(kind=keyword) for p in inspect.signature(function, eval_str=True).parameters.values()]


def _load(options: dict[str, Any], **changes: Any) -> rast.RastForCausalLM:
    options = options | changes
    pairs, quantization = parse_pairs(options.pop("pair")), parse_quantization(options.pop("quantization"))
    with progress_bar() as progress:
        return rast.RastForCausalLM.from_pretrained(
            options.pop("base"), pairs=pairs, quantization=quantization, progress=progress, **options
        )


def parse_pairs(texts: list[str] | None) -> list[rast.TransferPair] | None:
    """The values of --pair."""
    if not texts:
        return None
    pairs = []
    for text in texts:
        expert, *rest = (part.strip() for part in text.split(","))
        try:
            strength = float(rest[1]) if len(rest) > 1 else 1.0
        except ValueError:
            raise ValueError(f"--pair {text}: the strength {rest[1]!r} is not a number") from None
        if not expert or len(rest) > 2:
            raise ValueError(f"--pair {text}: must be EXPERT,ANTIEXPERT,STRENGTH")
        pairs.append(rast.TransferPair(expert, (rest[0] if rest else "") or None, strength))
    return pairs


def parse_quantization(text: str | None) -> str | dict[str, str] | None:
    """The value of --quantization."""
    if text is None or "=" not in text:
        return text
    by_role: dict[str, str] = {}
    for part in text.split(","):
        role, equals, name = part.partition("=")
        if not equals:
            raise ValueError(f"--quantization {text}: must be a name, or ROLE=NAME,ROLE=NAME")
        by_role[role.strip()] = name.strip()
    return by_role


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """A progress callback that draws bars on a terminal's standard error; None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield show


@contextmanager
def sequence_progress(shown: bool, what: str = "") -> Iterator[Callable[[int, int, int], None] | None]:
    """A progress callback for `generate`, drawn behind `what` on a terminal's standard error; None elsewhere."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    counts = TextColumn("sequences, {task.fields[tokens]} tokens")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), counts, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None, tokens=0)
        drawn = 0.0

        def show(done: int, total: int, tokens: int) -> None:
            nonlocal drawn
            now = time.monotonic()
            if done == total or now > drawn + 0.05:  # drawing takes longer than a step of a small model
                drawn = now
                bars.update(task, completed=done, total=total, tokens=tokens)

        yield show


@contextmanager
def report_errors(debug: bool) -> Iterator[None]:
    """Turns exceptions into `error: …` and an exit code, warnings into `warning: …`; both on standard error."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        typer.echo(f"warning: {message}", err=True)

    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = show
        try:
            yield
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            typer.echo("\nerror: interrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # whoever read the output has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            raise typer.Exit(1) from None
        except Exception as error:
            if debug:
                raise
            text = str(error) or type(error).__name__
            typer.echo(f"error: {' '.join(text.split())}", err=True)
            raise typer.Exit(_exit_code(error)) from None


def _exit_code(error: Exception) -> int:
    bad_input = (ValueError, TypeError, FileNotFoundError, IsADirectoryError, NotImplementedError)
    return 2 if isinstance(error, bad_input) else 1
