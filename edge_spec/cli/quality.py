"""`edge-spec export --report`: how an export compares with its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from edge_spec.cli.console import print_note
from edge_spec.errors import StorageError

if TYPE_CHECKING:
    from edge_spec.store import Store

QUALITY = "quality.json"
"""Where the figures are kept, in the export's folder."""


def report_quality(store: Store, source: Path, export: Path, threads: int | None) -> None:
    """Compare the export of the GGUF `source` with it: a table on standard error, and quality.json."""
    from edge_spec.benchmark.workload import sample_workload
    from edge_spec.cli.progress import ProgressDisplay
    from edge_spec.cores import check_threads
    from edge_spec.quality.contender import Name
    from edge_spec.quality.measure import Plan, measure, reference_for
    from edge_spec.quality.report import as_json, as_text

    plan = Plan(prompts=sample_workload(), threads=check_threads(threads))
    reference = reference_for(source)
    print_note(f"compared with {reference}")
    with ProgressDisplay() as display:
        rows = measure(plan, reference, [Name("onnx", str(export))], store, display.stage)
    print_note(as_text(rows))
    written = json.dumps(as_json(rows, {"reference": str(reference)}), indent=2)
    try:
        (export / QUALITY).write_text(written + "\n", "utf-8")
    except OSError as exc:
        raise StorageError(f"{export / QUALITY} cannot be written: {exc}; make room") from exc
