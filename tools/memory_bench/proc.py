"""What Linux tells of a process's memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

_FIELDS = {
    "RssAnon": "anonymous_bytes",
    "RssFile": "mapped_bytes",
    "VmHWM": "peak_rss_bytes",
    "VmData": "data_bytes",
}
_MODEL_SUFFIXES = (".gguf", ".bin", ".onnx")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `peak_rss_bytes` is the kernel's own mark since the last `reset_peak`; `data_bytes` counts private
    writable mappings, touched or not, which is what RLIMIT_DATA limits."""

    anonymous_bytes: int = 0
    mapped_bytes: int = 0
    peak_rss_bytes: int = 0
    data_bytes: int = 0

    def maximum(self, other: Memory) -> Memory:
        """The larger of each."""
        ours, theirs = asdict(self), asdict(other)
        return Memory(**{name: max(value, theirs[name]) for name, value in ours.items()})

    @property
    def peak_anonymous_bytes(self) -> int:
        """A lower bound of the peak of anonymous memory, from peaks: samples can miss a moment, the mark cannot; at
        that moment at most `mapped_bytes` of it were files."""
        return max(self.anonymous_bytes, self.peak_rss_bytes - self.mapped_bytes)


def read_memory(pid: int | str = "self") -> Memory | None:
    """The memory of a process now; None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    lines = (line.partition(":") for line in status.splitlines())
    found = {_FIELDS[name]: int(value.split()[0]) * 1024 for name, _, value in lines if name in _FIELDS}
    return Memory(**found) if found else None  # a process that is ending has no memory left


def reset_peak(pid: int | str = "self") -> bool:
    """Start the peak of resident memory anew; False where that is not allowed."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_by_kind(pid: int) -> dict[str, int]:
    """Resident bytes by what is mapped: `anonymous`, `model` files, `libraries`, `other` files.

    Pages of a file that the process has written to are `anonymous`.
    """
    kinds = dict.fromkeys(("anonymous", "model", "libraries", "other"), 0)
    path = ""
    with Path(f"/proc/{pid}/smaps").open() as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name == "Rss":
                resident = int(value.split()[0]) * 1024
            elif name == "Anonymous":
                anonymous = int(value.split()[0]) * 1024
                kinds["anonymous"] += anonymous
                kinds[_kind(path)] += resident - anonymous
            elif " " in name:  # the line that starts a mapping: its addresses, and perhaps its file
                path = line.split(maxsplit=5)[5].strip() if len(line.split(maxsplit=5)) > 5 else ""
    return kinds


def _kind(path: str) -> str:
    if path.endswith(_MODEL_SUFFIXES):
        return "model"
    return "libraries" if ".so" in path or "/python" in path else "other"
