"""The command line: `rast bench`, `rast demo`, `rast generate`, `rast info`. Each command is a file of its own.

Nothing is imported here, so that Ctrl-C is caught from the beginning: importing the rest takes some tenths of a second.
"""

__all__ = ["main"]


def main() -> None:
    """Entry point of the `rast` command. Exit codes: 0 done, 1 failed, 2 bad usage or input, 130 interrupted."""
    try:
        from rast.cli.commands import app

        app(prog_name="rast")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
