"""Sizes in binary units, as they are shown to people and typed by them."""

from __future__ import annotations

import re

from edge_spec.errors import UsageError

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


def parse_size(text: str) -> int:
    """Bytes of `3GiB`, `1.5g`, `512MiB`, `100000`; units are binary. UsageError for anything else, and for nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(?:ib)?|b)?", text.strip().lower())
    n_bytes = int(float(match[1]) * 1024 ** (" kmgt".index(match[2] or " "))) if match else 0
    if n_bytes < 1:
        raise UsageError(f"{text!r} is no size: write it like 3GiB or 512MiB")
    return n_bytes
