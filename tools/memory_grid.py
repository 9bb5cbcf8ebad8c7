"""Compare the memory estimate with what runs really hold.

    python tools/memory_grid.py --backends onnx,llama --only smollm2

Each cell of the grid (model, backend, context, batch, rows, cache type, draft) is a process of its own, which loads,
reads a prompt that fills most of the window and writes until the window is full. Its memory is sampled every 2 ms from
outside and at every step from inside, and the kernel's mark of the peak, reset after each stage, bounds what sampling
could miss. Measured is the peak of anonymous memory; mapped files are told apart, since the system may drop them.

With `--keep FILE` measurements are kept in a file, and those in it are not made again: a run can be interrupted, and a
changed estimate compared at once.

With `--limits` each cell (a chosen few without `--only`) runs under RLIMIT_DATA, and in a control group where one can
be made, set to the estimate and its band: it has to finish. At 0.85 and 0.6 of that it may be refused by a typed error,
or do with less and say so.

Random models are written on first use, beside the store's exports. Linux only.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this tree, and the writer of its tests' models

from memory_bench import limits
from memory_bench.cell import Cell, full_grid, limited_grid
from memory_bench.foretell import Compared, foretell
from memory_bench.measure import Measured, measure
from memory_bench.random_models import MODELS, write_all
from memory_bench.report import as_json, as_text

from edge_spec.errors import EdgeSpecError
from edge_spec.store import Store

BACKENDS = ("onnx", "native", "llama", "openvino")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid; 0 if every cell ran, 1 if one failed, 2 for bad usage."""
    options = _parser().parse_args(arguments)
    cells = _chosen(options)
    if options.list or not cells:
        print("\n".join(cell.name for cell in cells) or "memory_grid: no such cell", file=sys.stderr)
        return 0 if cells else 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cell's process must not outlive this one
    store, kept = Store(), _Kept(options.keep)
    if options.kept:
        cells = [cell for cell in cells if kept.get(cell) is not None]
    paths = write_all(store.exports_dir / "random-models", {cell.model for cell in cells})
    if options.limits:
        return _run_limits(cells, store, paths, json_wanted=options.json)
    results, failed = [], 0
    try:
        for number, cell in enumerate(cells, 1):
            _note(f"{number}/{len(cells)} {cell.name}")
            python = options.openvino_python if cell.backend == "openvino" else sys.executable
            try:
                results.append(_compare(cell, store, paths, kept, python))
            except (EdgeSpecError, CellError) as exc:
                failed += 1
                _note(f"  failed: {exc}")
    except KeyboardInterrupt:
        _note("interrupted; the cells so far:")
    if results:
        print(json.dumps(as_json(results), indent=1) if options.json else as_text(results))
    return 1 if failed or not results else 0


def _run_limits(cells: Sequence[Cell], store: Store, paths: dict[str, Path], *, json_wanted: bool) -> int:
    outcomes = []
    try:
        for number, cell in enumerate(cells, 1):
            foretold = foretell(cell, store, path_of=paths)
            for outcome in limits.run_limited(replace(cell, model=str(paths.get(cell.model, cell.model))), foretold):
                outcomes.append(outcome)
                _note(f"{number}/{len(cells)} {cell.name}, {outcome.kind} {outcome.share:.2f}: {outcome.word}")
    except KeyboardInterrupt:
        _note("interrupted; the runs so far:")
    print(json.dumps(limits.as_json(outcomes), indent=1) if json_wanted else limits.as_text(outcomes))
    return 0 if outcomes and all(outcome.good for outcome in outcomes) else 1


class CellError(Exception):
    """A cell's process did not finish."""


def _compare(cell: Cell, store: Store, paths: dict[str, Path], kept: _Kept, python: str) -> Compared:
    foretold = foretell(cell, store, path_of=paths)
    measured = kept.get(cell)
    if measured is None:
        measured = measure(replace(cell, model=str(paths.get(cell.model, cell.model))), python=python)
        if not measured.finished:
            raise CellError(f"exit code {measured.exit_code}: {measured.facts or measured.error}")
        kept.add(cell, measured)
    result = Compared(cell, foretold, measured)
    _note(f"  {result.peak_bytes >> 20} MiB measured, {foretold.peak_bytes >> 20} MiB estimated")
    return result


class _Kept:
    """Measurements in a file, by the names of their cells; None keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path and path.exists() else {}

    def get(self, cell: Cell) -> Measured | None:
        found = self._found.get(cell.name)
        return Measured.from_json(found) if found else None

    def add(self, cell: Cell, measured: Measured) -> None:
        if self._path is not None:
            self._found[cell.name] = asdict(measured)
            self._path.write_text(json.dumps(self._found, indent=1), "utf-8")


def _chosen(options: argparse.Namespace) -> list[Cell]:
    if options.limits and not options.only:
        cells: Iterable[Cell] = limited_grid(options.backends)
    else:
        cells = full_grid(options.backends, {name: model.backends for name, model in MODELS.items()})
    wanted = [cell if cell.recipe else replace(cell, threads=options.threads) for cell in cells]
    wanted = [cell for cell in wanted if all(any(part in cell.name for part in only) for only in options.only)]
    return wanted[: options.limit]


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="memory_grid", description=summary)
    parser.add_argument(
        "--backends", type=_backends, default=("onnx", "llama"), help=f"comma-separated; of: {', '.join(BACKENDS)}"
    )
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        action="append",
        default=[],
        help="cells whose name has one of these texts in it; given twice, one of each",
    )
    parser.add_argument("--limit", type=int, help="at most so many cells")
    parser.add_argument(
        "--limits", action="store_true", help="run cells under limits instead; a chosen few unless --only names them"
    )
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep measurements there, and use those that are")
    parser.add_argument("--kept", action="store_true", help="only compare what is kept: measure nothing")
    parser.add_argument(
        "--openvino-python",
        default=sys.executable,
        metavar="PYTHON",
        help="an interpreter that has OpenVINO, for its cells (default: this one)",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="name the cells and end")
    parser.add_argument("--json", action="store_true", help="one object on standard output")
    return parser


def _backends(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(BACKENDS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(BACKENDS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
