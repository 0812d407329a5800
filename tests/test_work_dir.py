"""The folder of a run: what lies in it is told, and a sweep can take no name that something else has there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

import autoseg.workspace.workspace
from autoseg.config.settings import RESERVED_NAMES, SweepSettings

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
