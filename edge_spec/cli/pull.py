"""`edge-spec pull`: bring models to this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from edge_spec.cli.console import byte_progress, print_note


def pull(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A model, a pair, or a file on the hub as owner/repo:file.gguf (default: the default pair)."
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash what is already here again.")] = False,
) -> None:
    """Download and verify a model, or both of a pair. An interrupted pull is resumed by the same command."""
    from edge_spec.store import DEFAULT_PAIR, Store

    store = Store()
    try:
        for model in store.expand(name or DEFAULT_PAIR):
            with byte_progress(model) as (progress, note):
                store.pull(model, progress=progress, note=note, verify=verify)
    except KeyboardInterrupt:
        print_note("stopped; the same command goes on from here")
        raise
