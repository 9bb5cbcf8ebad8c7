"""Sizes in binary units, as they are shown to people."""

from __future__ import annotations

_UNITS = ("KiB", "MiB", "GiB", "TiB")


def format_size(n_bytes: int) -> str:
    """`n_bytes` with three significant digits at least and the largest unit that fits: `512B`, `93.8MiB`, `1.04GiB`."""
    if n_bytes < 1024:
        return f"{n_bytes}B"
    value = float(n_bytes)
    for unit in _UNITS:
        value /= 1024
        # 1023.95 would be printed as 1024.0, which belongs to the next unit.
        if value < 1023.95 or unit == _UNITS[-1]:
            break
    return f"{value:.2f}{unit}" if value < 9.995 else f"{value:.1f}{unit}"
