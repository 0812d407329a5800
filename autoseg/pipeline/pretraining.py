"""The stage `pretrain`: its jobs on the launcher. What is pretrained, and how, stands in pretraining_plans.py."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from autoseg.config.networks import LOCATOR, AlgoName
from autoseg.config.settings import Settings
from autoseg.errors import WorkspaceError, some_of
from autoseg.launch import Task, launch, stop_with_launcher
from autoseg.pipeline.budget import work_began
from autoseg.pipeline.context import RunContext
from autoseg.pipeline.pretraining_plans import Name, PretrainingPlans, left_out
from autoseg.pipeline.training_jobs import Attempts, all_done, in_this_process, job_resources, task_device
from autoseg.pipeline.worker import planned_settings
from autoseg.workspace.claims import read_claim
from autoseg.workspace.layout import check_writable
from autoseg.workspace.pretraining import lessons, pretraining_place
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)


def pretrain_run(run: RunContext) -> bool:
    """Pretrain all networks of a run that are to start from it, as far as that is not done.

    Returns:
        Whether all are done at the end; True where they are to be planned alone.

    Raises:
        ConfigError: A network cannot be pretrained, or there are too few images.
        Interrupted: A signal came; everything is saved.
    """
    workspace, settings = run.workspace, run.job_settings
    plans = PretrainingPlans.of(workspace, settings, run.origins)
    if run.request.plans_alone:
        plans.write()
        return True
    budget = run.budget_in(pretraining_place(workspace))
    names = plans.write()
    if budget is None:
        return pretrain_jobs(workspace, settings, names)
    with budget.kept():
        try:
            return pretrain_jobs(workspace, settings, names)
        finally:
            budget.save()


def warn_of_other_lessons(run: RunContext) -> None:
    """Say where jobs are to start from a pretraining that is not what the settings and the datalist ask for now.

    Raises:
        ConfigError: As `pretrain_run`.
    """
    if left_out(run.job_settings) or not lessons(run.workspace):
        return
    if names := PretrainingPlans.of(run.workspace, run.job_settings, run.origins).made_otherwise():
        log.warning(
            "pretrain: %s learned by another method, or from other images, than the settings ask for now. It counts as "
            "it is; run `autoseg pretrain`, or `autoseg run`, to make it anew.",
            some_of(names),
        )


def pretrain_jobs(workspace: Workspace, settings: Settings, names: Sequence[Name]) -> bool:
    """Do every pretraining that is not done, on the launcher of the settings.

    Returns, Raises: as `pretrain_run`.
    """
    from autoseg.pretraining.job import is_done, run_pretraining

    place = pretraining_place(workspace)
    attempts = Attempts(place, settings.retries)
    todo = []
    for number, (algo, fold) in enumerate(names, 1):
        job = place.read_job(algo, fold)
        if is_done(workspace, settings.dataroot, algo, fold):
            log.info("pretrain: %s is done", job.name)
            continue
        log.info("pretrain: job %d of %d, %s", number, len(names), job.name)
        if not read_claim(place.job_dir(algo, fold).claims).is_live:
            job.state, job.error, job.starts = "pending", "", 0
            place.write_job(job)
        todo.append((algo, fold))
    tasks = [_task(workspace, settings, algo, fold) for algo, fold in todo]
    if in_this_process(settings):
        for task, (algo, fold) in zip(tasks, todo, strict=True):
            while True:
                job = run_pretraining(
                    workspace, settings.dataroot, algo, fold,
                    device=settings.device, num_workers=settings.num_workers, wait=True, track=settings.tracking,
                )  # fmt: skip
                if not attempts.ended(task, 0 if job.state == "done" else 1):
                    break
    elif tasks:
        output = place.root / "state" / "launch"
        launch(tasks, settings, attempts.ended, output=output, memory_gib=attempts.memory_gib)
    return all_done([place.read_job(algo, fold) for algo, fold in names], "pretrain")


def _task(workspace: Workspace, settings: Settings, algo: AlgoName, fold: int) -> Task:
    """A pretraining as a command for a launcher."""
    gpus, cpus = job_resources(settings)
    words = ["pretrain", "--work_dir", str(workspace.root), "--algo", algo, "--fold", str(fold), "--wait"]
    words += ["--device", task_device(settings, gpus)]
    if count := settings.num_workers or (cpus if settings.launcher != "local" else None):
        words += ["--num_workers", str(count)]
    return Task(name=f"{algo}_{fold}", words=tuple(words), gpus=gpus, cpus=cpus)


def work_on_pretraining(
    work_dir: Path, algo: AlgoName, fold: int, *, device: str | None, num_workers: int | None, wait: bool
) -> int:
    """Do one planned pretraining of a run: what launchers and torchrun start.

    Args:
        device, num_workers: None: as the run's settings say.
        wait: Wait where another worker has it.

    Returns:
        0 where it is done, else 1.

    Raises:
        WorkspaceError: It is not planned.
        Busy: Another worker has it.
        Interrupted: A signal came; it is saved.
    """
    workspace = Workspace(work_dir)
    check_writable(workspace.run)
    settings = planned_settings(workspace)
    if algo == LOCATOR or not pretraining_place(workspace).job_dir(algo, fold).lesson.exists():
        raise WorkspaceError(
            f"{workspace.root}: no pretraining of {algo}_{fold} is planned. Run `autoseg pretrain --input input.yaml`."
        )
    stop_with_launcher()
    import torch.distributed as dist

    from autoseg.pretraining.job import run_pretraining
    from autoseg.training.processes import join_processes

    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("autoseg").setLevel(logging.WARNING)
    device, num_workers = device or settings.device, num_workers or settings.num_workers
    join_processes(device)
    try:
        job = run_pretraining(
            workspace, settings.dataroot, algo, fold,
            device=device, num_workers=num_workers, wait=wait, started=work_began(), track=settings.tracking,
        )  # fmt: skip
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0 if job.state == "done" else 1
