"""Threads: what is granted, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_spec import cores
from edge_spec.errors import UsageError


def test_the_default_is_within_what_the_process_may_use() -> None:
    assert 1 <= cores.usable_cores() <= (os.cpu_count() or 1)
    assert cores.check_threads(None) == cores.usable_cores()


@pytest.mark.parametrize(("text", "most"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", 10**6)])
def test_a_cgroups_quota_bounds_the_default(
    text: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(cores, "_CGROUP_QUOTA", tmp_path / "cpu.max")
    assert cores.usable_cores() <= most


@pytest.mark.parametrize("threads", [0, -1, 5000])
def test_threads_that_the_machine_does_not_have_are_refused(threads: int) -> None:
    with pytest.raises(UsageError, match="from 1 to"):
        cores.check_threads(threads)
