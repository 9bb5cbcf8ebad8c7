"""Devices whose memory and bandwidth are known by name (`models/devices.toml`)."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path

from edge_spec.errors import ModelFormatError, UsageError
from edge_spec.sizes import parse_size
from edge_spec.store.manifest import manifest_folder


@dataclass(frozen=True, slots=True)
class Device:
    """A device: bytes of memory, what its system is allowed of them, and the memory's peak in bytes a second."""

    name: str
    title: str
    memory_bytes: int
    system_bytes: int
    bandwidth_bytes_per_s: float
    machine: str
    source: str

    @property
    def budget_bytes(self) -> int:
        """What is left to one program."""
        return self.memory_bytes - self.system_bytes


def load_devices(folder: Path | None = None) -> dict[str, Device]:
    """All known devices by name. ModelFormatError if the table is not well formed."""
    path = (folder or manifest_folder()) / "devices.toml"
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
        return {
            name: Device(
                name=name,
                title=table["title"],
                memory_bytes=parse_size(table["memory"]),
                system_bytes=parse_size(table["system"]),
                bandwidth_bytes_per_s=float(table["bandwidth"]),
                machine=table["machine"],
                source=table["source"],
            )
            for name, table in tables.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ModelFormatError(f"{path} cannot be read: {exc!r}") from exc


def parse_budget(text: str) -> tuple[int, Device | None]:
    """Bytes that a size (`3GiB`) or a device's name stands for. UsageError names devices that are spelt alike."""
    devices = load_devices()
    device = devices.get(text.strip().lower())
    if device is not None:
        return device.budget_bytes, device
    try:
        return parse_size(text), None
    except UsageError as exc:
        near = difflib.get_close_matches(text.lower(), devices, n=3, cutoff=0.4) or sorted(devices)
        raise UsageError(f"{text!r} is neither a size like 3GiB nor a known device ({', '.join(near)})") from exc
