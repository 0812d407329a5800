"""How far a run is: its stages and its jobs, from the files in work_dir alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoseg.config.types import suggest
from autoseg.config.units import format_duration
from autoseg.errors import ConfigError, WorkspaceError, counted
from autoseg.terminal import printable
from autoseg.workspace.claims import ClaimState
from autoseg.workspace.files import last_lines
from autoseg.workspace.jobs import EpochLine, Job
from autoseg.workspace.layout import check_readable
from autoseg.workspace.pretraining import LessonLine, pretraining_place
from autoseg.workspace.scratch import scratch_place
from autoseg.workspace.stages import Stage
from autoseg.workspace.stored import Unreadable
from autoseg.workspace.usage import read_usage
from autoseg.workspace.workspace import Workspace

LOG_LINES = 40
WATCH_S = 2.0
COLUMNS = ("Job", "State", "Device", "Epoch", "Dice", "Time", "Left", "Last error")


def status(work_dir: Path, stages: Sequence[Stage[Any]]) -> str:
    """Tell the state of every stage and job of a run.

    Args:
        work_dir: The run's folder.
        stages: The table of stages.

    Returns:
        Lines to print: when each stage ended; for each job its state, device, epoch, Dice, time, time left, last error.
        The Dice of a job that is not done is the best of its validations so far. Files that cannot be read are named
        at the end; the rest is shown as if they were not there.

    Raises:
        WorkspaceError: The folder is missing or is no run's.
    """
    workspace, unreadable = _open(work_dir), Unreadable()
    text = "\n".join(_status_lines(workspace, stages, unreadable))
    return "\n".join([text, *(["", "Not readable:", *unreadable.messages] if unreadable.messages else [])])


def _status_lines(workspace: Workspace, stages: Sequence[Stage[Any]], unreadable: Unreadable) -> list[str]:
    shown = [stage.name for stage in stages if stage.is_shown_of(workspace, unreadable)]
    between = [stage for stage in stages if stage.where == "between rounds"]
    width = max(9, *map(len, shown))
    lines = [f"{'Stage':<{width}} Done"]
    lines += [f"{name:<{width}} {_stage_time(workspace, name, unreadable)}" for name in shown]
    lines += _beside("Pretraining", pretraining_place(workspace), unreadable)
    jobs = []
    rounds = unreadable.or_else((), workspace.rounds)
    for number, place in enumerate(rounds or [workspace], 1):
        if place.root != workspace.root:
            products = [s for s in between if number > 1]
            times = [f", {s.product or s.name} made {_stage_time(place, s.name, unreadable)}" for s in products]
            lines += ["", f"Round {number} of {workspace.num_rounds}{''.join(times)}"]
        jobs_here = place.readable_jobs(unreadable)
        jobs += jobs_here
        if jobs_here:
            lines += ["", *_table([_cells(place, job, claim) for job, claim in jobs_here])]
        lines += _beside("From scratch (compare_scratch)", scratch_place(place), unreadable)
    if not jobs and not unreadable.messages:
        return [*lines, "", "No training jobs yet. `autoseg generate` plans them."]
    states = [job.state for job, _ in jobs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines += ["", f"{counted(len(jobs), 'job')}: {counts}. `autoseg status JOB` shows a job's log."]
    if any(state in ("failed", "diverged") for state in states):
        lines.append("`autoseg retry` tries the failed ones again.")
    return lines


def _beside(title: str, place: Workspace, unreadable: Unreadable) -> list[str]:
    """The jobs of a folder beside those of training, and how far they are; nothing where there is none."""
    jobs = place.readable_jobs(unreadable) if place.root.is_dir() else []
    return ["", title, *_table([_cells(place, job, claim) for job, claim in jobs])] if jobs else []


def job_status(work_dir: Path, name: str) -> str:
    """Tell the state of one job, its last error in full, and the end of its log.

    Raises:
        WorkspaceError: The folder is no run's.
        ConfigError: There is no such job.
    """
    workspace = _open(work_dir)
    places = workspace.rounds() or [workspace]
    unreadable = Unreadable()
    every = [(place, job, claim) for place in places for job, claim in place.readable_jobs(unreadable)]
    by_name = {job.name: (place, job, claim) for place, job, claim in every}  # the last round's, where it has the job
    by_name |= {f"{place.root.name}/{job.name}": (place, job, claim) for place, job, claim in every if len(places) > 1}
    if name not in by_name:
        if unreadable.messages:
            raise WorkspaceError(unreadable.messages)
        raise ConfigError(f"{name}: no such job in {work_dir}. {suggest(name, by_name)}")
    workspace, job, claim = by_name[name]
    paths = workspace.job_dir(job.algo, job.fold)
    lines = _table([_cells(workspace, job, claim)])
    if job.error:
        lines += ["", job.error.rstrip()]
    lines += ["", *job.warnings] if job.warnings else []
    printed = workspace.root / "state" / "launch" / f"{job.name}.out"
    for path in (paths.log, printed):
        if lines_shown := last_lines(path, LOG_LINES):
            lines += ["", f"{path}:", *lines_shown]
    return "\n".join(lines)


def watch(work_dir: Path, stages: Sequence[Stage[Any]]) -> None:
    """Show the state again and again until no job is pending or running; Ctrl-C ends it.

    On a terminal the screen is written anew; elsewhere the state is printed whenever it changed.
    """
    shown = ""
    while True:
        text = status(work_dir, stages)
        if sys.stdout.isatty():
            sys.stdout.write(f"\x1b[H\x1b[2J{printable(text)}\n")
        elif text != shown:
            sys.stdout.write(f"{printable(text)}\n\n")
        sys.stdout.flush()
        shown = text
        workspace = Workspace(work_dir)
        states = {job.state for job, _ in workspace.latest().current_jobs()}
        is_last = workspace.num_rounds in (1, workspace.latest().round)
        if states and is_last and not states & {"pending", "running"}:
            return
        time.sleep(WATCH_S)


def _open(work_dir: Path) -> Workspace:
    workspace = Workspace(work_dir)
    if not work_dir.is_dir():
        raise WorkspaceError(f"{work_dir}: no such folder. Give a run's folder with --work_dir.")
    check_readable(workspace.run)
    if not workspace.job_names() and not workspace.settings.exists() and not (work_dir / "state").is_dir():
        raise WorkspaceError(f"{work_dir}: not a run's folder. Give a run's folder with --work_dir.")
    return workspace


def _stage_time(workspace: Workspace, stage: str, unreadable: Unreadable) -> str:
    """When a stage last ended, of a run in its last round; `-` where it has not."""
    is_round = workspace.root != workspace.run
    name = f"round {unreadable.or_else(0, lambda: workspace.round)}: {stage}" if is_round else stage
    ended = [
        line.started + line.seconds
        for line in unreadable.or_else((), lambda: read_usage(workspace))
        if line.ended == "ok" and name in (line.stage, line.stage.rpartition(": ")[2])
    ]
    if not ended:  # nothing is known of the run's usage
        stamp = unreadable.or_else(None, lambda: workspace.read_stamp(stage))
        ended = [] if stamp is None else [stamp.time]
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ended[-1])) if ended else "-"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
    right = {COLUMNS.index(name) for name in ("Epoch", "Dice", "Time", "Left")}
    return [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [COLUMNS, *rows]
    ]


def _cells(workspace: Workspace, job: Job, claim: ClaimState) -> tuple[str, ...]:
    """A job's row."""
    running = job.state == "running"
    is_begun = job.state != "pending" or job.starts > 0
    epoch = _last_epoch(workspace.job_dir(job.algo, job.fold).metrics) if is_begun else None
    dice, left, reached, seconds = job.dice, None, "", job.seconds
    if epoch is not None:
        dice = epoch.best_dice if dice is None and isinstance(epoch, EpochLine) else dice
        left = epoch.time_left_s if running else None
        reached = f"{epoch.epoch}/{epoch.num_epochs}" if epoch.num_epochs else str(epoch.epoch)
        seconds = seconds if job.state == "done" else epoch.seconds
    device = ""
    if running and claim.holder is not None:
        device = f"{claim.holder.host}:{claim.holder.device}"
    return (
        job.name,
        job.state,
        device or "-",
        reached or "-",
        "-" if dice is None else f"{dice:.4f}",
        format_duration(seconds) if seconds else "-",
        "-" if left is None else format_duration(left),
        job.error.strip().splitlines()[0] if job.error.strip() else "",
    )


def _last_epoch(path: Path) -> EpochLine | LessonLine | None:
    """The last whole line of metrics.jsonl; one that is being written, or is no epoch, is passed over."""
    for line in reversed(last_lines(path, 2)):
        for kind in (EpochLine, LessonLine):
            try:
                return kind.model_validate_json(line)
            except ValueError:
                continue
    return None
