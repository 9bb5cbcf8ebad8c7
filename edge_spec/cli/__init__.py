"""The command line. Each module here is one command; what a command needs is imported when it runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from edge_spec.cli.console import all_streams_open, error_boundary

app = typer.Typer(
    name="edge-spec",
    help="Run language models on the CPU, fast: a small draft proposes tokens, the target verifies them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS = ("pull", "models", "rm", "export", "generate", "chat", "estimate", "bench", "doctor", "history")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"edge-spec {version('edge-spec')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


for _name in COMMANDS:
    app.command(_name)(getattr(importlib.import_module(f"edge_spec.cli.{_name}"), _name))


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run a command line (`sys.argv` if None) and exit with its code.

    0 done, 1 the work failed, 2 bad usage, 3 it does not fit the memory, 130 interrupted.
    """
    with all_streams_open(), error_boundary():
        try:
            app(list(args) if args is not None else None, prog_name="edge-spec")
        finally:
            sys.stdout.flush()
    sys.exit(0)
