"""Budgets from invented machines: control groups of both versions, free memory, and what the caller grants."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from edge_spec.errors import UsageError
from edge_spec.memory.budget import Counts, available_memory, find_budget, granted, reserve_bytes
from edge_spec.memory.cgroup import count_limit_hits, limited_cgroups, pressure_file
from edge_spec.memory.pressure import AvailableMemory, GroupMemory, Level, stalled_percent
from edge_spec.memory.process import Usage

MIB = 1 << 20
GIB = 1 << 30
NOTHING = Usage(0, 0)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")


class Machine:
    """An invented /proc and /sys/fs/cgroup."""

    def __init__(self, folder: Path, *, available: int = 8 * GIB, total: int = 16 * GIB) -> None:
        self.proc = folder / "proc"
        self.groups = folder / "cgroup dir"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "pressure").mkdir()
        self.groups.mkdir()
        self.set_free(available, total)
        self.stall(self.proc / "pressure/memory", 0)

    def set_free(self, available: int, total: int = 16 * GIB) -> None:
        text = f"MemTotal: {total >> 10} kB\nMemAvailable: {available >> 10} kB\nHugePages_Total: 0\n"
        (self.proc / "meminfo").write_text(text)

    def stall(self, file: Path, percent: float) -> None:
        file.write_text(f"some avg10={percent} avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 total=0\n")

    def mount(self, version: int, path: str, *, root: str = "/") -> None:
        mounted = str(self.groups).replace(" ", "\\040")
        kind, options, line = (
            ("cgroup2", "rw", f"0::{path}") if version == 2 else ("cgroup", "rw,memory", f"4:memory:{path}")
        )
        (self.proc / "self/cgroup").write_text(f"3:cpu:/other\n{line}\n")
        (self.proc / "self/mountinfo").write_text(
            f"31 23 0:28 {root} {mounted} rw shared:1 - {kind} {kind} {options}\n"
        )

    def group(self, path: str, version: int, limit: int | str, current: int, *, file: int = 0, hits: int = 0) -> Path:
        folder = self.groups / path
        folder.mkdir(parents=True, exist_ok=True)
        if version == 2:
            files = {"memory.max": limit, "memory.high": "max", "memory.current": current}
            (folder / "memory.stat").write_text(f"anon 1\ninactive_file {file // 2}\nactive_file {file - file // 2}\n")
            (folder / "memory.events").write_text(f"low 0\nhigh 0\nmax {hits}\noom 0\noom_kill 0\n")
            self.stall(folder / "memory.pressure", 0)
        else:
            files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": current}
            (folder / "memory.stat").write_text(f"cache 5\ntotal_inactive_file {file}\ntotal_active_file 0\n")
        for name, value in files.items():
            (folder / name).write_text(f"{value}\n")
        return folder


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# Where the room comes from


def test_without_groups_it_is_the_available_memory_less_a_reserve(machine: Machine) -> None:
    budget = find_budget(usage=Usage(100 * MIB, 200 * MIB), proc=machine.proc)
    assert budget.held.n_bytes == 100 * MIB + 8 * GIB - reserve_bytes(16 * GIB)
    assert "available memory" in budget.held.source


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_of_all_ancestors_counts_and_file_pages_do_not(machine: Machine, version: int) -> None:
    machine.mount(version, "/a/b")
    machine.group("a/b", version, 6 * GIB, 1 * GIB)
    machine.group("a", version, 3 * GIB, 2 * GIB, file=512 * MIB)
    machine.group("", version, "max" if version == 2 else 9223372036854771712, 5 * GIB)
    budget = find_budget(usage=NOTHING, proc=machine.proc)
    assert budget.held.n_bytes == 1 * GIB + 512 * MIB
    assert [group.limit_bytes for group in limited_cgroups(machine.proc)] == [6 * GIB, 3 * GIB]


def test_a_container_that_sees_the_hosts_path_finds_its_own_group(machine: Machine) -> None:
    machine.mount(2, "/docker/abc", root="/docker/abc")
    machine.group("", 2, 2 * GIB, 1 * GIB)
    assert find_budget(usage=NOTHING, proc=machine.proc).held.n_bytes == 1 * GIB
    machine.mount(2, "/../outside")
    assert find_budget(usage=NOTHING, proc=machine.proc).held.n_bytes == 1 * GIB


def test_a_group_over_its_limit_leaves_what_the_process_has(machine: Machine) -> None:
    machine.mount(2, "/a")
    machine.group("a", 2, 1 * GIB, 2 * GIB)
    assert find_budget(usage=Usage(7, 7), proc=machine.proc).held.n_bytes == 7


def test_the_callers_grant_and_the_machine_hold_both(machine: Machine) -> None:
    assert find_budget("1.5GiB", usage=NOTHING, proc=machine.proc).held.n_bytes == 3 * GIB // 2
    assert find_budget("64GiB", usage=NOTHING, proc=machine.proc).held.n_bytes < 8 * GIB
    machine.set_free(1 * GIB)
    assert "reserve" in find_budget("3GiB", usage=NOTHING, proc=machine.proc).held.source


def test_process_limits_are_bounds_of_their_own() -> None:
    code = (
        "import resource; from edge_spec.memory.budget import find_budget;"
        "resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, resource.RLIM_INFINITY));"
        "print([(b.n_bytes, str(b.counts)) for b in find_budget().bounds if b.source == 'RLIMIT_DATA'])"
    )
    shown = subprocess.check_output([sys.executable, "-c", code], text=True).strip()
    assert shown == f"[({3 << 30}, '{Counts.ALLOCATED}')]"
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY, "only the child's"


@pytest.mark.parametrize("ram", [0, -1, True, 1.5, "many", "3 GiBs", ""])
def test_what_is_no_size_is_refused(ram: object) -> None:
    with pytest.raises(UsageError):
        granted(ram)  # type: ignore[arg-type]


def test_a_device_stands_for_what_it_leaves_to_one_program() -> None:
    from edge_spec.memory.devices import load_devices

    name, device = next(iter(load_devices().items()))
    assert granted(name).n_bytes == device.budget_bytes
    assert device.title in granted(name).source


def test_this_machine_has_memory() -> None:
    available, total = available_memory()
    assert 0 < available <= total


# Signals


def test_available_memory_is_short_below_a_quarter_of_the_reserve(machine: Machine) -> None:
    signal, reserve = AvailableMemory(machine.proc), reserve_bytes(16 * GIB)
    assert signal.read().level is Level.CALM
    machine.set_free(reserve // 3)
    assert signal.read().level is Level.EASING
    machine.set_free(reserve // 5)
    assert signal.read().level is Level.HIGH


def test_stalls_count_only_where_memory_is_scarce(machine: Machine) -> None:
    signal, file = AvailableMemory(machine.proc), machine.proc / "pressure/memory"
    machine.stall(file, 40)
    assert stalled_percent(file) == 40
    assert signal.read().level is Level.CALM, "others wait behind their own limits"
    machine.set_free(reserve_bytes(16 * GIB) - MIB)
    assert signal.read().level is Level.HIGH
    machine.stall(file, 6)
    assert signal.read().level is Level.EASING, "not yet as calm as it has to be"


def test_stalls_of_our_own_group_count_always(machine: Machine) -> None:
    machine.mount(2, "/a/b")
    machine.group("a", 2, 3 * GIB, 1 * GIB)
    (machine.groups / "a/b").mkdir()  # memory is not controlled down there
    assert pressure_file(machine.proc) == machine.groups / "a/memory.pressure"
    machine.stall(machine.groups / "a/memory.pressure", 30)
    assert AvailableMemory(machine.proc).read().level is Level.HIGH


def test_a_group_near_its_limit_is_short_and_hits_make_it_so_earlier(machine: Machine) -> None:
    machine.mount(2, "/a")
    machine.group("a", 2, 1 * GIB, 500 * MIB, hits=3)
    signal = GroupMemory(machine.proc)
    assert signal.read().level is Level.CALM
    machine.group("a", 2, 1 * GIB, 900 * MIB, file=100 * MIB, hits=9)
    assert count_limit_hits(machine.proc) == 9
    assert signal.read().level is Level.CALM, "file pages made room"
    machine.group("a", 2, 1 * GIB, 995 * MIB, hits=9)
    assert signal.read().level is Level.EASING
    machine.group("a", 2, 1 * GIB, 995 * MIB, hits=12)
    assert signal.read().level is Level.HIGH
    machine.group("a", 2, 1 * GIB, 1015 * MIB, hits=12)
    assert signal.read().level is Level.HIGH
    assert signal.read().reason.startswith("the control group")
