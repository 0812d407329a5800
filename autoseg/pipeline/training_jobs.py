"""The training jobs of a run: which are open, on what they run, when one is tried again, when it is given up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from autoseg.config.networks import AlgoName
from autoseg.config.settings import Settings
from autoseg.config.units import format_duration
from autoseg.data.datalists.cases import Datalist
from autoseg.errors import ConfigError, counted
from autoseg.launch import Task, cluster_of, launch
from autoseg.workspace.claims import read_claim
from autoseg.workspace.files import last_lines
from autoseg.workspace.jobs import Job
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

MOST_STARTS = 10
"""Starts of a job without an epoch between them after which it is given up, even where there was no error message."""
USERS_FAULT = 2
"""Exit code of a worker that tells what is to be changed before it can begin: no signal stopped it."""
CLUSTER_CPUS = 8
"""Threads of a GPU job on a cluster. Source: Auto3DSeg and nnU-Net start 6 to 12 loaders a GPU."""


def train_jobs(
    workspace: Workspace,
    datalist: Datalist,
    settings: Settings,
    jobs: Sequence[tuple[AlgoName, int]],
    *,
    again: bool = False,
    begun: float | None = None,
    before: Callable[[AlgoName, int], bool] = lambda algo, fold: True,
) -> bool:
    """Train every job that is not done, on the launcher of the settings.

    Args:
        again: train done ones too, and all from the start.
        begun: monotonic time from which the first job counts its budget, where this process trains it; None: its start.
        before: called just before a job starts, where this process trains it; False: it is left out.

    Returns:
        Whether all but dropped ones are done at the end.

    Raises:
        ConfigError: Plans were edited so that they cannot be trained by; all of them.
        ChangedJobsError: Weights of done jobs are not those that training left; all of them.
        Interrupted: A signal came; everything is saved.
    """
    from autoseg.inference.seals import check_jobs  # it loads torch, which an analysis and its report do not need

    _check_plans(workspace, jobs)
    opened = {(algo, fold): _open_reasons(workspace, datalist, algo, fold) for algo, fold in jobs}
    if not again:
        check_jobs([workspace.job_dir(*name) for name, (*_, keeps_weights) in opened.items() if keeps_weights])
    _say_length(workspace, settings, jobs)
    todo: list[tuple[AlgoName, int]] = []
    begin = time.monotonic()
    for number, (algo, fold) in enumerate(jobs, 1):
        job, reasons, _ = opened[algo, fold]
        if again:
            reasons.append("--again was given")
            job.dice = None  # trained from the start, not scored again
            workspace.job_dir(algo, fold).checkpoint.unlink(missing_ok=True)
        if job.state == "done" and not reasons:
            log.info("train: %s is done (Dice %.4f)", job.name, job.dice)
            continue
        because = f", because {', '.join(reasons)}" if reasons else ""
        log.info("train: job %d of %d, %s%s", number, len(jobs), job.name, because)
        if not read_claim(workspace.job_dir(algo, fold).claims).is_live:
            job.state, job.error, job.starts = "pending", "", 0
            workspace.write_job(job)
        todo.append((algo, fold))
    attempts = Attempts(workspace, settings.retries)
    if in_this_process(settings):
        _train_here(workspace, settings, todo, attempts, begun, before)
    elif todo:
        tasks = [_task(workspace, settings, algo, fold) for algo, fold in _longest_first(workspace, settings, todo)]
        output = workspace.root / "state" / "launch"
        launch(tasks, settings, attempts.ended, output=output, memory_gib=attempts.memory_gib)
    return all_done([workspace.read_job(algo, fold) for algo, fold in jobs], "train", time.monotonic() - begin)


def all_done(results: Sequence[Job], stage: str, seconds: float | None = None) -> bool:
    """Say what became of the jobs of a stage; whether all but dropped ones are done.

    Args:
        seconds: that they took; None: it is not said.
    """
    dropped = [job for job in results if job.state == "pruned"]
    bad = [job for job in results if job.state not in ("done", "pruned")]
    if len(results) > 1:
        left_out = f", {len(dropped)} dropped" if dropped else ""
        num_done = len(results) - len(bad) - len(dropped)
        took = "" if seconds is None else f" in {seconds:.0f} s"
        log.info("%s: %d of %d jobs done%s%s", stage, num_done, len(results), left_out, took)
        for job in bad:
            why = job.error.splitlines()[0] if job.error else ""
            log.warning("%s: %s %s: %s", stage, job.name, job.state, why)
    return not bad


def _check_plans(workspace: Workspace, jobs: Sequence[tuple[AlgoName, int]]) -> None:
    """Say all that is wrong with the plans before the first job starts. Raises: ConfigError."""
    from autoseg.networks import checked_plan

    faults: list[str] = []
    for algo, fold in jobs:
        paths = workspace.job_dir(algo, fold)
        try:
            if paths.plan.exists():
                checked_plan(paths)
        except ConfigError as error:
            faults.extend(error.messages)
    if faults:
        raise ConfigError(faults)


def _open_reasons(workspace: Workspace, datalist: Datalist, algo: AlgoName, fold: int) -> tuple[Job, list[str], bool]:
    """A job, which of its inputs changed since it was last begun, and whether its weights are kept all the same."""
    from autoseg.plan import read_plan
    from autoseg.training.inputs import (
        cases_for,
        job_inputs,
        only_prediction_changed,
        reasons_to_train,
        weights_inputs,
    )

    job = workspace.read_job(algo, fold)
    paths = workspace.job_dir(algo, fold)
    plan = read_plan(paths)
    train_cases, val_cases = (cases_for(plan, c) for c in (datalist.train_cases(fold), datalist.val_cases(fold)))
    inputs = job_inputs(plan, train_cases, val_cases, weights_inputs(workspace, algo, fold))
    reasons = reasons_to_train(job, inputs, paths)
    is_done = job.state == "done" and not reasons
    return job, reasons, is_done or only_prediction_changed(job, inputs, paths)


def in_this_process(settings: Settings) -> bool:
    """One job after the other on the whole CPU needs no processes.

    On a GPU each job has its own: after an illegal access to memory CUDA is of no more use to a process.
    """
    from autoseg.launch.local import find_places

    if settings.launcher != "local":
        return False
    places = find_places(settings)
    return len(places) == 1 and places[0].device == "cpu"


def _train_here(
    workspace: Workspace,
    settings: Settings,
    todo: Sequence[tuple[AlgoName, int]],
    attempts: Attempts,
    begun: float | None,
    before: Callable[[AlgoName, int], bool],
) -> None:
    from autoseg.training.job import run_job

    for algo, fold in todo:
        if not before(algo, fold):
            continue
        task = Task(name=f"{algo}_{fold}", words=(algo, str(fold)))
        while True:
            job = run_job(
                workspace,
                settings.dataroot,
                algo,
                fold,
                device=settings.device,
                num_workers=settings.num_workers,
                wait=True,
                started=begun,
                track=settings.tracking,
            )
            begun = None
            if not attempts.ended(task, 0 if job.state == "done" else 1):
                break


def _task(workspace: Workspace, settings: Settings, algo: AlgoName, fold: int) -> Task:
    """The job as a command for a launcher."""
    gpus, cpus = job_resources(settings)
    words = ["train", "--work_dir", str(workspace.root), "--algo", algo, "--fold", str(fold), "--wait"]
    words += ["--device", task_device(settings, gpus)]
    if count := settings.num_workers or (cpus if settings.launcher != "local" else None):
        words += ["--num_workers", str(count)]
    return Task(name=f"{algo}_{fold}", words=tuple(words), gpus=gpus, cpus=cpus)


def job_resources(settings: Settings) -> tuple[int, int]:
    """GPUs and CPU threads that a job asks its launcher for."""
    import torch

    if (cluster := cluster_of(settings)) is None:
        on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    else:
        on_gpu = settings.device == "cuda" or (settings.device == "auto" and cluster.has_gpus(settings))
    gpus = settings.gpus_per_job if on_gpu else 0
    return gpus, settings.cpus_per_job or (CLUSTER_CPUS * gpus if gpus else 1)


def task_device(settings: Settings, gpus: int) -> str:
    """What a task is told to compute on; one that is given GPUs takes no CPU where it finds none of them."""
    return "cuda" if gpus else settings.device


class Attempts:
    """Says of each job that ended whether it is tried again."""

    def __init__(self, workspace: Workspace, retries: int) -> None:
        self.workspace, self.retries = workspace, retries
        self.failures: dict[str, int] = {}

    def memory_gib(self, task: Task) -> float | None:
        """Memory that a task's job took when it was last tried; None: not known."""
        return self._read(task).memory_gib

    def _read(self, task: Task) -> Job:
        algo, _, fold = task.name.rpartition("_")
        return self.workspace.read_job(algo, int(fold))

    def ended(self, task: Task, code: int) -> bool:
        """As `autoseg.launch.Ended`."""
        job = self._read(task)
        live = read_claim(self.workspace.job_dir(job.algo, job.fold).claims).is_live
        if job.state in ("running", "pending") and not live and code != 0:
            interrupted = job.state == "pending" and code != USERS_FAULT
            printed = last_lines(self.workspace.root / "state" / "launch" / f"{task.name}.out", 1)
            ending = f"; the last it printed: {printed[0]}" if printed else ""
            job.error = f"its process ended with code {code} and no error message{ending}"
            if interrupted and job.starts < MOST_STARTS:
                log.info("%s was stopped and goes on", job.name)
                return True
            job.state, job.can_retry = "failed", True
            self.workspace.write_job(job)
        if job.state == "done":
            dice = "" if job.dice is None else f" Dice {job.dice:.4f},"
            log.info("%s: done,%s %s", job.name, dice, format_duration(job.seconds))
            return False
        if live or job.state in ("running", "pending"):
            return True  # another worker has it; `--wait` waits for it
        failures = self.failures[task.name] = self.failures.get(task.name, 0) + 1
        what = job.error.splitlines()[0] if job.error else "no reason known"
        if not job.can_retry:
            return False
        if failures > self.retries:
            tries = "once" if failures == 1 else f"{failures} times"
            log.error("%s: given up after it failed %s: %s", job.name, tries, what)
            return False
        log.warning("%s: %s. Trying again, %d of %d", job.name, what.rstrip("."), failures, self.retries)
        return True


def _longest_first(
    workspace: Workspace, settings: Settings, todo: Sequence[tuple[AlgoName, int]]
) -> list[tuple[AlgoName, int]]:
    """Long jobs first, so that no device waits long for the last one; in the given order where times are not known."""
    times = _expected_seconds(workspace, settings, todo)
    if any(t is None for t in times):
        return list(todo)
    order = sorted(range(len(todo)), key=lambda i: -(times[i] or 0.0))
    return [todo[i] for i in order]


def _expected_seconds(
    workspace: Workspace, settings: Settings, jobs: Sequence[tuple[AlgoName, int]]
) -> list[float | None]:
    from autoseg.algos.planner import expected_seconds
    from autoseg.hardware.device import pick_device
    from autoseg.hardware.facts import find_hardware
    from autoseg.plan import read_plan

    hardware = find_hardware(pick_device(settings.device))
    return [expected_seconds(read_plan(workspace.job_dir(a, f)), hardware) for a, f in jobs]


def _say_length(workspace: Workspace, settings: Settings, jobs: Sequence[tuple[AlgoName, int]]) -> None:
    """Before hours are spent, say how many."""
    from autoseg.hardware.device import pick_device
    from autoseg.hardware.facts import find_hardware

    if settings.launcher != "local":
        return
    hardware = find_hardware(pick_device(settings.device))
    open_jobs = [(a, f) for a, f in jobs if workspace.read_job(a, f).state != "done"]
    times = _expected_seconds(workspace, settings, open_jobs)
    known = [t for t in times if t is not None]
    if not open_jobs or len(known) < len(times):
        return
    advice = "" if settings.budget else "; with --budget 2h it ends sooner"
    todo, needed = counted(len(times), "job"), format_duration(sum(known))
    log.info("train: %s to do, about %s on %s%s", todo, needed, hardware.name, advice)
