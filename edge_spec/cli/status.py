"""The status line: what a generation cost and how it came about."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import typer

from edge_spec.sizes import format_size
from edge_spec.types import DrafterStats, FinishReason, GenerationResult

if TYPE_CHECKING:
    from edge_spec.generation import EngineInfo

_SEPARATOR = " · "


def status_line(result: GenerationResult) -> str:
    """Speed, acceptance, memory, models and (unless the model ended its turn) the finish reason, on one line."""
    return _joined([figures(result), setup(result)])


def figures(result: GenerationResult) -> str:
    """Speed, acceptance and memory of one generation, and the finish reason unless it is `stop`."""
    if not result.token_ids:
        return f"nothing was written, finished: {result.finish_reason}"
    return _joined(
        [
            # One pass may write all of a short answer, and then there is no rate to tell.
            f"{result.decode_tokens_per_s:.1f} tokens/s" if result.decode_tokens_per_s else "",
            f"{result.acceptance_rate:.0%} accepted" if result.drafted else "nothing drafted",
            f"{result.tokens_per_step:.2f} tokens/step",
            f"first token {result.ttft_s:.2f} s",
            *(f"{dropped.tokens} tokens dropped ({dropped.policy})" for dropped in result.dropped),
            *(f"memory: {measure}" for measure in result.measures),
            f"peak {format_size(result.peak_rss_bytes)}",
            "" if result.finish_reason is FinishReason.STOP else f"finished: {result.finish_reason}",
        ]
    )


def setup(ran: GenerationResult | EngineInfo) -> str:
    """Models, backend (and the draft's, where it is another), recipe and threads."""
    models = ran.target if ran.draft is None else f"{ran.target} + {ran.draft}"
    threads = f"{ran.threads} thread{'' if ran.threads == 1 else 's'}"
    backend = ran.backend
    if ran.draft_backend not in (None, ran.backend):
        backend += f" + {ran.draft_backend}"
    return _joined([models, backend, ran.recipe or "", threads])


def banner(info: EngineInfo) -> str:
    """What was loaded, for the first line of a chat."""
    return _joined([setup(info), f"window {info.n_ctx} tokens", f"loaded in {info.load_s:.1f} s"])


def drafter_line(name: str, stats: DrafterStats) -> str:
    """What one drafter did."""
    share = f" ({stats.accepted / stats.drafted:.0%})" if stats.drafted else ""
    return f"{name}: {stats.steps} steps, {stats.drafted} drafted, {stats.accepted} accepted{share}"


def remark(text: str) -> None:
    """Print a line to standard error, dim on a terminal (NO_COLOR and dumb terminals respected)."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    typer.secho(text, err=True, dim=True, color=False if plain else None)


def remark_notes(notes: Iterable[str]) -> None:
    """Print each note to standard error."""
    for note in notes:
        remark(f"note: {note}")


def _joined(parts: Iterable[str]) -> str:
    return _SEPARATOR.join(part for part in parts if part)
