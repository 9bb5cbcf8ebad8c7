"""`edge-spec rm`: remove models from this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from edge_spec.cli.console import print_note
from edge_spec.sizes import format_size


def rm(
    name: Annotated[str, typer.Argument(help="A model, a pair, a hub reference, or a local file (its exports only).")],
) -> None:
    """Remove a model and its exports, or both models of a pair."""
    from edge_spec.errors import ModelNotFoundError
    from edge_spec.store import Store

    store = Store()
    models = store.expand(name)
    missing: list[ModelNotFoundError] = []
    for model in models:
        try:
            freed = store.remove(model)
        except ModelNotFoundError as exc:
            missing.append(exc)
            continue
        what = f"the exports of {model}" if store.is_path(model) else model
        print_note(f"removed {what}: {format_size(freed)} freed")
    if len(missing) == len(models):
        raise missing[0]
