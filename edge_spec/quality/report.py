"""Figures of a comparison, as a table and as plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edge_spec.quality.distributions import Compared, Expected
from edge_spec.quality.reference import Reference
from edge_spec.sizes import format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One model beside the reference. Shares and changes are fractions; None where it was not measured."""

    name: str
    recipe: str
    weight_bytes: int
    perplexity: float | None = None
    """On the fixed text."""
    perplexity_change: float | None = None
    """Over the reference's, less one."""
    agreement: float | None = None
    """Positions of the reference's answers where this model's likeliest token is the reference's."""
    agreement_error: float | None = None
    """Standard error of that share, as if positions were drawn independently."""
    positions: int = 0
    divergence: float | None = None
    """Mean Kullback-Leibler divergence from the reference there, nats."""
    text_agreement: float | None = None
    text_divergence: float | None = None
    """The same two on the fixed text."""
    passed: int | None = None
    problems: int = 0
    """Programming problems that it solves, of so many."""
    pass_ms: dict[int, float] | None = None
    """Milliseconds of a pass over so many tokens."""
    pass_ratio: dict[int, float] | None = None
    """The same over those of the baseline, each pair in one run."""


def of_reference(name: str, recipe: str, weight_bytes: int, reference: Reference) -> dict[str, Any]:
    """The reference's own row."""
    return {
        "name": name,
        "recipe": recipe,
        "weight_bytes": weight_bytes,
        "perplexity": perplexity(reference.on_text),
        "positions": len(reference.on_answers.actual),
    }


def of_comparison(reference: Reference, on_text: Compared, on_answers: Compared) -> dict[str, Any]:
    """What another model's row says about its likeness to the reference."""
    own, n = perplexity(on_text), len(on_answers.agrees)
    agreement = float(on_answers.agrees.mean())
    return {
        "perplexity": own,
        "perplexity_change": own / perplexity(reference.on_text) - 1,
        "agreement": agreement,
        "agreement_error": math.sqrt(agreement * (1 - agreement) / n),
        "positions": n,
        "divergence": float(on_answers.divergence.mean()),
        "text_agreement": float(on_text.agrees.mean()),
        "text_divergence": float(on_text.divergence.mean()),
    }


def perplexity(scores: Expected | Compared) -> float:
    """Exponential of the mean negative log-probability of the tokens of a text."""
    return float(np.exp(-scores.actual.mean()))


def as_json(rows: Sequence[Figures], about: dict[str, Any]) -> dict[str, Any]:
    """One object: `about` the run, and `models`, the reference first."""
    return {**about, "models": [asdict(row) for row in rows]}


def as_text(rows: Sequence[Figures]) -> str:
    """A table, a model a line, the reference first; columns that nobody has a figure for are left out."""
    columns = {
        "model": [row.name for row in rows],
        "weights": [format_size(row.weight_bytes) for row in rows],
        "perplexity": [_number(row.perplexity, "{:.3f}") for row in rows],
        "change": [_number(row.perplexity_change, "{:+.2%}") for row in rows],
        "agreement": [_agreement(row) for row in rows],
        "KL": [_number(row.divergence, "{:.4f}") for row in rows],
        "text agr.": [_number(row.text_agreement, "{:.2%}") for row in rows],
        "text KL": [_number(row.text_divergence, "{:.4f}") for row in rows],
        "passed": ["–" if row.passed is None else f"{row.passed} of {row.problems}" for row in rows],
    }
    for n in sorted({n for row in rows for n in row.pass_ms or {}}):
        columns[f"T({n}) ms"] = [_pass(row, n) for row in rows]
    shown = {head: cells for head, cells in columns.items() if any(cell != "–" for cell in cells)}
    widths = {head: max(map(len, [head, *cells])) for head, cells in shown.items()}
    first, *others = shown
    lines = ["  ".join([first.ljust(widths[first]), *(head.rjust(widths[head]) for head in others)])]
    for i in range(len(rows)):
        cells = [shown[first][i].ljust(widths[first]), *(shown[head][i].rjust(widths[head]) for head in others)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _agreement(row: Figures) -> str:
    if row.agreement is None:
        return "–"
    return f"{row.agreement:.2%} ± {row.agreement_error or 0:.2%}"


def _pass(row: Figures, n: int) -> str:
    if row.pass_ms is None or n not in row.pass_ms:
        return "–"
    ratio = (row.pass_ratio or {}).get(n)
    return f"{row.pass_ms[n]:.1f}" + (f" ({ratio:.2f} ×)" if ratio is not None else "")
