"""The application that the commands make up."""

from __future__ import annotations

from typing import Annotated

import typer

import rast
from rast.cli.bench import bench
from rast.cli.demo import demo
from rast.cli.generate import generate
from rast.cli.info import info

__all__ = ["app"]

app = typer.Typer(
    help="Decode with logits = base + Σ λ·(expert − antiexpert).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(bench)
app.command()(demo)
app.command()(generate)
app.command()(info)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rast {rast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass
