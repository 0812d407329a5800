"""The folder of a run: what lies in it is told, and a sweep can take no name that something else has there."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
from pydantic import ValidationError

import autoseg.workspace.workspace
from autoseg.config.settings import RESERVED_NAMES, SweepSettings
from autoseg.workspace.claims import Claim
from autoseg.workspace.files import HALF, open_half, write_atomic, write_json, write_text
from autoseg.workspace.jobs import Job
from autoseg.workspace.workspace import Workspace

JOB = re.compile(r"(segresnet|dints)_\d+")
"""Jobs of the finished run."""


@pytest.mark.parametrize("name", [*RESERVED_NAMES, "analysis", "round_1", "dints_0", "locator_12"])
def test_a_sweep_cannot_take_a_name_that_is_taken(name: str) -> None:
    with pytest.raises(ValidationError, match="and none of analysis, cache, state, .*, <network>_<fold>"):
        SweepSettings(study=name)
    assert SweepSettings(study=f"my_{name}").study == f"my_{name}"


def test_every_folder_of_a_run_is_reserved(finished_run: Path) -> None:
    folders = {path.name for path in (finished_run / "work_dir").iterdir() if path.is_dir()}
    jobs = {name for name in folders if JOB.fullmatch(name)}
    assert len(jobs) == 4
    assert {"analysis", "ensemble"} <= folders
    assert {name for name in folders - jobs if not name.startswith(".")} <= set(RESERVED_NAMES)


def test_the_workspace_tells_what_lies_in_it(finished_run: Path) -> None:
    text = autoseg.workspace.workspace.__doc__ or ""
    names = [p.name for p in (finished_run / "work_dir").iterdir() if not p.name.startswith(".")]
    assert [name for name in names if not JOB.fullmatch(name) and name not in text] == []


def test_a_job_whose_worker_is_dead_counts_as_pending(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for fold, state in enumerate(("running", "running", "done")):
        workspace.write_job(Job(algo="segresnet", fold=fold, state=state))  # type: ignore[arg-type]
    with Claim(workspace.job_dir("segresnet", 1).claims, "segresnet_1"):
        states = [(job.fold, job.state, claim.is_live) for job, claim in workspace.current_jobs()]
    assert states == [(0, "pending", False), (1, "running", True), (2, "done", False)]
    assert [job.state for job, _ in workspace.current_jobs()] == ["pending", "pending", "done"]
    assert workspace.read_job("segresnet", 0).state == "running", "that is for who takes it over to change"


def test_halves_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "work_dir")
    with workspace.lock():
        place = workspace.root / "cache" / "a"
        place.mkdir(parents=True)
    living, file = open_half(place / "image.npy")
    script = (
        "import os, signal, sys; from pathlib import Path; from autoseg.workspace.files import open_half;"
        "print(open_half(Path(sys.argv[1]))[0], flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, place / "image.npy"], stdout=subprocess.PIPE, text=True)
    dead = Path(killed.stdout.strip())
    of_another_machine = place / f"{HALF}ffffff123456789012"
    old_of_another = place / f"{HALF}ffffff123456789013"
    for path in (of_another_machine, old_of_another):
        path.write_bytes(b"a")
    os.utime(old_of_another, (0, 0))
    assert dead.exists()
    with workspace.lock():
        assert {path.name for path in place.iterdir()} == {living.name, of_another_machine.name}
    with file:
        file.write(b"whole")
        os.replace(living, place / "image.npy")
    assert (place / "image.npy").read_bytes() == b"whole"


def test_a_half_that_is_taken_away_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, taken = fcntl.flock, list[Path]()

    def take_first(*words: Any) -> None:
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        flock(*words)

    monkeypatch.setattr(fcntl, "flock", take_first)
    write_text(tmp_path / "a", "b")
    assert len(taken) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    write_json(path, {"old": 1})

    def half(file: IO[bytes]) -> None:
        file.write(b'{"new": ')
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, half)
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]
