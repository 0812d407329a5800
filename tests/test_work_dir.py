"""The folder of a run: what lies in it is told, and a sweep can take no name that something else has there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import IO

import pytest
from pydantic import ValidationError

import autoseg.workspace.workspace
from autoseg.config.settings import RESERVED_NAMES, SweepSettings
from autoseg.workspace.claims import Claim
from autoseg.workspace.files import write_atomic, write_json
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
