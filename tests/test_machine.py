"""Cores and memory inside containers and batch systems, whose files are made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from autoseg.hardware import limits as machine

GIB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(total=100 * GIB, available=80 * GIB))
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    return tmp_path


def put(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_without_limits_it_is_the_machine(groups: Path) -> None:
    put(groups, memory__max="max", memory__current="5")
    assert (machine.available_cores(), machine.memory_limit_bytes()) == (8, 100 * GIB)
    assert machine.available_memory_bytes() == 80 * GIB


def test_files_that_were_read_count_as_free(groups: Path) -> None:
    """A container that has read its data is full of them; they go when memory is wanted."""
    put(groups, memory__max=str(16 * GIB), memory__current=str(15 * GIB))
    assert machine.memory_limit_bytes() == 16 * GIB
    assert machine.available_memory_bytes() == 1 * GIB
    put(groups, memory__stat=f"anon {2 * GIB}\ninactive_file {12 * GIB}")
    assert machine.available_memory_bytes() == 13 * GIB


def test_the_tightest_group_on_the_way_up_counts(groups: Path) -> None:
    put(groups, membership="0::/slurm/job_1/step_0")
    put(groups / "slurm" / "job_1" / "step_0", memory__max="max", memory__current=str(GIB), cpu__max="max 100000")
    put(groups / "slurm" / "job_1", memory__max=str(8 * GIB), memory__current=str(3 * GIB), cpu__max="350000 100000")
    put(groups / "slurm", memory__max=str(64 * GIB), memory__current=str(10 * GIB))
    assert machine.memory_limit_bytes() == 8 * GIB
    assert machine.available_memory_bytes() == 5 * GIB
    assert machine.available_cores() == 4


def test_version_1_has_a_tree_for_each_controller(groups: Path) -> None:
    put(groups, membership="4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/")
    limits = {"memory__limit_in_bytes": str(4 * GIB), "memory__usage_in_bytes": str(3 * GIB)}
    # In the container its own group is the tree's root, whatever path its host knows it by.
    put(groups / "memory", **limits, memory__stat=f"total_inactive_file {GIB}\ninactive_file 5")
    put(groups / "cpu,cpuacct", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    assert machine.memory_limit_bytes() == 4 * GIB
    assert machine.available_memory_bytes() == 2 * GIB
    assert machine.available_cores() == 2


def test_more_used_than_allowed_leaves_nothing(groups: Path) -> None:
    put(groups, memory__max=str(GIB), memory__current=str(2 * GIB))
    assert machine.available_memory_bytes() == 0
