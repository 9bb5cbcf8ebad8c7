"""Memory limits of the control groups that this process is in, version 1 and 2, every ancestor included.

Files and their meaning: the kernel's `Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC = Path("/proc")

_NO_LIMIT = 1 << 60
"""Version 1 writes a number near 2^63 where there is no limit."""


@dataclass(frozen=True, slots=True)
class _Files:
    """What a version calls the files of a group."""

    limits: tuple[str, ...]
    current: str
    file_pages: tuple[str, ...]
    """Entries of memory.stat that count file pages, which the kernel drops before anything is killed."""


_V1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


@dataclass(frozen=True, slots=True)
class Cgroup:
    """One group with a limit on its memory; sizes in bytes."""

    path: Path
    limit_bytes: int
    current_bytes: int
    file_bytes: int
    """Of `current_bytes`: file pages, which go before anything is killed."""

    @property
    def room_bytes(self) -> int:
        """What the group can still take; not below 0."""
        return max(0, self.limit_bytes - self.current_bytes + self.file_bytes)


def limited_cgroups(proc: Path = PROC) -> list[Cgroup]:
    """The groups of this process, from its own to the outermost, that set a limit; empty where there are none."""
    return [group for path, files in _groups(proc) if (group := _read(path, files)) is not None]


def pressure_file(proc: Path = PROC) -> Path | None:
    """Where the innermost group that controls memory tells how much its tasks wait for it; None where none does."""
    for path, files in _groups(proc):
        file = path / "memory.pressure"
        if files is _V2 and (path / "memory.max").is_file() and file.is_file():
            return file
    return None


def count_limit_hits(proc: Path = PROC) -> int:
    """Times that these groups ran into a limit (`high`, `max` and `oom` of memory.events, version 2).

    Page caches that are full count as well. Version 1 has no such account that a page cache does not drive.
    """
    return sum(_event_count(path) for path, files in _groups(proc) if files is _V2)


def _groups(proc: Path) -> Iterator[tuple[Path, _Files]]:
    """Folders of this process's groups that control memory, innermost first, of both versions."""
    try:
        memberships = (proc / "self/cgroup").read_text("utf-8").splitlines()
        mounts = (proc / "self/mountinfo").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for membership in memberships:
        number, controllers, path = [*membership.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            found = _mount(mounts, "cgroup2", None)
            files = _V2
        elif "memory" in controllers.split(","):
            found = _mount(mounts, "cgroup", "memory")
            files = _V1
        else:
            continue
        if found is not None:
            yield from ((folder, files) for folder in _ancestors(*found, PurePosixPath(path)))


def _mount(mounts: list[str], kind: str, option: str | None) -> tuple[PurePosixPath, Path] | None:
    """(root within the hierarchy, where it is mounted) of a hierarchy, from mountinfo's lines; see proc(5)."""
    for line in mounts:
        before, separator, after = line.partition(" - ")
        fields, about = before.split(), after.split()
        if not separator or len(fields) < 5 or len(about) < 3 or about[0] != kind:
            continue
        if option is None or option in about[2].split(","):
            return PurePosixPath(_unescaped(fields[3])), Path(_unescaped(fields[4]))
    return None


def _unescaped(field: str) -> str:
    """A path of mountinfo, in which blanks are written in octal."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field


def _ancestors(root: PurePosixPath, mount_point: Path, path: PurePosixPath) -> Iterator[Path]:
    """Folders from the group `path` up to where the hierarchy is mounted.

    In a container the path may be that of the host while only the container's own part is mounted: then the mount
    point itself is the group.
    """
    try:
        inner = path.relative_to(root)
    except ValueError:
        inner = PurePosixPath()
    parts = [] if ".." in inner.parts else list(inner.parts)
    while parts:
        folder = mount_point.joinpath(*parts)
        if folder.is_dir():
            yield folder
        parts.pop()
    yield mount_point


def _read(path: Path, files: _Files) -> Cgroup | None:
    limits = [limit for name in files.limits if (limit := _number(path / name)) is not None and limit < _NO_LIMIT]
    current = _number(path / files.current)
    if not limits or current is None:
        return None
    return Cgroup(path, min(limits), current, min(current, _file_bytes(path, files)))


def _file_bytes(path: Path, files: _Files) -> int:
    counts = _table(path / "memory.stat")
    return sum(counts.get(name, 0) for name in files.file_pages)


def _event_count(path: Path) -> int:
    counts = _table(path / "memory.events.local") or _table(path / "memory.events")
    return sum(counts.get(name, 0) for name in ("high", "max", "oom"))


def _number(path: Path) -> int | None:
    """A file's number; None for `max`, for a file that is not there and for one that holds something else."""
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):
        return None


def _table(path: Path) -> dict[str, int]:
    """A file of `name number` lines; empty where it cannot be read."""
    try:
        rows = [line.split() for line in path.read_text("ascii").splitlines()]
    except (OSError, ValueError):
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdecimal()}
