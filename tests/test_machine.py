"""Cores and memory inside containers and batch systems, whose files are made up."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from autoseg.hardware import limits as machine
from autoseg.hardware.user import name_user

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


def test_everybody_gives_the_same_answer(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a quota of one core the launcher gave its jobs two threads, and the doctor said two."""
    import torch

    from autoseg.cli import doctor
    from autoseg.config.settings import Settings
    from autoseg.hardware.device import pick_device
    from autoseg.hardware.facts import find_hardware
    from autoseg.launch.local import find_places
    from autoseg.workspace.usage import environment

    put(groups, cpu__max="100000 100000", memory__max=str(6 * GIB), memory__current="0")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        hardware = find_hardware(pick_device("cpu"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert (hardware.num_cores, hardware.memory_gib) == (1, 6.0)
    settings = Settings.model_validate({"modality": "CT", "datalist": "a", "dataroot": "b", "device": "cpu"})
    assert [place.environment["OMP_NUM_THREADS"] for place in find_places(settings)] == ["1"]
    said = " ".join(check.found for check in [*doctor._gpu(), *doctor._memory()])
    assert "networks run on 1 CPU cores" in said
    assert "6" in said
    assert "1 of them to be used" in environment()["processor"]
    assert environment()["memory"] == "6.0 GiB"


def test_a_process_computes_with_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from autoseg.hardware import limits; limits.available_cores = lambda: 1\n"
        "from autoseg.hardware.device import pick_device; pick_device('cpu')\n"
        "import torch; print(torch.get_num_threads())"
    )
    answers = []
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)  # torch keeps to it as well
    for wanted in (None, "2"):  # who sets the variable means it
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if wanted is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", wanted)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        answers.append(int(done.stdout))
    assert answers == [1, 2]


def test_workers_are_bounded_by_memory_and_by_the_jobs_beside(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight jobs on 64 cores started 512 threads, of which each takes 3 GB for a large case."""
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert machine.workers_for(GIB) == 64
    monkeypatch.setenv(machine.JOBS_AT_ONCE, "8")
    assert machine.workers_for(GIB / 2) == 8
    assert machine.workers_for(3 * GIB) == 3  # 80 GiB are free for eight jobs
    assert machine.workers_for(3 * GIB, most=2) == 2
    assert machine.workers_for(500 * GIB) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert machine.workers_for(GIB / 2) == 4


def test_preparing_large_cases_takes_fewer_threads(
    tmp_path: Path, groups: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import logging
    from concurrent import futures

    from plans import tiny_plan

    from autoseg.data.datalists.datalist import read_datalist
    from autoseg.data.phantoms import make_phantoms
    from autoseg.training import cache

    make_phantoms(tmp_path, num_cases=4, num_testing=0, shape=(24, 24, 24), num_fold=2)
    cases = read_datalist(tmp_path / "datalist.json", tmp_path).training
    plan, pools = tiny_plan(), []
    need = max(cache.preparing_bytes(plan, case) for case in cases)
    available = SimpleNamespace(total=100 * GIB, available=2 * need + 1)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: available)

    class Pool(futures.ThreadPoolExecutor):
        def __init__(self, workers: int) -> None:
            pools.append(workers)
            super().__init__(workers)

    monkeypatch.setattr(cache, "ThreadPoolExecutor", Pool)
    caplog.set_level(logging.INFO, "autoseg")
    cache.load_cases(tmp_path / "cache", plan, cases, num_workers=4)
    assert pools[0] == 2
    assert "preprocessing with 2 threads instead of 4, since memory is short" in caplog.text


def test_a_user_without_an_entry_in_passwd_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOGNAME", "")  # what is set by the test is undone after it
    known = getpass.getuser()
    name_user()
    assert getpass.getuser() == known
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    name_user()
    assert getpass.getuser() == str(os.getuid())
