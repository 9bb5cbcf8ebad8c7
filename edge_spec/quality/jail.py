"""The inner side of `sandbox`: builds the walls around its own process, says which stand, and becomes the program.

    python -I -S -B jail.py FOLDER PROGRAM CPU_S MEMORY_BYTES FILE_BYTES

Runs by itself, with the standard library alone. Numbers are those of Linux (`linux/prctl.h`, `linux/sched.h`,
`linux/landlock.h`; the system calls of Landlock are the same on every processor).
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys

_NO_NEW_PRIVILEGES = 38
_NEW_USER, _NEW_NET, _NEW_IPC = 0x10000000, 0x40000000, 0x08000000
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1
_PATH_BENEATH = 1
_WRITES = 1 << 1 | sum(1 << bit for bit in range(4, 13))
"""Landlock's rights to write, remove and make files of any kind; not to execute, read and list."""
_BY_VERSION = {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
"""Rights that later versions know: move between folders, truncate, control devices."""


def main(arguments: list[str]) -> None:
    """Build the walls, then run the program in this process."""
    folder, program, cpu_s, memory_bytes, file_bytes = arguments
    _limit(int(cpu_s), int(memory_bytes), int(file_bytes))
    walls = ["limits"]
    if sys.platform == "linux":
        library = ctypes.CDLL(None, use_errno=True)
        library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        if _cut_network(library):
            walls.append("network")
        if _only_write_in(library, folder):
            walls.append("files")
    print("walls:", *walls, flush=True)
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-B", program])


def _limit(cpu_s: int, memory_bytes: int, file_bytes: int) -> None:
    limits = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_DATA: memory_bytes,
        resource.RLIMIT_AS: 2 * memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        bounded = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (bounded, bounded))
        except (OSError, ValueError):
            if kind in (resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
                raise  # macOS grants no limit on memory; these two are granted everywhere


def _cut_network(library: ctypes.CDLL) -> bool:
    """A network namespace without interfaces; in a user namespace where this process may not make one by itself."""
    flags = _NEW_NET | _NEW_IPC
    return any(library.unshare(chosen) == 0 for chosen in (flags | _NEW_USER, flags))


def _only_write_in(library: ctypes.CDLL, folder: str) -> bool:
    version = library.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    if version < 1:
        return False
    rights = _WRITES | sum(right for since, right in _BY_VERSION.items() if since <= version)
    handled = struct.pack("=Q", rights)
    ruleset = library.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    if ruleset < 0:
        return False
    inside = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, inside)
    added = library.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    restricted = library.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(inside)
    os.close(ruleset)
    return (added, restricted) == (0, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
