"""How far a run is: its stages and its jobs, from the files in work_dir alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from autoseg.config import format_duration
from autoseg.errors import WorkspaceError
from autoseg.workspace import STAGES, Job, Workspace, read_json

_TAIL_BYTES = 65536


def status(work_dir: Path) -> str:
    """Tell the state of every stage and job of a run.

    Args:
        work_dir: The run's folder.

    Returns:
        Lines to print: when each stage ended; for each job its state, Dice, time, epoch, time left, error.

    Raises:
        WorkspaceError: The folder is missing or is no run's.
    """
    workspace = Workspace(work_dir)
    if not work_dir.is_dir():
        raise WorkspaceError(f"{work_dir}: no such folder. Give a run's folder with --work_dir.")
    jobs = workspace.jobs()
    if not jobs and not workspace.settings.exists() and not (work_dir / "state").is_dir():
        raise WorkspaceError(f"{work_dir}: not a run's folder. Give a run's folder with --work_dir.")
    lines = ["Stage     Done"]
    lines += [f"{stage:<9} {_stage_time(workspace, stage)}" for stage in STAGES]
    if not jobs:
        return "\n".join([*lines, "", "No training jobs yet. `autoseg generate` plans them."])
    width = max(len("Job"), *(len(job.name) for job in jobs))
    lines += ["", f"{'Job':<{width}}  {'State':<8}  {'Dice':>6}  {'Time':>8}  Progress"]
    lines += [_job_line(workspace, job, width) for job in jobs]
    counts = {state: sum(job.state == state for job in jobs) for state in dict.fromkeys(j.state for j in jobs)}
    lines += ["", f"{len(jobs)} jobs: " + ", ".join(f"{n} {state}" for state, n in counts.items())]
    return "\n".join(lines)


def _stage_time(workspace: Workspace, stage: str) -> str:
    """When a stage ended; `-` where it has not."""
    path = workspace.root / "state" / f"{stage}.json"
    if not path.exists():
        return "-"
    data = read_json(path)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(data["time"])) if "time" in data else "yes"


def _job_line(workspace: Workspace, job: Job, width: int) -> str:
    dice = "-" if job.dice is None else f"{job.dice:.4f}"
    if job.error:
        progress = job.error.strip().splitlines()[0]
    elif job.state == "pending":
        progress = ""
    else:
        progress = _progress(_last_epoch(workspace.job_dir(job.algo, job.fold).metrics), job.state == "running")
    spent = format_duration(job.seconds) if job.seconds else "-"
    return f"{job.name:<{width}}  {job.state:<8}  {dice:>6}  {spent:>8}  {progress}".rstrip()


def _progress(epoch: dict[str, Any], is_running: bool) -> str:
    """The epoch reached, and while a job runs the time left."""
    if "epoch" not in epoch:
        return "no epoch yet" if is_running else ""
    text = f"epoch {epoch['epoch']}"
    if epoch.get("num_epochs"):
        text += f" of {epoch['num_epochs']}"
    if is_running and isinstance(epoch.get("time_left_s"), int | float):
        text += f", {format_duration(epoch['time_left_s'])} left"
    return text


def _last_epoch(path: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl; a line that is being written is passed over."""
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            data = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(data, dict):
            return data
    return {}
