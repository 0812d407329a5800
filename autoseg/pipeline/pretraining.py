"""The stage `pretrain`: which networks are pretrained on which images, their plans, their jobs on the launcher.

It comes before the jobs are planned, since they take over the width of what was pretrained. A network is therefore
planned twice: here for the time that its jobs are likely to get, and then with the weights that were made.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.config.networks import LOCATOR, AlgoName
from autoseg.config.settings import PRETRAINED, Settings
from autoseg.config.units import parse_duration
from autoseg.data.datalists.cases import Datalist
from autoseg.data.datalists.datalist import read_datalist
from autoseg.errors import ConfigError, WorkspaceError, counted
from autoseg.launch import Task, launch, stop_with_launcher
from autoseg.pipeline.budget import RESERVED_SHARE, pretraining_s, work_began
from autoseg.pipeline.context import RunContext, num_places
from autoseg.pipeline.job_plans import select_folds
from autoseg.pipeline.training_jobs import Attempts, all_done, in_this_process, job_resources
from autoseg.pipeline.worker import planned_settings
from autoseg.workspace.claims import read_claim
from autoseg.workspace.files import write_yaml
from autoseg.workspace.layout import check_writable
from autoseg.workspace.pretraining import lessons, pretraining_place
from autoseg.workspace.stored import write_stored
from autoseg.workspace.workspace import Workspace

if TYPE_CHECKING:
    from autoseg.pretraining.images import ImageSet

log = logging.getLogger(__name__)

Name = tuple[AlgoName, int]


def left_out(settings: Settings) -> str:
    """Why no network is pretrained; empty where one is."""
    if settings.pretrain.method == "none":
        return "pretrain.method: none"
    if not isinstance(settings.algos, str) and not any(map(settings.is_pretrained, settings.algos)):
        return "init_weights names other weights"
    return ""


def pretrain_run(run: RunContext) -> bool:
    """Pretrain all networks of a run that are to start from it, as far as that is not done.

    Returns:
        Whether all are done at the end.

    Raises:
        ConfigError: A network cannot be pretrained, or there are too few images.
        Interrupted: A signal came; everything is saved.
    """
    from autoseg.pretraining.images import image_sets

    workspace, settings = run.workspace, run.job_settings
    place = pretraining_place(workspace)
    datalist = read_datalist(workspace.datalist, settings.dataroot)
    algos = _pretrained(settings)
    folds = select_folds(settings, datalist, None, None)
    sets = image_sets(datalist, folds, all_images=settings.pretrain.all_images, has_rounds=workspace.num_rounds > 1)
    _say(sets)
    budget = run.budget_in(place)
    each_s = _each_s(settings, len(algos) * len(sets))
    names = [_write_plan(run, datalist, algo, images, folds, each_s) for images in sets for algo in algos]
    _forget(place, names)
    if budget is None:
        return pretrain_jobs(workspace, settings, names)
    with budget.kept():
        try:
            return pretrain_jobs(workspace, settings, names)
        finally:
            budget.save()


def _pretrained(settings: Settings) -> list[AlgoName]:
    """The networks that are pretrained.

    Raises:
        ConfigError: One was named that cannot be, or none of them can.
    """
    from autoseg.networks import network_file

    wanted = [algo for algo in settings.networks if settings.is_pretrained(algo)]
    without = [algo for algo in wanted if not network_file(algo).LATENT]
    named = settings.init_weights if isinstance(settings.init_weights, dict) else {}
    faults = [algo for algo in without if named.get(algo) == PRETRAINED or len(without) == len(wanted)]
    if faults:
        raise ConfigError(
            f"pretrain: {', '.join(faults)} cannot be pretrained on images alone. Expected segresnet, resenc, "
            "swinunetr or unetr among algos."
        )
    if without:
        log.info("pretrain: %s cannot be pretrained and will start from random weights", ", ".join(without))
    return [algo for algo in wanted if algo not in without]


def _say(sets: Sequence[ImageSet]) -> None:
    """Say what is learned from, and for which folds."""
    first = sets[0]
    if first.fold is None:
        seen = f", {len(first.scored)} of them of cases that models are scored on" if first.scored else ""
        log.info("pretrain: %s for all folds%s", counted(len(first.cases), "image"), seen)
        return
    log.info(
        "pretrain: %d pretrainings a network, one for each fold, since few images lie outside of the folds; with more "
        "images under `unlabeled`, or pretrain.all_images: true, one is enough", len(sets),
    )  # fmt: skip


def _each_s(settings: Settings, count: int) -> float | None:
    """Seconds of each pretraining; None: their epochs alone decide."""
    total_s = pretraining_s(settings)
    return None if total_s is None else round(total_s / math.ceil(count / num_places(settings)), 1)


def _likely_s(settings: Settings, num_jobs: int) -> Callable[[str], float | None]:
    """About the seconds that a job of training will get, for which its network is sized."""
    if settings.budget is None:
        return lambda name: None
    left_s = parse_duration(settings.budget) - (pretraining_s(settings) or 0.0)
    share_s = max(1.0, (1 - RESERVED_SHARE) * left_s / math.ceil(num_jobs / num_places(settings)))
    return lambda name: round(share_s, 1)


def _write_plan(
    run: RunContext,
    datalist: Datalist,
    algo: AlgoName,
    images: ImageSet,
    folds: Sequence[int],
    each_s: float | None,
) -> Name:
    """Write the plan and the lesson of a pretraining, where they are missing or were made from other inputs."""
    from autoseg.algos.fit import fitted_plan
    from autoseg.algos.generate import plan_sources
    from autoseg.algos.inputs import planning
    from autoseg.algos.measurements import Measurements
    from autoseg.algos.planner import make_plan
    from autoseg.hardware.device import pick_device
    from autoseg.pretraining.images import lesson_of
    from autoseg.pretraining.plan import pretraining_plan
    from autoseg.workspace.files import digest

    settings, place = run.job_settings, pretraining_place(run.workspace)
    fold = images.fold or 0
    paths = place.job_dir(algo, fold)
    likely_s = _likely_s(settings, len(settings.networks) * len(folds))
    [inputs] = planning(run.workspace, datalist, settings, run.origins, [(algo, fold)], likely_s, keeps_starts=False)
    lesson = lesson_of(images, datalist, settings.pretrain, settings.seed)
    sources = plan_sources(inputs) | {
        "pretrain": digest([settings.pretrain.epochs, each_s, settings.gpus_per_job]),
        "images and method": digest(lesson),
    }
    stage = f"pretrain/{algo}_{fold}"
    if paths.plan.exists() and paths.lesson.exists() and not place.stale(stage, sources):
        return algo, fold
    if settings.launcher == "local":
        plan, _ = fitted_plan(pick_device(settings.device), inputs, Measurements(run.workspace.steps))
    else:
        plan, _ = make_plan(inputs)
    pretraining = pretraining_plan(
        plan,
        settings.pretrain,
        num_images=len(lesson.training),
        budget_s=each_s,
        on_gpu=inputs.hardware.on_gpu,
        processes=settings.gpus_per_job if inputs.hardware.on_gpu else 1,
        step_s=plan.step_s,
    )
    write_yaml(paths.plan, pretraining.model_dump(mode="json"))
    write_stored(paths.lesson, lesson)
    place.stamp(stage, sources)
    return algo, fold


def _forget(place: Workspace, names: Sequence[Name]) -> None:
    """Take the lessons from other jobs of the same networks, so that nothing starts from them; their files stay."""
    algos = {algo for algo, _ in names}
    for name in lessons(place):
        if name[0] in algos and name not in names:
            place.job_dir(*name).lesson.unlink(missing_ok=True)


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
                    device=settings.device, num_workers=settings.num_workers, wait=True,
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
    words += ["--device", settings.device]
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
            device=device, num_workers=num_workers, wait=wait, started=work_began(),
        )  # fmt: skip
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0 if job.state == "done" else 1
