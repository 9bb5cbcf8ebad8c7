"""`edge-spec history`: the answers that are kept for later drafts."""

from __future__ import annotations

from typing import Annotated

import typer

from edge_spec.cli.console import print_note
from edge_spec.errors import UsageError
from edge_spec.sizes import format_size


def history(
    stat: Annotated[bool, typer.Option("--stat", help="Say what is kept and where (the default).")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Delete all of it.")] = False,
) -> None:
    """Show or delete the answers that `--history` keeps on this machine."""
    from edge_spec.answer_file import AnswerFile
    from edge_spec.store import Store

    if stat and clear:
        raise UsageError("--stat and --clear exclude each other")
    folder = Store().history_dir
    files = [AnswerFile(path) for path in sorted(folder.glob("*.ids"))]
    if clear:
        for file in files:
            file.clear()
        print_note("the history is empty" if files else "there was no history")
        return
    answers = [ids for file in files for ids in file.read()]
    size = sum(file.path.stat().st_size for file in files)
    print(f"{len(answers)} answers, {sum(map(len, answers))} tokens, {format_size(size)} in {folder}")
