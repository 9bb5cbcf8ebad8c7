"""The ratios as a picture."""

from __future__ import annotations

from pathlib import Path

from edge_spec.benchmark.figures import Report
from edge_spec.errors import BackendUnavailableError, StorageError, UsageError


def require_plotting(path: Path) -> None:
    """Before anything is measured: raises BackendUnavailableError without matplotlib, UsageError for a bad path."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot writes a PNG: {path} should end with .png")
    if not path.expanduser().absolute().parent.is_dir():
        raise UsageError(f"--plot: there is no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise BackendUnavailableError("a plot needs matplotlib: pip install 'edge-spec[bench]'") from exc


def write_plot(report: Report, title: str, path: Path) -> None:
    """Bars of the ratio to plain decoding, one a task, a mark at the worst prompt. Raises StorageError."""
    from matplotlib.figure import Figure

    tasks = {task: figures for task, figures in report.tasks.items() if figures.ratio is not None}
    ratios = [figures.ratio or 0.0 for figures in tasks.values()]
    figure = Figure(figsize=(max(6.0, 1.1 * len(tasks) + 2), 4.5), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.bar(list(tasks), ratios, color="#4477aa")
    axes.bar_label(bars, fmt="%.2f", padding=2)
    worst = [figures.worst_ratio for figures in tasks.values()]
    axes.plot(list(tasks), worst, "v", color="#cc6677", label="worst prompt")
    axes.axhline(1.0, color="#888888", linewidth=1)
    if report.geomean_ratio is not None:
        label = f"geometric mean {report.geomean_ratio:.2f}"
        axes.axhline(report.geomean_ratio, color="#228833", linestyle="--", linewidth=1, label=label)
    axes.set_ylim(0, 1.15 * max([1.0, *ratios]))
    axes.set_ylabel("decode speed, plain = 1")
    axes.set_title(title, fontsize=10)
    axes.tick_params(axis="x", rotation=30)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    try:
        figure.savefig(path.expanduser(), format="png", dpi=144)
    except OSError as exc:
        raise StorageError(f"the plot could not be written to {path}: {exc}") from exc
