"""The table of a grid, and its figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from memory_bench.foretell import MIB, Compared

_HEAD = ("cell", "", "measured", "estimate", "error", "error %", "band", "loading", "mapped", "cache and weights")


def as_text(results: Sequence[Compared]) -> str:
    """A Markdown table and its figures. Sizes in MiB; a negative error is an estimate that was too low."""
    rows = [_row(result) for result in results]
    widths = [max(len(row[column]) for row in (_HEAD, *rows)) for column in range(len(_HEAD))]
    lines = []
    for row in (_HEAD, tuple("-" * width for width in widths), *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0], cells[-1] = row[0].ljust(widths[0]), row[-1].ljust(widths[-1])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_summary(results)])


def _row(result: Compared) -> tuple[str, ...]:
    foretold = result.foretold
    return (
        result.cell.name,
        "held out" if result.cell.is_held_out else "",
        f"{result.peak_bytes / MIB:.1f}",
        f"{foretold.peak_bytes / MIB:.1f}",
        f"{result.error_bytes / MIB:+.1f}",
        f"{100 * result.error:+.1f}",
        f"{foretold.band_bytes / MIB:.0f}",
        f"{result.load_error_bytes / MIB:+.1f}",
        f"{result.measured.peak.mapped_bytes / MIB:.0f}",
        _allocations(result),
    )


def _allocations(result: Compared) -> str:
    """What the backend allocated, and whether it is what was foretold."""
    told = ", ".join(f"{name} {found / MIB:.2f}" for name, (found, _) in result.allocated().items())
    differences = result.differences()
    if not differences:
        return f"{told}: equal"
    return f"{told}: {', '.join(f'{name} {n_bytes:+d} B' for name, n_bytes in differences.items())}"


def figures(results: Sequence[Compared]) -> dict[str, Any]:
    """What a grid comes to. Errors are absolute, but for the worst underestimate (0 where there is none)."""
    shares = [abs(result.error) for result in results]
    sizes = [abs(result.error_bytes) for result in results]
    loading = [result.load_error_bytes for result in results]
    within = [abs(r.error) <= 0.07 or abs(r.error_bytes) <= 32 * MIB for r in results]
    return {
        "cells": len(results),
        "median_error": statistics.median(shares),
        "p95_error": _p95(shares),
        "p95_error_bytes": _p95(sizes),
        "within_7_percent_or_32_mib": sum(within) / len(within),
        "worst_underestimate_bytes": -min(0, *(result.error_bytes for result in results), 0),
        "worst_load_underestimate_bytes": -min(0, *loading, 0),
        "worst_load_overestimate_bytes": max(0, *loading, 0),
        "beyond_band": [result.cell.name for result in results if result.beyond_band],
        "cache_and_weights_differ": [result.cell.name for result in results if result.differences()],
    }


def _parts(results: Sequence[Compared]) -> dict[str, list[Compared]]:
    """All cells, and kinds of them; only kinds that there are."""
    runs = [result for result in results if result.cell.recipe is None]
    kinds = {
        "Runs": runs,
        "Runs that constants were fitted to": [result for result in runs if not result.cell.is_held_out],
        "Runs held out": [result for result in runs if result.cell.is_held_out],
        "Runs of the pair and the small model": [r for r in runs if not r.cell.model.startswith("random-")],
        "Exports": [result for result in results if result.cell.recipe is not None],
    }
    return {name: part for name, part in kinds.items() if part}


def _summary(results: Sequence[Compared]) -> list[str]:
    lines = []
    for name, part in _parts(results).items():
        found = figures(part)
        lines.append(
            f"{name}: {found['cells']} cells. Error of the peak: median {100 * found['median_error']:.1f} %, 95th "
            f"percentile {100 * found['p95_error']:.1f} % or {found['p95_error_bytes'] / MIB:.1f} MiB; "
            f"{100 * found['within_7_percent_or_32_mib']:.0f} % of the cells within 7 % or 32 MiB. Worst underestimate "
            f"{found['worst_underestimate_bytes'] / MIB:.1f} MiB; beyond the band: "
            f"{', '.join(found['beyond_band']) or 'none'}. While loading: at most "
            f"{found['worst_load_underestimate_bytes'] / MIB:.1f} MiB too low, "
            f"{found['worst_load_overestimate_bytes'] / MIB:.1f} too high."
        )
    differ = figures(results)["cache_and_weights_differ"]
    return [*lines, f"Cache or weights not equal: {', '.join(differ) or 'none'}."]


def _p95(values: Sequence[float]) -> float:
    """The smallest value that 95 % of them do not exceed."""
    ranked = sorted(values)
    return ranked[-(-95 * len(ranked) // 100) - 1]


def as_json(results: Sequence[Compared]) -> dict[str, Any]:
    """Everything, for other programs."""
    return {
        "figures": {name: figures(part) for name, part in _parts(results).items()},
        "cells": [_as_object(result) for result in results],
    }


def _as_object(result: Compared) -> dict[str, Any]:
    estimate, measured = result.foretold.estimate, result.measured
    return {
        "cell": asdict(result.cell),
        "name": result.cell.name,
        "held_out": result.cell.is_held_out,
        "peak_anonymous_bytes": result.peak_bytes,
        "estimated_bytes": result.foretold.peak_bytes,
        "stages": {name: asdict(stage) for name, stage in measured.stages.items()},
        "resident_bytes": measured.resident,
        "facts": measured.facts,
        "estimate": {
            "peak_bytes": estimate.peak_bytes,
            "committed_bytes": estimate.committed_bytes,
            "load_peak_bytes": estimate.load_peak_bytes,
            "working_set_bytes": estimate.working_set_bytes,
            "band_bytes": estimate.band_bytes,
            "reserved_bytes": estimate.reserved_bytes,
            "components": [asdict(part) for part in estimate.components],
        },
        "error_bytes": result.error_bytes,
        "error": result.error,
        "allocated": result.allocated(),
        "differences": result.differences(),
    }
