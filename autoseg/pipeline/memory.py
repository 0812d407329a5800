"""What a work_dir remembers of its commands: settings, command lines, input.yaml."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from autoseg.config.settings import Settings
from autoseg.version import __version__
from autoseg.workspace.files import write_text, write_yaml
from autoseg.workspace.workspace import STAGES, Workspace

SELECTS_WORK = frozenset(
    ("work_dir", "datalist", "dataroot", "algos", "folds", "device", "num_workers", "launcher", "address", "retries")
    + ("jobs_per_device", "gpus_per_job", "cpus_per_job")
)
"""Settings that say what to run now; the others on a command line belong to the run and stay with it."""


# -- checks before anything runs


def _of_job(algo: str | None, fold: int | None) -> dict[str, str]:
    return {k: str(v) for k, v in (("algo", algo), ("fold", fold)) if v is not None}


def _relative(path: Path, root: Path) -> str:
    return os.path.relpath(path, root)


def _remember_command(workspace: Workspace, stages: Sequence[str], input_path: Path, words: Mapping[str, str]) -> None:
    """Add a line to the commands of the run, with paths from the folder that holds the work_dir."""
    home = workspace.root.absolute().parent
    command = ["autoseg", "run" if tuple(stages) == STAGES else "+".join(stages)]
    for key, value in {"input": str(input_path.absolute()), **words}.items():
        command += [f"--{key}", os.path.relpath(value, home) if os.path.isabs(value) else value]
    line = {"time": round(time.time(), 1), "command": shlex.join(command), "version": __version__}
    workspace.commands.parent.mkdir(parents=True, exist_ok=True)
    with open(workspace.commands, "a") as file:
        file.write(json.dumps(line) + "\n")


def _memory(workspace: Workspace) -> Path:
    """Where the settings of command lines are kept for later runs."""
    return workspace.root / "state" / "command_line.json"


def _remembered(workspace: Workspace) -> Callable[[], None]:
    """Note a run's settings and its number of rounds, and return what puts them back as they are now.

    What a mistaken command line has stored would make the plain `autoseg run` fail, or hide finished rounds. A run
    that was stopped, by a signal or by faults of the data, goes on with its own.
    """
    memory, number = _memory(workspace), workspace.num_rounds
    files = [memory, *(place.settings for place in (workspace, *workspace.rounds()))]
    before = {path: path.read_text(errors="replace") for path in files if path.exists()}

    def put_back() -> None:
        for path, content in before.items():
            write_text(path, content)
        if memory not in before:
            memory.unlink(missing_ok=True)
        if workspace.num_rounds != number:
            workspace.plan_rounds(number)

    return put_back


def _remember_input(workspace: Workspace, settings: Settings, origins: Mapping[str, str], input_path: Path) -> None:
    write_text(workspace.input, input_path.read_text())
    _remember_settings(workspace, settings, origins)


def _remember_settings(workspace: Workspace, settings: Settings, origins: Mapping[str, str]) -> None:
    resolved = settings.model_dump(mode="json")
    for key in ("datalist", "dataroot", "work_dir"):
        resolved[key] = _relative(Path(getattr(settings, key)), workspace.root)
    write_yaml(
        workspace.settings,
        {key: {"value": value, "origin": origins.get(key, "default")} for key, value in resolved.items()},
    )
