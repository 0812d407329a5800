"""From settings to the best trial: an Optuna study, worked on by any number of workers on any launcher.

work_dir/<study>/
  sweep.json                         the settings, for workers on other machines
  study.journal                      Optuna's storage, where no other was set
  trial_0007/settings.yaml           what the trial changed, as `autoseg run --settings` takes it
  trial_0007/<algo>_<fold>/          its jobs, as a run's
  best.yaml, trials.json, plots/
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from autoseg.config.load import load_settings
from autoseg.config.networks import AlgoName
from autoseg.config.settings import Settings
from autoseg.config.units import parse_duration
from autoseg.data.datalists.cases import Datalist, case_digest
from autoseg.data.datalists.datalist import read_datalist
from autoseg.errors import ConfigError, WorkspaceError, counted
from autoseg.launch import Task, cluster_of, launch, stop_with_launcher
from autoseg.pipeline.networks import with_any_network, with_networks
from autoseg.pipeline.training_jobs import in_this_process, job_resources
from autoseg.sweep.trial import Sweep, run_trial
from autoseg.workspace.files import PUBLIC, SECRET, digest, log_to
from autoseg.workspace.layout import check_writable
from autoseg.workspace.stored import Moment, Stored, read_stored, write_stored
from autoseg.workspace.workspace import Workspace

if TYPE_CHECKING:
    from autoseg.plan import Plan
    from autoseg.sweep.study import Study

log = logging.getLogger(__name__)

POLL_S = 2.0


class SweepFile(Stored):
    """What stands in a sweep's sweep.json."""

    advice: ClassVar[str] = "Start the sweep again without --join, which writes it."

    settings: Settings
    """With paths from the work_dir."""
    origins: dict[str, str]
    until: Moment | None
    """When the trials that run are stopped; None: no end."""


def run_sweep(
    input_path: Path, overrides: Mapping[str, str], *, trials: int | None, budget: str | None
) -> tuple[int, str]:
    """Search for the best settings; started again, go on.

    Args:
        overrides: settings on the command line.
        trials: instead of the settings' number.
        budget: time for this call, such as 4h; what runs at its end is stopped as a pruned trial is.

    Returns:
        Exit code: 0, or 1 where no trial was finished; and the table of the best trials.

    Raises:
        AutosegError: What the user can repair, before anything is trained.
    """
    from autoseg.pipeline.run import run_input
    from autoseg.sweep.results import best_trials, write_results
    from autoseg.sweep.space import read_space

    begin = time.time()
    settings, origins = load_settings(input_path, overrides)
    if trials is not None:
        settings = settings.model_copy(update={"sweep": settings.sweep.model_copy(update={"trials": trials})})
    settings = _with_places(settings)
    try:
        until = None if budget is None else begin + parse_duration(budget)
    except ConfigError as error:
        raise ConfigError(f"--budget: {error}") from None
    read_space(with_any_network(settings), origins)  # what is wrong with it is said before the data are read
    if settings.gpus_per_job > 1:
        raise ConfigError(f"gpus_per_job: {settings.gpus_per_job} was set, but a trial trains on one device. Set 1.")
    run_input(("analyze",), input_path, overrides)
    workspace = Workspace(settings.work_dir)
    folder = workspace.root / settings.sweep.study
    datalist = read_datalist(workspace.datalist, settings.dataroot)
    wrong = [fold for fold in settings.sweep.folds if fold >= datalist.num_fold]
    if wrong:
        raise ConfigError(f"sweep.folds: no fold {wrong[0]}. The datalist has folds 0 to {datalist.num_fold - 1}.")
    with workspace.lock(), log_to(workspace.log):
        settings = with_networks(workspace, settings, anew=True)
        space = read_space(settings, origins)
        study = open_study(workspace, settings, origins, datalist)
        if settings.sweep.pruner != "none" and not study.is_pruned:
            log.warning("sweep.pruner: has no effect with two objectives: every trial trains to its end")
        mode = PUBLIC if settings.sweep.storage is None else SECRET
        write_stored(folder / "sweep.json", _portable(settings, origins, until), mode=mode)
        study.enqueue(space.of_plan(_first_plan(workspace, datalist, settings, origins)))
        log.info("sweep: %s of %s", counted(settings.sweep.trials, "trial"), ", ".join(p.key for p in space.parameters))
        if in_this_process(settings):
            _work(Sweep(workspace, settings, origins, datalist, study, until))
        else:
            _launch_workers(workspace, settings, _num_workers(settings))
        return 0 if best_trials(study) else 1, write_results(study)


def join_sweep(work_dir: Path, study_name: str) -> int:
    """Work on the trials of a sweep that was begun, until there are none left; on any machine that sees the work_dir.

    Returns:
        0.

    Raises:
        WorkspaceError: There is no such sweep.
    """
    workspace = Workspace(work_dir)
    path = workspace.root / study_name / "sweep.json"
    if not path.exists():
        raise WorkspaceError(
            f"{workspace.root}: no sweep {study_name} was begun here. Run `autoseg sweep` without --join."
        )
    check_writable(workspace.run)
    stored = read_stored(path, SweepFile)
    settings = _with_places_from(workspace.root, stored.settings)
    datalist = read_datalist(workspace.datalist, settings.dataroot)
    stop_with_launcher()
    origins = stored.origins
    study = open_study(workspace, settings, origins, datalist)
    _work(Sweep(workspace, settings, origins, datalist, study, stored.until))
    return 0


def open_study(workspace: Workspace, settings: Settings, origins: Mapping[str, str], datalist: Datalist) -> Study:
    """Open or make the study of the settings. Raises: as `read_space` and `Study`."""
    from autoseg.sweep.space import read_space
    from autoseg.sweep.study import Study

    fixed = {algo: settings.hyper(algo) for algo in settings.networks}
    made_of = {
        "cases": digest([[c.name, c.fold, case_digest(c)] for c in datalist.training]),
        "settings": digest([fixed, settings.seed]),
    }
    space = read_space(settings, origins)
    return Study(workspace.root / settings.sweep.study, settings.sweep, space, made_of, seed=settings.seed)


def _portable(settings: Settings, origins: Mapping[str, str], until: float | None) -> SweepFile:
    """What other processes and machines need to join, with paths from the work_dir."""
    relative = settings.with_paths(lambda path: Path(os.path.relpath(path, settings.work_dir)))
    return SweepFile(settings=relative, origins=dict(origins), until=until)


def _with_places_from(root: Path, settings: Settings) -> Settings:
    """Settings as `_portable` stored them, with paths from here."""
    return settings.with_paths(lambda path: Path(os.path.normpath(root / path)))


def _first_plan(workspace: Workspace, datalist: Datalist, settings: Settings, origins: Mapping[str, str]) -> Plan:
    """What the planner would take by itself: the first trial, to be beaten."""
    from autoseg.algos.inputs import planning
    from autoseg.algos.planner import make_plan

    jobs: list[tuple[AlgoName, int]] = [(settings.networks[0], settings.sweep.folds[0])]
    return make_plan(next(planning(workspace, datalist, settings, origins, jobs)))[0]


# -- workers


def _num_workers(settings: Settings) -> int:
    if settings.sweep.workers is not None:
        return settings.sweep.workers
    if (cluster := cluster_of(settings)) is not None:
        return cluster.num_workers(settings, *job_resources(settings))
    from autoseg.launch.local import find_places

    return len(find_places(settings))


def _with_places(settings: Settings) -> Settings:
    """Settings that make room on this machine for the workers that were asked for."""
    from autoseg.launch.local import find_places

    if settings.launcher != "local" or settings.sweep.workers is None:
        return settings
    devices = len(find_places(settings)) // settings.jobs_per_device
    return settings.model_copy(update={"jobs_per_device": math.ceil(settings.sweep.workers / devices)})


def _launch_workers(workspace: Workspace, settings: Settings, count: int) -> None:
    """Start workers and wait for them; one that dies is started again as often as `retries` says."""
    gpus, cpus = job_resources(settings)
    words = ("sweep", "--work_dir", str(workspace.root), "--join", "--sweep.study", settings.sweep.study)
    tasks = [Task(name=f"{settings.sweep.study}_{i}", words=words, gpus=gpus, cpus=cpus) for i in range(count)]
    deaths: dict[str, int] = {}

    def ended(task: Task, code: int) -> bool:
        if code == 0:
            return False
        deaths[task.name] = deaths.get(task.name, 0) + 1
        log.warning("sweep: worker %s ended with code %d; see state/launch/%s.out", task.name, code, task.name)
        return deaths[task.name] <= settings.retries

    launch(tasks, settings, ended, output=workspace.root / "state" / "launch")


def _work(sweep: Sweep) -> None:
    """Take trials until there are none left."""
    while not sweep.is_over:
        taken = sweep.study.next_trial()
        if taken is False:
            return
        if taken is True:  # others are at work; should one die, its trial is ours
            time.sleep(POLL_S)
            continue
        assert not isinstance(taken, bool)
        trial, claim = taken
        try:
            run_trial(sweep, trial)
        finally:
            claim.__exit__(None, None, None)
